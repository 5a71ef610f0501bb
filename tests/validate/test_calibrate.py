"""Ranges are those that hooks on transformers' whole model see; routing and experts are computed a second time here."""

from __future__ import annotations

import gc
import tempfile
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache, Llama4TextConfig
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts

from shuntyard.errors import EngineError, NotFiniteError
from shuntyard.exporter.config_file import load_config_file
from shuntyard.exporter.modules import attentions, modules
from shuntyard.validate import calibrate as calibrating
from shuntyard.validate.calibrate import Ranges, WatchedReference, run_watched
from shuntyard.validate.calibrate_ranges import FRACTIONS, Method, squared_error
from shuntyard.validate.demo import miniature
from shuntyard.validate.reference import Reference
from shuntyard.validate.values import Array, Sequence, Tokens
from tests.checkpoints import parsed, random_weights, raw_config, write_checkpoint
from tests.exporter.handmade import CHANNEL, PLAIN, declare_compressed_tensors, handmade
from tests.parity.cases import models

BIN = 1 / 512
CLOSE = 2e-5
PERCENT = 97.0

Values = dict[str, list[Array]]


def some_tokens(vocabulary: int, lengths: list[int], seed: int = 0) -> list[Tokens]:
    random = np.random.default_rng(seed)
    return [random.integers(0, vocabulary, length) for length in lengths]


def calibrated(checkpoint: Path, sequences: list[Tokens], method: Method | None = None) -> Ranges:
    found = Ranges(load_config_file(checkpoint / "config.json").text, method or Method())
    run_watched(checkpoint, [Sequence(str(i), tokens) for i, tokens in enumerate(sequences)], found)
    assert not found.open
    return found


