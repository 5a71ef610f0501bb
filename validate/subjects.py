"""What can be compared: any two of five kinds of model, by what the user writes for them.

======================  ==========================================================================
``ENGINE``              an engine directory: ONNX Runtime or TensorRT
``graph:MODEL``         a model directory's graph, its function bodies as they stand, unoptimised
``eager:CKPT``          our eager model in fp32; ``eager-fp16:``, ``eager-bf16:``
``transformers:CKPT``   transformers in fp32, layer by layer from disk; the prefix may be left out
======================  ==========================================================================
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from shuntyard.engines.engine import Engine, open_engine
from shuntyard.engines.manifest import EngineManifest, load_manifest, sha256_of, verify_files
from shuntyard.errors import CheckpointError, EngineError, UnsupportedError
from shuntyard.exporter.checkpoint import Checkpoint, open_checkpoint
from shuntyard.exporter.config import Llama4Config
from shuntyard.exporter.config_file import load_config_file
from shuntyard.exporter.export import MANIFEST_NAME, MODEL_NAME, ModelManifest, read_manifest
from shuntyard.exporter.values import check_finite
from shuntyard.exporter.weights import match_weights
from shuntyard.validate.eager import TORCH_TYPES, EagerStack, eager_label
from shuntyard.validate.graph import GraphStack, graph_label
from shuntyard.validate.record import RecordingKey
from shuntyard.validate.reference import LayeredReference, reference_label
from shuntyard.validate.stack import Stack

Kind = Literal["engine", "graph", "eager", "transformers"]
PREFIXES = ("graph:", "eager:", *(f"eager-{dtype}:" for dtype in TORCH_TYPES), "transformers:")


@dataclass(frozen=True)
class Identity:
    """Which weights a model has: the fingerprint of the headers, and each shard's content."""

    fingerprint: str
    shards: dict[str, str]
    rewritten_from: str | None = None


@dataclass
class Subject:
    """One side of a comparison."""

    spec: str  # as the user wrote it
    kind: Kind
    path: Path
    dtype: str
    config: Llama4Config
    identity: Identity
    make_stack: Callable[[], Stack] | None  # None: cannot be run layer by layer
    label: str  # the stack's, or the engine's where there is none
    files: dict[str, str]  # everything that the stack reads, by name: the content's hash
    checkpoint: Checkpoint | None = None
    manifest: EngineManifest | None = None
    facts: dict[str, str] = field(default_factory=dict)

    @property
    def key(self) -> RecordingKey:
        """Of what its layers give."""
        return RecordingKey(self.label, self.dtype, self.files)

    @property
    def backend(self) -> str:
        """For the report's title."""
        return self.manifest.backend if self.manifest is not None else self.kind

    @property
    def can_be_marked(self) -> bool:
        """Whether the whole engine can give out the values in between."""
        return self.manifest is not None and (self.manifest.backend == "onnxruntime" or bool(self.manifest.marked))

    def open(self, *, marked: bool = False) -> Engine:
        """The engine; its files have been held to their hashes before."""
        return open_engine(self.path, marked=marked)


def open_subject(spec: str, *, default: Literal["engine", "transformers"]) -> Subject:
    """Opens one side, and holds its files to what is recorded of them.

    Args:
        spec: see the module's table.
        default: what a directory that is no engine is taken for; "engine" refuses it.

    Raises:
        CheckpointError: it is not there, or broken.
        EngineError: an engine directory is damaged.
        UnsupportedError: it cannot be told what is meant.
    """
    prefix = next((p for p in PREFIXES if spec.startswith(p)), "")
    path = Path(spec.removeprefix(prefix))
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such directory", hint="give an engine, model or checkpoint directory")
    kind = _kind_of_directory(path)
    if not prefix and kind == "engine":
        return _engine(spec, path)
    if not prefix and default == "engine":
        is_model = kind == "model"
        raise UnsupportedError(
            f"{path}: is a {'model directory' if is_model else 'checkpoint'}, not an engine",
            hint=f"shuntyard build makes an engine; graph:{path} compares the graph itself"
            if is_model
            else f"eager:{path} compares our eager model, transformers:{path} transformers",
        )
    if kind == "engine":
        raise UnsupportedError(f"{spec}: {path} is an engine", hint=f"leave out {prefix}")
    if prefix == "graph:":
        if kind != "model":
            raise UnsupportedError(f"{spec}: {path} is no model directory", hint="shuntyard export makes one")
        return _graph(spec, path)
    return _of_checkpoint(spec, path, prefix)


