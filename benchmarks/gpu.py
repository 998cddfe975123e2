"""Build, check and time myconv on a GPU: one command, for a machine that has little more than torch and nvcc.

    python benchmarks/gpu.py                           # nine minutes at most
    python benchmarks/gpu.py --stages parity streams   # some of it
    python benchmarks/gpu.py --device cpu --quick      # the stages that need no GPU, in seconds

The record is written before and after each stage, so that a run that is killed leaves one. Exit status: 0 if no stage
failed, 1 if one did, 2 if there is no CUDA device. docs/gpu.md describes the stages and the record.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from gpu_build import Skip, build, find_tool, nvcc_version, run_command

LEAST = 2.0  # seconds: with less, no stage starts
GRACE = 25.0  # seconds after the budget at which a run that hangs is stopped, with a traceback
MOST_SHOWN = 5  # failures of a stage that are printed; the record has more


class Stage(NamedTuple):
    """`share` of the time that is left is what it may take. A `fresh` one must be the first of its process."""

    name: str
    run: Callable[..., dict]
    share: float
    cuda: bool = False
    fresh: bool = False


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="default: cuda")
    parser.add_argument("--quick", action="store_true", help="a small part of each stage")
    parser.add_argument("--minutes", type=float, help="budget for all stages (default: 9; with --quick 2)")
    parser.add_argument("--stages", nargs="+", metavar="STAGE", help="only these")
    parser.add_argument("--no-build", action="store_true", help="use the extension that is there")
    parser.add_argument("--batch", type=int, help="of the benchmark (default: 32; on the CPU 1)")
    parser.add_argument("--json", type=Path, metavar="OUT", help="the record (default: results/<gpu>-<commit>.json)")
    parser.add_argument("--commit", help="for the record, where there is no git")
    parser.add_argument("--resume", type=Path, metavar="RECORD", help="go on with a record: the stages in it stand")
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)  # of a process that goes on with its own record
    arguments = parser.parse_args()
    if arguments.minutes is None:
        arguments.minutes = 2.0 if arguments.quick else 9.0
    arguments.batch = arguments.batch or (1 if arguments.device == "cpu" else 32)
    return arguments


def make_stages(device: str) -> list[Stage]:
    """All but the build, in order. Imported here: before the build there may be no myconv."""
    import gpu_checks as checks
    import gpu_timing as timing

    def benchmark(autotune: bool) -> Callable[..., dict]:
        def run(bench: checks.Bench, clock: checks.Clock) -> dict:
            return timing.benchmark(bench, clock, ceilings_of(bench.stages), autotune)

        return run

    return [
        Stage("parity", checks.parity, 0.3),
        Stage("streams", checks.streams, 0.1, cuda=True),
        Stage("repeat", checks.repeat, 0.1),
        Stage("batch", checks.batch, 0.1),
        Stage("graph", checks.graph, 0.1, cuda=True),
        Stage("devices", checks.devices, 0.1, cuda=True),
        Stage("autograd", checks.autograd, 0.1),
        Stage("autocast", checks.autocast, 0.1),
        Stage("tf32", checks.tf32, 0.1, cuda=True),
        Stage("sanitizer", checks.sanitizer, 0.2, cuda=True),
        Stage("ceilings", timing.ceilings, 0.1),
        Stage("benchmark", benchmark(device == "cuda"), 0.75, fresh=device == "cuda"),
        Stage("benchmark without autotuning", benchmark(False), 0.95, cuda=True, fresh=True),
    ]


def ceilings_of(stages: list[dict]) -> dict[str, float]:
    return next((stage["per second"] for stage in stages if "per second" in stage), {})


# --- running ----------------------------------------------------------------------------------------------------------


def status_of(found: dict) -> str:
    if found.get("failures"):
        return "failed"
    if found.get("checks", 0) < found.get("of", 0):
        return f"out of time after {found['checks']} of {found['of']}"
    return "ok"


def run_stage(name: str, work: Callable[[], dict]) -> dict:
    """What the record holds of a stage."""
    start = time.monotonic()
    try:
        found = work()
        status = status_of(found)
    except Skip as reason:
        found, status = {}, f"skipped: {reason}"
    except Exception as exception:
        found, status = {"failures": [f"{type(exception).__name__}: {exception}"[:2000]]}, "failed"
    return {"name": name, "status": status, "seconds": round(time.monotonic() - start, 1), **found}


def report(stage: dict) -> None:
    counted = f", {stage['checks']} checks" if "checks" in stage else ""
    print(f"{stage['name']}: {stage['status']} ({stage.get('seconds', 0)} s{counted})", flush=True)
    for failure in stage.get("failures", [])[:MOST_SHOWN]:
        print("    " + failure.replace("\n", "\n    "), flush=True)
    known = {"name", "status", "seconds", "checks", "of", "failures"}
    for key, value in stage.items():
        if key not in known:
            for line in value if isinstance(value, list) else [value]:
                print(f"    {key}: {line}", flush=True)


def device_lost(device: str) -> bool:
    """After an illegal access the process has no use of the device any more."""
    if device == "cpu":
        return False
    try:
        torch.cuda.synchronize()
    except Exception:
        return True
    return False


def go_on_in_a_new_process(arguments: argparse.Namespace, path: Path, end: float) -> None:
    options = ["--resume", path, "--json", path, "--until", end, "--device", arguments.device]
    options += ["--batch", arguments.batch, "--no-build", *(["--quick"] if arguments.quick else [])]
    options += ["--stages", *arguments.stages] if arguments.stages else []
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, __file__, *map(str, options)])


def run_stages(arguments: argparse.Namespace, record: dict, path: Path, end: float) -> None:
    from common import save_record
    from gpu_checks import Bench, Clock

    rows, stages = record.pop("rows"), record["stages"]

    def save() -> None:
        save_record(path, record, rows)

    bench = Bench(arguments.device, arguments.quick, arguments.batch, rows, stages, save)
    clock = Clock(end)
    for count, stage in enumerate(wanted_stages(arguments, stages)):
        entry = {"name": stage.name, "status": "did not finish"}  # what a killed run leaves
        run = None
        if stage.cuda and arguments.device == "cpu":
            entry["status"] = "skipped: needs CUDA"
        elif clock.left() < LEAST:
            entry["status"] = "skipped: out of time"
        elif stage.fresh and count:
            save()
            go_on_in_a_new_process(arguments, path, end)
        else:
            run = partial(stage.run, bench, clock.part(stage.share))
        stages.append(entry)
        if run:
            save()
            stages[-1] = run_stage(stage.name, run)
        save()
        report(stages[-1])
        if device_lost(arguments.device):
            print("the device is lost to this process: the next stages run in a new one", flush=True)
            go_on_in_a_new_process(arguments, path, end)


def wanted_stages(arguments: argparse.Namespace, done: list[dict]) -> list[Stage]:
    stages = make_stages(arguments.device)
    unknown = set(arguments.stages or ()) - {stage.name for stage in stages} - {"build"}
    if unknown:
        sys.exit(f"there is no stage {', '.join(sorted(unknown))}; there are {', '.join(s.name for s in stages)}")
    finished = {stage["name"] for stage in done}
    return [s for s in stages if s.name not in finished and (not arguments.stages or s.name in arguments.stages)]


# --- the record -------------------------------------------------------------------------------------------------------


def describe_device(device: str) -> dict:
    if device == "cpu":
        return {}
    properties = torch.cuda.get_device_properties(0)
    smi = find_tool("nvidia-smi")
    query = [smi, "--query-gpu=driver_version", "--format=csv,noheader"]
    return {
        "gpu": properties.name,
        "gpus": torch.cuda.device_count(),
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory": properties.total_memory,
        "l2": properties.L2_cache_size,
        "driver": run_command(query, 30)[1].split("\n")[0] if smi else None,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "nvcc": nvcc_version(),
    }


def new_record(arguments: argparse.Namespace) -> tuple[dict, Path]:
    from common import describe, new_result, slug

    import myconv

    record = describe("gpu") | describe_device(arguments.device)
    record["commit"] = arguments.commit or record["commit"]
    record |= {"device": arguments.device, "kernels": myconv.build_info()["cuda"], "batch": arguments.batch}
    record |= {"stages": [], "rows": []}
    name = slug(record.get("gpu") or record["machine"]["cpu"])
    suffix = "" if arguments.device == "cuda" else "-cpu"
    path = arguments.json or new_result(f"{name}-{(record['commit'] or 'unknown')[:7]}{suffix}.json")
    return record, path


def main() -> int:
    arguments = parse_arguments()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("torch sees no CUDA device here; --device cpu runs what needs none", file=sys.stderr)
        return 2
    end = arguments.until or time.monotonic() + 60 * arguments.minutes
    faulthandler.dump_traceback_later(max(end - time.monotonic(), 0) + GRACE, exit=True)

    built = None
    if not arguments.no_build and not arguments.resume:
        built = run_stage("build", lambda: build(0.7 * (end - time.monotonic())))
        report(built)
        if built["status"] != "ok":
            if arguments.json:
                arguments.json.write_text(json.dumps({"benchmark": "gpu", "stages": [built], "rows": []}, indent=1))
            return 1

    import myconv

    if arguments.device not in myconv._C.devices():
        print("this build of myconv has no CUDA kernels: was there an nvcc?", file=sys.stderr)
        return 2
    record: dict[str, Any]
    if arguments.resume:
        record = json.loads(arguments.resume.read_text())
        path = arguments.json or arguments.resume
    else:
        record, path = new_record(arguments)
        record["stages"] += [built] if built else []
    rows = record["rows"]
    run_stages(arguments, record, path, end)
    if rows:
        from gpu_timing import print_summary

        print_summary(rows)
    print(f"\nwrote {path}")
    failed = [stage["name"] for stage in record["stages"] if stage["status"] in ("failed", "did not finish")]
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
