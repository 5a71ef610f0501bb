"""``shuntyard plan``: exit status, JSON, and the transcripts of its document."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from shuntyard import cli
from shuntyard.cli import console
from shuntyard.engines.plan.gpus import GIB
from tests.sizes import MODELS, raw_config
from tests.sparse import write_sparse

DOCUMENT = Path(__file__).parents[2] / "docs" / "plan.md"

NAMES = {
    "Llama-4-Scout-17B-16E": ("scout", "bf16"),
    "Llama-4-Maverick-17B-128E-Instruct-FP8": ("maverick", "fp8-meta"),
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of full-size checkpoints without data, by their names."""
    folder = tmp_path_factory.mktemp("full-size")
    for name, (model, form) in NAMES.items():
        write_sparse(folder / name, raw_config(MODELS[model], form))
    return folder


def plan(*arguments: str | Path, width: int = 80) -> Result:
    return CliRunner(env={"COLUMNS": str(width)}).invoke(cli.main, ["plan", *map(str, arguments)])


def transcripts() -> list[tuple[str, str]]:
    """Command and output of each block of the document that begins with a prompt."""
    return re.findall(
        r"^```\n\$ shuntyard plan ([^\n]*)\n(.*?)^```$", DOCUMENT.read_text("utf-8"), re.DOTALL | re.MULTILINE
    )


@pytest.mark.parametrize(("command", "output"), transcripts())
def test_the_documents_transcripts(
    command: str, output: str, checkpoints: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(checkpoints)
    monkeypatch.setattr(console.stdout, "_width", 80)
    result = plan(*command.split())
    assert result.exit_code == (0 if "\nfits, " in output else 1), result.stderr
    printed = "\n".join(line.rstrip() for line in result.stdout.splitlines())
    assert re.sub(r"\n\n+", "\n\n", printed) == output.rstrip("\n")


def test_there_are_transcripts() -> None:
    assert len(transcripts()) == 3


@pytest.mark.parametrize("width", [60, 80, 100, 200])
def test_no_line_is_wider_than_the_terminal(
    width: int, checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console.stdout, "_width", width)
    own = tmp_path / "own.toml"
    types = ("int4", "fp8", "fp32", "fp16")  # of four layers' experts; all other layers' are bf16
    own.write_text(
        "".join(f"[[rule]]\nmodules = '*.{i}.*experts'\nweights = '{kind}'\n" for i, kind in enumerate(types))
    )
    for extra in (
        ("--gpu", "h200", "--weights", "fp8"),
        ("--context", "10M", "--batch", "1000"),
        ("--weights", str(own)),
    ):
        result = plan(checkpoints / "Llama-4-Scout-17B-16E", *extra)
        assert result.exit_code in (0, 1)
        assert max(len(line) for line in result.stdout.splitlines()) <= width
        assert "…" not in result.stdout
        if width >= 80:  # whole words: only a column of types may take a second line
            assert all(word in result.stdout for word in ("attention q, o ", "96.64 G ", "503.32 M ", " 180.00 "))
            assert "INT4" in result.stdout or extra[0] != "--weights"


def test_exit_status_and_json(checkpoints: Path) -> None:
    scout = checkpoints / "Llama-4-Scout-17B-16E"
    result = plan(scout, "--json")
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    assert found["fits"] is False
    assert found["reason"]["term"] == "weights"
    assert found["per_gpu"]["reserve"] == GIB
    assert found["nearest"][0]["what"] == "--gpu b300"
    result = plan(scout, "--gpu", "300GiB", "--reserve", "0", "--context", "10M", "--kv", "fp8", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["asked"]["context"] == 10_485_760
    result = plan(scout, "--gpu", "b300", "--json")
    assert (result.exit_code, json.loads(result.stdout)["fits"]) == (0, True)


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (("--context", "11M"), 3, "a context of 11,534,336 is beyond the model's max_position_embeddings, 10,485,760"),
        (("--gpu", "h99"), 3, "gpu 'h99' is not known"),
        (("--gpus", "3"), 3, "this model can be cut for 1, 2, 4, 8"),
        (("--context", "lots"), 2, "'lots' is no number of tokens such as 8192, 128k or 1M"),
        (("--weights", "int2"), 3, "int2: no such recipe"),
        (("--weights", "fp8-meta"), 3, "one of stored, bf16, fp8, fp8-ffn, fp8-all-linear, int4-experts"),
        (("--reserve", "9" * 30), 3, "the reserve is negative or huge"),
    ],
)
def test_refusals(arguments: tuple[str, ...], status: int, words: str, checkpoints: Path) -> None:
    result = plan(checkpoints / "Llama-4-Scout-17B-16E", *arguments)
    assert result.exit_code == status
    assert words in result.stderr.replace("\n", " ")
    assert result.stdout == ""


def test_recipe_files(tmp_path: Path, checkpoints: Path) -> None:
    own = tmp_path / "own.toml"
    rules = ('modules = "*.experts"\nweights = "int4"\n', 'modules = "*.self_attn"\nkv_cache = "fp8"\n')
    own.write_text("".join(f"[[rule]]\n{rule}" for rule in rules))
    scout = checkpoints / "Llama-4-Scout-17B-16E"
    found, shipped = (
        json.loads(plan(scout, "--json", *arguments).stdout)
        for arguments in (("--weights", own), ("--weights", "int4-experts", "--kv", "fp8"))
    )
    assert found["held"] == shipped["held"]
    assert found["per_gpu"] == shipped["per_gpu"]
    assert found["asked"] == {**shipped["asked"], "weights": str(own)}
    own.write_text("[[rule]]\nmodules = 'lm_head'\nweights = 'int2'\n")
    result = plan(scout, "--weights", own)
    assert (result.exit_code, result.stdout) == (3, "")
    assert "own.toml: rule 1: key 'weights'" in result.stderr.replace("\n", " ")
