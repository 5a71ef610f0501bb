"""The built plugin library: where it is, and what it says of itself."""

from __future__ import annotations

import ctypes
import importlib.resources
import json
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from shuntyard.errors import EngineError

LIBRARY_NAME = "libshuntyard_plugins.so"


class BuildInfo(BaseModel):
    """What a plugin library was built from. ``cuda`` is nvcc's version, None where there are no kernels in it."""

    model_config = ConfigDict(frozen=True)

    version: str
    abi_version: int
    cuda: str | None
    cuda_source: str
    architectures: tuple[int, ...]


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
