"""The parity test can fail: each known mistake, planted in our model only, is far beyond the tolerance."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from shuntyard.exporter import model
from shuntyard.exporter.config import Llama4Config
from shuntyard.exporter.model import Llama4, Weights
from tests import driver
from tests.checkpoints import LLAMA3_ROPE, parsed, random_weights, raw_config
from tests.parity.reference import Reference, largest_difference
from tests.tolerances import MISTAKE_MIN_ABS, MODEL_MAX_ABS, ROUTER_MARGIN

RAW = raw_config(num_hidden_layers=4)
IDS = np.random.default_rng(0).integers(0, RAW["vocab_size"], size=(2, 24))
Patch = pytest.MonkeyPatch


@pytest.fixture(scope="module")
def reference() -> tuple[Weights, Any]:
    """Weights and the right logits."""
    weights = random_weights(parsed(RAW), seed=4)
    right = Reference(RAW, weights)
    expected = right.logits(IDS)
    assert right.margin > ROUTER_MARGIN
    return weights, expected


def error(weights: Weights, expected: Any, **changes: Any) -> float:
    """Of our model with ``changes`` in its configuration, which transformers does not see."""
    config = parsed(RAW | changes)
    step, cache = driver.eager(Llama4(config, weights), *IDS.shape)
    got = driver.run(step, cache, IDS, config.attention_chunk_size, decode_from=20)
    return largest_difference(got, expected)


def test_without_a_mistake(reference: tuple[Weights, Any]) -> None:
    assert error(*reference) <= MODEL_MAX_ABS


WRONG_CONFIGURATION: dict[str, dict[str, Any]] = {
    "QK norm off": {"use_qk_norm": False},
    "temperature off": {"attn_temperature_tuning": False},
    "temperature a token late": {"floor_scale": 5},
    "no chunking": {"attention_chunk_size": None},
    "another chunk size": {"attention_chunk_size": 12},
    "NoPE in other layers": {"no_rope_layers": [0, 1, 1, 1]},
    "rope scaling off": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    "rope scaling 8/4": {"rope_parameters": LLAMA3_ROPE | {"factor": 8.0, "high_freq_factor": 4.0}},
    "one expert of two": {"num_experts_per_tok": 1},
}


@pytest.mark.parametrize("changes", WRONG_CONFIGURATION.values(), ids=WRONG_CONFIGURATION)
def test_wrong_configuration(changes: dict[str, Any], reference: tuple[Weights, Any]) -> None:
    assert error(*reference, **changes) > MISTAKE_MIN_ABS


Moe = tuple[Tensor, Tensor, Tensor]


def routed_off(_config: Llama4Config, w: Weights, x: Tensor) -> Moe:
    shared = model.swiglu(x, w, "feed_forward.shared_expert")
    return shared, x, shared


def shared_off(config: Llama4Config, w: Weights, x: Tensor) -> Moe:
    out, logits, shared = RIGHT_MOE(config, w, x)
    return out - shared, logits, torch.zeros_like(shared)


def dense_moe(score: Callable[[Tensor], Tensor], on_output: bool = False) -> Callable[..., Moe]:
    """Every expert on every token, the score where and how it is asked for."""

    def moe(config: Llama4Config, w: Weights, x: Tensor) -> Moe:
        logits = x @ w["feed_forward.router.weight"].T
        chosen = logits >= logits.topk(config.num_experts_per_tok).values[:, -1:]
        scores = (score(logits) * chosen).T[:, :, None]  # [E, T, 1]
        inputs = x if on_output else x * scores
        gate, up = (inputs @ w["feed_forward.experts.gate_up_proj"]).chunk(2, dim=-1)
        rows = (functional.silu(gate) * up) @ w["feed_forward.experts.down_proj"]
        routed = (rows * scores if on_output else rows).sum(0)
        shared = model.swiglu(x, w, "feed_forward.shared_expert")
        return routed + shared, logits, shared

    return moe


def half_split(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


RIGHT_MOE = model.moe
WRONG_CODE: dict[str, tuple[str, Any]] = {
    "routed experts off": ("moe", routed_off),
    "shared expert off": ("moe", shared_off),
    "score on the output": ("moe", dense_moe(torch.sigmoid, on_output=True)),
    "softmax for sigmoid": ("moe", dense_moe(lambda logits: logits.softmax(-1))),
    "no score": ("moe", dense_moe(torch.ones_like)),
    "half-split RoPE": ("rotate", half_split),
    "no RoPE": ("rotate", lambda x, cos, sin: x),
}


@pytest.mark.parametrize(("name", "wrong"), WRONG_CODE.values(), ids=WRONG_CODE)
def test_wrong_code(name: str, wrong: Any, reference: tuple[Weights, Any], monkeypatch: Patch) -> None:
    monkeypatch.setattr(model, name, wrong)
    assert error(*reference) > MISTAKE_MIN_ABS


def test_dense_form_is_right_with_the_right_score(reference: tuple[Weights, Any], monkeypatch: Patch) -> None:
    """So the mistakes above are the planted ones and no others."""
    monkeypatch.setattr(model, "moe", dense_moe(torch.sigmoid))
    assert error(*reference) <= MODEL_MAX_ABS


def test_qk_norm_on_nope_layers_too(reference: tuple[Weights, Any], monkeypatch: Patch) -> None:
    right = torch.ops.shuntyard.cached_attention
    eps = RAW["rms_norm_eps"]

    def normed(q: Tensor, k: Tensor, *rest: Any) -> Any:
        return right(model.rms_norm(q, eps), model.rms_norm(k, eps), *rest)

    monkeypatch.setattr(torch.ops.shuntyard, "cached_attention", normed)
    assert error(*reference) > MISTAKE_MIN_ABS


def test_gate_and_up_swapped(reference: tuple[Weights, Any]) -> None:
    weights, expected = reference
    swapped = {
        name: torch.cat(w.chunk(2, dim=-1)[::-1], dim=-1) if name.endswith("gate_up_proj") else w
        for name, w in weights.items()
    }
    assert error(swapped, expected) > MISTAKE_MIN_ABS


def test_norm_weight_forgotten(reference: tuple[Weights, Any]) -> None:
    weights, expected = reference
    assert error({**weights, "model.norm.weight": torch.ones(RAW["hidden_size"])}, expected) > MISTAKE_MIN_ABS
