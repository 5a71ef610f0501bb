"""What a recipe means for a checkpoint, module by module: what it resolves to, what it costs and saves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shuntyard.exporter.activations import attach_activations
from shuntyard.exporter.checkpoint import Checkpoint, open_checkpoint
from shuntyard.exporter.modules import Module
from shuntyard.exporter.precision import precision_of, products_of
from shuntyard.exporter.recipe import STORED, Recipe, Resolved, nbytes, resolve
from shuntyard.exporter.requantise import check_alike
from shuntyard.exporter.weights import Stored, Weights, match_weights


@dataclass(frozen=True)
class Row:
    """One module, or one KV cache; bytes are those of its weights and scales, before and after."""

    module: str
    layer: int | None
    rule: int | None  # None: no rule names it, and it stays as it is
    stored: str  # what it is
    precision: str  # what it is to be
    bytes_stored: int
    nbytes: int


@dataclass(frozen=True)
class RecipeTable:
    """All rows, and what there is to say beside them."""

    checkpoint: Path
    recipe: Recipe
    rows: tuple[Row, ...]
    other_bytes: int  # norms, biases, what no rule is about
    warnings: tuple[str, ...]

    @property
    def bytes_stored(self) -> int:
        """Of the whole text model, as the files hold it."""
        return self.other_bytes + sum(row.bytes_stored for row in self.rows)

    @property
    def nbytes(self) -> int:
        """Of the whole text model, under the recipe."""
        return self.other_bytes + sum(row.nbytes for row in self.rows)

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return {
            "checkpoint": str(self.checkpoint),
            "recipe": self.recipe.name,
            "description": self.recipe.description,
            "bytes_stored": self.bytes_stored,
            "bytes": self.nbytes,
            "modules": [
                {
                    "module": row.module,
                    "rule": row.rule,
                    "stored": row.stored,
                    "precision": row.precision,
                    "bytes_stored": row.bytes_stored,
                    "bytes": row.nbytes,
                }
                for row in self.rows
            ],
            "warnings": list(self.warnings),
        }


def recipe_table(path: Path, recipe: Recipe) -> RecipeTable:
    """Resolves a recipe for the checkpoint at ``path``, from headers alone.

    Raises:
        CheckpointError, UnsupportedError: as export does; or a rule asks a module to be what it cannot.
    """
    checkpoint = open_checkpoint(path)
    weights = match_weights(checkpoint, alike=not recipe.rules)
    resolved = resolve(recipe, checkpoint.config)
    if not recipe.rules:
        weights = attach_activations(weights, checkpoint)
    rows = tuple(_rows(checkpoint, weights, resolved))
    every = {(e.file, e.offset): e.nbytes for _, stored in weights.stored() for e in stored.entries()}
    other = sum(every.values()) - sum(row.bytes_stored for row in rows)
    return RecipeTable(path, recipe, rows, other, tuple(_warnings(checkpoint, resolved)))


def _rows(checkpoint: Checkpoint, weights: Weights, resolved: Resolved) -> Iterator[Row]:
    found = precision_of(weights, checkpoint.config)
    products = products_of(resolved)
    for module in resolved.modules:
        before = _bytes(_stored(weights, module))
        asked = resolved.precision[module.name]
        is_kept = asked.weights == STORED
        if module.layer is not None and module.kind == "experts":
            check_alike(module, asked, weights.experts[module.layer])
        computed = f", computed in {products[module.name]}" if module.name in products else ""
        yield Row(
            module.name,
            module.layer,
            resolved.rule_of.get(module.name),
            str(found[module.name]),
            f"{found[module.name]}" if is_kept else f"{asked}{computed}",
            before,
            before if is_kept else sum(nbytes(module, asked)),
        )
    for name, kind in resolved.kv_cache.items():
        layer = int(name.split(".")[2])
        declared = "KV cache fp8" if layer in weights.kv_scales else ""  # known of the recipe stored alone
        if kind != "compute" or declared:
            yield Row(name, layer, resolved.rule_of.get(name), declared, declared or f"KV cache {kind}", 0, 0)


def _stored(weights: Weights, module: Module) -> Sequence[Stored]:
    if module.kind == "experts":
        assert module.layer is not None
        return weights.experts[module.layer].parts
    return [weights.linears[f"{module.name}.weight"]]


def _bytes(parts: Sequence[Stored]) -> int:
    return sum({(e.file, e.offset): e.nbytes for part in parts for e in part.entries()}.values())


def _warnings(checkpoint: Checkpoint, resolved: Resolved) -> Iterator[str]:
    if resolved.recipe.is_a_file:
        yield from resolved.unused
    left = [name for name in resolved.precision if name not in resolved.rule_of and not name.endswith(".router")]
    if resolved.recipe.rules and left:
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        yield f"no rule is about '{left[0]}'{more}: as stored"
    if resolved.quantises_nothing:
        yield "no module of this model becomes fp8 or int4"
    if resolved.needs_calibration:
        yield f"{len(resolved.needs_calibration)} modules need scales: from the checkpoint, or from shuntyard calibrate"


def layers_in_words(layers: Sequence[int]) -> str:
    """``0-3, 5`` for layers 0, 1, 2, 3 and 5; every second one of many as ``1, 3 .. 47``."""
    if len(layers) > 2:
        step = layers[1] - layers[0]
        if step > 1 and list(layers) == list(range(layers[0], layers[-1] + 1, step)):
            return f"{layers[0]}, {layers[1]} .. {layers[-1]}"
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
