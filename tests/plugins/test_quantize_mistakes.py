"""Mistakes in quantised activations that the bounds must show, whichever face makes them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from shuntyard.plugins import contract, functions, torch_ops
from tests.plugins.bounds import bounds_of, check_between
from tests.plugins.forms import FORMATS, FP8, Array
from tests.plugins.test_experts import activations_of, by_oracle
from tests.plugins.test_faces import oracle
from tests.plugins.test_quantize import WIDE, check_faces, made_for

Product = Callable[..., Array]


def _patched(monkeypatch: pytest.MonkeyPatch, change: Callable[..., Array]) -> None:
    right = oracle._Part.product

    def wrong(part: Any, form: Any, rows: Array) -> Array:
        return change(right, part, form, rows)

    monkeypatch.setattr(oracle._Part, "product", wrong)


def _is_down(part: Any) -> bool:
    return bool(part.weight.shape == (WIDE["F"], WIDE["H"]))


def _weight_scale_twice(right: Product, part: Any, form: Any, rows: Array) -> Array:
    return right(dataclasses.replace(part, weight_scale=part.weight_scale**2), form, rows)


def _factor_twice(right: Product, part: Any, form: Any, rows: Array) -> Array:
    _, factor = oracle.quantize(rows, part.activation_scale)
    result: Array = (right(part, form, rows).astype(np.float32) * factor).astype(rows.dtype)
    return result


def _hidden_as_it_is(right: Product, part: Any, form: Any, rows: Array) -> Array:
    if not _is_down(part):
        return right(part, form, rows)
    result: Array = (rows.astype(np.float32) @ part.weight * part.weight_scale).astype(rows.dtype)
    return result


def _not_saturated(right: Product, part: Any, form: Any, rows: Array) -> Array:
    """What is beyond 448 goes on as if e4m3 had larger numbers."""
    _, factor = oracle.quantize(rows, part.activation_scale)
    quotient = rows.astype(np.float32) / factor
    unlimited = np.where(
        abs(quotient) > 448, np.round(quotient / 32) * 32, oracle.quantize(rows, part.activation_scale)[0]
    )
    result: Array = (unlimited @ part.weight * factor * part.weight_scale).astype(rows.dtype)
    return result


def _nan_beyond(right: Product, part: Any, form: Any, rows: Array) -> Array:
    _, factor = oracle.quantize(rows, part.activation_scale)
    with np.errstate(over="ignore"):
        codes = (rows.astype(np.float32) / factor).astype(FP8).astype(np.float32)
    result: Array = (codes @ part.weight * factor * part.weight_scale).astype(rows.dtype)
    return result


def _weights_rounded(right: Product, part: Any, form: Any, rows: Array) -> Array:
    codes, factor = oracle.quantize(rows, part.activation_scale)
    weight = (part.weight * part.weight_scale).astype(rows.dtype).astype(np.float32)
    result: Array = (codes @ weight * factor).astype(rows.dtype)
    return result


def _one_factor_for_all_rows(right: Product, part: Any, form: Any, rows: Array) -> Array:
    codes, factor = oracle.quantize(rows.reshape(1, -1), part.activation_scale)
    result: Array = (codes.reshape(rows.shape) @ part.weight * factor * part.weight_scale).astype(rows.dtype)
    return result


def _toward_zero(right: Product, part: Any, form: Any, rows: Array) -> Array:
    codes, factor = oracle.quantize(rows, part.activation_scale)
    quotient = np.clip(rows.astype(np.float32) / factor, -448, 448)
    below = np.nextafter(codes.astype(FP8), np.zeros((), FP8)).astype(np.float32)
    result: Array = (
        np.where(abs(codes) > abs(quotient), below, codes) @ part.weight * factor * part.weight_scale
    ).astype(rows.dtype)
    return result


EVERYWHERE = [_weight_scale_twice, _factor_twice, _hidden_as_it_is, _toward_zero]
MISTAKES = [
    *((mistake, activations) for mistake in EVERYWHERE for activations in contract.QUANTIZE_FORMS),
    *((mistake, "static") for mistake in (_not_saturated, _nan_beyond)),
    (_one_factor_for_all_rows, "dynamic"),
]


@pytest.mark.parametrize(("mistake", "activations"), MISTAKES, ids=lambda v: getattr(v, "__name__", v))
@pytest.mark.parametrize("compute", FORMATS)
def test_mistakes_are_out_of_bounds(
    monkeypatch: pytest.MonkeyPatch, compute: str, mistake: Callable[..., Array], activations: str
) -> None:
    """All faces are held to the same bounds, so each mistake is seen in each face."""
    feeds, top_k = activations_of(WIDE, compute)
    for layout in contract.LAYOUTS:
        made = made_for(WIDE, (layout, "tensor", activations), "fp32")
        bounds, dtype = bounds_of(feeds, made, top_k), np.dtype(FORMATS[compute])
        check_between(by_oracle(feeds, made, top_k), bounds, dtype)
        with monkeypatch.context() as patch:
            _patched(patch, mistake)
            with pytest.raises(AssertionError, match="out of bounds"):
                check_between(by_oracle(feeds, made, top_k), bounds, dtype)


def _torch_factor_twice(rows: Any, scale: Any) -> tuple[Any, Any]:
    codes, factor = RIGHT_IN_TORCH(rows, scale)
    return codes, factor * factor


def _torch_hidden_as_it_is(rows: Any, scale: Any) -> tuple[Any, Any]:
    is_hidden = rows.shape[1] == WIDE["F"]
    return (rows.float(), torch.ones(1)) if is_hidden else RIGHT_IN_TORCH(rows, scale)


def _torch_not_saturated(rows: Any, scale: Any) -> tuple[Any, Any]:
    codes, factor = RIGHT_IN_TORCH(rows, scale)
    quotient = rows.float() / factor
    return torch.where(quotient.abs() > 448, (quotient / 32).round() * 32, codes), factor


def _onnx_factor_twice(tape: Any, form: Any, rows: Any, parts: Any) -> list[Any]:
    def twice(tape: Any, x: Any, scale: Any) -> tuple[Any, Any]:
        codes, factor = RIGHT_IN_ONNX(tape, x, scale)
        return codes, tape.op("Mul", [factor, factor])

    return _with_quantized(twice, tape, form, rows, parts)


def _onnx_hidden_as_it_is(tape: Any, form: Any, rows: Any, parts: Any) -> list[Any]:
    def plain(tape: Any, x: Any, scale: Any) -> tuple[Any, Any]:
        return tape.as_float(x), tape.const([1.0], np.float32)

    is_hidden = len(parts) == 1 and rows.producer().op_type == "CastLike"
    return _with_quantized(plain if is_hidden else RIGHT_IN_ONNX, tape, form, rows, parts)


def _onnx_not_saturated(tape: Any, form: Any, rows: Any, parts: Any) -> list[Any]:
    def unlimited(tape: Any, x: Any, scale: Any) -> tuple[Any, Any]:
        codes: Any
        codes, factor = RIGHT_IN_ONNX(tape, x, scale)
        rounding = codes.producer().inputs[0].producer()
        rounding.attributes.add(ir.AttrInt64("saturate", 0))
        return codes, factor

    return _with_quantized(unlimited, tape, form, rows, parts)


def _with_quantized(quantized: Any, tape: Any, form: Any, rows: Any, parts: Any) -> list[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(functions, "_quantized", quantized)
        return PRODUCTS_IN_ONNX(tape, form, rows, parts)


RIGHT_IN_TORCH, RIGHT_IN_ONNX, PRODUCTS_IN_ONNX = torch_ops._quantized, functions._quantized, functions._products
IN_FACES = [
    *((torch_ops, "_quantized", change) for change in (_torch_factor_twice, _torch_hidden_as_it_is)),
    (torch_ops, "_quantized", _torch_not_saturated),
    *((functions, "_products", change) for change in (_onnx_factor_twice, _onnx_hidden_as_it_is, _onnx_not_saturated)),
]


@pytest.mark.parametrize(("module", "name", "mistake"), IN_FACES, ids=lambda v: getattr(v, "__name__", str(v)))
def test_mistakes_in_a_face_fail_its_test(
    monkeypatch: pytest.MonkeyPatch, module: Any, name: str, mistake: Callable[..., Any]
) -> None:
    feeds, top_k = activations_of(WIDE, "fp32")
    for layout in contract.LAYOUTS:
        made = made_for(WIDE, (layout, "channel", "static"), "fp32")
        check_faces(feeds, made, top_k, "fp32")
        with monkeypatch.context() as patch:
            patch.setattr(module, name, mistake)
            with pytest.raises(AssertionError, match="out of bounds"):
                check_faces(feeds, made, top_k, "fp32")


def test_weights_rounded_before_the_product_are_out_of_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """In fp32 the two differ by roundings of sums alone, so this shows in the narrow formats."""
    for compute in ("fp16", "bf16"):
        feeds, top_k = activations_of(WIDE, compute)
        made = made_for(WIDE, ("linear", "channel", "static"), "fp32")
        with monkeypatch.context() as patch:
            _patched(patch, _weights_rounded)
            with pytest.raises(AssertionError, match="out of bounds"):
                check_between(by_oracle(feeds, made, top_k), bounds_of(feeds, made, top_k), np.dtype(FORMATS[compute]))


def test_gate_and_up_have_their_own_scales() -> None:
    """In layout linear, where they may differ; the faces are told apart from one that takes gate's for both."""
    feeds, top_k = activations_of(WIDE, "fp32")
    made = made_for(WIDE, ("linear", "tensor", "static"), "fp32")
    experts = made.form.experts
    given_scales = list(made.activation_scales)
    same = made._replace(
        activation_scales=[*given_scales[:experts], *given_scales[:experts], *given_scales[2 * experts :]]
    )
    assert any(a != b for a, b in zip(given_scales, same.activation_scales, strict=True))
    with pytest.raises(AssertionError, match="out of bounds"):
        check_between(by_oracle(feeds, same, top_k), bounds_of(feeds, made, top_k), np.dtype(np.float32))
