"""What an engine shows of its inside: KV rows, marked values, and its layers cut out and run alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shuntyard.engines.build import Request, build
from shuntyard.engines.cut import HIDDEN, CutGraph
from shuntyard.engines.engine import open_engine
from shuntyard.engines.manifest import load_manifest
from shuntyard.errors import EngineError, UnsupportedError

LENGTHS = [21, 9]  # the chunk is 8
TOKENS = np.random.default_rng(0).integers(0, 64, (2, 21))
SPLIT = 13


@pytest.fixture(scope="module")
def recorded(engine_directory: Path) -> Any:
    return open_engine(engine_directory, marked=True).record(TOKENS, LENGTHS, decode_from=SPLIT)


def test_marked_values_are_there_by_name_and_change_no_logit(engine_directory: Path, recorded: Any) -> None:
    engine = open_engine(engine_directory)
    plain = engine.record(TOKENS, LENGTHS, decode_from=SPLIT)
    assert plain.inside == {}
    np.testing.assert_array_equal(plain.logits, engine.logits(TOKENS, LENGTHS, decode_from=SPLIT))
    np.testing.assert_allclose(recorded.logits, plain.logits, atol=1e-5)
    routed = {f"model.layers.{i}.feed_forward.{p}" for i in (1, 3, 5, 7) for p in ("router", "shared_expert")}
    parts = ("", ".self_attn", ".feed_forward", ".input_layernorm", ".post_attention_layernorm")
    assert set(recorded.inside) == {
        "model.embed_tokens",
        *routed,
        *(f"model.layers.{i}{p}" for i in range(8) for p in parts),
    }
    assert recorded.inside["model.layers.1.feed_forward.router"].shape == (2, 21, 4)
    for value in (*recorded.inside.values(), recorded.logits, *recorded.keys, *recorded.values):
        assert np.isfinite(value[0]).all() and np.isfinite(value[1, :9]).all()
        assert np.isnan(value[1, 9:]).all()


def test_residuals_add_up(recorded: Any) -> None:
    inside = recorded.inside
    for i in range(8):
        before = inside[f"model.layers.{i - 1}"] if i else inside["model.embed_tokens"]
        added = inside[f"model.layers.{i}.self_attn"] + inside[f"model.layers.{i}.feed_forward"]
        np.testing.assert_allclose(before + added, inside[f"model.layers.{i}"], atol=1e-5)


def test_layers_that_were_cut_out_give_what_the_engine_gives(engine_directory: Path, recorded: Any) -> None:
    """Keys and values, too: rows of the cache, whichever chunk they are of."""
    graph = CutGraph(engine_directory / "engine.onnx")
    inside = recorded.inside
    (hidden,) = graph.part("model.embed_tokens").run({"input_ids": TOKENS[:1]}).values()
    np.testing.assert_array_equal(hidden[0], inside["model.embed_tokens"][0])
    for i, shape in enumerate(load_manifest(engine_directory).cache):
        part = graph.part(f"model.layers.{i}")
        assert HIDDEN in part.inputs
        cache: dict[str, Any] = {
            f"past_key_values.{i}.{name}": np.zeros((1, shape.heads, shape.rows, shape.head_dim), np.float32)
            for name in ("key", "value")
        }
        for begin, end in ((0, 8), (8, 13), *((n, n + 1) for n in range(13, 21))):
            positions = np.arange(begin, end)
            out = part.run({HIDDEN: hidden[:, begin:end], "position_ids": positions[None], **cache})
            cache = {name: out[name.replace("past_key_values", "present")] for name in cache}
            rows = positions % shape.rows
            for name, found in (("key", recorded.keys[i]), ("value", recorded.values[i])):
                ours = cache[f"past_key_values.{i}.{name}"][0][:, rows].swapaxes(0, 1)
                np.testing.assert_allclose(ours, found[0, begin:end], atol=2e-5)
            np.testing.assert_allclose(
                out[f"model.layers.{i}"][0], inside[f"model.layers.{i}"][0, begin:end], atol=2e-5
            )
        hidden = inside[f"model.layers.{i}"][:1]
    logits = graph.part("lm_head").run({HIDDEN: hidden, "logits_indices": np.arange(21)[None]})["logits"]
    np.testing.assert_allclose(logits[0], recorded.logits[0], atol=2e-5)


def test_an_engine_can_be_built_marked(model_directory: Path, tmp_path: Path, recorded: Any) -> None:
    manifest = build(model_directory, tmp_path / "marked", Request(max_context=40, mark=True))
    assert set(manifest.marked) == set(recorded.inside)
    found = open_engine(tmp_path / "marked", marked=True).record(TOKENS, LENGTHS, decode_from=SPLIT)
    assert set(found.inside) == set(recorded.inside)
    np.testing.assert_array_equal(found.logits, recorded.logits)
    np.testing.assert_array_equal(found.inside["model.layers.5.self_attn"], recorded.inside["model.layers.5.self_attn"])


def test_parts_that_are_not_there(engine_directory: Path, tmp_path: Path) -> None:
    graph = CutGraph(engine_directory / "engine.onnx")
    with pytest.raises(EngineError, match=r"has no call 'model\.layers\.8'"):
        graph.part("model.layers.8")
    with pytest.raises(UnsupportedError, match="cannot be read"):
        CutGraph(tmp_path / "engine.plan")
