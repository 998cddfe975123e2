"""What nvcc made of the CUDA kernels: read from the built extension by NVIDIA's disassembler. No GPU is needed.

The table says, for each kernel, which instructions it must have and which it must not. A kernel that is not in the
table fails, so that a new one gets its row.
"""

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import myconv

pytestmark = pytest.mark.skipif("cuda" not in myconv._C.devices(), reason="this build has no CUDA kernels")

FLOAT = {"f": "FFMA", "d": "DFMA", "NS0_4HalfE": "FFMA", "NS0_8BFloat16E": "FFMA"}
INTEGER = dict.fromkeys("lisah", "IMAD")
# By kernel: what its element types (as they are mangled) compute with, and what else must be there.
KERNELS = {
    "gather": (FLOAT | INTEGER, set()),
    "backward_weight": (FLOAT | INTEGER, {"BAR.SYNC"}),
}
# Atomics would make the order of a sum a matter of luck; local memory means spilled registers or indexed arrays.
NEVER = {"ATOM", "ATOMG", "ATOMS", "RED", "STL", "LDL"}


def tool(name: str) -> str:
    found = shutil.which(name)
    spec = importlib.util.find_spec("nvidia")
    for folder in spec.submodule_search_locations or () if spec else ():
        found = found or next((str(path) for path in Path(folder).glob(f"*/bin/{name}")), None)
    if not found:
        pytest.skip(f"{name} is not installed: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
    return found


def run(*arguments: str) -> str:
    folders = {str(Path(tool(name)).parent) for name in ("cuobjdump", "nvdisasm")}
    path = os.pathsep.join([*folders, os.environ.get("PATH", "")])
    command = [tool("cuobjdump"), *arguments, myconv._C.__file__]
    return subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | {"PATH": path}).stdout


@pytest.fixture(scope="module")
def functions() -> dict[tuple[str, str], set[str]]:
    """The instructions, with and without what follows a dot, of every (architecture, mangled kernel)."""
    found: dict[tuple[str, str], set[str]] = {}
    arch = function = ""
    for line in run("-sass").splitlines():
        if match := re.search(r"arch = (sm_\w+)", line):
            arch = match[1]
        elif match := re.search(r"Function : (\S+)", line):
            function = match[1]
        elif match := re.match(r"\s+/\*\w+\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", line):
            name = match[1]
            found.setdefault((arch, function), set()).update({name, name.split(".")[0], ".".join(name.split(".")[:2])})
    return found


def kernel_of(function: str) -> tuple[str, str]:
    """(kernel, element type) of a mangled name."""
    kernel = max((name for name in KERNELS if f"{len(name)}{name}I" in function), key=len, default="")
    assert kernel, f"{function} is not in the table of {Path(__file__).name}"
    arguments = function.split(f"{len(kernel)}{kernel}I", 1)[1]
    types = KERNELS[kernel][0]
    return kernel, next(name for name in sorted(types, key=len, reverse=True) if arguments.startswith(name))


def test_architectures():
    wanted = myconv.build_info()["cuda"]
    cubins = set(re.findall(r"\.(sm_\w+)\.cubin", run("--list-elf")))
    assert cubins == {f"sm_{arch.removesuffix('+PTX').replace('.', '')}" for arch in wanted}
    ptx = set(re.findall(r"\.sm_(\w+)\.ptx", run("--list-ptx")))
    assert ptx == {arch.removesuffix("+PTX").replace(".", "") for arch in wanted if arch.endswith("+PTX")}


def test_every_kernel_is_there_for_every_type(functions):
    archs = {arch for arch, _ in functions}
    found = {(arch, *kernel_of(function)) for arch, function in functions}
    assert found == {(arch, kernel, t) for arch in archs for kernel, (types, _) in KERNELS.items() for t in types}


def test_instructions(functions):
    for (arch, function), instructions in functions.items():
        kernel, element = kernel_of(function)
        types, others = KERNELS[kernel]
        assert {types[element], *others} <= instructions, f"{arch} {function} lacks what it should compute with"
        assert not NEVER & instructions, f"{arch} {function} has {sorted(NEVER & instructions)}"
