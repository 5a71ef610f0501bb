"""Our model in eager PyTorch against transformers, over many shapes and ways to run it."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import assume, given, settings

from shuntyard.exporter.model import Llama4
from tests import driver
from tests.checkpoints import parsed, random_weights, raw_config
from tests.parity.cases import Case, cases
from tests.parity.reference import Reference, largest_difference
from tests.tolerances import MODEL_MAX_ABS, ROUTER_MARGIN


@settings(max_examples=250)
@given(cases())
def test_parity(case: Case) -> None:
    config = parsed(case.raw)
    weights = random_weights(config, case.seed)
    reference = Reference(case.raw, weights)
    expected = reference.logits(case.ids, case.lengths)
    assume(reference.margin > ROUTER_MARGIN)
    step, cache = driver.eager(Llama4(config, weights), len(case.ids), case.ids.shape[1])
    got = driver.run(step, cache, case.ids, case.chunk, case.lengths, case.cuts, case.decode_from)
    assert largest_difference(got, expected) <= MODEL_MAX_ABS


def test_configuration_that_transformers_writes_is_read_alike() -> None:
    """The completed lists are the same, whatever was left out."""
    every: list[dict[str, Any]] = [{}, {"moe_layers": []}, {"no_rope_layers": []}, {"interleave_moe_layer_step": 3}]
    for changes in every:
        raw = raw_config(**changes)
        theirs = Reference(raw, random_weights(parsed(raw))).model.config
        ours = parsed(theirs.to_dict() | {"model_type": "llama4_text"})
        assert ours == parsed(raw)
        assert list(ours.moe_layers) == theirs.moe_layers
        assert list(ours.no_rope_layers) == theirs.no_rope_layers


def test_padding_beside_a_sequence_that_ended_in_an_earlier_chunk_does_harm() -> None:
    """Why the driver leaves ended sequences out: the padding of a later chunk overwrites their cache rows."""
    raw = raw_config()
    config = parsed(raw)
    step, cache = driver.eager(Llama4(config, random_weights(config)), 1, 32)
    ids = np.arange(16, dtype=np.int64)[None]
    _, kept = step(ids[:, :5], np.arange(5)[None], cache)
    right, _ = step(ids[:, 5:6], np.asarray([[5]]), kept)
    _, in_chunk = step(ids[:, 9:11], np.arange(6, 8)[None], kept)  # padding within the chunk
    harmless, _ = step(ids[:, 5:6], np.asarray([[5]]), in_chunk)
    _, past_edge = step(ids[:, 9:11], np.arange(8, 10)[None], kept)
    harmed, _ = step(ids[:, 5:6], np.asarray([[5]]), past_edge)
    assert largest_difference(harmless, right) == 0
    assert largest_difference(harmed, right) > MODEL_MAX_ABS
