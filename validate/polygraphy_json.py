"""Speaks with Polygraphy: feeds for ``polygraphy run --load-inputs``, results for ``--load-outputs``, and results back.

Polygraphy calls a graph once a feed, and no call of ours crosses a chunk's edge (``exporter/graph.py``): a feed is the
*first piece* of a sequence, on zeroed caches. What is behind it only shuntyard's own driver feeds.

The files are Polygraphy's own, JSON in which an object's ``polygraphy_class`` says what it was. They are written by
Polygraphy, and read without it: its reader makes whatever object any imported module has registered, and in older
versions hands tensors to ``torch.load`` without ``weights_only``. Here a file can hold results of arrays, and no more.

numpy has no bf16, and saves one that ml_dtypes made as two nameless bytes. So bf16 goes as torch tensors both ways:
Polygraphy takes them and, once one input is a tensor, gives all outputs as tensors.
"""

from __future__ import annotations

import base64
import importlib
import io
import math
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch

from shuntyard.engines.engine import Engine
from shuntyard.engines.manifest import CacheShape, load_manifest
from shuntyard.errors import EngineError, NotFiniteError, OutputError
from shuntyard.exporter.config_file import load_config_file
from shuntyard.exporter.export import ModelManifest, read_manifest
from shuntyard.exporter.strict_json import parse_json
from shuntyard.validate import values
from shuntyard.validate.values import Array, Tokens

NUMPY = {"fp32": np.dtype(np.float32), "fp16": np.dtype(np.float16), "bf16": np.dtype(ml_dtypes.bfloat16)}

HINT_SAVE_AGAIN = "save it again: polygraphy run ... --load-inputs OUR_INPUTS --save-outputs FILE.json"

_CLASS = "polygraphy_class"


@dataclass(frozen=True)
class Interface:
    """What one call of a graph takes and gives; see ``exporter/graph.py``."""

    dtype: str  # of the caches
    vocab_size: int
    longest: int  # tokens that a first call takes: no chunk's edge, no limit of the engine is crossed
    cache: tuple[CacheShape, ...]
    static_rows: bool  # TensorRT: caches have all their rows; ONNX Runtime: as many as the call needs

    @classmethod
    def of(cls, directory: Path) -> Interface:
        """That of an engine or of a model directory.

        Raises:
            CheckpointError: it is neither.
            EngineError: the engine was built by another version, or is marked.
        """
        if read_manifest(directory).get("kind") == "model":
            config = load_config_file(directory / "config.json").text
            context = config.max_position_embeddings
            cache = tuple(
                CacheShape(
                    layer=i,
                    heads=config.num_key_value_heads,
                    rows=config.cache_rows(i, context),
                    head_dim=config.head_dim,
                )
                for i in range(config.num_hidden_layers)
            )
            dtype = ModelManifest.model_validate(read_manifest(directory)).dtype
            return cls(dtype, config.vocab_size, min(context, config.attention_chunk_size or context), cache, False)
        manifest = load_manifest(directory)
        if manifest.marked:
            raise EngineError(
                f"{directory}: its values in between are outputs too, which is not what a user's engine gives",
                hint="give the engine that was built without --mark",
            )
        limits = manifest.limits
        longest = min(limits.max_context, limits.max_tokens, limits.chunk or limits.max_context)
        static = manifest.backend != "onnxruntime"
        return cls(manifest.dtype, manifest.vocab_size, longest, tuple(manifest.cache), static)

    def rows(self, shape: CacheShape, tokens: int) -> int:
        """Rows of a layer's cache in a first call of so many tokens: no more than it fills, where that may be."""
        return shape.rows if self.static_rows else min(shape.rows, tokens)

    def piece(self, sequence: values.Sequence) -> Tokens:
        """The tokens ``i64 [S']`` of a sequence that its first call takes.

        Raises:
            EngineError: a token is not in the vocabulary, or there is none.
        """
        tokens = np.asarray(sequence.tokens[: self.longest], np.int64)
        if len(tokens) == 0 or tokens.min() < 0 or tokens.max() >= self.vocab_size:
            raise EngineError(
                f"sequence '{sequence.label}' is empty or has a token outside 0..{self.vocab_size - 1}",
                hint="is it from another tokenizer?",
            )
        return tokens

    def feed(self, sequence: values.Sequence) -> dict[str, Array]:
        """The inputs of the first call on a sequence, by name, for a batch of one; caches are zero."""
        tokens = self.piece(sequence)
        places = np.arange(len(tokens), dtype=np.int64)[None]
        made: dict[str, Array] = {"input_ids": tokens[None], "position_ids": places, "logits_indices": places}
        for shape in self.cache:
            for part in ("key", "value"):
                size = (1, shape.heads, self.rows(shape, len(tokens)), shape.head_dim)
                made[f"past_key_values.{shape.layer}.{part}"] = np.zeros(size, NUMPY[self.dtype])
        return made

    def output_shapes(self, tokens: int) -> dict[str, tuple[int, ...]]:
        """What the first call on so many tokens gives, by name."""
        shapes: dict[str, tuple[int, ...]] = {"logits": (1, tokens, self.vocab_size)}
        for shape in self.cache:
            size = (1, shape.heads, self.rows(shape, tokens), shape.head_dim)
            shapes |= {f"present.{shape.layer}.{part}": size for part in ("key", "value")}
        return shapes


