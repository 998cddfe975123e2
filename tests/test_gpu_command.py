"""benchmarks/gpu.py, the command for a GPU machine: what of it needs no GPU, and its record."""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import subprocess
import sys
import time

import pytest
import torch

BENCHMARKS = pathlib.Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.append(str(BENCHMARKS))
import gpu  # noqa: E402
import gpu_build  # noqa: E402
import gpu_checks  # noqa: E402
import gpu_timing  # noqa: E402

ON_CPU = {"parity", "repeat", "batch", "autograd", "autocast", "ceilings", "benchmark"}


def run(*options: object) -> subprocess.CompletedProcess:
    command = [sys.executable, BENCHMARKS / "gpu.py", *options]
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment, timeout=300)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[subprocess.CompletedProcess, dict]:
    path = tmp_path_factory.mktemp("gpu") / "record.json"
    process = run("--device", "cpu", "--quick", "--no-build", "--json", path)
    return process, json.loads(path.read_text())


def test_the_record_of_a_run(finished):
    process, record = finished
    assert process.returncode == 0, process.stdout + process.stderr
    status = {stage["name"]: stage["status"] for stage in record["stages"]}
    assert list(status) == [stage.name for stage in gpu.make_stages("cpu")]
    for name, value in status.items():
        assert value == "ok" if name in ON_CPU else value == "skipped: needs CUDA", name
        assert f"{name}: {value}" in process.stdout
    assert {"commit", "torch", "machine", "device", "kernels", "date"} <= set(record)


def test_the_rows_of_a_run(finished):
    _, record = finished
    stage = next(stage for stage in record["stages"] if stage["name"] == "benchmark")
    assert len(record["rows"]) == stage["checks"] == stage["of"] > 0
    for row in record["rows"]:
        assert row["failed"] is None and row["ratio"] == pytest.approx(row["torch_ms"] / row["ours_ms"])
        assert 0 < row["share"] and row["error"] < 1e-2 and row["algorithms"]
    kinds = {(row["precision"], row["layout"], row["pass"]) for row in record["rows"]}
    assert len(kinds) == 8, "a combination of precision, layout and pass is missing"


def test_a_record_is_gone_on_with(finished, tmp_path):
    """Stages in the record stand; one that did not finish counts as failed and is not tried again."""
    _, record = finished
    kept = [{"name": "parity", "status": "did not finish"}]
    path = tmp_path / "record.json"
    path.write_text(json.dumps(record | {"stages": kept, "rows": []}))
    process = run("--device", "cpu", "--quick", "--resume", path, "--stages", "parity", "batch")
    assert process.returncode == 1 and "failed: parity" in process.stderr
    stages = json.loads(path.read_text())["stages"]
    assert stages[0] == kept[0] and [stage["name"] for stage in stages] == ["parity", "batch"]


def test_no_stage_starts_without_time(finished, tmp_path):
    path = tmp_path / "record.json"
    process = run("--device", "cpu", "--no-build", "--minutes", 0, "--json", path)
    stages = json.loads(path.read_text())["stages"]
    assert process.returncode == 0
    assert {stage["status"] for stage in stages} == {"skipped: out of time", "skipped: needs CUDA"}


def test_a_failed_build(tmp_path, monkeypatch):
    monkeypatch.setenv("MYCONV_ISA_BUILD", "no such kernels")
    path = tmp_path / "record.json"
    process = run("--device", "cpu", "--quick", "--json", path)
    (stage,) = json.loads(path.read_text())["stages"]
    assert process.returncode == 1 and stage["name"] == "build" and stage["status"] == "failed"
    assert "the build failed: exit status 1" in process.stdout and "'no such kernels'" in process.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device():
    process = run("--no-build")
    assert process.returncode == 2 and "no CUDA device" in process.stderr


# ------------------------------------------------------------------------------------------------- parts


def run_stages(path: pathlib.Path, monkeypatch, *stages: gpu.Stage) -> None:
    monkeypatch.setattr(gpu, "make_stages", lambda device: list(stages))
    arguments = argparse.Namespace(device="cpu", quick=True, batch=1, stages=None)
    gpu.run_stages(arguments, {"stages": [], "rows": []}, path, time.monotonic() + 60)


def test_a_killed_run_leaves_the_stage_it_was_in(tmp_path, monkeypatch):
    path, seen = tmp_path / "record.json", []

    def killed(bench, clock) -> dict:
        bench.save()
        seen.extend(json.loads(path.read_text())["stages"])
        return {}

    run_stages(path, monkeypatch, gpu.Stage("killed", killed, 1.0))
    assert seen == [{"name": "killed", "status": "did not finish"}]
    assert [stage["status"] for stage in json.loads(path.read_text())["stages"]] == ["ok"]


