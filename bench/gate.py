"""Does the gate keep its rate, and does it see an engine whose perplexity is 1 % worse?

The engines are real: the trained miniature with noise in its weights (``bench/noisy.py``), on windows of its held-out
text. Four questions:

* *Same quality, exchanged*: two engines with independent noise of one size, and a coin for each sequence says which is
  the baseline. So the null holds exactly, with real noise in all six metrics. Three tests of the same largest
  studentised mean are compared: signs redrawn (what ships), the studentised bootstrap and the percentile bootstrap.
* *Same quality, as they are*: each pair of engines with noise of one size, nothing exchanged. A pair differs by a
  little in all sequences, which is what the resolutions are for; with none, many sequences tell.
* *1 % worse*: noise grown, or logits sharpened, until the perplexity is 1 % above the baseline's.
* *Intervals*: how often does the 95 % interval of the perplexity hold the perplexity of all windows?
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import timing
from bench.noisy import Miniature
from shuntyard.validate.report import SequenceMetrics
from shuntyard.validate.statistics import RECOMMENDED, RESOLUTIONS, Resolution, fewest_sequences, gate, interval

Floats = NDArray[np.float64]
Numbers = dict[str, Floats]  # metric -> [windows]

COUNTS = (8, 16, 32, 64)
RATES = (0.05, 0.01)
SIZES = {"fp16": 2.0**-12, "bf16": 2.0**-9, "coarse": 2.0**-6}
"""Relative noise, as formats round. Coarse: a KL of 0.01 nats, as a bf16 engine has that also computes in bf16."""
SEEDS = {"fp16": 3, "bf16": 5, "coarse": 5}
"""Engines of each size."""
FIRST_SEED = 100  # resolutions were set by engines with smaller ones
WORSE = 1.01
NOTHING = {name: Resolution(0.0, 0.0, "none") for name in RESOLUTIONS}
SEEN = 0.95
"""The claim: of engines 1 % worse, more than this share fires, from :data:`ENOUGH` sequences on."""
ENOUGH = {"bf16": 16, "coarse": RECOMMENDED}
_BOOTSTRAPS = 999
_SURE = 3.29  # standard errors: a claim is given up at 99.9 %


def numbers(found: list[SequenceMetrics]) -> Numbers:
    """Each metric's values, by sequence."""
    return {name: np.array([getattr(one, name) for one in found]) for name in RESOLUTIONS}


def wilson(hits: int, trials: int, z: float = 1.96) -> tuple[float, float]:
    """Confidence interval of a share (Wilson 1927)."""
    share, k = hits / trials, z * z / trials
    half = z * math.sqrt(share * (1 - share) / trials + k / (4 * trials))
    return (share + k / 2 - half) / (1 + k), (share + k / 2 + half) / (1 + k)


def share_of(hits: int, trials: int) -> dict[str, float]:
    """For the JSON."""
    low, high = wilson(hits, trials)
    return {"share": round(hits / trials, 4), "low": round(low, 4), "high": round(high, 4), "trials": trials}


def p_of(now: Numbers, baseline: Numbers, rows: NDArray[np.int64], resolutions: Mapping[str, Resolution]) -> Numbers:
    """The gate's smallest p-value, and each metric's."""
    ours, theirs = ({name: values[rows] for name, values in side.items()} for side in (now, baseline))
    gates = gate(ours, theirs, np.ones(len(rows)), RATES[0], resolutions)
    for found in gates:
        if found.ok != (found.worse <= found.resolution + found.noise * (1 + 1e-9) + 1e-12):
            raise AssertionError(f"{found}: what it shows and what it says differ")
    return {"any": np.array(min(g.p_value for g in gates)), **{g.metric: np.array(g.p_value) for g in gates}}


def bootstraps(
    now: Numbers, baseline: Numbers, rows: NDArray[np.int64], rng: np.random.Generator
) -> tuple[float, float]:
    """The smallest p-values of the studentised and the percentile bootstrap of the largest mean over its error."""
    n = len(rows)
    x = np.stack([(now[name] - baseline[name])[rows] for name in RESOLUTIONS], axis=1)  # [n, M]
    drawn = rng.multinomial(n, np.full(n, 1 / n), size=_BOOTSTRAPS).astype(np.float64)
    mean, error = x.mean(0), x.std(0, ddof=1) / math.sqrt(n)
    means = drawn @ x / n  # [draws, M]
    errors = np.sqrt(np.maximum(drawn @ (x - mean) ** 2 / n - (means - mean) ** 2, 0) / (n - 1))
    with np.errstate(divide="ignore", invalid="ignore"):
        seen = np.nan_to_num(mean / error, nan=0.0).max()
        studentised = np.nan_to_num((means - mean) / errors, nan=0.0).max(1)
        percentile = np.nan_to_num((means - mean) / error, nan=0.0).max(1)
    return tuple(float((1 + (t >= seen).sum()) / (1 + _BOOTSTRAPS)) for t in (studentised, percentile))  # type: ignore[return-value]


