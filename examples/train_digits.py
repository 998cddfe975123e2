"""Train a small residual network on handwritten digits, once with torch.nn's convolutions, once with myconv's.

    python examples/train_digits.py [--seed 0] [--output picture.png]

The digits are the 1797 images of 8x8 pixels in scikit-learn; a quarter of them, always the same, is the test set.
Both sides start from the same weights and see the same batches. In float32 each must reach 98% test accuracy; in
float64 their losses must agree at every step. Else the exit status is 1.
"""

import argparse
import importlib.util
import sys
from pathlib import Path
from typing import NamedTuple

EXTRAS = 'pip install "myconv[examples]"'
MYCONV = 'pip install --no-build-isolation ".[examples]" (in the root of the repository, with torch installed)'

try:
    import torch
    import torch.nn.functional as F
    from matplotlib.figure import Figure
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.table import Table
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split
    from torch import Tensor, nn

    import myconv
except ModuleNotFoundError as error:
    there = all(importlib.util.find_spec(name) for name in ("torch", "myconv"))
    sys.exit(f"train_digits needs {error.name}, which is not installed. Run: {EXTRAS if there else MYCONV}")

EPOCHS, BATCH, RATE = 15, 64, 0.1
ACCURACY = 0.98  # in float32, of each side
TOLERANCE = 1e-8  # between the losses of a step, in float64
SIDES = ("torch.nn", "myconv")
DTYPES = (torch.float32, torch.float64)


class Block(nn.Module):
    """A 3x3, a depthwise 3x3 and a 1x1 convolution beside a 1x1 shortcut. BatchNorm makes their biases useless."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(channels, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()),
            *(nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False), nn.BatchNorm2d(width), nn.ReLU()),
            *(nn.Conv2d(width, width, 1, bias=False), nn.BatchNorm2d(width)),
        )
        self.shortcut = nn.Sequential(nn.Conv2d(channels, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


def make_net(side: str, dtype: torch.dtype, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    net = nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        *(Block(16, 32, stride=2), Block(32, 64, stride=1)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)),
    )
    if side == "myconv":
        report = myconv.replace(net)
        if report.left or not report.swapped:
            sys.exit(f"FAILED: myconv.replace left convolutions of torch.nn in the net: {report}")
    return net.to(dtype)


class Run(NamedTuple):
    losses: Tensor  # one a step
    accuracy: float  # on the test set, after the last step


def train(net: nn.Module, images: list[Tensor], labels: list[Tensor], seed: int, progress: Progress, task: int) -> Run:
    order = torch.Generator().manual_seed(seed)
    steps = EPOCHS * (len(images[0]) // BATCH)
    optimizer = torch.optim.SGD(net.parameters(), RATE, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    losses = []
    while len(losses) < steps:
        shuffled = torch.randperm(len(images[0]), generator=order)
        for batch in shuffled[: len(shuffled) // BATCH * BATCH].split(BATCH):
            loss = F.cross_entropy(net(images[0][batch]), labels[0][batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        progress.advance(task)
    net.eval()
    with torch.inference_mode():
        right = net(images[1]).argmax(1) == labels[1]
    return Run(torch.tensor(losses, dtype=torch.float64), right.double().mean().item())


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def draw(runs: dict, apart: dict[torch.dtype, Tensor], output: Path) -> None:
    """The losses of both sides in float32, and what lies between the sides in either type."""
    figure = Figure(figsize=(10, 4), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2)
    styles = {"torch.nn": {"color": "#38bdf8", "lw": 4}, "myconv": {"color": "#c2410c", "lw": 1}}
    for side, style in styles.items():
        run = runs[side, torch.float32]
        left.semilogy(run.losses, label=f"{side}: {run.accuracy:.2%} of the test set", **style)
    left.set(title="Training loss, float32", xlabel="step")
    left.legend()
    for dtype, color in zip(DTYPES, ("#94a3b8", "#0f766e"), strict=True):
        label = f"{name_of(dtype)}: at most {apart[dtype].max():.1e}"
        right.semilogy(apart[dtype].clamp(min=1e-18), label=label, color=color, lw=1)  # a logarithm has no room for 0
    right.axhline(TOLERANCE, color="black", lw=1, ls="--", label="allowed in float64")
    right.set(title="Difference of the losses, torch.nn and myconv", xlabel="step")
    right.legend(loc=(0.4, 0.25))
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(output)
    except (OSError, ValueError) as error:
        sys.exit(f"train_digits: cannot write {output}: {error}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train on handwritten digits with torch.nn and with myconv.")
    picture = Path(__file__).parent / "output" / "train_digits.png"
    parser.add_argument("--output", type=Path, default=picture, help="the picture (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the batches (default: 0)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1, the images are small)")
    args = parser.parse_args()
    if args.threads < 1:
        parser.error("--threads must be at least 1")
    return args


def main() -> int:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    digits = load_digits()
    pixels, labels = digits.images[:, None] / 16, digits.target
    split = train_test_split(pixels, labels, test_size=0.25, stratify=labels, random_state=0)
    images, labels = (list(map(torch.from_numpy, part)) for part in (split[:2], split[2:]))

    console = Console()
    runs: dict[tuple[str, torch.dtype], Run] = {}
    columns = TextColumn("{task.description:<17}"), BarColumn(), MofNCompleteColumn(), TextColumn("epochs")
    with Progress(*columns, console=console) as progress:
        for dtype in DTYPES:
            for side in SIDES:
                task = progress.add_task(f"{side}, {name_of(dtype)}", total=EPOCHS)
                net = make_net(side, dtype, args.seed)
                runs[side, dtype] = train(net, [x.to(dtype) for x in images], labels, args.seed, progress, task)
    apart = {dtype: (runs["torch.nn", dtype].losses - runs["myconv", dtype].losses).abs() for dtype in DTYPES}

    title = f"{EPOCHS} epochs, {len(apart[torch.float64])} steps, {len(labels[1])} test images"
    table = Table("", "side", "test accuracy", "last loss", "largest difference", title=title)
    table.caption = "difference: between the losses of both sides at one step"
    for (side, dtype), run in runs.items():
        first = side == SIDES[0]
        difference = "" if first else f"{apart[dtype].max():.1e}"
        table.add_row(name_of(dtype) if first else "", side, f"{run.accuracy:.2%}", f"{run.losses[-1]:.5f}", difference)
    console.print(table)

    draw(runs, apart, args.output)
    failures = [
        f"{side} reaches {runs[side, torch.float32].accuracy:.2%} of the test set, which must be above {ACCURACY:.0%}"
        for side in SIDES
        if not runs[side, torch.float32].accuracy > ACCURACY
    ]
    if not (apart[torch.float64] <= TOLERANCE).all():  # also catches NaN
        failures.append(f"float64 losses differ by {apart[torch.float64].max():.1e}; {TOLERANCE:.0e} is allowed")
    if failures:
        sys.exit("FAILED: " + "; ".join(failures))
    print(f"float64 losses agree within {apart[torch.float64].max():.1e} at every step; {TOLERANCE:.0e} is allowed")
    print(f"picture: {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
