"""Geometry of the page's charts; ``templates/charts.html`` draws them as inline SVG.

Our own few lines, because the page must be one file that asks for nothing: chart libraries bring scripts, and most of
them fonts or styles from the network. Lengths are units of the drawing; colours and fonts are the style sheet's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import pairwise

from shuntyard.validate.report import Module, Report
from shuntyard.validate.values import PARTS

WIDTH = 1000.0
CHARACTER = 6.7  # width of a label's character, about


def three(value: float) -> str:
    """Three significant digits: ``0.0123``, ``1,230``, ``1.23e-6``, ``NaN``."""
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("inf" if value > 0 else "-inf")
    if value == 0:
        return "0"
    if value in (1.0, 10.0, 100.0):
        return f"{value:.0f}"
    rounded = float(f"{value:.2e}")
    if 1e-4 <= abs(rounded) < 1e6:
        return f"{rounded:,.0f}" if abs(rounded) >= 1000 else f"{rounded:#.3g}".rstrip(".")
    mantissa, exponent = f"{rounded:.2e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def percent(share: float) -> str:
    """A share as a percentage, never rounded to 100 %: ``3.12 %``, ``99.98 %``, ``> 99.99 %``."""
    if not math.isfinite(share):
        return "NaN"
    if 0.9999 < share < 1:
        return "> 99.99 %"
    return f"{100 * share:.2f} %" if 0.9 < share < 1 else f"{three(100 * share)} %"


def px(value: float) -> float:
    """A tenth of a unit is finer than any screen."""
    return round(value, 1)


@dataclass(frozen=True)
class Series:
    """A part of the layers in the charts: the style sheet's colour ``p0`` to ``p10``, a shape, a name."""

    style: int
    shape: str
    name: str


_SHAPES = (
    "M0-5L4.6 3.6H-4.6Z",  # triangle
    "M0 5L4.6-3.6H-4.6Z",  # triangle, upside down
    "M-4.4 0A4.4 4.4 0 1 1 4.4 0A4.4 4.4 0 1 1-4.4 0Z",  # disc
    "M0-5.6L5.6 0L0 5.6L-5.6 0Z",  # diamond
    "M-1.5-5H1.5V-1.5H5V1.5H1.5V5H-1.5V1.5H-5V-1.5H-1.5Z",  # plus
    "M0-5.2L5-1.6L3.1 4.3H-3.1L-5-1.6Z",  # pentagon
    "M-4-4H4V4H-4Z",  # square
    "M-5.5-1.6H5.5V1.6H-5.5Z",  # bar
    "M0-6L1.7-1.7L6 0L1.7 1.7L0 6L-1.7 1.7L-6 0L-1.7-1.7Z",  # star
    "M-5 3.5L0-3.5L5 3.5H2.5L0 0L-2.5 3.5Z",  # roof
    "M-5-3.5L0 3.5L5-3.5H2.5L0 0L-2.5-3.5Z",  # roof, upside down
)
FAULT_SHAPE = "M-7-4.2L-4.2-7L0-2.8L4.2-7L7-4.2L2.8 0L7 4.2L4.2 7L0 2.8L-4.2 7L-7 4.2L-2.8 0Z"
_NAMES = {
    "self_attn.key": "keys",
    "self_attn.value": "values",
    "self_attn": "attention",
    "feed_forward.router": "router",
    "feed_forward.shared_expert": "shared expert",
    "feed_forward.experts": "routed experts",
    "feed_forward": "feed-forward",
    "": "layer's output",
    "input_layernorm": "norm before attention",
    "post_attention_layernorm": "norm before feed-forward",
}
_STYLES = [*range(8), 9, 10]  # 8 is that of embedding and head
_SERIES = {part: Series(i, _SHAPES[i], name) for i, (part, name) in zip(_STYLES, _NAMES.items(), strict=True)}
assert set(_SERIES) == set(PARTS)
_ENDS = Series(8, _SHAPES[8], "embedding, head")


