"""The benchmark commands run and write what they promise; what they measure is not looked at."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import myconv

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.append(str(BENCHMARKS))
import ceilings  # noqa: E402
import microkernels  # noqa: E402
import models  # noqa: E402
import run  # noqa: E402
from networks import NETWORKS  # noqa: E402

SMALL = ("--quick", "--only", "Conv2d_1x232x7x7_232", "Conv2d_1x24x56x56_24_k3x3s2", "--batch", "1")
PARAMETERS = {
    "resnet50": 25_557_032,
    "mobilenet_v2": 3_504_872,
    "efficientnet_b0": 5_288_548,
    "convnext_tiny": 28_589_128,
}


def command(script: str, *options: object) -> str:
    arguments = [sys.executable, BENCHMARKS / script, *options]
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    done = subprocess.run(list(map(str, arguments)), capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def record_of(path: Path, script: str, *options: object) -> tuple[dict, str]:
    output = command(script, "--plain", "--budget", 0.001, "--json", path, *options)
    record = json.loads(path.read_text())
    assert {"benchmark", "commit", "torch", "machine", "threads", "isa", "date"} <= set(record) and record["rows"]
    assert not [row["failed"] for row in record["rows"] if row["failed"]]
    return record, output


@pytest.fixture(scope="module")
def layers(tmp_path_factory) -> tuple[dict, str, Path]:
    path = tmp_path_factory.mktemp("run") / "record.json"
    return *record_of(path, "run.py", *SMALL), path


def test_layers(layers):
    record, output, _ = layers
    assert record["against"] == ["torch"] and len(record["ceilings_measured"]) == 2
    kinds = {(row["category"], row["layout"], row["pass"]) for row in record["rows"]}
    assert len(kinds) == len(record["rows"]) == 2 * 2 * 2
    for row in record["rows"]:
        roof = max(row["flops"] / record["ceilings"]["flops"], row["bytes"] / record["ceilings"]["bytes"]) * 1e3
        for side in ("ours", "torch"):
            assert row[f"{side}_share"] == pytest.approx(roof / row[f"{side}_ms"])
        assert row["ratio"] == pytest.approx(row["torch_ms"] / row["ours_ms"]) and row["algorithms"]
    assert "share" in output and "shares are of the roofline" in output


@pytest.mark.parametrize(
    "options, sides",
    [
        (("--padding-mode", "reflect"), ["torch", "zeros"]),
        (("--padding-mode", "circular", "--pass", "backward_weight"), ["torch", "zeros"]),
        (("--denormals", "--pass", "forward"), ["normal"]),
        (("--against", "float32", "--dtype", "float64"), ["float32"]),
        (("--op", "all", "--layout", "nchw", "--isa", "portable"), ["torch"]),
    ],
    ids=lambda value: "_".join(value).replace("--", ""),
)
def test_layers_otherwise(options, sides, tmp_path, monkeypatch):
    """In this process, which is faster."""
    path = tmp_path / "record.json"
    command = ["run.py", "--plain", "--budget", "0.001", "--json", str(path), *SMALL, "--layout", "nhwc", *options]
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.setattr(run, "measure_ceilings", lambda dtype: None)
    assert run.main() == 0
    record = json.loads(path.read_text())
    assert record["against"] == sides
    for row in record["rows"]:
        assert row["ratio"] == pytest.approx(row[f"{sides[0]}_ms"] / row["ours_ms"])
        assert {f"{side}_ms" for side in sides} <= set(row) and ("torch_ms" in row) == ("torch" in sides)


def test_bytes_are_those_that_explain_counts():
    case = run.as_case(run.load_layers(run_arguments())[0])
    tensors = run.make_tensors(case)
    explained = myconv.explain(getattr(myconv.functional, case.op), *tensors[:3], **case.arguments).calls[0].directions
    assert {what: run.bytes_moved(tensors, what) for what in explained} == {w: d.bytes for w, d in explained.items()}


def run_arguments():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["run.py", *SMALL])
        return run.parse_arguments()


def test_denormals_are_there():
    case = run.as_case(run.load_layers(run_arguments())[0])
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        for layout in run.LAYOUTS.values():
            normal = run.make_tensors(case, dtype, layout)
            x, w, b, gy = run.with_denormals(normal)
            for t in (x, gy):
                tiny = (t != 0) & (t.abs() < torch.finfo(dtype).tiny)
                assert 0.4 < tiny.double().mean() < 0.6
            assert torch.equal(w, normal.w) and x.stride() == normal.x.stride()


def test_a_wrong_result_has_no_ratio(monkeypatch):
    plain = myconv.functional.conv2d
    monkeypatch.setattr(myconv.functional, "conv2d", lambda *a, **k: plain(*a, **k) * 1.001)
    monkeypatch.setattr(run, "chosen_algorithms", lambda *a: {})
    arguments = run_arguments()
    rows = [run.run_job(job, arguments) for job in run.make_jobs(arguments)[:2]]
    run.add_shares(rows, {"flops": 1e9, "bytes": 1e9})
    for row in rows:
        assert row["ratio"] == 0 and "wrong" in row["failed"] and "ours_share" not in row
        assert run.ratio(row, "torch") == 0


def test_plots(layers, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    import plot

    command("plot.py", layers[2], "--out", tmp_path / "first")
    monkeypatch.setattr(sys, "argv", ["plot.py", str(layers[2]), "--out", str(tmp_path / "second")])
    plot.main()
    for name in ("speedup-float32.png", "roofline-float32.png"):
        first, second = ((tmp_path / folder / name).read_bytes() for folder in ("first", "second"))
        assert first.startswith(b"\x89PNG") and first == second, name


def test_every_loop_of_multiply_adds():
    found = {(loop.isa, loop.dtype) for loop in ceilings.loops()}
    isas = set(myconv._C.isas()) - {"avx512_bf16"}  # its float32 and float64 are avx512's
    assert {(isa, dtype) for isa in isas for dtype in ("float32", "float64")} <= found
    assert ceilings.peak("bfloat16", 1, 0.0)[0] > 1e8


def test_microkernels(tmp_path):
    options = ("--isa", "portable", "--dtype", "float32", "--depth", "64", "--tail", "1")
    record, output = record_of(tmp_path / "record.json", "microkernels.py", *options)
    portable = [family for family in microkernels.FAMILIES if family != microkernels.ROLLING]  # too few registers
    assert {row["kernel"] for row in record["rows"]} == {
        k for family in portable for k in microkernels.FAMILIES[family]
    }
    for row in record["rows"]:
        family = microkernels.FAMILY[row["kernel"]]
        rate = "gbytes" if family == microkernels.WINOGRAD else "gflops"
        assert row["share"] == pytest.approx(row[rate] / row[f"peak_{rate}"])
        assert row["depth"] == 64 or family != microkernels.PRODUCT or row["kernel"] == "groups"
    assert "%" in output and all(f"{family}:" in output for family in portable)


def test_every_tile_is_right(monkeypatch):
    monkeypatch.setattr(microkernels, "interleave", lambda calls, budget: [1.0] * len(calls))
    monkeypatch.setattr(microkernels, "long_enough", lambda run: (1, run))
    for tail in (0, 1):
        monkeypatch.setattr(sys, "argv", ["microkernels.py", "--depth", "10", "--tail", str(tail)])
        rows = [microkernels.measure(tile, 0.0) for tile in microkernels.all_tiles(microkernels.parse_arguments())]
        assert len(rows) > 20 and not [row for row in rows if row and row["failed"]]


@pytest.mark.parametrize("name", NETWORKS)
def test_parameters_of_networks(name):
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in NETWORKS[name]().parameters()) == PARAMETERS[name]


def test_networks(tmp_path):
    record, _ = record_of(tmp_path / "record.json", "models.py", "--size", 64, "--batch", 1)
    assert {(row["model"], row["layout"]) for row in record["rows"]} == {
        (name, layout) for name in NETWORKS for layout in models.LAYOUTS
    }
    assert all(row["convolutions"] > 20 for row in record["rows"])


@pytest.mark.parametrize("step", ["training", "penalty"])
def test_steps_of_networks(tmp_path, step):
    arguments = ("--step", step, "--model", "mobilenet_v2", "--size", 32, "--batch", 2, "--layout", "nhwc")
    record, output = record_of(tmp_path / "record.json", "models.py", *arguments)
    (row,) = record["rows"]
    assert record["step"] == step and row["ratio"] > 0 and not row["failed"]
    assert ("plain_ms" in row) == ("penalty / plain" in output) == (step == "penalty")
    if sys.platform == "linux":
        assert row["ours_peak_bytes"] > 1e6 and "peak MiB" in output


def test_a_wrong_network_has_no_ratio(monkeypatch):
    swap = myconv.replace

    def wrong(model, **options):
        report = swap(model, **options)
        with torch.no_grad():
            report.model.get_submodule(report.swapped[20]).weight.mul_(1.001)
        return report

    monkeypatch.setattr(myconv, "replace", wrong)
    row = models.measure("mobilenet_v2", 1, "nchw", 64, 0.0)
    assert row["ratio"] == 0 and "wrong" in row["failed"]


def test_overhead(tmp_path):
    record, _ = record_of(tmp_path / "record.json", "overhead.py")
    assert len(record["rows"]) == 3
