"""What recipes are worth: against whole models run by themselves, and on models where the answer is known."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from shuntyard.cli.precision_measure import worth_table
from shuntyard.errors import CheckpointError, EngineError
from shuntyard.exporter.calibration import Calibration
from shuntyard.exporter.checkpoint import open_checkpoint
from shuntyard.exporter.export import export
from shuntyard.exporter.modules import modules
from shuntyard.exporter.recipe import SHIPPED, Precision, Resolved, parse_recipe, read_recipe, resolve
from shuntyard.validate import metrics, walk
from shuntyard.validate.demo import miniature
from shuntyard.validate.emulate import EmulatedStack, Emulation, Preparer
from shuntyard.validate.inputs import windows_of
from shuntyard.validate.matrices import Numbers
from shuntyard.validate.stack import Stack
from shuntyard.validate.values import Array, Tokens
from shuntyard.validate.walk import Walker
from shuntyard.validate.worth import group_size_recipes, measure, recipe_bytes
from tests.checkpoints import parsed, random_weights, raw_config, write_checkpoint

RAW = raw_config(hidden_size=32, intermediate_size=64, intermediate_size_mlp=96, head_dim=16, num_local_experts=5)
CONFIG = parsed(RAW)
WINDOWS: list[Tokens] = [np.random.default_rng(i).integers(0, RAW["vocab_size"], n) for i, n in enumerate([17, 9, 17])]


def recipe(name: str, text: str) -> Resolved:
    return resolve(parse_recipe(text.encode(), name, f"{name}.toml"), CONFIG)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    weights = random_weights(CONFIG, seed=4, dtype=torch.bfloat16)
    return write_checkpoint(tmp_path_factory.mktemp("worth") / "checkpoint", RAW, weights)


def whole(stack: Stack) -> tuple[list[Array], list[list[Array]]]:
    """Logits by window, and by MoE layer and window the experts of each token."""
    hidden, routed = list(stack.embed(WINDOWS)), []
    for i in range(stack.config.num_hidden_layers):
        values = list(stack.layer(i, hidden))
        hidden = [one.hidden for one in values]
        if stack.config.is_moe(i):
            routed.append(
                [np.sort(np.argsort(-v.router, axis=1)[:, :2], axis=1) for v in values if v.router is not None]
            )
    return list(stack.head(hidden)), routed


def test_against_whole_models_run_by_themselves(checkpoint: Path) -> None:
    """Batches, shared prefixes and blocks change no number."""
    resolved = [resolve(read_recipe(name), CONFIG) for name in ("fp8-all-linear", "fp8")]
    base, *worths = measure(checkpoint, resolved, WINDOWS)
    theirs, experts = whole(EmulatedStack.of_recipe(checkpoint, resolve(read_recipe("bf16"), CONFIG)))
    assert base.recipe == "bf16" and base.kl == 0 and base.top1 == 1 and base.router == 1 == base.router_worst
    for own, worth in zip(resolved, worths, strict=True):
        ours, chosen = whole(EmulatedStack.of_recipe(checkpoint, own))
        kl = np.concatenate([metrics.kl(a, b) for a, b in zip(theirs, ours, strict=True)])
        losses = [metrics.negative_log_likelihood(a[:-1], t[1:]) for a, t in zip(ours, WINDOWS, strict=True)]
        assert worth.kl == pytest.approx(kl.mean(), rel=2e-3) and worth.kl > 1e-4
        assert worth.perplexity == pytest.approx(math.exp(np.concatenate(losses).mean()), rel=1e-4)
        assert worth.perplexity_change == pytest.approx(worth.perplexity / base.perplexity - 1, abs=1e-12)
        same = [a.argmax(1) == b.argmax(1) for a, b in zip(theirs, ours, strict=True)]
        assert worth.top1 == pytest.approx(np.concatenate(same).mean())
        layers = [
            np.concatenate([(x == y).all(1) for x, y in zip(a, b, strict=True)]).mean()
            for a, b in zip(experts, chosen, strict=True)
        ]
        assert worth.router == pytest.approx(np.mean(layers)) and worth.router_worst == pytest.approx(min(layers))
        assert worth.router_worst_layer in CONFIG.moe_layers
        assert worth.tokens == sum(map(len, WINDOWS))


def test_prefixes_are_shared_and_batches_change_nothing(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    preparer = Preparer(Numbers(checkpoint))
    fp8 = Precision("fp8", "channel", "fp8-dynamic")
    plans = [{}, {"model.layers.3.self_attn.q_proj": fp8}, {"model.layers.1.self_attn.q_proj": fp8}, {"lm_head": fp8}]
    emulations = [Emulation(preparer, plan) for plan in plans]
    walker = Walker(CONFIG, WINDOWS)
    assert walker.cost(emulations) == 4 + 1 + 3 + 0
    together = walker.run(emulations)
    assert walker.layers_run == 8
    monkeypatch.setattr(walk, "STATE_BYTES", 1)  # two at a time
    monkeypatch.setattr(walk, "AT_ONCE", 1)  # one token's logits
    assert walker.cost(emulations) == 5 + 7 + 4
    for a, b in zip(together, walker.run(emulations), strict=True):
        np.testing.assert_allclose(a.kl, b.kl, rtol=1e-3, atol=1e-9)
        np.testing.assert_allclose(a.nll, b.nll, rtol=1e-6)
        assert a.router == b.router
    assert together[1].mean_kl > 0 and together[3].mean_kl > 0
    assert together[1].router == {1: 1.0, 3: together[1].router[3]}


def test_bytes_are_those_of_the_files(checkpoint: Path, tmp_path: Path) -> None:
    text = """
