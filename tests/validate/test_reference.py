"""The reference is transformers, with rotary angles that stay right at long positions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import Llama4TextConfig
from transformers.models.llama4.modeling_llama4 import Llama4TextRotaryEmbedding

from shuntyard.errors import CheckpointError
from shuntyard.exporter.config import Rope
from shuntyard.exporter.config_file import load_config_file
from shuntyard.validate.demo import miniature
from shuntyard.validate.reference import Reference, exact_rotation
from tests.checkpoints import parsed, raw_config
from tests.conftest import Worded


def test_rotation_is_transformers_own_where_that_is_good() -> None:
    raw = raw_config(head_dim=128, rope_parameters={"rope_type": "default", "rope_theta": 500000.0})
    theirs = Llama4TextRotaryEmbedding(Llama4TextConfig(**raw))
    ours = exact_rotation(parsed(raw).rope.inverse_frequencies(raw["head_dim"]))
    places = torch.arange(64)[None]
    assert (theirs(torch.zeros(1), places) - ours(torch.zeros(1), places)).abs().max() < 1e-5
    far = torch.tensor([[10_000_000, 10_000_001]])
    drift = (theirs(torch.zeros(1), far) - ours(torch.zeros(1), far)).abs().max()
    assert drift > 0.1


def test_frequencies_that_transformers_does_not_share_are_refused(
    worded: Worded, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = Rope.inverse_frequencies
    monkeypatch.setattr(Rope, "inverse_frequencies", lambda self, dim: right(self, dim) * 1.001)
    with pytest.raises(CheckpointError, match="rotary frequencies are not shuntyard's"):
        Reference(worded.checkpoint)


def test_generation_continues_what_logits_say() -> None:
    reference, config = Reference(miniature()), load_config_file(miniature() / "config.json").text
    prompt = [0, 100, 200, 300]
    new = reference.generate(prompt, 70)  # over a chunk's edge
    assert config.attention_chunk_size is not None
    assert len(prompt) + len(new) > config.attention_chunk_size
    logits = reference.logits(np.array([prompt + new]))[0]
    assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == new
