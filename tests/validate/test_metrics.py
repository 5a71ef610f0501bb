"""Numbers between logits, held to what they are defined as."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shuntyard.validate import metrics
from shuntyard.validate.report import Report
from shuntyard.validate.tolerances import TOLERANCES

seeds = st.integers(0, 2**16)


def logits_of(seed: int, scale: float = 3.0) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    return (np.random.default_rng(seed).normal(size=(5, 11)) * scale).astype(np.float32)


@given(seeds, st.sampled_from([0.1, 3.0, 1000.0]))
def test_against_torch(seed: int, scale: float) -> None:
    a, b = logits_of(seed, scale), logits_of(seed + 1, scale)
    p, q = (torch.from_numpy(x).double().log_softmax(-1) for x in (a, b))
    kl = torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1)
    np.testing.assert_allclose(metrics.kl(a, b), kl.numpy(), rtol=1e-9, atol=1e-12)
    targets = np.arange(5)
    nll = torch.nn.functional.cross_entropy(torch.from_numpy(a).double(), torch.from_numpy(targets), reduction="none")
    np.testing.assert_allclose(metrics.negative_log_likelihood(a, targets), nll.numpy(), rtol=1e-9, atol=1e-12)


@given(seeds, st.floats(-50, 50))
def test_a_shift_of_all_logits_changes_no_probability(seed: int, shift: float) -> None:
    a = logits_of(seed).astype(np.float64)
    assert np.abs(metrics.kl(a, a + shift)).max() < 1e-12
    assert metrics.top1_agreement(a, a + shift) == 1.0


def test_worst_names_the_place() -> None:
    a = np.zeros((2, 3, 4), np.float32)
    b = a.copy()
    b[1, 2, 0] = -0.5
    assert metrics.worst(a, b) == (0.5, [1, 2, 0])


def test_agreement() -> None:
    a = np.eye(4, dtype=np.float32)
    assert metrics.top1_agreement(a, a[[0, 1, 3, 2]]) == 0.5


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_no_number_fails(value: float) -> None:
    report = Report("engine", "reference", "onnxruntime", "fp32", 1)
    report.at_most("x", value, 1.0)
    assert not report.passed
    report = Report("engine", "reference", "onnxruntime", "fp32", 1)
    report.at_least("x", math.nan, 1.0)
    assert not report.passed


def test_what_is_not_judged_does_not_fail() -> None:
    report = Report("engine", "reference", "onnxruntime", "fp16", 1)
    report.at_most("x", 99.0, None)
    passed = [report.passed]
    report.at_most("y", 1.0, 2.0)
    assert [*passed, report.passed] == [False, True]  # at first nothing has been judged
    first = {"name": "x", "value": 99.0, "bound": "-", "ok": None, "detail": "", "module": ""}
    assert report.as_dict()["checks"][0] == first


def test_every_format_has_its_tolerance_and_reason() -> None:
    assert set(TOLERANCES) == {"fp32", "fp16", "bf16"}
    assert all(tolerance.reason for tolerance in TOLERANCES.values())
    bounds = [TOLERANCES[name].mean_kl or 0.0 for name in ("fp32", "fp16", "bf16")]
    assert 0 < bounds[0] < bounds[1] < bounds[2]
