"""``inspect``: says what a directory is, from its own files, in one screen."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shuntyard.engines.manifest import LAYERS_NAME, EngineManifest, load_manifest, verify_files
from shuntyard.errors import CheckpointError
from shuntyard.exporter.checkpoint import Checkpoint, open_checkpoint
from shuntyard.exporter.export import MANIFEST_NAME, RecipeRecord, read_manifest
from shuntyard.exporter.modules import EXPERTS as EXPERTS_MODULE
from shuntyard.exporter.weights import Weights, match_weights
from shuntyard.plugins.contract import EXPERTS

Facts = dict[str, Any]


def inspect(path: Path) -> Facts:
    """What ``path`` is: ``kind`` (checkpoint, model or engine) and its facts, in the order to be read.

    Raises:
        CheckpointError: it is none of these, or broken.
        EngineError: an engine directory is damaged.
        UnsupportedError: a checkpoint that shuntyard does not understand; says why.
    """
    if not path.is_dir():
        what = "is no directory" if path.exists() else "no such directory"
        raise CheckpointError(f"{path}: {what}", hint="give a checkpoint, model or engine directory")
    if not (path / MANIFEST_NAME).exists():
        return {"kind": "checkpoint", "path": str(path), **checkpoint_facts(open_checkpoint(path))}
    raw = read_manifest(path)
    if raw.get("kind") == "model":
        from shuntyard.engines.build import open_model

        opened = open_model(path)
        facts = checkpoint_facts(opened.checkpoint)
        return {
            "kind": "model",
            "path": str(path),
            "exported by": f"shuntyard {opened.manifest.shuntyard}",
            "dtype": opened.manifest.dtype,
            "layer functions": _layer_functions(opened.model.graph),
            **facts,
            **({"recipe": _recipe(opened.manifest.recipe)} if opened.manifest.recipe else {}),
            "precision": dict(Counter(str(own) for own in opened.manifest.precision.values())),
            "waived": opened.manifest.waived,
            "values checked": opened.manifest.values_checked,
        }
    manifest = load_manifest(path)
    verify_files(path, manifest, contents=False)
    return {"kind": "engine", "path": str(path), **engine_facts(path, manifest)}


def _recipe(record: RecipeRecord) -> str:
    sha = f" (sha256 {record.sha256[:16]})" if record.sha256 else ""
    calibrated = f", calibration {record.calibration_sha256[:16]}" if record.calibration_sha256 else ""
    return f"{record.name}{sha}{calibrated}"


def _layer_functions(graph: Any) -> dict[str, int]:
    return dict(Counter(node.op_type for node in graph))


def inspect_data(path: Path) -> Facts:
    """As :func:`inspect`, for scripts: numbers as numbers, configuration and manifest whole."""
    kind = inspect(path)["kind"]
    if kind == "engine":
        layers = json.loads((path / LAYERS_NAME).read_text(encoding="utf-8"))
        return {"kind": kind, "path": str(path), **load_manifest(path).model_dump(mode="json"), "layers": layers}
    checkpoint = open_checkpoint(path)
    weights = match_weights(checkpoint)
    parameters, active = _parameters(checkpoint, weights)
    return {
        "kind": kind,
        "path": str(path),
        "parameters": parameters,
        "active_parameters": active,
        "bytes": checkpoint.nbytes,
        "tensors": _types(weights),
        "quantization": None if checkpoint.quantization is None else str(checkpoint.quantization),
        "vision_tensors": len(checkpoint.vision),
        "shards": [header.file.name for header in checkpoint.headers],
        "waived": weights.waived,
        "fingerprint": checkpoint.fingerprint,
        "config": checkpoint.config.model_dump(mode="json"),
        **({"manifest": read_manifest(path)} if kind == "model" else {}),
    }


def _types(weights: Weights) -> dict[str, int]:
    """How many tensors are of which type, scales among them."""
    entries = {(e.file, e.offset, e.nbytes): e.dtype for _, stored in weights.stored() for e in stored.entries()}
    return dict(Counter(entries.values()).most_common())


def _parameters(checkpoint: Checkpoint, weights: Weights) -> tuple[int, int]:
    """All, and those that a token touches."""
    c, total = checkpoint.config, weights.parameters
    idle = c.num_local_experts - c.num_experts_per_tok
    return total, total - len(c.moe_layers) * idle * 3 * c.hidden_size * c.intermediate_size


def checkpoint_facts(checkpoint: Checkpoint) -> Facts:
    """The shape of the model and what its files hold."""
    c = checkpoint.config
    weights = match_weights(checkpoint)
    parameters, active = _parameters(checkpoint, weights)
    vision = sum(math.prod(entry.shape) for entry in checkpoint.vision)
    nope = [i for i in range(c.num_hidden_layers) if not c.uses_rope(i)]
    return {
        "parameters": f"{parameters:,} ({active:,} active a token)",
        "layers": f"{c.num_hidden_layers}: MoE in {_ranges(c.moe_layers)}, NoPE in {_ranges(nope)}",
        "experts": f"{c.num_local_experts}, top-{c.num_experts_per_tok} and one shared" if c.moe_layers else "none",
        "attention": f"{c.num_attention_heads} heads, {c.num_key_value_heads} key/value heads of {c.head_dim}, "
        f"chunks of {c.attention_chunk_size}",
        "rope": f"{c.rope.rope_type}, theta {c.rope.rope_theta:g}"
        + (
            f", factor {c.rope.factor:g}, low {c.rope.low_freq_factor:g}, high {c.rope.high_freq_factor:g}, "
            f"original {c.rope.original_max_position_embeddings:,}"
            if c.rope.factor
            else ""
        ),
        **({"doubts": c.doubts()} if c.doubts() else {}),
        "hidden, vocabulary": f"{c.hidden_size}, {c.vocab_size:,}",
        "context": f"{c.max_position_embeddings:,}",
        "weights": ", ".join(f"{count} {dtype}" for dtype, count in _types(weights).items()),
        **({"quantisation": str(checkpoint.quantization)} if checkpoint.quantization else {}),
        **({"vision tower": f"{len(checkpoint.vision)} tensors, {vision:,} parameters"} if vision else {}),
        "shards": f"{len(checkpoint.headers)} ({checkpoint.nbytes:,} bytes)",
        "waived": weights.waived,
        "fingerprint": checkpoint.fingerprint[:16],
    }


def engine_facts(path: Path, manifest: EngineManifest) -> Facts:
    """What an engine was built for and of."""
    limits = manifest.limits
    layers = json.loads((path / LAYERS_NAME).read_text(encoding="utf-8"))
    cache = 2 * sum(s.heads * s.rows * s.head_dim for s in manifest.cache)
    item = {"fp32": 4, "fp16": 2, "bf16": 2}[manifest.dtype]
    return {
        "backend": f"{manifest.backend} {manifest.backend_version}",
        "target": manifest.target,
        "dtype": manifest.dtype,
        "limits": f"batch {limits.max_batch}, context {limits.max_context:,}, {limits.max_tokens:,} tokens a call",
        "KV cache": f"{cache * item:,} bytes a sequence",
        "layers": f"{len(layers)}: "
        + ", ".join(f"{n} {kind}" for kind, n in Counter(layer["kind"] for layer in layers).most_common(8)),
        "plugins": [
            f"{', '.join(layer['origins'])} ({'/'.join(layer['outputs'])})" for layer in layers if layer["plugin"]
        ],
        **({"plugin library": manifest.plugin_build.kernels} if manifest.plugin_build else {}),
        "precision": _by_value(manifest.precision),
        **({"recipe": _recipe(manifest.recipe)} if manifest.recipe else {}),
        **({"FP8 KV cache": f"numbers of layers {_ranges(manifest.fp8_kv_cache)}"} if manifest.fp8_kv_cache else {}),
        "files": f"{len(manifest.files)} ({sum(f.bytes for f in manifest.files.values()):,} bytes)",
        "fingerprint": manifest.checkpoint_fingerprint[:16],
        "built by": f"shuntyard {manifest.shuntyard}",
    }


@dataclass(frozen=True)
class ModuleRow:
    """One module of an engine: what was asked of it, and what it is."""

    module: str
    asked: str
    actual: str  # the type that its product computes in
    built: str  # the kind of the layer that shows it; empty where a runtime takes the graph as it is


def module_rows(path: Path, manifest: EngineManifest) -> list[ModuleRow]:
    """The table of modules of the engine at ``path``; attention and routing, which no rule is about, among them."""
    kinds: dict[str, str] = {}
    for layer in json.loads((path / LAYERS_NAME).read_text(encoding="utf-8")):
        for origin in layer["origins"] if manifest.backend != "onnxruntime" else []:
            # A gemm or a plugin shows a product better than what prepares and finishes it.
            if origin in manifest.precision and (origin not in kinds or layer["kind"] == "gemm" or layer["plugin"]):
                kinds[origin] = "plugin" if layer["plugin"] else layer["kind"]
    rows = []
    for node, compute in manifest.precision.items():
        is_experts = node.endswith(EXPERTS.name)
        module = f"{node.removesuffix(f'.{EXPERTS.name}')}{EXPERTS_MODULE}" if is_experts else node
        own = manifest.modules.get(module)
        if own is None and node == "lm_head":
            own = manifest.modules.get("model.embed_tokens")
        rows.append(ModuleRow(module, "" if own is None else str(own), compute, kinds.get(node, "")))
    return rows


def _by_value(precision: dict[str, str]) -> str:
    counts = Counter(precision.values())
    return (
        ", ".join(f"{dtype} in {count}" for dtype, count in counts.most_common()) + " products, attentions and plugins"
    )


def _ranges(numbers: Any) -> str:
    items = sorted(numbers)
    if not items:
        return "none"
    if len(items) > 8:
        return f"{', '.join(map(str, items[:3]))} … {items[-1]} ({len(items)})"
    return ", ".join(map(str, items))