def test_a_fresh_stage_gets_a_new_process(tmp_path, monkeypatch):
    class Replaced(Exception):
        """os.execv does not return."""

    def replace(program: str, command: list[str]) -> None:
        raise Replaced(command)

    monkeypatch.setattr(os, "execv", replace)
    path = tmp_path / "record.json"
    first, second = (gpu.Stage(name, lambda *_: {}, 1.0, fresh=True) for name in ("first", "second"))
    with pytest.raises(Replaced, match=f"'--resume', '{path}'"):
        run_stages(path, monkeypatch, first, second)
    assert [stage["name"] for stage in json.loads(path.read_text())["stages"]] == ["first"]


def bench(**changes: object) -> gpu_checks.Bench:
    fields = {"device": "cpu", "quick": True, "batch": 1, "rows": [], "stages": [], "save": lambda: None}
    return gpu_checks.Bench(**fields | changes)


def soon(seconds: float) -> gpu_checks.Clock:
    return gpu_checks.Clock(time.monotonic() + seconds)


@pytest.mark.parametrize("check", [gpu_checks.parity, gpu_checks.repeat, gpu_checks.batch, gpu_checks.autograd])
def test_a_wrong_kernel_fails(check, monkeypatch):
    """Results that change from call to call, as those of a race would, and no others are wrong in every check."""
    calls = iter(range(10**9))

    def disturbed(result: torch.Tensor) -> torch.Tensor:
        return result + next(calls) % 3 if result.is_floating_point() else result

    operator, conv = gpu_checks.checking.run_operator, gpu_checks.checking.our_conv
    monkeypatch.setattr(gpu_checks.checking, "run_operator", lambda *a: disturbed(operator(*a)))
    monkeypatch.setattr(gpu_checks.checking, "our_conv", lambda *a: disturbed(conv(*a)))
    found = check(bench(), soon(60))
    assert found["failures"] and gpu.status_of(found) == "failed"


def test_a_sweep_stops_in_time():
    found = gpu_checks.sweep([(str(i), lambda: time.sleep(0.05)) for i in range(100)], soon(0.2), "cpu")
    assert 0 < found["checks"] < 100 and found["failures"] == []
    assert gpu.status_of(found) == f"out of time after {found['checks']} of 100"


def test_every_kernel_for_the_sanitizer():
    gpu_checks.run_each_kernel_once("cpu")


@pytest.mark.parametrize("status, outcome", [(0, "ok"), (gpu_checks.FOUND, "failed"), (1, "skipped")])
def test_what_the_sanitizer_says(status, outcome, tmp_path, monkeypatch):
    """An exit status of the tool's own is a finding; any other means that the tool does not work here."""
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f"#!/bin/sh\necho planted\nexit {status}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", "")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    stage = gpu.run_stage("sanitizer", lambda: gpu_checks.sanitizer(bench(), soon(20)))
    assert stage["status"].split(":")[0] == outcome
    if outcome == "failed":
        assert len(stage["failures"]) == len(gpu_checks.SANITIZER_TOOLS) and "planted" in stage["failures"][0]


def test_tf32_table():
    """On the CPU the settings change nothing, and the table is the same."""
    # Importing torch's internal test helpers, as test_opinfo.py does, locks these settings.
    with getattr(torch.backends, "__allow_nonbracketed_mutation")():
        found = gpu_checks.tf32(bench(), soon(60))
    assert found["failures"] == [] and found["checks"] == len(gpu_checks.TF32_SETTINGS)
    assert len(found["relative errors"]) == 3 * len(gpu_checks.TF32_SETTINGS)
    assert all(line["cudnn"] < 2e-6 for line in found["relative errors"])


def test_ptxas_report():
    log = """ptxas info    : Compiling entry function '_Zfirst' for 'sm_90'
ptxas info    : Function properties for _Zfirst
    16 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 56 registers, used 1 barriers
ptxas info    : Compiling entry function '_Zsecond' for 'sm_80'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers"""
    assert gpu_build.kernel_resources(log) == [
        {"kernel": "_Zfirst", "arch": "sm_90", "stack": 16, "spilled": 12, "registers": 56},
        {"kernel": "_Zsecond", "arch": "sm_80", "stack": 0, "spilled": 0, "registers": 32},
    ]


def test_a_command_is_stopped_with_its_children():
    start = time.monotonic()
    status, output = gpu_build.run_command(["bash", "-c", "echo begun; sleep 60 & wait"], 1)
    assert status is None and output == "begun\n" and time.monotonic() - start < 30


def test_any_beginning_of_the_benchmark_is_representative():
    layers = gpu_timing.choose_layers(quick=False)
    categories = {layer["category"] for layer in layers}
    assert {layer["category"] for layer in layers[: len(categories)]} == categories
    assert len({layer["id"] for layer in layers}) == len(layers)
    assert {precision for _, precision, _, _ in gpu_timing.jobs(quick=False)} == set(gpu_timing.PRECISIONS)
