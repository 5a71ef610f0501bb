"""Quantised activations: the rounding bit for bit in every face, and what the experts make of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from shuntyard.plugins import contract, functions
from tests.plugins.bounds import bounds_of, check_between, relative_width
from tests.plugins.forms import (
    FORMATS,
    QUANTISING,
    Array,
    Weights,
    form_of,
    make_weights,
    quantising,
    to_numpy,
    to_onnx,
    to_torch,
)
from tests.plugins.test_experts import activations_of, by_onnxruntime, by_oracle, by_torch, check_bits, formats
from tests.plugins.test_faces import ONE_EXPERT, ONNX_FORMATS, in_onnxruntime, oracle, sizes

# -- the op


def every_face(x: Array, scale: Array | None) -> list[tuple[Array, Array]]:
    """Codes and factor by oracle, torch and ONNX Runtime."""
    given_scale = None if scale is None else to_torch(scale)
    in_torch = torch.ops.shuntyard.quantize(to_torch(x), given_scale)
    body = functions.quantize("dynamic" if scale is None else "static")
    # numpy hands no bf16 to ONNX Runtime, but a constant may be of it.
    feeds = {} if x.dtype == FORMATS["bf16"] else {"x": x}
    constants = [] if feeds else [to_onnx("x", x, as_int4=False)]
    constants += [] if scale is None else [to_onnx("scale", scale, as_int4=False)]
    codes, factor = in_onnxruntime(contract.QUANTIZE, body, feeds, {}, [ir.DataType.FLOAT] * 2, constants)
    return [oracle.quantize(x, scale), (to_numpy(in_torch[0]), to_numpy(in_torch[1])), (codes, factor)]


E4M3 = np.asarray(
    [*(m * 2.0**-9 for m in range(8)), *((8 + m) * 2.0 ** (e - 10) for e in range(1, 16) for m in range(8))][:-1]
)
"""Every e4m3 number that is not negative, by code (arXiv 2209.05433): the code after the last, 448, is NaN."""


def to_nearest(quotient: Array) -> Array:
    """By the definition: the nearest of all numbers, at a tie that of the even code, and none beyond 448."""
    magnitude = np.minimum(abs(quotient.astype(np.float64)), 448)
    distance = abs(magnitude[..., None] - E4M3)
    best = distance.min(-1, keepdims=True)
    even = np.arange(len(E4M3)) % 2
    code = np.argmin(np.where(distance == best, even, 2), axis=-1)
    return np.where(np.isnan(quotient), np.nan, np.copysign(E4M3[code], quotient)).astype(np.float32)


def by_definition(x: Array, scale: Array | None) -> tuple[Array, Array]:
    wide = x.astype(np.float32)
    if scale is None:
        rows = [
            max([2.0**-100, *(abs(float(v)) for v in row if not np.isnan(v))]) for row in wide.reshape(-1, x.shape[-1])
        ]
        factor = (np.asarray(rows, np.float32) / np.float32(448)).reshape(*x.shape[:-1], 1)
    else:
        factor = scale.astype(np.float32).reshape(1)
    with np.errstate(all="ignore"):
        return to_nearest(wide / factor), factor


def check_quantized(x: Array, scale: Array | None) -> None:
    codes, factor = by_definition(x, scale)
    for got_codes, got_factor in every_face(x, scale):
        check_bits([got_codes], codes)
        check_bits([got_factor], factor)


def any_numbers(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any) -> Array:
    """Of very different sizes, some of every bit pattern, and some just where e4m3 has its ties."""
    values = rng.normal(size=shape) * 2.0 ** rng.integers(-12, 12, size=shape)
    ties = rng.choice((E4M3[1:] + E4M3[:-1]) / 2, size=shape) * rng.choice([-1, 1], size=shape)
    with np.errstate(over="ignore", invalid="ignore"):
        made = np.where(rng.uniform(size=shape) < 0.3, ties, values).astype(dtype)
        bits = rng.integers(0, 1 << 8 * made.dtype.itemsize, size=shape, dtype=np.uint64)
        patterns = bits.astype(f"u{made.dtype.itemsize}").view(made.dtype)
    every: Array = np.where(rng.uniform(size=shape) < 0.1, patterns, made)
    return every


@settings(max_examples=80)
@given(
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    compute=formats,
    stored=st.sampled_from([None, *FORMATS]),
    exponent=st.integers(-12, 6),
    seed=st.integers(0, 2**16),
)
@example(shape=[0, 4], compute="fp16", stored=None, exponent=0, seed=0)
@example(shape=[1, 200], compute="fp32", stored="fp32", exponent=0, seed=0)
def test_quantize(shape: list[int], compute: str, stored: str | None, exponent: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = any_numbers(rng, tuple(shape), FORMATS[compute])
    mantissa = 1 if seed % 2 else rng.uniform(1, 2)
    scale: Array | None = None if stored is None else np.full((1,), mantissa * 2.0**exponent).astype(FORMATS[stored])
    if exponent % 2 and scale is not None:
        scale = scale.reshape(())
    check_quantized(x, scale)


SPECIAL = np.asarray(
    [
        *(0.0, -0.0, np.nan, np.inf, -np.inf, 448, -448, 464, 464.01, -1e30, 480, 2.0**-9, 2.0**-10, 1.001 * 2.0**-10),
        *(-(2.0**-10), 3 * 2.0**-10, 1e-45, -1e-40, 17, 19, 2.0**-6, 240, 248),
    ],
    np.float32,
)


@pytest.mark.parametrize("scale", [None, 1.0, 0.5, 3e-3, 7e-39, 1e30])
def test_quantize_specials(scale: float | None) -> None:
    """Numbers that are none, that have no sign, are too large or nearly nothing: alone, and in rows with others."""
    given_scale = None if scale is None else np.asarray([scale], np.float32)
    check_quantized(SPECIAL[:, None], given_scale)
    check_quantized(SPECIAL[None], given_scale)
    rows = np.tile(np.arange(1, 18, dtype=np.float32), (len(SPECIAL), 1))
    for place in (0, 8, 16):
        own = rows.copy()
        own[:, place] = SPECIAL
        check_quantized(own, given_scale)


def test_a_row_of_the_largest_code_and_of_nothing() -> None:
    x = np.asarray([[1e4, -1e4, 5e3], [0, 0, -0.0]], np.float32)
    codes, factor = oracle.quantize(x, None)
    assert codes.tolist() == [[448, -448, 224], [0, 0, 0]] and np.signbit(codes[1]).tolist() == [False, False, True]
    assert factor[1, 0] == np.float32(2.0**-100) / np.float32(448)


def test_quantize_refuses() -> None:
    two = np.ones(2, np.float32)
    with pytest.raises(ValueError, match="a scale of 2 elements, must have 1"):
        oracle.quantize(np.ones((2, 3), np.float32), two)
    for x, scale in ((torch.ones(2, 3), torch.ones(2)), (torch.ones(2, 3), torch.ones(1, dtype=torch.float64))):
        with pytest.raises(ValueError, match="must be one float"):
            torch.ops.shuntyard.quantize(x, scale)
    with pytest.raises(ValueError, match="x is of torch.int64"):
        torch.ops.shuntyard.quantize(torch.ones(2, 3, dtype=torch.int64), None)


# -- the experts


def made_for(case: dict[str, Any], kind: tuple[str, ...], stored: str, flat: bool = False) -> Weights:
    rng = np.random.default_rng(case["seed"])
    return make_weights(rng, form_of(kind, case["E"]), case["H"], case["F"], stored, flat)


def check_faces(feeds: dict[str, Array], made: Weights, top_k: int, compute: str) -> None:
    bounds, dtype = bounds_of(feeds, made, top_k), np.dtype(FORMATS[compute])
    check_between(by_oracle(feeds, made, top_k), bounds, dtype)
    check_between(by_torch(feeds, made, top_k), bounds, dtype)
    if compute in ONNX_FORMATS:
        check_between(by_onnxruntime(feeds, made, top_k, compute), bounds, dtype)


@settings(max_examples=100)
@given(sizes, quantising, formats, formats, st.booleans())
@example(ONE_EXPERT, ("fused", "tensor", "dynamic"), "fp16", "bf16", False)
@example({**ONE_EXPERT, "E": 1}, ("fused", "channel", "static"), "fp32", "bf16", True)
def test_experts(case: dict[str, Any], kind: tuple[str, ...], compute: str, stored: str, flat: bool) -> None:
    feeds, top_k = activations_of(case, compute)
    check_faces(feeds, made_for(case, kind, stored, flat), top_k, compute)


WIDE: dict[str, Any] = {**ONE_EXPERT, "T": 24, "E": 3, "K": 2, "H": 32, "F": 24, "skew": "even"}


@pytest.mark.parametrize("kind", QUANTISING, ids="_".join)
@pytest.mark.parametrize("compute", FORMATS)
def test_experts_in_every_form(compute: str, kind: tuple[str, ...]) -> None:
    feeds, top_k = activations_of(WIDE, compute)
    made = made_for(WIDE, kind, "bf16")
    check_faces(feeds, made, top_k, compute)
    # The bounds leave room for roundings of sums in fp32, nearly everywhere, and for nothing else.
    assert (relative_width(bounds_of(feeds, made, top_k)) <= 1e-5).mean() > 0.9


# -- what a face refuses


@pytest.mark.parametrize(
    ("kind", "change", "count", "message"),
    [
        (
            ("linear", "channel"),
            {"activations": "each"},
            0,
            "activations is 'each', must be one of none, static, dynamic",
        ),
        (("linear", "none"), {"activations": "dynamic"}, 0, "with quantization 'none': only FP8 weights take"),
        (("linear", "group"), {"activations": "static"}, 9, "with quantization 'group': only FP8 weights take"),
        (
            ("linear", "channel"),
            {"activations": "static"},
            8,
            "'static' with 9 weights take 9 activation scales, not 8",
        ),
        (("fused", "tensor"), {"activations": "static"}, 0, "'static' with 2 weights take 2 activation scales, not 0"),
        (
            ("fused", "tensor"),
            {"activations": "dynamic"},
            2,
            "'dynamic' with 2 weights take 0 activation scales, not 2",
        ),
        (("split", "tensor"), {}, 6, "'none' with 6 weights take 0 activation scales, not 6"),
    ],
)
def test_wrong_activations_are_refused(kind: tuple[str, ...], change: dict[str, str], count: int, message: str) -> None:
    feeds, top_k = activations_of({**WIDE, "H": 16, "F": 8}, "fp32")
    made = make_weights(np.random.default_rng(0), form_of(kind, 3), 16, 8)
    made = made._replace(activation_scales=[np.ones(1, np.float32)] * count)
    _refused(feeds, made, top_k, {**made.attributes, **change}, message)


def _refused(feeds: dict[str, Array], made: Weights, top_k: int, attributes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        oracle.moe_experts(*feeds.values(), *made.lists, top_k, **attributes)
    lists = ([to_torch(array) for array in arrays] for arrays in made.lists)
    with pytest.raises(ValueError, match=message):
        torch.ops.shuntyard.moe_experts(*map(to_torch, feeds.values()), *lists, top_k, **attributes)


def test_wrong_activation_scales_are_refused() -> None:
    feeds, top_k = activations_of(WIDE, "fp32")
    made = made_for(WIDE, ("split", "tensor", "static"), "fp32")
    scales = list(made.activation_scales)
    wide = made._replace(activation_scales=[*scales[:4], np.ones(2, np.float32), *scales[5:]])
    message = "activation_scale.down.1 has 2 elements, must have 1"
    _refused(feeds, wide, top_k, made.attributes, message)
    mixed = [*map(to_torch, scales[:-1]), torch.ones(1).half()]
    lists = ([to_torch(array) for array in arrays] for arrays in (made.weights, made.scales))
    with pytest.raises(ValueError, match="activation scales are of torch.float16, torch.float32, must all be"):
        torch.ops.shuntyard.moe_experts(*map(to_torch, feeds.values()), *lists, mixed, top_k, **made.attributes)


def test_names_of_activation_scales() -> None:
    form = form_of(("linear", "channel", "static"), 2)
    assert form.activation_scale_names[1:3] == ("activation_scale.gate.1", "activation_scale.up.0")
    assert form._replace(activations="dynamic").activation_scale_names == ()
    assert form_of(("fused", "tensor", "static"), 2).activation_scale_names == (
        "activation_scale.gate_up",
        "activation_scale.down",
    )
