"""``plan`` as a search: what it calls the largest or the nearest is, and fits."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shuntyard.engines.plan import Request
from shuntyard.engines.plan.answer import plan_model
from shuntyard.engines.plan.budget import MOST, Asked, Model, budget_of, check_request
from shuntyard.engines.plan.footprint import possible_gpus
from shuntyard.engines.plan.gpus import GIB, GPUS, find_gpu
from shuntyard.errors import UnsupportedError
from shuntyard.exporter.recipe import SHIPPED
from tests.engines.test_plan import MAVERICK_MODEL, SCOUT_MODEL


def test_gpus_are_sorted_and_smaller_than_their_names() -> None:
    sizes = [gpu.usable for gpu in GPUS.values()]
    assert sizes == sorted(sizes)
    for gpu in GPUS.values():
        promised = int(gpu.title.rsplit(", ", 1)[1].removesuffix(" GB"))
        assert 0.9 * promised * 10**9 < gpu.usable < promised * GIB
    assert find_gpu("H100") is GPUS["h100"]
    assert find_gpu("44.5GiB").usable == 44.5 * GIB
    for text in ("", "44.5", "-1GiB", "1e9GiB", "9" * 400 + "GiB", "nanGiB"):
        with pytest.raises(UnsupportedError, match="is not known"):
            find_gpu(text)


def test_what_fits_where() -> None:
    """The answers that people ask for."""
    fits = {
        (model.config.num_local_experts, weights, gpu, gpus)
        for model in (SCOUT_MODEL, MAVERICK_MODEL)
        for weights in ("bf16", "fp8", "int4-experts")
        for gpu, gpus in (("h100", 1), ("h200", 1), ("h100", 4), ("h100", 8), ("h200", 8))
        if plan_model(model, Request(gpu=gpu, gpus=gpus, weights=weights)).fits
    }
    assert fits == {
        (16, "bf16", "h100", 4),
        (16, "bf16", "h100", 8),
        (16, "bf16", "h200", 8),
        (16, "fp8", "h200", 1),
        (16, "fp8", "h100", 4),
        (16, "fp8", "h100", 8),
        (16, "fp8", "h200", 8),
        (16, "int4-experts", "h100", 1),
        (16, "int4-experts", "h200", 1),
        (16, "int4-experts", "h100", 4),
        (16, "int4-experts", "h100", 8),
        (16, "int4-experts", "h200", 8),
        (128, "bf16", "h200", 8),
        (128, "fp8", "h100", 8),
        (128, "fp8", "h200", 8),
        (128, "int4-experts", "h100", 4),
        (128, "int4-experts", "h100", 8),
        (128, "int4-experts", "h200", 8),
    }


def _asked(model: Model, **changes: Any) -> Asked:
    return check_request(model, Request(**changes))


requests: st.SearchStrategy[dict[str, Any]] = st.fixed_dictionaries(
    {
        "context": st.integers(1, 2**20),
        "batch": st.integers(1, 300),
        "tokens": st.integers(1, 9000),
        "weights": st.sampled_from(["stored", *SHIPPED]),
        "kv": st.sampled_from(["bf16", "fp8"]),
        "gpu": st.sampled_from(list(GPUS)),
        "gpus": st.sampled_from([1, 2, 4, 8]),
        "all_logits": st.booleans(),
    }
)
models = st.sampled_from([SCOUT_MODEL, MAVERICK_MODEL])


def without_fp8(changes: dict[str, Any]) -> bool:
    """Whether it is something that an A100 can hold."""
    return changes["kv"] != "fp8" and not changes["weights"].startswith("fp8")


requests = requests.filter(lambda changes: GPUS[changes["gpu"]].has_fp8 or without_fp8(changes))


@given(models, requests, st.sampled_from(["context", "batch", "tokens"]), st.integers(0, 5000))
def test_more_takes_more(model: Model, changes: dict[str, Any], key: str, more: int) -> None:
    larger = min(changes[key] + more, 2**20)
    budget, larger_budget = (budget_of(model, _asked(model, **changes | {key: n})) for n in (changes[key], larger))
    assert larger_budget.needed >= budget.needed
    assert larger_budget.live.nbytes >= budget.live.nbytes


@given(models, requests)
def test_more_gpus_hold_less_each_and_not_less_together(model: Model, changes: dict[str, Any]) -> None:
    budgets = [budget_of(model, _asked(model, **changes | {"gpus": n})) for n in possible_gpus(model.config)]
    counts = possible_gpus(model.config)
    for key in ("weights", "cache"):
        each = [
            sum(b.weights.values()) if key == "weights" else b.cache.local_bytes + b.cache.global_bytes for b in budgets
        ]
        assert each == sorted(each, reverse=True)
        together = [n * nbytes for n, nbytes in zip(counts, each, strict=True)]
        assert together == sorted(together)
    assert all(later.needed <= first.needed for first, later in pairwise(budgets))


@settings(max_examples=60)
@given(models, requests)
def test_the_largest_fit_and_one_more_does_not(model: Model, changes: dict[str, Any]) -> None:
    answer = plan_model(model, Request(**changes))
    for key, found, most in (
        ("context", answer.largest_context, model.config.max_position_embeddings),
        ("batch", answer.largest_batch, MOST),
    ):
        if found is not None:
            assert plan_model(model, Request(**changes | {key: found})).fits
        if found is None or found < most:
            assert not plan_model(model, Request(**changes | {key: (found or 0) + 1})).fits


ORDER: dict[str, list[Any]] = {
    "gpus": [1, 2, 4, 8],
    "gpu": list(GPUS),
    "kv": ["bf16", "fp8"],
    "weights": ["stored", *SHIPPED],
}


@settings(max_examples=60)
@given(models, requests)
def test_the_nearest_fit_and_one_step_less_does_not(model: Model, changes: dict[str, Any]) -> None:
    request = Request(**changes)
    answer = plan_model(model, request)
    reason = answer.reason()
    if answer.fits:
        assert answer.nearest == () and reason is None
        return
    assert reason is not None and reason.nbytes > reason.room >= 0
    # Without what is too large, all else would fit; with what there is room for, just so.
    assert reason.nbytes - reason.room == -answer.budget.left or reason.term == "weights"
    singles = [change for change in answer.nearest if change.what.count("--") == 1]
    assert singles == list(answer.nearest) or not singles
    for change in singles:
        key = change.what.split()[0].removeprefix("--")
        value = getattr(change.asked, key)
        again = replace(request, **{key: value.name if key == "gpu" else value})
        assert plan_model(model, again).fits
        before = getattr(request, key)
        if key in ("context", "batch", "tokens"):
            assert value < before
            assert not plan_model(model, replace(request, **{key: value + 1})).fits
        else:
            steps = ORDER[key]
            for step in steps[steps.index(before) + 1 : steps.index(again.__dict__[key])]:
                between = replace(request, **{key: step})
                if GPUS[between.gpu].has_fp8 or without_fp8(between.__dict__):
                    assert not plan_model(model, between).fits
    for change in answer.nearest:
        assert change.budget.fits
        assert budget_of(model, change.asked) == change.budget


def test_one_step_is_never_left_out() -> None:
    """Every axis is found where it alone helps."""
    found: set[str] = set()
    for changes in (
        {"weights": "fp8"},
        {"weights": "int4-experts", "context": 150_000},
        {"weights": "int4-experts", "context": 8192, "batch": 9, "tokens": 8192},
    ):
        answer = plan_model(SCOUT_MODEL, Request(**changes))
        found |= {change.what.split()[0] for change in answer.nearest}
    assert found == {"--gpu", "--gpus", "--weights", "--context", "--kv", "--batch", "--tokens"}
    far = plan_model(SCOUT_MODEL, Request(weights="bf16", context=10_485_760))
    assert [change.what.split()[::2] for change in far.nearest] == [["--gpu", "--gpus"]]
    both = plan_model(SCOUT_MODEL, Request(gpu="b300", weights="bf16", context=10_485_760 // 4))
    assert any(change.what == "--kv fp8 --weights fp8" for change in both.nearest) or not both.fits


def _options(**changes: Any) -> list[str]:
    return [change.what for change in plan_model(SCOUT_MODEL, Request(**changes)).nearest]


def test_recipes_are_tried_in_order() -> None:
    """117.3 GiB are needed as fp8, 112.0 as fp8-ffn, 105.1 as fp8-all-linear, 69.9 as int4-experts."""
    for gpu, recipe in (("118", "fp8"), ("117", "fp8-ffn"), ("111", "fp8-all-linear"), ("105", "int4-experts")):
        assert f"--weights {recipe}" in _options(gpu=f"{gpu}GiB")
    assert "--weights fp8-ffn" in _options(gpu="117GiB", weights="fp8")


def test_nothing_in_fp8_is_offered_for_an_a100() -> None:
    assert _options(gpu="a100-80", gpus=2) == ["--gpu h200", "--gpus 4", "--weights int4-experts"]
    # With the cache in FP8 it would fit.
    near: dict[str, Any] = {"weights": "int4-experts", "context": 200_000}
    assert "--kv fp8" in _options(gpu="79.14GiB", **near)
    assert "--kv fp8" not in _options(gpu="a100-80", **near)
