"""``build``: a model directory becomes an engine directory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
import onnxruntime

import shuntyard
from shuntyard.engines import layer_table, lower, proof
from shuntyard.engines.manifest import (
    BACKENDS,
    LAYERS_NAME,
    CacheShape,
    EngineManifest,
    Limits,
    record_files,
    sha256_of,
)
from shuntyard.engines.onnxruntime_runner import open_session
from shuntyard.errors import CheckpointError, EngineError, UnsupportedError
from shuntyard.exporter.checkpoint import SIDE_FILES, Checkpoint, open_checkpoint
from shuntyard.exporter.config import HINT_CONFIG, Llama4Config
from shuntyard.exporter.config_file import token_id
from shuntyard.exporter.export import MANIFEST_NAME, MODEL_NAME, ModelManifest, check_graph, read_manifest
from shuntyard.exporter.graph import COMPUTE_TYPES, mark
from shuntyard.exporter.output import link_or_copy, output_directory
from shuntyard.exporter.precision import EMBEDDING
from shuntyard.exporter.strict_json import read_json
from shuntyard.exporter.values import check_finite, has_equal_rows
from shuntyard.exporter.weights import match_weights
from shuntyard.plugins.library import BuildInfo

GRAPH_NAME = "engine.onnx"

LARGEST = {"fp32": None, "bf16": None, "fp16": 65504.0}
"""Largest weight that survives the cast to a compute type; None where every checkpoint type fits."""


@dataclass(frozen=True)
class Request:
    """What to build."""

    backend: str = "onnxruntime"
    dtype: str | None = None  # default: the model directory's
    gpu: str | None = None  # "sm89"; TensorRT: default the GPU at hand
    max_batch: int = 8
    max_context: int | None = None  # default: the model's, at most DEFAULT_CONTEXT
    max_tokens: int = 512
    copy: bool = False
    mark: bool = False  # give out the values in between: an engine to look into, not to use


DEFAULT_CONTEXT = 8192


@dataclass
class Reporter:
    """Where a build tells how it goes: lines, what the user should know, and progress of named phases."""

    line: Callable[[str], None] = lambda text: None
    warning: Callable[[str], None] = lambda text: None
    progress: Callable[[str, int, int], None] = lambda phase, done, total: None


@dataclass
class Opened:
    """A model directory, opened and checked."""

    path: Path
    manifest: ModelManifest
    checkpoint: Checkpoint
    model: ir.Model
    eos_token_ids: list[int] = field(default_factory=list)

    @property
    def config(self) -> Llama4Config:
        """The model's configuration."""
        return self.checkpoint.config


def open_model(path: Path) -> Opened:
    """Opens a model directory and holds its graph and shards to its manifest.

    Raises:
        EngineError: it is no model directory, or was changed since the export.
        CheckpointError: its shards are broken.
    """
    if not (path / MANIFEST_NAME).exists() and (path / "config.json").exists():
        raise EngineError(
            f"{path}: is a checkpoint, not a model directory", hint=f"shuntyard export {path} OUT makes one"
        )
    raw = read_manifest(path)
    if raw.get("kind") != "model":
        raise EngineError(f"{path}: is not a model directory", hint="shuntyard export CKPT OUT makes one")
    try:
        manifest = ModelManifest.model_validate(raw)
    except ValueError as error:
        raise EngineError(f"{path / MANIFEST_NAME}: is of another version of shuntyard", hint="export again") from error
    graph = path / MODEL_NAME
    if not graph.is_file() or sha256_of(graph) != manifest.graph_sha256:
        raise EngineError(f"{graph}: is not the graph that was exported", hint="export again")
    checkpoint = open_checkpoint(path)
    if checkpoint.fingerprint != manifest.checkpoint_fingerprint:
        raise EngineError(f"{path}: its shards are not those that were exported", hint="export again")
    if checkpoint.small_tensors_sha256() != manifest.small_tensors_sha256:
        raise EngineError(
            f"{path}: scales, norms or routers have changed since the export",
            hint="somebody wrote into the checkpoint's file; export again",
        )
    return Opened(path, manifest, checkpoint, ir.load(graph), eos_token_ids(path))


