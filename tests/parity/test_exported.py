"""The exported graph in ONNX Runtime against transformers."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from safetensors.torch import load_file

from shuntyard.exporter.export import export
from tests import driver
from tests.checkpoints import parsed, random_weights, raw_config, write_checkpoint
from tests.parity.cases import Case, cases
from tests.parity.reference import Reference, largest_difference
from tests.tolerances import MODEL_MAX_ABS, ROUTER_MARGIN


@settings(max_examples=8)
@given(cases())
def test_parity(case: Case) -> None:
    config = parsed(case.raw)
    weights = random_weights(config, case.seed)
    reference = Reference(case.raw, weights)
    expected = reference.logits(case.ids, case.lengths)
    assume(reference.margin > ROUTER_MARGIN)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = write_checkpoint(Path(folder) / "checkpoint", case.raw, weights, shards=2)
        export(checkpoint, Path(folder) / "out")
        session = driver.open_session(Path(folder) / "out" / "model.onnx")
    step, cache = driver.exported(session, config, len(case.ids), case.ids.shape[1])
    got = driver.run(step, cache, case.ids, case.chunk, case.lengths, case.cuts, case.decode_from)
    assert largest_difference(got, expected) <= MODEL_MAX_ABS


def test_checkpoint_that_transformers_saved(tmp_path: Path) -> None:
    """From ``save_pretrained`` in several shards; 8 layers, three chunks, ragged, then decoding."""
    raw = raw_config(num_hidden_layers=8)
    reference = Reference(raw, random_weights(parsed(raw), seed=5))
    reference.model.save_pretrained(tmp_path / "saved", max_shard_size="60KB")
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) > 2
    export(tmp_path / "saved", tmp_path / "out", check_values=True)
    ids, lengths = np.random.default_rng(0).integers(0, 64, size=(3, 22)), [22, 9, 17]
    expected = reference.logits(ids, lengths)
    assert reference.margin > ROUTER_MARGIN
    session = driver.open_session(tmp_path / "out" / "model.onnx")
    step, cache = driver.exported(session, parsed(raw), 3, 24)
    got = driver.run(step, cache, ids, 8, lengths, cuts=[3], decode_from=12)
    assert largest_difference(got, expected) <= MODEL_MAX_ABS


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_weights_in_half_precision_compute_in_fp32(stored: torch.dtype, tmp_path: Path) -> None:
    """Widening a weight is exact, so nothing of the tolerance may be used up by it."""
    raw = raw_config(num_hidden_layers=8)
    checkpoint = write_checkpoint(tmp_path / "half", raw, random_weights(parsed(raw), seed=5, dtype=stored))
    export(checkpoint, tmp_path / "out")
    weights = {name: tensor.float() for name, tensor in load_file(checkpoint / "model.safetensors").items()}
    reference = Reference(raw, weights)
    ids = np.random.default_rng(1).integers(0, 64, size=(2, 20))
    expected = reference.logits(ids)
    assert reference.margin > ROUTER_MARGIN
    step, cache = driver.exported(driver.open_session(tmp_path / "out" / "model.onnx"), parsed(raw), 2, 20)
    assert largest_difference(driver.run(step, cache, ids, 8, decode_from=18), expected) <= MODEL_MAX_ABS