def exchanged(a: Numbers, b: Numbers, rng: np.random.Generator) -> tuple[Numbers, Numbers]:
    """Two engines of which a coin chooses the baseline, sequence by sequence."""
    coin = rng.random(len(a["nll"])) < 0.5
    return {k: np.where(coin, a[k], b[k]) for k in a}, {k: np.where(coin, b[k], a[k]) for k in a}


def same_quality_exchanged(a: Numbers, b: Numbers, repeats: int, rng: np.random.Generator) -> dict[str, Any]:
    """Shares of firings by test, rate and number of sequences."""
    out: dict[str, Any] = {}
    for n in COUNTS:
        p: dict[str, list[float]] = {name: [] for name in ("signs", "studentised", "percentile", "shipped")}
        for _ in range(repeats):
            now, baseline = exchanged(a, b, rng)
            rows = rng.permutation(len(a["nll"]))[:n]
            p["signs"].append(float(p_of(now, baseline, rows, NOTHING)["any"]))
            p["shipped"].append(float(p_of(now, baseline, rows, RESOLUTIONS)["any"]))
            for name, value in zip(("studentised", "percentile"), bootstraps(now, baseline, rows, rng), strict=True):
                p[name].append(value)
        for name, values in p.items():
            for rate in RATES:
                if name not in ("signs", "shipped") or n >= fewest_sequences(len(RESOLUTIONS), rate):
                    hits = int(np.sum(np.array(values) <= rate))
                    out.setdefault(name, {}).setdefault(f"{rate:g}", {})[str(n)] = share_of(hits, repeats)
    return out