def series(part: str) -> Series:
    """How a module's part is drawn; the embedding and the head share one series."""
    return _SERIES.get(part, _ENDS)


def excess(module: Module) -> float | None:
    """The worse of the module's errors by its bound; NaN where an error is, None where none is judged."""
    pairs = ((module.relative, module.relative_bound), (module.coordinate, module.coordinate_bound))
    ratios = [_ratio(error, bound) for error, bound in pairs if bound is not None]
    if not ratios:
        return None
    return math.nan if any(math.isnan(ratio) for ratio in ratios) else max(ratios)


def _ratio(error: float, bound: float) -> float:
    if bound == 0 or math.isinf(error):
        return 0.0 if error == 0 else math.nan if math.isnan(error) else math.inf
    return error / bound


def worst_first(modules: Iterable[Module], culprit: str) -> list[Module]:
    """The modules that are out of bounds: the culprit, then by how far; what is not a number before all that is."""

    def key(module: Module) -> tuple[bool, float]:
        ratio = excess(module)
        far = math.inf if ratio is None or math.isnan(ratio) else ratio
        return module.module != culprit, -far

    return sorted((module for module in modules if module.ok is False), key=key)


def times(ratio: float | None) -> str:
    """``38.0× its bound``."""
    if ratio is None:
        return "not judged"
    return "not a number" if math.isnan(ratio) else f"{three(ratio)}× its bound"


@dataclass(frozen=True)
class Tick:
    """A place on an axis."""

    at: float
    text: str
    strong: bool = False


@dataclass(frozen=True)
class Mark:
    """One module. ``title`` is shown on hovering."""

    x: float
    y: float
    series: Series
    fault: bool
    title: str


@dataclass(frozen=True)
class Label:
    """A text beside a mark, and the mark."""

    x: float
    y: float
    text: str
    anchor: str
    mark: Mark


@dataclass
class ErrorChart:
    """Errors by layer. ``judged``: drawn by their bounds, else as they are."""

    height: float
    judged: bool
    column: float
    top: float
    bottom: float
    bound: float | None = None
    scale: float = 1.0
    x_ticks: list[Tick] = field(default_factory=list)
    y_ticks: list[Tick] = field(default_factory=list)
    bands: list[float] = field(default_factory=list)  # left edges of every other layer
    marks: list[Mark] = field(default_factory=list)
    labels: list[Label] = field(default_factory=list)
    line: str = ""  # through the layers' outputs
    legend: list[Series] = field(default_factory=list)
    faults: int = 0
    left_out: int = 0
    width: float = WIDTH
    left: float = 62.0
    right: float = WIDTH - 18


