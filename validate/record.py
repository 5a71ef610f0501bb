"""What a stack gives, kept on disk: run once, compared with many.

A recording is a directory of ``.npy`` files, one for each field of each layer, in which all sequences follow each other
along the first axis, and of ``recording.json``, which tells their shapes, sizes and hashes. It appears by rename,
whole, and is used only as long as every byte is as it was written.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import io
import json
import mmap
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from collections.abc import Sequence as Sequences
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch

import shuntyard
from shuntyard.errors import EngineError, OutputError
from shuntyard.exporter.output import output_directory
from shuntyard.validate.stack import Stack
from shuntyard.validate.values import Array, LayerValues, Sequence

SCHEMA = 1
INDEX_NAME = "recording.json"
FIELDS = tuple(field.name for field in dataclasses.fields(LayerValues))
READ_BYTES = 2**24

REMOVE = "remove the directory; it is made again"
DEFECT = "this is a defect of the stack, which breaks the contract of validate/stack.py"


class DamagedError(EngineError):
    """A recording that is not, or no longer, what was written."""


@dataclass(frozen=True)
class RecordingKey:
    """What a stack's values depend on, besides tokens and libraries.

    ``files``: the SHA-256 of each file that the stack reads, by name: shards, graph, and always ``config.json``.
    """

    label: str  # the stack's
    dtype: str  # the stack's
    files: Mapping[str, str]

    def digest(self, sequences: Sequences[Sequence]) -> str:
        """A directory's name in the cache: SHA-256, in hex.

        Raises:
            EngineError: ``config.json`` is not among the files.
        """
        if "config.json" not in self.files:  # the same shards are another model with another rotation
            raise EngineError(f"{self.label}: without the hash of config.json nothing can be kept", hint="give it too")
        releases = [shuntyard.__version__, torch.__version__, importlib.metadata.version("onnxruntime")]
        lengths = [len(each.tokens) for each in sequences]
        told = [SCHEMA, FIELDS, *releases, self.label, self.dtype, sorted(self.files.items()), lengths]
        digest = hashlib.sha256(json.dumps(told).encode())
        for each in sequences:
            digest.update(np.ascontiguousarray(each.tokens, "<i8").tobytes())
        return digest.hexdigest()


class Recording:
    """A stack's free run over all sequences. Arrays are read-only maps of files, ``[S, ...]`` for each sequence.

    A context manager: at its end, a recording in a temporary directory is removed.

    Raises:
        DamagedError: a file is missing, or is not what was written.
    """

    def __init__(self, directory: Path, sequences: Sequences[Sequence], *, verify: bool = True) -> None:
        self.directory, self.sequences = directory, list(sequences)
        index = _read_index(directory)
        self.label, self.dtype, self.layers = index["label"], index["dtype"], index["layers"]
        if index["lengths"] != [len(each.tokens) for each in self.sequences]:
            raise DamagedError(f"{directory}: is of other sequences", hint=REMOVE)
        self._splits = np.cumsum(index["lengths"])[:-1]
        # All files are opened here and now: the directory's name may be another's a moment later.
        self._maps = {name: _Map(directory / name, entry, verify) for name, entry in index["files"].items()}
        self._temporary: tempfile.TemporaryDirectory[str] | None = None

    def embedding(self) -> list[Array]:
        """``[S, H]`` of each sequence."""
        return self._split("embedding.npy")

    def hidden_before(self, index: int) -> list[Array]:
        """``[S, H]`` that goes into a layer, of each sequence; behind the last layer, into the head."""
        return self.embedding() if index == 0 else self._split(_file(index - 1, "hidden"))

    def layer(self, index: int) -> list[LayerValues]:
        """A layer's values, of each sequence."""
        fields = {field: self._split(_file(index, field)) for field in FIELDS if _file(index, field) in self._maps}
        return [LayerValues(**dict(zip(fields, own, strict=True))) for own in zip(*fields.values(), strict=True)]

    def logits(self) -> list[Array]:
        """``[S, V]`` of each sequence."""
        return self._split("logits.npy")

    def logits_slack(self) -> list[Array] | None:
        """``[S, 2]`` of each sequence, see :meth:`Stack.head_slack`."""
        return self._split("slack.npy") if "slack.npy" in self._maps else None

    def _split(self, name: str) -> list[Array]:
        # Pages of a map that were read count as this process's memory, though the kernel may take them back: give them
        # back now. What still looks at them reads them again.
        for key, each in self._maps.items():
            if key.partition(".")[0] != name.partition(".")[0]:
                each.release()
        return np.split(self._maps[name].array, self._splits)

    def close(self) -> None:
        """Removes the files of a recording that nobody is to find again; arrays that are in use stay readable."""
        if self._temporary is not None:
            self._temporary.cleanup()

    def __enter__(self) -> Recording:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