def shares(
    pairs: list[tuple[Numbers, Numbers]],
    repeats: int,
    rng: np.random.Generator,
    resolutions: Mapping[str, Resolution],
    rate: float,
) -> dict[str, Any]:
    """Shares of firings of (now, baseline) pairs, all together, each metric's, and the worst pair's."""
    out: dict[str, Any] = {}
    each = -(-repeats // len(pairs))
    for n in COUNTS:
        fired = [
            [
                {
                    k: float(v) <= rate
                    for k, v in p_of(*pair, rng.permutation(len(pair[0]["nll"]))[:n], resolutions).items()
                }
                for _ in range(each)
            ]
            for pair in pairs
        ]
        flat = [one for own in fired for one in own]
        found: dict[str, Any] = share_of(sum(one["any"] for one in flat), len(flat))
        found["by_metric"] = {k: round(float(np.mean([one[k] for one in flat])), 4) for k in RESOLUTIONS}
        found["worst_pair"] = round(max(float(np.mean([one["any"] for one in own])) for own in fired), 4)
        out[str(n)] = found
    return out


def grown(loss: Callable[[float], float], target: float, low: float, high: float) -> float:
    """The size at which a loss that grows with it reaches ``target``, within 2e-4 nats, by bisection in the log."""
    for _ in range(30):
        middle = math.sqrt(low * high)
        gap = loss(middle) - target
        if abs(gap) < 2e-4:
            return middle
        low, high = (middle, high) if gap < 0 else (low, middle)
    raise SystemExit(f"no size between {low} and {high} gives a loss of {target}")


def worse_engines(m: Miniature, baseline: Numbers) -> dict[str, tuple[float, Numbers]]:
    """Engines whose perplexity is 1 % above the baseline's: how much they are changed, and their numbers."""
    target = float(baseline["nll"].mean()) + math.log(WORSE)

    def sharpened(size: float) -> dict[str, torch.Tensor]:
        return m.weights | {"lm_head.weight": m.weights["lm_head.weight"] * (1 + size)}

    kinds: dict[str, Callable[[float], dict[str, torch.Tensor]]] = {
        "noise": lambda size: m.noisy(size, 10 * FIRST_SEED),
        "sharpened": sharpened,
    }
    out = {}
    for kind, weights in kinds.items():
        size = grown(lambda s, w=weights: m.loss(w(s)), target, 2.0**-7, 0.5)  # type: ignore[misc]
        out[kind] = size, numbers(m.measure(weights(size)))
    return out


def coverage(nll: Floats, repeats: int, rng: np.random.Generator) -> dict[str, Any]:
    """How often the interval holds the mean of all windows, which are drawn with replacement."""
    out, truth = {}, float(nll.mean())
    for n in COUNTS:
        found = [interval(nll[rng.integers(0, len(nll), n)], np.ones(n)) for _ in range(repeats)]
        out[str(n)] = share_of(sum(one.low <= truth <= one.high for one in found), repeats)
        out[str(n)]["width"] = round(float(np.median([one.high - one.low for one in found])), 4)
    return out


def means(found: Numbers) -> dict[str, float]:
    """Over all windows."""
    return {name: float(f"{values.mean():.4g}") for name, values in found.items()}


def show(title: str, rows: Mapping[str, Mapping[str, Any]]) -> None:
    """A table with a column for each number of sequences."""
    table = Table("", *(f"n = {n}" for n in COUNTS), title=title, title_justify="left")
    for name, row in rows.items():
        cells = (row.get(str(n)) for n in COUNTS)
        table.add_row(name, *("refused" if cell is None else f"{100 * cell['share']:.1f} %" for cell in cells))
    Console(highlight=False).print(table)


def claims(result: dict[str, Any]) -> list[str]:
    """What does not hold."""
    broken = []
    for kind, tests in result["exchanged"].items():
        for test in ("signs", "shipped"):
            for rate, row in tests[test].items():
                for n, cell in row.items():
                    low, high = wilson(round(cell["share"] * cell["trials"]), cell["trials"], _SURE)
                    if low > float(rate) or (test == "signs" and int(n) > 13 and high < float(rate)):
                        broken.append(f"{kind}, exchanged, {test}: {cell['share']} at a rate of {rate}, {n} sequences")
    for kind, row in result["as_they_are"].items():
        broken += [
            f"{kind}, as they are: {cell['share']} at a rate of {RATES[0]}, {n} sequences"
            for n, cell in row["shipped"].items()
            if cell["share"] > RATES[0]
        ]
    for kind, row in result["worse"].items():
        for n, cell in row["fired"].items():
            if int(n) >= ENOUGH[kind.partition(",")[0]] and cell["share"] <= SEEN:
                broken.append(f"{kind}, 1 % worse: fires in {cell['share']} at {n} sequences")
    return broken


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Measure the gate's rate and power on engines of known quality.")
    parser.add_argument("--windows", type=int, default=320, help="of the held-out text (default: %(default)s)")
    parser.add_argument("--length", type=int, default=128, help="tokens a window (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=600, help="draws of sequences (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="where to write the result")
    args = parser.parse_args()
    if args.windows < 256:
        parser.error("--windows must be at least 256, so that draws of 64 differ")
    begin, rng = time.perf_counter(), np.random.default_rng(0)
    torch.set_num_threads(2)
    m = Miniature(args.length, args.windows)
    engines = {
        kind: [numbers(m.measure(m.noisy(size, FIRST_SEED + seed))) for seed in range(SEEDS[kind])]
        for kind, size in SIZES.items()
    }
    print(f"{sum(SEEDS.values())} engines after {time.perf_counter() - begin:.0f} s", file=sys.stderr)
    result: dict[str, Any] = {
        **timing.machine(2),
        "windows": args.windows,
        "length": args.length,
        "noise": SIZES,
        "means": {kind: [means(one) for one in found] for kind, found in engines.items()},
        "exchanged": {},
        "as_they_are": {},
        "worse": {},
    }
    for kind, found in engines.items():
        result["exchanged"][kind] = same_quality_exchanged(found[0], found[1], args.repeats, rng)
        for test, rates in result["exchanged"][kind].items():
            show(
                f"{kind}, same quality, exchanged; {test}", {f"rate {100 * float(r):g} %": v for r, v in rates.items()}
            )
    for kind, found in engines.items():
        pairs = list(itertools.permutations(found, 2))
        row = {
            "shipped": shares(pairs, args.repeats, rng, RESOLUTIONS, RATES[0]),
            "no_resolution": shares(pairs, args.repeats, rng, NOTHING, RATES[0]),
        }
        result["as_they_are"][kind] = {"pairs": len(pairs), **row}
        show(
            f"{kind}, same quality, {len(pairs)} pairs as they are; rate 5 %",
            row,
        )
    for kind in ("bf16", "coarse"):
        for how, (size, found_worse) in worse_engines(m, engines[kind][0]).items():
            fired = shares([(found_worse, engines[kind][0])], args.repeats, rng, RESOLUTIONS, RATES[0])
            result["worse"][f"{kind}, {how}"] = {
                "size": float(f"{size:.4g}"),
                "means": means(found_worse),
                "fired": fired,
            }
            alone = {k: {n: {"share": cell["by_metric"][k]} for n, cell in fired.items()} for k in RESOLUTIONS}
            show(f"baseline {kind}, 1 % worse by {how}; rate 5 %", {"any metric": fired, **alone})
    result["coverage"] = coverage(engines["bf16"][0]["nll"], args.repeats, rng)
    show("the 95 % interval holds the mean", {"coverage": result["coverage"]})
    result["seconds"] = round(time.perf_counter() - begin)
    result["broken_claims"] = claims(result)
    timing.write_json(args.json, result)
    for line in result["broken_claims"]:
        print(f"broken: {line}", file=sys.stderr)
    sys.exit(1 if result["broken_claims"] else 0)


if __name__ == "__main__":
    main()
