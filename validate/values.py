"""What is compared: the values inside one layer, and the sequences that they belong to. All float32."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Tokens = NDArray[np.int64]

PARTS = (
    "input_layernorm",
    "self_attn.key",
    "self_attn.value",
    "self_attn",
    "post_attention_layernorm",
    "feed_forward.router",
    "feed_forward.shared_expert",
    "feed_forward.experts",
    "feed_forward",
    "",
)
"""A layer's modules in the order in which they are computed; the last is the layer itself."""


@dataclass(frozen=True)
class Sequence:
    """Tokens ``i64 [S]`` that are fed from an empty cache, and what people call them."""

    label: str
    tokens: Tokens


@dataclass(frozen=True)
class LayerValues:
    """One layer's values for one sequence of ``S`` tokens; float32, dimensions by ``plugins/contract.py``.

    ``key`` and ``value`` are what the KV cache gets, after rotation and QK norm. Keys of a RoPE layer are rotated by
    the position *within the chunk*, for whichever model they were taken from.
    """

    key: Array  # [S, G, D]
    value: Array  # [S, G, D]
    attention: Array  # [S, H]  behind o_proj
    feed_forward: Array  # [S, H]
    hidden: Array  # [S, H]  the layer's output, both residuals added
    attention_input: Array  # [S, H]  behind input_layernorm
    feed_forward_input: Array  # [S, H]  behind post_attention_layernorm
    router: Array | None = None  # [S, E] logits; MoE layers only
    shared: Array | None = None  # [S, H] the shared expert alone; MoE layers only
    slack: Array | None = None  # [S, len(PARTS), 2]; of a reference that rounds activations, see ``activations.py``

    def part(self, name: str) -> Array | None:
        """The values of one of ``PARTS``; None where the layer has no such module."""
        if name == "feed_forward.experts":  # the routed experts' sum
            return None if self.shared is None else self.feed_forward - self.shared
        return {
            "self_attn.key": self.key,
            "self_attn.value": self.value,
            "self_attn": self.attention,
            "feed_forward.router": self.router,
            "feed_forward.shared_expert": self.shared,
            "feed_forward": self.feed_forward,
            "input_layernorm": self.attention_input,
            "post_attention_layernorm": self.feed_forward_input,
            "": self.hidden,
        }[name]


def module_name(layer: int, part: str) -> str:
    """As the checkpoint calls it: ``model.layers.3.self_attn``."""
    return f"model.layers.{layer}.{part}" if part else f"model.layers.{layer}"
