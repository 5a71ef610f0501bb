"""Checkpoints in every format: exported, they compute what transformers computes with their dequantised weights."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from shuntyard.engines.build import Request, build
from shuntyard.errors import CheckpointError
from shuntyard.exporter import weights as weights_module
from shuntyard.exporter.checkpoint import open_checkpoint
from shuntyard.exporter.export import ExportResult, export
from shuntyard.exporter.graph import retarget
from shuntyard.exporter.safetensors_header import ITEM_BITS, TensorEntry, read_header
from tests import driver, formats
from tests.checkpoints import parsed, random_weights, raw_config
from tests.exporter.handmade import (
    CHANNEL,
    PLAIN,
    TENSOR,
    Handmade,
    Way,
    declare_compressed_tensors,
    declare_modelopt,
    handmade,
)
from tests.parity.reference import Reference, largest_difference
from tests.tolerances import MISTAKE_MIN_ABS, MODEL_MAX_ABS, ROUTER_MARGIN

# No matrix is square but the router's and the head's are no experts'; all sides are multiples of 32, a group's size.
RAW = raw_config(hidden_size=32, intermediate_size=64, intermediate_size_mlp=96, head_dim=16)
IDS = np.random.default_rng(0).integers(0, RAW["vocab_size"], size=(2, 22))  # three chunks
WEIGHTS = random_weights(parsed(RAW), seed=5)
GATE_UP = "model.layers.1.feed_forward.experts.gate_up_proj"


class Format(NamedTuple):
    """One way to write the checkpoint, and what is to be seen in the graph."""

    write: Callable[..., Path]
    options: dict[str, Any]
    library: str | None
    layer: str  # the function that layer 1, RoPE and routed, is called by
    waived: tuple[str, ...] = ()  # ends of names

    @property
    def nested(self) -> bool:
        """Whether there is a vision tower."""
        always = (formats.write_nested, formats.write_maverick_fp8)
        return self.write in always or bool(self.options.get("nested"))


SCALES = ("input_scale",)
KV_SCALES = ("k_scale", "v_scale")
CT, OPT = "compressed_tensors", "modelopt.torch.quantization"
FORMATS = {
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
    checkpoint = one.write(folder / "checkpoint", RAW, WEIGHTS, **one.options)
    result = export(checkpoint, folder / "model", check_values=True, text_only=one.nested)
    return one, Exported(checkpoint, folder / "model", result, reference(formats.dequantised_state(checkpoint)))


def reference(state: dict[str, torch.Tensor], raw: dict[str, Any] = RAW, ids: Any = IDS) -> NDArray[np.float32]:
    model = Reference(raw, state)
    expected = model.logits(ids)
    assert model.margin > ROUTER_MARGIN
    return expected


def logits(model: Path | bytes, raw: dict[str, Any] = RAW, ids: Any = IDS) -> NDArray[np.float32]:
    """Prefilled in pieces across two chunk edges, then decoded."""
    step, cache = driver.exported(driver.open_session(model), parsed(raw), len(ids), ids.shape[1] + 2)
    return driver.run(step, cache, ids, raw["attention_chunk_size"], cuts=[3], decode_from=14)


def test_parity(case: tuple[Format, Exported]) -> None:
    _, own = case
    assert largest_difference(logits(own.model / "model.onnx"), own.expected) <= MODEL_MAX_ABS


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
    assert len(shards) == 1 or "shard_size" in one.options
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
    assert difference > (MODEL_MAX_ABS if one.library is None else MISTAKE_MIN_ABS)


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


def by_hand(way: Way, is_plain: Callable[[str], bool], layout: str) -> Handmade:
    weights = {name: weight.bfloat16() for name, weight in WEIGHTS.items()}
    return handmade(
        RAW, weights, lambda name: PLAIN if name == "lm_head" or is_plain(name) else way, lambda layer: layout
    )


def test_build_refuses_what_is_beyond_its_type(tmp_path: Path) -> None:
    """Numbers and scales are in order, their products are not."""
    made = declare_compressed_tensors(by_hand(CHANNEL, lambda name: False, "linear"))
    name = "model.layers.0.self_attn.q_proj.weight"
    made.tensors[f"{name}_scale"][9] = 4096
    export(made.write(tmp_path / "checkpoint"), tmp_path / "model", check_values=True)
    with pytest.raises(CheckpointError, match=rf"{name}' at \[9, \d+\] holds .*beyond 65504") as refused:
        build(tmp_path / "model", tmp_path / "engine", Request(dtype="fp16", max_context=16))
    assert "--dtype" in refused.value.hint and not (tmp_path / "engine").exists()


# Fused experts past the largest tensor.


@pytest.mark.parametrize("way", [PLAIN, TENSOR], ids=["bf16", "FP8"])
def test_split_experts_compute_the_same(way: Way, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = by_hand(way, lambda name: False, "fused")
    made = made if way == PLAIN else declare_modelopt(made)
    checkpoint = made.write(tmp_path / "checkpoint")
    export(checkpoint, tmp_path / "whole")
    monkeypatch.setattr(weights_module, "LARGEST_TENSOR", made.values[GATE_UP].numel() - 1)
    result = export(checkpoint, tmp_path / "split", check_values=True)
    check_split(checkpoint, tmp_path / "split", result)
    whole, split = (logits(tmp_path / name / "model.onnx") for name in ("whole", "split"))
    np.testing.assert_array_equal(split, whole)
    assert largest_difference(split, reference(made.values)) <= MODEL_MAX_ABS
    export(checkpoint, tmp_path / "fp16", dtype="fp16")
    model = ir.load(tmp_path / "split" / "model.onnx")
    retarget(model, "fp16")
    assert ir.to_proto(model) == ir.to_proto(ir.load(tmp_path / "fp16" / "model.onnx"))


def test_split_experts_of_modelopts_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip(OPT)
    checkpoint = formats.write_modelopt_fp8(tmp_path / "checkpoint", RAW, WEIGHTS, kv=True, nested=True)
    monkeypatch.setattr(weights_module, "LARGEST_TENSOR", WEIGHTS[GATE_UP].numel() - 1)
    result = export(checkpoint, tmp_path / "split", check_values=True, text_only=True)
    check_split(checkpoint, tmp_path / "split", result)
    expected = reference(formats.dequantised_state(checkpoint))
    assert largest_difference(logits(tmp_path / "split" / "model.onnx"), expected) <= MODEL_MAX_ABS


def check_split(checkpoint: Path, model: Path, result: ExportResult) -> None:
    """Each expert is an initializer that lies right behind the one before, together they are the fused tensor."""
    tensors = {name.removeprefix("language_model."): tensor for name, tensor in entries(checkpoint).items()}
    initializers = places(model)
    fused = [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]
    assert len(fused) == 4 and not set(fused) & set(initializers)
    for name in fused:
        entry, reached = tensors[name], tensors[name].offset
        for e in range(RAW["num_local_experts"]):
            file, offset, length, tensor = initializers[f"{name}.{e}"]
            assert (file, offset) == (entry.file.name, reached)
            assert tuple(tensor.dims) == entry.shape[1:] and tensor.data_type == ONNX_TYPES[entry.dtype]
            assert 8 * length == np.prod(entry.shape[1:]) * ITEM_BITS[entry.dtype]
            reached += length
        assert reached == entry.offset + entry.nbytes
    assert len(initializers) - 4 * RAW["num_local_experts"] == result.tensors - 4
    calls = onnx.load(model / "model.onnx", load_external_data=False).graph.node
    assert {node.op_type for node in calls if node.name == "model.layers.3"} & {
        "Llama4NopeMoeLayerSplit",
        "Llama4NopeMoeLayerSplitFp8OnFp8",
    }


# Random mixtures, written by hand.

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


@st.composite
def ways(draw: st.DrawFn, modelopt: bool = False) -> Way:
    form = draw(st.sampled_from(["plain", "tensor"] if modelopt else ["plain", "tensor", "channel", "group"]))
    scale = draw(st.sampled_from([torch.bfloat16, torch.float16, torch.float32]))
    shape = draw(st.sampled_from([(), (1,), (1, 1)])) if form == "tensor" else ()
    return Way(form, draw(st.sampled_from([8, 16])) if form == "group" else 0, scale, shape)


@st.composite
def checkpoints(draw: st.DrawFn) -> tuple[Handmade, int]:
    """Every module stored in a way of its own, every layer's experts in a layout of its own."""
    raw = draw(st.sampled_from([RAW, OTHER]))
    modelopt = draw(st.booleans())
    seed = draw(st.integers(0, 2**16))
    kinds = [torch.float32, torch.float16, torch.bfloat16]
    weights = {name: w.to(draw(st.sampled_from(kinds))) for name, w in random_weights(parsed(raw), seed).items()}
    layouts = [draw(st.sampled_from(["fused", "linear"])) for _ in range(raw["num_hidden_layers"])]
    for name in weights:  # experts of a layer are of one type
        if name.endswith("experts.down_proj"):
            weights[name] = weights[name].to(weights[name.replace("down_proj", "gate_up_proj")].dtype)

    def way(module: str) -> Way:
        fused = module.endswith(".experts") and layouts[int(module.split(".")[2])] == "fused"
        return draw(ways(modelopt or fused))

    made = handmade(raw, weights, way, layouts.__getitem__)
    if modelopt:
        return declare_modelopt(made), seed
    if all(one.form == "plain" for one in made.ways.values()):
        return made, seed
    return declare_compressed_tensors(made), seed


@settings(max_examples=8)
@given(checkpoints())
def test_mixtures(drawn: tuple[Handmade, int]) -> None:
    made, seed = drawn
    raw = {key: value for key, value in made.raw.items() if key != "quantization_config"}
    ids = np.random.default_rng(seed).integers(0, raw["vocab_size"], size=(2, 19))
    model = Reference(raw, made.values)
    expected = model.logits(ids)
    assume(model.margin > ROUTER_MARGIN)
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        if seed % 2:
            largest = max(value.numel() for name, value in made.values.items() if ".experts." in name)
            patch.setattr(weights_module, "LARGEST_TENSOR", largest - 1)
        checkpoint = made.write(Path(folder) / "checkpoint")
        export(checkpoint, Path(folder) / "model", check_values=True)
        got = logits(Path(folder) / "model" / "model.onnx", raw, ids)
    assert largest_difference(got, expected) <= MODEL_MAX_ABS