[[rule]]
modules = "*.experts"
weights = "int4"
group_size = 16
[[rule]]
modules = "*.self_attn.*"
weights = "fp8"
granularity = "tensor"
[[rule]]
modules = "model.layers.*"
weights = "fp8"
activations = "fp8-dynamic"
"""
    for number, resolved in enumerate([recipe("r", text), resolve(read_recipe("bf16"), CONFIG)]):
        export(checkpoint, tmp_path / str(number), recipe=resolved.recipe)
        written = Numbers(tmp_path / str(number))
        found = [written.nbytes(module) for module in modules(CONFIG)]
        assert recipe_bytes(Numbers(checkpoint), resolved) == (sum(w for w, _ in found), sum(s for _, s in found))


def test_a_calibration_of_another_checkpoint_is_refused(checkpoint: Path) -> None:
    static = '[[rule]]\nmodules = "*"\nweights = "fp8"\nactivations = "fp8-static"'
    inputs: dict[str, float] = {}
    for module in modules(CONFIG):
        parts = [f".{e}.{p}_proj" for e in range(module.copies) for p in ("gate", "up", "down")]
        inputs |= {module.name + part: 4.0 for part in (parts if module.kind == "experts" else [""])}
    facts = {"shuntyard": "0", "text": "t", "text_sha256": "0" * 64, "tokens": 1, "windows": 1, "length": 1}
    facts |= {"method": "amax", "reference": "r", "keys": {}, "values": {}}
    own = open_checkpoint(checkpoint)
    facts |= {"small_tensors_sha256": own.small_tensors_sha256(), "inputs": inputs}
    right = Calibration.model_validate({**facts, "checkpoint_fingerprint": own.fingerprint})
    base, worth = measure(checkpoint, [recipe("static", static)], WINDOWS, right)
    assert worth.kl > base.kl
    other = Calibration.model_validate({**facts, "checkpoint_fingerprint": "0" * 64})
    with pytest.raises(CheckpointError, match="the calibration is of another checkpoint"):
        measure(checkpoint, [recipe("static", static)], WINDOWS, other)


def test_a_recipe_equal_to_bf16_has_its_own_row(checkpoint: Path) -> None:
    bf16 = read_recipe("bf16")
    mine = resolve(replace(bf16, name="mine"), CONFIG)
    worths = measure(checkpoint, [mine, resolve(bf16, CONFIG)], WINDOWS)
    assert [worth.recipe for worth in worths] == ["bf16", "mine"] and worths[1].kl == 0


def test_nothing_to_measure_on(checkpoint: Path) -> None:
    for windows in ([], [np.array([1])]):
        with pytest.raises(EngineError, match="there is nothing to measure on"):
            measure(checkpoint, [], windows)


def test_numbers_that_overflow_are_refused(tmp_path: Path) -> None:
    weights = random_weights(CONFIG)
    weights["model.layers.0.feed_forward.up_proj.weight"] *= 1e6
    huge = write_checkpoint(tmp_path / "checkpoint", RAW, weights)
    half = recipe("half", '[[rule]]\nmodules = "*.feed_forward.*"\nweights = "fp16"')
    with pytest.raises(EngineError, match=r"half.toml: its logits are not finite"):
        measure(huge, [half], WINDOWS)


def test_the_miniature_and_its_group_sizes() -> None:
    """On a trained model: fewer bytes cost more, smaller groups less, and the table fits a terminal."""
    folder = miniature()
    config = Numbers(folder).config
    windows = [own.tokens for own in windows_of(folder / "held_out.txt", folder, config, 4, 129, pytest.fail)]
    groups = [resolve(own, config) for own in group_size_recipes(config)]
    worths = measure(folder, [*(resolve(read_recipe(name), config) for name in SHIPPED), *groups], windows)
    by_name = {worth.recipe: worth for worth in worths}
    assert len(by_name) == len(worths) == len(SHIPPED) + 5
    assert by_name["int4-experts-128"].as_dict() | {"recipe": "", "description": ""} == by_name[
        "int4-experts"
    ].as_dict() | {"recipe": "", "description": ""}
    curve = [by_name[f"int4-experts-{size}"] for size in (128, 64, 32, 16, 8)]
    assert [worth.bytes for worth in curve] == sorted(worth.bytes for worth in curve)
    assert curve[0].kl > curve[2].kl > curve[4].kl > 0
    fp8 = [by_name[name] for name in ("bf16", "fp8", "fp8-ffn", "fp8-all-linear")]
    assert [worth.kl for worth in fp8] == sorted(worth.kl for worth in fp8)
    assert [-worth.bytes for worth in fp8] == sorted(-worth.bytes for worth in fp8)
    assert all(worth.router is not None and 0.8 < worth.router <= 1 for worth in worths)
    assert json.loads(json.dumps(worths[1].as_dict()))["bytes"] == worths[1].bytes
    console = Console(width=80, file=io.StringIO(), record=True)
    console.print(worth_table(worths))
    lines = console.export_text().splitlines()
    assert len(lines) == 1 + len(worths) and max(map(len, lines)) <= 80
