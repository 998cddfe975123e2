"""Builds myconv._C from csrc/ against the torch that is installed. Metadata is in pyproject.toml.

    python setup.py develop                              editable install
    python setup.py build_ext --inplace                  recompile what changed
    python -m pip install --no-build-isolation .         ordinary install

MYCONV_ISA_BUILD=portable   leave out every x86 SIMD kernel (default: all)
MYCONV_CUDA=0, =1           leave out the CUDA kernels; fail if nvcc is missing (default: build them if nvcc is there)
MYCONV_CUDA_ARCHS           what they are compiled for (default: 8.0+PTX;9.0a)
CUDA_HOME                   where nvcc is (default: as on PATH, else /usr/local/cuda)
MAX_JOBS=n                  compile n files at a time (default: the number of usable cores)
CXX, CXXFLAGS               compiler, and flags put after ours, for example CXXFLAGS="-O0 -g"

Nothing here downloads anything.
"""

import functools
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import setuptools

ROOT = Path(__file__).resolve().parent
OLDEST_TORCH = (2, 11)
FIRST_UNTESTED_TORCH = (2, 16)

# Commands that need a compiler and torch. The others (sdist, egg_info, clean, --version) run without.
BUILD_COMMANDS = {
    "bdist",
    "bdist_egg",
    "bdist_wheel",
    "build",
    "build_ext",
    "develop",
    "dist_info",
    "editable_wheel",
    "install",
    "install_lib",
}


def fail(message: str) -> None:
    sys.exit(f"\nmyconv cannot be built: {message}\n")


