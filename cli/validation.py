"""``shuntyard validate``, and how a report looks in a terminal."""

from __future__ import annotations

import contextlib
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.markup import escape
from rich.table import Table

from shuntyard.cli.console import EXIT_FAILED, PATH, emit, one_line, say, stdout, warn

if TYPE_CHECKING:
    from shuntyard.validate.report import Check, Interval, Report
    from shuntyard.validate.validate import Plan

# Rooms are imported inside the commands: `shuntyard --help` need not wait for torch.


class _Sets(click.ParamType[tuple[str, ...]]):
    name = "sets"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        names = value if isinstance(value, tuple) else tuple(part.strip() for part in value.split(","))
        if names:
            from shuntyard.validate.prompts import BUILT_IN

            for name in names:
                if name not in BUILT_IN:
                    self.fail(f"there is no set '{name}'; there are {', '.join(BUILT_IN)}", param, ctx)
        return names


@click.command()
@click.argument("engine")
@click.option("--reference", required=True, help="Checkpoint for transformers, or another model as ENGINE.")
@click.option("--text", type=PATH, help="UTF-8 text.  [default: the miniature's held-out text]")
@click.option("--windows", type=click.IntRange(1), default=8, show_default=True, help="Windows of the text.")
@click.option("--length", type=click.IntRange(4), help="Tokens a window.  [default: 3.5 chunks, at most 512]")
@click.option("--prompts", type=_Sets(), default=(), help="Built-in sets, as short,chunk,long,adversarial.")
@click.option("--tokens", type=PATH, help="JSONL: a list of token ids a line, or {tokens, label}.")
@click.option("--shipped-only", is_flag=True, help="The engine as it is: no layer alone, no output marked.")
@click.option("--by-layers", is_flag=True, help="Never the whole engine: memory is one layer's.")
@click.option("--tolerances", type=PATH, help="TOML of bounds for single modules, over the table's.")
@click.option("--cache", type=PATH, help="Directory that keeps the reference's activations for later runs.")
@click.option("--baseline", type=PATH, help="Fail where the engine is worse than this file says, beyond noise.")
@click.option("--baseline-entry", help="The engine's name in it.  [default: BACKEND-DTYPE]")
@click.option("--save-baseline", type=PATH, help="Keep this run's metrics in this file, beside other engines'.")
@click.option("--rate", type=click.FloatRange(0, 0.5, min_open=True), help="Of false alarms.  [default: 0.05]")
@click.option("--html", type=PATH, help="Write the report as one HTML page.")
@click.option("--junit", type=PATH, help="Write the checks as JUnit XML.")
@click.option("--github", is_flag=True, help="Annotations for GitHub's log on stdout, not the tables.")
@click.option("--polygraphy-save", type=PATH, help="New directory: inputs and outputs for polygraphy run.")
@click.option("--polygraphy-load", type=PATH, help="Judge what polygraphy run --save-outputs wrote, not the engine.")
@click.option("--allow-other-files", is_flag=True, help="Compare with files that the engine was not built from.")
@click.option("--json", "as_json", is_flag=True, help="The report as JSON on stdout.")
def validate(engine: str, reference: str, as_json: bool, **asked: Any) -> None:
    """Hold ENGINE to a reference; exit status 1 when a check fails.

    Both may be an engine directory, graph:MODEL (a model directory's graph), eager:CKPT, eager-fp16:CKPT,
    eager-bf16:CKPT (our model in PyTorch) or transformers:CKPT. A reference without a prefix that is no engine is run
    by transformers, in fp32, layer by layer from disk.
    """
    from shuntyard.validate import baseline, outputs, statistics
    from shuntyard.validate.page import write_page
    from shuntyard.validate.validate import validate as run

    if as_json and asked["github"]:
        raise click.UsageError("--json and --github both write to stdout: ask for one of them")
    if asked["polygraphy_load"] is not None and (asked["baseline"] or asked["save_baseline"]):
        raise click.UsageError("--polygraphy-load judges first calls alone, which is no run to keep or to compare")
    if asked["html"] is not None and asked["html"] == asked["junit"]:
        raise click.UsageError("--html and --junit are the same file")
    if asked["rate"] is not None and asked["baseline"] is None:
        raise click.UsageError("--rate is the gate's, which needs --baseline")
    report = run(engine, reference, _plan(asked), say)
    try:
        if asked["baseline"] is not None:
            rate = asked["rate"] if asked["rate"] is not None else statistics.RATE
            found = baseline.compare_with_baseline(report, asked["baseline"], asked["baseline_entry"], rate)
            baseline.apply_regression(report, found)
    finally:  # a baseline that does not fit does not take back what was found
        if asked["html"] is not None:
            write_page(report, asked["html"])
        if asked["junit"] is not None:
            outputs.write_file(asked["junit"], outputs.junit_xml(report))
    if as_json:
        emit(report.as_dict())
    elif asked["github"]:
        for line in outputs.github_annotations(report):
            click.echo(line)
    else:
        print_report(report)
    if asked["save_baseline"] is not None and report.verdict != "failed":
        # What a recipe costs is judged by nothing else than such a file.
        unjudged = report.verdict == "not judged"
        baseline.save_baseline(report, asked["save_baseline"], asked["baseline_entry"], allow_failed=unjudged)
        say(f"{asked['save_baseline']}: saved")
    elif asked["save_baseline"] is not None:
        warn(f"{asked['save_baseline']}: not saved, for the run failed: a broken engine is no yardstick")
    if report.verdict == "failed":
        sys.exit(EXIT_FAILED)


