"""Comparisons of single modules: what is measured, where it is worst, which tokens count, what a flip is."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shuntyard.validate.bounds import Bounds
from shuntyard.validate.modules import FLOOR, chosen_experts, compare_layer, compare_module, ties
from shuntyard.validate.values import PARTS, Array, LayerValues, Sequence

BOUNDS = Bounds(("fp32",))
LENGTHS = (5, 3)
SEQUENCES = [Sequence(f"s{i}", np.zeros(n, np.int64)) for i, n in enumerate(LENGTHS)]


def arrays(seed: int, *rest: int) -> list[Array]:
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(n, *rest)).astype(np.float32) for n in LENGTHS]


def layer(seed: int, moe: bool = True) -> list[LayerValues]:
    rng = np.random.default_rng(seed)

    def new(n: int, *rest: int) -> Array:
        return rng.normal(size=(n, *rest)).astype(np.float32)

    return [
        LayerValues(
            key=new(n, 2, 3),
            value=new(n, 2, 3),
            attention=new(n, 6),
            feed_forward=new(n, 6),
            hidden=new(n, 6),
            attention_input=new(n, 6),
            feed_forward_input=new(n, 6),
            router=new(n, 4) if moe else None,
            shared=new(n, 6) if moe else None,
        )
        for n in LENGTHS
    ]


def test_the_two_metrics_are_what_the_report_says() -> None:
    expected, actual = arrays(0, 6), arrays(0, 6)
    actual[1][2, 4] += 0.5
    module, errors = compare_module("m", 3, "self_attn", "forced", BOUNDS, SEQUENCES, expected, actual)
    vector = expected[1][2].astype(np.float64)
    everything = np.concatenate(expected).astype(np.float64)
    floor = FLOOR * np.median(np.sqrt(np.mean(everything**2, axis=1)))
    scale = max(np.sqrt(np.mean(vector**2)), floor)
    assert module.coordinate == pytest.approx(0.5 / scale)
    assert module.relative == pytest.approx(0.5 / 6**0.5 / scale)
    assert module.where == "sequence 's1', token 2, channel 4"
    assert (module.tokens, module.ok) == (8, False)
    assert errors[0] == 0
    assert errors[1] == pytest.approx(module.relative**2 / 3)


@given(st.sampled_from([np.nan, np.inf, -np.inf]), st.booleans())
def test_what_is_not_finite_fails(value: float, both: bool) -> None:
    expected, actual = arrays(1, 6), arrays(1, 6)
    actual[0][1, 1] = value
    if both:
        expected[0][1, 1] = value  # a reference that is not finite either settles nothing
    module, _ = compare_module("m", 0, "self_attn", "forced", BOUNDS, SEQUENCES, expected, actual)
    assert module.ok is False


def test_keys_are_told_by_head_and_channel() -> None:
    expected, actual = arrays(2, 2, 3), arrays(2, 2, 3)
    actual[0][4, 1, 2] += 1
    module, _ = compare_module("m", 0, "self_attn.key", "forced", BOUNDS, SEQUENCES, expected, actual)
    assert module.where == "sequence 's0', token 4, head 1, channel 2"


def test_tokens_that_do_not_count_are_not_looked_at() -> None:
    expected, actual = arrays(3, 6), arrays(3, 6)
    actual[0][0] += 9
    keep = [np.arange(n) > 0 for n in LENGTHS]
    module, _ = compare_module("m", 0, "self_attn", "forced", BOUNDS, SEQUENCES, expected, actual, keep)
    assert (module.ok, module.relative, module.tokens) == (True, 0.0, 6)
    none = [np.zeros(n, bool) for n in LENGTHS]
    module, _ = compare_module("m", 0, "self_attn", "forced", BOUNDS, SEQUENCES, expected, actual, none)
    assert (module.ok, module.tokens) == (None, 0)


def test_a_vector_of_nearly_nothing_is_measured_by_the_others() -> None:
    expected, actual = arrays(4, 6), arrays(4, 6)
    expected[0][0] = 0
    actual[0][0] = 1e-9
    module, _ = compare_module("m", 0, "self_attn", "forced", BOUNDS, SEQUENCES, expected, actual)
    assert module.ok is True
    assert 0 < module.coordinate < 1e-8


def test_every_part_is_compared_and_a_wrong_one_alone_fails() -> None:
    fields = {
        "self_attn.key": "key",
        "self_attn.value": "value",
        "self_attn": "attention",
        "input_layernorm": "attention_input",
        "post_attention_layernorm": "feed_forward_input",
        "": "hidden",
    }
    expected = layer(5)
    right = compare_layer(3, 1, "forced", BOUNDS, SEQUENCES, expected, layer(5))
    assert [module.part for module in right.modules] == list(PARTS)
    assert all(module.ok for module in right.modules)
    dense = compare_layer(3, 1, "forced", BOUNDS, SEQUENCES, layer(5, moe=False), layer(5, moe=False))
    assert [m.part for m in dense.modules] == [p for p in PARTS if not p.startswith("feed_forward.")]
    for part, name in fields.items():
        actual = layer(5)
        getattr(actual[1], name)[1] *= 1.01
        found = compare_layer(3, 1, "forced", BOUNDS, SEQUENCES, expected, actual)
        assert [module.part for module in found.modules if module.ok is False] == [part]


def test_routed_and_shared_experts_are_told_apart() -> None:
    expected, actual = layer(6), layer(6)
    assert actual[0].shared is not None
    actual[0].shared[2] *= 1.5
    found = compare_layer(3, 1, "forced", BOUNDS, SEQUENCES, expected, actual)
    failed = [module.part for module in found.modules if module.ok is False]
    assert failed == ["feed_forward.shared_expert", "feed_forward.experts"]  # what is left is the routed part
    actual = layer(6)
    actual[0].feed_forward[2] *= 1.5
    found = compare_layer(3, 1, "forced", BOUNDS, SEQUENCES, expected, actual)
    assert [m.part for m in found.modules if m.ok is False] == ["feed_forward.experts", "feed_forward"]


def flipped(margin: float) -> tuple[list[LayerValues], list[LayerValues]]:
    """Token 1 of the first sequence chooses expert 2 instead of 3, whose logits are ``margin`` RMS apart."""
    expected, actual = layer(7), layer(7)
    row = np.array([1.0, -1.0, 1.5, 1.5], np.float32)
    rms = float(np.sqrt(np.mean(row.astype(np.float64) ** 2)))
    for values in (expected[0], actual[0]):
        assert values.router is not None
        values.router[1] = row
    assert expected[0].router is not None and actual[0].router is not None
    expected[0].router[1, 3] += np.float32(margin * rms)
    actual[0].router[1, 2] += np.float32(margin * rms)
    actual[0].feed_forward[1] += 7  # another expert's output
    actual[0].hidden[1] += 7
    return expected, actual


def test_a_flip_at_a_near_tie_is_none_of_the_experts_business() -> None:
    expected, actual = flipped(1e-5)
    found = compare_layer(3, 1, "forced", BOUNDS, SEQUENCES, expected, actual)
    (flip,) = found.flips
    assert (flip.sequence, flip.token, flip.reference, flip.engine, flip.ok) == ("s0", 1, [3], [2], True)
    assert flip.margin == pytest.approx(1e-5, rel=0.05)
    assert all(module.ok for module in found.modules)
    assert [m.tokens for m in found.modules if m.part in ("feed_forward.experts", "feed_forward", "")] == [7] * 3
    assert found.routing is not None
    assert found.routing.flips == 1
    assert found.routing.agreement == pytest.approx(7 / 8)
    assert sum(found.routing.load_reference) == sum(found.routing.load_engine) == 8
    assert found.misses is not None
    assert found.misses.tolist() == [pytest.approx(1 / 5), 0]


def test_a_flip_beyond_a_tie_fails() -> None:
    found = compare_layer(3, 1, "forced", BOUNDS, SEQUENCES, *flipped(0.3))
    assert [flip.ok for flip in found.flips] == [False]
    assert [m.part for m in found.modules if m.ok is False] == ["feed_forward.router"]


@given(st.integers(0, 2**16), st.integers(1, 4), st.integers(1, 6))
def test_chosen_experts_are_the_largest_and_of_equal_ones_the_lower(seed: int, top_k: int, more: int) -> None:
    rng = np.random.default_rng(seed)
    logits = rng.integers(-2, 3, (7, top_k + more)).astype(np.float32)
    for row, chosen in zip(logits, chosen_experts(logits, top_k), strict=True):
        best = sorted(range(len(row)), key=lambda e: (-row[e], e))[:top_k]
        assert chosen.tolist() == sorted(best)
    near = ties(logits, top_k, 1e-6)
    ordered = -np.sort(-logits, axis=1)
    assert near.tolist() == (ordered[:, top_k - 1] == ordered[:, top_k]).tolist()


def test_all_experts_chosen_have_no_ties() -> None:
    assert not ties(np.zeros((3, 2), np.float32), 2, 1.0).any()


def test_a_value_in_another_layer_is_named() -> None:
    expected, actual = layer(8), layer(8)
    actual[1] = replace(actual[1], key=actual[1].key + 1)
    found = compare_layer(11, 1, "inverse", BOUNDS, SEQUENCES, expected, actual)
    assert [m.module for m in found.modules if m.ok is False] == ["model.layers.11.self_attn.key"]
