"""The report as one HTML page that asks for nothing: no script, no font, no network."""

from __future__ import annotations

import functools
import math
import unicodedata
from collections import Counter
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from shuntyard.errors import OutputError
from shuntyard.validate import charts
from shuntyard.validate.charts import excess, percent, three, times
from shuntyard.validate.heatmap import LARGE, heat_map, out_of_bounds
from shuntyard.validate.outputs import write_file
from shuntyard.validate.report import Check, Interval, Module, Report, Routing
from shuntyard.validate.values import PARTS

FLIPS = 50
"""Flipped tokens that are shown, those out of bounds and then those with the largest margins first."""
OPEN_CHECKS = 40
"""Checks that hold are folded away beyond so many."""
_MODES = {
    "forced": (
        "Teacher-forced",
        "Each layer alone, fed the reference's input: a mark over the line is wrong by itself.",
    ),
    "inverse": (
        "Teacher-forced, inverse",
        "The reference's layers, fed the engine's inputs: a mark over the line is wrong by itself.",
    ),
    "free": (
        "Free-running",
        "All layers in a row, each fed its predecessor's output: how errors grow, and what goes wrong only in company.",
    ),
}
"""Of the modules: the heading, and what the mode settles. The first that there is gets the large chart."""


def visible(text: str) -> str:
    """Text with what cannot be seen, or turns the text around it, made visible; newlines and tabs stay.

    Control characters become control pictures; format characters (right-to-left marks, zero-width spaces), lone
    surrogates and noncharacters become ``‹U+202E›``. So the page is valid UTF-8 and HTML, whatever a tokenizer holds.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(_visible(character) for character in text)


def _visible(character: str) -> str:
    code = ord(character)
    if character in "\n\t":
        return character
    if code < 0x20:
        return chr(0x2400 + code)
    if code == 0x7F:
        return "␡"
    noncharacter = code & 0xFFFE == 0xFFFE or 0xFDD0 <= code <= 0xFDEF
    if noncharacter or unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp"):
        return f"‹U+{code:04X}›"
    return character


def visible_token(text: str) -> str:
    """As :func:`visible`, with newlines and tabs shown as well."""
    return visible(text).replace("\n", "↵").replace("\t", "⇥")


def _finalize(value: Any) -> Any:
    """What every expression of the templates passes through, before it is escaped."""
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def value_text(value: float | str) -> str:
    """A check's value."""
    return value if isinstance(value, str) else three(value)


def perplexity_text(interval: Interval) -> str:
    """Five digits: three would hide the very difference that is looked for."""
    return f"{interval.value:.5g}"


@functools.cache
def environment() -> jinja2.Environment:
    """Of all templates, with what their values go through."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("shuntyard.validate", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_finalize,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        three=three,
        percent=percent,
        value=value_text,
        token=visible_token,
        perplexity=perplexity_text,
        excess=excess,
        times=times,
        out_of_bounds=out_of_bounds,
        shorten=charts.shorten,
    )
    return environment


@dataclass(frozen=True)
class Figure:
    """A number on top of the page."""

    name: str
    value: str
    more: str
    bad: bool = False


@dataclass(frozen=True)
class Matrix:
    """A chart as a table: a row for each layer, a column for each part, the error by its bound."""

    mode: str
    columns: list[str]
    rows: list[tuple[str, list[Module | None]]]


def render(report: Report) -> str:
    """The page. The same report gives the same text.

    Raises:
        ValueError: the report contradicts itself: a histogram without an edge for each count, loads of other experts.
    """
    single = ("forced: ", "inverse: ", "free: ")
    others = sorted((check for check in report.checks if check.ok is not False), key=lambda check: check.ok is True)
    folded = (
        [check for check in others if check.ok and check.name.startswith(single)] if len(others) > OPEN_CHECKS else []
    )
    errors: list[tuple[str, str, str, charts.ErrorChart, Matrix]] = []
    for mode, (title, meaning) in _MODES.items():
        chart = charts.error_chart(report, mode, *((300.0, 3) if errors else (420.0, 6)))
        if chart is not None:
            errors.append((mode, title, meaning, chart, matrix(report, mode)))
    flips = sorted(report.flips, key=lambda flip: (flip.ok, -flip.margin if flip.margin == flip.margin else -math.inf))
    return (
        environment()
        .get_template("page.html")
        .render(
            report=report,
            why=why(report),
            figures=_figures(report),
            errors=errors,
            faults=charts.worst_first(report.modules, report.culprit),
            heat=heat_map(report),
            large=LARGE,
            busiest=busiest,
            flips=flips[:FLIPS],
            more_flips=len(flips[FLIPS:]),
            bad_flips=sum(not flip.ok for flip in flips),
            histogram=charts.histogram(report),
            precision=precision(report.precision),
            failures=report.failures,
            others=[check for check in others if check not in folded],
            folded=folded,
            fault_shape=charts.FAULT_SHAPE,
        )
    )


def write_page(report: Report, path: Path) -> None:
    """Writes the page, whole or not at all; a file of that name is replaced, a link's target stays where it is.

    Raises:
        OutputError: the directory is missing or cannot be written to, or something else than a file is there.
    """
    page = render(report)
    if not path.resolve().parent.is_dir():
        raise OutputError(
            f"{path}: the report cannot be written: there is no such directory", hint="name a file in one that exists"
        )
    write_file(path, page)


NOTHING = "No check was judged, so this says nothing about the engine."


def why(report: Report) -> str:
    """One sentence: what is wrong, by how much, and where; or what was looked at."""
    if report.verdict == "not judged":
        return f"{report.unjudged[:1].upper()}{report.unjudged[1:]}."
    if not report.passed and not report.failures:
        return NOTHING
    if report.passed:
        judged = sum(check.ok is not None for check in report.checks)
        return f"All {judged:,} judged checks hold." if judged > 1 else "The one judged check holds."
    if report.culprit:
        kind = {
            "forced": "is the first module that is wrong by itself, given the reference's input (teacher-forced)",
            "inverse": "is the first module that is wrong by itself, against the reference fed the engine's input",
            "free": "is the first module that is wrong, and only when layers feed one another: wiring or KV cache",
        }.get(report.culprit_mode, "is the first module that is out of its bounds")
        return f"{report.culprit} {kind}: {_evidence(report)}."
    return f"{_sentence(report.failures[0])}."


def _evidence(report: Report) -> str:
    """The culprit's worst metric, value, bound and place."""
    named = [m for m in report.modules if m.module == report.culprit and m.ok is False]
    module = next((m for m in named if m.mode == report.culprit_mode), None)
    if module is not None:
        metrics = (
            ("relative error", module.relative, module.relative_bound),
            ("largest coordinate's error", module.coordinate, module.coordinate_bound),
        )
        broken = [(name, error, bound) for name, error, bound in metrics if bound is not None and not error <= bound]
        if broken:
            name, error, bound = max(broken, key=lambda m: m[1] / m[2] if m[2] and m[1] == m[1] else math.inf)
            text = f"{name} {three(error)}, bound {three(bound)}"
            return f"{text} ({times(excess(module))}), at {module.where}" if module.where else text
    return _sentence(report.failures[0])


