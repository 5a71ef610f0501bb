"""Checkpoints in every format: exported, they compute what transformers computes with their dequantised weights."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from numpy.typing import NDArray

from shuntyard.exporter.checkpoint import open_checkpoint
from shuntyard.exporter.export import ExportResult, export
from shuntyard.exporter.graph import retarget
from tests import formats
from tests.exporter.exported import ONNX_TYPES, RAW, WEIGHTS, by_hand, entries, logits, places, reference
from tests.exporter.handmade import (
    CHANNEL,
    PLAIN,
    TENSOR,
    Way,
    declare_compressed_tensors,
    declare_modelopt,
)
from tests.parity.reference import largest_difference
from tests.tolerances import MISTAKE_MIN_ABS, MODEL_MAX_ABS


class Format(NamedTuple):
    """One way to write the checkpoint, and what is to be seen in the graph; without ``write``, by hand."""

    write: Callable[..., Path] | None
    options: dict[str, Any]
    library: str | None
    layer: str  # the function that layer 1, RoPE and routed, is called by
    waived: tuple[str, ...] = ()  # ends of names

    @property
    def nested(self) -> bool:
        """Whether there is a vision tower."""
        always = (formats.write_nested, formats.write_maverick_fp8)
        return self.write in always or bool(self.options.get("nested"))

    def make(self, path: Path) -> dict[str, torch.Tensor]:
        """Writes the checkpoint, and gives the values of its weights."""
        if self.write is None:
            made = by_hand(self.options["way"], lambda name: False, self.options.get("layout", "linear"))
            declare = declare_modelopt if "layout" in self.options else declare_compressed_tensors
            declare(made).write(path)
            return made.values
        self.write(path, RAW, WEIGHTS, **self.options)
        return formats.dequantised_state(path)


SCALES = ("input_scale",)
KV_SCALES = ("k_scale", "v_scale")
CT, OPT = "compressed_tensors", "modelopt.torch.quantization"
FORMATS = {
    "FP8 by hand": Format(None, {"way": CHANNEL}, None, "LinearFp8OnFp8"),
    "INT4 by hand": Format(None, {"way": Way("group", 16)}, None, "LinearInt4OnInt4"),
    "ModelOpt by hand": Format(None, {"way": TENSOR, "layout": "fused"}, None, "Fp8OnFp8"),
    "nested": Format(formats.write_nested, {"shard_size": "20KB"}, None, ""),
    "nested as released": Format(formats.write_nested, {"as_released": True}, None, ""),
    "FP8 dynamic": Format(formats.write_fp8_dynamic, {"shard_size": "20KB"}, CT, "LinearFp8OnFp8"),
    "FP8 dynamic nested, by patterns, fp32 scales": Format(
        formats.write_fp8_dynamic,
        {"nested": True, "ignore_by_recipe": True, "scale_dtype": torch.float32},
        CT,
        "LinearFp8OnFp8",
    ),
    "FP8 static with a KV cache": Format(
        formats.write_fp8_static, {"kv": True, "scale_dtype": torch.float16}, CT, "LinearFp8OnFp8", SCALES + KV_SCALES
    ),
    "INT4 in groups of 8": Format(formats.write_int4, {"group": 8}, CT, "LinearInt4OnInt4"),
    "INT4 in groups of 16, all Linears": Format(
        formats.write_int4, {"group": 16, "ignore": formats.ALL_LINEARS, "nested": True}, CT, "LinearInt4OnInt4"
    ),
    "INT4 in groups of 32": Format(formats.write_int4, {"group": 32, "shard_size": "20KB"}, CT, "LinearInt4OnInt4"),
    "Maverick": Format(formats.write_maverick_fp8, {"plain_layers": (3,)}, CT, "LinearFp8"),
    "ModelOpt": Format(formats.write_modelopt_fp8, {}, OPT, "Fp8OnFp8", SCALES),
    "ModelOpt nested with a KV cache": Format(
        formats.write_modelopt_fp8,
        {"kv": True, "nested": True, "shard_size": "20KB"},
        OPT,
        "Fp8OnFp8",
        SCALES + KV_SCALES,
    ),
    "ModelOpt as released": Format(
        formats.write_modelopt_fp8,
        {"kv": True, "nested": True, "as_released": True},
        OPT,
        "Fp8OnFp8",
        SCALES + KV_SCALES,
    ),
}


class Exported(NamedTuple):
    checkpoint: Path
    model: Path
    result: ExportResult
    expected: NDArray[np.float32]


@pytest.fixture(scope="module", params=FORMATS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Format, Exported]:
    """A checkpoint, what export makes of it, and what transformers computes."""
    one = FORMATS[request.param]
    if one.library is not None:
        pytest.importorskip(one.library)
    folder = tmp_path_factory.mktemp("format")
    expected = reference(one.make(folder / "checkpoint"))
    result = export(folder / "checkpoint", folder / "model", check_values=True, text_only=one.nested)
    return one, Exported(folder / "checkpoint", folder / "model", result, expected)


def test_parity(case: tuple[Format, Exported]) -> None:
    _, own = case
    assert largest_difference(logits(own.model / "model.onnx"), own.expected) <= MODEL_MAX_ABS


def test_weights_are_the_checkpoints_own_bytes(case: tuple[Format, Exported]) -> None:
    """Every tensor but those that are left out is an initializer: its file, its place, its type, and nothing else."""
    _, own = case
    tensors = entries(own.checkpoint)
    used = {
        name.removeprefix("language_model."): tensor
        for name, tensor in tensors.items()
        if name not in own.result.waived and not name.endswith("weight_shape")
    }
    initializers = places(own.model)
    assert initializers.keys() == used.keys()
    for name, (file, offset, length, tensor) in initializers.items():
        entry = used[name]
        assert (file, offset, length) == (entry.file.name, entry.offset, entry.nbytes), name
        assert tensor.data_type == ONNX_TYPES[entry.dtype] and not tensor.raw_data, name
        packed = 8 if entry.dtype == "I32" else 1
        assert tuple(tensor.dims[:-1]) == entry.shape[:-1] and tensor.dims[-1:] == [
            n * packed for n in entry.shape[-1:]
        ]
        assert os.path.samefile(own.model / file, entry.file)


def test_nothing_is_copied(case: tuple[Format, Exported]) -> None:
    """What is written is the graph and copies of small files."""
    one, own = case
    shards = list(own.checkpoint.glob("*.safetensors"))
    assert own.result.bytes_linked == sum(file.stat().st_size for file in shards)
    assert (len(shards) > 1) == ("shard_size" in one.options)
    written = {path.name: path for path in own.model.iterdir() if path.suffix != ".safetensors"}
    assert own.result.bytes_written == sum(path.stat().st_size for path in written.values())
    graph = onnx.load(own.model / "model.onnx", load_external_data=False)
    largest = max((len(a.t.raw_data) for f in graph.functions for n in f.node for a in n.attribute), default=0)
    table = RAW["attention_chunk_size"] * RAW["head_dim"] // 2 * 4  # of the rotation, fp32
    assert largest <= table


def test_what_is_waived(case: tuple[Format, Exported]) -> None:
    one, own = case
    tensors = entries(own.checkpoint)
    vision = {name for name in tensors if name.startswith(formats.BESIDE_THE_TEXT)}
    scales = {name for name in tensors if one.waived and name.endswith(one.waived)}
    assert sorted(own.result.waived) == sorted(vision | scales)
    assert bool(vision) == bool(open_checkpoint(own.checkpoint).vision) == one.nested
    if one.waived:
        assert all(any(name.endswith(end) for name in scales) for end in one.waived)
    manifest = json.loads((own.model / "shuntyard.json").read_text())
    assert manifest["waived"] == own.result.waived and manifest["values_checked"] is True
    assert manifest["tensors"] == own.result.tensors == len(tensors) - len(own.result.waived)


def test_functions_are_named_after_how_weights_are_stored(case: tuple[Format, Exported]) -> None:
    one, own = case
    graph = onnx.load(own.model / "model.onnx", load_external_data=False)
    (call,) = [node for node in graph.graph.node if node.name == "model.layers.1"]
    assert call.op_type == f"Llama4RopeMoeLayer{one.layer}"
    names = [function.name for function in graph.functions]
    assert len(set(names)) == len(names)
    (layer,) = [function for function in graph.functions if function.name == call.op_type]
    (experts,) = [node for node in layer.node if "MoeExperts" in node.op_type]
    attributes = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in experts.attribute}
    way = one.options.get("way", PLAIN)
    assert attributes["group_size"] == (one.options.get("group", 0) or way.group)  # the plugin goes by it
    assert attributes["layout"] == (b"linear" if one.layer.startswith("Linear") else b"fused")
    assert (attributes["experts"], attributes["top_k"]) == (RAW["num_local_experts"], RAW["num_experts_per_tok"])


def test_model_directory_is_a_checkpoint(case: tuple[Format, Exported], tmp_path: Path) -> None:
    """With all that says how its weights are to be read: an export of it is the same."""
    _, own = case
    export(own.model, tmp_path / "again", check_values=True, text_only=True)
    for name in ("model.onnx", "shuntyard.json"):
        assert (tmp_path / "again" / name).read_bytes() == (own.model / name).read_bytes()


def test_fp16(case: tuple[Format, Exported], tmp_path: Path) -> None:
    """Retargeting is exporting in the other type, and what is computed is close."""
    _, own = case
    export(own.checkpoint, tmp_path / "fp16", dtype="fp16", text_only=True)
    model = ir.load(own.model / "model.onnx")
    retarget(model, "fp16")
    there = ir.load(tmp_path / "fp16" / "model.onnx")
    assert ir.to_proto(model).SerializeToString(deterministic=True) == ir.to_proto(there).SerializeToString(
        deterministic=True
    )
    retarget(there, "fp32")
    back = ir.load(own.model / "model.onnx")
    assert ir.to_proto(there).SerializeToString(deterministic=True) == ir.to_proto(back).SerializeToString(
        deterministic=True
    )
    narrow, wide = logits(tmp_path / "fp16" / "model.onnx"), own.expected
    assert 0 < np.abs(narrow - wide).mean() < 0.02 * np.abs(wide).mean()  # single logits are off where experts flip
    assert (narrow.argmax(-1) == wide.argmax(-1)).mean() > 0.9


def test_another_format_is_another_model(case: tuple[Format, Exported]) -> None:
    """The weights' rounding is far beyond the tolerance: no format could be taken for another, or for plain weights."""
    one, own = case
    difference = largest_difference(reference(WEIGHTS), own.expected)
    assert difference > (MODEL_MAX_ABS if one.layer == "" else MISTAKE_MIN_ABS)


