"""``config.json``: what is read, and what is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shuntyard.errors import CheckpointError, ShuntyardError, UnsupportedError
from shuntyard.exporter.config import Llama4Config, parse_config
from shuntyard.exporter.config_file import load_config_file
from tests.checkpoints import LLAMA3_ROPE, parsed, raw_config

DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 10000.0}


def refusal(raw: dict[str, Any]) -> ShuntyardError:
    """The error, which must name the file, fit a line and have a hint."""
    with pytest.raises((UnsupportedError, CheckpointError)) as refused:
        parse_config(raw, Path("dir/config.json"))
    error = refused.value
    assert error.message.startswith("dir/config.json: ")
    assert "\n" not in error.message and len(error.message) < 300
    assert error.hint
    return error


UNSUPPORTED: dict[str, tuple[dict[str, Any], str, str]] = {
    "dense Llama": ({"model_type": "llama"}, "model_type 'llama' is not supported", "Llama 4"),
    "no model type": ({"model_type": ...}, "model_type None is not supported", "llama4_text"),
    "nested": ({"model_type": "llama4"}, "model_type 'llama4' is not supported", "text_config"),
    "unknown key": ({"sliding_window": 5}, "config key 'sliding_window' is not understood", "could change"),
    "many unknown keys": ({f"k{i}": 0 for i in range(999)}, "config key 'k0' is not understood (nor", "could change"),
    "encoder": ({"is_encoder_decoder": True}, "is_encoder_decoder is true", "decoder"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act: Input should be 'silu', got 'gelu'", "no other"),
    "rope type": ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope type 'yarn'", "llama3"),
    "old rope type": ({"rope_parameters": ..., "rope_scaling": {"type": "linear"}}, "rope type 'linear'", "llama3"),
    "rope type of another kind": ({"rope_parameters": {"rope_type": ["default"]}}, "rope type ['default']", "llama3"),
    "unknown rope key": ({"rope_parameters": {**DEFAULT_ROPE, "beta_fast": 1}}, "rope.beta_fast", "no other"),
    "rope per layer type": ({"rope_parameters": {"full_attention": DEFAULT_ROPE}}, "rope.full_attention", "no other"),
    "a RoPE layer that sees everything": (
        {"layer_types": ["full_attention"] * 4},
        "layer_types[0] is 'full_attention', but no_rope_layers and attention_chunk_size make layer 0 'chunked",
        "NoPE layer to everything",
    ),
    "no_rope_layers beyond 0 and 1": ({"no_rope_layers": [1, 1, 2, 0]}, "no_rope_layers.2: Input should be 0", "no"),
    "nested no_rope_layers": ({"no_rope_layers": [[1], 1, 1, 0]}, "no_rope_layers.0", "no other"),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported(name: str) -> None:
    changes, message, hint = UNSUPPORTED[name]
    error = refusal(raw_config(**changes))
    assert isinstance(error, UnsupportedError)
    assert message in error.message
    assert hint in str(error.hint)


BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "missing size": ({"hidden_size": ...}, "hidden_size: Field required"),
    "missing chunk size": ({"attention_chunk_size": ...}, "attention_chunk_size: Field required"),
    "missing layers": ({"num_hidden_layers": ...}, "num_hidden_layers is None, must be an integer in 1..4096"),
    "layers past reason": ({"num_hidden_layers": 10**12}, "num_hidden_layers is 1000000000000, must be"),
    "astronomic number": ({"vocab_size": 10**5000}, "vocab_size: Input should be less than 2147483648, got an integer"),
    "astronomic layers": ({"num_hidden_layers": 10**5000}, "num_hidden_layers is an integer of more than 20 digits"),
    "zero": ({"hidden_size": 0}, "hidden_size: Input should be greater than 0, got 0"),
    "bool for a size": ({"hidden_size": True}, "hidden_size: Input should be a valid integer, got True"),
    "float for a size": ({"hidden_size": 32.0}, "hidden_size: Input should be a valid integer, got 32.0"),
    "string for a size": ({"hidden_size": "32"}, "hidden_size: Input should be a valid integer, got '32'"),
    "bool for a number": ({"rms_norm_eps": True}, "rms_norm_eps: Input should be a valid number, got True"),
    "string for a number": ({"rms_norm_eps": "1e-5"}, "rms_norm_eps: Input should be a valid number, got '1e-5'"),
    "infinite": ({"rms_norm_eps": float("inf")}, "rms_norm_eps: Input should be a finite number, got inf"),
    "not a number": ({"attn_scale": float("nan")}, "attn_scale: Input should be"),
    "negative": ({"floor_scale": -1}, "floor_scale: Input should be greater than 0, got -1"),
    "string for a flag": ({"use_qk_norm": "false"}, "use_qk_norm: Input should be a valid boolean, got 'false'"),
    "string for tying": ({"tie_word_embeddings": "no"}, "tie_word_embeddings: Input should be a valid boolean"),
    "too many experts a token": ({"num_experts_per_tok": 5}, "num_experts_per_tok is larger than num_local_experts"),
    "heads": ({"num_key_value_heads": 3}, "num_attention_heads must be a multiple of num_key_value_heads"),
    "odd head": ({"head_dim": 7}, "head_dim is 7"),
    "moe twice": ({"moe_layers": [1, 1]}, "moe_layers names a layer twice"),
    "moe outside": ({"moe_layers": [4]}, "moe_layers names a layer outside 0..3"),
    "moe negative": ({"moe_layers": [-1]}, "moe_layers.0: Input should be greater than or equal to 0, got -1"),
    "moe float": ({"moe_layers": [1.0]}, "moe_layers.0: Input should be a valid integer, got 1.0"),
    "moe bool": ({"moe_layers": [True]}, "moe_layers.0: Input should be a valid integer, got True"),
    "moe no list": ({"moe_layers": 1}, "moe_layers is 1, must be a list"),
    "nope no list": ({"no_rope_layers": {"0": 1}}, "no_rope_layers is {'0': 1}, must be a list"),
    "nope too short": ({"no_rope_layers": [1, 0]}, "no_rope_layers has 2 entries for 4 layers"),
    "interval zero": ({"no_rope_layer_interval": 0}, "no_rope_layer_interval is 0, must be an integer"),
    "interval bool": ({"no_rope_layer_interval": True}, "no_rope_layer_interval is True, must be an integer"),
    "step null": ({"interleave_moe_layer_step": None}, "interleave_moe_layer_step is None, must be an integer"),
    "layer types no list": ({"layer_types": 5}, "layer_types must be a list of 4 entries, got 5"),
    "layer types too long": ({"layer_types": ["chunked_attention"] * 5}, "layer_types must be a list of 4 entries"),
    "rope no object": ({"rope_parameters": [1]}, "rope_parameters / rope_scaling must be an object"),
    "rope false": ({"rope_parameters": False}, "rope_parameters / rope_scaling must be an object"),
    "rope twice": ({"rope_scaling": LLAMA3_ROPE}, "has both rope_parameters and rope_scaling"),
    "theta twice": ({"rope_theta": 5.0}, "rope_theta and rope_parameters.rope_theta differ"),
    "theta below 1": ({"rope_parameters": {"rope_theta": 1e-300}}, "rope.rope_theta: Input should be greater than"),
    "rope names differ": (
        {"rope_parameters": {**LLAMA3_ROPE, "type": "linear"}},
        "type 'linear' and rope_type 'llama3'",
    ),
    "default with a factor": ({"rope_parameters": {"factor": 2.0}}, "rope: rope type default takes no factor"),
    "list for a size": ({"hidden_size": [[0] * 999]}, "hidden_size: Input should be a valid integer, got [[0, 0"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken(name: str) -> None:
    changes, message = BROKEN[name]
    error = refusal(raw_config(**changes))
    assert isinstance(error, CheckpointError)
    assert message in error.message


@pytest.mark.parametrize("left_out", [key for key in LLAMA3_ROPE if key not in ("rope_type", "rope_theta")])
def test_incomplete_llama3_rope(left_out: str) -> None:
    section = {key: value for key, value in LLAMA3_ROPE.items() if key != left_out}
    assert f"rope type llama3 needs {left_out}" in refusal(raw_config(rope_parameters=section)).message


JSON_SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
JSON_VALUES = st.recursive(
    JSON_SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)
KEYS = sorted(set(raw_config()) | {"moe_layers", "no_rope_layers", "layer_types", "rope_scaling", "rope_theta", "x"})


@settings(max_examples=300)
@given(st.dictionaries(st.sampled_from(KEYS), JSON_VALUES, min_size=1, max_size=2))
def test_any_value_is_read_or_refused_in_one_line(changes: dict[str, Any]) -> None:
    """Whatever stands in config.json, never another exception."""
    raw = raw_config() | changes
    try:
        parse_config(raw, Path("dir/config.json"))
    except ShuntyardError:
        refusal(raw)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"{", "is no valid JSON: "),
        (b"", "is no valid JSON: "),
        (b"[" * 200_000, "is no valid JSON: it is nested too deeply"),
        (b'{"a":' * 200_000, "is no valid JSON: it is nested too deeply"),
        (b"[]", "must hold a JSON object"),
        (b'{"a": 1, "a": 2}', "is no valid JSON: key 'a' stands there twice"),
        (b'{"a": NaN}', "is no valid JSON: NaN is no JSON number"),
        (b'{"a": "\xff"}', "is no valid JSON: 'utf-8' codec"),
        (b'{"\\ud800": 1}', "is no valid JSON: 'utf-8' codec"),
        ('{"a": 1}'.encode("utf-16"), "is no valid JSON: 'utf-8' codec"),
        (b'{"a": ' + b"9" * 5000 + b"}", "is no valid JSON: Exceeds the limit"),
    ],
    ids=["cut", "empty", "lists", "objects", "list", "twice", "NaN", "not UTF-8", "surrogate", "UTF-16", "digits"],
)
def test_file_that_is_no_json(text: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(text)
    with pytest.raises(CheckpointError) as refused:
        load_config_file(path)
    assert f"{path}: {message}" in refused.value.message
    assert "\n" not in refused.value.message
    assert refused.value.hint


def test_infinite_numbers_in_the_file(tmp_path: Path) -> None:
    """1e400 is JSON, but no float64."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps(raw_config()).replace("1e-05", "1e400"))
    with pytest.raises(CheckpointError, match="rms_norm_eps: Input should be a finite number, got inf"):
        load_config_file(path)


