"""The ``shuntyard`` command. Data goes to stdout, progress and logs to stderr.

Exit status: 0 done (and passed), 1 a comparison failed, 2 bad usage, 3 refused or broken input, 4 a defect of
shuntyard, 130 interrupted.
"""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path
from typing import Any

import click
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

import shuntyard
from shuntyard.cli.calibration import calibrate
from shuntyard.cli.console import (
    EXIT_DEFECT,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_REFUSED,
    PATH,
    emit,
    one_line,
    progress,
    say,
    stderr,
    stdout,
    warn,
)
from shuntyard.cli.precision import grouped, layers_of, precision
from shuntyard.cli.validation import print_report, validate
from shuntyard.errors import ShuntyardError

# Rooms are imported inside the commands: `shuntyard --help` need not wait for torch.

_DTYPE = click.Choice(["fp32", "fp16", "bf16"])


class _Group(click.Group):
    """Turns errors that users can act on into one line and a hint."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except ShuntyardError as error:
            if ctx.params.get("debug"):
                traceback.print_exc()
            stderr.print(f"error: {one_line(error.message)}", style="bold red", markup=False, soft_wrap=True)
            if error.hint:
                stderr.print(f"hint: {one_line(error.hint)}", markup=False, soft_wrap=True)
            ctx.exit(EXIT_REFUSED)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except Exception as error:  # noqa: BLE001  a script must be able to tell a crash from a failed comparison
            if ctx.params.get("debug"):
                traceback.print_exc()
            stderr.print(
                f"error: unexpected {type(error).__name__}: {one_line(str(error))}", markup=False, soft_wrap=True
            )
            stderr.print("hint: this is a defect of shuntyard; shuntyard --debug shows where", markup=False)
            ctx.exit(EXIT_DEFECT)
        except KeyboardInterrupt:
            stderr.print("interrupted")
            sys.stdout.flush()
            # An interrupt that passes through exec() marks the process (CPython's unhandled_keyboard_interrupt), which
            # then kills itself at its end, though the interrupt was handled. All is tidied up: every block was left.
            os._exit(EXIT_INTERRUPTED)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(shuntyard.__version__)
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def main(debug: bool) -> None:
    """Llama 4 checkpoints to engines that people can trust."""


@main.command()
@click.argument("ckpt", type=PATH)
@click.argument("out", type=PATH)
@click.option("--dtype", type=_DTYPE, default="fp32", show_default=True, help="Compute type; build can change it.")
@click.option("--copy", is_flag=True, help="Copy the shards where hard links are impossible.")
@click.option("--check-values", is_flag=True, help="Read all weights and refuse NaN and infinity.")
@click.option("--text-only", is_flag=True, help="Leave a vision tower out, and list its tensors as waived.")
@click.option("--weights", type=_DTYPE, help="Write the weights anew, in this type.  [default: link them]")
@click.option("--experts", type=click.Choice(["fused", "linear"]), help="Write them anew, experts in this layout.")
@click.option("--recipe", help="Precision of each module: a shipped recipe, stored, or a .toml file (see precision).")
@click.option("--calibration", type=PATH, help="What calibrate wrote: scales of static activations and FP8 KV caches.")
@click.option("--json", "as_json", is_flag=True, help="Result as JSON on stdout.")
def export(
    ckpt: Path, out: Path, weights: str | None, experts: str | None, recipe: str | None, as_json: bool, **asked: Any
) -> None:
    """Export the checkpoint CKPT to the new model directory OUT.

    Weights are linked, not copied, unless --recipe, --weights or --experts asks for others. Such a run can be
    interrupted: the same command goes on with what is there.
    """
    from shuntyard.exporter.export import export as run
    from shuntyard.exporter.recipe import read_recipe
    from shuntyard.exporter.relayout import Relayout

    relayout = Relayout(weights, experts)
    if relayout and asked["copy"]:
        raise click.UsageError("--copy has no meaning where the weights are written anew")
    asked["recipe"] = None if recipe is None else read_recipe(recipe)
    with progress() as update:

        def bytes_done(_tensor: str, done: int, total: int) -> None:
            update("writing weights", done, total)

        result = run(ckpt, out, **asked, relayout=relayout, report=say, progress=bytes_done)
    if as_json:
        emit(result.as_dict())
    else:
        click.echo(
            f"{result.path}: {result.tensors} tensors, {result.bytes_linked:,} bytes linked, "
            f"{result.bytes_written:,} written"
        )
        for line in _grouped(result.waived):
            click.echo(f"waived: {line}")


def _grouped(names: list[str]) -> list[str]:
    """Names one by one, or by their first part where many share it; --json and shuntyard.json have all."""
    groups: dict[str, list[str]] = {}
    for name in names:
        suffix = name.rsplit(".", 1)[-1]
        key = f"*.{suffix}" if suffix.endswith("_scale") else f"{name.split('.', 1)[0]}.*"
        groups.setdefault(key, []).append(name)
    lines: list[str] = []
    for key, own in groups.items():
        lines += own if len(own) <= 4 else [f"{key} ({len(own)} tensors, listed in shuntyard.json)"]
    return lines


@main.command()
@click.argument("model", type=PATH)
@click.argument("engine", type=PATH)
@click.option(
    "--backend",
    type=click.Choice(["onnxruntime", "tensorrt", "tensorrt-rtx"]),
    default="onnxruntime",
    show_default=True,
)
@click.option("--gpu", help="Target of an ahead-of-time build, as sm89.")
@click.option("--dtype", type=_DTYPE, help="Compute type.  [default: the model directory's]")
@click.option("--max-batch", type=click.IntRange(1), default=8, show_default=True)
@click.option("--max-context", type=click.IntRange(1), help="Tokens.  [default: the model's, at most 8192]")
@click.option("--copy", is_flag=True, help="Copy the shards where hard links are impossible.")
@click.option("--mark", is_flag=True, help="Give out the values in between: to look into, for validate; not to use.")
@click.option("--json", "as_json", is_flag=True, help="The engine's manifest as JSON on stdout.")
def build(
    model: Path,
    engine: Path,
    backend: str,
    gpu: str | None,
    dtype: str | None,
    max_batch: int,
    max_context: int | None,
    copy: bool,
    mark: bool,
    as_json: bool,
) -> None:
    """Build the model directory MODEL into the new engine directory ENGINE."""
    from shuntyard.engines.build import Reporter, Request, json_ready
    from shuntyard.engines.build import build as run

    request = Request(backend, dtype, gpu, max_batch, max_context, copy=copy, mark=mark)
    with progress() as update:
        manifest = run(model, engine, request, Reporter(say, warn, update))
    if as_json:
        emit(json_ready(manifest))
    else:
        plugins = ", ".join(f"{count} {name}" for name, count in manifest.plugins.items())
        click.echo(
            f"{engine}: {manifest.backend} {manifest.backend_version} for {manifest.target}, {manifest.dtype}"
            + (f", plugins {plugins}" if plugins else "")
        )


@main.command()
@click.argument("engine", type=PATH)
@click.option("--prompt", required=True)
@click.option("--max-new-tokens", type=click.IntRange(1), default=64, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Prompt and new tokens as JSON on stdout.")
def run(engine: Path, prompt: str, max_new_tokens: int, as_json: bool) -> None:
    """Continue a prompt greedily; the text streams to stdout as it comes."""
    from shuntyard.engines import open_engine
    from shuntyard.engines.text import Tokenizer

    opened = open_engine(engine)
    tokenizer = Tokenizer.from_directory(engine)
    ids = tokenizer.encode(prompt)
    new: list[int] = []
    shown = ""
    for step in opened.stream([ids], max_new_tokens):
        new.append(int(step[0]))
        text = tokenizer.decode(new)
        # A character can span tokens: what ends in the replacement character is not whole yet.
        if not as_json and not text.endswith("\ufffd"):
            click.echo(text[len(shown) :], nl=False)
            shown = text
    if as_json:
        emit({"prompt_tokens": ids, "new_tokens": new, "text": tokenizer.decode(new)})
    else:
        click.echo(tokenizer.decode(new)[len(shown) :])


@main.command()
@click.argument("path", type=PATH)
@click.option("--every", is_flag=True, help="Of an engine: a row for every module, whatever others are alike.")
@click.option("--json", "as_json", is_flag=True, help="Everything, with numbers as numbers, as JSON on stdout.")
def inspect(path: Path, every: bool, as_json: bool) -> None:
    """Say what a checkpoint, model or engine directory is; of an engine, each module's asked and actual precision."""
    from shuntyard.engines.inspect import inspect as run
    from shuntyard.engines.inspect import inspect_data

    if as_json:
        emit(inspect_data(path))
        return
    facts = run(path)
    is_engine = facts["kind"] == "engine"
    table = Table(show_header=False, title=escape(f"{facts.pop('kind')} {facts.pop('path')}"), title_justify="left")
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in facts.items():
        if isinstance(value, dict):
            value = ", ".join(f"{count} {key}" for key, count in value.items())
        if isinstance(value, list):
            value = "\n".join(map(str, value)) or "none"
        table.add_row(name, escape(str(value)))
    stdout.print(table)
    if is_engine:
        _print_modules(path, every)