def version_pair(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def read_version() -> str:
    text = (ROOT / "myconv" / "_version.py").read_text(encoding="utf-8")
    return re.search(r'__version__ = "([^"]+)"', text).group(1)


def isa_build() -> str:
    value = os.environ.get("MYCONV_ISA_BUILD") or "all"
    if value not in ("all", "portable"):
        fail(f"MYCONV_ISA_BUILD is {value!r}; it must be 'all' or 'portable'.")
    return value


def require_torch():
    if importlib.util.find_spec("torch") is None:
        fail(
            "torch is not installed, or pip's build isolation hides it.\n"
            "The extension is compiled against the torch it will run with, so install torch first,\n"
            "then build without isolation:\n\n"
            "    python -m pip install torch\n"
            "    python -m pip install --no-build-isolation .\n\n"
            "For an editable install the second command is: python setup.py develop\n"
            f"(this Python is {sys.executable})"
        )
    import torch

    if version_pair(torch.__version__) < OLDEST_TORCH:
        fail(
            f"torch {torch.__version__} is installed, and myconv needs torch 2.11 or newer.\n"
            "Upgrade it, then build again:\n\n"
            '    python -m pip install "torch>=2.11"'
        )
    if version_pair(torch.__version__) >= FIRST_UNTESTED_TORCH:
        print(f"warning: myconv is not tested with torch {torch.__version__}; building anyway", file=sys.stderr)
    return torch


def require_compiler() -> None:
    compiler = shlex.split(os.environ.get("CXX") or "c++")[0]
    if shutil.which(compiler) is None:
        fail(
            f"the C++ compiler {compiler!r} was not found.\n"
            "Install g++ 11 or newer, or clang++ 14 or newer (on Debian or Ubuntu: apt install g++),\n"
            "or name yours with CXX=/path/to/compiler."
        )
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if not header.is_file():
        fail(
            f"{header} is missing.\n"
            "Install the C headers of this Python (on Debian or Ubuntu: apt install python3-dev)."
        )


def require_wheel_command() -> None:
    # setuptools learned to write wheels in 70.1; before, the command came with the package `wheel`.
    if version_pair(setuptools.__version__) >= (70, 1):
        return
    if importlib.util.find_spec("wheel") is None or importlib.util.find_spec("wheel.bdist_wheel") is None:
        fail(
            f"setuptools {setuptools.__version__} cannot write wheels by itself.\n"
            "Upgrade it, then run the same command again:\n\n"
            '    python -m pip install "setuptools>=77"'
        )


def usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def compiler_name() -> str:
    command = shlex.split(os.environ.get("CXX") or "c++")
    try:
        out = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return " ".join(command)
    return out.splitlines()[0].strip() if out.strip() else " ".join(command)


def relative(paths) -> list[str]:
    return sorted(path.relative_to(ROOT).as_posix() for path in paths)


def sources() -> list[str]:
    folders = ["csrc", "csrc/cpu", *(["csrc/cuda"] if find_nvcc() else [])]
    return relative(path for folder in folders for path in (ROOT / folder).glob("*.cpp"))


def headers() -> list[str]:
    return relative(path for kind in ("*.h", "*.inc", "*.cuh") for path in (ROOT / "csrc").rglob(kind))


# ---- CUDA: nvcc makes an object of each csrc/cuda/*.cu, without torch's headers and libraries, so that a torch without
# CUDA will do. The runtime is linked statically: only a driver must be there.


@functools.cache
def find_nvcc() -> Path | None:
    wanted = os.environ.get("MYCONV_CUDA") or "auto"
    if wanted not in ("0", "1", "auto"):
        fail(f"MYCONV_CUDA is {wanted!r}; it must be 0 or 1.")
    if wanted == "0":
        return None
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    found = [Path(home, "bin", "nvcc") for home in homes if home]
    found += [Path(path) for path in [shutil.which("nvcc")] if path] + [Path("/usr/local/cuda/bin/nvcc")]
    nvcc = next((path for path in found if path.is_file()), None)
    if nvcc is None and wanted == "1":
        fail("MYCONV_CUDA=1 asks for CUDA kernels, and nvcc was not found. Set CUDA_HOME to the folder of the toolkit.")
    return nvcc


def cuda_archs() -> str:
    return os.environ.get("MYCONV_CUDA_ARCHS") or "8.0+PTX;9.0a"


def nvcc_flags() -> list[str]:
    flags = ["-optf", str(ROOT / "csrc" / "cuda" / "nvcc.options"), "-I", str(ROOT / "csrc")]
    for arch in cuda_archs().split(";"):
        match = re.fullmatch(r"(\d+)\.(\d[a-z]?)(\+PTX)?", arch.strip())
        if match is None:
            fail(f"MYCONV_CUDA_ARCHS has {arch!r}; write architectures as in 8.0+PTX;9.0a")
        number = match[1] + match[2]
        flags += ["-gencode", f"arch=compute_{number},code=sm_{number}"]
        if match[3]:
            flags += ["-gencode", f"arch=compute_{number},code=compute_{number}"]
    return flags


def cudart_folder() -> Path:
    """Where the static runtime of this nvcc is. The program may be a link or a script far from its toolkit."""
    told = subprocess.run([str(find_nvcc()), "--dryrun", "-c", "any.cu"], capture_output=True, text=True).stderr
    top = re.search(r"TOP=(.*)", told)
    home = Path(top[1]).resolve() if top else find_nvcc().resolve().parents[1]
    for folder in (home / "lib64", *home.glob("targets/*/lib"), home / "lib"):
        if (folder / "libcudart_static.a").is_file():
            return folder
    fail(f"libcudart_static.a is not in {home}. Install the whole CUDA toolkit, or set MYCONV_CUDA=0.")


def cuda_objects(folder: Path) -> list[str]:
    """Objects of the .cu files in `folder`, made anew where a source, a header or the command has changed."""
    nvcc, jobs = find_nvcc(), []
    inputs = max((ROOT / path).stat().st_mtime for path in [*headers(), "setup.py", "csrc/cuda/nvcc.options"])
    for source in sorted((ROOT / "csrc" / "cuda").glob("*.cu")):
        target = folder / "csrc" / "cuda" / f"{source.stem}.cu.o"
        command = [str(nvcc), *nvcc_flags(), "-c", str(source), "-o", str(target)]
        note = target.with_suffix(".command")  # written when the object is there
        if note.is_file() and note.read_text() == shlex.join(command):
            if target.is_file() and target.stat().st_mtime > max(inputs, source.stat().st_mtime):
                jobs.append((target, None, None))
                continue
        target.parent.mkdir(parents=True, exist_ok=True)
        note.unlink(missing_ok=True)
        jobs.append((target, command, note))

    def make(job) -> int:
        _, command, note = job
        if command is None:
            return 0
        print(shlex.join(command), flush=True)
        status = subprocess.run(command).returncode
        if status == 0:
            note.write_text(shlex.join(command))
        return status

    with ThreadPoolExecutor(int(os.environ["MAX_JOBS"])) as pool:
        if any(pool.map(make, jobs)):
            fail("nvcc failed. To build without CUDA kernels, set MYCONV_CUDA=0.")
    return [str(target) for target, _, _ in jobs]


def extension():
    from torch.utils.cpp_extension import CppExtension, include_paths

    flags = ["-std=c++20", "-O3", "-g0", "-fno-math-errno", "-Wall"]
    # A second mention as a system directory silences warnings from torch's headers.
    for path in include_paths():
        flags += ["-isystem", path]
    if isa_build() == "portable":
        flags.append("-DMYCONV_PORTABLE_ONLY")
    link = {}
    if find_nvcc():
        flags.append("-DMYCONV_CUDA")
        link["library_dirs"] = [str(cudart_folder())]
        link["libraries"] = ["cudart_static", "rt", "pthread", "dl"]
    flags += shlex.split(os.environ.get("CXXFLAGS", ""))
    extension = CppExtension(
        "myconv._C",
        sources(),
        include_dirs=[str(ROOT / "csrc")],
        depends=headers(),
        extra_compile_args=flags,
        library_dirs=link.get("library_dirs", []),
    )
    extension.libraries += link.get("libraries", [])
    return extension


def build_ext_command(torch):
    from torch.utils.cpp_extension import BuildExtension

    class BuildExt(BuildExtension):
        def finalize_options(self) -> None:
            # Objects of different torch versions and instruction sets must not mix, and since torch's headers
            # are system headers, the dependency files do not name them. Editable builds share the folder too.
            if self.build_temp is None:
                python = f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
                kinds = f"{isa_build()}{'-cuda' if find_nvcc() else ''}"
                self.build_temp = os.path.join("build", f"temp.{python}", f"torch-{torch.__version__}-{kinds}")
            super().finalize_options()

        def run(self) -> None:
            require_compiler()
            if find_nvcc():
                self.extensions[0].extra_objects = cuda_objects(Path(self.build_temp).resolve())
            else:
                print("myconv: no CUDA kernels (nvcc was not found, or MYCONV_CUDA=0)", flush=True)
            super().run()
            package = ROOT / "myconv" if self.inplace else Path(self.build_lib, "myconv")
            self.write_build_record(package / "_build.py")

        def write_build_record(self, path: Path) -> None:
            text = (
                "# Written by setup.py: what _C was built with.\n"
                f"TORCH_VERSION = {str(torch.__version__)!r}\n"
                f"COMPILER = {compiler_name()!r}\n"
                f"ISA_BUILD = {isa_build()!r}\n"
                f"CUDA_ARCHS = {cuda_archs() if find_nvcc() else None!r}\n"
            )
            if not path.is_file() or path.read_text(encoding="utf-8") != text:
                path.write_text(text, encoding="utf-8")

        def get_outputs(self) -> list[str]:
            return [*super().get_outputs(), os.path.join(self.build_lib, "myconv", "_build.py")]

        def get_output_mapping(self) -> dict[str, str]:
            # Asked for by editable installs; the record is in the source tree already, like the extension.
            mapping = super().get_output_mapping()
            if self.inplace:
                built = os.path.join(self.build_lib, "myconv", "_build.py")
                mapping[built] = os.path.join("myconv", "_build.py")
            return mapping

    return BuildExt


def develop_command():
    if version_pair(setuptools.__version__) < (80, 0):
        from setuptools.command.develop import develop

        class Develop(develop):
            def finalize_options(self) -> None:
                super().finalize_options()
                self.no_deps = True  # never fetch: torch is there, or require_torch() has said so

        return Develop

    class DevelopThroughPip(setuptools.Command):
        """From setuptools 80 on, `develop` is an isolated pip build that cannot see torch: do not isolate."""

        description = "install in editable mode (pip install --no-build-isolation --no-deps -e .)"
        user_options = [
            ("no-deps", "N", "accepted for compatibility: dependencies are never installed"),
            ("user", None, "install in the user's site-packages"),
            ("uninstall", "u", "remove the editable install"),
        ]
        boolean_options = ["no-deps", "user", "uninstall"]

        def initialize_options(self) -> None:
            self.no_deps = self.user = self.uninstall = False

        def finalize_options(self) -> None:
            pass

        def run(self) -> None:
            pip = [sys.executable, "-m", "pip"]
            if importlib.util.find_spec("pip") is None:
                fail("pip is not installed in this Python. Try: python -m ensurepip")
            if self.uninstall:
                command = [*pip, "uninstall", "--yes", "myconv"]
            else:
                command = [*pip, "install", "--no-build-isolation", "--no-deps"]
                command += [*(["--user"] if self.user else []), "-e", str(ROOT)]
            print("running:", shlex.join(command), flush=True)
            status = subprocess.run(command).returncode
            if status:
                sys.exit(status)

    return DevelopThroughPip


def main() -> None:
    os.chdir(ROOT)
    wanted = set(sys.argv[1:]) & BUILD_COMMANDS
    options = {}
    if wanted and not {"--help", "-h", "--help-commands"} & set(sys.argv[1:]):
        torch = require_torch()
        if wanted & {"bdist_wheel", "dist_info", "editable_wheel"}:
            require_wheel_command()
        # The `ninja` package puts its program beside python: not on PATH unless the venv is activated.
        path = os.environ.get("PATH", os.defpath)
        os.environ["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), path])
        os.environ.setdefault("MAX_JOBS", str(usable_cores()))
        options["ext_modules"] = [extension()]
        options["cmdclass"] = {"build_ext": build_ext_command(torch), "develop": develop_command()}
    setuptools.setup(version=read_version(), license="BSD-3-Clause", **options)


if __name__ == "__main__":
    main()