class _Map:
    """A file's array, mapped from the very bytes that were verified."""

    def __init__(self, path: Path, entry: Mapping[str, Any], verify: bool) -> None:
        shape = tuple(entry["shape"])
        try:
            with path.open("rb") as stream:
                start = int(entry["bytes"]) - 4 * int(np.prod(shape))
                if os.fstat(stream.fileno()).st_size != entry["bytes"] or _header(shape) != stream.read(start):
                    raise DamagedError(f"{path}: is of another size than what was written", hint=REMOVE)
                stream.seek(0)
                if verify and _hash(stream) != entry["blake2b"]:
                    raise DamagedError(f"{path}: is not what was written", hint=REMOVE)
                self._map = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise DamagedError(f"{path}: cannot be read: {error.strerror or error}", hint=REMOVE) from error
        self.array: Array = np.frombuffer(self._map, "<f4", offset=start).reshape(shape)

    def release(self) -> None:
        """Gives the pages back; they are read again where they are looked at again."""
        self._map.madvise(mmap.MADV_DONTNEED)


def _hash(stream: Any) -> str:
    digest = hashlib.blake2b()
    while data := stream.read(READ_BYTES):
        digest.update(data)
    return digest.hexdigest()


def _header(shape: tuple[int, ...]) -> bytes:
    """How a ``.npy`` file of float32 begins."""
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return head.getvalue()


def _file(layer: int, field: str) -> str:
    return f"layer-{layer:04}.{field}.npy"


def _read_index(directory: Path) -> dict[str, Any]:
    """``recording.json``, which ends with its own hash."""
    path = directory / INDEX_NAME
    try:
        text, _, digest = path.read_text(encoding="utf-8").rstrip("\n").rpartition("\n")
        if hashlib.blake2b(text.encode()).hexdigest() != digest:
            raise ValueError("its hash is of something else")
        index: dict[str, Any] = json.loads(text)
    except (OSError, ValueError) as error:
        raise DamagedError(f"{path}: is no recording: {error}", hint=REMOVE) from error
    return index


class _Writer:
    """Writes arrays ``[S, ...]`` of each sequence behind each other, as they come."""

    def __init__(self, directory: Path, label: str, lengths: list[int]) -> None:
        self.directory, self.label, self.lengths = directory, label, lengths
        self.files: dict[str, dict[str, Any]] = {}

    def write(self, stem: str, values: Iterable[Mapping[str, Array | None]]) -> None:
        """Each sequence's values, by field; the fields and the shapes of all must be those of the first."""
        shapes: dict[str, tuple[int, ...]] | None = None
        streams: dict[str, tuple[Any, Any]] = {}
        count = 0
        with contextlib.ExitStack() as stack:
            for own in values:
                arrays = {field: array for field, array in own.items() if array is not None}
                rests = {field: array.shape[1:] for field, array in arrays.items()}
                length = self.lengths[count] if count < len(self.lengths) else None
                if shapes is None:
                    shapes = rests
                    for field, rest in rests.items():
                        name = f"{stem}{field}.npy"
                        stream = stack.enter_context((self.directory / name).open("wb"))
                        streams[field] = stream, hashlib.blake2b()
                        whole = (sum(self.lengths), *rest)
                        self.files[name] = {"shape": list(whole)}
                        self._put(streams[field], _header(whole))
                for field, array in arrays.items():
                    if rests != shapes or len(array) != length or array.dtype != np.float32:
                        raise EngineError(
                            f"{self.label}: {stem}{field} of sequence {count} is {array.dtype} {list(array.shape)}",
                            hint=DEFECT,
                        )
                    self._put(streams[field], np.ascontiguousarray(array, "<f4").data.cast("B"))
                count += 1
            if count != len(self.lengths):
                raise EngineError(
                    f"{self.label}: {stem} of {count} sequences came, not {len(self.lengths)}",
                    hint=DEFECT,
                )
            for field, (stream, digest) in streams.items():
                self.files[f"{stem}{field}.npy"] |= {"bytes": stream.tell(), "blake2b": digest.hexdigest()}

    def _put(self, stream: tuple[Any, Any], data: Any) -> None:
        stream[0].write(data)
        stream[1].update(data)

    @contextlib.contextmanager
    def reading(self, name: str) -> Iterator[list[Array]]:
        """What was written, of each sequence, for as long as it is needed."""
        written = _Map(self.directory / name, self.files[name], verify=False)
        yield np.split(written.array, np.cumsum(self.lengths)[:-1])