def _plan(asked: dict[str, Any]) -> Plan:
    from shuntyard.validate.bounds import read_overrides
    from shuntyard.validate.demo import held_out_text
    from shuntyard.validate.inputs import read_text
    from shuntyard.validate.validate import Inputs, Plan

    text = None if asked["text"] is None else read_text(asked["text"])
    if text is None and not asked["prompts"] and asked["tokens"] is None:
        text = held_out_text()
    path: Path | None = asked["tolerances"]
    return Plan(
        inputs=Inputs(text, asked["windows"], asked["length"], asked["prompts"], asked["tokens"]),
        allow_other_files=asked["allow_other_files"],
        shipped_only=asked["shipped_only"],
        by_layers=asked["by_layers"],
        cache=asked["cache"],
        polygraphy_save=asked["polygraphy_save"],
        polygraphy_load=asked["polygraphy_load"],
        overrides=() if path is None else tuple(read_overrides(path)),
    )


_MARKS = {True: "[green]ok", False: "[bold red]FAIL", None: "[dim]-"}
_MOST = 8
"""Failures of one look that are shown; --json and --html have all."""
_LOOKS = {
    "forced": "layers, fed the reference's input",
    "inverse": "reference's layers, fed the engine's input",
    "free": "layers, free-running",
}


def print_report(report: Report) -> None:
    """Checks with their bounds, notes, and the verdict last, where the eye is.

    Modules that are within their bounds are one row a look; where something is worst is told of failures.
    """
    title = f"{report.engine} ({report.backend}, {report.dtype}) against {report.reference}"
    table = Table(title=escape(one_line(title)), title_justify="left")
    for column in ("", "check", "value", "bound", ""):
        table.add_column(column, overflow="fold")
    parts: dict[str, list[Check]] = {}
    for check in report.checks:
        parts.setdefault(check.name.split(": ", 1)[0], []).append(check)
    for part, checks in parts.items():
        failed = [check for check in checks if check.ok is False]
        rows = [_row(check) for check in failed[:_MOST]]
        if len(failed) > _MOST:
            rows.append((f"and {len(failed) - _MOST} more that fail", "", "", _MARKS[False]))
        fine = [check for check in checks if check.ok is not False]
        if part in _LOOKS:
            rows += _summary(report, part, fine)
        else:
            rows += [_row(check) for check in fine]
        for i, row in enumerate(rows):
            table.add_row("" if i else part, *row)
        table.add_section()
    stdout.print(table)
    _print_gate(report)
    for note in report.notes:
        stdout.print(f"note: {one_line(note)}", markup=False, soft_wrap=True)
    if report.perplexity is not None and report.perplexity_reference is not None:
        ours, theirs = (_interval(p) for p in (report.perplexity, report.perplexity_reference))
        stdout.print(f"perplexity {ours}, reference {theirs}", soft_wrap=True)
    if report.passed:
        stdout.print("[bold green]passed")
        return
    if report.verdict == "not judged":
        stdout.print(f"[bold yellow]not judged[/]: {escape(report.unjudged)}", soft_wrap=True)
        return
    for check in report.failures[:_MOST]:
        where = f" at {one_line(check.detail)}" if check.detail else ""
        value = check.value if isinstance(check.value, str) else f"{check.value:.3g}"
        stdout.print(f"failed: {check.name} is {value}, must be {check.bound}{where}", markup=False, soft_wrap=True)
    stdout.print(f"[bold red]FAILED[/]{escape(_culprit(report))}", soft_wrap=True)