@dataclass(frozen=True)
class LoadedOutputs:
    """What somebody's runner made of a sequence's first ``S'`` tokens; float32."""

    label: str  # the sequence's
    runner: str  # as Polygraphy calls it
    logits: Array  # [S', V]
    keys: tuple[Array, ...]  # [S', G, D] of each layer, as values.LayerValues has them
    values: tuple[Array, ...]  # [S', G, D]


def save_inputs(path: Path, sequences: Sequence[values.Sequence], interface: Interface) -> list[str]:
    """Writes one feed a sequence, for ``polygraphy run --load-inputs``; gives notes on what is left out.

    Raises:
        EngineError: Polygraphy is not installed, or a sequence does not fit the vocabulary.
        OutputError: the file exists or cannot be written.
    """
    polygraphy = _library("polygraphy.json")
    feeds = [_portable(interface.feed(sequence)) for sequence in sequences]
    _write(path, polygraphy.to_json(feeds))
    cut = [sequence for sequence in sequences if len(sequence.tokens) > interface.longest]
    note = (
        f"{path.name}: {len(cut)} of {len(sequences)} sequences are cut to their first {interface.longest} tokens: a "
        "call never crosses the edge of a chunk, and Polygraphy makes one call of each"
    )
    return [note] if cut else []


def first_calls(
    engine: Engine, sequences: Sequence[values.Sequence], interface: Interface
) -> Iterator[dict[str, Array]]:
    """What the engine, driven by us, gives for the feeds of :func:`save_inputs`: one mapping each, by output name.

    Raises:
        EngineError: a sequence does not fit the vocabulary.
        NotFiniteError: the engine computed NaN or infinity.
    """
    for sequence in sequences:
        tokens = interface.piece(sequence)
        found = engine.record(tokens[None])
        made: dict[str, Array] = {"logits": found.logits}
        shapes = interface.output_shapes(len(tokens))
        for i, shape in enumerate(interface.cache):
            for part, recorded in (("key", found.keys[i]), ("value", found.values[i])):
                name = f"present.{shape.layer}.{part}"
                made[name] = np.zeros(shapes[name], NUMPY[interface.dtype])
                # Back to the type that it has in the cache, which is exact.
                made[name][:, :, : len(tokens)] = recorded.swapaxes(1, 2)
        yield made


def save_outputs(path: Path, outputs: Iterable[Mapping[str, Array]], runner: str) -> None:
    """Writes results, by output name, one mapping a feed, for ``polygraphy run --load-outputs``.

    Args:
        path: a file ``*.json``.
        outputs: ``logits`` and ``present.*`` as the graph gives them.
        runner: what Polygraphy shall call us, as ``shuntyard-onnxruntime-fp32``.

    Raises:
        EngineError: Polygraphy is not installed.
        OutputError: the file exists or cannot be written.
    """
    results = _library("polygraphy.comparator").RunResults()
    results.add([_portable(output) for output in outputs], runner_name=runner)
    _write(path, results.to_json())


