"""The reference from disk, a layer at a time, is the reference that has the whole model in memory."""

from __future__ import annotations

import gc
import json
import tempfile
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import DynamicCache
from transformers.models.llama4.modeling_llama4 import Llama4TextDecoderLayer

from shuntyard.errors import CheckpointError, EngineError
from shuntyard.exporter.config import Rope
from shuntyard.validate.demo import miniature
from shuntyard.validate.dequantise import DequantisedCheckpoint, dequantised_state
from shuntyard.validate.reference import LayeredReference, Reference
from shuntyard.validate.stack import Stack
from shuntyard.validate.values import Array, LayerValues, Tokens
from tests import formats
from tests.checkpoints import parsed, random_weights, raw_config, write_checkpoint
from tests.exporter.handmade import CHANNEL, PLAIN, TENSOR, Way, declare_compressed_tensors, handmade
from tests.parity.cases import models

RAW = raw_config(intermediate_size=32, intermediate_size_mlp=48)


def run(stack: Stack, sequences: Sequence[Tokens]) -> tuple[list[list[LayerValues]], list[Array]]:
    """A free run: values by layer and sequence, and logits by sequence."""
    hidden = list(stack.embed(sequences))
    layers = []
    for i in range(stack.config.num_hidden_layers):
        layers.append(list(stack.layer(i, hidden)))
        hidden = [values.hidden for values in layers[-1]]
    return layers, list(stack.head(hidden))


def some_tokens(raw: dict[str, Any], lengths: Sequence[int], seed: int = 0) -> list[Tokens]:
    random = np.random.default_rng(seed)
    return [random.integers(0, raw["vocab_size"], length) for length in lengths]


def assert_the_same(checkpoint: Path, sequences: Sequence[Tokens]) -> None:
    _, logits = run(LayeredReference(checkpoint), sequences)
    whole = Reference(checkpoint)
    for tokens, ours in zip(sequences, logits, strict=True):
        theirs = whole.logits(tokens[None])[0]
        assert ours.dtype == np.float32 and ours.shape == theirs.shape
        # The same products in the same order: they may be blocked otherwise, by where they lie in memory.
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6 * np.abs(theirs).max())


