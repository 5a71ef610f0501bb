"""The command line: its help, and what it refuses. That it makes and runs cases: ../test_conformance.py."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.plugins.conformance.__main__ import main, write
from tests.plugins.conformance.files import Case
from tests.plugins.conformance.make import make_cases
from tests.tolerances import FP32_SUMS


def test_help_of_the_command_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        main(["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    listed = [number for number, line in enumerate(lines) if line.startswith("  --")]
    assert len(listed) == 10
    for number in listed:  # a help text beside it, or below
        assert len(lines[number].split()) > 2 and lines[number][24:].strip(), lines[number]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--cases", "0", "--write", "x"], "argument --cases: 0 is no whole number from 1"),
        (["--cases", "1.5", "--write", "x"], "argument --cases: 1.5 is no whole number from 1"),
        (["--seed", "-1", "--write", "x"], "argument --seed: -1 is no whole number from 0"),
        (["--most-work", "nan", "--write", "x"], "argument --most-work: nan is no whole number from 1"),
        ([], "give --write, or --runner and --library"),
        (["--runner", "x"], "give --write, or --runner and --library"),
        (["--write", "x", "--every-tactic"], "--every-tactic is for --runner"),
        (["--timing", "--runner", "x", "--library", "x"], "--timing makes cases without judgement"),
    ],
)
def test_what_the_command_line_refuses(
    arguments: list[str],
    words: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert words in capsys.readouterr().err and not list(tmp_path.iterdir())


def script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_what_does_not_run_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In one line and a hint, with exit status 2."""
    none, text = tmp_path / "none", tmp_path / "text"
    text.write_text("")
    refusing, dying = script(tmp_path / "refusing", "echo no >&2; exit 2"), script(tmp_path / "dying", "kill -9 $$")
    for runner, library, words in (
        (none, text, f"there is no file {none}"),
        (text, none, f"there is no file {none}"),
        (text, text, f"{text} cannot be run: Permission denied"),
        (refusing, text, f"nothing has run: {refusing} ended with status 2"),
        (dying, text, f"not all has run: {dying} was ended by signal 9"),
    ):
        assert main(["--cases", "1", "--most-work", "1e3", "--runner", str(runner), "--library", str(library)]) == 2
        said = capsys.readouterr()
        assert "numpy" not in said.out
        lines = said.err.splitlines()
        assert len(lines) == 2 and lines[0] == f"error: {words}" and lines[1].startswith("hint: "), lines


def test_cases_appear_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Or not at all, as where they cannot be written."""
    for place, words in ((tmp_path, "Is a directory"), (tmp_path / "none" / "x.gz", "No such file or directory")):
        assert main(["--cases", "1", "--most-work", "1e3", "--write", str(place)]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert lines[0] == f"error: {place} cannot be written: {words}" and len(lines) == 2

    def broken_off() -> Iterator[Case]:
        yield next(make_cases(1, FP32_SUMS, 1000))
        raise KeyboardInterrupt

    file = tmp_path / "cases.bin"
    file.write_text("earlier")
    with pytest.raises(KeyboardInterrupt):
        write(file, broken_off())
    assert file.read_text() == "earlier" and list(tmp_path.iterdir()) == [file]
