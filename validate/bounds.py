"""The bounds of one validation: the table's, by number format, with what a TOML file says of single modules.

A file holds any number of::

    [[tolerance]]
    module = "model.layers.*.feed_forward.experts"   # a module, or several with *; "logits" is the whole engine
    metric = "relative"                              # one of METRICS
    bound = 2e-2
    reason = "INT4 experts of another calibration"   # for whoever reads the report
    format = "fp16"                                  # optional: engines of this number format alone
"""

from __future__ import annotations

import math
import tomllib
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from shuntyard.errors import EngineError
from shuntyard.validate.report import Module
from shuntyard.validate.tolerances import CODES, MARGIN, MODULES, NOT_JUDGED, ORDER, ROUNDINGS, TOLERANCES, Tolerance

WHOLE = "logits"
MODULE_METRICS = ("relative", "coordinate", "margin")
WHOLE_METRICS = ("max_abs", "mean_kl", "top1", "perplexity", "tie", "kv")
METRICS = (*MODULE_METRICS, *WHOLE_METRICS)


class Override(BaseModel):
    """One entry of the file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    module: Annotated[str, Field(min_length=1)]
    metric: Literal["relative", "coordinate", "margin", "max_abs", "mean_kl", "top1", "perplexity", "tie", "kv"]
    bound: Annotated[float, Field(ge=0, allow_inf_nan=False, strict=True)]
    reason: Annotated[str, Field(min_length=1)]
    format: Literal["fp32", "fp16", "bf16"] | None = None


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid")

    tolerance: list[Override] = []


def read_overrides(path: Path) -> list[Override]:
    """Reads a TOML file of overrides.

    Raises:
        EngineError: it cannot be read, or an entry is not understood; names the key.
    """
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
        overrides = _File.model_validate(raw).tolerance
    except FileNotFoundError as error:
        raise EngineError(f"{path}: no such file", hint="give a TOML file of [[tolerance]] entries") from error
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise EngineError(f"{path}: cannot be read as TOML: {error}", hint="see toml.io for the syntax") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise EngineError(
            f"{path}: {where}: {first['msg']}", hint="an entry has module, metric, bound, reason and perhaps format"
        ) from error
    for override in overrides:
        if (override.metric in WHOLE_METRICS) != (override.module == WHOLE):
            raise EngineError(
                f"{path}: metric '{override.metric}' does not go with module '{override.module}'",
                hint=f"'{WHOLE}' has {', '.join(WHOLE_METRICS)}; modules have {', '.join(MODULE_METRICS)}",
            )
    return overrides


class Bounds:
    """What counts for a comparison of models in these number formats; remembers which overrides were used.

    ``fp8``: whether inputs of products are rounded to FP8 numbers. ``alike``: whether the two are to be the same; a
    quantised engine and what it was quantised from are not, and only overrides count.
    """

    def __init__(
        self,
        formats: tuple[str, ...],
        overrides: list[Override] | None = None,
        *,
        fp8: bool = False,
        alike: bool = True,
    ) -> None:
        self.format, self.fp8, self.alike = max(formats, key=ORDER.index), fp8, alike
        self._overrides = [o for o in overrides or [] if o.format in (None, self.format)]
        self._used: set[int] = set()
        self.itself: Tolerance = CODES[self.format].whole if fp8 else TOLERANCES[self.format]
        """Of an engine against the same one, marked."""
        self.whole = self.itself if alike else NOT_JUDGED
        for i, override in enumerate(self._overrides):
            if override.module == WHOLE:
                self.whole = replace(self.whole, **{str(override.metric): override.bound})  # type: ignore[arg-type]
                self._used.add(i)

    def module(self, module: str, part: str, mode: str) -> tuple[float | None, float | None]:
        """Bounds on ``relative`` and ``coordinate``; mode "free" is wider, or not judged."""
        rounding, own = ROUNDINGS[self.format], MODULES[part]
        # A number that is turned early on turns others behind it, and in the engine others than in the reference.
        factor = 1.0 if mode != "free" else None if self.fp8 else rounding.free
        found: list[float | None] = [None, None]
        if factor is not None and self.alike:
            found = [own.relative * rounding.unit * factor, own.coordinate * rounding.unit * factor]
        for i, override in enumerate(self._overrides):
            if override.module != WHOLE and fnmatchcase(module, override.module) and override.metric != "margin":
                self._used.add(i)
                if mode != "free":
                    found[MODULE_METRICS.index(override.metric)] = override.bound
                elif factor is not None:
                    found[MODULE_METRICS.index(override.metric)] = override.bound * factor
        return found[0], found[1]

    def slack(self, module: str) -> tuple[float, float]:
        """How many times a token's slack its bounds on ``relative`` and ``coordinate`` are wider; an override's not."""
        own = [CODES[self.format].slack if self.fp8 else 0.0] * 2
        for override in self._overrides:
            if override.module != WHOLE and fnmatchcase(module, override.module) and override.metric != "margin":
                own[MODULE_METRICS.index(override.metric)] = 0.0
        return own[0], own[1]

    def margin(self, module: str) -> float:
        """Bound on a flip's margin, by the root mean square of the token's router logits."""
        bound = MARGIN * ROUNDINGS[self.format].unit if self.alike else math.inf
        for i, override in enumerate(self._overrides):
            if override.metric == "margin" and fnmatchcase(module, override.module):
                self._used.add(i)
                bound = override.bound
        return bound

    def unused(self) -> list[str]:
        """Modules of overrides that met no module."""
        return [o.module for i, o in enumerate(self._overrides) if i not in self._used]

    @property
    def judges(self) -> bool:
        """Whether anything is held to a bound: by the table, or by an override that met something."""
        return self.alike or bool(self._used)

    def notes(self) -> list[str]:
        """One line for each override that counted."""
        return [
            f"bound of {o.module}, {o.metric}: {o.bound:g} ({o.reason})"
            for i, o in enumerate(self._overrides)
            if i in self._used
        ]


def excess(module: Module) -> float:
    """How many times its bound the worse of a module's errors is; 0 where neither is judged."""
    return max(over(module.relative, module.relative_bound), over(module.coordinate, module.coordinate_bound))


def over(value: float, bound: float | None) -> float:
    """How many times its bound a value is; 0 where it is not judged, infinite where it is no number."""
    if bound is None:
        return 0.0
    return value / bound if math.isfinite(value) and bound else (math.inf if value else 0.0)
