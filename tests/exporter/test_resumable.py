"""Directories whose making is interrupted and continued: what stays, what goes, and who waits for whom."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shuntyard.errors import CheckpointError, OutputError
from shuntyard.exporter import resumable
from shuntyard.exporter.output import lock, output_directory
from shuntyard.exporter.resumable import Journal, Workspace, resumable_directory

KEY, OTHER = "a" * 64, "b" * 64
SHARD = "model-00001-of-00001.safetensors"


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resumable, "_PATIENCE", 0.1)


def work_a_little(work: Workspace) -> None:
    """One file, one entry, and something that is no part of it."""
    journal = Journal(work.journal, KEY, [SHARD])
    journal.read()
    journal.open()
    (work.directory / SHARD).write_bytes(b"half")
    (work.directory / "model.onnx").write_bytes(b"made anew each time")
    (work.directory / "folder").mkdir()
    journal.mark_done(0, 3)
    journal.close()


def interrupt(
    target: Path, error: BaseException, key: str = KEY, body: Callable[[Workspace], None] = work_a_little
) -> None:
    def attempt() -> None:
        with resumable_directory(target, key) as work:
            body(work)
            raise error

    with pytest.raises(type(error)):
        attempt()


def partials(target: Path) -> list[Path]:
    return sorted(target.parent.glob(f".{target.name}.partial-*"))


def test_appears_whole_and_alone(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "er" / "out"
    with resumable_directory(target, KEY) as work:
        work_a_little(work)
        assert not target.exists()
    assert sorted(p.name for p in target.iterdir()) == sorted(["folder", "model.onnx", SHARD])
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError(), OutputError("full", hint="")], ids=repr)
def test_stays_to_be_continued(tmp_path: Path, error: BaseException) -> None:
    target = tmp_path / "out"
    interrupt(target, error)
    with resumable_directory(target, KEY) as work:
        assert [(p.name, p.read_bytes()) for p in work.directory.iterdir()] == [(SHARD, b"half")]
        journal = Journal(work.journal, KEY, [SHARD])
        journal.read()
        assert journal.done == {(0, 3)}
    assert list(tmp_path.iterdir()) == [target]


def test_a_checkpoint_at_fault_leaves_nothing(tmp_path: Path) -> None:
    interrupt(tmp_path / "deep" / "out", CheckpointError("damaged", hint=""))
    assert not list(tmp_path.iterdir())


def test_nothing_done_leaves_nothing(tmp_path: Path) -> None:
    interrupt(tmp_path / "out", KeyboardInterrupt(), body=lambda work: Journal(work.journal, KEY, [SHARD]).open())
    assert not list(tmp_path.iterdir())


def test_another_request_removes_it(tmp_path: Path) -> None:
    target = tmp_path / "out"
    interrupt(target, KeyboardInterrupt())
    with resumable_directory(target, OTHER) as work:
        assert partials(target) == [work.directory.parent]
        assert not list(work.directory.iterdir())


def test_an_ordinary_run_removes_it(tmp_path: Path) -> None:
    target = tmp_path / "out"
    interrupt(target, KeyboardInterrupt())
    with output_directory(target) as partial:
        assert partials(target) == [partial]
    assert list(tmp_path.iterdir()) == [target]


def test_nobody_removes_what_is_worked_in(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with resumable_directory(target, KEY) as work:
        work_a_little(work)
        with pytest.raises(OutputError, match="out: another run is writing it"), resumable_directory(target, KEY):
            pass
        with pytest.raises(RuntimeError), output_directory(target):
            raise RuntimeError
        with pytest.raises(RuntimeError), resumable_directory(target, OTHER):
            raise RuntimeError
    assert (target / SHARD).read_bytes() == b"half"
    assert list(tmp_path.iterdir()) == [target]


def test_the_second_of_two_different_runs_loses(tmp_path: Path) -> None:
    target = tmp_path / "out"

    def race() -> None:
        with resumable_directory(target, KEY) as work:
            work_a_little(work)
            with resumable_directory(target, OTHER) as other:
                (other.directory / "first").touch()

    with pytest.raises(OutputError, match="out: appeared meanwhile"):
        race()
    assert [p.name for p in target.iterdir()] == ["first"]
    # What it did would be of use if the other output were removed.
    assert len(partials(target)) == 1


@pytest.mark.parametrize("kind", ["file", "directory", "link"])
def test_nothing_is_overwritten(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "out"
    if kind == "file":
        target.touch()
    elif kind == "directory":
        target.mkdir()
    else:
        target.symlink_to("nowhere")
    with pytest.raises(OutputError, match="out: exists already"), resumable_directory(target, KEY):
        pass
    assert list(tmp_path.iterdir()) == [target]


def test_a_link_in_the_place_of_the_partial_directory(tmp_path: Path) -> None:
    """It is neither followed nor removed."""
    target, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "precious").touch()
    (tmp_path / f".out.partial-{KEY[:16]}").symlink_to(elsewhere)
    with pytest.raises(OutputError, match="cannot be written"), resumable_directory(target, KEY):
        pass
    with resumable_directory(target, OTHER):
        pass
    assert (elsewhere / "precious").exists()


def test_a_directory_that_was_replaced_before_it_was_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another run removed it as abandoned, and a third made it anew: a lock on the old one would keep nobody out."""
    target = tmp_path / "out"
    calls = iter([True])

    def late(directory: Path) -> int:
        descriptor = lock(directory)
        if next(calls, False):
            directory.rmdir()
            directory.mkdir()
        return descriptor

    monkeypatch.setattr(resumable, "lock", late)
    with (
        resumable_directory(target, KEY),
        pytest.raises(OutputError, match="another run is writing it"),
        resumable_directory(target, KEY),
    ):
        pass