def independent(checkpoint: Path, sequences: list[Tokens]) -> Values:
    """All values of each module's inputs, and of each cache, by hooks on the whole model in memory."""
    model = Reference(checkpoint)._model
    seen: Values = {}
    for name, part in model.named_modules():
        if name.endswith(".feed_forward") and hasattr(part, "router"):
            part.register_forward_pre_hook(lambda part, args, name=name: routed(name, part, args[0], seen))
        elif isinstance(part, torch.nn.Linear) and not name.endswith(".router"):
            part.register_forward_pre_hook(lambda _part, args, name=name: note(seen, name, args[0]))
    config = load_config_file(checkpoint / "config.json").text
    for tokens in sequences:
        cache = DynamicCache()  # without the configuration it keeps every token
        with torch.no_grad():
            model(torch.from_numpy(tokens)[None], cache=cache, use_cache=True)
        places, chunk = np.arange(len(tokens)), config.attention_chunk_size
        for i, attention in enumerate(attentions(config)):
            kept: Any = cache.layers[i]
            key, value = (each[0].transpose(0, 1).double().numpy() for each in (kept.keys, kept.values))
            if config.uses_rope(i) and chunk is not None:
                angles = (places // chunk * chunk)[:, None] * config.rope.inverse_frequencies(config.head_dim)
                even, odd = key[..., 0::2], key[..., 1::2]
                cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
                key = np.stack([even * cos + odd * sin, odd * cos - even * sin], axis=-1)
            seen.setdefault(f"{attention}.key", []).append(key.reshape(-1))
            seen.setdefault(f"{attention}.value", []).append(value.reshape(-1))
    return seen


def note(seen: Values, name: str, tensor: Tensor) -> None:
    seen.setdefault(name, []).append(tensor.detach().reshape(-1).numpy().copy())


def routed(name: str, part: Any, states: Tensor, seen: Values) -> None:
    """Every expert on every token, and a mask of those that the router's largest logits choose."""
    states = states.reshape(-1, states.shape[-1])
    logits = states @ part.router.weight.T
    ranks = (logits[:, None, :] > logits[:, :, None]).sum(-1)  # how many experts are above each
    for e in range(logits.shape[1]):
        rows = states * torch.sigmoid(logits[:, e, None])
        width = part.experts.gate_up_proj.shape[-1] // 2
        gate, up = rows @ part.experts.gate_up_proj[e][:, :width], rows @ part.experts.gate_up_proj[e][:, width:]
        mask = ranks[:, e] < part.router.top_k
        for own, values in (("gate_proj", rows), ("up_proj", rows), ("down_proj", gate / (1 + torch.exp(-gate)) * up)):
            note(seen, f"{name}.experts.{e}.{own}", values[mask])


def recorded(found: Ranges) -> dict[str, float]:
    out = dict(found.inputs)
    out |= {f"{name}.key": clip for name, clip in found.keys.items()}
    return out | {f"{name}.value": clip for name, clip in found.values.items()}


def assert_amax(found: Ranges, seen: Values) -> None:
    """Each clip, and which experts no token reached."""
    largest = {name: np.abs(np.concatenate(values)).max(initial=0) for name, values in seen.items()}
    unreached = {name.rpartition(".")[0] for name in seen if not sum(map(len, seen[name]))}
    assert set(found.unreached) == unreached
    clips = recorded(found)
    assert clips.keys() == {name for name in seen if name in clips or not name.startswith("lm_head")}
    for name, clip in clips.items():
        wanted = largest[name]
        if name.rpartition(".")[0] in unreached:
            layer, part = name.rpartition(".experts.")[0], name.rpartition(".")[2]
            wanted = max(v for n, v in largest.items() if n.startswith(f"{layer}.experts.") and n.endswith(part))
        assert clip == pytest.approx(wanted, rel=CLOSE), name


def assert_percentile(found: Ranges, seen: Values, percent: float = PERCENT) -> None:
    for name, clip in recorded(found).items():
        values = np.sort(np.abs(np.concatenate(seen[name])).astype(np.float64))
        if name.rpartition(".")[0] in found.unreached:
            continue
        # By counting, not by any library's idea of a percentile.
        place = next(i for i in range(len(values)) if (i + 1) * 100 >= percent * len(values) - 1e-9)
        low, high = values[place] * (1 - CLOSE), min(values[place] * (1 + BIN), values[-1]) * (1 + CLOSE)
        assert low <= clip <= high, name


def assert_mse(found: Ranges, seen: Values) -> None:
    for name, clip in recorded(found).items():
        if name.rpartition(".")[0] in found.unreached:
            continue
        values = np.abs(np.concatenate(seen[name])).astype(np.float32)
        errors = [squared_error(values, np.float32(fraction * values.max())) for fraction in FRACTIONS]
        ratio = clip / float(values.max())
        assert min(abs(ratio / fraction - 1) for fraction in FRACTIONS) < CLOSE, name
        assert squared_error(values, np.float32(clip)) <= min(errors) * 1.02, name


@settings(max_examples=25)
@given(models(), st.integers(0, 2**16), st.lists(st.integers(1, 40), min_size=1, max_size=3))
def test_each_clip_is_what_the_whole_model_shows(raw: dict[str, Any], seed: int, lengths: list[int]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = write_checkpoint(Path(folder) / "checkpoint", raw, seed=seed)
        tokens = some_tokens(raw["vocab_size"], lengths, seed)
        seen = independent(checkpoint, tokens)
        assert_amax(calibrated(checkpoint, tokens), seen)
        assert_percentile(calibrated(checkpoint, tokens, Method("percentile", PERCENT)), seen)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("calibrate") / "checkpoint", raw_config(), shards=3, seed=11)


def test_every_module_that_a_recipe_can_quantise(checkpoint: Path) -> None:
    raw = raw_config()
    found = calibrated(checkpoint, some_tokens(64, [20]))
    names = []
    for module in modules(parsed(raw)):
        if module.kind == "experts":
            parts = ("gate_proj", "up_proj", "down_proj")
            names += [f"{module.name}.{e}.{part}" for e in range(module.copies) for part in parts]
        elif module.kind == "linear":
            names.append(module.name)
    assert list(found.inputs) == names
    assert "lm_head" in names and "model.layers.1.feed_forward.shared_expert.up_proj" in names
    assert list(found.keys) == list(found.values) == attentions(parsed(raw))


@pytest.mark.parametrize("length", [1, 7, 8, 9, 16, 17, 31])
def test_edges_of_a_chunk(checkpoint: Path, length: int) -> None:
    tokens = some_tokens(64, [length], length)
    assert_amax(calibrated(checkpoint, tokens), independent(checkpoint, tokens))


def test_least_squared_error(checkpoint: Path) -> None:
    tokens = some_tokens(64, [30, 25, 9])
    found = calibrated(checkpoint, tokens, Method("mse"))
    assert_mse(found, independent(checkpoint, tokens))
    assert found.inputs != calibrated(checkpoint, tokens).inputs


class Unscored(calibrating._Experts):
    """Takes what comes to an expert without the score."""

    def route(self, router: Any, arguments: Any, output: Any) -> None:
        super().route(router, arguments, output)
        self.scores = output[0].T[..., None]

    def run(self, experts: Any, arguments: Any, output: Tensor) -> None:
        rows = arguments[0].view(len(self.scores), -1, arguments[0].shape[-1])
        plain = torch.where(self.scores > 0, rows / self.scores, 0).reshape(arguments[0].shape)
        super().run(experts, (plain,), Llama4TextExperts.forward(experts, plain))


class AllTokens(calibrating._Experts):
    """Counts the rows of tokens that are not routed to an expert."""

    def route(self, router: Any, arguments: Any, output: Any) -> None:
        super().route(router, arguments, output)
        self._chosen = torch.ones_like(output[0], dtype=torch.bool)


class InputForHidden(calibrating.Ranges):
    """Takes an expert's input for what goes into its second product."""

    def add(self, name: str, values: Any) -> None:
        if ".experts." in name and name.endswith("gate_proj"):
            super().add(name.replace("gate_proj", "down_proj"), values)
        super().add(name, values)


MISTAKES: dict[str, tuple[str, type, Method, Callable[[Ranges, Values], None]]] = {
    "score not applied": ("_Experts", Unscored, Method(), assert_amax),
    "unrouted tokens counted": ("_Experts", AllTokens, Method("percentile", PERCENT), assert_percentile),
    "unrouted tokens reach": ("_Experts", AllTokens, Method(), assert_amax),
    "input taken for hidden": ("Ranges", InputForHidden, Method(), assert_amax),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_seen(checkpoint: Path, monkeypatch: pytest.MonkeyPatch, mistake: str) -> None:
    name, wrong, method, check = MISTAKES[mistake]
    tokens = some_tokens(64, [30, 20] if "reach" not in mistake else [1])
    seen = independent(checkpoint, tokens)
    check(calibrated(checkpoint, tokens, method), seen)
    monkeypatch.setattr(calibrating, name, wrong)
    monkeypatch.setitem(globals(), "Ranges", calibrating.Ranges)
    with pytest.raises(AssertionError):
        check(calibrated(checkpoint, tokens, method), seen)


def test_experts_that_nobody_reached_have_their_layers_largest(checkpoint: Path) -> None:
    tokens = some_tokens(64, [1])
    found = calibrated(checkpoint, tokens)
    assert_amax(found, independent(checkpoint, tokens))
    assert len(found.unreached) == 2 * 2  # of four experts a layer, one token reaches two
    for expert in found.unreached:
        layer = expert.rpartition(".")[0]
        for part in ("gate_proj", "up_proj", "down_proj"):
            own = [found.inputs[f"{layer}.{e}.{part}"] for e in range(4) if f"{layer}.{e}" not in found.unreached]
            assert found.inputs[f"{expert}.{part}"] == max(own)
    assert not found.zero


def test_zero_is_listed_and_has_clip_1(tmp_path: Path) -> None:
    raw = raw_config()
    weights = random_weights(parsed(raw))
    weights["model.layers.0.self_attn.v_proj.weight"].zero_()
    weights["model.layers.2.feed_forward.up_proj.weight"].zero_()
    weights["model.layers.1.feed_forward.experts.gate_up_proj"].zero_()
    own = write_checkpoint(tmp_path / "checkpoint", raw, weights)
    found = calibrated(own, some_tokens(64, [1]))
    experts = [f"model.layers.1.feed_forward.experts.{e}.down_proj" for e in range(4)]
    inputs = ["model.layers.0.self_attn.o_proj", *experts, "model.layers.2.feed_forward.down_proj"]
    assert sorted(found.zero) == sorted([*inputs, "model.layers.0.self_attn.value"])
    assert all(found.inputs[name] == 1.0 for name in inputs) and found.values["model.layers.0.self_attn"] == 1.0
    assert found.keys["model.layers.0.self_attn"] != 1.0


def test_values_that_are_not_finite_are_refused_by_module(tmp_path: Path) -> None:
    raw = raw_config()
    weights = random_weights(parsed(raw))
    for part in ("gate_proj", "up_proj"):
        weights[f"model.layers.2.feed_forward.{part}.weight"] *= 1e25
    own = write_checkpoint(tmp_path / "checkpoint", raw, weights)
    with pytest.raises(NotFiniteError, match=r"'model\.layers\.2\.feed_forward\.down_proj' gets values that are not"):
        calibrated(own, some_tokens(64, [9]))


def test_logits_that_are_not_finite_are_refused_by_module(tmp_path: Path) -> None:
    weights = random_weights(parsed(raw_config()))
    weights["model.layers.1.self_attn.o_proj.weight"] *= 3e38
    own = write_checkpoint(tmp_path / "checkpoint", raw_config(), weights)
    with pytest.raises(NotFiniteError, match=r"model\.layers\.1\.feed_forward\.experts: the router's logits"):
        calibrated(own, some_tokens(64, [9]))


def test_quantised_weights_are_dequantised(tmp_path: Path) -> None:
    raw = raw_config()
    weights = random_weights(parsed(raw), dtype=torch.bfloat16)
    made = handmade(raw, weights, lambda name: PLAIN if "router" in name else CHANNEL)
    quantised = declare_compressed_tensors(made).write(tmp_path / "quantised")
    plain = write_checkpoint(tmp_path / "plain", raw, {name: value.float() for name, value in made.values.items()})
    tokens = some_tokens(64, [20, 7])
    found = calibrated(quantised, tokens)
    assert_amax(found, independent(plain, tokens))
    unquantised = write_checkpoint(tmp_path / "before", raw, weights)
    with pytest.raises(AssertionError):
        assert_amax(found, independent(unquantised, tokens))


def test_the_miniature() -> None:
    tokens = [np.arange(start, start + length) for start, length in ((5, 140), (900, 40))]
    seen = independent(miniature(), tokens)
    assert_amax(calibrated(miniature(), tokens), seen)
    assert_percentile(calibrated(miniature(), tokens, Method("percentile", 99.9)), seen, 99.9)


def test_one_layer_is_in_memory(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hooks keep no layer, and ranges of a layer do not outlive it."""
    load = WatchedReference._load
    refs: list[weakref.ref[Any]] = []
    opened: list[int] = []

    def watched(self: WatchedReference, index: int) -> Any:
        gc.collect()
        assert not any(ref() for ref in refs)
        opened.append(len(self._found.open))
        layer = load(self, index)
        refs.append(weakref.ref(layer))
        return layer

    monkeypatch.setattr(WatchedReference, "_load", watched)
    calibrated(checkpoint, some_tokens(64, [20, 7]), Method("mse"))
    assert len(refs) == 4 and opened == [0] * 4


def experts_of(experts: int = 4) -> tuple[Any, Tensor]:
    """transformers' experts with random weights, and logits ``[S, E]``."""
    generator = torch.Generator().manual_seed(0)
    sizes: Mapping[str, Any] = {"num_local_experts": experts, "hidden_size": 8, "intermediate_size": 6}
    own = Llama4TextExperts(Llama4TextConfig(**sizes, num_hidden_layers=1))
    for weight in own.parameters():
        weight.data = torch.randn(weight.shape, generator=generator)
    return own.requires_grad_(False), torch.randn(5, experts, generator=generator)


def test_experts_that_compute_something_else_are_refused() -> None:
    experts, logits = experts_of()
    rows = torch.randn(4 * 5, 8, generator=torch.Generator().manual_seed(1))
    chosen = torch.zeros_like(logits).scatter_(1, logits.topk(2).indices, 1.0)
    rows = rows * chosen.T.reshape(-1, 1)
    watch = calibrating._Experts("the experts", Ranges(parsed(raw_config()), Method()))
    router = SimpleNamespace(top_k=2)
    watch.route(router, (), (chosen, logits))
    watch.run(experts, (rows,), experts(rows))
    watch.route(router, (), (chosen, logits))
    with pytest.raises(EngineError, match="'the experts': expert 0 computes something else"):
        watch.run(experts, (rows,), experts(rows) * 1.01)
    with pytest.raises(EngineError, match="scores to other experts"):
        watch.route(router, (), (torch.ones_like(logits), logits))