def eos_token_ids(path: Path) -> list[int]:
    """End-of-sequence ids, from ``generation_config.json`` or else ``config.json``, at its top or in ``text_config``.

    Raises:
        CheckpointError: a file cannot be read, or what it says is no token id and no list of them.
    """
    for name in ("generation_config.json", "config.json"):
        file = path / name
        raw = read_json(file) if file.is_file() else {}
        ids = token_id(raw, "eos_token_id")
        if ids is None:
            continue
        found = ids if isinstance(ids, list) else [ids]
        if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in found):
            raise CheckpointError(
                f"{file}: eos_token_id is {ids!r:.80}, must be a token id or a list of them", hint=HINT_CONFIG
            )
        return found
    return []


def build(model_path: Path, out: Path, request: Request, report: Reporter | None = None) -> EngineManifest:
    """Builds the new engine directory ``out``.

    All weights are read once, to see that every value is finite and fits the compute type.

    Raises:
        UnsupportedError: the backend cannot do what is asked.
        EngineError: the model directory is damaged, or the build fails or is not what was asked.
        CheckpointError: a weight is not finite, or too large for the compute type.
        OutputError: ``out`` exists or cannot be written.
    """
    report = report or Reporter()
    _check_request(request)
    if request.backend != "onnxruntime":
        from shuntyard.engines.tensorrt_build import check_backend

        check_backend(request)  # before anything large is read
    opened = open_model(model_path)
    dtype = request.dtype or opened.manifest.dtype
    if request.backend == "onnxruntime" and dtype == "bf16":
        raise UnsupportedError(
            "backend onnxruntime: its CPU provider cannot compute in bf16",
            hint="give --dtype fp32 (or fp16): the model directory serves all, its weights keep their type",
        )
    if request.backend != "onnxruntime":
        _check_precision(opened, dtype)
    limits = _limits(opened.config, request)
    with output_directory(out) as directory:
        weights = match_weights(opened.checkpoint)
        check_finite(weights, largest=LARGEST[dtype])
        shards = {header.file.name: sha256_of(header.file) for header in opened.checkpoint.headers}
        report.line(f"read {weights.tensors} tensors: all values are finite")
        for name, stored in weights.linears.items():
            if name.endswith(".router.weight") and has_equal_rows(stored):
                report.warning(
                    f"{name} has equal rows: such experts tie; shuntyard takes the lower, transformers may not"
                )
        for name in SIDE_FILES:
            if (model_path / name).is_file():
                shutil.copyfile(model_path / name, directory / name)
        build_backend = _build_onnxruntime if request.backend == "onnxruntime" else _build_tensorrt
        facts = build_backend(opened, directory, request, dtype, limits, report)
        table = [layer.as_dict() for layer in facts.layers]
        (directory / LAYERS_NAME).write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
        manifest = EngineManifest(
            shuntyard=shuntyard.__version__,
            backend=request.backend,  # type: ignore[arg-type]  # checked above
            backend_version=facts.backend_version,
            target=facts.target,
            dtype=dtype,  # type: ignore[arg-type]
            engine_file=facts.engine_file,
            plugin_library=facts.plugin_library,
            plugin_build=facts.plugin_build,
            plugins=facts.plugins,
            vocab_size=opened.config.vocab_size,
            eos_token_ids=opened.eos_token_ids,
            limits=limits,
            cache=_cache_shapes(opened.config, limits),
            precision=facts.precision,
            modules=opened.manifest.precision,
            recipe=opened.manifest.recipe,
            fp8_kv_cache=opened.manifest.fp8_kv_cache,
            marked=facts.marked,
            checkpoint_fingerprint=opened.manifest.checkpoint_fingerprint,
            rewritten_from=opened.manifest.rewritten_from,
            checkpoint_sha256=shards,
            graph_sha256=opened.manifest.graph_sha256,
            files=record_files(directory, known=shards),
        )
        (directory / MANIFEST_NAME).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return manifest


@dataclass(frozen=True)
class BuildFacts:
    """What a backend's build found out."""

    backend_version: str
    target: str
    engine_file: str
    layers: list[layer_table.Layer]
    plugins: dict[str, int]
    precision: dict[str, str]
    plugin_library: str | None = None
    plugin_build: BuildInfo | None = None
    marked: list[str] = field(default_factory=list)


