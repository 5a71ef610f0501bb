"""Bounds: the table, what a TOML file changes of it, and what it may not."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from shuntyard.errors import EngineError
from shuntyard.validate.bounds import METRICS, Bounds, Override, over, read_overrides
from shuntyard.validate.tolerances import CODES, MODULES, ORDER, ROUNDINGS, TOLERANCES
from shuntyard.validate.values import PARTS

EXPERTS = "model.layers.5.feed_forward.experts"


def test_the_table_is_whole_and_every_entry_has_its_reason() -> None:
    assert set(MODULES) == {*PARTS, "embed_tokens", "lm_head"}
    assert set(TOLERANCES) == set(ROUNDINGS) == set(ORDER)
    for table in (MODULES, ROUNDINGS, TOLERANCES):
        assert all(entry.reason for entry in table.values())


def test_the_coarser_format_counts() -> None:
    assert Bounds(("fp32", "bf16")).format == Bounds(("bf16", "fp32")).format == "bf16"
    narrow, wide = (Bounds((f,)).module(EXPERTS, "feed_forward.experts", "forced") for f in ("fp16", "bf16"))
    assert wide == (8 * (narrow[0] or 0), 8 * (narrow[1] or 0))


def test_free_running_is_wider_or_not_judged() -> None:
    fp32 = Bounds(("fp32",))
    forced, free = (fp32.module(EXPERTS, "feed_forward.experts", mode) for mode in ("forced", "free"))
    assert free == (10 * (forced[0] or 0), 10 * (forced[1] or 0))
    assert Bounds(("fp16",)).module(EXPERTS, "feed_forward.experts", "free") == (None, None)


def override(**changes: object) -> Override:
    entry = {"module": "model.layers.*.feed_forward.experts", "metric": "relative", "bound": 0.5, "reason": "why"}
    return Override.model_validate(entry | changes)


def test_an_override_counts_for_its_modules_and_format_alone() -> None:
    bounds = Bounds(("fp16",), [override(), override(metric="margin", module="*.router", bound=0.25, format="fp16")])
    table = Bounds(("fp16",))
    assert bounds.module(EXPERTS, "feed_forward.experts", "forced")[0] == 0.5
    assert (
        bounds.module(EXPERTS, "feed_forward.experts", "forced")[1]
        == table.module(EXPERTS, "feed_forward.experts", "forced")[1]
    )
    other = "model.layers.5.self_attn"
    assert bounds.module(other, "self_attn", "forced") == table.module(other, "self_attn", "forced")
    assert bounds.margin("model.layers.1.feed_forward.router") == 0.25
    assert bounds.unused() == []
    assert bounds.notes()[0] == "bound of model.layers.*.feed_forward.experts, relative: 0.5 (why)"
    elsewhere = Bounds(("bf16",), [override(format="fp16")])
    assert elsewhere.module(EXPERTS, "feed_forward.experts", "forced")[0] != 0.5
    assert elsewhere.unused() == []  # it is of another format, and that is no mistake
    never = Bounds(("fp16",), [override(module="model.layers.99.self_attn")])
    assert never.unused() == ["model.layers.99.self_attn"]


def test_the_whole_engine_s_bounds_can_be_changed() -> None:
    bounds = Bounds(("fp32",), [override(module="logits", metric="mean_kl", bound=1e-3)])
    assert bounds.whole.mean_kl == 1e-3
    assert bounds.whole.top1 == TOLERANCES["fp32"].top1


GOOD = '[[tolerance]]\nmodule = "a.b"\nmetric = "relative"\nbound = 2e-2\nreason = "r"\n'


def test_a_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "t.toml").write_text(GOOD + 'format = "fp16"\n')
    (found,) = read_overrides(tmp_path / "t.toml")
    assert (found.module, found.metric, found.bound, found.reason, found.format) == (
        "a.b",
        "relative",
        0.02,
        "r",
        "fp16",
    )


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("[[tolerance]\n", "cannot be read as TOML"),
        (GOOD.replace("bound = 2e-2\n", ""), "tolerance.0.bound: Field required"),
        (GOOD + "bond = 3\n", "tolerance.0.bond: Extra inputs"),
        (GOOD.replace("2e-2", "-1.0"), "tolerance.0.bound"),
        (GOOD.replace("2e-2", "inf"), "tolerance.0.bound"),
        (GOOD.replace("2e-2", '"2e-2"'), "tolerance.0.bound"),
        (GOOD.replace('"relative"', '"cosine"'), "tolerance.0.metric"),
        (GOOD.replace('"r"', '""'), "tolerance.0.reason"),
        (GOOD.replace('"relative"', '"mean_kl"'), "metric 'mean_kl' does not go with module 'a.b'"),
        (GOOD.replace('"a.b"', '"logits"'), "metric 'relative' does not go with module 'logits'"),
        ("[tolerances]\n", "tolerances: Extra inputs"),
    ],
)
def test_files_that_are_not_understood(text: str, part: str, tmp_path: Path) -> None:
    (tmp_path / "t.toml").write_text(text)
    with pytest.raises(EngineError) as caught:
        read_overrides(tmp_path / "t.toml")
    assert str(tmp_path / "t.toml") in caught.value.message
    assert part in caught.value.message


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="no such file"):
        read_overrides(tmp_path / "t.toml")


def test_every_metric_is_known() -> None:
    assert set(Override.model_fields["metric"].annotation.__args__) == set(METRICS)  # type: ignore[union-attr]


def test_how_far_over() -> None:
    assert over(3.0, 2.0) == 1.5
    assert over(3.0, None) == 0.0
    assert over(float("nan"), 2.0) == float("inf")
    assert over(0.0, 0.0) == 0.0
    assert over(1e-9, 0.0) == float("inf")


def test_fp8_activations_have_bounds_of_their_own() -> None:
    assert set(CODES) == set(ORDER)
    own, plain = Bounds(("fp32",), fp8=True), Bounds(("fp32",))
    name = "model.layers.0.self_attn"
    assert own.module(name, "self_attn", "forced") == plain.module(name, "self_attn", "forced")
    assert own.module(name, "self_attn", "free") == (None, None) != plain.module(name, "self_attn", "free")
    assert own.slack(name) == (CODES["fp32"].slack,) * 2 and plain.slack(name) == (0.0, 0.0)
    override = Override(module="model.layers.*", metric="relative", bound=0.5, reason="ours")
    assert Bounds(("fp32",), [override], fp8=True).slack(name) == (0.0, CODES["fp32"].slack)
    assert own.whole.tie is None and all(codes.reason and codes.whole.reason for codes in CODES.values())


def test_what_is_not_to_be_alike_is_judged_by_overrides_alone() -> None:
    override = Override(module="model.layers.1.*", metric="relative", bound=0.5, reason="ours")
    bounds = Bounds(("fp32",), [override], alike=False)
    assert bounds.module("model.layers.0.self_attn", "self_attn", "forced") == (None, None)
    assert bounds.module("model.layers.1.self_attn", "self_attn", "forced") == (0.5, None)
    assert bounds.margin("model.layers.0.feed_forward.router") == math.inf
    assert bounds.whole.mean_kl is None and bounds.itself == TOLERANCES["fp32"]
