"""The plugin library's C interface (plugins/native/shuntyard_plugins.h, version 4) on torch's tensors and stream."""

from __future__ import annotations

import ctypes
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

ABI_VERSION = 4
BF16, E4M3 = 2, 3
LINEAR, UNSCALED, PER_CHANNEL, AS_THEY_ARE, DYNAMIC = 2, 0, 2, 0, 2
MOST_TACTICS = 64


class ExpertWeights(ctypes.Structure):
    """``struct shuntyard_expert_weights``."""

    _fields_ = (
        ("layout", ctypes.c_int),
        ("type", ctypes.c_int),
        ("scaling", ctypes.c_int),
        ("scale_type", ctypes.c_int),
        ("group_size", ctypes.c_int64),
        ("weights", ctypes.POINTER(ctypes.c_void_p)),
        ("scales", ctypes.POINTER(ctypes.c_void_p)),
        ("activations", ctypes.c_int),
        ("activation_scale_type", ctypes.c_int),
        ("activation_scales", ctypes.POINTER(ctypes.c_void_p)),
    )


def _pointers(tensors: list[torch.Tensor]) -> Any:
    return (ctypes.c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors))


def expert_weights(
    w13: torch.Tensor, w2: torch.Tensor, scales: tuple[torch.Tensor, torch.Tensor] | None
) -> ExpertWeights:
    """Layout ``linear`` of ``w13 [E, 2F, H]``, gate first, and ``w2 [E, H, F]``, in place.

    FP8 with fp32 scales ``[E, 2F]`` and ``[E, H]``, activations dynamic; or bf16.
    """

    def parts(first: torch.Tensor, second: torch.Tensor) -> list[torch.Tensor]:
        half = first.shape[1] // 2
        return [*(both[:half] for both in first), *(both[half:] for both in first), *second]

    return ExpertWeights(
        LINEAR,
        BF16 if scales is None else E4M3,
        UNSCALED if scales is None else PER_CHANNEL,
        0,
        0,
        _pointers(parts(w13, w2)),
        None if scales is None else _pointers(parts(*scales)),
        AS_THEY_ARE if scales is None else DYNAMIC,
        0,
        None,
    )


class Library:
    """The library; its calls enqueue on a stream."""

    def __init__(self, path: Path, on_host: bool = False) -> None:
        """Loads it; ``on_host``: one whose kernels were compiled for the host, as tests have it.

        Raises:
            OSError: it is no library.
            ValueError: it has no kernels, or another interface.
        """
        self._c = ctypes.CDLL(str(path))
        self._c.shuntyard_build_info.restype = ctypes.c_char_p
        self._c.shuntyard_status_text.restype = ctypes.c_char_p
        self._c.shuntyard_tactic_name.restype = ctypes.c_char_p
        self.info: dict[str, Any] = json.loads(self._c.shuntyard_build_info())
        if self.info["abi_version"] != ABI_VERSION:
            raise ValueError(f"{path} has version {self.info['abi_version']} of the C interface, not {ABI_VERSION}")
        if self.info["cuda"] is None and not on_host:
            raise ValueError(f"{path} was built without nvcc: it has no kernels")

    def workspace_size(self, name: str, *arguments: int) -> int:
        """Of a call; the first two arguments of the experts' are ints, all others extents."""
        query = getattr(self._c, f"shuntyard_{name}_workspace")
        query.restype = ctypes.c_size_t
        ints = 2 if name == "moe_experts" else 0
        return int(query(*map(ctypes.c_int, arguments[:ints]), *map(ctypes.c_int64, arguments[ints:])))

    def call(self, name: str, *arguments: Any) -> None:
        """Pointers (tensors or None), extents, sizes and numbers, as ctypes or tensors.

        Raises:
            RuntimeError: the call was refused.
        """
        status = getattr(self._c, f"shuntyard_{name}")(
            *(ctypes.c_void_p(a.data_ptr()) if hasattr(a, "data_ptr") else a for a in arguments)
        )
        if status:
            raise RuntimeError(f"shuntyard_{name}: {self._c.shuntyard_status_text(status).decode()}")

    def tactics(self, weights: ExpertWeights, extents: tuple[int, ...]) -> dict[int, str]:
        """Those that compute the experts of these extents (T, E, K, H, F) in bf16, with their names."""
        found = (ctypes.c_int32 * MOST_TACTICS)()
        sizes = map(ctypes.c_int64, extents)
        count = self._c.shuntyard_moe_experts_tactics(ctypes.c_int(BF16), ctypes.byref(weights), *sizes, found)
        return {int(number): self._c.shuntyard_tactic_name(number).decode() for number in found[: max(0, count)]}
