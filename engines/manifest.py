"""``shuntyard.json`` of an engine directory: what it is, from what it was made, and what it promises."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from shuntyard.errors import EngineError
from shuntyard.exporter.export import MANIFEST_NAME, RecipeRecord, read_manifest
from shuntyard.exporter.precision import ModulePrecision
from shuntyard.plugins.library import BuildInfo

BACKENDS = ("onnxruntime", "tensorrt", "tensorrt-rtx")
Backend = Literal["onnxruntime", "tensorrt", "tensorrt-rtx"]

LAYERS_NAME = "layers.json"
LOG_NAME = "build.log"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FileRecord(_Strict):
    """A file of the directory, by content; the time of its last change says when to look at its content again."""

    bytes: int
    sha256: str
    mtime_ns: int


class Limits(_Strict):
    """The largest shapes that an engine takes."""

    max_batch: int
    max_context: int
    max_tokens: int  # of a sequence in one call; longer inputs are cut into pieces
    chunk: int | None  # attention chunk: a call never crosses its edge


class CacheShape(_Strict):
    """One layer's key (or value) cache is ``[B, heads, rows, head_dim]``."""

    layer: int
    heads: int
    rows: int
    head_dim: int


class EngineManifest(_Strict):
    """The whole record."""

    kind: Literal["engine"] = "engine"
    shuntyard: str
    backend: Backend
    backend_version: str
    target: str  # "cpu", or the GPU's compute capability as "sm89"
    dtype: Literal["fp32", "fp16", "bf16"]
    engine_file: str
    plugin_library: str | None
    plugin_build: BuildInfo | None
    plugins: dict[str, int]  # plugin name -> how many layers of the engine are that plugin
    vocab_size: int
    eos_token_ids: list[int]
    limits: Limits
    cache: list[CacheShape]
    marked: list[str] = []  # values in between that are outputs too: an engine to look into, not to use
    precision: dict[str, str]  # product, attention or plugin, by its path in the model -> compute type
    modules: dict[str, ModulePrecision]  # what was asked of each module
    recipe: RecipeRecord | None  # by which it was asked
    fp8_kv_cache: list[int]  # layers whose keys and values are rounded to FP8 numbers
    checkpoint_fingerprint: str  # of the headers
    rewritten_from: str | None  # fingerprint of the checkpoint that these weights were rewritten from
    checkpoint_sha256: dict[str, str]  # of each shard's content
    graph_sha256: str  # of the model directory's model.onnx
    files: dict[str, FileRecord]


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's content, in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def record_files(directory: Path, known: dict[str, str]) -> dict[str, FileRecord]:
    """Records every file of a directory but the manifest itself and what is hidden.

    ``known`` holds hashes by file name that need not be computed again.
    """
    files = sorted(p for p in directory.iterdir() if p.name != MANIFEST_NAME and not p.name.startswith("."))
    return {
        p.name: FileRecord(
            bytes=p.stat().st_size, sha256=known.get(p.name) or sha256_of(p), mtime_ns=p.stat().st_mtime_ns
        )
        for p in files
    }


def load_manifest(directory: Path) -> EngineManifest:
    """Reads and checks the manifest of an engine directory.

    Raises:
        CheckpointError: there is none.
        EngineError: it is not an engine's, or of another version.
    """
    raw = read_manifest(directory)
    if raw.get("kind") == "model":
        raise EngineError(
            f"{directory}: is a model directory, not an engine", hint=f"shuntyard build {directory} ENGINE makes one"
        )
    try:
        return EngineManifest.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise EngineError(
            f"{directory / MANIFEST_NAME}: {where}: {first['msg']}",
            hint="the engine was built by another version of shuntyard; build it again",
        ) from error


def file_state(directory: Path, manifest: EngineManifest) -> dict[str, tuple[int, int]]:
    """Size and time of change of each file, to see that nobody writes into an engine that is open."""
    found = {name: (directory / name).stat() for name in manifest.files if (directory / name).exists()}
    return {name: (status.st_size, status.st_mtime_ns) for name, status in found.items()}


def verify_files(directory: Path, manifest: EngineManifest, *, contents: bool) -> None:
    """Holds the directory's files to the manifest: their sizes, and the content of those that were written to since.

    Weights may be hard links to a checkpoint: who writes into it writes into the engine. ``contents`` looks at the
    content of every file, whatever its time of change says.

    Raises:
        EngineError: a file is missing or another than the one that was built.
    """
    for name, record in manifest.files.items():
        path = directory / name
        if not path.is_file():
            raise EngineError(f"{path}: is missing from the engine", hint="build the engine again")
        status = path.stat()
        if status.st_size != record.bytes:
            raise EngineError(
                f"{path}: has {status.st_size} bytes, the engine was built with {record.bytes}",
                hint="build the engine again",
            )
        if (contents or status.st_mtime_ns != record.mtime_ns) and sha256_of(path) != record.sha256:
            raise EngineError(
                f"{path}: has changed since the engine was built",
                hint="weights are hard links: somebody wrote into the checkpoint's file; export and build again",
            )
