"""GPUs that ``plan`` knows, and the memory that a process can have on each.

A process gets less than the name says. An "80 GB" H100 has 80 GiB of chips; the driver keeps some for itself and for
error correction, and ``cudaMemGetInfo`` tells a process of 79.10 GiB. The figures here are that total, which PyTorch's
out-of-memory messages call "total capacity": the smallest that was seen, since drivers differ by some 0.1 GiB. They are
of a GPU that runs nothing else; a desktop takes more.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from shuntyard.errors import UnsupportedError

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """A GPU. ``usable`` is in bytes; ``target`` is its compute capability as ``build`` names it, None: not known."""

    name: str
    title: str
    usable: int
    target: str | None

    @property
    def has_fp8(self) -> bool:
        """Whether TensorRT compiles FP8 for it: from sm89 on. What is not known is not held against it."""
        return self.target is None or int(self.target.removeprefix("sm")) >= 89


_TABLE = (
    ("rtx4090", "GeForce RTX 4090, 24 GB", 23.52, "sm89"),
    ("rtx5090", "GeForce RTX 5090, 32 GB", 31.36, "sm120"),
    ("a100-40", "A100, 40 GB", 39.38, "sm80"),
    ("l40s", "L40S, 48 GB", 44.34, "sm89"),
    ("h100", "H100 SXM or PCIe, 80 GB", 79.10, "sm90"),
    ("a100-80", "A100, 80 GB", 79.14, "sm80"),
    ("h100-nvl", "H100 NVL, 94 GB", 93.00, "sm90"),
    ("rtx-pro-6000", "RTX PRO 6000 Blackwell, 96 GB", 94.96, "sm120"),
    ("h200", "H200, 141 GB", 139.72, "sm90"),
    ("b200", "B200, 180 GB", 178.35, "sm100"),
    ("b300", "B300, 288 GB", 267.69, "sm103"),
)

GPUS = {name: Gpu(name, title, round(gib * GIB), target) for name, title, gib, target in _TABLE}
"""By name, smallest first."""

_SIZE = re.compile(r"(\d{1,6}(?:\.\d{1,6})?)\s*GiB", re.IGNORECASE | re.ASCII)


def find_gpu(text: str) -> Gpu:
    """The GPU of a name, or one of a size such as ``44.5GiB``, for what is not in the table.

    Raises:
        UnsupportedError: there is no such name; the hint lists those that there are.
    """
    size = _SIZE.fullmatch(text)
    if size is not None:
        return Gpu(text, f"a GPU with {size[1]} GiB to use", round(float(size[1]) * GIB), None)
    gpu = GPUS.get(text.lower())
    if gpu is None:
        raise UnsupportedError(
            f"gpu '{text:.40}' is not known",
            hint=f"one of {', '.join(GPUS)}; or what a process can have of it, as 44.5GiB (torch.cuda.mem_get_info)",
        )
    return gpu