@settings(max_examples=30)
@given(models(), st.integers(0, 2**16), st.lists(st.integers(1, 40), min_size=1, max_size=3))
def test_is_the_whole_model(raw: dict[str, Any], seed: int, lengths: list[int]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = write_checkpoint(Path(folder) / "checkpoint", raw, seed=seed)
        assert_the_same(checkpoint, some_tokens(raw, lengths, seed))


@settings(max_examples=15)
@given(models(), st.integers(0, 2**16))
def test_values_are_those_of_a_run_with_a_cache(raw: dict[str, Any], seed: int) -> None:
    """Keys as transformers caches them, but rotated within the chunk; modules as hooks on the whole model see them."""
    (tokens,) = some_tokens(raw, [3 * (raw["attention_chunk_size"] or 8) - 1], seed)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = write_checkpoint(Path(folder) / "checkpoint", raw, seed=seed)
        stack, model = LayeredReference(checkpoint), Reference(checkpoint)._model
        layers, _ = run(stack, [tokens])
    cache = DynamicCache()  # without the configuration it keeps every token
    seen: dict[str, torch.Tensor] = {}
    for name, part in model.model.layers.named_modules():
        note(part, name, seen)
    with torch.no_grad():
        model(torch.from_numpy(tokens)[None], cache=cache, use_cache=True)
    config, chunk = parsed(raw), raw["attention_chunk_size"]
    frequencies = config.rope.inverse_frequencies(config.head_dim)
    places = np.arange(len(tokens))
    for i, (values,) in enumerate(layers):
        kept: Any = cache.layers[i]
        key, value = (each[0].transpose(0, 1).double().numpy() for each in (kept.keys, kept.values))
        np.testing.assert_allclose(values.value, value, rtol=1e-6, atol=1e-6 * np.abs(value).max())
        if config.uses_rope(i) and chunk is not None:
            key = turned(key, -(places // chunk * chunk)[:, None] * frequencies)
        np.testing.assert_allclose(values.key, key, rtol=0, atol=1e-6 * np.abs(key).max())
        modules: dict[str, Array | None] = {
            "self_attn": values.attention,
            "feed_forward": values.feed_forward,
            "": values.hidden,
        }
        if config.is_moe(i):
            modules |= {"feed_forward.router": values.router, "feed_forward.shared_expert": values.shared}
        for name, ours in modules.items():
            theirs = seen[f"{i}.{name}".rstrip(".")].numpy()
            assert ours is not None
            np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6 * np.abs(theirs).max(), err_msg=f"{i} {name}")
        assert (values.router is None) == (values.shared is None) == (not config.is_moe(i))


def note(part: torch.nn.Module, name: str, seen: dict[str, torch.Tensor]) -> None:
    def hook(_part: Any, _inputs: Any, out: Any) -> None:
        if isinstance(out, tuple):
            out = out[1] if name.endswith("router") else out[0]
        seen[name] = out.reshape(-1, out.shape[-1]).clone()  # the shared expert's is written to later

    part.register_forward_hook(hook)


def turned(keys: Array, angles: Array) -> Array:
    """``[S, G, D]``, pairs turned by ``[S, D/2]``."""
    even, odd = keys[..., 0::2], keys[..., 1::2]
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    return np.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1).reshape(keys.shape)


def test_keys_far_out_are_those_of_the_chunk() -> None:
    """The same hidden states in every chunk give the same keys in each."""
    raw = raw_config(num_hidden_layers=1, attention_chunk_size=4, rope_parameters={"rope_type": "default"})
    with tempfile.TemporaryDirectory() as folder:
        stack = LayeredReference(write_checkpoint(Path(folder) / "checkpoint", raw))
        chunk = np.random.default_rng(0).standard_normal((4, raw["hidden_size"])).astype(np.float32)
        (values,) = stack.layer(0, [np.tile(chunk, (100, 1))])
    first = values.key[:4]
    assert np.abs(first[1:] - first[:-1]).max() > 0.1
    np.testing.assert_allclose(values.key.reshape(100, *first.shape), np.tile(first, (100, 1, 1, 1)), atol=2e-6)


WAYS = [
    ("linear", CHANNEL),
    ("linear", TENSOR),
    ("linear", Way("group", 16, torch.float16)),
    ("linear", PLAIN),
    ("fused", TENSOR),
]


@pytest.mark.parametrize(("layout", "way"), WAYS, ids=str)
def test_quantised(tmp_path: Path, layout: str, way: Way) -> None:
    weights = random_weights(parsed(RAW), dtype=torch.bfloat16)
    made = handmade(RAW, weights, lambda name: PLAIN if "router" in name else way, lambda layer: layout)
    if way != PLAIN:
        declare_compressed_tensors(made)
    assert_the_same(made.write(tmp_path / "checkpoint"), some_tokens(RAW, [20, 7]))


LIBRARIES: dict[str, tuple[Callable[..., Path], dict[str, Any], str | None]] = {
    "nested": (formats.write_nested, {"shard_size": "20KB"}, None),
    "nested as released": (formats.write_nested, {"as_released": True}, None),
    "fp8 static, scales of a cache": (formats.write_fp8_static, {"kv": True}, "compressed_tensors"),
    "maverick": (formats.write_maverick_fp8, {"plain_layers": (3,)}, "compressed_tensors"),
    "int4": (formats.write_int4, {"shard_size": "20KB"}, "compressed_tensors"),
    "modelopt": (
        formats.write_modelopt_fp8,
        {"kv": True, "nested": True, "as_released": True},
        "modelopt.torch.quantization",
    ),
}


@pytest.mark.parametrize("case", LIBRARIES)
def test_formats_of_others(tmp_path: Path, case: str) -> None:
    write, options, library = LIBRARIES[case]
    if library is not None:
        pytest.importorskip(library)
    raw = raw_config()
    checkpoint = write(tmp_path / "checkpoint", raw, random_weights(parsed(raw)), **options)
    assert_the_same(checkpoint, some_tokens(raw, [20, 9]))


def test_the_miniature() -> None:
    tokens = [np.arange(start, start + length) for start, length in ((0, 200), (900, 70))]
    assert_the_same(miniature(), tokens)


SPOILT: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "missing": (
        lambda w: w.pop("model.layers.2.self_attn.k_proj.weight"),
        r"'model\.layers\.2\.self_attn\.k_proj\.weight' is missing",
    ),
    "unexpected": (
        lambda w: w.update({"model.layers.1.extra.weight": torch.zeros(3)}),
        r"'model\.layers\.1\.extra\.weight' is unexpected",
    ),
    "a layer too many": (
        lambda w: w.update({"model.layers.4.input_layernorm.weight": torch.zeros(32)}),
        r"'model\.layers\.4\.input_layernorm\.weight' is unexpected",
    ),
    "an outer one": (lambda w: w.pop("lm_head.weight"), r"'lm_head\.weight' is missing"),
    "a shape": (
        lambda w: w.update({"model.norm.weight": torch.zeros(31)}),
        r"'model\.norm\.weight' has shape \[31\], in transformers' model \[32\]",
    ),
    "a scale of nothing": (
        lambda w: w.update({"model.layers.0.self_attn.v_proj.other_scale": torch.ones(())}),
        r"v_proj\.other_scale' is a scale without its weight",
    ),
    "a lone number": (
        lambda w: w.update({"model.layers.0.self_attn.v_proj.weight": torch.zeros(16, 32, dtype=torch.int8)}),
        r"v_proj\.weight' is torch\.int8 without a scale",
    ),
    "half an expert": (
        lambda w: w.update({"model.layers.1.feed_forward.experts.0.gate_proj.weight": torch.zeros(24, 32)}),
        r"layers\.1\.feed_forward\.experts\.0\.down_proj\.weight' is missing",
    ),
    "an expert's bias": (
        lambda w: w.update({"model.layers.1.feed_forward.experts.0.gate_proj.bias": torch.zeros(24)}),
        r"experts\.0\.\w+\.\w+' is (missing|not understood)",
    ),
}


