"""Geometry of the routing heat map: layers x experts, for 2 to 128 experts."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field

from shuntyard.validate.charts import WIDTH, Tick, every, percent, px
from shuntyard.validate.report import Report, Routing

LEVELS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 4.0)
"""Upper ends of the colours, as multiples of an even share; above the last is one more."""
_MOST_CELLS = 1200  # with a title each; beyond, one path for each colour keeps the page small
_MOST_MARKS = 600
LARGE = 0.02  # of a layer's choices


@dataclass(frozen=True)
class Cell:
    """One expert in one layer."""

    x: float
    y: float
    level: int
    title: str


@dataclass(frozen=True)
class Difference:
    """Where engine and reference give an expert another number of tokens."""

    x: float
    y: float
    more: bool  # in the engine
    large: bool
    text: str  # "+3", where the cell has room for it
    dark: bool  # the cell is
    size: int  # tokens
    title: str


@dataclass(frozen=True)
class Row:
    """One layer."""

    y: float
    layer: int
    agreement: str
    bad: bool
    title: str


@dataclass
class HeatMap:
    """The whole drawing; ``paths`` instead of ``cells`` where there are many."""

    width: float
    height: float
    cell: float
    row: float
    left: float
    top: float
    right: float
    experts: int
    font: float
    cells: list[Cell] = field(default_factory=list)
    paths: list[tuple[int, str]] = field(default_factory=list)
    differences: list[Difference] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    ticks: list[Tick] = field(default_factory=list)
    legend: list[str] = field(default_factory=list)
    unmarked: int = 0  # differences beyond the largest

    @property
    def numbered(self) -> bool:
        """Whether differences are told by their numbers; where cells are small, by triangles."""
        return any(difference.text for difference in self.differences)


def level(share: float, experts: int) -> int:
    """Which colour an expert's share of its layer's choices has."""
    return bisect_left(LEVELS, round(share * experts, 9))


def out_of_bounds(routing: Routing) -> bool:
    """Whether a flip is none of a tie's."""
    return routing.flips > 0 and not routing.worst_margin <= routing.margin_bound


def heat_map(report: Report) -> HeatMap | None:
    """The engine's load shares; None without MoE layers."""
    if not report.routing:
        return None
    experts = max(max(len(r.load_engine), len(r.load_reference)) for r in report.routing)
    left, room = 62.0, 92.0
    cell = min(60.0, (WIDTH - left - room) / max(experts, 1))
    row = min(24.0, max(10.0, 700 / len(report.routing)))
    right = left + cell * experts
    chart = HeatMap(px(right + room), px(row * len(report.routing) + 44), cell, row, left, 22.0, right, experts, 12.0)
    chart.font = px(min(12.0, row - 1))
    step = every(experts, cell, 26)
    chart.ticks = [Tick(px(left + (e + 0.5) * cell), str(e)) for e in range(0, experts, step)]
    names = ["none", *(f"≤ {end:g}×" for end in LEVELS[1:]), f"> {LEVELS[-1]:g}×"]
    chart.legend = names
    many = experts * len(report.routing) > _MOST_CELLS
    paths: dict[int, list[str]] = {}
    for i, routing in enumerate(report.routing):
        y = px(chart.top + i * row)
        chart.rows.append(Row(y, routing.layer, percent(routing.agreement), out_of_bounds(routing), _title(routing)))
        total = sum(routing.load_engine) or 1
        for e, load in enumerate(routing.load_engine):
            x, colour = px(left + e * cell), level(load / total, experts)
            if many:
                paths.setdefault(colour, []).append(
                    f"M{x:g} {y:g}h{px(cell - 0.5):g}v{px(row - 1):g}h-{px(cell - 0.5):g}z"
                )
            else:
                chart.cells.append(Cell(x, y, colour, _cell(routing, e)))
    chart.paths = [(colour, "".join(parts)) for colour, parts in sorted(paths.items())]
    found = sorted(_differences(report.routing, chart), key=lambda difference: -difference.size)
    chart.differences, chart.unmarked = found[:_MOST_MARKS], len(found[_MOST_MARKS:])
    return chart


def _differences(rows: list[Routing], chart: HeatMap) -> list[Difference]:
    found: list[Difference] = []
    for i, routing in enumerate(rows):
        total = sum(routing.load_engine) or 1
        for e, (load, reference) in enumerate(zip(routing.load_engine, routing.load_reference, strict=True)):
            if load == reference:
                continue
            x, y = chart.left + (e + 0.5) * chart.cell, chart.top + (i + 0.5) * chart.row
            text = f"{load - reference:+,}" if chart.cell >= 34 and chart.row >= 14 else ""
            large = abs(load - reference) > LARGE * total
            dark = level(load / total, chart.experts) >= 5
            size = abs(load - reference)
            found.append(Difference(px(x), px(y), load > reference, large, text, dark, size, _cell(routing, e)))
    return found


def _cell(routing: Routing, expert: int) -> str:
    load, reference = routing.load_engine[expert], routing.load_reference[expert]
    share = percent(load / (sum(routing.load_engine) or 1))
    same = "the reference as many" if load == reference else f"the reference {reference:,} ({load - reference:+,})"
    return f"layer {routing.layer}, expert {expert}: {load:,} tokens ({share}), {same}"


def _title(routing: Routing) -> str:
    return f"layer {routing.layer}: the same experts for {percent(routing.agreement)} of {routing.tokens:,} tokens"
