"""Find faces with a pretrained network, first with torch.nn's convolutions, then with myconv's.

    python examples/detect_faces.py [photo] [--output picture.png]

The network is MTCNN (Zhang, Zhang, Li, Qiao: "Joint Face Detection and Alignment using Multi-task Cascaded
Convolutional Networks", 2016): PNet looks at every window of an image pyramid, RNet and ONet refine what it
proposes, ONet also places five landmarks. Both sides must give the same boxes and landmarks, else the exit
status is 1. Without a photo it takes the portrait of Eileen Collins (NASA, public domain) in scikit-image.
"""

import argparse
import copy
import importlib.util
import sys
import time
from pathlib import Path
from statistics import median
from typing import NamedTuple

EXTRAS = "pip install pillow matplotlib rich scikit-image && pip install --no-deps facenet-pytorch==2.6.0"
MYCONV = "pip install --no-build-isolation . (in the root of the repository, with torch installed)"

try:
    import numpy as np
    import torch
    import torch.nn.functional as F
    from matplotlib.figure import Figure
    from PIL import Image, ImageOps
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.table import Table
    from torch import Tensor, nn

    import myconv
except ModuleNotFoundError as error:
    own = error.name.split(".")[0] in ("myconv", "torch")
    sys.exit(f"detect_faces needs {error.name}, which is not installed. Run: {MYCONV if own else EXTRAS}")

WINDOW, STRIDE = 12, 2  # PNet's window and its step, in pixels of a pyramid level
PYRAMID_FACTOR = 0.709  # about sqrt(1/2): each level has half the pixels of the one before
LARGEST_LEVEL = 1_000_000  # pixels; without --min-size, larger photos start at a smaller scale
TOLERANCE = 1e-3  # pixels, for faces up to 200 pixels; in proportion above, as the nets answer in box sizes
REPEATS, SECONDS = 7, 10  # timed runs of each side: seven, fewer if those would take longer than this


# ---- the three networks, with the names of the pretrained weights ----


class PNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.prelu1 = nn.Conv2d(3, 10, 3), nn.PReLU(10)
        self.pool1 = nn.MaxPool2d(2, 2, ceil_mode=True)
        self.conv2, self.prelu2 = nn.Conv2d(10, 16, 3), nn.PReLU(16)
        self.conv3, self.prelu3 = nn.Conv2d(16, 32, 3), nn.PReLU(32)
        self.conv4_1, self.conv4_2 = nn.Conv2d(32, 2, 1), nn.Conv2d(32, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool1(self.prelu1(self.conv1(x)))
        x = self.prelu3(self.conv3(self.prelu2(self.conv2(x))))
        return torch.cat([self.conv4_1(x), self.conv4_2(x)], 1)


class RNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.prelu1 = nn.Conv2d(3, 28, 3), nn.PReLU(28)
        self.pool1 = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.conv2, self.prelu2 = nn.Conv2d(28, 48, 3), nn.PReLU(48)
        self.pool2 = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.conv3, self.prelu3 = nn.Conv2d(48, 64, 2), nn.PReLU(64)
        self.dense4, self.prelu4 = nn.Linear(576, 128), nn.PReLU(128)
        self.dense5_1, self.dense5_2 = nn.Linear(128, 2), nn.Linear(128, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool1(self.prelu1(self.conv1(x)))
        x = self.pool2(self.prelu2(self.conv2(x)))
        x = self.prelu3(self.conv3(x))
        x = x.transpose(1, 3).flatten(1)  # the weights expect the order width, height, channel
        x = self.prelu4(self.dense4(x))
        return torch.cat([self.dense5_1(x), self.dense5_2(x)], 1)


class ONet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.prelu1 = nn.Conv2d(3, 32, 3), nn.PReLU(32)
        self.pool1 = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.conv2, self.prelu2 = nn.Conv2d(32, 64, 3), nn.PReLU(64)
        self.pool2 = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.conv3, self.prelu3 = nn.Conv2d(64, 64, 3), nn.PReLU(64)
        self.pool3 = nn.MaxPool2d(2, 2, ceil_mode=True)
        self.conv4, self.prelu4 = nn.Conv2d(64, 128, 2), nn.PReLU(128)
        self.dense5, self.prelu5 = nn.Linear(1152, 256), nn.PReLU(256)
        self.dense6_1, self.dense6_2, self.dense6_3 = nn.Linear(256, 2), nn.Linear(256, 4), nn.Linear(256, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool1(self.prelu1(self.conv1(x)))
        x = self.pool2(self.prelu2(self.conv2(x)))
        x = self.pool3(self.prelu3(self.conv3(x)))
        x = self.prelu4(self.conv4(x))
        x = self.prelu5(self.dense5(x.transpose(1, 3).flatten(1)))
        return torch.cat([self.dense6_1(x), self.dense6_2(x), self.dense6_3(x)], 1)


def load_nets() -> nn.ModuleDict:
    package = importlib.util.find_spec("facenet_pytorch")  # its import would need torchvision
    if package is None:
        sys.exit(f"detect_faces needs the weights in facenet-pytorch, which is not installed. Run: {EXTRAS}")
    folder = Path(package.submodule_search_locations[0]) / "data"
    nets = nn.ModuleDict({"PNet": PNet(), "RNet": RNet(), "ONet": ONet()})
    for name, net in nets.items():
        weights = folder / f"{name.lower()}.pt"
        if not weights.is_file():
            sys.exit(f"detect_faces finds no {weights.name} in {folder}. Run: {EXTRAS}")
        net.load_state_dict(torch.load(weights, weights_only=True), strict=True)
    return nets.eval()


# ---- the cascade; boxes are float64 rows (x1, y1, x2, y2) in pixels of the photo ----


class Faces(NamedTuple):
    boxes: Tensor  # (faces, 4)
    points: Tensor  # (faces, 5, 2): left eye, right eye, nose, left and right mouth corner
    scores: Tensor  # (faces,)


def suppress(boxes: Tensor, scores: Tensor, limit: float, of_smaller: bool = False) -> Tensor:
    """Keeps a box unless a better one overlaps it by more than `limit` of their union (or of the smaller)."""
    area = (boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(1)
    order = scores.argsort(descending=True, stable=True)
    kept = []
    while len(order):
        best, order = order[0], order[1:]
        kept.append(best)
        low = torch.maximum(boxes[best, :2], boxes[order, :2])
        high = torch.minimum(boxes[best, 2:], boxes[order, 2:])
        overlap = (high - low).clamp(min=0).prod(1)
        smaller = torch.minimum(area[best], area[order])
        whole = smaller if of_smaller else area[best] + area[order] - overlap
        order = order[overlap <= limit * whole]
    return torch.stack(kept) if kept else order


def shift(boxes: Tensor, offsets: Tensor) -> Tensor:
    """Moves each side by an offset that is relative to the size of the box."""
    return boxes + offsets.double() * (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)


def square(boxes: Tensor) -> Tensor:
    """The square on the same centre, as wide as the longer side."""
    side = (boxes[:, 2:] - boxes[:, :2]).amax(1, keepdim=True).clamp(min=1)
    centre = (boxes[:, 2:] + boxes[:, :2]) / 2
    return torch.cat([centre - side / 2, centre + side / 2], 1)


def crop(integral: Tensor, boxes: Tensor, size: int) -> Tensor:
    """The mean over each cell of a size x size grid laid on each box, black outside the photo.

    Reads the integral image between its pixels: a box that moves by a millionth of a pixel changes its crop
    by as little, where a crop at whole pixels could jump.
    """
    grid = torch.linspace(0, 1, size + 1, dtype=torch.float64)

    def corners(low: Tensor, high: Tensor, end: int) -> tuple[Tensor, Tensor]:
        at = (low[:, None] + (high - low)[:, None] * grid).clamp(0, end)
        whole = at.floor().clamp(max=end - 1)
        return whole.long(), at - whole

    x, x_part = corners(boxes[:, 0], boxes[:, 2], integral.shape[2] - 1)
    y, y_part = corners(boxes[:, 1], boxes[:, 3], integral.shape[1] - 1)
    x, y, x_part, y_part = x[:, None, :], y[:, :, None], x_part[:, None, :], y_part[:, :, None]
    top = torch.lerp(integral[:, y, x], integral[:, y, x + 1], x_part)
    bottom = torch.lerp(integral[:, y + 1, x], integral[:, y + 1, x + 1], x_part)
    sums = torch.lerp(top, bottom, y_part).diff(dim=2).diff(dim=3)
    cell = (boxes[:, 2:] - boxes[:, :2]).prod(1) / size**2
    return (sums / cell[:, None, None]).transpose(0, 1)


@torch.inference_mode()
def detect(image: Tensor, nets: nn.ModuleDict, min_size: float, threshold: float) -> tuple[Faces, list[tuple]]:
    """Runs the cascade on a (3, height, width) float64 image of 0..255.

    Also returns every call of a net as (name, input, output, seconds).
    """
    calls = []

    def run(name: str, pixels: Tensor) -> Tensor:
        x = ((pixels - 127.5) * 0.0078125).float()
        start = time.perf_counter()
        y = nets[name](x)
        calls.append((name, x, y, time.perf_counter() - start))
        return y

    def run_on(name: str, boxes: Tensor, size: int) -> Tensor:
        return torch.cat([run(name, crop(integral, part, size)) for part in boxes.split(256)])

    def likely(y: Tensor, at_least: float) -> tuple[Tensor, Tensor]:
        # log-odds rank the candidates: the probabilities of clear faces all round to 1 and would tie
        odds = y[:, 1] - y[:, 0]
        chosen = odds >= torch.tensor(at_least).logit()
        return odds[chosen], chosen

    none = Faces(torch.zeros(0, 4), torch.zeros(0, 5, 2), torch.zeros(0))
    proposals = [(none.boxes.double(), none.boxes, none.scores)]
    height, width = image.shape[1:]
    scale = WINDOW / min_size
    while min(height, width) * scale >= WINDOW:
        level = [max(WINDOW, round(height * scale)), max(WINDOW, round(width * scale))]
        y = run("PNet", F.interpolate(image[None], size=level, mode="area"))[0]
        row, column = torch.meshgrid(*map(torch.arange, y.shape[1:]), indexing="ij")
        y, corner = y.flatten(1).T, STRIDE * torch.stack([column, row], -1).reshape(-1, 2).double()
        to_photo = torch.tensor([width / level[1], height / level[0]], dtype=torch.float64).repeat(2)
        boxes = torch.cat([corner, corner + WINDOW], 1) * to_photo
        scores, chosen = likely(y, min(0.6, threshold))
        boxes, offsets = boxes[chosen], y[chosen, 2:6]
        kept = suppress(boxes, scores, 0.5)
        proposals.append((boxes[kept], offsets[kept], scores[kept]))
        scale *= PYRAMID_FACTOR
    boxes, offsets, scores = map(torch.cat, zip(*proposals, strict=True))
    kept = suppress(boxes, scores, 0.7)
    if not len(kept):
        return none, calls
    boxes = square(shift(boxes[kept], offsets[kept]))

    integral = F.pad(image.cumsum(1).cumsum(2), (1, 0, 1, 0))  # exact: sums of integers in float64
    y = run_on("RNet", boxes, 24)
    scores, chosen = likely(y, min(0.7, threshold))
    kept = suppress(boxes[chosen], scores, 0.7)
    if not len(kept):
        return none, calls
    boxes = square(shift(boxes[chosen][kept], y[chosen][kept, 2:6]))

    y = run_on("ONet", boxes, 48)
    scores, chosen = likely(y, threshold)
    boxes, y = boxes[chosen], y[chosen]
    points = y[:, 6:].double().unflatten(1, (2, 5)).transpose(1, 2)  # the net gives five x, then five y
    points = boxes[:, None, :2] + points * (boxes[:, 2:] - boxes[:, :2])[:, None]
    boxes = shift(boxes, y[:, 2:6])
    kept = suppress(boxes, scores, 0.7, of_smaller=True)
    return Faces(boxes[kept], points[kept], scores[kept].sigmoid()), calls


# ---- input, output ----


def read_photo(path: Path | None) -> np.ndarray:
    """The photo upright as (height, width, 3) bytes: any mode, transparency on white."""
    if path is None:
        try:
            from skimage import data
        except ModuleNotFoundError:
            sys.exit(f"detect_faces needs scikit-image for its default photo. Run: {EXTRAS}")
        return data.astronaut()
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
        if image.mode[0] in "IF":  # 16 or 32 bits a pixel: stretch to bytes
            values = np.nan_to_num(np.asarray(image, dtype=np.float64))
            values = (values - values.min()) * (255 / (np.ptp(values) or 1))
            image = Image.fromarray(values.astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return np.array(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        sys.exit(f"detect_faces: cannot read {path} as an image: {error}")


def draw(photo: np.ndarray, sides: dict[str, Faces], difference: float, output: Path) -> None:
    """The whole photo beside its clearest face, with the second result dashed on top of the first."""
    styles = [
        {"color": "#38bdf8", "lw": 4, "marker": "o", "ms": 12, "mew": 3, "mfc": "none"},
        {"color": "#ff8a00", "lw": 2, "ls": (0, (4, 3)), "marker": "x", "ms": 7, "mew": 2},
    ]
    faces = next(iter(sides.values()))
    height, width = photo.shape[:2]
    x1, y1, x2, y2 = faces.boxes[0].tolist()
    margin = 0.18 * max(x2 - x1, y2 - y1)
    views = [(0, width, height, 0), (x1 - margin, x2 + margin, y2 + margin, y1 - margin)]
    titles = [f"{width} x {height} pixels", f"the clearest face, probability {faces.scores[0]:.4f}"]
    wide = [min(max((right - left) / (low - high), 0.4), 2.5) for left, right, low, high in views]
    figure = Figure(figsize=(5.2 * sum(wide) + 0.4, 6.1), dpi=150, layout="constrained")
    panels = figure.subplots(1, 2, width_ratios=wide)
    for panel, view, title, size in zip(panels, views, titles, (0.4, 1), strict=True):
        panel.imshow(photo)
        for (name, faces), style in zip(sides.items(), styles, strict=True):
            small = style | {key: style[key] * size for key in ("lw", "ms", "mew")}
            panel.plot([], [], label=name, **style)
            for a, b, c, d in faces.boxes.tolist():
                panel.plot([a, c, c, a, a], [b, b, d, d, b], **small | {"marker": ""})
            panel.plot(*faces.points.reshape(-1, 2).T.numpy(), **small | {"ls": ""})
        panel.set(xlim=view[:2], ylim=view[2:], xticks=[], yticks=[], facecolor="black")
        panel.set_title(title, fontsize=10, color="#444444")
    title = f"Faces: {len(faces.boxes)}. Largest difference: {difference:.1e} pixel"
    figure.suptitle(title, fontsize=14, fontweight="bold")
    key = panels[0].get_legend_handles_labels()
    figure.legend(*key, loc="outside lower center", ncols=2, frameon=False, fontsize=11, handlelength=4)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(output)
    except (OSError, ValueError) as error:
        sys.exit(f"detect_faces: cannot write {output}: {error}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Detect faces with the convolutions of torch.nn and myconv.")
    picture = Path(__file__).parent / "output" / "detect_faces.png"
    parser.add_argument("image", type=Path, nargs="?", help="any photo (default: scikit-image's astronaut)")
    parser.add_argument("--output", type=Path, default=picture, help="the picture (default: %(default)s)")
    sizes = "smallest face to look for, in pixels (default: 20, more for photos above 3 million pixels)"
    parser.add_argument("--min-size", type=int, help=sizes)
    parser.add_argument("--threshold", type=float, default=0.7, help="least probability (default: 0.7)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: as torch chooses)")
    args = parser.parse_args()
    if args.min_size is not None and args.min_size < WINDOW:
        parser.error(f"--min-size must be at least {WINDOW}, the window of PNet")
    if args.threads is not None and args.threads < 1:
        parser.error("--threads must be at least 1")
    if not 0 < args.threshold < 1:
        parser.error("--threshold must lie between 0 and 1")
    return args


def main() -> int:
    args = parse_arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    photo = read_photo(args.image)
    image = torch.from_numpy(photo).permute(2, 0, 1).double().contiguous()
    min_size = args.min_size or max(20, WINDOW * (image[0].numel() / LARGEST_LEVEL) ** 0.5)

    nets = {"torch.nn": load_nets()}
    nets["myconv"] = copy.deepcopy(nets["torch.nn"])
    print(myconv.replace(nets["myconv"]))
    convolutions = [m for m in nets["myconv"].modules() if isinstance(m, nn.Conv2d)]
    if not all(isinstance(m, myconv.Conv2d) for m in convolutions):
        sys.exit("FAILED: myconv.replace left convolutions of torch.nn in the nets")

    console = Console()
    runs: dict[str, list] = {side: [] for side in nets}
    repeats = 1 + REPEATS  # the first warms up and gives the result
    columns = TextColumn("{task.description:<16}"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("")
        while len(runs["myconv"]) < repeats:
            for side in nets:  # interleaved, so that both meet the same machine
                progress.update(task, description=side, total=2 * repeats)
                start = time.perf_counter()
                faces, calls = detect(image, nets[side], min_size, args.threshold)
                seconds = {name: sum(call[3] for call in calls if call[0] == name) for name in nets[side]}
                seconds["whole cascade"] = time.perf_counter() - start
                runs[side].append((faces, [] if runs[side] else calls, seconds))
                progress.advance(task)
            first = sum(runs[side][0][2]["whole cascade"] for side in nets)
            repeats = 1 + min(REPEATS, max(1, int(SECONDS / first)))

    sides = {side: runs[side][0][0] for side in nets}
    (boxes, _, scores), ours = sides.values()
    if len(boxes) != len(ours.boxes):
        sys.exit(f"FAILED: torch.nn finds {len(boxes)} faces, myconv finds {len(ours.boxes)}")
    if not len(boxes):
        console.print(f"no faces: neither side finds one of {min_size:.0f} pixels or more")
        return 0
    # each face against the nearest of the other side, by its most distant coordinate
    apart = torch.cdist(*(torch.cat([f.boxes, f.points.flatten(1)], 1) for f in sides.values()), p=torch.inf)
    apart = apart.amin(1)

    table = Table("face", "probability", "box (x1, y1, x2, y2)", "largest difference", title="Faces")
    for i, box in enumerate(boxes.tolist()):
        corners = ", ".join(f"{v:.1f}" for v in box)
        table.add_row(str(i + 1), f"{scores[i]:.4f}", corners, f"{apart[i]:.1e} pixel")
    console.print(table)

    table = Table("", "calls", "largest difference", *nets, "ratio", title="Nets, same input to both")
    for name in runs["torch.nn"][0][2]:
        calls = [(x, y) for net, x, y, _ in runs["torch.nn"][0][1] if net == name]
        with torch.inference_mode():
            errors = [(nets["myconv"][name](x) - y).abs().max().item() for x, y in calls]
        a, b = (1e3 * median(seconds[name] for _, _, seconds in runs[side][1:]) for side in nets)
        error = f"{max(errors):.1e}" if errors else ""
        table.add_row(name, str(len(calls) or ""), error, f"{a:.1f} ms", f"{b:.1f} ms", f"{a / b:.2f}")
    table.caption = f"median of {repeats - 1} interleaved runs, threads: {torch.get_num_threads()}"
    console.print(table)

    allowed = TOLERANCE * ((boxes[:, 2:] - boxes[:, :2]).amax(1) / 200).clamp(min=1)
    if not (apart <= allowed).all():  # also catches NaN
        sys.exit(f"FAILED: boxes or landmarks differ by {apart.max():.1e} pixel; {allowed.min():.0e} is allowed")
    draw(photo, sides, apart.max().item(), args.output)
    print(f"faces: {len(boxes)}; boxes and landmarks agree within {apart.max():.1e} pixel")
    print(f"picture: {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