def test_missing_file_and_directory(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="config.json: no such file"):
        load_config_file(tmp_path / "config.json")
    with pytest.raises(CheckpointError, match="cannot be read: Is a directory"):
        load_config_file(tmp_path)


def test_old_and_new_spelling_of_rope_are_alike() -> None:
    section = {key: value for key, value in LLAMA3_ROPE.items() if key != "rope_theta"}
    old_type = {"type" if key == "rope_type" else key: value for key, value in section.items()}
    for spelling in (
        {"rope_parameters": ..., "rope_theta": 10000.0, "rope_scaling": section},
        {"rope_parameters": ..., "rope_theta": 10000.0, "rope_scaling": old_type},
        {"rope_theta": 10000.0},
        {"rope_scaling": None},
    ):
        assert parsed(raw_config(**spelling)).rope == parsed(raw_config()).rope


def test_keys_of_training_and_tooling_are_passed_over() -> None:
    extra = {"torch_dtype": "bfloat16", "router_jitter_noise": 0.5, "transformers_version": "5", "use_cache": False}
    assert parsed(raw_config(**extra)) == parsed(raw_config())


def test_old_integer_flag() -> None:
    """Early configurations write 4 for a flag; transformers took it as true."""
    assert parsed(raw_config(attn_temperature_tuning=4)).attn_temperature_tuning is True
    assert parsed(raw_config(attn_temperature_tuning=0)).attn_temperature_tuning is False


def test_cache_rows() -> None:
    config: Llama4Config = parsed(raw_config())
    assert [config.cache_rows(i, 100) for i in range(4)] == [8, 8, 8, 100]
    assert [config.cache_rows(i, 5) for i in range(4)] == [5, 5, 5, 5]
