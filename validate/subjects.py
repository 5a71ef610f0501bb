"""What can be compared: any two of five kinds of model, by what the user writes for them.

======================  ==========================================================================
``ENGINE``              an engine directory: ONNX Runtime or TensorRT
``graph:MODEL``         a model directory's graph, its function bodies as they stand, unoptimised
``eager:CKPT``          our eager model in fp32; ``eager-fp16:``, ``eager-bf16:``
``transformers:CKPT``   transformers in fp32, layer by layer from disk; the prefix may be left out
======================  ==========================================================================

A checkpoint does not say whether the inputs of products are to be rounded to FP8 numbers, only how: transformers and
the eager model round what the other side rounds. Of a model directory the eager model does what the graph does.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from shuntyard.engines.engine import Engine, open_engine
from shuntyard.engines.manifest import EngineManifest, load_manifest, sha256_of, verify_files
from shuntyard.errors import CheckpointError, EngineError, UnsupportedError
from shuntyard.exporter.checkpoint import Checkpoint, open_checkpoint
from shuntyard.exporter.config import Llama4Config
from shuntyard.exporter.config_file import load_config_file
from shuntyard.exporter.export import MANIFEST_NAME, MODEL_NAME, ModelManifest, read_manifest
from shuntyard.exporter.precision import ModulePrecision
from shuntyard.exporter.values import check_finite
from shuntyard.exporter.weights import match_weights
from shuntyard.validate.activations import Activations, described
from shuntyard.validate.eager import TORCH_TYPES, EagerStack, eager_label
from shuntyard.validate.emulate import DECLARED, EmulatedStack, Emulation, Preparer
from shuntyard.validate.graph import GraphStack, graph_label
from shuntyard.validate.matrices import Numbers
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
    modules: dict[str, ModulePrecision] | None = None  # what was asked of each; None: a checkpoint, as it is stored
    fp8_kv_cache: list[int] = field(default_factory=list)

    @property
    def activations(self) -> dict[str, str]:
        """Modules whose inputs are rounded to FP8 numbers: "static" or "dynamic"."""
        own = self.modules or {}
        return {n: m.activations.removeprefix("fp8-") for n, m in own.items() if m.activations != "none"}

    def rounding(self, other: Subject, noise: float) -> Subject:
        """Itself; a checkpoint, which says of itself only how it could be run, as one that rounds what ``other`` does.

        ``noise``: see ``activations.py``; of what the two compute.
        """
        if self.modules is not None or not other.activations:
            return self
        if self.kind == "transformers":
            own = Activations(other.activations, noise)
            label, make = reference_label(own), lambda: LayeredReference(self.path, own)
            return replace(self, label=label, make_stack=make, modules=other.modules)
        return _emulated(self, other.modules or {}, other.fp8_kv_cache)

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
        modules=manifest.modules,
        fp8_kv_cache=manifest.fp8_kv_cache,
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
    if manifest.recipe is not None:
        facts["recipe"] = manifest.recipe.name
    kinds = {n: m.activations.removeprefix("fp8-") for n, m in manifest.modules.items() if m.activations != "none"}
    if kinds:
        facts["activations"] = f"FP8 in {described(kinds)}"
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
        modules=manifest.precision,
        fp8_kv_cache=manifest.fp8_kv_cache,
    )


def _of_checkpoint(spec: str, path: Path, prefix: str) -> Subject:
    checkpoint, shards = _opened(path)
    kind: Kind = "eager" if prefix.startswith("eager") else "transformers"
    dtype = prefix.removeprefix("eager-").removesuffix(":") if prefix.startswith("eager-") else "fp32"

    def make() -> Stack:
        return EagerStack(path, dtype) if kind == "eager" else LayeredReference(path)

    found = Subject(
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
    if kind == "eager" and _kind_of_directory(path) == "model":
        manifest = ModelManifest.model_validate(read_manifest(path))
        found.identity = replace(found.identity, rewritten_from=manifest.rewritten_from)
        return _emulated(found, manifest.precision, manifest.fp8_kv_cache)
    return found


def _emulated(subject: Subject, modules: dict[str, ModulePrecision], fp8_kv_cache: list[int]) -> Subject:
    """The eager model with each module computed as the manifest of a model directory says it of the graph's."""
    own = replace(subject, modules=modules, fp8_kv_cache=fp8_kv_cache)
    products = {name: module.product for name, module in modules.items() if module.product}
    if not own.activations and not products and not fp8_kv_cache:
        return own
    told = json.dumps([sorted(own.activations.items()), sorted(products.items()), fp8_kv_cache])
    what = f"as the engine is ({hashlib.sha256(told.encode()).hexdigest()[:8]})"

    def make() -> Stack:
        caches = {f"model.layers.{layer}.self_attn": "fp8" for layer in fp8_kv_cache}
        preparer = Preparer(Numbers(subject.path), subject.dtype)
        declared = dict.fromkeys(own.activations, DECLARED)
        return EmulatedStack(Emulation(preparer, declared, caches, products), subject.dtype, what)

    return replace(own, label=f"{eager_label()}, {what}", make_stack=make)


def _hashes(path: Path, *names: str) -> dict[str, str]:
    return {name: sha256_of(path / name) for name in ("config.json", *names)}


def _opened(path: Path) -> tuple[Checkpoint, dict[str, str]]:
    """The checkpoint with every value seen to be finite, and the hash of each shard."""
    checkpoint = open_checkpoint(path)
    check_finite(match_weights(checkpoint))
    return checkpoint, {header.file.name: sha256_of(header.file) for header in checkpoint.headers}
