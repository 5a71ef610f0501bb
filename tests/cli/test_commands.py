"""The commands as people and scripts use them: data on stdout, talk on stderr, exit status."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from shuntyard.cli import main
from shuntyard.engines import open_engine
from shuntyard.engines.text import Tokenizer
from shuntyard.errors import CheckpointError
from tests.checkpoints import random_text
from tests.conftest import Worded


def shuntyard(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


def test_export_and_build(worded: Worded, tmp_path: Path) -> None:
    result = shuntyard("export", worded.checkpoint, tmp_path / "model", "--dtype", "fp16", "--json")
    assert result.exit_code == 0, result.stderr
    facts = json.loads(result.stdout)
    assert facts["path"] == str(tmp_path / "model")
    assert facts["bytes_written"] < 200_000
    result = shuntyard("build", tmp_path / "model", tmp_path / "engine", "--max-context", "48", "--json")
    assert result.exit_code == 0, result.stderr
    manifest = json.loads(result.stdout)
    assert (manifest["dtype"], manifest["limits"]["max_context"]) == ("fp16", 48)
    result = shuntyard("build", tmp_path / "model", tmp_path / "wide", "--dtype", "fp32")
    assert result.stdout.startswith(f"{tmp_path / 'wide'}: onnxruntime ")


def test_validate_tells_by_its_exit_status(worded: Worded, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(random_text(200, 64))
    arguments = ("--reference", worded.checkpoint, "--text", text, "--length", "28", "--windows", "3")
    result = shuntyard("validate", worded.engine, *arguments)
    assert result.exit_code == 0, result.output
    assert "passed" in result.stdout
    assert "max abs error" in result.stdout
    result = shuntyard("validate", worded.engine, *arguments, "--json")
    report = json.loads(result.stdout)
    assert report["passed"] is True
    assert report["checks"][0]["name"] == "prefill: max abs error"
    config = json.loads((worded.checkpoint / "config.json").read_text())
    other = tmp_path / "other"
    other.mkdir()
    for file in worded.checkpoint.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    (other / "config.json").write_text(json.dumps(config | {"use_qk_norm": False}))
    for extra in ((), ("--allow-other-files",)):
        result = shuntyard("validate", worded.engine, "--reference", other, *arguments[2:], *extra)
        assert result.exit_code == 1, result.output
    assert "FAILED" in result.stdout


def test_run_streams_what_generate_gives(worded: Worded) -> None:
    prompt = "w5 w6 w7"
    result = shuntyard("run", worded.engine, "--prompt", prompt, "--max-new-tokens", "12")
    assert result.exit_code == 0, result.stderr
    new = open_engine(worded.engine).generate([[1, 5, 6, 7]], 12)[0]
    words = [f"w{i}" for i in new if i >= 0]
    assert result.stdout.split() == words
    result = shuntyard("run", worded.engine, "--prompt", prompt, "--max-new-tokens", "12", "--json")
    facts = json.loads(result.stdout)
    assert facts["prompt_tokens"] == [1, 5, 6, 7]
    assert facts["new_tokens"] == [int(i) for i in new if i >= 0]


def test_run_refuses_more_than_the_context(worded: Worded) -> None:
    result = shuntyard("run", worded.engine, "--prompt", "w5", "--max-new-tokens", "64")
    assert result.exit_code == 3
    assert "exceed the engine's context of 64" in result.stderr


def test_a_defect_has_an_exit_status_of_its_own(worded: Worded, monkeypatch: pytest.MonkeyPatch) -> None:
    from shuntyard.engines import inspect

    def broken(path: Path) -> None:
        raise RuntimeError("of two\nlines")

    monkeypatch.setattr(inspect, "inspect", broken)
    result = shuntyard("inspect", worded.engine)
    assert result.exit_code == 4
    assert "error: unexpected RuntimeError: of two\\nlines" in result.stderr
    assert "Traceback" not in result.stderr
    assert "Traceback" in shuntyard("--debug", "inspect", worded.engine).stderr


def test_paths_are_no_markup(worded: Worded, tmp_path: Path) -> None:
    odd = tmp_path / "a[red]b[" / "x]"
    shutil.copytree(worded.checkpoint, odd)
    result = shuntyard("inspect", odd)
    assert result.exit_code == 0, result.output
    assert "a[red]b[/x]" in result.stdout.replace("\n", "")


def test_prompts_that_are_no_text(worded: Worded) -> None:
    result = shuntyard("run", worded.engine, "--prompt", "w5 \udcff")
    assert result.exit_code == 3
    assert "the text is not UTF-8" in result.stderr


@pytest.mark.parametrize("bos", [-1, True, 64, [1], "w1"])
def test_a_begin_token_that_is_none_is_refused(worded: Worded, tmp_path: Path, bos: object) -> None:
    engine = tmp_path / "engine"
    shutil.copytree(worded.engine, engine)
    config = json.loads((engine / "config.json").read_text())
    (engine / "config.json").write_text(json.dumps(config | {"bos_token_id": bos}))
    with pytest.raises(CheckpointError, match="bos_token_id is .* which is no token"):
        Tokenizer.from_directory(engine)


@pytest.mark.parametrize("kind", ["checkpoint", "model", "engine"])
def test_inspect_fits_a_screen(worded: Worded, kind: str) -> None:
    path = getattr(worded, kind)
    result = shuntyard("inspect", path)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.splitlines()[0].startswith(f"{kind} ")
    assert len(result.stdout.splitlines()) <= 40
    facts = json.loads(shuntyard("inspect", path, "--json").stdout)
    assert facts["kind"] == kind
    if kind == "engine":
        assert facts["limits"]["max_context"] == 64
        assert {layer["name"] for layer in facts["layers"]} > {"lm_head", "model.layers.0"}
    else:
        assert facts["parameters"] > facts["active_parameters"] > 0
        assert facts["config"]["num_hidden_layers"] == 8


def test_help_does_not_wait_for_torch() -> None:
    script = (
        "import sys; from shuntyard.cli import main; main(['--help'], standalone_mode=False); "
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for command in ("export", "build", "validate", "run", "inspect", "demo"):
        assert command in done.stdout