def load_outputs(
    path: Path, sequences: Sequence[values.Sequence], interface: Interface, runner: str | None = None
) -> list[LoadedOutputs]:
    """Reads what ``polygraphy run --save-outputs`` wrote for the feeds that :func:`save_inputs` made of ``sequences``.

    Args:
        path: a file, or a directory of one file a feed.
        sequences: those of the feeds, in their order.
        interface: of the engine or model directory that the feeds were made for.
        runner: whose results, where the file has those of several.

    Raises:
        EngineError: the file is damaged, or does not hold results of these feeds; file and tensor are named.
        NotFiniteError: an output holds NaN or infinity.
    """
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    if not files:
        raise EngineError(f"{path}: holds no *.json", hint=HINT_SAVE_AGAIN)
    found = [(file, result) for file in files for result in _iterations(file, runner)]
    runners = sorted({result[0] for _, result in found})
    if len(runners) > 1:
        raise EngineError(f"{path}: its files are of runners {runners!r:.200}", hint="keep those of one run")
    if len(found) != len(sequences):
        raise EngineError(
            f"{path}: has the results of {len(found)} feeds, there are {len(sequences)} sequences",
            hint="make inputs and outputs anew from the same sequences",
        )
    return [
        _checked(file, result, sequence, interface) for (file, result), sequence in zip(found, sequences, strict=True)
    ]