def _check_request(request: Request) -> None:
    if request.backend not in BACKENDS:
        raise UnsupportedError(f"backend '{request.backend}' is not known", hint=f"one of {', '.join(BACKENDS)}")
    if request.dtype is not None and request.dtype not in COMPUTE_TYPES:
        raise UnsupportedError(f"dtype '{request.dtype}' is not supported", hint=f"one of {', '.join(COMPUTE_TYPES)}")
    if request.gpu is not None and request.backend == "onnxruntime":
        raise UnsupportedError(
            "backend onnxruntime: runs on the CPU, --gpu has no meaning for it",
            hint="--backend tensorrt or tensorrt-rtx",
        )
    for name in ("max_batch", "max_context", "max_tokens"):
        value = getattr(request, name)
        if value is not None and value < 1:
            raise UnsupportedError(
                f"{name} is {value}, must be at least 1", hint="it is a number of sequences or tokens"
            )


def _check_precision(opened: Opened, dtype: str) -> None:
    """Refuses what TensorRT would build otherwise than the recipe asks for."""
    manifest = opened.manifest
    if manifest.fp8_kv_cache:
        raise UnsupportedError(
            f"{opened.path}: the KV cache of layer {manifest.fp8_kv_cache[0]} is to be FP8, which TensorRT's cache "
            "update does not take",
            hint="leave kv_cache out of the recipe; the backend onnxruntime computes with such a cache's numbers",
        )
    if manifest.recipe is None or not manifest.recipe.sha256:
        return
    for name, own in manifest.precision.items():
        is_looked_up = name == EMBEDDING and "lm_head" in manifest.precision  # tied, it is multiplied with, too
        plain = not own.granularity and not name.endswith(".router") and not is_looked_up
        if plain and not own.product and own.weights != dtype:
            raise UnsupportedError(
                f"{opened.path}: recipe '{manifest.recipe.name}' asks for {own.weights} in '{name}', which an engine "
                f"of --dtype {dtype} would compute in {dtype}",
                hint=f"give --dtype {own.weights}",
            )


def _limits(config: Llama4Config, request: Request) -> Limits:
    longest = config.max_position_embeddings
    context = request.max_context or min(longest, DEFAULT_CONTEXT)
    if context > longest:
        raise UnsupportedError(
            f"--max-context {context} is beyond the model's max_position_embeddings, {longest}",
            hint="the model was not trained for it",
        )
    chunk = config.attention_chunk_size
    # A chunk that the context never reaches has no edge: positions mod chunk are the positions.
    return Limits(
        max_batch=request.max_batch,
        max_context=context,
        max_tokens=min(request.max_tokens, context, chunk or context),
        chunk=chunk,
    )


def _cache_shapes(config: Llama4Config, limits: Limits) -> list[CacheShape]:
    return [
        CacheShape(
            layer=i,
            heads=config.num_key_value_heads,
            rows=config.cache_rows(i, limits.max_context),
            head_dim=config.head_dim,
        )
        for i in range(config.num_hidden_layers)
    ]


def _build_onnxruntime(
    opened: Opened, directory: Path, request: Request, dtype: str, limits: Limits, report: Reporter
) -> BuildFacts:
    lower.for_onnxruntime(opened.model, dtype)
    marked = mark(opened.model) if request.mark else []
    for header in opened.checkpoint.headers:
        link_or_copy(header.file, directory, copy=request.copy, total_bytes=opened.checkpoint.nbytes)
    proto = ir.to_proto(opened.model)
    check_graph(proto, directory)
    (directory / GRAPH_NAME).write_bytes(proto.SerializeToString(deterministic=True))
    open_session(directory / GRAPH_NAME)
    report.line("ONNX Runtime opens it")
    layers = layer_table.graph_layers(opened.model)
    return BuildFacts(
        backend_version=onnxruntime.__version__,
        target="cpu",
        engine_file=GRAPH_NAME,
        layers=layers,
        plugins={},
        precision=proof.compute_types(proof.expected_precision(opened.model, dtype, opened.manifest.precision)),
        marked=marked,
    )


def _build_tensorrt(
    opened: Opened, directory: Path, request: Request, dtype: str, limits: Limits, report: Reporter
) -> BuildFacts:
    from shuntyard.engines.tensorrt_build import build_plan

    nibbles = lower.for_tensorrt(
        opened.model,
        dtype,
        context=limits.max_context,
        chunk=None if limits.chunk is None else min(limits.chunk, limits.max_context),
    )
    marked = mark(opened.model) if request.mark else []
    return replace(build_plan(opened, nibbles, directory, request, dtype, limits, report), marked=marked)


def json_ready(manifest: EngineManifest) -> dict[str, Any]:
    """The manifest for ``--json``."""
    return manifest.model_dump(mode="json")
