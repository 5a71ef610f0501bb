"""Llama 4's rotation without complex numbers, which torch.onnx.export cannot translate (pytorch#150891)."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor


def patch() -> None:
    """Replaces the two places where transformers' text model multiplies complex numbers."""
    llama4: Any = importlib.import_module("transformers.models.llama4.modeling_llama4")
    llama4.Llama4TextRotaryEmbedding.forward = _angles
    llama4.apply_rotary_emb = _apply


def _angles(self: Any, x: Tensor, position_ids: Tensor) -> Tensor:
    """Cosines and sines, ``[2, B, S, D/2]``."""
    angles: Tensor = position_ids[:, :, None].float() * self.inv_freq[None, None, :].float()
    scaling: float = self.attention_scaling
    return torch.stack((angles.cos(), angles.sin())) * scaling


def _rotate(x: Tensor, angles: Tensor) -> Tensor:
    cos, sin = (part[:, :, None, :] for part in angles.unbind(0))
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2).type_as(x)


def _apply(queries: Tensor, keys: Tensor, angles: Tensor) -> tuple[Tensor, Tensor]:
    return _rotate(queries, angles), _rotate(keys, angles)