def record(
    stack: Stack,
    sequences: Sequences[Sequence],
    directory: Path,
    report_line: Callable[[str], None] = lambda line: None,
) -> Recording:
    """Runs a stack over all sequences, each layer fed what the one before gave, into an empty directory.

    Memory is a layer's, whatever their number: values are written as they come.

    Raises:
        EngineError: the stack gives something else than a stack does.
        OSError: the directory cannot be written to.
    """
    layers = stack.config.num_hidden_layers
    writer = _Writer(directory, stack.label, [len(each.tokens) for each in sequences])
    writer.write("embedding", ({"": each} for each in stack.embed([each.tokens for each in sequences])))
    before = "embedding.npy"
    for i in range(layers):
        report_line(f"{stack.label}: layer {i + 1} of {layers}")
        with writer.reading(before) as hidden:
            writer.write(
                f"layer-{i:04}.",
                ({field: getattr(own, field) for field in FIELDS} for own in stack.layer(i, hidden)),
            )
        before = _file(i, "hidden")
    report_line(f"{stack.label}: logits")
    with writer.reading(before) as hidden:
        writer.write("logits", ({"": each} for each in stack.head(hidden)))
        slack = stack.head_slack(hidden)
        if slack is not None:
            writer.write("slack", ({"": each} for each in slack))
    index = {"schema": SCHEMA, "label": stack.label, "dtype": stack.dtype, "layers": layers}
    text = json.dumps(index | {"lengths": writer.lengths, "files": writer.files})
    digest = hashlib.blake2b(text.encode()).hexdigest()
    (directory / INDEX_NAME).write_text(f"{text}\n{digest}\n", encoding="utf-8")
    return Recording(directory, sequences, verify=False)


def cached_recording(
    make_stack: Callable[[], Stack],
    key: RecordingKey,
    sequences: Sequences[Sequence],
    root: Path | None,
    report_line: Callable[[str], None] = lambda line: None,
) -> Recording:
    """The recording of a stack from a cache, or made now: in ``root``, or where there is none, for a while only.

    A damaged one is made again. Of two that make the same at once, one keeps it and both use it.

    Raises:
        OutputError: ``root`` cannot be written to, or the disk is full.
        EngineError: the key leaves something out, the stack is another than it says, or gives what no stack should.
    """
    if root is None:
        folder = tempfile.TemporaryDirectory(prefix="shuntyard-recording-")
        try:
            with output_directory(Path(folder.name) / "recording") as directory:
                recording = record(_checked(make_stack(), key), sequences, directory, report_line)
        except BaseException:
            folder.cleanup()
            raise
        recording._temporary = folder
        return recording
    target = root / key.digest(sequences)
    found = _open(target, sequences, report_line)
    if found is not None:
        return found
    try:
        with output_directory(target) as directory:
            recording = record(_checked(make_stack(), key), sequences, directory, report_line)
    except OutputError:
        found = _open(target, sequences, report_line)  # another run was faster
        if found is None:
            raise
        return found
    recording.directory = target
    return recording


def _checked(stack: Stack, key: RecordingKey) -> Stack:
    if (stack.label, stack.dtype) != (key.label, key.dtype):
        raise EngineError(
            f"{stack.label} in {stack.dtype} runs, {key.label} in {key.dtype} is to be kept",
            hint="give the key of the stack that runs",
        )
    return stack


def _open(target: Path, sequences: Sequences[Sequence], report_line: Callable[[str], None]) -> Recording | None:
    """What is in the cache; None where nothing is, or nothing that could be used."""
    if not os.path.lexists(target):
        return None
    try:
        return Recording(target, sequences)
    except DamagedError as error:
        report_line(f"{error.message}: it is made again")
    # Out of the way first, under a name that the next run takes for abandoned if this one is killed.
    damaged = target.with_name(f".{target.name}.partial-{secrets.token_hex(4)}")
    with contextlib.suppress(FileNotFoundError):  # another run was faster
        target.rename(damaged)
        if damaged.is_dir() and not damaged.is_symlink():
            shutil.rmtree(damaged)
        else:
            damaged.unlink()
    return None
