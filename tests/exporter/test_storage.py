"""Graphs of modules that are not plainly stored and multiplied: which nodes stand around a product."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from shuntyard.exporter.export import export
from shuntyard.exporter.recipe import STORED, read_recipe
from tests.checkpoints import write_checkpoint
from tests.exporter.exported import RAW, WEIGHTS, by_hand, logits
from tests.exporter.handmade import CHANNEL, declare_compressed_tensors
from tests.exporter.recipes import recipe, rule, write_calibration

LAYERS = [f"model.layers.{i}" for i in range(RAW["num_hidden_layers"])]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("storage") / "source", RAW, WEIGHTS)


def layers_of(model: Path) -> dict[str, onnx.FunctionProto]:
    proto = onnx.load(model / "model.onnx", load_external_data=False)
    functions = {function.name: function for function in proto.functions}
    return {node.name: functions[node.op_type] for node in proto.graph.node if node.op_type in functions}


def quantised(function: onnx.FunctionProto) -> dict[str, str]:
    return {n.name: n.op_type for n in function.node if n.op_type.startswith("ShuntyardQuantize")}


def test_layers_that_differ_have_functions_of_their_own(source: Path, tmp_path: Path) -> None:
    """And those that are alike share one: a static layer must not run with a dynamic one's nodes."""
    own = recipe(
        rule("model.layers.0.self_attn.*", weights="fp8", activations="fp8-dynamic"),
        rule("model.layers.2.self_attn.*", weights="fp8", activations="fp8-static"),
        rule("model.layers.1.self_attn.q_proj", weights="fp32"),
        rule("model.layers.3.self_attn.k_proj", weights="fp32"),
    )
    calibration = write_calibration(tmp_path / "calibration.json", source)
    export(source, tmp_path / "out", recipe=own, calibration=calibration)
    layers = layers_of(tmp_path / "out")
    assert len({layers[name].name for name in LAYERS}) == 4
    assert set(quantised(layers[LAYERS[0]]).values()) == {"ShuntyardQuantize_dynamic"}
    assert set(quantised(layers[LAYERS[2]]).values()) == {"ShuntyardQuantize_static"}
    widened = {
        name: [n.name for n in layers[name].node if n.name.endswith(".widened")] for name in (LAYERS[1], LAYERS[3])
    }
    assert widened == {
        LAYERS[1]: ["self_attn.q_proj.widened"],
        LAYERS[3]: ["self_attn.k_proj.widened"],
    }
    export(source, tmp_path / "alike", recipe=read_recipe("fp8-all-linear"))
    layers = layers_of(tmp_path / "alike")
    assert layers[LAYERS[0]].name == layers[LAYERS[2]].name and len({layers[n].name for n in LAYERS}) == 3


def test_an_input_is_quantised_once_by_token(source: Path, tmp_path: Path) -> None:
    """q, k and v share it as far as they ask for it; what is static has a node of its own."""
    own = recipe(
        rule("*.k_proj", weights="fp8", granularity="tensor", activations="fp8-static"),
        rule("*.0.self_attn.v_proj", weights="fp8"),
        rule("*.self_attn.*", weights="fp8", activations="fp8-dynamic"),
    )
    calibration = write_calibration(tmp_path / "calibration.json", source)
    export(source, tmp_path / "out", recipe=own, calibration=calibration)
    layers = layers_of(tmp_path / "out")
    for name, function in ((n, layers[n]) for n in LAYERS):
        kinds = quantised(function)
        assert kinds == {
            "self_attn.q_proj.quantize": "ShuntyardQuantize_dynamic",
            "self_attn.k_proj.quantize": "ShuntyardQuantize_static",
            "self_attn.o_proj.quantize": "ShuntyardQuantize_dynamic",
        }
        inputs = {n.name: n.input[0] for n in function.node if n.op_type == "MatMul"}
        assert inputs["self_attn.q_proj"] == "self_attn.q_proj.codes"
        shared = inputs["self_attn.v_proj"] == "self_attn.q_proj.codes"
        assert shared == (name != LAYERS[0])
        (static,) = [n for n in function.node if n.name == "self_attn.k_proj.quantize"]
        assert static.input[1] == "self_attn.k_proj.weight_input_scale"


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_routers_whose_inputs_are_declared_quantised(tmp_path: Path, dtype: str) -> None:
    """Their logits stay fp32 in engines of all types."""
    made = declare_compressed_tensors(by_hand(CHANNEL, lambda name: "router" not in name, "linear"))
    for group in made.raw["quantization_config"]["config_groups"].values():
        group["input_activations"] = {
            "num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True
        }  # fmt: skip
    source = made.write(tmp_path / "source")
    export(source, tmp_path / "out", dtype=dtype, recipe=read_recipe(STORED))
    export(source, tmp_path / "plain", dtype=dtype)
    assert quantised(layers_of(tmp_path / "out")[LAYERS[1]]).keys() == {"feed_forward.router.quantize"}
    found, plain = (logits(tmp_path / name / "model.onnx") for name in ("out", "plain"))
    assert np.isfinite(found).all() and np.abs(found - plain).max() > 1e-3
