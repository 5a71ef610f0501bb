"""What ``docs/semantics.md`` says, claim by claim: we against transformers and against Meta's code, read anew.

The claims about single roundings are in ``test_roundings.py``.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from transformers import Llama4Config, Llama4TextConfig
from transformers.models.llama4 import modeling_llama4 as theirs

from shuntyard.engines.inspect import checkpoint_facts
from shuntyard.exporter import model
from shuntyard.exporter.checkpoint import open_checkpoint
from shuntyard.exporter.config import parse_config
from shuntyard.exporter.config_file import parse_config_file
from shuntyard.exporter.model import Llama4, RotaryTable, Weights
from tests import driver
from tests.checkpoints import parsed, random_weights, raw_config, write_checkpoint
from tests.parity import meta_reference
from tests.parity.meta_reference import MetaLlama4, args_of
from tests.parity.reference import Reference, largest_difference
from tests.tolerances import MISTAKE_MIN_ABS, MODEL_MAX_ABS, ROUTER_MARGIN

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]

IDS = np.random.default_rng(0).integers(0, 64, size=(2, 24))
DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 500000.0}
SCOUT_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 16.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
}
STALE_ROPE = SCOUT_ROPE | {"factor": 8.0, "high_freq_factor": 4.0}

RELEASED: dict[str, dict[str, Any]] = {
    "Scout": {"interleave_moe_layer_step": 1, "num_experts_per_tok": 1, "rope_parameters": SCOUT_ROPE},
    "Maverick": {"use_qk_norm": False, "num_experts_per_tok": 1, "rope_parameters": DEFAULT_ROPE},
    "dense, all RoPE, no chunks": {
        "moe_layers": [],
        "attention_chunk_size": None,
        "no_rope_layer_interval": 5,
        "rope_parameters": DEFAULT_ROPE,
    },
}
"""What Meta has published, made small: chunks of 8 tokens, a temperature step every 4."""


def ours(raw: dict[str, Any], weights: Weights, ids: Ints = IDS, **options: Any) -> Floats:
    """Our logits, prefilled chunk by chunk."""
    config = parsed(raw)
    step, cache = driver.eager(Llama4(config, weights), *ids.shape)
    return driver.run(step, cache, ids, config.attention_chunk_size, **options)


def by_transformers(raw: dict[str, Any], weights: dict[str, Tensor], ids: Ints = IDS) -> Floats:
    """Its logits in one pass, where the experts are not in doubt."""
    reference = Reference(raw, weights)
    out = reference.logits(ids)
    assert reference.margin > ROUTER_MARGIN
    return out


def meta_model(raw: dict[str, Any], weights: dict[str, Tensor]) -> MetaLlama4:
    return MetaLlama4(args_of(raw), meta_reference.stored(weights, args_of(raw)))


def by_meta(raw: dict[str, Any], weights: dict[str, Tensor], ids: Ints = IDS, decode_from: int | None = None) -> Floats:
    """Its logits, prefilled at once and decoded token by token."""
    meta, tokens, length = meta_model(raw, weights), torch.from_numpy(ids), ids.shape[1]
    first = length if decode_from is None else decode_from
    with torch.no_grad():
        pieces = [meta(tokens[:, :first]), *(meta(tokens[:, i : i + 1], i) for i in range(first, length))]
    out: Floats = torch.cat(pieces, 1).numpy()
    return out


# -- the whole model


@pytest.mark.parametrize("name", RELEASED)
def test_all_three_agree(name: str) -> None:
    """Three chunks and six temperature steps: Meta's prefill, transformers' prefill, our prefill and decoding."""
    raw = raw_config(num_hidden_layers=8, **RELEASED[name])
    weights = random_weights(parsed(raw), seed=1)
    expected = by_transformers(raw, weights)
    assert largest_difference(by_meta(raw, weights), expected) <= MODEL_MAX_ABS
    assert largest_difference(ours(raw, weights, decode_from=12), expected) <= MODEL_MAX_ABS


BIASED, OTHER_HEAD = {"attention_bias": True}, torch.randn(64, 32, generator=torch.Generator().manual_seed(1))
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "attention bias": (BIASED, {"attention_bias": False}),
    "tied": ({"tie_word_embeddings": True}, {"tie_word_embeddings": False}),
    "untied": ({}, {"tie_word_embeddings": True}),
    "layers given as lists": (
        {"no_rope_layers": [0, 1, 1, 0], "moe_layers": [0, 3]},
        {"no_rope_layers": ...},
    ),
    "NoPE everywhere": ({"no_rope_layers": [0, 0, 0, 0]}, {"no_rope_layers": [1, 1, 1, 1]}),
    "NoPE nowhere": ({"no_rope_layer_interval": 5}, {"no_rope_layer_interval": 4}),
    "no chunks": ({"attention_chunk_size": None}, {"attention_chunk_size": 8}),
    "a chunk longer than the text": ({"attention_chunk_size": 100}, {"attention_chunk_size": 8}),
    "chunks of one token": ({"attention_chunk_size": 1}, {"attention_chunk_size": 2}),
    "Maverick has no QK norm": (RELEASED["Maverick"], {"use_qk_norm": True}),
    "an eps that matters": ({"rms_norm_eps": 0.1}, {"rms_norm_eps": 1e-5}),
    "no temperature": ({"attn_temperature_tuning": False}, {"attn_temperature_tuning": True}),
}
"""A configuration, and what must not pass for it with the same weights."""


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_are_transformers(name: str) -> None:
    changes, mistake = VARIANTS[name]
    raw = raw_config(**changes)
    weights = random_weights(parsed(raw), seed=2)
    expected = by_transformers(raw, weights)
    assert largest_difference(ours(raw, weights, decode_from=12), expected) <= MODEL_MAX_ABS
    wrong = raw_config(**(changes | mistake))
    assert parsed(wrong) != parsed(raw)
    assert largest_difference(ours(wrong, {"lm_head.weight": OTHER_HEAD} | weights), expected) > MISTAKE_MIN_ABS


# -- configurations


def test_layers_by_interval_are_meta_s_and_transformers() -> None:
    for layers, step, interval in itertools.product([1, 4, 9], [1, 2, 3], [1, 2, 4, 50]):
        raw = raw_config(
            num_hidden_layers=layers,
            interleave_moe_layer_step=step,
            no_rope_layer_interval=interval,
            rope_parameters=DEFAULT_ROPE,
        )
        config, meta, other = parsed(raw), args_of(raw), Llama4TextConfig(**raw)
        assert list(config.moe_layers) == [i for i in range(layers) if meta.is_moe(i)] == other.moe_layers
        rope = [int(not meta.is_nope(i)) for i in range(layers)]
        assert list(config.no_rope_layers) == rope == other.no_rope_layers


OPTIONAL = (
    "attention_bias",
    "attn_scale",
    "attn_temperature_tuning",
    "floor_scale",
    "hidden_act",
    "interleave_moe_layer_step",
    "no_rope_layer_interval",
    "rope_parameters",
    "tie_word_embeddings",
    "use_qk_norm",
)


def test_what_is_left_out_is_as_in_transformers() -> None:
    """Which is not as in Meta's code: its temperature, QK norm and NoPE layers are off unless ``params.json`` asks."""
    raw = raw_config(**dict.fromkeys(OPTIONAL, ...))
    config, other = parsed(raw), Llama4TextConfig(**raw)
    for key in ("attention_bias", "attn_scale", "attn_temperature_tuning", "floor_scale", "hidden_act", "use_qk_norm"):
        assert getattr(config, key) == getattr(other, key), key
    assert config.tie_word_embeddings == other.tie_word_embeddings
    assert list(config.moe_layers) == other.moe_layers
    assert list(config.no_rope_layers) == other.no_rope_layers
    assert other.rope_parameters == {"rope_type": config.rope.rope_type, "rope_theta": config.rope.rope_theta}
    meta = meta_reference.MetaArgs(dim=32, n_layers=4, n_heads=4, n_kv_heads=2, num_experts=4)
    assert (config.attn_temperature_tuning, meta.attn_temperature_tuning) == (True, False)
    assert (config.use_qk_norm, meta.use_qk_norm) == (True, False)
    assert (config.uses_rope(3), meta.is_nope(3)) == (False, False)


