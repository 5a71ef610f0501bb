"""``shuntyard precision``: what a recipe means, what it is worth, and which one to take."""

from __future__ import annotations

import fnmatch
import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from shuntyard.cli.console import PATH, emit, one_line, progress, say, stdout, warn

if TYPE_CHECKING:
    from shuntyard.exporter.config import Llama4Config
    from shuntyard.exporter.recipe_table import RecipeTable, Row


@click.command()
@click.argument("ckpt", type=PATH)
@click.option("--recipe", "recipes", multiple=True, help="A shipped recipe, stored, or a .toml file.  [default: fp8]")
@click.option("--every", is_flag=True, help="A row for every module, and not for those of all layers that are alike.")
@click.option("--toml", is_flag=True, help="The recipes themselves, to start one of your own.")
@click.option("--measure", is_flag=True, help="What the recipes are worth on --text.  [default recipes: all shipped]")
@click.option("--group-sizes", is_flag=True, help="With --measure: INT4 experts in groups of 8 to 128, too.")
@click.option("--within", metavar="BOUND", help='Search the smallest recipe within a bound, as "kl<=0.01", on --text.')
@click.option("--out", type=PATH, help="With --within: the recipe's new file, as mine.toml; mine.html has the plots.")
@click.option("--text", type=PATH, help="UTF-8 text to measure on.")
@click.option("--windows", type=click.IntRange(1), default=32, show_default=True, help="Windows of the text.")
@click.option("--length", type=click.IntRange(4), help="Tokens a window.  [default: 3.5 chunks, at most 512]")
@click.option("--calibration", type=PATH, help="With --measure: what calibrate wrote, for static scales.")
@click.option("--json", "as_json", is_flag=True, help="Everything as JSON on stdout.")
def precision(ckpt: Path, recipes: tuple[str, ...], every: bool, toml: bool, as_json: bool, **asked: Any) -> None:
    """Say what each module of the checkpoint CKPT becomes under a recipe, and what that costs and saves.

    --measure runs recipes over a text, emulated in fp32: perplexity, KL from bf16, agreement, bytes. --within searches
    a recipe, and writes it as a file to read and to edit.
    """
    from shuntyard.exporter.recipe import read_recipe, recipe_bytes
    from shuntyard.exporter.recipe_table import recipe_table

    _check_options(asked, recipes)
    if toml:
        click.echo("\n".join(recipe_bytes(name).decode() for name in recipes or ("fp8",)), nl=False)
        return
    if asked["within"] is not None:
        _search(ckpt, asked, as_json)
    elif asked["measure"]:
        _measure(ckpt, recipes, asked, as_json)
    else:
        tables = [recipe_table(ckpt, read_recipe(name)) for name in recipes or ("fp8",)]
        if as_json:
            emit([table.as_dict() for table in tables])
            return
        for table in tables:
            print_recipe(table, every=every)


def _check_options(asked: dict[str, Any], recipes: tuple[str, ...]) -> None:
    searches, measures = asked["within"] is not None, asked["measure"]
    if searches and (measures or recipes):
        raise click.UsageError("--within searches by itself: it goes without --measure and --recipe")
    if (searches or measures) != (asked["text"] is not None):
        raise click.UsageError("--measure and --within need --text, and --text one of them")
    if searches != (asked["out"] is not None):
        raise click.UsageError("--within and --out go together")
    for name in ("group_sizes", "calibration"):
        if asked[name] and not measures:
            raise click.UsageError(f"--{name.replace('_', '-')} goes with --measure")


def _windows(ckpt: Path, config: Llama4Config, asked: dict[str, Any]) -> tuple[str, list[Any]]:
    """The text's SHA-256 and its windows of tokens."""
    from shuntyard.validate.inputs import windows_of

    found = windows_of(asked["text"], ckpt, config, asked["windows"], asked["length"], warn)
    sha256 = hashlib.sha256(asked["text"].read_bytes()).hexdigest()
    return sha256, [sequence.tokens for sequence in found]


