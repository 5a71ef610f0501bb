"""Lowering: what each backend needs of the portable graph, a few lines a backend.

ONNX Runtime takes the graph as it is: it inlines the private ops' functions, whose experts are routed, not dense.
TensorRT builds the plugin where a node carries its namespace; the function bodies of ops with plugins are taken
out, so that a plugin that is not there is an error and never a silent fallback. Its cache sizes are static, and
quantised weights reach it as they are stored.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx_ir as ir

from shuntyard.errors import EngineError, UnsupportedError
from shuntyard.exporter.graph import WIDENED, retarget
from shuntyard.exporter.modules import EXPERTS as EXPERTS_MODULE
from shuntyard.exporter.storage import op_of
from shuntyard.plugins.contract import DEQUANTIZE, DOMAIN, EXPERTS, PLUGINS, QUANTIZE


def for_onnxruntime(model: ir.Model, dtype: str) -> None:
    """Sets the compute type, in place."""
    retarget(model, dtype)


def for_tensorrt(model: ir.Model, dtype: str, *, context: int, chunk: int | None) -> list[ir.Value]:
    """Makes of the portable graph what TensorRT takes, in place.

    Sets the compute type, fixes the cache sizes, leaves the plugin ops to their plugins, and hands quantised weights
    over as they are stored.

    Returns:
        The INT4 initializers whose bytes must be rewritten (:func:`signed_nibbles`) before TensorRT reads them.
    """
    retarget(model, dtype)
    fix_dimensions(model, {"context": context, **({} if chunk is None else {"chunk": chunk})})
    without_body = {DEQUANTIZE.name, *(op.name for op in PLUGINS)}
    for key in [key for key, function in model.functions.items() if op_of(function.name) in without_body]:
        del model.functions[key]
    for function in model.functions.values():
        for node in function:
            if node.domain == DOMAIN and op_of(node.op_type) == EXPERTS.name:
                node.op_type = EXPERTS.name  # one plugin takes all forms
    narrow_weights(model)
    _hoist_dequantize(model)
    _name_apart(model)
    check_forms(model)
    return [value for value in model.graph.initializers.values() if value.dtype == ir.DataType.UINT4]


_FORMS = "this is a defect of shuntyard: no exporter of ours writes such a form"


def check_forms(model: ir.Model) -> None:
    """Refuses forms of quantisation that TensorRT was found to read otherwise than they say.

    * FP8 in blocks beside quantised activations: only the first row of scales was read (TensorRT-RTX 1.7).
    * A scale of QuantizeLinear that is computed: the product falls back to the engine's type.
    * A scale of DequantizeLinear for FP8 that is not fp32: the product is rounded twice.

    Raises:
        EngineError: the graph has one.
    """
    for nodes in (model.graph, *model.functions.values()):
        for node in nodes:
            if node.op_type not in ("QuantizeLinear", "DequantizeLinear") or node.domain not in ("", "ai.onnx"):
                continue
            value, scale = node.inputs[:2]
            assert value is not None and scale is not None
            block = node.attributes.get("block_size")
            is_int4 = value.dtype in (ir.DataType.UINT4, ir.DataType.INT4)
            if block is not None and block.as_int() and not is_int4:
                raise EngineError(f"node '{node.name}': scales of blocks, of what is not INT4", hint=_FORMS)
            producer = scale.producer()
            if node.op_type == "QuantizeLinear" and (producer is None or producer.op_type != "Constant"):
                raise EngineError(f"node '{node.name}' quantises by a scale that is computed", hint=_FORMS)
            if value.dtype == ir.DataType.FLOAT8E4M3FN and scale.dtype not in (None, ir.DataType.FLOAT):
                raise EngineError(f"node '{node.name}' has a scale of {scale.dtype} for FP8", hint=_FORMS)


def _copy(function: ir.Function, name: str) -> ir.Function:
    copy = ir.serde.deserialize_function(ir.to_proto(function))
    copy.name = name
    return copy


def _name_apart(model: ir.Model) -> None:
    """Gives each layer with experts or quantised activations a function of its own, in place.

    Its experts then know whose they are, which the plugin repeats in the builder's log; and its Quantize nodes have
    functions and names of their own, for the parser refuses a QuantizeLinear whose name was there before.
    """
    quantizers = {f.name: f for f in model.functions.values() if op_of(f.name) == QUANTIZE.name}
    sources = {
        function.name: function
        for function in model.functions.values()
        if any(node.op_type in quantizers or node.op_type == EXPERTS.name for node in function)
    }
    for number, call in enumerate(node for node in model.graph if node.op_type in sources):
        own = _copy(sources[call.op_type], f"{call.op_type}_{number}")
        for k, node in enumerate(own):
            if node.op_type == EXPERTS.name:
                node.attributes.add(ir.AttrString("module", f"{call.name}{EXPERTS_MODULE}"))
            if node.op_type not in quantizers:
                continue
            quantizer = _copy(quantizers[node.op_type], f"{node.op_type}_{number}_{k}")
            for inner in quantizer:
                inner.name = f"{inner.op_type}_{number}_{k}"
            node.op_type = quantizer.name
            model.functions[quantizer.identifier()] = quantizer
        call.op_type = own.name
        model.functions[own.identifier()] = own
    for function in (*sources.values(), *quantizers.values()):
        del model.functions[function.identifier()]


def fix_dimensions(model: ir.Model, sizes: dict[str, int]) -> None:
    """Replaces symbolic dimensions of the graph's inputs and outputs by numbers, in place."""
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.shape is not None:
            value.shape = ir.Shape([_fixed(dim, sizes) for dim in value.shape])


def _fixed(dim: int | ir.SymbolicDim, sizes: dict[str, int]) -> int | ir.SymbolicDim:
    return dim if isinstance(dim, int) else sizes.get(str(dim.value), dim)