# What is written by hand is what the libraries write.

BY_HAND: dict[str, tuple[Callable[..., Path], dict[str, Any], Way, str]] = {
    "channel": (formats.write_fp8_dynamic, {}, CHANNEL, CT),
    "tensor": (formats.write_fp8_static, {"ignore": formats.RECIPE}, Way("tensor", scale_shape=(1,)), CT),
    "group": (formats.write_int4, {"group": 16}, Way("group", 16), CT),
    "modelopt": (formats.write_modelopt_fp8, {}, Way("tensor", scale=torch.float32), OPT),
}


@pytest.mark.parametrize("form", BY_HAND)
def test_made_by_hand_is_what_the_library_writes_and_reads(form: str, tmp_path: Path) -> None:
    """The same names, types and shapes, and the library's values bit for bit."""
    write, options, way, library = BY_HAND[form]
    pytest.importorskip(library)
    theirs = write(tmp_path / "theirs", RAW, WEIGHTS, **options)
    layout, plain = ("fused", "router") if library == OPT else ("linear", "self_attn")
    made = by_hand(way, lambda name: plain in name or "router" in name, layout)
    if library == OPT:
        declare_modelopt(made)
    else:
        formatted = {"format": "pack-quantized" if way.group else "float-quantized"}
        declare_compressed_tensors(made, **formatted)
    ours = made.write(tmp_path / "ours")
    described = {name: (e.dtype, e.shape) for name, e in entries(theirs).items() if not name.endswith("input_scale")}
    assert {name: (entry.dtype, entry.shape) for name, entry in entries(ours).items()} == described
    read = formats.dequantised_state(ours)
    assert read.keys() == made.values.keys()
    for name, value in made.values.items():
        assert torch.equal(read[name], value), name
