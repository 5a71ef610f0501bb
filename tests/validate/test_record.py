"""Recordings: what a stack gave, on disk; whole or not at all, and never used when damaged."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Sequences
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import shuntyard
from shuntyard.errors import EngineError, OutputError
from shuntyard.exporter.config import Llama4Config
from shuntyard.validate import record as module
from shuntyard.validate.record import FIELDS, INDEX_NAME, Recording, RecordingKey, cached_recording, record
from shuntyard.validate.stack import Stack
from shuntyard.validate.values import Array, LayerValues, Sequence, Tokens
from tests.checkpoints import parsed, raw_config

RAW = raw_config(num_hidden_layers=3, moe_layers=[1], interleave_moe_layer_step=...)
KEY = RecordingKey("some stack", "fp32", {"model.safetensors": "1", "config.json": "2"})


class Made(Stack):
    """Values that are a function of the place alone, so that any mix-up shows."""

    label, dtype = "some stack", "fp32"

    def __init__(self, config: Llama4Config | None = None) -> None:
        self.config = config or parsed(RAW)
        self.fed: list[list[Array]] = []
        self.spoil: Callable[[int, LayerValues], LayerValues | None] = lambda place, values: values

    def array(self, seed: Any, *shape: int) -> Array:
        return np.random.default_rng([int(n * 1000) for n in seed]).standard_normal(shape).astype(np.float32)

    def embed(self, sequences: Sequences[Tokens]) -> Iterator[Array]:
        for tokens in sequences:
            yield self.array([1, int(tokens.sum())], len(tokens), self.config.hidden_size)

    def layer(self, index: int, hidden: Sequences[Array]) -> Iterator[LayerValues]:
        c = self.config
        self.fed.append([each.copy() for each in hidden])
        for place, each in enumerate(hidden):
            size, heads = len(each), (c.num_key_value_heads, c.head_dim)

            def new(field: int, *rest: int, each: Array = each, size: int = size) -> Array:
                return self.array([2, index, field, abs(float(each.sum()))], size, *rest)

            moe = c.is_moe(index)
            values = LayerValues(
                new(0, *heads),
                new(1, *heads),
                new(2, c.hidden_size),
                new(3, c.hidden_size),
                new(4, c.hidden_size),
                new(5, c.hidden_size),
                new(6, c.hidden_size),
                new(7, c.num_local_experts) if moe else None,
                new(8, c.hidden_size) if moe else None,
            )
            spoilt = self.spoil(place, values)
            if spoilt is not None:
                yield spoilt

    def head(self, hidden: Sequences[Array]) -> Iterator[Array]:
        self.fed.append([each.copy() for each in hidden])
        for each in hidden:
            yield self.array([3, abs(float(each.sum()))], len(each), self.config.vocab_size)


def sequences_of(*lengths: int) -> list[Sequence]:
    random = np.random.default_rng(lengths)
    return [Sequence(f"the {i}th", random.integers(0, 64, length)) for i, length in enumerate(lengths)]


SOME = sequences_of(3, 1, 5)


def assert_is_run(recording: Recording, sequences: list[Sequence]) -> None:
    """That it says what a run of ``Made`` in memory gives."""
    stack = Made()
    hidden = list(stack.embed([each.tokens for each in sequences]))
    assert_equal(recording.embedding(), hidden)
    for i in range(recording.layers):
        assert_equal(recording.hidden_before(i), hidden)
        values = list(stack.layer(i, hidden))
        got = recording.layer(i)
        assert len(got) == len(values)
        for field in FIELDS:
            ours = [getattr(own, field) for own in got]
            theirs = [getattr(own, field) for own in values]
            assert [own is None for own in ours] == [own is None for own in theirs], field
            if theirs[0] is not None:
                assert_equal(ours, theirs)
        hidden = [own.hidden for own in values]
    assert_equal(recording.hidden_before(recording.layers), hidden)
    assert_equal(recording.logits(), list(stack.head(hidden)))


def assert_equal(ours: Sequences[Array], theirs: Sequences[Array]) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype == np.float32 and not a.flags.writeable
        np.testing.assert_array_equal(a, b)


@given(st.lists(st.integers(1, 6), min_size=1, max_size=4))
def test_says_what_the_stack_gave(tmp_path_factory: pytest.TempPathFactory, lengths: list[int]) -> None:
    sequences = sequences_of(*lengths)
    lines: list[str] = []
    stack, folder = Made(), tmp_path_factory.mktemp("recording")
    recording = record(stack, sequences, folder, lines.append)
    assert_is_run(recording, sequences)
    assert_is_run(Recording(folder, sequences), sequences)
    for i, fed in enumerate(stack.fed):
        assert_equal(recording.hidden_before(i), [as_read(each) for each in fed])
    assert lines == [f"some stack: layer {i} of 3" for i in (1, 2, 3)] + ["some stack: logits"]
    assert (recording.label, recording.dtype, recording.sequences) == ("some stack", "fp32", sequences)


def as_read(array: Array) -> Array:
    array.flags.writeable = False
    return array


def test_files_are_numpys_own(tmp_path: Path) -> None:
    recording = record(Made(), SOME, tmp_path)
    for field in ("key", "router"):
        theirs = np.load(tmp_path / f"layer-0001.{field}.npy")
        np.testing.assert_array_equal(theirs, np.concatenate([getattr(own, field) for own in recording.layer(1)]))
    assert not (tmp_path / "layer-0000.router.npy").exists()


def test_arrays_outlive_pages_files_and_the_recording(tmp_path: Path) -> None:
    recording = record(Made(), SOME, tmp_path)
    first, copies = recording.layer(0), [own.key.copy() for own in recording.layer(0)]
    recording.logits()  # gives back the pages of layer 0
    shutil.rmtree(tmp_path)
    assert_is_run(recording, SOME)
    recording.close()
    for own, copy in zip(first, copies, strict=True):
        np.testing.assert_array_equal(own.key, copy)


def never() -> Stack:
    raise AssertionError("it was in the cache")


def test_the_second_run_reads_the_first(tmp_path: Path) -> None:
    root = tmp_path / "deep" / "cache"
    with cached_recording(Made, KEY, SOME, root) as recording:
        assert_is_run(recording, SOME)
    renamed = [Sequence(f"{i}", each.tokens) for i, each in enumerate(SOME)]
    with cached_recording(never, KEY, renamed, root) as again:
        assert_is_run(again, SOME)
        assert [each.label for each in again.sequences] == ["0", "1", "2"]
    assert [path.name for path in root.iterdir()] == [again.directory.name]


def test_what_it_depends_on_makes_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = dict(KEY.files)
    others: list[tuple[RecordingKey, list[Sequence]]] = [
        (KEY, SOME),
        (RecordingKey("another stack", "fp32", files), SOME),
        (RecordingKey("some stack", "fp32", files | {"model.safetensors": "3"}), SOME),
        (RecordingKey("some stack", "fp32", files | {"config.json": "3"}), SOME),
        (RecordingKey("some stack", "fp32", files | {"more.safetensors": "3"}), SOME),
        (KEY, SOME[::-1]),
        (KEY, SOME[:2]),
        (KEY, [Sequence("all", np.concatenate([each.tokens for each in SOME]))]),
        (KEY, [Sequence("", each.tokens ^ 1) for each in SOME]),
    ]

    def labelled(key: RecordingKey) -> Stack:
        stack = Made()
        stack.label = key.label
        return stack

    names = {
        cached_recording(lambda key=key: labelled(key), key, sequences, tmp_path).directory.name  # type: ignore[misc]
        for key, sequences in others
    }
    for owner, name, value in (
        (shuntyard, "__version__", "0"),
        (torch, "__version__", "0"),
        (module, "SCHEMA", -1),
        (module, "FIELDS", FIELDS[::-1]),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, value)
            names.add(cached_recording(Made, KEY, SOME, tmp_path).directory.name)
    assert len(names) == len(others) + 4 == len(list(tmp_path.iterdir()))


def test_a_key_says_it_all_or_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="without the hash of config.json"):
        cached_recording(never, RecordingKey("some stack", "fp32", {"model.safetensors": "1"}), SOME, tmp_path)
    with pytest.raises(EngineError, match="some stack in fp32 runs, some stack in bf16 is to be kept"):
        cached_recording(Made, RecordingKey("some stack", "bf16", KEY.files), SOME, tmp_path)
    assert not list(tmp_path.iterdir())


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def put_a_file_there(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.touch()


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "a bit of a value": lambda folder: flip(folder / "layer-0001.key.npy", -1),
    "a bit of a header": lambda folder: flip(folder / "logits.npy", 8),
    "a letter of the index": lambda folder: flip(
        folder / INDEX_NAME, (folder / INDEX_NAME).read_bytes().find(b"stack")
    ),
    "no index": lambda folder: (folder / INDEX_NAME).unlink(),
    "an empty index": lambda folder: (folder / INDEX_NAME).write_text(""),
    "no file": lambda folder: (folder / "embedding.npy").unlink(),
    "a shorter file": lambda folder: os.truncate(folder / "layer-0000.hidden.npy", 200),
    "a longer file": lambda folder: os.truncate(folder / "layer-0000.hidden.npy", 2**20),
    "a file in its place": put_a_file_there,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_one_is_made_again(tmp_path: Path, damage: str) -> None:
    folder = cached_recording(Made, KEY, SOME, tmp_path).directory
    cached_recording(never, KEY, SOME, tmp_path)
    DAMAGES[damage](folder)
    lines: list[str] = []
    assert_is_run(cached_recording(Made, KEY, SOME, tmp_path, lines.append), SOME)
    assert lines[0].endswith(": it is made again") and str(folder) in lines[0]
    assert_is_run(cached_recording(never, KEY, SOME, tmp_path), SOME)
    assert list(tmp_path.iterdir()) == [folder]


def test_of_two_at_once_both_use_one(tmp_path: Path) -> None:
    def slow() -> Stack:
        cached_recording(Made, KEY, SOME, tmp_path)  # another run begins later and ends earlier
        return Made()

    assert_is_run(cached_recording(slow, KEY, SOME, tmp_path), SOME)
    assert len(list(tmp_path.iterdir())) == 1


def be_killed(root: Path) -> None:
    stack = Made()
    stack.spoil = lambda place, values: os.kill(os.getpid(), signal.SIGKILL) if place == 1 else values
    cached_recording(lambda: stack, KEY, SOME, root)


def test_a_killed_run_leaves_nothing_that_is_used(tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=be_killed, args=(tmp_path,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".") and (left / "layer-0000.key.npy").exists()
    recording = cached_recording(Made, KEY, SOME, tmp_path)
    assert_is_run(recording, SOME)
    assert list(tmp_path.iterdir()) == [recording.directory]


def test_without_a_cache_nothing_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with cached_recording(Made, RecordingKey("some stack", "fp32", {}), SOME, None) as recording:
        assert_is_run(recording, SOME)
        assert len(list(tmp_path.iterdir())) == 1
    assert not list(tmp_path.iterdir())
    stack = Made()
    stack.spoil = lambda place, values: None
    with pytest.raises(EngineError):
        cached_recording(lambda: stack, KEY, SOME, None)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (lambda place, values: None, r"some stack: layer-0000\. of 0 sequences came, not 3"),
        (lambda place, values: values if place else None, r"key of sequence 0 is float32 \[1, 2, 8\]"),
        (lambda place, v: replaced(v, value=v.value[:-1]), r"layer-0000\.value of sequence 0 is float32 \[2, 2, 8\]"),
        (lambda place, v: replaced(v, value=v.value[..., place:]), r"value of sequence 1 is float32 \[1, 2, 7\]|key"),
        (lambda place, v: replaced(v, hidden=v.hidden.astype(np.float64)), r"hidden of sequence 0 is float64"),
        (lambda place, v: replaced(v, router=v.hidden) if place else v, r"of sequence 1 is"),
    ],
)
def test_a_stack_that_is_none_is_refused(
    tmp_path: Path, spoil: Callable[[int, LayerValues], LayerValues | None], match: str
) -> None:
    stack = Made()
    stack.spoil = spoil
    with pytest.raises(EngineError, match=match):
        record(stack, SOME, tmp_path)


def replaced(values: LayerValues, **changes: Array) -> LayerValues:
    return LayerValues(**{field: getattr(values, field) for field in FIELDS} | changes)


def test_a_place_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        cached_recording(Made, KEY, SOME, tmp_path / "file")