@pytest.mark.parametrize("case", SPOILT)
def test_what_does_not_fit_is_refused_from_headers_alone(
    tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil, match = SPOILT[case]
    checkpoint = write_checkpoint(tmp_path / "checkpoint", raw_config())
    weights = load_file(checkpoint / "model.safetensors")
    spoil(weights)
    save_file(weights, checkpoint / "model.safetensors")
    monkeypatch.setattr(DequantisedCheckpoint, "outer", lambda *_: pytest.fail("values were read"))
    with pytest.raises(CheckpointError, match=match):
        LayeredReference(checkpoint)


def test_the_same_name_in_two_shards(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", raw_config(), shards=2)
    name = "model-00001-of-00002.safetensors"
    weights = load_file(checkpoint / name) | {"language_model.lm_head.weight": torch.zeros(64, 32)}
    save_file(weights, checkpoint / name)
    with pytest.raises(CheckpointError, match="lm_head.weight' is there twice, in "):
        LayeredReference(checkpoint)


def test_a_head_of_its_own_beside_a_tied_one(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", raw_config())
    raw = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(raw | {"tie_word_embeddings": True}))
    with pytest.raises(CheckpointError, match=r"'lm_head\.weight' is unexpected"):
        LayeredReference(checkpoint)


def test_a_broken_shard(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", raw_config())
    data = (checkpoint / "model.safetensors").read_bytes()
    (checkpoint / "model.safetensors").write_bytes(data[:-8])
    with pytest.raises(CheckpointError, match="model.safetensors: cannot be read"):
        LayeredReference(checkpoint)


def test_a_layer_is_read_when_it_runs_and_dropped_afterwards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    alive: list[Any] = []
    outer = DequantisedCheckpoint.outer

    def noted(self: Any, name: str) -> torch.Tensor:
        read.append(name)
        tensor: torch.Tensor = outer(self, name)
        alive.append(weakref.ref(tensor.untyped_storage()))
        return tensor

    monkeypatch.setattr(DequantisedCheckpoint, "outer", noted)
    stack = LayeredReference(write_checkpoint(tmp_path / "checkpoint", raw_config()))
    assert read == ["model.norm.weight"]
    tokens = some_tokens(raw_config(), [9])
    hidden = list(stack.embed(tokens))
    assert read.pop() == "model.embed_tokens.weight"
    for i in range(4):
        read.clear()
        hidden = [values.hidden for values in stack.layer(i, hidden)]
        assert read and all(name.startswith(f"model.layers.{i}.") for name in read)
    read.clear()
    list(stack.head(hidden))
    assert read == ["lm_head.weight"]
    gc.collect()
    assert all(parameter.is_meta for name, parameter in stack._model.named_parameters() if "norm" not in name)
    assert not any(storage() is not None and storage().nbytes() for storage in alive[1:])


def test_a_release_with_other_names_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", raw_config())

    class Strange(Llama4TextDecoderLayer):
        def forward(self, hidden_states: torch.Tensor, memory: Any = None) -> torch.Tensor:
            raise NotImplementedError

    with monkeypatch.context() as patch:
        patch.setattr("transformers.models.llama4.modeling_llama4.Llama4TextDecoderLayer", Strange)
        with pytest.raises(EngineError, match=r"transformers 5.*: its layers take no cache that is known by name"):
            LayeredReference(checkpoint)

    class Older(Llama4TextDecoderLayer):
        """As before 5.24: the cache goes by another name, the layer gives a tuple."""

        def forward(self, hidden_states: torch.Tensor, past_key_values: Any = None, **more: Any) -> Any:
            more.pop("cache", None)
            return (super().forward(hidden_states, cache=past_key_values, **more),)

    tokens = some_tokens(raw_config(), [20])
    _, expected = run(LayeredReference(checkpoint), tokens)
    with monkeypatch.context() as patch:
        patch.setattr("transformers.models.llama4.modeling_llama4.Llama4TextDecoderLayer", Older)
        older = LayeredReference(checkpoint)
        assert older._cache_argument == "past_key_values"
        _, got = run(older, tokens)
    np.testing.assert_array_equal(got[0], expected[0])

    class Uncached(Llama4TextDecoderLayer):
        def forward(self, hidden_states: torch.Tensor, cache: Any = None, **more: Any) -> torch.Tensor:
            out: torch.Tensor = super().forward(hidden_states, **more)
            return out

    with monkeypatch.context() as patch:
        patch.setattr("transformers.models.llama4.modeling_llama4.Llama4TextDecoderLayer", Uncached)
        stack = LayeredReference(checkpoint)
        with pytest.raises(EngineError, match="gives keys to no 'cache'"):
            run(stack, tokens)


def test_frequencies_that_transformers_does_not_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = Rope.inverse_frequencies
    monkeypatch.setattr(Rope, "inverse_frequencies", lambda self, dim: right(self, dim) * 1.001)
    with pytest.raises(CheckpointError, match="rotary frequencies are not shuntyard's"):
        LayeredReference(write_checkpoint(tmp_path / "checkpoint", raw_config()))


@pytest.mark.parametrize("piece", [1, 40, 1000])
@pytest.mark.parametrize(("layout", "way"), WAYS, ids=str)
def test_values_do_not_depend_on_the_pieces_that_are_read(
    tmp_path: Path, layout: str, way: Way, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = raw_config(intermediate_size=32, intermediate_size_mlp=48, num_hidden_layers=2)
    weights = random_weights(parsed(raw), dtype=torch.bfloat16)
    made = handmade(raw, weights, lambda name: PLAIN if "router" in name else way, lambda layer: layout)
    monkeypatch.setattr("shuntyard.validate.dequantise.PIECE", piece)
    state = dequantised_state(made.write(tmp_path / "checkpoint"))
    assert state.keys() == made.values.keys()
    for name, value in made.values.items():
        assert torch.equal(state[name], value.float()), name
