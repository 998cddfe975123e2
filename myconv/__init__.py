"""torch.nn's convolution family, rebuilt: a drop-in for ``nn.Conv1d`` .. ``nn.ConvTranspose3d``.

>>> import torch, myconv
>>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU())
>>> report = myconv.replace(model)
"""

from typing import Any

import torch

from ._version import __version__


def _check_build() -> None:
    """A library compiled against one torch can crash in another: compare before anything is loaded."""
    try:
        from . import _build
    except ImportError:
        raise ImportError(
            "myconv is not built here. In its source tree run: python setup.py develop "
            "(or pip install --no-build-isolation -e .)"
        ) from None
    built, imported = (v.split("+")[0] for v in (_build.TORCH_VERSION, torch.__version__))
    if built != imported:
        raise ImportError(
            f"myconv was built against torch {_build.TORCH_VERSION} but torch {torch.__version__} is imported. "
            "Rebuild it in this environment: pip install --no-build-isolation --force-reinstall --no-deps <source tree>"
        )


_check_build()


def build_info() -> dict[str, Any]:
    """What this build is and what it runs on, for bug reports.

    ``version`` of myconv; ``torch`` and ``compiler`` it was built with; ``isas`` it has and this machine runs, worst
    first, and the ``isa`` in force; the architectures that it has ``cuda`` kernels for, or False; whether ``openmp``,
    the thread pool of torch, was found (without it, kernels run on one thread); ``threads``, as of now.
    """
    from . import _C, _build

    return {
        "version": __version__,
        "torch": _build.TORCH_VERSION,
        "compiler": _build.COMPILER,
        "isas": _C.isas(),
        "isa": _C.isa(),
        "cuda": _build.CUDA_ARCHS.split(";") if _build.CUDA_ARCHS else False,
        "openmp": _C.openmp(),
        "threads": torch.get_num_threads(),
    }


def empty_cache() -> None:
    """Give memory that is kept for CPU results to come back to the system, as ``torch.cuda.empty_cache`` does on a GPU.

    Results of 128 KiB and more leave their memory to later results, 256 MiB of it at most, and one workspace of up to
    32 MiB is kept. ``MYCONV_KEPT_MIB`` in the environment, read once, sets another bound; with 0 nothing is kept.
    """
    from . import _C

    _C.release_kept_memory()


from . import _register as _register  # noqa: E402, PLC0414
from . import flags, functional  # noqa: E402
from .convert import patch, replace, restore  # noqa: E402
from .explain import explain  # noqa: E402
from .modules import (  # noqa: E402
    Conv1d,
    Conv2d,
    Conv3d,
    ConvTranspose1d,
    ConvTranspose2d,
    ConvTranspose3d,
    LazyConv1d,
    LazyConv2d,
    LazyConv3d,
    LazyConvTranspose1d,
    LazyConvTranspose2d,
    LazyConvTranspose3d,
)
from .reroute import override  # noqa: E402

__all__ = [
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvTranspose1d",
    "ConvTranspose2d",
    "ConvTranspose3d",
    "LazyConv1d",
    "LazyConv2d",
    "LazyConv3d",
    "LazyConvTranspose1d",
    "LazyConvTranspose2d",
    "LazyConvTranspose3d",
    "__version__",
    "build_info",
    "empty_cache",
    "explain",
    "flags",
    "functional",
    "override",
    "patch",
    "replace",
    "restore",
]