def test_without_locks_nothing_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*arguments: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    target = tmp_path / "out"
    with resumable_directory(target, KEY) as work:
        work_a_little(work)
        seen: list[Path] = []

        def second(own: Workspace) -> None:
            seen.append(own.directory)
            work_a_little(own)

        interrupt(target, KeyboardInterrupt(), body=second)
        assert seen != [work.directory]
    assert (target / SHARD).read_bytes() == b"half"
    assert list(tmp_path.iterdir()) == [target]


class TestJournal:
    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        journal = Journal(tmp_path / "journal", KEY, ["one", "two"])
        journal.open()
        journal.mark_done(0, 0)
        journal.mark_done(0, 1)
        journal.mark_synced(0)
        journal.mark_done(1, 17)
        journal.close()
        return journal.path

    def read(self, path: Path, key: str = KEY, files: tuple[str, ...] = ("one", "two")) -> Journal:
        journal = Journal(path, key, files)
        journal.read()
        return journal

    def test_remembers(self, path: Path) -> None:
        journal = self.read(path)
        assert (journal.done, journal.synced) == ({(0, 0), (0, 1), (1, 17)}, {0})
        journal.open()
        journal.mark_done(1, 2)
        journal.close()
        assert self.read(path).done == {(0, 0), (0, 1), (1, 17), (1, 2)}

    def test_another_request(self, path: Path) -> None:
        assert not self.read(path, OTHER).done
        assert not self.read(path, files=("one", "three")).done

    def test_another_boot_trusts_what_was_synced(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (path.parent / "boot").write_text("another\n")
        monkeypatch.setattr(resumable, "_BOOT_ID", path.parent / "boot")
        journal = self.read(path)
        assert (journal.done, journal.synced) == ({(0, 0), (0, 1)}, {0})
        journal.open()
        journal.mark_done(1, 5)
        journal.close()
        assert self.read(path).done == {(0, 0), (0, 1), (1, 5)}
        monkeypatch.setattr(resumable, "_BOOT_ID", path.parent / "none")
        assert self.read(path).done == {(0, 0), (0, 1)}

    @pytest.mark.parametrize("cut", range(1, len("done 1 17\n") + 1))
    def test_a_line_that_was_cut_does_not_count(self, path: Path, cut: int) -> None:
        """``done 1 1`` of ``done 1 17`` would be another part."""
        path.write_bytes(path.read_bytes()[:-cut])
        journal = self.read(path)
        assert journal.done == {(0, 0), (0, 1)}
        journal.open()
        journal.close()
        assert self.read(path).done == {(0, 0), (0, 1)}

    @pytest.mark.parametrize("text", [b"\0" * 40 + b"\n", b"done 1 x\n", b"done 1\n", b"done 7 0\n", b"\xff\n", b"\n"])
    def test_damage_begins_anew(self, path: Path, text: bytes) -> None:
        path.write_bytes(path.read_bytes() + text)
        journal = self.read(path)
        assert (journal.done, journal.synced) == (set(), set())

    def test_lists_nothing_but_shards(self, tmp_path: Path) -> None:
        """Files are removed on its word."""
        names = [SHARD, "model.onnx", "../precious", f"../{SHARD}", 7]
        (tmp_path / "journal").write_text(json.dumps({"format": 1, "key": KEY, "files": names}) + "\n")
        assert resumable.journal_files(tmp_path / "journal") == [SHARD]

    def test_no_journal_at_all(self, tmp_path: Path) -> None:
        (tmp_path / "empty").touch()
        (tmp_path / "noise").write_bytes(os.urandom(1000))
        for name in ("empty", "noise", "missing"):
            assert not self.read(tmp_path / name).done
            assert resumable.journal_files(tmp_path / name) == []