def _row(check: Check) -> tuple[str, str, str, str]:
    value = check.value if isinstance(check.value, str) else f"{check.value:.3g}"
    bound = check.bound
    with contextlib.suppress(ValueError):
        sign, _, number = bound.partition(" ")
        bound = f"{sign} {float(number):.3g}"
    return escape(check.name.split(": ", 1)[-1]), escape(one_line(value)), escape(bound), _MARKS[check.ok]


def _summary(report: Report, mode: str, fine: list[Check]) -> list[tuple[str, str, str, str]]:
    """One row for all modules within their bounds, and the rows of routing."""
    from shuntyard.validate.bounds import excess

    own = [module for module in report.modules if module.mode == mode and module.ok is not False]
    judged = [m for m in own if m.relative_bound is not None and m.coordinate_bound is not None]
    rows = []
    if judged:
        share = max(map(excess, judged))
        rows.append((f"{len(judged)} modules: {_LOOKS[mode]}", f"{share:.2g} of bound", "<= 1", _MARKS[True]))
    elif own:
        worst = max(m.relative for m in own)
        rows.append((f"{len(own)} modules: {_LOOKS[mode]}", f"{worst:.3g} relative", "-", _MARKS[None]))
    return rows + [_row(check) for check in fine if check.name.startswith((f"{mode}: routing", f"{mode}: margin"))]


def _interval(value: Interval) -> str:
    if math.isnan(value.low):
        return f"{value.value:.4f}"
    return f"{value.value:.4f} (95 %: {value.low:.2f} to {value.high:.2f})"


def _print_gate(report: Report) -> None:
    found = report.regression
    if found is None:
        return
    title = f"against the baseline {found.path}, {found.entry}: {found.sequences} sequences, rate {found.rate:g}"
    table = Table(title=escape(one_line(title)), title_justify="left")
    for column in ("metric", "baseline", "now", "worse by", "noise", "p", ""):
        table.add_column(column)
    for gate in found.gates:
        numbers = (gate.baseline, gate.now, gate.worse, gate.noise, gate.p_value)
        table.add_row(gate.metric, *(f"{number:.3g}" for number in numbers), _MARKS[gate.ok])
    stdout.print(table)


def _culprit(report: Report) -> str:
    if not report.culprit:
        return ""
    how = {
        "forced": "is the first module that is wrong by itself (fed the reference's input)",
        "inverse": "is the first that the running engine gets wrong (against the reference's layer, fed the same)",
        "free": "is the first that diverges, free-running",
    }
    return f": {report.culprit} {how[report.culprit_mode]}"
