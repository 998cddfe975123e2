"""Builds the extension in place for gpu.py, and reads what nvcc and ptxas say of the kernels. Imports no myconv."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(1, str(ROOT))  # what is built in place comes before an installed myconv
KERNEL = re.compile(r"Compiling entry function '(\S+)' for '(\w+)'")
STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
REGISTERS = re.compile(r"Used (\d+) registers")


class Skip(Exception):
    """Raised by a stage: says why it cannot be run here."""


def run_command(
    command: list[str], seconds: float, environment: dict[str, str] | None = None
) -> tuple[int | None, str]:
    """The exit status and all that it printed. One that takes longer is stopped with its children: status None."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | (environment or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=max(seconds, 0.1))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # the group is this process's own
        return None, process.communicate()[0]
    return process.returncode, output


def find_tool(name: str) -> str | None:
    """A program of the CUDA toolkit: where CUDA_HOME says, on PATH, or in the usual folder."""
    homes = [home for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")) if home]
    folders = [*(os.path.join(home, "bin") for home in homes), os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
    return shutil.which(name, path=os.pathsep.join(folders))


def nvcc_version() -> str | None:
    nvcc = find_tool("nvcc")
    release = re.search(r"V(\d[\d.]*)", run_command([nvcc, "--version"], 30)[1]) if nvcc else None
    return release[1] if release else None


def kernel_resources(log: str) -> list[dict]:
    """Registers, stack and spills of each kernel, from the output of ptxas -v."""
    kernels = []
    for line in log.splitlines():
        if match := KERNEL.search(line):
            kernels.append({"kernel": match[1], "arch": match[2]})
        elif kernels and (match := STACK.search(line)):
            kernels[-1] |= {"stack": int(match[1]), "spilled": int(match[2]) + int(match[3])}
        elif kernels and (match := REGISTERS.search(line)):
            kernels[-1]["registers"] = int(match[1])
    return kernels


def build(seconds: float) -> dict:
    """What was built, and its resources; "failures" has the end of the log if it was not."""
    # nvcc reads this variable, whatever command line the build makes.
    verbose = {"NVCC_APPEND_FLAGS": f"{os.environ.get('NVCC_APPEND_FLAGS', '')} -Xptxas -v".strip()}
    status, log = run_command([sys.executable, "setup.py", "build_ext", "--inplace"], seconds, verbose)
    kernels = kernel_resources(log)
    found = {
        "nvcc": nvcc_version(),
        "kernels": len(kernels),
        "spilling": [k for k in kernels if k.get("spilled")],
        "most registers": max((k.get("registers", 0) for k in kernels), default=None),
        "failures": [],
    }
    if status != 0:
        reason = "took too long" if status is None else f"exit status {status}"
        # ptxas's report says nothing of an error, and there is much of it.
        lines = [line for line in log.splitlines() if "ptxas info" not in line and "bytes stack frame" not in line]
        found["failures"] = ["\n".join([f"the build failed: {reason}", *lines[-40:]])]
    elif not kernels:
        found["note"] = "no kernel was compiled: all objects were up to date, or there is no nvcc"
    return found
