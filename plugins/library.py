"""The built plugin library: where it is, and what it says of itself."""

from __future__ import annotations

import ctypes
import importlib.resources
import json
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from shuntyard.errors import EngineError

LIBRARY_NAME = "libshuntyard_plugins.so"

QUANTISE_LIBRARY_NAME = "libshuntyard_quantise.so"
"""Loops for the processor, which have twins in numpy: an installation without them is slower, and makes the same."""


class BuildInfo(BaseModel):
    """What a plugin library was built from. ``cuda`` is nvcc's version, None where there are no kernels in it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: str
    abi_version: int
    cuda: str | None
    cuda_source: str
    architectures: tuple[int, ...]

    def runs_on(self, target: str) -> bool:
        """Whether there are kernels for a GPU of compute capability ``target``, as ``sm89``.

        Machine code runs on later minor versions of its major version; the last architecture is there as PTX too, which
        a driver compiles for anything later (CUDA C++ Programming Guide, "Binary Compatibility", "PTX Compatibility").
        """
        if self.cuda is None or not self.architectures:
            return False
        own = int(target.removeprefix("sm"))
        return self.architectures[-1] <= own or any(a // 10 == own // 10 and a <= own for a in self.architectures)

    @staticmethod
    def remedy(target: str) -> str:
        """What to do where no kernel runs on ``target``."""
        arch = target.removeprefix("sm")
        return f"install shuntyard with -C cmake.define.SHUNTYARD_CUDA_ARCHITECTURES={arch} and nvcc, then build again"

    @property
    def kernels(self) -> str:
        """What kernels there are, in words."""
        if self.cuda is None:
            return "no kernels (built without nvcc)"
        return f"kernels by nvcc {self.cuda} for {', '.join(f'sm{a}' for a in self.architectures)}"


def library_path() -> Path:
    """The library that was installed with this package.

    Raises:
        EngineError: the package was installed without it.
    """
    # Not beside __file__: an editable install leaves the sources where they are and the library in site-packages.
    path = Path(str(importlib.resources.files("shuntyard.plugins").joinpath(LIBRARY_NAME)))
    if not path.is_file():
        raise EngineError(f"{path}: the plugin library is not there", hint="install shuntyard again")
    return path


def quantise_library_path() -> Path | None:
    """The library of ``plugins/native/quantise`` that was installed with this package, if it was."""
    path = Path(str(importlib.resources.files("shuntyard.plugins").joinpath(QUANTISE_LIBRARY_NAME)))
    return path if path.is_file() else None


def build_info(path: Path) -> BuildInfo:
    """Loads a plugin library and asks it; needs neither TensorRT nor a GPU.

    Raises:
        EngineError: it cannot be loaded, or is no plugin library of shuntyard.
    """
    try:
        ask = ctypes.CDLL(str(path)).shuntyard_build_info
    except (OSError, AttributeError) as error:
        raise EngineError(
            f"{path}: is no plugin library of shuntyard: {error}", hint="install shuntyard again"
        ) from error
    ask.restype = ctypes.c_char_p
    try:
        return BuildInfo.model_validate(json.loads(ask()))
    except (ValueError, ValidationError) as error:
        raise EngineError(
            f"{path}: says of itself what cannot be read: {error}", hint="install shuntyard again"
        ) from error