def narrow_weights(model: ir.Model) -> None:
    """Takes out the casts of quantised weights to fp16, in place.

    ONNX Runtime needs them, but in TensorRT an FP8 constant may only feed a plugin or a DequantizeLinear. Packed INT4
    of experts becomes INT32, as the plugin takes it.
    """
    for node in list(model.graph):
        if node.op_type != "Cast" or not str(node.outputs[0].name).endswith(WIDENED):
            continue
        weight = node.inputs[0]
        assert weight is not None
        node.outputs[0].replace_all_uses_with(weight)
        model.graph.remove(node, safe=True)
        if weight.dtype == ir.DataType.UINT4 and ".experts." in str(weight.name):
            _redeclare(weight, ir.DataType.INT32, 8)


def _redeclare(weight: ir.Value, dtype: ir.DataType, values: int, location: str = "", offset: int = 0) -> None:
    """Declares an initializer's bytes as another type, so many values in one; or elsewhere."""
    tensor = weight.const_value
    assert isinstance(tensor, ir.ExternalTensor) and weight.shape is not None
    sizes = weight.shape.numpy()
    weight.shape = ir.Shape([*sizes[:-1], sizes[-1] // values])
    weight.type = ir.TensorType(dtype)
    weight.const_value = ir.ExternalTensor(
        location or tensor.location,
        offset if location else tensor.offset,
        tensor.length,
        dtype,
        shape=weight.shape,
        name=tensor.name,
        base_dir=tensor.base_dir,
    )


def _hoist_dequantize(model: ir.Model) -> None:
    """Dequantises in the main graph by DequantizeLinear, which TensorRT can fuse into the product, in place.

    Not within the functions, which are called several times: the parser refuses a second Dequantize of the same name.
    """
    quantized = {}
    for function in model.functions.values():
        inputs = list(function.inputs)
        found = []
        for node in list(function):
            if node.domain == DOMAIN and op_of(node.op_type) == DEQUANTIZE.name:
                weight, scale = node.inputs
                assert weight is not None and scale is not None
                found.append((inputs.index(weight), inputs.index(scale), node.attributes["group_size"].as_int()))
                node.outputs[0].replace_all_uses_with(weight)
                function.remove(node, safe=True)
        quantized[function.name] = found
        for place in sorted((scale for _, scale, _ in found), reverse=True):
            del function.inputs[place]
    for call in list(model.graph):
        places = quantized.get(call.op_type) or []
        for weight_place, scale_place, group_size in places:
            weight, scale = call.inputs[weight_place], call.inputs[scale_place]
            assert weight is not None and scale is not None
            call.replace_input_with(weight_place, _dequantized(model.graph, call, weight, scale, group_size))
        if places:
            dropped = {scale for _, scale, _ in places}
            kept = [value for i, value in enumerate(call.inputs) if i not in dropped]
            for i, value in enumerate(kept):
                call.replace_input_with(i, value)
            call.resize_inputs(len(kept))


def _dequantized(graph: ir.Graph, before: ir.Node, weight: ir.Value, scale: ir.Value, group_size: int) -> ir.Value:
    """``weight * scale`` in fp32, by nodes that stand before the call."""
    name = f"{weight.name}_dequantized"
    if group_size and scale.shape is not None and scale.shape.is_static() and math.prod(scale.shape.numpy()) == 1:
        raise UnsupportedError(
            f"tensor '{scale.name}' is one number for a whole INT4 weight, which TensorRT takes for another form",
            hint="quantise this weight in smaller groups, or not at all",
        )
    wide = ir.node("Cast", [scale], {"to": ir.DataType.FLOAT}, name=f"{name}.scale")
    wide.outputs[0].name = f"{name}.scale"
    nodes, attributes = [wide], {"axis": 1, "block_size": group_size} if group_size else {"axis": 0}
    if not group_size:
        # One number for the whole weight is a scalar: by the standard, a vector of one is a scale of one channel.
        is_one = scale.shape is not None and scale.shape.is_static() and math.prod(scale.shape.numpy()) == 1
        shape = ir.tensor([] if is_one else [-1], dtype=ir.DataType.INT64)
        flat = ir.node("Constant", [], {"value": shape}, name=f"{name}.shape")
        flat.outputs[0].name = f"{name}.shape"
        reshaped = ir.node("Reshape", [wide.outputs[0], flat.outputs[0]], name=f"{name}.flat_scale")
        reshaped.outputs[0].name = f"{name}.flat_scale"
        nodes += [flat, reshaped]
    out = ir.node("DequantizeLinear", [weight, nodes[-1].outputs[0]], attributes, name=name)
    out.outputs[0].name = name
    graph.insert_before(before, [*nodes, out])
    return out.outputs[0]


_PIECE = 16 * 1024 * 1024


def signed_nibbles(weights: list[ir.Value], path: Path) -> None:
    """Writes INT4 weights, stored as value + 8, to ``path`` as two's complement, which is what TensorRT calls INT4."""
    offset = 0
    with path.open("wb") as out:
        for weight in weights:
            tensor = weight.const_value
            assert isinstance(tensor, ir.ExternalTensor)
            with Path(tensor.path).open("rb") as stream:
                stream.seek(tensor.offset or 0)
                left = tensor.length or 0
                length = left
                while left:
                    piece = stream.read(min(left, _PIECE))
                    if not piece:
                        raise EngineError(f"{tensor.path}: ends within tensor '{tensor.name}'", hint="export again")
                    out.write((np.frombuffer(piece, np.uint8) ^ 0x88).tobytes())
                    left -= len(piece)
            _redeclare(weight, ir.DataType.INT4, 1, location=path.name, offset=offset)
            offset += length