def error_chart(report: Report, mode: str, height: float, labels: int) -> ErrorChart | None:
    """All modules of a mode, as ``log10`` of the error by its bound; None without modules.

    Where no module of the mode has a bound, the relative errors themselves.
    """
    modules = [module for module in report.modules if module.mode == mode]
    if not modules:
        return None
    ratios = {id(module): excess(module) for module in modules}
    judged = any(ratio is not None for ratio in ratios.values())
    values = {id(m): ratios[id(m)] if judged else m.relative for m in modules}
    layers = max([report.layers, *(module.layer for module in modules)])
    chart = ErrorChart(height, judged, 0.0, 34.0, height - 44.0)
    chart.column = (chart.right - chart.left) / (layers + 2)
    chart.scale = max(0.55, min(1.0, chart.column / 13))
    low, high = _decades(values.values(), judged)

    def across(layer: int) -> float:
        return chart.left + (layer + 1.5) * chart.column

    def down(value: float) -> float:
        power = high if math.isnan(value) else math.log10(value) if value > 0 else low
        share = (min(max(power, low), high) - low) / (high - low)
        return chart.bottom - share * (chart.bottom - chart.top)

    chart.bound = px(down(1.0)) if judged else None
    chart.y_ticks = [
        Tick(px(down(10.0**power)), _decade(power, judged), judged and power == 0) for power in range(low, high + 1)
    ]
    chart.bands = [px(across(layer) - chart.column / 2) for layer in range(0, layers, 2)]
    chart.x_ticks = _layer_ticks(layers, chart.column, across)
    present = [part for part in PARTS if any(module.part == part for module in modules)]
    ends = any(module.part not in PARTS for module in modules)
    chart.legend = [series(part) for part in present] + ([_ENDS] if ends else [])
    step = min(chart.column * 0.8 / max(len(present), 1), 13.0) if chart.column >= 24 else 0.0
    marks: dict[int, Mark] = {}
    for module in modules:
        value = values[id(module)]
        if value is None:
            chart.left_out += 1
            continue
        offset = (present.index(module.part) - (len(present) - 1) / 2) * step if module.part in present else 0.0
        x, y = px(across(module.layer) + offset), px(down(value))
        marks[id(module)] = Mark(x, y, series(module.part), module.ok is False, _title(module))
    chart.marks = sorted(marks.values(), key=lambda mark: mark.fault)  # faults on top of all
    outputs = sorted((m for m in modules if m.part == "" and id(m) in marks), key=lambda m: m.layer)
    chart.line = " ".join(f"{marks[id(m)].x},{marks[id(m)].y}" for m in outputs)
    faults = [module for module in worst_first(modules, report.culprit) if id(module) in marks]
    chart.faults = len(faults)
    for module in faults[:labels]:
        text = f"{shorten(module.module)}, {times(ratios[id(module)])}"
        chart.labels.append(_placed(text, marks[id(module)], chart))
    return chart


def shorten(text: str, length: int = 60) -> str:
    """Keeps both ends of a long name."""
    return text if len(text) <= length else f"{text[: length // 2 - 1]}…{text[-length // 2 :]}"


def _title(module: Module) -> str:
    bounds = [
        f"{name} {three(error)} ({'not judged' if bound is None else f'bound {three(bound)}'})"
        for name, error, bound in (
            ("relative", module.relative, module.relative_bound),
            ("coordinate", module.coordinate, module.coordinate_bound),
        )
    ]
    return f"{module.module}: {times(excess(module))}; {', '.join(bounds)}; worst at {module.where}"


def _decades(values: Iterable[float | None], judged: bool) -> tuple[int, int]:
    """Whole powers of ten around what is drawn; at most ten of them, so that one value cannot flatten the rest."""
    powers = [math.log10(value) for value in values if value is not None and 0 < value < math.inf]
    low = math.floor(min(powers, default=-1.0))
    high = math.ceil(max(powers, default=0.0))
    if judged:
        low, high = min(low, -1), max(high, 1)
        high = min(high, 5)
        return max(low, high - 10), high
    return max(low, high - 10), max(high, max(low, high - 10) + 1)


def _decade(power: int, judged: bool) -> str:
    if judged and power == 0:
        return "bound"
    number = f"{10**power:,}" if 0 <= power < 5 else f"{10.0**power:g}" if -4 < power < 0 else f"1e{power}"
    return f"{number}×" if judged else number


def every(count: int, room: float, size: float) -> int:
    """The smallest handy step at which labels of a size fit beside one another."""
    return next((step for step in (1, 2, 4, 5, 8, 10, 16, 20, 32) if step * room >= size), max(count, 1))


def _layer_ticks(layers: int, column: float, across: Callable[[int], float]) -> list[Tick]:
    step = every(layers, column, 24)
    ticks = [Tick(px(across(layer)), str(layer)) for layer in range(0, layers, step)]
    room = 44 / column  # the two words are wider than a number
    kept = [tick for i, tick in enumerate(ticks) if room - 1 < i * step + 1 and i * step < layers - room + 1]
    return [Tick(px(across(-1)), "embed"), *(kept if layers > 2 else ticks), Tick(px(across(layers)), "head")]


