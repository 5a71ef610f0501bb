"""One small model that is exported in many ways: what it computes, and where its graph finds its weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray

from shuntyard.exporter.safetensors_header import TensorEntry, read_header
from tests import driver
from tests.checkpoints import parsed, random_weights, raw_config
from tests.exporter.handmade import PLAIN, Handmade, Way, handmade
from tests.parity.reference import Reference
from tests.tolerances import ROUTER_MARGIN

# No matrix is square, and all sides are multiples of 32, the largest group's size.
RAW = raw_config(hidden_size=32, intermediate_size=64, intermediate_size_mlp=96, head_dim=16)
IDS = np.random.default_rng(0).integers(0, RAW["vocab_size"], size=(2, 22))  # three chunks
WEIGHTS = random_weights(parsed(RAW), seed=5)
OTHER = raw_config(
    vocab_size=24,
    hidden_size=48,
    intermediate_size=16,
    intermediate_size_mlp=80,
    num_hidden_layers=2,
    num_attention_heads=3,
    num_key_value_heads=1,
    head_dim=16,
    num_local_experts=3,
    num_experts_per_tok=1,
    interleave_moe_layer_step=1,
    no_rope_layers=[0, 1],
    attention_bias=True,
)
"""Another one: two layers, one without RoPE, both routed, with biases."""

GATE_UP = "model.layers.1.feed_forward.experts.gate_up_proj"


def reference(state: dict[str, torch.Tensor], raw: dict[str, Any] = RAW, ids: Any = IDS) -> NDArray[np.float32]:
    model = Reference(raw, state)
    expected = model.logits(ids)
    assert model.margin > ROUTER_MARGIN
    return expected


def logits(model: Path | bytes, raw: dict[str, Any] = RAW, ids: Any = IDS) -> NDArray[np.float32]:
    """Prefilled in pieces across two chunk edges, then decoded."""
    step, cache = driver.exported(driver.open_session(model), parsed(raw), len(ids), ids.shape[1] + 2)
    return driver.run(step, cache, ids, raw["attention_chunk_size"], cuts=[3], decode_from=14)


def by_hand(way: Way, is_plain: Callable[[str], bool], layout: str) -> Handmade:
    weights = {name: weight.bfloat16() for name, weight in WEIGHTS.items()}
    return handmade(
        RAW, weights, lambda name: PLAIN if name == "lm_head" or is_plain(name) else way, lambda layer: layout
    )


def entries(directory: Path) -> dict[str, TensorEntry]:
    headers = [read_header(file) for file in sorted(directory.glob("*.safetensors"))]
    return {tensor.name: tensor for header in headers for tensor in header.tensors}


def places(model: Path) -> dict[str, tuple[str, int, int, onnx.TensorProto]]:
    """Where each initializer lies: file, offset, length."""
    proto = onnx.load(model / "model.onnx", load_external_data=False)
    found = {}
    for tensor in proto.graph.initializer:
        place = {entry.key: entry.value for entry in tensor.external_data}
        found[tensor.name] = place["location"], int(place["offset"]), int(place["length"]), tensor
    assert len(found) == len(proto.graph.initializer)
    return found


ONNX_TYPES = {
    "BF16": onnx.TensorProto.BFLOAT16,
    "F16": onnx.TensorProto.FLOAT16,
    "F32": onnx.TensorProto.FLOAT,
    "F8_E4M3": onnx.TensorProto.FLOAT8E4M3FN,
    "I32": onnx.TensorProto.UINT4,
}
