"""Builds myconv._C from csrc/ against the torch that is installed. Metadata is in pyproject.toml.

    python setup.py develop                              editable install
    python setup.py build_ext --inplace                  recompile what changed
    python -m pip install --no-build-isolation .         ordinary install

MYCONV_ISA_BUILD=portable   leave out every x86 SIMD kernel (default: all)
MAX_JOBS=n                  compile n files at a time (default: the number of usable cores)
CXX, CXXFLAGS               compiler, and flags put after ours, for example CXXFLAGS="-O0 -g"

Nothing here downloads anything.
"""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
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


def sources() -> list[str]:
    return sorted(p.relative_to(ROOT).as_posix() for d in ("csrc", "csrc/cpu") for p in (ROOT / d).glob("*.cpp"))


def headers() -> list[str]:
    found = [p for kind in ("*.h", "*.inc") for p in (ROOT / "csrc").rglob(kind)]
    return sorted(p.relative_to(ROOT).as_posix() for p in found)


def extension():
    from torch.utils.cpp_extension import CppExtension, include_paths

    flags = ["-std=c++20", "-O3", "-g0", "-fno-math-errno", "-Wall"]
    # A second mention as a system directory silences warnings from torch's headers.
    for path in include_paths():
        flags += ["-isystem", path]
    if isa_build() == "portable":
        flags.append("-DMYCONV_PORTABLE_ONLY")
    flags += shlex.split(os.environ.get("CXXFLAGS", ""))
    return CppExtension(
        "myconv._C",
        sources(),
        include_dirs=[str(ROOT / "csrc")],
        depends=headers(),
        extra_compile_args=flags,
    )


def build_ext_command(torch):
    from torch.utils.cpp_extension import BuildExtension

    class BuildExt(BuildExtension):
        def finalize_options(self) -> None:
            # Objects of different torch versions and instruction sets must not mix, and since torch's headers
            # are system headers, the dependency files do not name them. Editable builds share the folder too.
            if self.build_temp is None:
                python = f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
                self.build_temp = os.path.join("build", f"temp.{python}", f"torch-{torch.__version__}-{isa_build()}")
            super().finalize_options()

        def run(self) -> None:
            require_compiler()
            super().run()
            package = ROOT / "myconv" if self.inplace else Path(self.build_lib, "myconv")
            self.write_build_record(package / "_build.py")

        def write_build_record(self, path: Path) -> None:
            text = (
                "# Written by setup.py: what _C was built with.\n"
                f"TORCH_VERSION = {str(torch.__version__)!r}\n"
                f"COMPILER = {compiler_name()!r}\n"
                f"ISA_BUILD = {isa_build()!r}\n"
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
