"""Checkpoints with a vision tower: the same model under a prefix, in a configuration within another."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from shuntyard.errors import UnsupportedError
from shuntyard.exporter.checkpoint import open_checkpoint
from shuntyard.exporter.export import export
from shuntyard.exporter.weights import match_weights
from tests.exporter.handmade import CHANNEL, PLAIN, Handmade
from tests.exporter.spoiling import (
    RAW,
    VISION,
    Q,
    Spoil,
    added,
    keys,
    match,
    nested,
    refusal,
    renamed,
    sound,
    text_keys,
    without,
)

PREFIX = "language_model."
W = f"{Q}.weight"


@pytest.mark.parametrize("prefix", [PREFIX, ""], ids=["prefix", "none"])
def test_the_same_model(prefix: str, tmp_path: Path) -> None:
    """With the prefix and, as NVIDIA's files, without."""
    plain = match(sound(CHANNEL), tmp_path / "text")
    checkpoint = open_checkpoint(nested(sound(CHANNEL), prefix).write(tmp_path / "nested"))
    weights = match_weights(checkpoint)
    assert sorted(entry.name for entry in checkpoint.vision) == sorted(VISION)
    assert weights.linears.keys() == plain.linears.keys() and weights.tensors == plain.tensors
    assert weights.waived == []
    assert weights.linears[W].entry.name == prefix + W


def test_a_vision_tower_needs_text_only(tmp_path: Path) -> None:
    path = nested(sound(CHANNEL)).write(tmp_path / "checkpoint")
    with pytest.raises(UnsupportedError, match=r"has a vision tower \(2 tensors, 'multi.*' first\)") as refused:
        export(path, tmp_path / "out")
    assert "--text-only" in refused.value.hint and str(path) in refused.value.message
    assert not (tmp_path / "out").exists()


def prefix_and_none(made: Handmade) -> None:
    made.tensors[W] = made.tensors[PREFIX + W].clone()


REFUSED: dict[str, tuple[Spoil, str]] = {
    "prefix and none": (prefix_and_none, f"tensor '{W}' is there twice, also as '{PREFIX}{W}'"),
    "prefix twice": (renamed(PREFIX, 2 * PREFIX), "'model.embed_tokens.weight' is missing (and"),
    "another prefix": (renamed(f"{PREFIX}model.", f"model.{PREFIX}"), "'model.embed_tokens.weight' is missing (and"),
    "vision under the prefix": (
        added(f"{PREFIX}vision_model.class_embedding", torch.ones(4)),
        f"tensor '{PREFIX}vision_model.class_embedding' is not understood",
    ),
    "vision by a similar name": (
        added("vision_tower.class_embedding", torch.ones(4)),
        "tensor 'vision_tower.class_embedding' is not understood",
    ),
    "vision by nothing but its name": (added("vision_model", torch.ones(4)), "tensor 'vision_model' is not understood"),
    "another projector": (
        added(f"{PREFIX}model.mm_projector.weight", torch.ones(4)),
        f"tensor '{PREFIX}model.mm_projector.weight' is not understood",
    ),
    "scale without weight": (without(PREFIX + W), f"tensor '{W}' is missing"),
    "weight without scale": (without(f"{PREFIX}{W}_scale"), f"tensor '{PREFIX}{W}' is F8_E4M3, but has no scale"),
    "tied at the top": (
        keys(tie_word_embeddings=True),
        "config.json: tie_word_embeddings is True at the top and False in text_config",
    ),
    "tied within": (
        lambda made: (keys(tie_word_embeddings=False)(made), text_keys(tie_word_embeddings=True)(made)),
        "config.json: tie_word_embeddings is False at the top and True in text_config",
    ),
    "tied, and a head": (text_keys(tie_word_embeddings=True), f"tensor '{PREFIX}lm_head.weight' is not understood"),
    "text_config missing": (lambda made: made.raw.pop("text_config"), "text_config is None, must be an object"),
    "text_config a list": (keys(text_config=[1]), "config.json: text_config is [1], must be an object"),
    "text keys at the top": (keys(num_hidden_layers=2), "config key 'num_hidden_layers' is not understood beside"),
    "unknown key at the top": (keys(audio_config={}), "config key 'audio_config' is not understood beside text_config"),
    "unknown key within": (text_keys(window=4), "config.json: text_config: config key 'window' is not understood"),
    "another text model": (text_keys(model_type="llama"), "json: text_config: model_type 'llama' is not supported"),
    "nested twice": (text_keys(model_type="llama4"), "json: text_config: model_type 'llama4' is not supported"),
    "key missing within": (
        lambda made: made.raw["text_config"].pop("hidden_size"),
        "config.json: text_config.hidden_size: Field required",
    ),
    "bad value within": (text_keys(hidden_act="gelu"), "text_config.hidden_act: Input should be 'silu', got"),
    "two declarations": (
        text_keys(quantization_config={"quant_method": "compressed-tensors"}),
        "config.json: quantization_config differs from text_config.quantization_config",
    ),
    "a declaration that is no object": (keys(quantization_config="fp8"), "quantization_config is 'fp8', must be an"),
    "an inner one that is no object": (text_keys(quantization_config=[]), "quantization_config is [], must be an"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, tmp_path: Path) -> None:
    spoil, message = REFUSED[case]
    made = nested(sound(CHANNEL))
    spoil(made)
    assert message in refusal(made, tmp_path).message


def test_the_declaration_may_lie_within(tmp_path: Path) -> None:
    """In either place or in both, where it is the same."""
    made = nested(sound(CHANNEL))
    made.raw["text_config"]["quantization_config"] = made.raw["quantization_config"]
    assert match(made, tmp_path / "both").linears[W].form == "channel"
    del made.raw["quantization_config"]
    assert match(made, tmp_path / "within").linears[W].form == "channel"


@pytest.mark.parametrize("tensors", ["", PREFIX], ids=["bare tensors", "prefixed tensors"])
@pytest.mark.parametrize("declared", ["", PREFIX], ids=["bare modules", "prefixed modules"])
def test_the_declaration_may_have_another_prefix(tensors: str, declared: str, tmp_path: Path) -> None:
    made = sound(CHANNEL)
    section = made.raw["quantization_config"]
    for names in (section["ignore"], section["config_groups"]["group_0"]["targets"]):
        names[:] = [declared + name for name in names]
    weights = match(nested(made, tensors), tmp_path)
    assert weights.linears[W].form == "channel" and weights.linears["lm_head.weight"].form == "none"


def test_tied_embeddings_where_both_say_so(tmp_path: Path) -> None:
    made = nested(sound(PLAIN))
    del made.tensors[f"{PREFIX}lm_head.weight"]
    made.raw["text_config"]["tie_word_embeddings"] = True
    assert "lm_head.weight" not in match(made, tmp_path / "within").linears
    made.raw["tie_word_embeddings"] = True
    assert "lm_head.weight" not in match(made, tmp_path / "both").linears


def test_a_model_type_that_is_not_repeated(tmp_path: Path) -> None:
    made = nested(sound(CHANNEL))
    del made.raw["text_config"]["model_type"]
    assert match(made, tmp_path).linears[W].form == "channel"


def test_a_text_config_in_a_text_model(tmp_path: Path) -> None:
    made = sound(PLAIN)
    made.raw["text_config"] = dict(RAW)
    assert "config key 'text_config' is not understood" in refusal(made, tmp_path).message
