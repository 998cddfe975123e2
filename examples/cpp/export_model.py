"""Write what main.cpp reads: a small network of myconv modules in two forms, and a sample with its answer.

    python examples/cpp/export_model.py folder

model.pt2     torch.export, then AOTInductor: a compiled library and its weights, for any batch size
model.ts.pt   TorchScript, scripted and frozen
sample.pt     a batch of eight, and what the model makes of it in Python
"""

import sys
from pathlib import Path

import torch
from torch import nn

import myconv


def make_model() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.ReLU()),
        *(nn.Conv2d(16, 16, 3, padding=1, padding_mode="reflect", groups=16), nn.ReLU()),
        *(nn.ConvTranspose2d(16, 8, 4, stride=2, padding=1), nn.ReLU()),
        nn.Conv2d(8, 3, 1),
    ).eval()
    print(myconv.replace(model))
    return model


@torch.no_grad()
def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("usage: export_model.py folder")
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    model, x = make_model(), torch.randn(8, 3, 32, 32)

    # Exported with a batch of four; main.cpp runs one and eight.
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(model, (x[:4],), dynamic_shapes=({0: batch},))
    torch._inductor.aoti_compile_and_package(program, package_path=str(folder / "model.pt2"))
    torch.jit.freeze(torch.jit.script(model)).save(str(folder / "model.ts.pt"))
    torch.save({"input": x, "output": model(x)}, folder / "sample.pt")
    print(f"model.pt2, model.ts.pt and sample.pt are in {folder}")


if __name__ == "__main__":
    main()
