"""Draw records of run.py.

    python benchmarks/plot.py benchmarks/results/NAME.json --out docs/images/

writes speedup-DTYPE.png, the geometric mean of torch's time / ours by category, and, from a record that has the
machine's ceilings, roofline-DTYPE.png, the FLOP/s of each row by its arithmetic intensity. Several records of one dtype
are drawn as one; of a row in more than one of them the last counts. The same records give the same bytes.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from itertools import product
from pathlib import Path

from common import geomean, require, stop

require("matplotlib")
import matplotlib.style  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.ticker import FuncFormatter  # noqa: E402
from run import DIRECTIONS  # noqa: E402

# No background, and greys and colours of middle lightness: they read on white and on black.
GREY = "#7d8590"
STYLE = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), GREY),
    **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor", "legend.facecolor"), "none"),
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "grid.color": GREY,
    "grid.alpha": 0.25,
    "font.size": 10,
    "savefig.dpi": 150,
}
LAYOUTS = {"nchw": ("NCHW", "#2f81f7"), "nhwc": ("channels_last", "#db6d28")}
SIDES = {"torch": ("torch", "#db6d28", "s"), "ours": ("myconv", "#2f81f7", "o")}
BATCH_FADES = (1.0, 0.55, 0.35)  # opacity, the smallest batch first


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", nargs="+", type=Path, metavar="RECORD", help="a JSON file that run.py wrote")
    parser.add_argument("--out", type=Path, default=Path("docs/images"), help="folder (default: docs/images)")
    return parser.parse_args()


def read_records(paths: list[Path]) -> dict[str, dict]:
    """One for each dtype: the records of a dtype, put together."""
    together: dict[str, dict] = {}
    for path in paths:
        try:
            record = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            stop(f"{path}: {error}")
        if record.get("benchmark") != "run" or list(record.get("against", ["torch"])) != ["torch"]:
            stop(f"{path.name} is not a record of run.py against torch")
        first = together.setdefault(record["dtype"], record | {"rows": {}, "commits": []})
        for key in ("machine", "threads", "isa", "torch"):
            if first[key] != record[key]:
                stop(f"{path.name} differs from the records before it in {key!r}")
        passes = " and ".join(dict.fromkeys(row["pass"] for row in record["rows"]))
        first["commits"].append(f"{(record['commit'] or 'unknown')[:7]} ({passes})")
        first["ceilings"] = record.get("ceilings") or first.get("ceilings")
        first["rows"] |= {tuple(row[key] for key in ("id", "batch", "layout", "pass")): row for row in record["rows"]}
    return {dtype: record | {"rows": list(record["rows"].values())} for dtype, record in together.items()}


def caption(record: dict) -> str:
    machine = f"{record['machine']['cpu']}, {record['threads']} threads, {record['isa']}"
    return f"{record['dtype']}, {machine}; myconv at {', '.join(record['commits'])}; torch {record['torch']}"


def passes_of(rows: list[dict]) -> list[str]:
    return sorted({row["pass"] for row in rows}, key=list(DIRECTIONS).index)


def draw_speedup(record: dict) -> Figure:
    """A panel for each pass; in it a line for each category, with a bar for each layout and batch."""
    groups = defaultdict(list)
    for row in record["rows"]:
        groups[row["pass"], row["category"], row["layout"], row["batch"]].append(row["ratio"])
    _, categories, layouts, batches = (sorted({key[i] for key in groups}) for i in range(4))
    passes = passes_of(record["rows"])
    series = list(product(layouts, batches))
    height = 0.8 / len(series)
    figure = Figure(figsize=(10, 1.6 + 0.18 * len(categories) * len(series)), layout="constrained")
    panels = figure.subplots(1, len(passes), sharey=True, sharex=True, squeeze=False)[0]
    for axes, what in zip(panels, passes):
        for i, (layout, batch) in enumerate(series):
            label, color = LAYOUTS[layout]
            fade = BATCH_FADES[min(batches.index(batch), len(BATCH_FADES) - 1)]
            for y, category in enumerate(categories):
                if ratios := groups.get((what, category, layout, batch)):
                    mean = geomean(ratios)
                    at = y - 0.4 + (i + 0.5) * height
                    axes.barh(at, mean - 1, height * 0.9, left=1, color=color, alpha=fade)
                    side = 1 if mean >= 1 else -1
                    axes.annotate(
                        f"{mean:.2f}", (mean, at), (3 * side, 0), textcoords="offset points", fontsize=7, va="center",
                        ha="left" if side > 0 else "right",
                    )  # fmt: skip
            axes.barh(0, 0, color=color, alpha=fade, label=f"{label}, batch {batch}")
        axes.axvline(1, color=GREY, lw=1.5)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set(title=what, xlabel="torch's time / myconv's")
        axes.set_yticks(range(len(categories)), categories)
        axes.grid(axis="x")
        axes.margins(x=0.15, y=0.01)
    panels[0].invert_yaxis()
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=min(len(series), 4))
    figure.suptitle(f"Right of 1 myconv is faster (geometric means)\n{caption(record)}", fontsize=10)
    return figure


def draw_roofline(record: dict) -> Figure:
    """A panel for each pass and layout, with a point for each row and side, under the two roofs."""
    flops, moved = record["ceilings"]["flops"] / 1e9, record["ceilings"]["bytes"] / 1e9
    rows = [row for row in record["rows"] if "ours_share" in row]
    passes, layouts = passes_of(rows), sorted({row["layout"] for row in rows})
    figure = Figure(figsize=(10, 0.8 + 3.4 * len(passes)), layout="constrained")
    panels = figure.subplots(len(passes), len(layouts), sharex=True, sharey=True, squeeze=False)
    intensities = [row["flops"] / row["bytes"] for row in rows]
    ends = [min(*intensities, flops / moved) / 1.5, flops / moved, max(*intensities, flops / moved) * 1.5]
    for (i, what), (j, layout) in product(enumerate(passes), enumerate(layouts)):
        axes = panels[i][j]
        shown = [row for row in rows if (row["pass"], row["layout"]) == (what, layout)]
        axes.loglog(ends, [min(flops, moved * x) for x in ends], color=GREY, lw=1.5)
        for side, (label, color, marker) in SIDES.items():
            points = [(row["flops"] / row["bytes"], row["flops"] / row[f"{side}_ms"] / 1e6) for row in shown]
            axes.scatter(*zip(*points), 14, color, marker=marker, alpha=0.7, linewidths=0, label=label)
        axes.set_title(f"{what}, {LAYOUTS[layout][0]}")
        axes.grid()
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    for axes in panels[-1]:
        axes.set_xlabel("FLOPs for each byte that must move")
    for axes in panels[:, 0]:
        axes.set_ylabel("GFLOP/s")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    roofs = f"roofs: {flops:.0f} GFLOP/s of multiply-adds in registers, {moved:.0f} GB/s of a copy"
    figure.suptitle(f"{caption(record)}\n{roofs}", fontsize=10)
    return figure


def save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None})  # its version is not part of the picture
    print(f"wrote {path}")


def main() -> None:
    arguments = parse_arguments()
    with matplotlib.style.context(["default", STYLE]):
        for dtype, record in read_records(arguments.records).items():
            save(draw_speedup(record), arguments.out / f"speedup-{dtype}.png")
            if record["ceilings"]:
                save(draw_roofline(record), arguments.out / f"roofline-{dtype}.png")
            else:
                print(f"no roofline: the records of {dtype} have no ceilings")


if __name__ == "__main__":
    main()
