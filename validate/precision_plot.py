"""What a search saw, as one HTML page that asks for nothing: sensitivities by layer and module, quality against bytes.

Geometry is here, colours and fonts are the style sheets'; lengths are units of the drawings.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from shuntyard.exporter.modules import split_name
from shuntyard.exporter.recipe import Precision
from shuntyard.validate.charts import CHARACTER, WIDTH, Tick, every, percent, px, three
from shuntyard.validate.page import environment
from shuntyard.validate.search import Found, Sensitivity, Trial
from shuntyard.validate.search_recipe import Source

LEVELS = 8
"""Colours of the maps, half a decade of KL each."""

_ROW = 18.0
_LABELS = 168.0
_GAP = 22.0
_MARGIN = 10.0  # half of the last column's word
_SIDE_BY_SIDE = 14  # layers, up to which the maps stand beside one another


@dataclass(frozen=True)
class Cell:
    """One module in one precision."""

    x: float
    y: float
    level: int
    chosen: bool
    title: str


@dataclass
class Map:
    """Modules by layer, in one precision; ``labelled`` says whether its rows have their names beside them."""

    title: str
    x: float
    y: float
    cell: float
    labelled: bool
    cells: list[Cell] = field(default_factory=list)
    ticks: list[Tick] = field(default_factory=list)


@dataclass
class Maps:
    """All precisions that were tried, on one scale."""

    rows: list[str]
    maps: list[Map]
    height: float
    legend: list[str]  # from the lightest level on
    row: float = _ROW
    width: float = WIDTH
    labels: float = _LABELS


def sensitivity_maps(found: Found) -> Maps | None:
    """KL of each module alone, a map for each precision; None where nothing can be quantised."""
    if not found.sensitivities:
        return None
    kinds = list(dict.fromkeys(_precision_name(s.precision) for s in found.sensitivities))
    rows = list(dict.fromkeys(_row_name(s.module) for s in found.sensitivities))
    columns = list(dict.fromkeys(split_name(s.module)[0] for s in found.sensitivities))
    columns.sort(key=lambda layer: math.inf if layer is None else layer)
    beside = len(columns) <= _SIDE_BY_SIDE
    room = WIDTH - _LABELS - _MARGIN
    room = (room - _GAP * (len(kinds) - 1)) / len(kinds) if beside else room
    cell = min(room / len(columns), 36.0)
    top = _top(found.sensitivities)
    chosen = dict(found.best.choice)
    maps = []
    for number, kind in enumerate(kinds):
        x = _LABELS + (number * (cell * len(columns) + _GAP) if beside else 0.0)
        y = 26.0 + (0.0 if beside else number * (_ROW * len(rows) + 58.0))
        own = Map(kind, px(x), y, cell, number == 0 or not beside)
        step = every(len(columns), cell, 24)
        for place, layer in enumerate(columns):
            if layer is None or place % step == 0:
                text = "head" if layer is None else str(layer)
                own.ticks.append(Tick(px(x + (place + 0.5) * cell), text))
        for s in found.sensitivities:
            if _precision_name(s.precision) == kind:
                place, row = columns.index(split_name(s.module)[0]), rows.index(_row_name(s.module))
                is_chosen = chosen[s.module] == s.precision
                title = f"{s.module} as {s.precision}: KL {three(s.kl)}, saves {s.saved:,} bytes"
                own.cells.append(Cell(px(x + place * cell), px(y + row * _ROW), level(s.kl, top), is_chosen, title))
        maps.append(own)
    height = maps[-1].y + _ROW * len(rows) + 26.0
    return Maps(rows, maps, height, _legend(top))


def _top(sensitivities: Sequence[Sensitivity]) -> int:
    """The largest KL's place on the scale of half decades."""
    return math.ceil(2 * math.log10(max(max(s.kl for s in sensitivities), 1e-12)))