@pytest.mark.parametrize("name", RELEASED)
def test_nested_is_flat(name: str) -> None:
    """The text model inside a model with a vision tower is the text model."""
    text = raw_config(**RELEASED[name])
    around = {"model_type": "llama4", "architectures": ["Llama4ForConditionalGeneration"], "image_token_index": 9}
    nested = parse_config_file({**around, "text_config": text, "vision_config": {}}, Path("config.json"))
    assert nested.text == parse_config(text, Path("config.json"))
    loaded = Llama4Config(text_config=text).get_text_config().to_dict()
    assert parse_config(loaded, Path("config.json")) == nested.text


# -- RoPE


def frequencies(rope: dict[str, Any], head_dim: int = 128) -> NDArray[np.float64]:
    return parsed(raw_config(rope_parameters=rope)).rope.inverse_frequencies(head_dim)


@pytest.mark.parametrize("rope", [SCOUT_ROPE, DEFAULT_ROPE], ids=["Scout", "Maverick"])
def test_frequencies_are_meta_s_and_transformers(rope: dict[str, Any]) -> None:
    """Of the heads that were released. The constants of Scout are those that Meta's code has by default."""
    exact = frequencies(rope)
    scaled = rope["rope_type"] == "llama3"
    meta = meta_reference.inverse_frequencies(128, rope["rope_theta"], scaled).numpy()
    other = theirs.Llama4TextRotaryEmbedding(Llama4TextConfig(**raw_config(head_dim=128, rope_parameters=rope)))
    for float32 in (meta, other.inv_freq.numpy()):
        assert np.abs(float32 / exact - 1).max() < 1e-6
    if scaled:
        assert np.abs(frequencies(STALE_ROPE) / exact - 1).max() > 0.9
        assert np.abs(frequencies(DEFAULT_ROPE) / exact - 1).max() > 10


