"""``export``: a checkpoint directory becomes a model directory.

A model directory holds ``model.onnx``, the checkpoint's shards as hard links, copies of its small files, and
``shuntyard.json``. It stands on its own: it stays whole when the checkpoint's directory is deleted.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
from onnx.external_data_helper import uses_external_data
from pydantic import BaseModel, ConfigDict

import shuntyard
from shuntyard.errors import CheckpointError, UnsupportedError
from shuntyard.exporter.checkpoint import INDEX_NAME, SIDE_FILES, Checkpoint, open_checkpoint
from shuntyard.exporter.graph import COMPUTE_TYPES, build_model
from shuntyard.exporter.model import RotaryTable
from shuntyard.exporter.output import link_or_copy, output_directory, refuse_existing
from shuntyard.exporter.quantization import HF_QUANT_CONFIG
from shuntyard.exporter.relayout import AS_STORED, Relayout, new_config, targets
from shuntyard.exporter.resumable import resumable_directory
from shuntyard.exporter.rewrite import request_key, rewrite
from shuntyard.exporter.strict_json import read_json
from shuntyard.exporter.values import check_finite
from shuntyard.exporter.weights import Weights, match_weights

MODEL_NAME = "model.onnx"
MANIFEST_NAME = "shuntyard.json"


class ModelManifest(BaseModel):
    """``shuntyard.json`` of a model directory."""

    model_config = ConfigDict(extra="forbid")

    kind: str = "model"
    shuntyard: str
    dtype: str
    checkpoint_fingerprint: str
    rewritten_from: str | None = None  # fingerprint of the checkpoint that the weights were rewritten from
    graph_sha256: str
    shards: dict[str, int]
    tensors: int
    waived: list[str]
    values_checked: bool


@dataclass(frozen=True)
class ExportResult:
    """What an export did."""

    path: Path
    tensors: int
    waived: list[str]
    bytes_linked: int
    bytes_written: int

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return {**self.__dict__, "path": str(self.path)}


def export(
    checkpoint_path: Path,
    out: Path,
    *,
    dtype: str = "fp32",
    copy: bool = False,
    check_values: bool = False,
    text_only: bool = False,
    relayout: Relayout = AS_STORED,
    report: Callable[[str], None] = lambda line: None,
    progress: Callable[[str, int, int], None] = lambda phase, done, total: None,
) -> ExportResult:
    """Exports the checkpoint at ``checkpoint_path`` to the new model directory ``out``.

    Everything is checked before anything is written: each tensor is consumed or waived by name, each parameter filled
    and of the right shape. ``check_values`` also reads all weights and refuses values that are not finite.
    ``text_only`` leaves a vision tower out, and names its tensors as waived; without it such a checkpoint is refused.
    With a ``relayout`` the weights are not linked but written anew, which an interrupted run goes on with when it is
    asked for again; ``progress`` hears of the bytes.

    Raises:
        CheckpointError: the checkpoint is broken, incomplete or contradicts itself.
        UnsupportedError: it holds something that is not understood.
        OutputError: ``out`` exists or cannot be written.
    """
    if dtype not in COMPUTE_TYPES:
        raise UnsupportedError(f"dtype '{dtype}' is not supported", hint=f"one of {', '.join(COMPUTE_TYPES)}")
    refuse_existing(out)
    checkpoint = open_checkpoint(checkpoint_path)
    if checkpoint.vision and not text_only:
        first = checkpoint.vision[0].name
        raise UnsupportedError(
            f"{checkpoint_path}: has a vision tower ({len(checkpoint.vision)} tensors, '{first}' first)",
            hint="--text-only exports the text model alone and lists what it leaves out; the tower cannot be exported",
        )
    weights = match_weights(checkpoint, alike=relayout.weights is None)
    relayout.check(weights)
    RotaryTable(checkpoint.config)  # refuses now what tracing would, after the weights are written
    waived = [checkpoint.tensors[name].name for name in weights.waived] + [entry.name for entry in checkpoint.vision]
    for line in checkpoint.config.doubts():
        report(line)
    report(f"{weights.tensors} tensors match, {len(waived)} waived")
    if check_values:
        check_finite(weights)
        report("all values are finite")
    facts: dict[str, Any] = {"dtype": dtype, "waived": waived, "values_checked": check_values}
    if relayout:
        new = targets(weights, relayout)
        report(f"writing {sum(t.nbytes for t in new):,} bytes anew; if interrupted, the same command goes on")
        with resumable_directory(out, request_key(new, checkpoint.fingerprint)) as work:
            rewrite(new, work, source_fingerprint=checkpoint.fingerprint, progress=progress)
            config = new_config(checkpoint.path, relayout)
            (work.directory / "config.json").write_text(config, encoding="utf-8")
            _copy_side_files(checkpoint, work.directory, leave=("config.json", HF_QUANT_CONFIG, INDEX_NAME))
            rewritten = open_checkpoint(work.directory)
            facts["rewritten_from"] = checkpoint.fingerprint
            _write_graph(rewritten, match_weights(rewritten), work.directory, facts, report)
            written = sum(p.stat().st_size for p in work.directory.iterdir())
        return ExportResult(out, weights.tensors, waived, 0, written)
    with output_directory(out) as directory:
        for header in checkpoint.headers:
            link_or_copy(header.file, directory, copy=copy, total_bytes=checkpoint.nbytes)
        _copy_side_files(checkpoint, directory)
        _write_graph(checkpoint, weights, directory, facts, report)
        written = sum(p.stat().st_size for p in directory.iterdir() if copy or p.suffix != ".safetensors")
    return ExportResult(out, weights.tensors, waived, 0 if copy else checkpoint.nbytes, written)


def _copy_side_files(checkpoint: Checkpoint, directory: Path, leave: tuple[str, ...] = ()) -> None:
    for name in SIDE_FILES:
        if name not in leave and (checkpoint.path / name).is_file():
            shutil.copyfile(checkpoint.path / name, directory / name)


def _write_graph(
    checkpoint: Checkpoint,
    weights: Weights,
    directory: Path,
    facts: dict[str, Any],
    report: Callable[[str], None],
) -> None:
    """``model.onnx`` and ``shuntyard.json`` of a directory that holds the checkpoint's shards already."""
    model = build_model(checkpoint.config, weights, facts["dtype"])
    report(f"traced {len(model.functions)} functions")
    proto = ir.to_proto(model)
    check_graph(proto, directory)
    data = proto.SerializeToString(deterministic=True)
    (directory / MODEL_NAME).write_bytes(data)
    manifest = ModelManifest(
        shuntyard=shuntyard.__version__,
        checkpoint_fingerprint=checkpoint.fingerprint,
        graph_sha256=hashlib.sha256(data).hexdigest(),
        shards={header.file.name: header.file_bytes for header in checkpoint.headers},
        tensors=weights.tensors,
        **facts,
    )
    (directory / MANIFEST_NAME).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")


