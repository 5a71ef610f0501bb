"""What a validation found: the data that terminal, JSON, HTML, JUnit and annotations are views of."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

SCHEMA = 2
"""Of :meth:`Report.as_dict`. Raised when a field changes its meaning or goes."""


@dataclass(frozen=True)
class Check:
    """One comparison. ``ok`` is None where the value is reported and not judged.

    ``name`` is ``"<part>: <metric>"``, as ``"prefill: mean KL"`` or ``"forced: model.layers.3.self_attn: relative"``.
    """

    name: str
    value: float | str
    bound: str
    ok: bool | None
    detail: str = ""  # where it is worst, or more about it
    module: str = ""  # as the checkpoint calls it, where a single module is meant


@dataclass(frozen=True)
class Module:
    """One module's errors in one mode, each the worst over all tokens; a bound of None is not judged.

    ``relative``: ``|x - y| / |y|`` of a token's vector. ``coordinate``: the largest difference of one number, by the
    root mean square of its token's vector.
    """

    module: str  # "model.layers.3.self_attn"
    layer: int  # -1 embedding, num_hidden_layers the head
    part: str  # one of values.PARTS, "embed_tokens" or "lm_head"
    mode: str  # "forced" or "free"
    relative: float
    relative_bound: float | None
    coordinate: float
    coordinate_bound: float | None
    where: str  # "sequence 'chunk 1', token 17, channel 3"
    tokens: int  # compared; tokens whose experts tied are left out
    ok: bool | None
    sequence: int = 0  # where it is worst: its place among the sequences
    token: int = 0  # and the token in it


@dataclass(frozen=True)
class Flip:
    """A token that another set of experts was chosen for (teacher-forced)."""

    layer: int
    sequence: str
    token: int  # place in the sequence
    before: str  # text, or token ids where there is no tokenizer
    text: str
    after: str
    reference: list[int]  # experts, ascending
    engine: list[int]
    margin: float  # gap of the reference's logits between the experts that changed places
    bound: float
    ok: bool


@dataclass(frozen=True)
class Routing:
    """One MoE layer's routing, teacher-forced: tokens by expert, agreement, and how far scores are apart."""

    layer: int
    tokens: int
    agreement: float  # share of tokens with the same set of experts
    score_error: float  # largest difference of a chosen expert's sigmoid score
    flips: int
    worst_margin: float  # of a flip; 0 without
    margin_bound: float
    load_reference: list[int]  # tokens of each expert
    load_engine: list[int]
    unjudged: list[int] = field(default_factory=list)  # experts that the engine uses for tied tokens alone


@dataclass(frozen=True)
class Interval:
    """A value and its 95 % confidence interval, from resampling sequences."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class SequenceMetrics:
    """One sequence's numbers, which baselines keep: means over its tokens, in nats or shares; lower is better."""

    label: str
    sha256: str  # of the tokens as little-endian int64
    tokens: int
    nll: float  # engine's negative log-likelihood of the next token
    nll_reference: float
    kl: float  # KL(reference || engine)
    top1_miss: float  # share of tokens with another most likely next token
    top5_miss: float  # 1 - mean overlap of the five most likely next tokens
    routing_miss: float | None  # share of token-layer pairs with other experts, teacher-forced; None: not measured
    forced_error: (
        float | None
    )  # root mean square over modules of the relative error, teacher-forced; None: not measured


@dataclass(frozen=True)
class Gate:
    """One metric against its baseline. ``worse`` is the mean over sequences of (now - baseline)."""

    metric: str  # field of SequenceMetrics
    now: float
    baseline: float
    worse: float
    noise: float  # what the resampling explains, at the gate's rate
    p_value: float  # adjusted for all metrics together
    ok: bool
    resolution: float = 0.0  # smallest difference that matters: it fires where worse > resolution + noise


@dataclass(frozen=True)
class Regression:
    """The whole gate."""

    path: str
    entry: str  # which engine of the baseline file
    rate: float  # at which it fires on engines of the same quality, all metrics together
    sequences: int
    gates: list[Gate]
    notes: list[str] = field(default_factory=list)  # what was not compared, and why


@dataclass
class Report:
    """The whole result. Everything beyond the checks is optional: a short run leaves it empty."""

    engine: str
    reference: str
    backend: str
    dtype: str
    tokens: int
    checks: list[Check] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    culprit: str = ""  # first diverging module, by bisection
    culprit_mode: str = ""  # "forced": wrong by itself; "free": wrong only in company (wiring or cache)
    modules: list[Module] = field(default_factory=list)
    routing: list[Routing] = field(default_factory=list)
    flips: list[Flip] = field(default_factory=list)
    sequences: list[SequenceMetrics] = field(default_factory=list)
    perplexity: Interval | None = None  # of the engine
    perplexity_reference: Interval | None = None
    histogram: dict[str, list[float]] = field(default_factory=dict)  # "edges": log10 |logit error|, "counts"
    precision: list[dict[str, str]] = field(default_factory=list)  # by layer: part -> number format
    facts: dict[str, str] = field(default_factory=dict)  # of the engine, for people
    regression: Regression | None = None
    layers: int = 0
    unjudged: str = ""  # why what the engine computes was not judged, where nothing but a baseline could do so

    @property
    def verdict(self) -> Literal["passed", "failed", "not judged"]:
        """In words: an engine that nothing held to anything has neither passed nor failed.

        A report without a judged check that does not say why has failed: what was not looked at has not passed.
        """
        verdicts = [check.ok for check in self.checks if check.ok is not None]
        if not all(verdicts):
            return "failed"
        if self.unjudged and not (self.regression is not None and self.regression.gates):
            return "not judged"
        return "passed" if verdicts else "failed"

    @property
    def passed(self) -> bool:
        """Whether every judged check holds, and what the engine computes was judged by one."""
        return self.verdict == "passed"

    @property
    def failures(self) -> list[Check]:
        """The checks that do not hold, first the culprit's."""
        failed = [check for check in self.checks if check.ok is False]
        return sorted(failed, key=lambda check: not self.culprit or check.module != self.culprit)

    def at_most(self, name: str, value: float, bound: float | None, detail: str = "", module: str = "") -> None:
        """Adds a check ``value <= bound``; NaN fails."""
        ok = None if bound is None else bool(value <= bound)
        self.checks.append(Check(name, value, "-" if bound is None else f"<= {bound:g}", ok, detail, module))

    def at_least(self, name: str, value: float, bound: float | None, detail: str = "", module: str = "") -> None:
        """Adds a check ``value >= bound``; NaN fails."""
        ok = None if bound is None else bool(value >= bound)
        self.checks.append(Check(name, value, "-" if bound is None else f">= {bound:g}", ok, detail, module))

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return {"schema": SCHEMA, "passed": self.passed, "verdict": self.verdict, **_strict(asdict(self))}


def _strict(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become the strings "nan", "inf" and "-inf"."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _strict(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(part) for part in value]
    return value
