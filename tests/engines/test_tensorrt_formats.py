"""Quantised checkpoints as TensorRT-RTX plans: weights arrive as they are stored, and the plan says so."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from numpy.typing import NDArray

from shuntyard.engines import lower
from shuntyard.engines.build import Request, build, open_model
from shuntyard.engines.layer_table import Layer
from shuntyard.engines.proof import Asked, check_precision, expected_precision
from shuntyard.errors import EngineError
from shuntyard.exporter.export import export
from tests.checkpoints import parsed, random_weights, raw_config
from tests.exporter.handmade import CHANNEL, PLAIN, TENSOR, Way, declare_compressed_tensors, handmade

pytest.importorskip("tensorrt_rtx", reason="needs the package tensorrt-rtx")

RAW = raw_config(intermediate_size=32, intermediate_size_mlp=48)
WAYS = {"channel": CHANNEL, "tensor": TENSOR, "group": Way("group", 16)}


def exported(folder: Path, way: Way) -> Path:
    """A model directory whose dense and shared projections and experts are stored in one form, the rest plain."""

    def choose(module: str) -> Way:
        return PLAIN if "self_attn" in module or "router" in module or module == "lm_head" else way

    weights = random_weights(parsed(RAW), dtype=torch.bfloat16)
    made = declare_compressed_tensors(handmade(RAW, weights, choose))
    export(made.write(folder / "checkpoint"), folder / "model")
    return folder / "model"


def layers_of(engine: Path) -> list[Layer]:
    return [Layer(**layer) for layer in json.loads((engine / "layers.json").read_text())]


@pytest.mark.parametrize("form", WAYS)
def test_plans_hold_weights_as_they_are_stored(form: str, tmp_path: Path) -> None:
    model = exported(tmp_path, WAYS[form])
    request = Request(backend="tensorrt-rtx", gpu="sm89", dtype="bf16", max_context=40)
    manifest = build(model, tmp_path / "engine", request)
    layers = layers_of(tmp_path / "engine")
    experts = [layer for layer in layers if layer.plugin == "ShuntyardMoeExperts"]
    assert len(experts) == 2
    for layer in experts:  # three matrices an expert, and their scales
        assert Counter(layer.constants) == {"int32" if form == "group" else "fp8": 12, "bf16": 12}
    quantised = "int4" if form == "group" else "fp8"
    read_by = [
        origin for layer in layers if quantised in layer.constants and not layer.plugin for origin in layer.origins
    ]
    for module in ("model.layers.0.feed_forward", "model.layers.1.feed_forward.shared_expert"):
        for part in ("gate_proj", "up_proj", "down_proj"):
            assert any(origin.startswith(f"{module}.{part}.weight") for origin in read_by), (module, part)
    assert set(manifest.precision.values()) == {"bf16", "fp32"}  # weights alone are quantised


def read_nibbles(value: ir.Value, folder: Path) -> NDArray[np.uint8]:
    """The half bytes of an initializer, the lower one first."""
    tensor = value.const_value
    assert isinstance(tensor, ir.ExternalTensor) and tensor.offset is not None
    data = (folder / tensor.location).read_bytes()[tensor.offset :][: tensor.length]
    pairs = np.frombuffer(data, np.uint8)
    return np.stack([pairs & 15, pairs >> 4], axis=1).reshape(-1)


def test_int4_is_the_same_number_in_two_notations(tmp_path: Path) -> None:
    opened = open_model(exported(tmp_path, WAYS["group"]))
    nibbles = lower.for_tensorrt(opened.model, "bf16", context=40, chunk=8)
    before = {value.name: read_nibbles(value, tmp_path / "model").astype(int) - 8 for value in nibbles}
    lower.signed_nibbles(nibbles, tmp_path / "int4.bin")
    assert len(nibbles) == 4 * 3
    for value in nibbles:
        assert value.dtype == ir.DataType.INT4
        after = read_nibbles(value, tmp_path).astype(int)
        np.testing.assert_array_equal(np.where(after > 7, after - 16, after), before[value.name])


def test_quantised_weights_are_allowed_where_they_are_stored_and_nowhere_else() -> None:
    path = "model.layers.0.self_attn.q_proj"
    layer = Layer("fused", "runtime_fusion", ["bf16"], ["fp8", "fp32"], ["bf16"], [path])
    check_precision([layer], {path: Asked("bf16", "fp8")}, "bf16")
    for stored in ("", "int4"):
        with pytest.raises(EngineError, match="was to compute in bf16, but layer 'fused'"):
            check_precision([layer], {path: Asked("bf16", stored)}, "bf16")
    plain = Layer("fused", "runtime_fusion", ["bf16"], ["bf16"], ["bf16"], [path])
    with pytest.raises(EngineError, match=f"no layer of the plan holds the weight of {path} in fp8"):
        check_precision([plain], {path: Asked("bf16", "fp8")}, "bf16")
    activations = Layer("fused", "runtime_fusion", ["bf16", "fp8"], ["fp8"], ["bf16"], [path])
    with pytest.raises(EngineError, match="was to compute in bf16, but layer 'fused'"):
        check_precision([activations], {path: Asked("bf16", "fp8")}, "bf16")


def test_stored_types_are_read_off_the_graph(tmp_path: Path) -> None:
    opened = open_model(exported(tmp_path, CHANNEL))
    asked = expected_precision(opened.model, "bf16", opened.manifest.precision)
    assert asked["model.layers.0.feed_forward.gate_proj"] == Asked("bf16", "fp8")
    assert asked["model.layers.0.self_attn.q_proj"] == Asked("bf16")
    assert asked["model.layers.1.ShuntyardMoeExperts"] == Asked("bf16", "fp8", 12)


def _form(op: str, value: ir.DataType, scale: ir.DataType, *, computed: bool = False, **attributes: int) -> ir.Model:
    """A model of one node that quantises or dequantises."""
    given = ir.Value(name="x", type=ir.TensorType(value), shape=ir.Shape([64, 128]))
    own = ir.Value(name="s", type=ir.TensorType(scale), shape=ir.Shape([64]))
    nodes = []
    if not computed:
        nodes = [ir.node("Constant", [], {"value": ir.tensor(np.float32(1))})]
        own = nodes[0].outputs[0]
        own.type = ir.TensorType(scale)
    nodes.append(ir.node(op, [given, own], attributes, name="it"))
    return ir.Model(ir.Graph([given], nodes[-1].outputs, nodes=nodes, opset_imports={"": 24}), ir_version=11)


def test_forms_that_are_read_otherwise_than_they_say_are_refused() -> None:
    fp8, int4, fp32, bf16 = ir.DataType.FLOAT8E4M3FN, ir.DataType.INT4, ir.DataType.FLOAT, ir.DataType.BFLOAT16
    lower.check_forms(_form("DequantizeLinear", fp8, fp32, axis=0))
    lower.check_forms(_form("DequantizeLinear", int4, bf16, axis=1, block_size=32))
    lower.check_forms(_form("QuantizeLinear", fp32, fp32))
    for wrong, said in (
        (_form("DequantizeLinear", fp8, fp32, axis=1, block_size=128), "scales of blocks"),
        (_form("QuantizeLinear", bf16, fp32, computed=True), "by a scale that is computed"),
        (_form("DequantizeLinear", fp8, bf16, axis=0), "scale of BFLOAT16 for FP8"),
    ):
        with pytest.raises(EngineError, match=said):
            lower.check_forms(wrong)


def test_one_scale_of_a_whole_weight_is_a_scalar(tmp_path: Path) -> None:
    """A vector of one would be a scale of one channel, and of the others what lies behind it."""
    opened = open_model(exported(tmp_path, TENSOR))
    lower.for_tensorrt(opened.model, "bf16", context=40, chunk=8)
    shapes = [node for node in opened.model.graph if str(node.name).endswith("_dequantized.shape")]
    assert shapes and all(node.attributes["value"].as_tensor().numpy().shape == (0,) for node in shapes)
