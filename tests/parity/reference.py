"""The independent reference: transformers' ``Llama4ForCausalLM`` in fp32 with eager attention."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import Llama4ForCausalLM, Llama4TextConfig


class Reference:
    """A transformers model that also measures how close its routers came to choosing other experts."""

    def __init__(self, raw: dict[str, Any], weights: dict[str, Tensor]) -> None:
        self.model = Llama4ForCausalLM(Llama4TextConfig(**{**raw, "attn_implementation": "eager"})).eval()
        tied = {"lm_head.weight": weights["model.embed_tokens.weight"]} if raw.get("tie_word_embeddings") else {}
        self.model.load_state_dict({**weights, **tied}, strict=True)
        self.top_k = self.model.config.num_experts_per_tok
        self.margin = float("inf")
        for layer in self.model.model.layers:
            if layer.is_moe_layer:
                layer.feed_forward.router.register_forward_hook(self._measure)

    def _measure(self, _module: Any, _inputs: Any, output: tuple[Tensor, Tensor]) -> None:
        ordered = output[1].sort(dim=-1, descending=True).values
        if ordered.shape[-1] > self.top_k:
            gap = ordered[:, self.top_k - 1] - ordered[:, self.top_k]
            self.margin = min(self.margin, float(gap.min()))

    def logits(self, ids: NDArray[np.int64], lengths: list[int] | None = None) -> NDArray[np.float32]:
        """Logits ``[B, S, V]``, each sequence run alone and at once, NaN behind its end; resets ``margin``."""
        self.margin = float("inf")
        out = np.full((*ids.shape, self.model.config.vocab_size), np.nan, np.float32)
        for b, row in enumerate(ids):
            own = row[: len(row) if lengths is None else lengths[b]]
            with torch.no_grad():
                out[b, : len(own)] = self.model(torch.from_numpy(own[None].copy())).logits[0].numpy()
        return out


def largest_difference(got: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    """Largest absolute difference; NaN must be in the same places."""
    np.testing.assert_array_equal(np.isnan(got), np.isnan(expected))
    return float(np.nanmax(np.abs(got - expected)))