def _print_modules(path: Path, every: bool) -> None:
    """What was asked of each module of an engine, and what was built."""
    from shuntyard.engines.inspect import module_rows
    from shuntyard.engines.manifest import load_manifest

    manifest = load_manifest(path)
    rows = module_rows(path, manifest)
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    columns = ["module", "layers", "asked", "computes in", *(["built as"] if any(row.built for row in rows) else [])]
    for column in columns:
        table.add_column(column, overflow="fold", no_wrap=column in ("module", "layers") and not every)
    for name, same in grouped(rows, lambda row: row.module, lambda row: (row.asked, row.actual), every):
        first, built = same[0], " or ".join(sorted({row.built for row in same}))
        cells = (name, layers_of(row.module for row in same), first.asked or "-", first.actual, built)
        table.add_row(*map(escape, cells[: len(columns)]))
    stdout.print(table)
    if not any(row.built for row in rows) and "fp8" in {row.actual for row in rows}:
        stdout.print(f"fp8: numbers are rounded to it; {manifest.backend} multiplies them in fp32", markup=False)


class _Tokens(click.ParamType[int]):
    name = "tokens"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        from shuntyard.engines.plan import parse_tokens

        try:
            return parse_tokens(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)


@main.command()
@click.argument("ckpt", type=PATH)
@click.option("--gpu", default="h100", show_default=True, help="A name, or what there is to use, as 44.5GiB.")
@click.option("--gpus", type=click.IntRange(1), default=1, show_default=True, help="GPUs that share the engine.")
@click.option("--context", type=_Tokens(), help="As 8192, 128k or 1M.  [default: the model's, at most 8192]")
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True, help="Sequences at once.")
@click.option("--tokens", type=click.IntRange(1), default=512, show_default=True, help="Of a sequence in one call.")
@click.option("--weights", default="stored", show_default=True, help="A shipped recipe, stored, or a .toml file.")
@click.option("--kv", type=click.Choice(["bf16", "fp8"]), help="Of the KV cache.  [default: the recipe's, else bf16]")
@click.option("--all-logits", is_flag=True, help="Logits of every token, as validate asks for, not of the last.")
@click.option("--reserve", type=click.IntRange(0), default=1024, show_default=True, help="MiB to keep free on a GPU.")
@click.option("--json", "as_json", is_flag=True, help="All sizes in bytes, as JSON on stdout.")
def plan(ckpt: Path, as_json: bool, reserve: int, **asked: Any) -> None:
    """Say whether an engine of the checkpoint CKPT would fit on a GPU; exit status 1 when it would not."""
    from shuntyard.engines.plan import Request
    from shuntyard.engines.plan import plan as run

    answer = run(ckpt, Request(reserve=reserve * 2**20, **asked))
    if as_json:
        emit(answer.as_dict())
    else:
        _print_plan(answer)
    if not answer.fits:
        sys.exit(EXIT_FAILED)