def check_graph(proto: onnx.ModelProto, directory: Path) -> None:
    """onnx's own checker on the graph, and our bounds on the external data.

    The checker refuses hard links, so it sees the graph without file access, and the data's bounds are checked here.

    Raises:
        CheckpointError: an initializer lies outside its file.
    """
    for tensor in proto.graph.initializer:
        if not uses_external_data(tensor):
            continue
        place = {entry.key: entry.value for entry in tensor.external_data}
        size = (directory / place["location"]).stat().st_size
        offset, length = int(place["offset"]), int(place["length"])
        if "/" in place["location"] or offset < 0 or offset + length > size:
            raise CheckpointError(
                f"{directory / place['location']}: tensor '{tensor.name}' ({offset}+{length}) lies outside it",
                hint="the checkpoint changed while it was read; export again",
            )
    bare = onnx.ModelProto()
    bare.CopyFrom(proto)
    # An initializer without data is not valid on its own; as an input, it says the same to the checker.
    for tensor in bare.graph.initializer:
        bare.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    del bare.graph.initializer[:]
    onnx.checker.check_model(bare, full_check=False)


def read_manifest(directory: Path) -> dict[str, Any]:
    """The raw ``shuntyard.json`` of a model or engine directory.

    Raises:
        CheckpointError: it is missing or no JSON object.
    """
    path = directory / MANIFEST_NAME
    if not path.exists():
        raise CheckpointError(
            f"{directory}: has no {MANIFEST_NAME}", hint="give a directory that export or build wrote"
        )
    return read_json(path)
