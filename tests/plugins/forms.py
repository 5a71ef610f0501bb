"""Weights of the experts in every form that the contract knows, and how each face takes them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import torch
from hypothesis import strategies as st
from numpy.typing import NDArray

from shuntyard.plugins import contract
from shuntyard.plugins.contract import ExpertsForm

Array = NDArray[Any]
FORMATS = {"fp32": np.float32, "fp16": np.float16, "bf16": ml_dtypes.bfloat16}
FP8 = ml_dtypes.float8_e4m3fn

KINDS = [
    kind
    for kind in itertools.product(contract.LAYOUTS, contract.QUANTIZATIONS)
    if kind[1] != "group" or kind[0] == "linear"
]
"""Layout and quantisation of every form whose activations are not quantised."""

QUANTISING = list(itertools.product(contract.LAYOUTS, ("tensor", "channel"), contract.QUANTIZE_FORMS))
"""Layout, quantisation and activations of every other form."""

EVERY_KIND: list[tuple[str, ...]] = [*KINDS, *QUANTISING]


class Weights(NamedTuple):
    """The three lists, as oracle, torch and plugin take them: INT4 packed."""

    form: ExpertsForm
    weights: list[Array]
    scales: list[Array]
    activation_scales: Sequence[Array] = ()

    @property
    def width(self) -> int:
        """F."""
        down: tuple[int, ...] = self.weights[-1].shape
        return down[{"fused": 1, "split": 0, "linear": 1}[self.form.layout]] * (8 if self.form.group_size else 1)

    @property
    def names(self) -> list[str]:
        return [*self.form.weight_names, *self.form.scale_names, *self.form.activation_scale_names]

    @property
    def lists(self) -> tuple[Sequence[Array], Sequence[Array], Sequence[Array]]:
        return self.weights, self.scales, self.activation_scales

    @property
    def arrays(self) -> list[Array]:
        return list(itertools.chain(*self.lists))

    @property
    def attributes(self) -> dict[str, Any]:
        form = self.form
        shape = {"experts": form.experts, "layout": form.layout, "group_size": form.group_size}
        return {**shape, "activations": form.activations}


def form_of(kind: tuple[str, ...], experts: int, group_size: int = 8) -> ExpertsForm:
    """Of layout and quantisation, and of activations if they are quantised."""
    layout, quantization, *activations = kind
    return ExpertsForm(experts, layout, quantization, group_size if quantization == "group" else 0, *activations)


def fitting(case: dict[str, Any], form: ExpertsForm) -> dict[str, Any]:
    """The case with extents that are multiples of what INT4 asks for, if it is INT4."""
    if form.quantization != "group":
        return case
    unit = math.lcm(8, form.group_size)
    return {**case, "H": unit * min(3, case["H"]), "F": unit * min(2, case["F"])}


def pack(values: Array) -> Array:
    """``[out, in]`` of -8 .. 7 -> ``int32 [out, in/8]``, the lowest nibble first, stored as value + 8."""
    words = np.zeros((len(values), values.shape[1] // 8), np.uint32)
    for i in range(8):
        words |= (values[:, i::8] + 8).astype(np.uint32) << np.uint32(4 * i)
    return words.view(np.int32)


def fp8(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """Mostly of one size, but any code that is a number may occur; the first elements are the extremes."""
    values = (rng.normal(size=shape) * 50).astype(FP8)
    any_code = rng.integers(0, 256, size=shape).astype(np.uint8)
    any_code[any_code & 0x7F == 0x7F] = 0x7E
    values = np.where(rng.uniform(size=shape) < 0.1, any_code.view(FP8), values)
    flat: Array = values.reshape(-1)
    flat[:4] = np.asarray([448, 2.0**-9, -(2.0**-6), 0], FP8)[: flat.size]
    return values


def make_weights(
    rng: np.random.Generator,
    form: ExpertsForm,
    hidden: int,
    width: int,
    stored: str = "fp32",
    flat_scales: bool = False,
) -> Weights:
    """Random weights of about ``1 / sqrt(in)``; ``stored`` is the type of plain weights, or of the scales."""
    dtype, quantization = FORMATS[stored], form.quantization
    weights: list[Array] = []
    sizes = {"none": 1.0, "tensor": 50.0, "channel": 50.0, "group": 4.0}
    for shape in form.weight_shapes(hidden, width):
        if quantization == "none":
            weights.append((rng.normal(size=shape) / hidden**0.5).astype(dtype))
        elif quantization == "group":
            weights.append(pack(rng.integers(-8, 8, size=(shape[0], shape[1] * 8))))
        else:
            weights.append(fp8(rng, shape))
    scales: list[Array] = []
    for weight, count in zip(weights, form.scale_sizes(hidden, width), strict=False):
        scale = rng.uniform(0.5, 2, size=count) / sizes[quantization] / hidden**0.5
        shapes: dict[str, tuple[int, ...]] = {
            "tensor": () if flat_scales else (1,),
            "channel": (-1,)
            if flat_scales
            else {"fused": (form.experts, 1, -1), "split": (1, -1)}.get(form.layout, (-1, 1)),
            "group": (len(weight), -1),
        }
        scales.append(scale.astype(dtype).reshape(shapes[quantization]))
    # Some of the rows go beyond what these scales hold, whether they are the inputs or the hidden ones.
    given = [
        (rng.uniform(0.5, 2, size=() if flat_scales else 1) / 800).astype(dtype) for _ in form.activation_scale_names
    ]
    return Weights(form, weights, scales, given)


kinds = st.sampled_from(KINDS)
quantising = st.sampled_from(QUANTISING)
group_sizes = st.sampled_from([1, 2, 4, 8, 12, 16, 32])


def to_torch(array: Array) -> torch.Tensor:
    """The same bytes as a tensor."""
    by_bits = {ml_dtypes.bfloat16: (np.int16, torch.bfloat16), FP8: (np.uint8, torch.float8_e4m3fn)}
    if array.dtype.type in by_bits:
        bits, dtype = by_bits[array.dtype.type]
        return torch.from_numpy(np.ascontiguousarray(array).view(bits).copy()).view(dtype)
    return torch.from_numpy(np.ascontiguousarray(array))


def to_numpy(tensor: torch.Tensor) -> Array:
    """The same bytes as an array."""
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def to_onnx(name: str, array: Array, as_int4: bool) -> ir.Value:
    """The same bytes as an initializer: packed words become twice as many UINT4 a byte."""
    dtype, dims = ir.DataType.from_numpy(array.dtype), list(array.shape)
    if as_int4:
        dtype, dims = ir.DataType.UINT4, [*dims[:-1], dims[-1] * 8]
    proto = onnx.TensorProto(name=name, data_type=int(dtype), dims=dims, raw_data=np.ascontiguousarray(array).tobytes())
    tensor = ir.serde.deserialize_tensor(proto)
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(dims), const_value=tensor)


def constants_of(made: Weights) -> list[ir.Value]:
    """All weights and scales as initializers, in the order of the ONNX node's inputs."""
    packed = len(made.weights) if made.form.quantization == "group" else 0
    return [to_onnx(name, a, i < packed) for i, (name, a) in enumerate(zip(made.names, made.arrays, strict=True))]
