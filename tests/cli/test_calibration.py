"""``shuntyard calibrate`` as people use it: what it writes, says and refuses."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

from shuntyard.cli import main
from shuntyard.exporter.calibration import read_calibration
from shuntyard.exporter.checkpoint import open_checkpoint
from tests.checkpoints import random_text, raw_config, write_checkpoint, write_tokenizer

RAW = raw_config(bos_token_id=1, eos_token_id=2)


def calibrate(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["calibrate", *map(str, arguments)])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "random", RAW, shards=2, seed=3)
    write_tokenizer(path, RAW["vocab_size"])
    return path


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(random_text(100, RAW["vocab_size"]))
    return path


def test_writes_the_same_bytes_twice(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    for method in (["amax"], ["mse"], ["percentile", "--percentile", "98.5"]):
        outs = [tmp_path / f"{method[0]}-{i}.json" for i in range(2)]
        for out in outs:
            result = calibrate(checkpoint, out, "--text", text, "--windows", "3", "--length", "20", "--method", *method)
            assert result.exit_code == 0, result.output
            assert result.stdout.startswith(f"{out}: inputs of ") and "60 tokens" in result.stdout
            assert "warning" not in result.stderr
        assert outs[0].read_bytes() == outs[1].read_bytes()
        found = read_calibration(outs[0])
        found.check(open_checkpoint(checkpoint))
        assert (found.tokens, found.windows, found.length, found.text) == (60, 3, 20, "text.txt")
        assert found.text_sha256 == hashlib.sha256(text.read_bytes()).hexdigest()
        assert found.method == ("percentile 98.5" if method[0] == "percentile" else method[0])
        assert found.reference.startswith("transformers ")
    clips = [read_calibration(tmp_path / f"{name}-0.json").inputs for name in ("percentile", "mse", "amax")]
    assert all(low <= middle_or_high for low, middle_or_high in zip(clips[0].values(), clips[2].values(), strict=True))
    assert sum(clips[0].values()) < sum(clips[2].values()) and sum(clips[1].values()) < sum(clips[2].values())
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *(f"{name}-{i}.json" for name in ("amax", "mse", "percentile") for i in range(2)),
        "text.txt",
    ]


def test_says_what_it_did_not_see(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    text.write_text("w5 w5 w5 w5")
    result = calibrate(checkpoint, tmp_path / "new" / "out.json", "--text", text, "--length", "4")
    assert result.exit_code == 0, result.output
    assert "warning: the text holds 1 windows of 4 tokens, not 32" in result.stderr
    unreached = read_calibration(tmp_path / "new" / "out.json").unreached
    assert f"warning: {len(unreached)} of 8 experts were reached by no token, as {unreached[0]}" in result.stderr
    text.write_text(random_text(600, RAW["vocab_size"]))
    result = calibrate(checkpoint, tmp_path / "long.json", "--text", text, "--length", "500", "--windows", "1")
    assert "warning: windows are 128 tokens, the model's context, not 500" in result.stderr
    assert read_calibration(tmp_path / "long.json").length == 128


def test_by_default_windows_go_over_chunks(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    assert calibrate(checkpoint, tmp_path / "out.json", "--text", text).exit_code == 0
    assert read_calibration(tmp_path / "out.json").length == 28  # 3.5 chunks of 8


def test_refusals(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    wordless = shutil.copytree(checkpoint, tmp_path / "wordless")
    (wordless / "tokenizer.json").unlink()
    spoiled = shutil.copytree(checkpoint, tmp_path / "spoiled")
    file = next(spoiled.glob("*.safetensors"))
    weights = load_file(file)
    name = next(name for name in weights if name.endswith("q_proj.weight"))
    weights[name][0, 0] = float("nan")
    save_file(weights, file)
    (tmp_path / "short.txt").write_text("w1 w2")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe")
    before = sorted(tmp_path.iterdir())
    for arguments, message in (
        ((tmp_path / "nothing", out, "--text", text), "no such directory"),
        ((checkpoint, out, "--text", tmp_path / "nothing"), "no such file"),
        ((checkpoint, out, "--text", tmp_path / "binary.txt"), "binary.txt: cannot be read as UTF-8"),
        ((checkpoint, out, "--text", tmp_path / "short.txt"), "the text has 3 tokens"),
        ((wordless, out, "--text", text), "tokenizer.json: no such file"),
        ((spoiled, out, "--text", text), "are not finite"),
        ((checkpoint, text, "--text", text), "text.txt: exists already"),
        ((checkpoint, text / "out.json", "--text", text), "out.json: cannot be written"),
    ):
        result = calibrate(*arguments)
        assert result.exit_code == 3, result.output
        assert result.stdout == ""
        assert sum(line.startswith("error: ") for line in result.stderr.splitlines()) == 1
        assert message in result.stderr, result.stderr
    assert sorted(tmp_path.iterdir()) == before


def test_a_place_that_cannot_be_written_to_is_seen_first(
    checkpoint: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root may write anywhere, so the system's answer is given here."""
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    result = calibrate(checkpoint, tmp_path / "new" / "out.json", "--text", text)
    assert result.exit_code == 3 and "out.json: cannot be written" in result.stderr
    assert "layer" not in result.stderr and not (tmp_path / "new").exists()


def test_what_appears_meanwhile_is_not_overwritten(
    checkpoint: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from shuntyard.validate import calibrate as calibrating

    out, run = tmp_path / "out.json", calibrating.run_watched

    def slow(*arguments: object) -> str:
        out.write_text("another's")
        return run(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(calibrating, "run_watched", slow)
    result = calibrate(checkpoint, out, "--text", text)
    assert result.exit_code == 3 and "exists already" in result.stderr
    assert out.read_text() == "another's"


def test_bad_usage(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    for arguments in (
        (checkpoint, tmp_path / "out.json"),
        (checkpoint, tmp_path / "out.json", "--text", text, "--percentile", "99"),
        (checkpoint, tmp_path / "out.json", "--text", text, "--method", "mse", "--percentile", "99"),
        (checkpoint, tmp_path / "out.json", "--text", text, "--method", "percentile", "--percentile", "0"),
        (checkpoint, tmp_path / "out.json", "--text", text, "--method", "percentile", "--percentile", "100.5"),
        (checkpoint, tmp_path / "out.json", "--text", text, "--method", "least"),
    ):
        assert calibrate(*arguments).exit_code == 2
    assert not (tmp_path / "out.json").exists()