def test_config_json_is_followed_even_if_stale() -> None:
    """8/4 is what an old converter wrote: transformers and we take the file's word, Meta's code its own."""
    stale, right = (rope | {"rope_theta": 2000.0} for rope in (STALE_ROPE, SCOUT_ROPE))
    raw = raw_config(hidden_size=128, head_dim=32, attention_chunk_size=512, rope_parameters=stale)
    ids = np.random.default_rng(0).integers(0, 64, size=(1, 300))
    weights = random_weights(parsed(raw), seed=3)
    got = ours(raw, weights, ids)
    assert largest_difference(got, by_transformers(raw, weights, ids)) <= MODEL_MAX_ABS
    assert largest_difference(got, by_meta(raw, weights, ids)) > MISTAKE_MIN_ABS
    corrected = ours(raw | {"rope_parameters": right}, weights, ids)
    assert largest_difference(corrected, by_meta(raw, weights, ids)) <= MODEL_MAX_ABS


@pytest.mark.parametrize(("rope", "factor"), [(SCOUT_ROPE, 16), (STALE_ROPE, 8)], ids=["right", "stale"])
def test_inspect_shows_a_stale_rope_section(rope: dict[str, Any], factor: int, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "checkpoint", raw_config(rope_parameters=rope))
    assert checkpoint_facts(open_checkpoint(path))["rope"].startswith(
        f"llama3, theta 500000, factor {factor}, low 1, high "
    )


def test_angles_of_both_references_are_float32() -> None:
    """Equal to the bit, and off by radians where ours are good to 2e-7 (``tests/exporter/test_rotary.py``)."""
    raw = raw_config(head_dim=128, rope_parameters=DEFAULT_ROPE, max_position_embeddings=10_485_760)
    places = torch.tensor([[0, 1, 8191, 8192, 1_000_003, 10_485_759]])
    rotation = theirs.Llama4TextRotaryEmbedding(Llama4TextConfig(**raw))(torch.zeros(1), places)[0]
    angles = torch.outer(places[0].float(), meta_reference.inverse_frequencies(128, 500000.0, scaled=False))
    assert torch.equal(rotation, torch.polar(torch.ones_like(angles), angles))
    exact = torch.from_numpy(places[0].numpy()[:, None] * frequencies(DEFAULT_ROPE))
    _, cos, sin = RotaryTable(parsed(raw | {"attention_chunk_size": None})).forward(places)
    assert (torch.complex(cos, sin)[0] - torch.polar(torch.ones_like(exact), exact)).abs().max() < 5e-7
    assert (rotation - torch.polar(torch.ones_like(exact), exact)).abs().max() > 0.1


def test_qk_norm_commutes_with_the_rotation() -> None:
    """So it does not matter that all three rotate first, up to rounding; without ``eps`` inside it would not be it."""
    x = torch.randn(2, 24, 4, 16, generator=torch.Generator().manual_seed(0))
    _, cos, sin = RotaryTable(parsed(raw_config(head_dim=16)))(torch.arange(24)[None].expand(2, -1))
    after = model.rms_norm(model.rotate(x, cos, sin), 0.1)
    assert (model.rotate(model.rms_norm(x, 0.1), cos, sin) - after).abs().max() < 2e-6
    assert (functional.normalize(model.rotate(x, cos, sin), dim=-1) * 4 - after).abs().max() > 1e-2


# -- decoding


def cached_transformers(raw: dict[str, Any], weights: dict[str, Tensor], ends: list[int]) -> Floats:
    """transformers with its own cache, in pieces that end at ``ends``."""
    reference, cache, out = Reference(raw, weights).model, None, []
    with torch.no_grad():
        for begin, end in itertools.pairwise([0, *ends]):
            piece = reference(torch.from_numpy(IDS[:, begin:end]), cache=cache, use_cache=True)
            cache = piece.cache
            out.append(piece.logits)
    return torch.cat(out, 1).numpy()


