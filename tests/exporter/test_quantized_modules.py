"""Which modules a declaration is about."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from shuntyard.exporter.quantization import Scheme
from tests.exporter.declarations import (
    INT4,
    STATIC,
    UP,
    WEIGHTS,
    Q,
    beside,
    compressed_tensors,
    declared,
    group,
    modelopt,
)

CHANNEL, TENSOR, GROUP = Scheme("channel"), Scheme("tensor"), Scheme("group", 128)
MODULES: dict[str, tuple[list[tuple[dict[str, Any], list[str]]], list[str], dict[str, Scheme | None]]] = {
    "class": ([(WEIGHTS, ["Linear"])], [], {Q: CHANNEL, UP: CHANNEL, "lm_head": CHANNEL}),
    "the head, a name without a dot": ([(WEIGHTS, ["lm_head"])], [], {"lm_head": CHANNEL, Q: None}),
    "exact": ([(WEIGHTS, [Q])], [], {Q: CHANNEL, f"{Q}.x": None, Q[1:]: None, f"language_model.{Q}": None}),
    "pattern": ([(WEIGHTS, ["re:.*q_proj$"])], [], {Q: CHANNEL, f"language_model.{Q}": CHANNEL, UP: None}),
    "a pattern begins where the name does": ([(WEIGHTS, ["re:self_attn"])], [], {Q: None, "self_attn.q_proj": CHANNEL}),
    "a pattern need not reach the end": ([(WEIGHTS, [r"re:model\.layers\.0"])], [], {Q: CHANNEL, UP: CHANNEL}),
    "exact before pattern, pattern before class": (
        [(WEIGHTS, ["Linear"]), (STATIC, ["re:.*self_attn.*"]), (INT4, [Q])],
        [],
        {Q: GROUP, Q.replace("q_", "k_"): TENSOR, UP: CHANNEL},
    ),
    "in whichever order": (
        [(INT4, [Q]), (STATIC, ["re:.*self_attn.*"]), (WEIGHTS, ["Linear"])],
        [],
        {Q: GROUP, Q.replace("q_", "k_"): TENSOR, UP: CHANNEL},
    ),
    "of two patterns the first by alphabet": (
        [(WEIGHTS, ["re:model.*"]), (STATIC, ["re:.*q_proj"])],
        [],
        {Q: TENSOR, UP: CHANNEL},
    ),
    "ignored by name": ([(WEIGHTS, ["Linear"])], [Q], {Q: None, UP: CHANNEL}),
    "ignored by pattern": ([(WEIGHTS, ["Linear"])], ["re:.*self_attn"], {Q: None, UP: CHANNEL}),
    "ignored comes first": ([(WEIGHTS, [Q])], ["re:.*"], {Q: None, UP: None}),
    "a class of modules that are no Linears": ([(WEIGHTS, ["Linear"])], ["Llama4TextAttention"], {Q: CHANNEL}),
    "ignored by a part of the name": ([(WEIGHTS, ["Linear"])], ["q_proj", "model.layers.0.self_attn"], {Q: CHANNEL}),
}


@pytest.mark.parametrize("case", MODULES)
def test_scheme_of(case: str, tmp_path: Path) -> None:
    groups, ignored, expected = MODULES[case]
    found = declared(tmp_path, compressed_tensors(*(group(w, *t) for w, t in groups), ignore=ignored))
    assert {name: found.scheme_of(name) for name in expected} == expected


def test_scheme_of_both_names(tmp_path: Path) -> None:
    """With the prefix of a file with a vision tower and without, whichever the declaration was written with."""
    names = f"language_model.{Q}", Q
    for name in (*names, rf"re:^language_model\.{Q}$", f"re:^{Q}$"):
        found = declared(tmp_path, compressed_tensors(group(None, name)))
        assert found.scheme_of(*names) == found.scheme_of(*reversed(names)) == CHANNEL
        found = declared(tmp_path, compressed_tensors(ignore=[name]))
        assert found.scheme_of(*names) is None
        assert found.scheme_of(f"language_model.{UP}", UP) == CHANNEL


MODELOPTS: dict[str, tuple[list[str], dict[str, Scheme | None]]] = {
    "nothing": ([], {Q: TENSOR, "lm_head": TENSOR}),
    "exact": (["lm_head", Q], {Q: None, "lm_head": None, UP: TENSOR, f"language_model.{Q}": TENSOR}),
    "wildcards": (
        ["*q_proj", "vision_model*"],
        {Q: None, UP: TENSOR, "vision_model.a.b": None, "my_vision_model": TENSOR},
    ),
    "one of several": (["model.layers.[12].*"], {"model.layers.1.x": None, Q: TENSOR}),
    "what a module lies in": (["model.layers.0.self_attn", "*.router"], {Q: None, UP: TENSOR, "a.router": None}),
    "no part of a name": (["model.layers.0.self_attn.q", "odel.layers.0*"], {Q: TENSOR}),
    "no regular expression": (["re:.*", ".*"], {Q: TENSOR}),
    "case counts": (["*Q_PROJ"], {Q: TENSOR}),
}


@pytest.mark.parametrize("embedded", [True, False], ids=["embedded", "beside"])
@pytest.mark.parametrize("case", MODELOPTS)
def test_scheme_of_modelopt(case: str, embedded: bool, tmp_path: Path) -> None:
    ignored, expected = MODELOPTS[case]
    section, file = (modelopt(ignore=ignored), None) if embedded else (None, beside(exclude_modules=ignored))
    found = declared(tmp_path, section, file)
    assert {name: found.scheme_of(name) for name in expected} == expected


LINEARS = [f"{prefix}{name}" for prefix in ("", "language_model.") for name in (Q, UP, "lm_head", "model.router")]


@pytest.mark.parametrize("case", MODULES)
def test_compressed_tensors_matches_alike(case: str, tmp_path: Path) -> None:
    """The library's own matching, on Linears of these names."""
    pytest.importorskip("compressed_tensors")
    import torch
    from compressed_tensors.utils.match import is_match, match_targets

    groups, ignored, expected = MODULES[case]
    found = declared(tmp_path, compressed_tensors(*(group(w, *t) for w, t in groups), ignore=ignored))
    schemes = {target: one.scheme for one in found.groups for target in one.targets}
    linear = torch.nn.Linear(1, 1)
    for name in {*LINEARS, *expected}:
        theirs = [] if is_match(name, linear, ignored) else match_targets(name, linear, schemes)
        assert found.scheme_of(name) == (schemes[theirs[0]] if theirs else None)
