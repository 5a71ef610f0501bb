"""``shuntyard precision``: what a recipe means, what it is worth, and which one to take."""

from __future__ import annotations

import fnmatch
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from shuntyard.cli.console import PATH, emit, one_line, stdout, warn

if TYPE_CHECKING:
    from shuntyard.exporter.recipe_table import RecipeTable, Row


@click.command()
@click.argument("ckpt", type=PATH)
@click.option("--recipe", "recipes", multiple=True, help="A shipped recipe, stored, or a .toml file.  [default: fp8]")
@click.option("--every", is_flag=True, help="A row for every module, and not for those of all layers that are alike.")
@click.option("--json", "as_json", is_flag=True, help="Everything as JSON on stdout.")
def precision(ckpt: Path, recipes: tuple[str, ...], every: bool, as_json: bool) -> None:
    """Say what each module of the checkpoint CKPT becomes under a recipe, and what that costs and saves."""
    from shuntyard.exporter.recipe import read_recipe
    from shuntyard.exporter.recipe_table import recipe_table

    tables = [recipe_table(ckpt, read_recipe(name)) for name in recipes or ("fp8",)]
    if as_json:
        emit([table.as_dict() for table in tables])
        return
    for table in tables:
        print_recipe(table, every=every)


def print_recipe(found: RecipeTable, *, every: bool) -> None:
    """One recipe's table, and its warnings."""
    heading = one_line(f"{found.checkpoint.absolute().name}, recipe {found.recipe.name}")
    stdout.print(heading, style="bold", markup=False)
    stdout.print(one_line(found.recipe.description), markup=False)
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for name in ("module", "layers", "rule", "becomes"):
        table.add_column(name, overflow="fold", no_wrap=name in ("layers", "module") and not every)
    for name in ("MB now", "MB", "saved"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, rows in _groups(found, every):
        before, after = sum(row.bytes_stored for row in rows), sum(row.nbytes for row in rows)
        table.add_row(*map(escape, (name, *_cells(rows))), _mb(before), _mb(after), _saved(before, after))
    table.add_row("norms, biases", "", "", "as stored", _mb(found.other_bytes), _mb(found.other_bytes), "")
    before, after = found.bytes_stored, found.nbytes
    table.add_row("all", "", "", "", _mb(before), _mb(after), _saved(before, after), style="bold")
    stdout.print(table)
    for line in found.warnings:
        warn(f"{found.recipe.where}: {line}")


_ALIKE = ("self_attn.*_proj", "feed_forward.*_proj", "feed_forward.shared_expert.*_proj")
"""Modules of a layer that share a row where they become the same."""


def _groups(found: RecipeTable, every: bool) -> list[tuple[str, list[Row]]]:
    return grouped(found.rows, lambda row: row.module, lambda row: (row.rule, row.precision, row.stored), every)


R = TypeVar("R")


def grouped(
    rows: Iterable[R], module_of: Callable[[R], str], same: Callable[[R], Any], every: bool
) -> list[tuple[str, list[R]]]:
    """Rows of modules in whatever layers that are the ``same``, under one name."""
    rows = list(rows)
    if every:
        return [(module_of(row), [row]) for row in rows]
    kinds: dict[Any, set[Any]] = defaultdict(set)  # what the modules of a layer are that could share a row
    for row in rows:
        layer, part = _split(module_of(row))
        kinds[layer, _alike(part)].add(same(row))
    groups: dict[Any, list[R]] = defaultdict(list)
    for row in rows:
        layer, part = _split(module_of(row))
        name = _alike(part) if len(kinds[layer, _alike(part)]) == 1 else part
        groups[name.removeprefix("feed_forward.") if "shared" in name else name, same(row)].append(row)
    return [(name, own) for (name, _), own in groups.items()]


def _split(module: str) -> tuple[int | None, str]:
    """The layer, and the name within it."""
    parts = module.split(".", 3)
    return (int(parts[2]), parts[3]) if parts[:2] == ["model", "layers"] else (None, module)


def layers_of(modules: Iterable[str]) -> str:
    """The layers of some modules, in words."""
    from shuntyard.exporter.recipe_table import layers_in_words

    return layers_in_words(sorted({layer for layer, _ in map(_split, modules) if layer is not None}))


def _alike(part: str) -> str:
    if "shared_expert" in part:
        return _ALIKE[2]
    return next((pattern for pattern in _ALIKE if fnmatch.fnmatchcase(part, pattern)), part)


def _cells(rows: list[Row]) -> tuple[str, str, str]:
    first = rows[0]
    return layers_of(row.module for row in rows), "-" if first.rule is None else str(first.rule), first.precision


def _mb(count: int) -> str:
    return f"{count / 1e6:,.2f}" if count < 1e8 else f"{count / 1e6:,.0f}"


def _saved(before: int, after: int) -> str:
    return "" if before == after else f"{(before - after) / before:.1%}"
