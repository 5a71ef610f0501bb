"""``demo`` on the trained miniature: what the README promises of it."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from shuntyard.cli import main
from shuntyard.engines.manifest import load_manifest
from shuntyard.exporter.config_file import load_config_file
from shuntyard.validate.demo import held_out_text, miniature

HAS_RTX = importlib.util.find_spec("tensorrt_rtx") is not None


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo") / "out"


@pytest.fixture(scope="module")
def result(out: Path) -> Result:
    done = CliRunner().invoke(main, ["demo", str(out), "--json"])
    assert done.exit_code == 0, done.output
    return done


def test_the_engine_is_transformers(result: Result) -> None:
    report = json.loads(result.stdout)["report"]
    assert report["passed"] is True
    assert report["notes"] == []
    checks = {check["name"]: check for check in report["checks"]}
    for part in ("prefill", "decode"):
        assert checks[f"{part}: max abs error"]["value"] <= 1e-4
        assert "engine 4" in checks[f"{part}: perplexity, relative"]["detail"]
    for length in (128, 85, 42):
        assert checks[f"greedy: 96 tokens after {length}"]["value"] == "equal"


def test_decoding_crosses_chunk_edges(result: Result) -> None:
    config, report = load_config_file(miniature() / "config.json").text, json.loads(result.stdout)["report"]
    assert config.attention_chunk_size == 64
    length = report["tokens"] // 8
    assert length // 64 - (length - 96) // 64 >= 1  # an edge within the 96 decoded tokens
    assert length > config.floor_scale


@pytest.mark.skipif(not HAS_RTX, reason="needs the package tensorrt-rtx")
def test_the_sm89_engine_names_the_three_plugins(result: Result, out: Path) -> None:
    assert json.loads(result.stdout)["notes"] == []
    manifest = load_manifest(out / "engine-sm89")
    assert (manifest.target, manifest.dtype) == ("sm89", "bf16")
    assert manifest.plugins == {"ShuntyardMoeExperts": 4, "ShuntyardMoeRouting": 4, "ShuntyardMoeScatterAdd": 4}
    layers = json.loads((out / "engine-sm89" / "layers.json").read_text())
    assert {layer["plugin"] for layer in layers} == {None, *manifest.plugins}


def test_it_writes_and_continues_text(result: Result, out: Path) -> None:
    prompt = "And the king said"
    done = CliRunner().invoke(main, ["run", str(out / "engine"), "--prompt", prompt, "--max-new-tokens", "40"])
    assert done.exit_code == 0, done.output
    assert len(done.stdout.split()) > 10
    assert "\ufffd" not in done.stdout
    assert len(held_out_text()) > 200_000