def _kind_of_directory(path: Path) -> str:
    if not (path / MANIFEST_NAME).exists():
        return "checkpoint"
    return str(read_manifest(path).get("kind"))


def _engine(spec: str, path: Path) -> Subject:
    manifest = load_manifest(path)
    verify_files(path, manifest, contents=True)
    make: Callable[[], Stack] | None = None
    if manifest.backend == "onnxruntime":
        graph, longest = path / manifest.engine_file, manifest.limits.max_tokens

        def make() -> Stack:
            return GraphStack(graph, manifest.dtype, optimise=True, longest=longest)

    return Subject(
        spec,
        "engine",
        path,
        manifest.dtype,
        load_config_file(path / "config.json").text,
        Identity(manifest.checkpoint_fingerprint, manifest.checkpoint_sha256, manifest.rewritten_from),
        make,
        graph_label(optimise=True) if make else f"{manifest.backend} {manifest.backend_version}",
        {name: record.sha256 for name, record in manifest.files.items()},
        manifest=manifest,
        facts=_engine_facts(manifest),
    )


def _engine_facts(manifest: EngineManifest) -> dict[str, str]:
    limits = manifest.limits
    facts = {
        "runtime": f"{manifest.backend} {manifest.backend_version}",
        "target": manifest.target,
        "compute type": manifest.dtype,
        "limits": f"batch {limits.max_batch}, context {limits.max_context}, {limits.max_tokens} tokens a call",
        "attention chunk": "none" if limits.chunk is None else str(limits.chunk),
        "plugins": ", ".join(f"{n} {name}" for name, n in manifest.plugins.items()) or "none: function bodies",
        "weights": f"{len(manifest.checkpoint_sha256)} shards, fingerprint {manifest.checkpoint_fingerprint[:16]}",
        "graph": manifest.graph_sha256[:16],
        "built by": f"shuntyard {manifest.shuntyard}",
    }
    if manifest.marked:
        facts["marked"] = f"{len(manifest.marked)} values in between are outputs: not the engine that is used"
    return facts


def _graph(spec: str, path: Path) -> Subject:
    manifest = ModelManifest.model_validate(read_manifest(path))
    checkpoint, shards = _opened(path)
    graph = sha256_of(path / MODEL_NAME)
    if graph != manifest.graph_sha256:
        raise EngineError(f"{path / MODEL_NAME}: is not the graph that was exported", hint="export again")
    return Subject(
        spec,
        "graph",
        path,
        manifest.dtype,
        checkpoint.config,
        Identity(checkpoint.fingerprint, shards, manifest.rewritten_from),
        lambda: GraphStack(path / MODEL_NAME, manifest.dtype, optimise=False),
        graph_label(optimise=False),
        {**shards, **_hashes(path, MODEL_NAME)},
        checkpoint=checkpoint,
        facts={"graph": graph[:16], "compute type": manifest.dtype},
    )


def _of_checkpoint(spec: str, path: Path, prefix: str) -> Subject:
    checkpoint, shards = _opened(path)
    kind: Kind = "eager" if prefix.startswith("eager") else "transformers"
    dtype = prefix.removeprefix("eager-").removesuffix(":") if prefix.startswith("eager-") else "fp32"

    def make() -> Stack:
        return EagerStack(path, dtype) if kind == "eager" else LayeredReference(path)

    return Subject(
        spec,
        kind,
        path,
        dtype,
        checkpoint.config,
        Identity(checkpoint.fingerprint, shards),
        make,
        reference_label() if kind == "transformers" else eager_label(),
        {**shards, **_hashes(path)},
        checkpoint=checkpoint,
        facts={"compute type": dtype},
    )


def _hashes(path: Path, *names: str) -> dict[str, str]:
    return {name: sha256_of(path / name) for name in ("config.json", *names)}


def _opened(path: Path) -> tuple[Checkpoint, dict[str, str]]:
    """The checkpoint with every value seen to be finite, and the hash of each shard."""
    checkpoint = open_checkpoint(path)
    check_finite(match_weights(checkpoint))
    return checkpoint, {header.file.name: sha256_of(header.file) for header in checkpoint.headers}
