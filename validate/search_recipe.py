"""Writes what the search found as a recipe that a person can read and edit: why each rule is there, as comments."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import shuntyard
from shuntyard.exporter.config import Llama4Config
from shuntyard.exporter.modules import split_name
from shuntyard.exporter.recipe import Precision, Recipe, Resolved, parse_recipe, resolve
from shuntyard.validate.charts import three
from shuntyard.validate.search import Found, Sensitivity, check_found


@dataclass(frozen=True)
class Source:
    """What a search was measured on, for people: names without directories, and the text's SHA-256."""

    checkpoint: str
    fingerprint: str
    text: str
    text_sha256: str


def found_recipe(found: Found, source: Source, config: Llama4Config, out: Path) -> tuple[str, Resolved]:
    """The file's text, and what it resolves to: what was measured.

    Raises:
        EngineError: it resolves to something else.
    """
    text = recipe_text(found, source)
    recipe: Recipe = parse_recipe(text.encode(), out.stem, str(out))
    resolved = resolve(recipe, config)
    check_found(found, resolved.precision)
    return text, resolved


def recipe_text(found: Found, source: Source) -> str:
    """The recipe as TOML."""
    lines = [*_header(found, source), "", f'description = "{_description(found)}"', ""]
    base = dict(found.baseline.choice)
    by_precision: dict[Precision, list[str]] = defaultdict(list)
    for name, own in found.best.choice:
        if own != base[name]:
            by_precision[own].append(name)
    kinds: dict[str, list[str]] = defaultdict(list)
    for name in base:
        kinds[_kind(name)].append(name)
    alone = {(s.module, s.precision): s for s in found.sensitivities}
    for own, names in sorted(by_precision.items(), key=lambda item: (item[0].weights != "int4", item[0])):
        lines += [*_why(own, [alone.get((name, own)) for name in names]), "[[rule]]", "modules = ["]
        lines += [f'  "{pattern}",' for pattern in _patterns(names, kinds)]
        lines += ["]", *_says(own), ""]
    rest = [s for s in found.sensitivities if dict(found.best.choice)[s.module] == base[s.module]]
    if rest:
        least = min(rest, key=lambda s: s.kl / max(s.saved, 1))
        lines += [
            "# All else stays bf16. Of what is left, the least KL for each byte:",
            f"# {least.module} as {least.precision}, KL {three(least.kl)} for {least.saved:,} bytes.",
        ]
    else:
        lines.append("# All else stays bf16.")
    return "\n".join([*lines, "[[rule]]", 'modules = "*"', 'weights = "bf16"', ""])


def _description(found: Found) -> str:
    return f"found by search: the fewest bytes within {found.bound.text.replace(' ', '')}"


def _header(found: Found, source: Source) -> Iterator[str]:
    best, base = found.best, found.baseline
    change = best.outcome.perplexity / base.outcome.perplexity - 1
    yield f"# Found by shuntyard {shuntyard.__version__}: precision --within '{found.bound.text}'"
    yield "#"
    yield f"# checkpoint   {_plain(source.checkpoint)}, headers {source.fingerprint[:16]}"
    yield f"# text         {_plain(source.text)}, sha256 {source.text_sha256}"
    yield f"# measured on  {found.tokens:,} tokens in {found.windows} windows, computed in fp32"
    yield f"# baseline     bf16: perplexity {base.outcome.perplexity:.5g}, {base.bytes:,} bytes of matrices and scales"
    yield (
        f"# this recipe  KL {three(best.outcome.mean_kl)}, perplexity {best.outcome.perplexity:.5g} ({change:+.2%}), "
        f"top-1 agreement {best.outcome.mean_top1:.2%}"
    )
    yield f"#              {best.bytes:,} bytes, {best.bytes / base.bytes:.1%} of bf16's"
    if found.doubt:
        yield f"# warning      {found.doubt}"
    if found.shipped():
        yield "#"
        yield "# Shipped recipes on the same text:                  bytes         KL     top-1"
        for trial in sorted(found.shipped(), key=lambda trial: -trial.bytes):
            kl, top1 = three(trial.outcome.mean_kl), trial.outcome.mean_top1
            yield f"#   {trial.name:36} {trial.bytes:>18,} {kl:>10} {top1:>9.2%}"
    yield "#"
    yield "# KL of each module alone, the others bf16 (* is what this recipe has):"
    yield from _table(found)


def _table(found: Found) -> Iterator[str]:
    kinds = list(dict.fromkeys(_column(s.precision) for s in found.sensitivities))
    rows: dict[str, dict[str, Sensitivity]] = defaultdict(dict)
    for sensitivity in found.sensitivities:
        rows[sensitivity.module][_column(sensitivity.precision)] = sensitivity
    width = max((len(name) for name in rows), default=6)
    yield f"#   {'module':{width}}" + "".join(f" {kind:>12}" for kind in kinds)
    chosen = dict(found.best.choice)
    for name, own in rows.items():
        cells = [own.get(kind) for kind in kinds]
        texts = ["-" if s is None else three(s.kl) + ("*" if chosen[name] == s.precision else " ") for s in cells]
        yield f"#   {name:{width}}" + "".join(f" {text:>12}" for text in texts).rstrip()


def _column(precision: Precision) -> str:
    if precision.weights == "int4":
        return "int4"
    return precision.weights if precision.activations == "none" else f"{precision.weights} + act"


def _why(own: Precision, alone: Sequence[Sensitivity | None]) -> Iterator[str]:
    known = [s for s in alone if s is not None]
    yield f"# {own}: {len(alone)} module{'s' * (len(alone) != 1)}."
    if known:
        worst = max(known, key=lambda s: s.kl)
        yield (
            f"# They save {sum(s.saved for s in known):,} bytes; alone their KL adds up to "
            f"{three(sum(s.kl for s in known))}."
        )
        yield f"# The dearest of them is {worst.module}: KL {three(worst.kl)} for {worst.saved:,} bytes."


def _says(own: Precision) -> Iterator[str]:
    yield f'weights = "{own.weights}"'
    if own.granularity:
        yield f'granularity = "{own.granularity}"'
    if own.group_size:
        yield f"group_size = {own.group_size}"
    if own.activations != "none":
        yield f'activations = "{own.activations}"'


def _kind(name: str) -> str:
    """``model.layers.*.self_attn.q_proj`` of that of any layer."""
    layer, part = split_name(name)
    return name if layer is None else f"model.layers.*.{part}"


def _patterns(names: Sequence[str], kinds: dict[str, list[str]]) -> list[str]:
    """The names, those of a kind as one glob where all of the model's are among them."""
    own: dict[str, list[str]] = defaultdict(list)
    for name in names:
        own[_kind(name)].append(name)
    found: list[str] = []
    for kind, members in own.items():
        found += [kind] if len(members) == len(kinds[kind]) and len(members) > 1 else members
    return found


def _plain(text: str) -> str:
    """Fit for a comment: no control characters."""
    return "".join(c if c.isprintable() else "?" for c in text)