def _library(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise EngineError(
            f"Polygraphy's files are written by Polygraphy, which cannot be imported: {error}",
            hint="pip install 'shuntyard[polygraphy]'",
        ) from error


def _portable(arrays: Mapping[str, Array]) -> dict[str, Any]:
    """The arrays, bf16 as torch tensors."""
    return {
        name: torch.from_numpy(array.view(np.int16)).view(torch.bfloat16) if array.dtype == NUMPY["bf16"] else array
        for name, array in ((name, np.ascontiguousarray(array)) for name, array in arrays.items())
    }


def _write(path: Path, text: str) -> None:
    if path.suffix != ".json":
        raise OutputError(f"{path}: must end in .json", hint="Polygraphy takes a name without an ending as a directory")
    try:
        with path.open("x", encoding="ascii") as stream:
            stream.write(text)
    except FileExistsError as error:
        raise OutputError(f"{path}: exists already", hint="give another path, or remove it first") from error
    except OSError as error:
        path.unlink(missing_ok=True)
        raise OutputError(f"{path}: cannot be written: {error.strerror}", hint="give another path") from error


def _iterations(file: Path, runner: str | None) -> list[tuple[str, dict[str, Any]]]:
    """Runner and undecoded outputs of each feed, for the one runner that is asked for, or that there is."""
    try:
        raw = parse_json(file.read_bytes())
    except OSError as error:
        raise EngineError(f"{file}: cannot be read: {error.strerror}", hint="check the path") from error
    except ValueError as error:
        raise EngineError(f"{file}: is no valid JSON: {error}", hint=HINT_SAVE_AGAIN) from error
    runs = _member(file, "the file", raw, "RunResults", "lst", list)
    names: list[str] = []
    for run in runs:
        if not (isinstance(run, list) and len(run) == 2 and isinstance(run[0], str) and isinstance(run[1], list)):
            raise EngineError(f"{file}: 'lst' is no list of runners and their results", hint=HINT_SAVE_AGAIN)
        names.append(run[0])
    wanted = names if runner is None else [name for name in names if name == runner]
    if len(wanted) != 1:
        asked = "" if runner is None else f", none of one runner '{runner:.80}'"
        raise EngineError(
            f"{file}: holds results of {len(names)} runners {names!r:.200}{asked}", hint="name the runner that is meant"
        )
    results = runs[names.index(wanted[0])][1]
    where = f"runner '{wanted[0]:.80}'"
    return [(wanted[0], _member(file, where, result, "IterationResult", "outputs", dict)) for result in results]


def _member(file: Path, where: str, raw: Any, kind: str, key: str, of: type) -> Any:
    """One member of an object that Polygraphy wrote; the object's kind and the member's type are checked."""
    if not isinstance(raw, dict) or raw.get(_CLASS) != kind or not isinstance(raw.get(key), of):
        got = repr(raw.get(_CLASS)) if isinstance(raw, dict) else type(raw).__name__
        raise EngineError(
            f"{file}: {where} must be a {kind} of Polygraphy with '{key}', got {got:.80}", hint=HINT_SAVE_AGAIN
        )
    return raw[key]


def _checked(
    file: Path, result: tuple[str, dict[str, Any]], sequence: values.Sequence, interface: Interface
) -> LoadedOutputs:
    """One feed's results, held to what the graph gives for it."""
    runner, raw = result
    count = len(interface.piece(sequence))
    shapes = interface.output_shapes(count)
    for name in [*(n for n in shapes if n not in raw), *(n for n in raw if n not in shapes)][:1]:
        wrong = "is missing" if name in shapes else "is none of the graph's"
        raise EngineError(
            f"{file}: sequence '{sequence.label}': output '{name:.80}' {wrong}",
            hint="run the graph as it was exported or built, with no output marked or removed",
        )
    arrays: dict[str, Array] = {}
    for name, shape in shapes.items():
        where = f"sequence '{sequence.label}': output '{name}'"
        array, dtype = _array(file, where, raw[name])
        expected = "fp32" if name == "logits" else interface.dtype
        if dtype != NUMPY[expected] or array.shape != shape:
            raise EngineError(
                f"{file}: {where} is {dtype} {list(array.shape)}, must be {NUMPY[expected]} {list(shape)}",
                hint="the results must be of the same sequences, and of the engine that they were made for",
            )
        if not np.isfinite(array).all():
            place = [int(i) for i in np.argwhere(~np.isfinite(array))[0]]
            raise NotFiniteError(
                f"{file}: {where} is not finite, first at {place}", hint="the runner that made it has computed wrong"
            )
        arrays[name] = array
    parts: dict[str, tuple[Array, ...]] = {
        part: tuple(
            np.ascontiguousarray(arrays[f"present.{shape.layer}.{part}"][0, :, :count].swapaxes(0, 1))
            for shape in interface.cache
        )
        for part in ("key", "value")
    }
    return LoadedOutputs(sequence.label, runner, arrays["logits"][0], parts["key"], parts["value"])


def _array(file: Path, where: str, raw: Any) -> tuple[Array, np.dtype[Any]]:
    """An array in float32, and the type that it was saved in. Nothing in the file is executed."""
    raw = _member(file, where, raw, "LazyArray", "values", dict)
    is_tensor = raw.get(_CLASS) == "Tensor"
    kind, key = ("Tensor", "tensor") if is_tensor else ("ndarray", "array")
    text = _member(file, where, raw, kind, key, str)
    try:
        data = base64.b64decode(text, validate=True)
        array, dtype = _of_torch(data) if is_tensor else _of_numpy(data)
    except Exception as error:  # torch.load raises all kinds
        raise EngineError(f"{file}: {where} is damaged: {error!s:.200}", hint=HINT_SAVE_AGAIN) from error
    return array, dtype


def _of_numpy(data: bytes) -> tuple[Array, np.dtype[Any]]:
    """What ``numpy.save`` wrote, by its header: no pickle, no archive, and no memory before the bytes are there."""
    stream = io.BytesIO(data)
    version = np.lib.format.read_magic(stream)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in readers:
        raise ValueError(f"numpy's format {version} is not known")
    shape, fortran, dtype = readers[version](stream)
    if dtype.kind not in "fiu":
        raise ValueError(f"it holds {dtype}, not numbers")
    if dtype.itemsize * math.prod(shape) != len(data) - stream.tell():
        raise ValueError(f"{len(data) - stream.tell()} bytes are no {dtype} {list(shape)}")
    array = np.frombuffer(data, dtype, offset=stream.tell()).reshape(shape, order="F" if fortran else "C")
    return array.astype(np.float32), dtype.newbyteorder("=")


def _of_torch(data: bytes) -> tuple[Array, np.dtype[Any]]:
    """What ``torch.save`` wrote of one tensor."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:  # stored, not packed: no more memory than there are bytes
        if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
            raise ValueError("the archive is packed, torch saves none such")
    tensor = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    types = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
    if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided or tensor.dtype not in types:
        raise ValueError("it is no dense tensor of fp32, fp16 or bf16")
    if tensor.numel() * tensor.element_size() > len(data):
        raise ValueError("it repeats its values")  # strides of 0
    array: Array = tensor.detach().float().numpy()
    return array, NUMPY[types[tensor.dtype]]