def _measure(ckpt: Path, recipes: tuple[str, ...], asked: dict[str, Any], as_json: bool) -> None:
    from shuntyard.cli.precision_measure import worth_table
    from shuntyard.exporter.calibration import read_calibration
    from shuntyard.exporter.config_file import load_config_file
    from shuntyard.exporter.recipe import SHIPPED, read_recipe, resolve
    from shuntyard.validate.worth import group_size_recipes, measure

    config = load_config_file(ckpt / "config.json").text
    calibration = None if asked["calibration"] is None else read_calibration(asked["calibration"])
    wanted = [read_recipe(name) for name in recipes or SHIPPED]
    if asked["group_sizes"]:
        wanted += group_size_recipes(config)
    _, windows = _windows(ckpt, config, asked)
    with progress() as update:
        worths = measure(
            ckpt,
            [resolve(recipe, config) for recipe in wanted],
            windows,
            calibration,
            lambda done, total: update("layers", done, total),
        )
    if as_json:
        emit([worth.as_dict() for worth in worths])
        return
    stdout.print(worth_table(worths))
    tokens = worths[0].tokens
    stdout.print(
        f"over {tokens:,} tokens of {asked['text'].name}, emulated in fp32: KL from bf16, relative change of its "
        "perplexity, tokens with the same best next token, tokens with the same experts",
        markup=False,
    )


def _search(ckpt: Path, asked: dict[str, Any], as_json: bool) -> None:
    from shuntyard.validate.matrices import Numbers
    from shuntyard.validate.outputs import check_place, write_new
    from shuntyard.validate.precision_plot import render_search
    from shuntyard.validate.search import search
    from shuntyard.validate.search_recipe import Source, found_recipe
    from shuntyard.validate.within import parse_bound

    bound, out = parse_bound(asked["within"]), asked["out"]
    page = out.with_suffix(".html")
    for place in (out, page):
        check_place(place)
    numbers = Numbers(ckpt)
    sha256, windows = _windows(ckpt, numbers.config, asked)
    with progress() as update:
        found = search(numbers, bound, windows, report=say, progress=lambda done, total: update("layers", done, total))
    source = Source(ckpt.absolute().name, numbers.checkpoint.fingerprint, asked["text"].name, sha256)
    text, _ = found_recipe(found, source, numbers.config, out)
    write_new(page, render_search(found, source, out.stem))
    write_new(out, text)
    best = found.best
    if as_json:
        emit(
            {
                "recipe": str(out),
                "page": str(page),
                "bytes": best.bytes,
                "bf16_bytes": found.baseline.bytes,
                "kl": best.outcome.mean_kl,
                "perplexity": best.outcome.perplexity,
                "top1": best.outcome.mean_top1,
            }
        )
        return
    click.echo(
        f"{out}: {best.bytes:,} bytes, {best.bytes / found.baseline.bytes:.1%} of bf16, {found.kept()}; plots in {page}"
    )


def print_recipe(found: RecipeTable, *, every: bool) -> None:
    """One recipe's table, and its warnings."""
    heading = one_line(f"{found.checkpoint.absolute().name}, recipe {found.recipe.name}")
    stdout.print(heading, style="bold", markup=False)
    stdout.print(one_line(found.recipe.description), markup=False)
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for name in ("module", *([] if every else ["layers"]), "rule", "becomes"):
        table.add_column(name, overflow="fold", no_wrap=name in ("layers", "module"))
    for name in ("MB",) if every else ("MB now", "MB", "saved"):
        table.add_column(name, justify="right", no_wrap=True)

    def add(name: str, cells: tuple[str, ...], before: int, after: int, style: str | None = None) -> None:
        # Whole names take the place of a column or two: they are to be copied into rules.
        sizes = (_mb(after),) if every else (_mb(before), _mb(after), _saved(before, after))
        table.add_row(escape(name), *map(escape, cells[1:] if every else cells), *sizes, style=style)

    for name, rows in _groups(found, every):
        add(name, _cells(rows), sum(row.bytes_stored for row in rows), sum(row.nbytes for row in rows))
    add("norms, biases", ("", "", "as stored"), found.other_bytes, found.other_bytes)
    add("all", ("", "", ""), found.bytes_stored, found.nbytes, style="bold")
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
    from shuntyard.exporter.modules import split_name

    rows = list(rows)
    if every:
        return [(module_of(row), [row]) for row in rows]
    kinds: dict[Any, set[Any]] = defaultdict(set)  # what the modules of a layer are that could share a row
    for row in rows:
        layer, part = split_name(module_of(row))
        kinds[layer, _alike(part)].add(same(row))
    groups: dict[Any, list[R]] = defaultdict(list)
    for row in rows:
        layer, part = split_name(module_of(row))
        name = _alike(part) if len(kinds[layer, _alike(part)]) == 1 else part
        groups[name.removeprefix("feed_forward.") if "shared" in name else name, same(row)].append(row)
    return [(name, own) for (name, _), own in groups.items()]


def layers_of(modules: Iterable[str]) -> str:
    """The layers of some modules, in words."""
    from shuntyard.exporter.modules import split_name
    from shuntyard.exporter.recipe_table import layers_in_words

    return layers_in_words(sorted({layer for layer, _ in map(split_name, modules) if layer is not None}))


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
