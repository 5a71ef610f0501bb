"""``export``: a checkpoint directory becomes a model directory.

A model directory holds ``model.onnx``, the checkpoint's shards as hard links, copies of its small files, and
``shuntyard.json``. It stands on its own: it stays whole when the checkpoint's directory is deleted.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
from onnx.external_data_helper import uses_external_data
from pydantic import BaseModel, ConfigDict

import shuntyard
from shuntyard.errors import CheckpointError, UnsupportedError
from shuntyard.exporter.activations import attach_activations
from shuntyard.exporter.calibration import read_calibration
from shuntyard.exporter.checkpoint import INDEX_NAME, SIDE_FILES, Checkpoint, open_checkpoint
from shuntyard.exporter.graph import COMPUTE_TYPES, build_model
from shuntyard.exporter.model import RotaryTable
from shuntyard.exporter.output import link_or_copy, output_directory, refuse_existing
from shuntyard.exporter.precision import ModulePrecision, differences, precision_of, products_of
from shuntyard.exporter.quantization import HF_QUANT_CONFIG
from shuntyard.exporter.recipe import PLAIN, Recipe, Resolved, resolve
from shuntyard.exporter.relayout import AS_STORED, CONFIG_DTYPES, Relayout, new_config, plain_config, targets
from shuntyard.exporter.requantise import carry_out, quantised_config
from shuntyard.exporter.resumable import resumable_directory
from shuntyard.exporter.rewrite import Target, request_key, rewrite
from shuntyard.exporter.strict_json import read_json
from shuntyard.exporter.values import check_finite
from shuntyard.exporter.weights import Weights, match_weights

MODEL_NAME = "model.onnx"
MANIFEST_NAME = "shuntyard.json"


class RecipeRecord(BaseModel):
    """The recipe that a model directory was exported by, and the files that it took."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    sha256: str  # of the file; empty: stored
    calibration_sha256: str | None = None


class ModelManifest(BaseModel):
    """``shuntyard.json`` of a model directory."""

    model_config = ConfigDict(extra="forbid")

    kind: str = "model"
    shuntyard: str
    dtype: str
    checkpoint_fingerprint: str
    small_tensors_sha256: str  # scales, norms and routers, by content
    rewritten_from: str | None = None  # fingerprint of the checkpoint that the weights were rewritten from
    recipe: RecipeRecord | None = None
    precision: dict[str, ModulePrecision]  # of every module, by its name
    fp8_kv_cache: list[int] = []  # layers whose keys and values are rounded to FP8 numbers
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
    recipe: Recipe | None = None,
    calibration: Path | None = None,
    report: Callable[[str], None] = lambda line: None,
    progress: Callable[[str, int, int], None] = lambda phase, done, total: None,
) -> ExportResult:
    """Exports the checkpoint at ``checkpoint_path`` to the new model directory ``out``.

    Everything is checked before anything is written: each tensor is consumed or waived by name, each parameter filled
    and of the right shape. ``check_values`` also reads all weights and refuses values that are not finite.
    ``text_only`` leaves a vision tower out, and names its tensors as waived; without it such a checkpoint is refused.
    With a ``relayout``, or a ``recipe`` that asks for anything else than what is there, the weights are not linked but
    written anew, which an interrupted run goes on with when it is asked for again; ``progress`` hears of the bytes.
    Activations are quantised by a ``recipe`` alone; ``calibration`` is the file that has their static scales.

    Raises:
        CheckpointError: the checkpoint is broken, incomplete or contradicts itself, or the calibration is another's.
        UnsupportedError: it holds something that is not understood, or cannot be what the recipe asks for.
        OutputError: ``out`` exists or cannot be written.
    """
    if dtype not in COMPUTE_TYPES:
        raise UnsupportedError(f"dtype '{dtype}' is not supported", hint=f"one of {', '.join(COMPUTE_TYPES)}")
    if recipe is not None and relayout:
        raise UnsupportedError("--recipe goes without --weights and --experts", hint="a rule of the recipe says both")
    if calibration is not None and recipe is None:
        raise UnsupportedError("--calibration goes with --recipe", hint="without one nothing is quantised")
    refuse_existing(out)
    checkpoint = open_checkpoint(checkpoint_path)
    if checkpoint.vision and not text_only:
        first = checkpoint.vision[0].name
        raise UnsupportedError(
            f"{checkpoint_path}: has a vision tower ({len(checkpoint.vision)} tensors, '{first}' first)",
            hint="--text-only exports the text model alone and lists what it leaves out; the tower cannot be exported",
        )
    weights = match_weights(checkpoint, alike=relayout.weights is None and (recipe is None or not recipe.rules))
    relayout.check(weights)
    RotaryTable(checkpoint.config)  # refuses now what tracing would, after the weights are written
    asked = _Asked(checkpoint, weights, relayout, recipe, calibration)
    waived = [checkpoint.tensors[name].name for name in asked.weights.waived] + [e.name for e in checkpoint.vision]
    for line in checkpoint.config.doubts():
        report(line)
    report(f"{weights.tensors} tensors match, {len(waived)} waived")
    for line in asked.remarks():
        report(line)
    if check_values:
        check_finite(weights)
        report("all values are finite")
    facts: dict[str, Any] = {"dtype": dtype, "waived": waived, "values_checked": check_values, "recipe": asked.record}
    if asked.new is not None:
        new = asked.new
        report(f"writing {sum(t.nbytes for t in new):,} bytes anew; if interrupted, the same command goes on")
        with resumable_directory(out, request_key(new, checkpoint.fingerprint)) as work:
            rewrite(new, work, source_fingerprint=checkpoint.fingerprint, progress=progress)
            (work.directory / "config.json").write_text(asked.config(), encoding="utf-8")
            _copy_side_files(checkpoint, work.directory, leave=("config.json", HF_QUANT_CONFIG, INDEX_NAME))
            rewritten = open_checkpoint(work.directory)
            facts["rewritten_from"] = checkpoint.fingerprint
            _write_graph(rewritten, asked.graph_weights(rewritten), asked.products, work.directory, facts, report)
            written = sum(p.stat().st_size for p in work.directory.iterdir())
        return ExportResult(out, weights.tensors, waived, 0, written)
    with output_directory(out) as directory:
        for header in checkpoint.headers:
            link_or_copy(header.file, directory, copy=copy, total_bytes=checkpoint.nbytes)
        _copy_side_files(checkpoint, directory)
        _write_graph(checkpoint, asked.weights, asked.products, directory, facts, report)
        written = sum(p.stat().st_size for p in directory.iterdir() if copy or p.suffix != ".safetensors")
    return ExportResult(out, weights.tensors, waived, 0 if copy else checkpoint.nbytes, written)