def _sentence(check: Check) -> str:
    text = f"{check.name} is {value_text(check.value)}, which is not {check.bound}"
    return f"{text} ({check.detail})" if check.detail else text


def _figures(report: Report) -> list[Figure]:
    judged = sum(check.ok is not None for check in report.checks)
    failed = sum(check.ok is False for check in report.checks)
    reported = len(report.checks) - judged
    more = f"of {judged:,} judged" + (f", {reported:,} only reported" if reported else "")
    sequences = len(report.sequences)
    figures = [
        Figure("Checks failed", f"{failed:,}", more, failed > 0),
        Figure("Tokens", f"{report.tokens:,}", f"in {sequences:,} sequences" if sequences else "compared"),
    ]
    forced = [
        (ratio, m) for m in report.modules if m.mode in ("forced", "inverse") and (ratio := excess(m)) is not None
    ]
    if forced:
        ratio, worst = max(forced, key=lambda pair: math.inf if math.isnan(pair[0]) else pair[0])
        figures.append(Figure("Worst module", f"{three(ratio)}×", f"its bound: {worst.module}", worst.ok is False))
    if report.routing:
        worst_row = min(report.routing, key=lambda row: row.agreement)
        tokens = sum(row.tokens for row in report.routing) or 1
        mean = sum(row.agreement * row.tokens for row in report.routing) / tokens
        bad = [str(row.layer) for row in report.routing if out_of_bounds(row)]
        ties = f"beyond a tie in layer {', '.join(bad[:3])}{' …' if bad[3:] else ''}" if bad else "all of them ties"
        least = f"least in layer {worst_row.layer}: {percent(worst_row.agreement)}"
        figures.append(Figure("Routing agrees", percent(mean), least, bool(bad)))
        flips = sum(row.flips for row in report.routing)
        figures.append(Figure("Flips", f"{flips:,}", ties if flips else "", bool(bad)))
    if report.perplexity is not None:
        own, other = report.perplexity, report.perplexity_reference
        more = f"reference {perplexity_text(other)}" if other is not None else "of the engine"
        figures.append(Figure("Perplexity", perplexity_text(own), more))
    return figures


def matrix(report: Report, mode: str) -> Matrix:
    """A mode's modules by layer and part; the embedding and the head are in the last column."""
    modules = [module for module in report.modules if module.mode == mode]
    parts = [part for part in PARTS if any(module.part == part for module in modules)]
    ends = [module for module in modules if module.part not in PARTS]
    last = max((module.layer for module in modules if module.part in PARTS), default=-1)
    found = {(module.layer, module.part): module for module in modules}
    rows: list[tuple[str, list[Module | None]]] = [
        (str(layer), [found.get((layer, part)) for part in parts]) for layer in range(last + 1)
    ]
    width = max(len(parts), 1)
    for module in sorted(ends, key=lambda module: module.layer):
        cells: list[Module | None] = [None] * (width - 1) + [module]
        rows.insert(0, (module.part, cells)) if module.layer < 0 else rows.append((module.part, cells))
    return Matrix(mode, [charts.series(part).name for part in parts] or ["error"], rows)


def busiest(routing: Routing) -> tuple[int, float, int]:
    """The engine's most used expert, its share of the layer's choices, and how many experts are not used at all."""
    loads = routing.load_engine
    if not loads:
        return 0, 0.0, 0
    expert = max(range(len(loads)), key=loads.__getitem__)
    return expert, loads[expert] / (sum(loads) or 1), loads.count(0)


def precision(layers: list[dict[str, str]]) -> tuple[list[str], list[tuple[str, list[str]]]] | None:
    """Columns and rows of the precision table; layers that are alike share a row: ``"0-3"``."""
    if not layers:
        return None
    columns = list(Counter(part for layer in layers for part in layer))
    rows = []
    for _, group in groupby(enumerate(layers), key=lambda pair: pair[1]):
        alike = list(group)
        first, last = alike[0][0], alike[-1][0]
        rows.append((str(first) if first == last else f"{first}–{last}", [alike[0][1].get(c, "") for c in columns]))
    return columns, rows
