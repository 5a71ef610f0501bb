"""Fused experts of more elements than a runtime counts: cut between experts, the same bytes of the same file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from safetensors.torch import load_file

from shuntyard.exporter import split as split_module
from shuntyard.exporter.export import ExportResult, export
from shuntyard.exporter.graph import retarget
from shuntyard.exporter.safetensors_header import ITEM_BITS, read_values
from shuntyard.exporter.split import cut_large
from shuntyard.exporter.values import check_finite
from tests import formats
from tests.exporter.exported import GATE_UP, ONNX_TYPES, RAW, WEIGHTS, by_hand, entries, logits, places, reference
from tests.exporter.handmade import CHANNEL, PLAIN, TENSOR, Way, data, declare_modelopt
from tests.exporter.spoiling import EXPERTS, FORMS, match, sound
from tests.exporter.spoiling import RAW as SMALL
from tests.parity.reference import largest_difference
from tests.tolerances import MODEL_MAX_ABS


@pytest.mark.parametrize("form", ["plain, fused", "modelopt"])
def test_split_is_the_same_bytes(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = FORMS[form]()
    whole = match(made, tmp_path)
    largest = max(value.numel() for name, value in made.values.items() if ".experts." in name)
    monkeypatch.setattr(split_module, "LARGEST_TENSOR", largest)
    assert cut_large(whole) == whole
    monkeypatch.setattr(split_module, "LARGEST_TENSOR", largest - 1)
    split = cut_large(whole)
    experts, count = split.experts[1], SMALL["num_local_experts"]
    assert experts.form.layout == "split" and len(experts.parts) == 2 * count
    tensors = load_file(tmp_path / "checkpoint" / "model.safetensors")
    for i, stored in enumerate(experts.parts):
        tensor = tensors[f"{EXPERTS}.{('gate_up_proj', 'down_proj')[i // count]}"][i % count]
        assert read_values(stored.entry).tobytes() == data(tensor)
        assert stored.entry.shape == tuple(tensor.shape)
        assert stored.scale == whole.experts[1].parts[i // count].scale
    assert split.parameters == whole.parameters and split.tensors == whole.tensors
    assert split.linears == whole.linears and split.waived == whole.waived
    check_finite(split)


def test_linear_experts_are_not_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(split_module, "LARGEST_TENSOR", 1)
    assert cut_large(match(sound(CHANNEL), tmp_path)).experts[1].form.layout == "linear"


def test_the_largest_tensor_is_the_largest_that_tensorrt_counts() -> None:
    assert split_module.LARGEST_TENSOR == 2**31 - 1


@pytest.mark.parametrize("way", [PLAIN, TENSOR], ids=["bf16", "FP8"])
def test_split_experts_compute_the_same(way: Way, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = by_hand(way, lambda name: False, "fused")
    made = made if way == PLAIN else declare_modelopt(made)
    checkpoint = made.write(tmp_path / "checkpoint")
    export(checkpoint, tmp_path / "whole")
    monkeypatch.setattr(split_module, "LARGEST_TENSOR", made.values[GATE_UP].numel() - 1)
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
    pytest.importorskip("modelopt.torch.quantization")
    checkpoint = formats.write_modelopt_fp8(tmp_path / "checkpoint", RAW, WEIGHTS, kv=True, nested=True)
    monkeypatch.setattr(split_module, "LARGEST_TENSOR", WEIGHTS[GATE_UP].numel() - 1)
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