class _Asked:
    """What is to be written: ``new`` tensors, or None where the shards are linked as they are."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        weights: Weights,
        relayout: Relayout,
        recipe: Recipe | None,
        calibration: Path | None,
    ) -> None:
        self._checkpoint, self._relayout, self._recipe = checkpoint, relayout, recipe
        self.weights = weights
        self.new: list[Target] | None = targets(weights, relayout) if relayout else None
        self.products: dict[str, str] = {}
        self.record: RecipeRecord | None = None
        self._resolved: Resolved | None = None
        self._twice: list[str] = []
        self._widened: list[str] = []
        self._own_scales = 0
        self._is_calibrated = calibration is not None
        self._section: dict[str, Any] | None = None
        if recipe is None:
            return
        read = None if calibration is None else read_calibration(calibration)
        if read is not None:
            read.check(checkpoint)
        taken = None if calibration is None else hashlib.sha256(calibration.read_bytes()).hexdigest()
        self.record = RecipeRecord(name=recipe.name, sha256=recipe.sha256)
        if not recipe.rules:
            self.weights = attach_activations(weights, checkpoint)
            return
        self._resolved = resolve(recipe, checkpoint.config)
        self.products = products_of(self._resolved)
        if (linked := self._as_it_is()) is not None:
            self.weights = linked
            return
        rewritten = carry_out(checkpoint, weights, self._resolved, read)
        self._own_scales = len(rewritten.taken)
        if rewritten.calibrated:
            self.record = self.record.model_copy(update={"calibration_sha256": taken})
        self.new, self._twice, self._widened = rewritten.targets, rewritten.twice, rewritten.widened
        self.weights = replace(weights, waived=[name for name in weights.waived if name not in rewritten.taken])
        self._section = quantised_config(rewritten, self._resolved)

    def _as_it_is(self) -> Weights | None:
        """The weights, if they and their declaration are what the recipe asks for already."""
        assert self._resolved is not None
        try:
            attached = attach_activations(match_weights(self._checkpoint), self._checkpoint)  # experts all alike
        except (CheckpointError, UnsupportedError):
            return None
        found = precision_of(attached, self._checkpoint.config, self.products)
        return None if differences(self._resolved, found, attached.kv_scales) else attached

    def remarks(self) -> list[str]:
        """What who exports should know."""
        lines = []
        quantization = self._checkpoint.quantization
        if quantization is not None and quantization.activations and self._recipe is None:
            kinds = " and ".join(quantization.activations)
            lines.append(f"activations are declared {kinds}, and are left as they are; --recipe stored quantises them")
        if self._resolved is not None and self._resolved.recipe.is_a_file:
            lines += [f"warning: {self._resolved.recipe.where}: {one}" for one in self._resolved.unused]
        if self._resolved is not None and self._resolved.quantises_nothing:
            lines.append(f"warning: {self._resolved.recipe.where}: no module of this model becomes fp8 or int4")
        if self._own_scales and self._is_calibrated:
            lines.append(f"{self._own_scales} scales are the checkpoint's own: the calibration's are not used for them")
        if self._is_calibrated and (self.record is None or self.record.calibration_sha256 is None):
            lines.append("nothing was taken from the calibration")
        lines += self._caches()
        if self._widened:
            more = f" and {len(self._widened) - 1} more" if len(self._widened) > 1 else ""
            lines.append(f"{self._widened[0]}{more} was quantised, and becomes plain: its numbers stay rounded")
        if self._twice:
            more = f" and {len(self._twice) - 1} more" if len(self._twice) > 1 else ""
            lines.append(f"{self._twice[0]}{more} was quantised in another way: its numbers are rounded twice")
        return lines

    def _caches(self) -> list[str]:
        """What becomes of a declared FP8 KV cache."""
        quantization = self._checkpoint.quantization
        if quantization is None or not quantization.kv_cache or self._resolved is not None:
            return []
        if self._recipe is None:
            return ["an FP8 KV cache is declared, and is not used; --recipe stored rounds it"]
        without = [i for i in range(self._checkpoint.config.num_hidden_layers) if i not in self.weights.kv_scales]
        if not without:
            return []
        return [
            f"an FP8 KV cache is declared, but {len(without)} layers, {without[0]} first, have no scales: not rounded"
        ]

    def config(self) -> str:
        """``config.json`` of the new checkpoint."""
        if self._resolved is None:
            return new_config(self._checkpoint.path, self._relayout)
        return self._resolved_config(self._resolved)

    def _resolved_config(self, resolved: Resolved) -> str:
        text = plain_config(self._checkpoint.path)
        plain = {own.weights for own in resolved.precision.values() if own.weights in PLAIN}
        if len(plain) == 1:
            text["dtype"] = CONFIG_DTYPES[plain.pop()]
        if self._section is not None:
            text["quantization_config"] = self._section
        return json.dumps(text, indent=2) + "\n"

    def graph_weights(self, rewritten: Checkpoint) -> Weights:
        """The weights of the checkpoint that was written, which must be what the recipe asked for."""
        weights = match_weights(rewritten)
        if self._resolved is None:
            return weights
        weights = attach_activations(weights, rewritten)
        found = precision_of(weights, rewritten.config, self.products)
        if wrong := differences(self._resolved, found, weights.kv_scales):
            raise AssertionError(f"{wrong[0]} (of {len(wrong)})")
        return weights


def _copy_side_files(checkpoint: Checkpoint, directory: Path, leave: tuple[str, ...] = ()) -> None:
    for name in SIDE_FILES:
        if name not in leave and (checkpoint.path / name).is_file():
            shutil.copyfile(checkpoint.path / name, directory / name)


def _write_graph(
    checkpoint: Checkpoint,
    weights: Weights,
    products: dict[str, str],
    directory: Path,
    facts: dict[str, Any],
    report: Callable[[str], None],
) -> None:
    """``model.onnx`` and ``shuntyard.json`` of a directory that holds the checkpoint's shards already."""
    model = build_model(checkpoint.config, weights, facts["dtype"], products)
    report(f"traced {len(model.functions)} functions")
    proto = ir.to_proto(model)
    check_graph(proto, directory)
    data = proto.SerializeToString(deterministic=True)
    (directory / MODEL_NAME).write_bytes(data)
    manifest = ModelManifest(
        shuntyard=shuntyard.__version__,
        checkpoint_fingerprint=checkpoint.fingerprint,
        small_tensors_sha256=checkpoint.small_tensors_sha256(),
        graph_sha256=hashlib.sha256(data).hexdigest(),
        shards={header.file.name: header.file_bytes for header in checkpoint.headers},
        tensors=weights.tensors,
        precision=precision_of(weights, checkpoint.config, products),
        fp8_kv_cache=sorted(weights.kv_scales),
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
