"""The experts op, in every layout and format of weights: oracle, torch op and ONNX function agree."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from shuntyard.plugins import contract, functions
from shuntyard.plugins.contract import ExpertsForm
from tests.plugins.forms import (
    FORMATS,
    FP8,
    KINDS,
    Array,
    Weights,
    constants_of,
    fitting,
    form_of,
    fp8,
    group_sizes,
    kinds,
    make_weights,
    pack,
    to_numpy,
    to_onnx,
    to_torch,
)
from tests.plugins.test_faces import (
    IR,
    ONE_EXPERT,
    ONNX_FORMATS,
    graph_of_one,
    in_onnxruntime,
    logits_of,
    oracle,
    sizes,
)
from tests.tolerances import ONE_OP

formats = st.sampled_from(list(FORMATS))
EVERY_FORM = [form_of(kind, 3) for kind in KINDS]


def activations_of(case: dict[str, Any], compute: str) -> tuple[dict[str, Array], int]:
    """The four inputs before the weights, and K."""
    logits, top_k = logits_of(case)
    scores, offsets, permutation = oracle.moe_routing(logits, top_k)
    x = np.random.default_rng(case["seed"]).normal(size=(case["T"], case["H"])).astype(FORMATS[compute])
    return {"x": x, "scores": scores, "expert_offsets": offsets, "permutation": permutation}, top_k


def by_oracle(feeds: dict[str, Array], made: Weights, top_k: int) -> Array:
    rows: Array = oracle.moe_experts(*feeds.values(), *made.lists, top_k, **made.attributes)
    return rows


def by_torch(feeds: dict[str, Array], made: Weights, top_k: int) -> Array:
    lists = ([to_torch(a) for a in arrays] for arrays in made.lists)
    inputs = [to_torch(a) for a in feeds.values()]
    return to_numpy(torch.ops.shuntyard.moe_experts(*inputs, *lists, top_k, **made.attributes))


def by_onnxruntime(feeds: dict[str, Array], made: Weights, top_k: int, compute: str) -> Array:
    attributes = {"top_k": top_k, **made.attributes}
    body, constants = functions.moe_experts(*made.form), constants_of(made)
    (rows,) = in_onnxruntime(contract.EXPERTS, body, feeds, attributes, [IR[compute]], constants)
    return rows


@settings(max_examples=120)
@given(sizes, kinds, group_sizes, formats, formats, st.booleans())
@example(ONE_EXPERT, ("fused", "none"), 8, "fp16", "bf16", False)
@example(ONE_EXPERT, ("linear", "group"), 12, "fp16", "fp16", False)
@example({**ONE_EXPERT, "E": 1}, ("fused", "channel"), 8, "fp32", "bf16", True)
def test_experts(
    case: dict[str, Any], kind: tuple[str, str], group_size: int, compute: str, stored: str, flat_scales: bool
) -> None:
    form = form_of(kind, case["E"], group_size)
    case = fitting(case, form)
    feeds, top_k = activations_of(case, compute)
    made = make_weights(np.random.default_rng(case["seed"]), form, case["H"], case["F"], stored, flat_scales)
    expected = by_oracle(feeds, made, top_k)
    ONE_OP[compute].check(by_torch(feeds, made, top_k), expected)
    if compute in ONNX_FORMATS:
        ONE_OP[compute].check(by_onnxruntime(feeds, made, top_k, compute), expected)


# -- one truth in several forms


def dense_matrices(made: Weights) -> list[tuple[Array, Array, Array]]:
    """Gate, up and down of each expert as ``[out, in]`` in fp64, element by element from the contract's words."""
    form, matrices = made.form, []
    for e in range(form.experts):
        parts = []
        for part in range(len(form.parts)):
            i = part if form.layout == "fused" else part * form.experts + e
            weight = made.weights[i][e] if form.layout == "fused" else made.weights[i]
            rows = weight if form.layout == "linear" else weight.T
            if form.quantization == "group":
                nibbles = [[int(word) >> 4 * n & 15 for word in row.view(np.uint32) for n in range(8)] for row in rows]
                rows = np.asarray(nibbles) - 8
            value = np.asarray(rows.astype(np.float64))
            for out, column in itertools.product(*map(range, value.shape)) if made.scales else ():
                scale = made.scales[i].reshape(-1)
                if form.quantization == "group":
                    place = out * (value.shape[1] // form.group_size) + column // form.group_size
                elif form.quantization == "channel":
                    place = out + (e * len(value) if form.layout == "fused" else 0)
                else:
                    place = 0
                value[out, column] *= float(scale[place])
            parts.append(value)
        gate, up, down = parts if len(parts) == 3 else (*np.split(parts[0], 2), parts[1])
        matrices.append((gate, up, down))
    return matrices


@pytest.mark.parametrize("form", EVERY_FORM, ids=str)
@pytest.mark.parametrize("stored", FORMATS)
def test_weights_are_read_as_the_contract_says(form: ExpertsForm, stored: str) -> None:
    """Against plain fp64 mathematics that shares no code with any face."""
    case = {**ONE_EXPERT, "T": 12, "E": 3, "K": 2, "H": 16, "F": 8, "skew": "even"}
    feeds, top_k = activations_of(case, "fp32")
    made = make_weights(np.random.default_rng(7), form, case["H"], case["F"], stored)
    matrices = dense_matrices(made)
    expected = np.zeros((12 * top_k, 16))
    for i, slot in enumerate(feeds["permutation"]):
        e = int(np.searchsorted(feeds["expert_offsets"], i, side="right")) - 1
        gate, up, down = matrices[e]
        x = feeds["x"][slot // top_k].astype(np.float64) * float(feeds["scores"][i])
        expected[i] = down @ ((gate @ x) / (1 + np.exp(-(gate @ x))) * (up @ x))
    for rows in (
        by_oracle(feeds, made, top_k),
        by_torch(feeds, made, top_k),
        by_onnxruntime(feeds, made, top_k, "fp32"),
    ):
        ONE_OP["fp32"].check(rows, expected.astype(np.float32))


# -- a quantised weight of one Linear


def dequantized(weight: Array, scale: Array, group_size: int, form: str) -> list[Array]:
    """By oracle, torch and ONNX Runtime."""
    constants = [to_onnx("weight", weight, form == "group"), to_onnx("scale", scale, as_int4=False)]
    attributes, types = {"group_size": group_size}, [ir.DataType.FLOAT]
    op, body = contract.DEQUANTIZE, functions.dequantize(form)
    return [
        oracle.dequantize(weight, scale, group_size),
        to_numpy(torch.ops.shuntyard.dequantize(to_torch(weight), to_torch(scale), group_size)),
        *in_onnxruntime(op, body, {}, attributes, types, constants),
    ]


def check_bits(faces: list[Array], expected: Array) -> None:
    for value in faces:
        assert value.dtype == np.float32 and value.shape == expected.shape
        np.testing.assert_array_equal(np.isnan(value), np.isnan(expected))
        number = ~np.isnan(expected)
        np.testing.assert_array_equal(value[number].view(np.uint32), expected[number].view(np.uint32))


@settings(max_examples=60)
@given(
    form=st.sampled_from(functions.DEQUANTIZE_FORMS),
    group_size=group_sizes,
    out=st.integers(1, 9),
    columns=st.integers(1, 5),
    stored=formats,
    flat=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_dequantize(form: str, group_size: int, out: int, columns: int, stored: str, flat: bool, seed: int) -> None:
    """Bit for bit the product in fp64, rounded to fp32 once: nothing else on the way rounds."""
    rng = np.random.default_rng(seed)
    shape: tuple[int, ...]
    if form == "group":
        columns *= int(np.lcm(8, group_size))
        values = rng.integers(-8, 8, size=(out, columns))
        weight, shape = pack(values), (out, columns // group_size)
    else:
        group_size = 0
        values = weight = fp8(rng, (out, columns))
        shape = {"tensor": () if flat else (1,), "channel": (out,) if flat else (out, 1)}[form]
    scale = (rng.uniform(0.5, 2, size=shape) * 2.0 ** rng.integers(-12, 4, size=shape)).astype(FORMATS[stored])
    wide = scale.astype(np.float64).reshape(out if form != "tensor" else 1, -1)
    factors = np.repeat(wide, group_size, axis=1) if group_size else wide
    expected = (values.astype(np.float64) * factors).astype(np.float32)
    check_bits(dequantized(weight, scale, group_size, form), expected)


@pytest.mark.parametrize("scale", [1.0, 3e-3, 7e-39])
def test_every_fp8_code(scale: float) -> None:
    """E4M3FN by its definition (arXiv 2209.05433, table 1): no infinity, all ones is NaN, subnormals below 2**-6."""
    numbers = []
    for code in range(256):
        sign, exponent, mantissa = -1.0 if code & 0x80 else 1.0, code >> 3 & 15, code & 7
        size = mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
        numbers.append(sign * (np.nan if code & 0x7F == 0x7F else size))
    weight = np.arange(256, dtype=np.uint8).view(FP8).reshape(16, 16)
    wide = np.asarray(numbers, np.float64).reshape(16, 16)
    check_bits(
        dequantized(weight, np.asarray([scale], np.float32), 0, "tensor"),
        (wide * float(np.float32(scale))).astype(np.float32),
    )


# -- what ONNX Runtime makes of the function


@pytest.mark.parametrize("form", EVERY_FORM, ids=str)
@pytest.mark.parametrize("compute", ONNX_FORMATS)
def test_onnxruntime_folds_the_weights_when_it_loads(form: ExpertsForm, compute: str, tmp_path: Path) -> None:
    """Each product then multiplies with a constant of its own type: nothing of a format or a layout is left to run."""
    feeds, top_k = activations_of({**ONE_EXPERT, "E": 3, "H": 16, "F": 8}, compute)
    made = make_weights(np.random.default_rng(0), form, 16, 8, "bf16")
    attributes, body = {"top_k": top_k, **made.attributes}, functions.moe_experts(*form)
    model = graph_of_one(contract.EXPERTS, body, feeds, attributes, [IR[compute]], constants_of(made))
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.optimized_model_filepath = 3, str(tmp_path / "optimised.onnx")
    onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    graph = onnx.load(tmp_path / "optimised.onnx").graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    products = [node for node in graph.node if node.op_type in {"MatMul", "FusedMatMul"}]
    assert len(products) == 3 * len(form.parts)
    # ONNX Runtime's own products of fp16 are in fp32, between casts, where the processor has none.
    computed = {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16 if compute == "fp16" else onnx.TensorProto.FLOAT}
    assert {constants[node.input[1]].data_type for node in products} <= computed
    assert not {"Transpose", "DequantizeLinear", "CastLike", "Sub", "Reshape"} & {node.op_type for node in graph.node}


# -- what a face refuses


def refusals(made: Weights, scales: list[Array], message: str, **attributes: Any) -> None:
    feeds, top_k = activations_of({**ONE_EXPERT, "E": 3, "H": 16, "F": 5, "skew": "even"}, "fp32")
    with pytest.raises(ValueError, match=message):
        oracle.moe_experts(*feeds.values(), made.weights, scales, made.activation_scales, top_k, **attributes)
    tensors = ([to_torch(a) for a in arrays] for arrays in (made.weights, scales, made.activation_scales))
    with pytest.raises(ValueError, match=message):
        torch.ops.shuntyard.moe_experts(*map(to_torch, feeds.values()), *tensors, top_k, **attributes)


CHANNELS = form_of(("linear", "channel"), 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layout": "stacked"}, "layout is 'stacked', must be one of fused, split, linear"),
        ({"experts": 4}, "layout 'linear' of 4 experts takes 12 weights and 12 scales, not 9 and 9"),
        ({"experts": 0}, "experts is 0, must be at least 1"),
        ({"layout": "split", "group_size": 8}, "INT4 weights come in layout 'linear' only"),
        ({"group_size": -1}, "group_size is -1 with quantization 'group'"),
        ({"group_size": 3}, "16 or 40 is no multiple of 8 and of the group size 3"),
    ],
)
def test_wrong_attributes_are_refused(change: dict[str, Any], message: str) -> None:
    made = make_weights(np.random.default_rng(0), CHANNELS, 16, 5)
    attributes = {**made.attributes, **change}
    if attributes["group_size"]:
        made.weights[:] = [weight.view(np.int8).astype(np.int32) for weight in made.weights]
    refusals(made, made.scales, message, **attributes)


def test_wrong_shapes_are_refused() -> None:
    made = make_weights(np.random.default_rng(0), CHANNELS, 16, 5)
    few = [*made.scales[:4], np.ones(4, np.float32), *made.scales[5:]]
    refusals(made, few, "scale scale.up.1 has 4 elements, must have 5", **made.attributes)
    refusals(made, made.scales[1:], "takes 9 weights and 9 scales, not 9 and 8", **made.attributes)
    made.weights[4] = np.zeros((16, 3), FP8)
    refusals(made, made.scales, r"weight up.1 is \[16, 3\], must be \[5, 16\]", **made.attributes)


def test_wrong_types_are_refused() -> None:
    feeds, top_k = activations_of({**ONE_EXPERT, "E": 3, "H": 16, "F": 5, "skew": "even"}, "fp32")
    inputs = [to_torch(a) for a in feeds.values()]
    cases: list[tuple[str, Callable[[list[Any], list[Any]], tuple[Any, Any]], str]] = [
        ("channel", lambda w, s: (w, []), "weights are of torch.float8_e4m3fn, must all be of one of torch.bfloat16"),
        ("channel", lambda w, s: (w, [s[0].half(), *s[1:]]), "scales are of torch.float16, torch.float32, must all"),
        (
            "channel",
            lambda w, s: ([t.half() for t in w], s),
            "weights are of torch.float16, must all be of one of torch.f",
        ),
        ("none", lambda w, s: ([w[0].half(), *w[1:]], s), "weights are of torch.float16, torch.float32, must all"),
    ]
    for quantization, spoil, message in cases:
        made = make_weights(np.random.default_rng(0), form_of(("linear", quantization), 3), 16, 5)
        weights, scales = spoil([to_torch(a) for a in made.weights], [to_torch(a) for a in made.scales])
        with pytest.raises(ValueError, match=message):
            torch.ops.shuntyard.moe_experts(*inputs, weights, scales, [], top_k, **made.attributes)


@pytest.mark.parametrize(
    ("weight", "scale", "group_size"),
    [((4, 16), (3,), 0), ((4, 16), (4, 2), 0), ((4, 2), (4, 2), 16), ((4, 2), (4, 1), 12), ((4, 2), (4,), 0)],
)
def test_dequantize_refuses(weight: tuple[int, ...], scale: tuple[int, ...], group_size: int) -> None:
    array = np.zeros(weight, np.int32 if weight[1] == 2 else FP8)
    with pytest.raises(ValueError, match="elements for|weights are of"):
        oracle.dequantize(array, np.ones(scale, np.float32), group_size)
    with pytest.raises(ValueError, match="cannot have a scale|no multiple of the group size|weights are of"):
        torch.ops.shuntyard.dequantize(to_torch(array), torch.ones(scale), group_size)
