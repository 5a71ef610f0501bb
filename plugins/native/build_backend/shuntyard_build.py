"""The PEP 517 backend: scikit-build-core, plus nvcc from pip where the machine has none.

``pip install`` asks a backend what it needs before it builds. This one adds NVIDIA's compiler packages if there is no
usable nvcc on the machine, and tells CMake where pip has put them. The setting ``SHUNTYARD_CUDA`` decides, as in
``pip install -C cmake.define.SHUNTYARD_CUDA=off .``: auto (machine, else pip), machine, pip or off.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

from scikit_build_core import build as scikit_build
from scikit_build_core.build import build_sdist, get_requires_for_build_sdist

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

Settings = dict[str, str | list[str]] | None

PIP_NVCC = ["nvidia-cuda-nvcc>=13.0,<14", "nvidia-cuda-crt<14", "nvidia-cuda-runtime<14", "nvidia-nvvm<14"]
PIP_NVCC_PLATFORMS = [("linux", "x86_64"), ("linux", "aarch64")]
OLDEST_NVCC = (12, 8)  # as in cmake/nvcc.cmake


def _cuda_setting(settings: Settings) -> str:
    value = (settings or {}).get("cmake.define.SHUNTYARD_CUDA", "auto")
    return value if isinstance(value, str) else value[-1]


def _machine_has_nvcc() -> bool:
    roots = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    path = os.pathsep.join([*(f"{root}/bin" for root in roots if root), os.environ.get("PATH", "")])
    nvcc = shutil.which("nvcc", path=path)
    if nvcc is None:
        return False
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
    release = re.search(r"release (\d+)\.(\d+)", text)
    return release is not None and (int(release[1]), int(release[2])) >= OLDEST_NVCC


def _requirements(settings: Settings) -> list[str]:
    cuda = _cuda_setting(settings)
    possible = (sys.platform, platform.machine()) in PIP_NVCC_PLATFORMS
    if cuda == "pip" or (cuda == "auto" and possible and not _machine_has_nvcc()):
        return PIP_NVCC
    return []


def _with_pip_nvcc(settings: Settings) -> Settings:
    """The settings, with the place of pip's nvcc if it is installed where this build runs."""
    for place in sys.path:
        for nvcc in sorted(Path(place or ".").glob("nvidia/cu*/bin/nvcc")):
            return {**(settings or {}), "cmake.define.SHUNTYARD_PIP_CUDA_ROOT": str(nvcc.parents[1])}
    return settings


def get_requires_for_build_wheel(config_settings: Settings = None) -> list[str]:
    return [*scikit_build.get_requires_for_build_wheel(config_settings), *_requirements(config_settings)]


def get_requires_for_build_editable(config_settings: Settings = None) -> list[str]:
    return [*scikit_build.get_requires_for_build_editable(config_settings), *_requirements(config_settings)]


def prepare_metadata_for_build_wheel(metadata_directory: str, config_settings: Settings = None) -> str:
    name: str = scikit_build.prepare_metadata_for_build_wheel(metadata_directory, _with_pip_nvcc(config_settings))
    return name


def prepare_metadata_for_build_editable(metadata_directory: str, config_settings: Settings = None) -> str:
    name: str = scikit_build.prepare_metadata_for_build_editable(metadata_directory, _with_pip_nvcc(config_settings))
    return name


def build_wheel(wheel_directory: str, config_settings: Settings = None, metadata_directory: str | None = None) -> str:
    name: str = scikit_build.build_wheel(wheel_directory, _with_pip_nvcc(config_settings), metadata_directory)
    return name


def build_editable(
    wheel_directory: str, config_settings: Settings = None, metadata_directory: str | None = None
) -> str:
    name: str = scikit_build.build_editable(wheel_directory, _with_pip_nvcc(config_settings), metadata_directory)
    return name