def _print_plan(answer: Any) -> None:
    from shuntyard.engines.plan import words

    stdout.print(one_line(answer.model.path.absolute().name), style="bold", markup=False)
    stdout.print(words.heading(answer), markup=False)
    for rows, right in ((words.weight_rows(answer), (1, 3, 5)), (words.budget_rows(answer), (2,))):
        table = Table(box=SIMPLE_HEAD, pad_edge=False, width=min(stdout.width, 80))
        for i, column in enumerate(next(rows)):
            is_number = i in right
            is_name = column not in ("", "as stored", "in the engine") and stdout.width >= 80
            justify: Any = "right" if is_number else "left"
            table.add_column(column, justify=justify, no_wrap=is_number or is_name, overflow="fold")
        for row in rows:
            table.add_row(*map(escape, row), style="bold" if row[0] in words.SUMS else None)
        stdout.print(table)
    stdout.print(words.verdict(answer), style="bold green" if answer.fits else "bold red", markup=False)
    if answer.nearest:
        stdout.print("what would fit, the least loss first:")
        table = Table.grid(padding=(0, 0, 0, 2))
        for i in range(3):
            table.add_column(justify="right" if i == 1 else "left", no_wrap=i < 2)
        for row in words.options(answer):
            table.add_row(*map(escape, row))
        stdout.print(Padding(table, (0, 0, 0, 2)))
    for remark in words.remarks(answer):
        stdout.print(remark, markup=False)


@main.command()
@click.argument("out", type=PATH, default=Path("demo-output"))
@click.option("--json", "as_json", is_flag=True, help="Report and engines as JSON on stdout.")
def demo(out: Path, as_json: bool) -> None:
    """Export, build and validate the trained miniature into the new directory OUT."""
    from shuntyard.engines.build import Reporter
    from shuntyard.validate.demo import run_demo

    with progress() as update:
        result = run_demo(out, Reporter(say, warn, update))
    if as_json:
        emit(result.as_dict())
    else:
        print_report(result.report)
        table = Table(title="engines", title_justify="left")
        for column in ("engine", "target", "type", "plugin layers in the plan"):
            table.add_column(column)
        for row in result.engines:
            table.add_row(*map(escape, row))
        stdout.print(table)
        for note in result.notes:
            stdout.print(f"note: {note}", markup=False)
    if not result.report.passed:
        sys.exit(EXIT_FAILED)


main.add_command(precision)
main.add_command(validate)
main.add_command(calibrate)