def test_decoding_past_a_chunk_s_edge() -> None:
    """Meta's code has no mask for one token, so a RoPE layer then sees what a chunk hides from it in a prefill."""
    raw = raw_config(num_hidden_layers=8, **RELEASED["Scout"])
    weights = random_weights(parsed(raw), seed=1)
    expected = by_transformers(raw, weights)
    one_by_one = [8, *range(9, 25)]
    assert largest_difference(cached_transformers(raw, weights, one_by_one), expected) <= MODEL_MAX_ABS
    assert largest_difference(ours(raw, weights, decode_from=8), expected) <= MODEL_MAX_ABS
    meta = by_meta(raw, weights, decode_from=8)
    assert largest_difference(meta[:, :8], expected[:, :8]) <= MODEL_MAX_ABS
    assert largest_difference(meta[:, 8:], expected[:, 8:]) > MISTAKE_MIN_ABS
    without = ours(raw | {"attention_chunk_size": None}, weights)
    assert largest_difference(meta, without) <= MODEL_MAX_ABS  # what it computes is a model without chunks


def test_prefill_in_pieces() -> None:
    """Meta's masks are of the call alone: a second piece does not fit the cache. transformers' and ours do."""
    raw = raw_config(num_hidden_layers=8, **RELEASED["Scout"])
    weights = random_weights(parsed(raw), seed=1)
    expected = by_transformers(raw, weights)
    assert largest_difference(cached_transformers(raw, weights, [5, 19, 24]), expected) <= MODEL_MAX_ABS
    assert largest_difference(ours(raw, weights, cuts=[5, 19]), expected) <= MODEL_MAX_ABS
    meta, tokens = meta_model(raw, weights), torch.from_numpy(IDS)
    meta(tokens[:, :5])
    with pytest.raises(RuntimeError, match="size"):
        meta(tokens[:, 5:19], 5)


# -- temperature


def test_temperature_is_meta_s_and_steps_at_the_floor() -> None:
    """``log(1 + n)`` against ``log1p(n)``: the same to float32, up to the last position of the longest context."""
    raw = raw_config(floor_scale=8192, attn_scale=0.1, rope_parameters=SCOUT_ROPE)
    edges = np.arange(1, 1281) * 8192
    places = np.unique([0, 1, *(edges - 2), *(edges - 1), *edges, 10_485_759])
    got = model.temperature(torch.from_numpy(places), parsed(raw)).numpy()
    exact = np.log1p((places + 1) // 8192) * 0.1 + 1
    assert np.abs(got / exact - 1).max() < 3e-7
    np.testing.assert_array_equal(got, meta_reference.temperature(torch.from_numpy(places), args_of(raw)).numpy())
    assert got[places == 8190] == 1 < got[places == 8191]


@pytest.mark.parametrize("tuned", [True, False])
def test_left_padding(tuned: bool) -> None:
    """transformers counts padding before a text as positions of the temperature, and of nothing else.

    We have no left padding: sequences of a batch start together, and each gets what it gets when run alone.
    """
    raw = raw_config(num_hidden_layers=8, attn_temperature_tuning=tuned)
    weights = random_weights(parsed(raw), seed=1)
    reference, lengths = Reference(raw, weights), [24, 13]
    alone = reference.logits(IDS, lengths)
    assert reference.margin > ROUTER_MARGIN
    assert largest_difference(ours(raw, weights, lengths=lengths, decode_from=10), alone) <= MODEL_MAX_ABS
    tokens = torch.from_numpy(IDS.copy())
    tokens[1] = tokens[1].roll(24 - 13)
    mask = torch.ones_like(tokens)
    mask[1, : 24 - 13] = 0
    with torch.no_grad():  # as its generate() calls it
        padded = reference.model(tokens, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
    off = largest_difference(padded[1, 24 - 13 :].numpy(), alone[1, :13])
    assert off > MISTAKE_MIN_ABS if tuned else off <= MODEL_MAX_ABS


def test_temperature_in_bf16_stops_meta_s_code() -> None:
    """Its scale makes the query fp32, which fits no bf16 mask; transformers and we round it to bf16 again."""
    raw = raw_config(**RELEASED["Maverick"])
    weights = random_weights(parsed(raw), dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="dtype"):
        meta_model(raw, weights)(torch.from_numpy(IDS))
    meta_model(raw | {"attn_temperature_tuning": False}, weights)(torch.from_numpy(IDS))
    step, cache = driver.eager(Llama4(parsed(raw), weights, torch.bfloat16), *IDS.shape)
    assert np.isfinite(driver.run(step, cache, IDS, 8)).all()
