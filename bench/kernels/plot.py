"""Time over tokens as SVG, from the results alone: floor, ours and peers, a panel for each model and precision."""

from __future__ import annotations

import math
from html import escape

from bench.kernels.results import Point, Run

WIDTH, PANEL, GAP = 900.0, 330.0, 70.0
LEFT, RIGHT, TOP = 70.0, 190.0, 46.0

STYLE = """
svg { font: 13px system-ui, sans-serif; color-scheme: light dark; --ink: #1f2328; --line: #d0d7de; --back: #ffffff;
  --ours: #0969da; --p1: #bc4c00; --p2: #1a7f37; --p3: #8250df; --p4: #bf3989; }
@media (prefers-color-scheme: dark) { svg { --ink: #e6edf3; --line: #30363d; --back: #0d1117; --ours: #58a6ff;
  --p1: #f0883e; --p2: #3fb950; --p3: #a371f7; --p4: #db61a2; } }
text { fill: var(--ink); } .grid { stroke: var(--line); } path { fill: none; stroke-width: 2; }
.floor { stroke: var(--ink); stroke-dasharray: 5 4; } .ours { stroke: var(--ours); stroke-width: 3; }
.ours-dot { fill: var(--ours); }
"""


def _panels(run: Run, skew: str) -> list[tuple[str, list[Point]]]:
    groups: dict[tuple[str, str], list[Point]] = {}
    for point in run.points:
        if point.skew == skew:
            groups.setdefault((point.model, point.precision), []).append(point)
    return [(f"{m}, {p}, {skew} routing", sorted(ps, key=lambda p: p.tokens)) for (m, p), ps in groups.items()]


def lines_of(points: list[Point]) -> dict[str, list[tuple[float, float]]]:
    """By contender, the floor first and ours next: tokens and microseconds where there are any."""
    lines: dict[str, list[tuple[float, float]]] = {"floor": [(p.tokens, p.floor) for p in points], "ours": []}
    for point in points:
        for entry in point.entries:
            line = lines.setdefault(entry.name, [])
            if entry.times is not None:
                line.append((point.tokens, entry.times.median))
    return {name: line for name, line in lines.items() if line}


def _panel(title: str, points: list[Point], top: float, colours: dict[str, str]) -> list[str]:
    lines = lines_of(points)
    xs = [math.log2(t) for line in lines.values() for t, _ in line]
    ys = [math.log10(us) for line in lines.values() for _, us in line]
    low_x, high_x = min(xs), max(max(xs), min(xs) + 1)
    low_y, high_y = math.floor(min(ys)), max(math.ceil(max(ys)), math.floor(min(ys)) + 1)

    def across(tokens: float) -> float:
        return round(LEFT + (math.log2(tokens) - low_x) / (high_x - low_x) * (WIDTH - LEFT - RIGHT), 1)

    def down(microseconds: float) -> float:
        return round(top + PANEL - (math.log10(microseconds) - low_y) / (high_y - low_y) * PANEL, 1)

    parts = [f'<text x="{LEFT}" y="{top - 14}" font-weight="600">{escape(title)}: microseconds by tokens</text>']
    for power in range(low_y, high_y + 1):
        y = down(10.0**power)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4}" text-anchor="end">{10.0**power:,g}</text>')
    parts += [
        f'<text x="{across(tokens)}" y="{top + PANEL + 20}" text-anchor="middle">{tokens:,}</text>'
        for tokens in sorted({p.tokens for p in points})
    ]
    ends: list[float] = []
    for name, line in sorted(lines.items(), key=lambda item: -item[1][-1][1]):
        path = "M" + " L".join(f"{across(t)} {down(us)}" for t, us in line)
        kind = f'class="{name}"' if name in ("floor", "ours") else f'stroke="var({colours[name]})"'
        parts.append(f'<path {kind} d="{path}"/>')
        for t, us in line:
            if name != "floor":
                fill = 'class="ours-dot"' if name == "ours" else f'fill="var({colours[name]})"'
                parts.append(
                    f'<circle {fill} cx="{across(t)}" cy="{down(us)}" r="3.5">'
                    f"<title>{escape(name)}, {t:,} tokens: {us:,.1f} us</title></circle>"
                )
        label = down(line[-1][1])
        label = max(label, ends[-1] + 16) if ends else label
        ends.append(label)
        parts.append(f'<text x="{across(line[-1][0]) + 10}" y="{label + 4}">{escape(name)}</text>')
    return parts


def svg(run: Run, skew: str = "uniform") -> str:
    """The drawing.

    Raises:
        ValueError: nothing was measured with this skew.
    """
    panels = _panels(run, skew)
    if not panels:
        raise ValueError(f"nothing was measured with {skew} routing")
    names = dict.fromkeys(entry.name for _, points in panels for p in points for entry in p.entries)
    peers = [name for name in names if name != "ours"]
    colours = {name: f"--p{1 + i % 4}" for i, name in enumerate(peers)}
    height = TOP + len(panels) * (PANEL + GAP) + 10
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH:g} {height:g}" role="img">',
        f"<title>Routed experts of one layer on {escape(str(run.machine.get('gpu', 'a GPU')))}</title>",
        f"<style>{STYLE}</style>",
        '<rect width="100%" height="100%" fill="var(--back)"/>',
    ]
    for number, (title, points) in enumerate(panels):
        parts += _panel(title, points, TOP + number * (PANEL + GAP), colours)
    floors = f"floor: {run.copy_gigabytes:,.0f} GB/s copied, " + ", ".join(
        f"{rate:,.0f} TFLOP/s in {precision}" for precision, rate in run.teraflops.items()
    )
    parts.append(f'<text x="{LEFT}" y="{height - 12:g}">{escape(floors)}, measured in the same run</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"
