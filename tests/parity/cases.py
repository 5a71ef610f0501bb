"""Hypothesis strategies of models and of ways to run them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from tests.checkpoints import raw_config


@dataclass(frozen=True)
class Case:
    """A model, tokens, and the calls that they are fed in."""

    raw: dict[str, Any]
    seed: int
    ids: NDArray[np.int64]
    lengths: list[int]
    cuts: list[int]
    decode_from: int

    @property
    def chunk(self) -> int | None:
        chunk: int | None = self.raw["attention_chunk_size"]
        return chunk


@st.composite
def rope_sections(draw: st.DrawFn) -> dict[str, Any]:
    """Default, or llama3 with any factors, an empty band among them."""
    theta = draw(st.sampled_from([100.0, 10000.0, 500000.0]))
    if draw(st.booleans()):
        return {"rope_type": "default", "rope_theta": theta}
    low = draw(st.sampled_from([0.5, 1.0, 2.0]))
    return {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": draw(st.sampled_from([1.0, 2.0, 16.0])),
        "low_freq_factor": low,
        "high_freq_factor": low * draw(st.sampled_from([1, 1, 4])),
        "original_max_position_embeddings": draw(st.sampled_from([8, 32, 64])),
    }


@st.composite
def models(draw: st.DrawFn) -> dict[str, Any]:
    """Raw configurations; sizes include those that tracing uses as its examples."""
    layers, experts = draw(st.integers(1, 4)), draw(st.integers(1, 8))
    groups = draw(st.integers(1, 3))
    changes: dict[str, Any] = {
        "num_hidden_layers": layers,
        "vocab_size": draw(st.sampled_from([11, 64])),
        "hidden_size": draw(st.sampled_from([7, 15, 32])),
        "intermediate_size": draw(st.sampled_from([5, 24])),
        "intermediate_size_mlp": draw(st.sampled_from([3, 40])),
        "num_key_value_heads": groups,
        "num_attention_heads": groups * draw(st.sampled_from([1, 2, 5])),
        "head_dim": draw(st.sampled_from([2, 6, 8, 16])),
        "num_local_experts": experts,
        "num_experts_per_tok": draw(st.integers(1, min(3, experts))),
        "attention_chunk_size": draw(st.sampled_from([4, 5, 7, 8, 16, None])),
        "floor_scale": draw(st.sampled_from([1, 3, 4, 16])),
        "attn_scale": draw(st.sampled_from([0.0, 0.1, 0.5])),
        "attn_temperature_tuning": draw(st.booleans()),
        "use_qk_norm": draw(st.booleans()),
        "attention_bias": draw(st.booleans()),
        "tie_word_embeddings": draw(st.booleans()),
        "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-5, 1e-2])),
        "rope_parameters": draw(rope_sections()),
    }
    if draw(st.booleans()):
        changes["moe_layers"] = draw(st.lists(st.integers(0, layers - 1), unique=True, max_size=layers))
    else:
        changes["interleave_moe_layer_step"] = draw(st.integers(1, 3))
    if draw(st.booleans()):
        changes["no_rope_layers"] = draw(st.lists(st.sampled_from([0, 1]), min_size=layers, max_size=layers))
    else:
        changes["no_rope_layer_interval"] = draw(st.integers(1, 4))
    return raw_config(**changes)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Batches up to three chunks long, ragged, prefilled in pieces, then decoded token by token."""
    raw = draw(models())
    seed, batch = draw(st.integers(0, 2**16)), draw(st.integers(1, 3))
    length = draw(st.integers(1, 3 * (raw["attention_chunk_size"] or 8)))
    lengths = [length, *draw(st.lists(st.integers(1, length), min_size=batch - 1, max_size=batch - 1))]
    ids = np.random.default_rng(seed).integers(0, raw["vocab_size"], size=(batch, length))
    cuts = draw(st.lists(st.integers(1, length), max_size=3))
    return Case(raw, seed, ids, lengths, cuts, draw(st.integers(1, length)))