def _placed(text: str, mark: Mark, chart: ErrorChart) -> Label:
    """Beside its mark, where it hides no other label and few marks."""
    length = len(text) * CHARACTER
    best, least = Label(mark.x, mark.y, text, "start", mark), math.inf
    for anchor in ("start", "end"):
        x = mark.x + 12 if anchor == "start" else mark.x - 12
        start = x if anchor == "start" else x - length
        if start < chart.left or start + length > chart.right + 4:
            x = min(max(start, chart.left + 2), chart.right - length)
            start, anchor_now, outside = x, "start", 40.0
        else:
            anchor_now, outside = anchor, 0.0
        for dy in (0, -17, 17, -34, 34, -51, 51, -68, 68, -85, 85):
            y = mark.y + dy
            if not chart.top - 14 <= y <= chart.bottom - 4:
                continue
            cost = abs(dy) / 10 + outside
            cost += sum(100.0 for other in chart.labels if _overlaps(other, start, y, length))
            for hit in chart.marks:
                if start - 5 < hit.x < start + length + 5 and abs(hit.y - y) < 11:
                    cost += 20.0 if hit.fault else 3.0
            if cost < least:
                best, least = Label(px(x), px(y), text, anchor_now, mark), cost
    return best


def _overlaps(label: Label, start: float, y: float, length: float) -> bool:
    its = len(label.text) * CHARACTER
    left = label.x if label.anchor == "start" else label.x - its
    return abs(label.y - y) < 16 and left < start + length and start < left + its


@dataclass(frozen=True)
class Bar:
    """One bin of a histogram."""

    x: float
    y: float
    width: float
    height: float
    title: str


@dataclass(frozen=True)
class Histogram:
    """Errors by their power of ten."""

    bars: list[Bar]
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    bottom: float
    total: int
    largest: str  # the last bin that is not empty
    median: str  # upper edge of the bin that holds it
    width: float = WIDTH
    height: float = 226.0
    left: float = 62.0
    right: float = WIDTH - 8


def histogram(report: Report) -> Histogram | None:
    """Logit errors, counted by ``log10``; None where nothing was counted. The bins at both ends are open.

    Raises:
        ValueError: there is not one edge more than there are counts.
    """
    edges, counts = report.histogram.get("edges", []), report.histogram.get("counts", [])
    total = sum(counts)
    if not total:
        return None
    left, right, top, bottom = 62.0, WIDTH - 8, 12.0, 184.0
    low, high, most = edges[0], edges[-1], max(counts)

    def across(power: float) -> float:
        return left + (power - low) / (high - low) * (right - left)

    bars, seen, median, largest = [], 0.0, "", ""
    for (start, end), count in zip(pairwise(edges), counts, strict=True):
        seen += count
        if count:
            height = max(count / most * (bottom - top), 1.5)  # a single error is seen as well
            span = _span(start, end, low, high)
            title = f"{span}: {int(count):,} logits, {percent(count / total)}"
            bars.append(
                Bar(px(across(start)), px(bottom - height), px(across(end) - across(start) - 1), px(height), title)
            )
            largest = span
        if not median and seen >= total / 2:
            median = three(10**end)
    powers = range(math.ceil(low), math.floor(high) + 1)
    step = every(len(powers), (right - left) / max(high - low, 1e-9), 60)
    x_ticks = [Tick(px(across(power)), _decade(power, judged=False)) for power in powers if power % step == 0]
    y_ticks = [Tick(px(bottom - share * (bottom - top)), percent(share * most / total)) for share in (0, 0.5, 1)]
    return Histogram(bars, x_ticks, y_ticks, bottom, int(total), largest, median)


def _span(start: float, end: float, low: float, high: float) -> str:
    if end == high and start > low:
        return f"over {three(10**start)}"
    return f"up to {three(10**end)}" if start == low else f"{three(10**start)} to {three(10**end)}"