def level(kl: float, top: int) -> int:
    """The colour of a KL, 1 to 8; ``top`` is the darkest one's upper end, in half decades."""
    place = math.ceil(2 * math.log10(kl)) if kl > 0 else -math.inf
    return int(min(LEVELS, max(1, LEVELS - top + place)))


def _legend(top: int) -> list[str]:
    ends = [10 ** ((top - LEVELS + number) / 2) for number in range(1, LEVELS + 1)]
    return [f"≤ {end:.1g}" if end >= 1e-3 else f"≤ {end:.0e}".replace("e-0", "e-") for end in ends]


def _precision_name(precision: Precision) -> str:
    if precision.weights == "int4":
        return "INT4 weights"
    return "FP8 weights" if precision.activations == "none" else "FP8 weights and activations"


def _row_name(module: str) -> str:
    _, name = split_name(module)
    return name.removeprefix("feed_forward.") if ".shared_expert." in name else name


@dataclass(frozen=True)
class Point:
    """One recipe. ``kind``: found, shipped, baseline, or tried; ``within`` the bound or not."""

    x: float
    y: float
    kind: str
    within: bool
    title: str


@dataclass(frozen=True)
class Label:
    """The name of a point."""

    x: float
    y: float
    text: str
    anchor: str
    kind: str


@dataclass
class Scatter:
    """KL, on a scale of decades, against bytes."""

    points: list[Point]
    labels: list[Label]
    frontier: str  # points of a line
    bound: float | None
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    unit: str
    width: float = WIDTH
    height: float = 420.0
    left: float = 62.0
    right: float = WIDTH - 18
    top: float = 30.0
    bottom: float = 370.0


def scatter(found: Found) -> Scatter:
    """All recipes that were measured as a whole, and the best of them: the frontier."""
    whole = [trial for trial in found.trials if math.isfinite(trial.outcome.mean_kl)]
    unit, factor = ("GB", 1e9) if found.baseline.bytes >= 1e10 else ("MB", 1e6)
    chart = Scatter([], [], "", None, [], [], unit)
    low_x, high_x = min(t.bytes for t in whole), max(t.bytes for t in whole)
    step = _handy((high_x - low_x) / factor / 7 or 1.0)
    first, last = math.floor(low_x / factor / step), math.ceil(high_x / factor / step)
    first, last = (first, last) if last > first else (first, first + 1)
    powers = [math.log10(t.outcome.mean_kl) for t in whole if t.outcome.mean_kl > 0] or [-2.0]
    low_y, high_y = max(math.floor(min(powers)), math.ceil(max(powers)) - 6), math.ceil(max(powers))
    low_y = min(low_y, high_y - 1)

    def across(size: float) -> float:
        return px(chart.left + (size / factor / step - first) / (last - first) * (chart.right - chart.left))

    def down(kl: float) -> float:
        power = max(math.log10(kl), low_y) if kl > 0 else low_y - 0.5
        return px(chart.bottom - (power - low_y + 0.5) / (high_y - low_y + 0.5) * (chart.bottom - chart.top))

    digits = max(0, -math.floor(math.log10(step)))
    chart.x_ticks = [Tick(across(i * step * factor), f"{i * step:,.{digits}f}") for i in range(first, last + 1)]
    chart.y_ticks = [Tick(down(10.0**power), _decade(power)) for power in range(low_y, high_y + 1)]
    chart.y_ticks.append(Tick(down(0.0), "0"))
    if found.bound.metric == "kl" and 10.0**low_y <= found.bound.value <= 10.0**high_y:
        chart.bound = down(found.bound.value)
    order = {"tried": 0, "baseline": 1, "shipped": 2, "found": 3}
    named = []
    for trial in sorted(whole, key=lambda trial: order[_kind(trial, found)]):
        kind = _kind(trial, found)
        point = Point(across(trial.bytes), down(trial.outcome.mean_kl), kind, trial.within, _title(trial, found))
        chart.points.append(point)
        if kind != "tried":
            named.append((point, "found" if kind == "found" and not trial.name else trial.name))
    line: list[str] = []
    least = math.inf
    for trial in sorted(whole, key=lambda trial: (-trial.bytes, trial.outcome.mean_kl), reverse=True):
        if trial.outcome.mean_kl < least:
            least = trial.outcome.mean_kl
            x, y = across(trial.bytes), down(least)
            line.append(f"{'M' if not line else 'H'}{x}" + (f" {y}" if not line else f"V{y}"))
    chart.frontier = "".join(line)
    for point, text in sorted(named, key=lambda pair: -order[pair[0].kind]):
        chart.labels.append(_placed(point, text, chart))
    return chart


