"""What a type checker must accept, and, where a line says so, refuse. Checked by `make types`, never run."""

import torch

import myconv
import myconv.functional as F

x = torch.ones(2, 3, 8, 8)
w = torch.ones(4, 3, 3, 3)

conv: torch.nn.Conv2d = myconv.Conv2d(3, 4, 3, stride=(1, 2), padding=((1, 2), (0, 1)), padding_mode="reflect")
myconv.Conv1d(3, 4, 3, padding="causal")
myconv.Conv3d(3, 4, (3, 1, 1), 2, [1, 0, 0], dtype=torch.float64)
myconv.ConvTranspose2d(3, 4, 3, padding=1, output_padding=0, padding_mode="circular")(x, output_size=[10, 10])
lazy: torch.nn.Conv2d = myconv.LazyConv2d(4, 3)
y: torch.Tensor = F.conv2d(x, w, padding=(1, (0, 2)), padding_mode="replicate")
z: torch.Tensor = F.conv_transpose2d(y, w, output_padding=(1, 1), stride=[2, 2])

report = myconv.replace(conv, types=[torch.nn.Conv2d], names="0.*", inplace=False)
names: list[str] = report.swapped
myconv.patch(conv, filter=lambda name, module: name != "stem")
restored: torch.nn.Module = myconv.restore(conv).model
with myconv.override(), myconv.flags.isa("avx2"), myconv.flags.algorithm("forward", "direct"):
    workspace: int = myconv.explain(conv, x).calls[0].directions["forward"].workspace
    myconv.flags.flush_denormals(False)
version: str = myconv.__version__
threads: int = myconv.build_info()["threads"]
myconv.empty_cache()

myconv.Conv2d(3, 4)  # type: ignore[call-arg]
myconv.Conv2d(3, 4, 3, padding_mode="mirror")  # type: ignore[arg-type]
myconv.Conv2d(3, 4, 3, stride=2.5)  # type: ignore[arg-type]
F.conv2d(x, w, padding=1.5)  # type: ignore[arg-type]
F.conv_transpose2d(x, w, padding="same")  # type: ignore[arg-type]
myconv.replace(3)  # type: ignore[arg-type]