def _kind(trial: Trial, found: Found) -> str:
    if trial.choice == found.best.choice:
        return "found"
    if trial.choice == found.baseline.choice:
        return "baseline"
    return "shipped" if trial.name else "tried"


def _title(trial: Trial, found: Found) -> str:
    name = trial.name or ("found" if trial.choice == found.best.choice else "tried")
    change = trial.outcome.perplexity / found.baseline.outcome.perplexity - 1
    return (
        f"{name}: {trial.bytes:,} bytes, KL {three(trial.outcome.mean_kl)}, perplexity {change:+.2%}, "
        f"top-1 agreement {percent(trial.outcome.mean_top1)}"
    )


def _handy(step: float) -> float:
    """The next larger of 1, 2, 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= step * 0.999)


def _decade(power: int) -> str:
    return f"{10.0**power:g}" if power > -4 else f"1e{power}"


def _placed(point: Point, text: str, chart: Scatter) -> Label:
    """Beside its point, where it hides no other label and few points."""
    length, best, least = len(text) * CHARACTER, None, math.inf
    for dy in (0, -16, 16, -30, 30, -44, 44):
        for anchor in ("start", "end"):
            x = point.x + 11 if anchor == "start" else point.x - 11
            start = x if anchor == "start" else x - length
            y = point.y + dy
            if start < chart.left or start + length > chart.right + 4 or not chart.top - 8 <= y <= chart.bottom - 2:
                continue
            cost = abs(dy) / 8.0
            cost += sum(100.0 for other in chart.labels if _overlaps(other, start, y, length))
            hits = (p for p in chart.points if start - 4 < p.x < start + length + 4 and abs(p.y - y) < 10)
            cost += sum(1.0 if p.kind == "tried" else 10.0 for p in hits if p is not point)
            if cost < least:
                best, least = Label(px(x), px(y), text, anchor, point.kind), cost
    return best or Label(point.x, px(point.y - 12), text, "middle", point.kind)


def _overlaps(label: Label, start: float, y: float, length: float) -> bool:
    its = len(label.text) * CHARACTER
    left = {"start": label.x, "end": label.x - its, "middle": label.x - its / 2}[label.anchor]
    return abs(label.y - y) < 15 and left < start + length and start < left + its


def render_search(found: Found, source: Source, name: str) -> str:
    """The page. ``name`` is the recipe's."""
    rows = sorted([found.baseline, *found.shipped(), found.best], key=lambda trial: (-trial.bytes, trial.name))
    columns = list(dict.fromkeys(_precision_name(s.precision) for s in found.sensitivities))
    table: dict[str, dict[str, Sensitivity]] = {}
    for s in found.sensitivities:
        table.setdefault(s.module, {})[_precision_name(s.precision)] = s
    return (
        environment()
        .get_template("precision.html")
        .render(
            found=found,
            source=source,
            name=name,
            maps=sensitivity_maps(found),
            chart=scatter(found),
            rows=_unique(rows),
            columns=columns,
            table=table,
            chosen=dict(found.best.choice),
        )
    )


def _unique(trials: Sequence[Trial]) -> list[Trial]:
    """Each choice once."""
    return list({trial.choice: trial for trial in reversed(trials)}.values())[::-1]
