"""Recipes: which precision each module is to have, as ordered rules in a short TOML file.

::

    description = "routed experts in FP8, all else bf16"

    [[rule]]
    modules = ["model.layers.*.feed_forward.experts"]   # globs over module names, or one of them
    weights = "fp8"              # fp8, int4, bf16, fp16, fp32
    activations = "fp8-dynamic"  # with fp8 weights: none, fp8-static, fp8-dynamic        [default: none]
    granularity = "channel"      # fp8: tensor, channel; int4: group                      [default: channel; group]
    group_size = 128             # with int4                                              [default: 128]

    [[rule]]
    modules = "model.layers.*.self_attn"
    kv_cache = "fp8"             # fp8, or compute: the engine's type                     [default: compute]

Of the rules that name weights, the first that matches a module counts; of those that name a KV cache, the first that
matches an attention. A rule passes over what cannot be what it says (an embedding cannot be FP8); a module that no rule
matches stays as it is stored. In a glob the first and the last layer may go by these words: ``model.layers.last.*``.
Needs no torch.
"""

from __future__ import annotations

import fnmatch
import hashlib
import tomllib
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from shuntyard.errors import UnsupportedError
from shuntyard.exporter.config import Llama4Config, brief
from shuntyard.exporter.modules import Module, attentions, modules, split_name

STORED = "stored"
"""The recipe without rules: as the checkpoint stores and declares it, activations too."""

SHIPPED = ("bf16", "fp8", "fp8-ffn", "fp8-all-linear", "int4-experts")

PLAIN = ("bf16", "fp16", "fp32")

GROUP_SIZE = 128


class Precision(NamedTuple):
    """What a module is to be: ``weights`` of a type or ``stored``, and what its inputs are rounded to."""

    weights: str = STORED
    granularity: str = ""  # tensor, channel, group; empty for plain weights
    activations: str = "none"  # none, fp8-static, fp8-dynamic
    group_size: int = 0

    def __str__(self) -> str:
        """For people: ``fp8 channel, inputs dynamic``."""
        by = f" {self.granularity}" if self.granularity else ""
        by += f" {self.group_size}" if self.group_size else ""
        inputs = self.activations.removeprefix("fp8-")
        return f"{self.weights}{by}" + ("" if inputs == "none" else f", inputs {inputs}")


class Rule(BaseModel):
    """One rule."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    modules: tuple[str, ...] = Field(min_length=1)
    weights: Literal["fp8", "int4", "bf16", "fp16", "fp32"] | None = None
    activations: Literal["none", "fp8-static", "fp8-dynamic"] | None = None
    granularity: Literal["tensor", "channel", "group"] | None = None
    group_size: int | None = Field(default=None, gt=0, strict=True)
    kv_cache: Literal["fp8", "compute"] | None = None

    @field_validator("modules", mode="before")
    @classmethod
    def _listed(cls, value: object) -> object:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _together(self) -> Rule:
        if any(not pattern.strip() for pattern in self.modules):
            raise ValueError("modules has an empty pattern")
        if self.weights is None and self.kv_cache is None:
            raise ValueError("says neither weights nor kv_cache")
        if self.weights is None and (self.activations or self.granularity or self.group_size):
            raise ValueError("activations, granularity and group_size need weights beside them")
        if self.activations not in (None, "none") and self.weights != "fp8":
            raise ValueError(f"activations {self.activations} need weights fp8, not {self.weights}")
        allowed = {"fp8": ("tensor", "channel"), "int4": ("group",)}.get(self.weights or "", ())
        if self.granularity is not None and self.granularity not in allowed:
            raise ValueError(f"granularity {self.granularity} does not go with weights {self.weights}")
        if self.group_size is not None and (self.weights != "int4" or self.group_size % 8):
            raise ValueError("group_size goes with weights int4, and is a multiple of 8")
        return self

    @property
    def precision(self) -> Precision:
        """What it asks for; only of a rule that names weights."""
        assert self.weights is not None
        if self.weights == "int4":
            return Precision("int4", "group", "none", self.group_size or GROUP_SIZE)
        if self.weights == "fp8":
            return Precision("fp8", self.granularity or "channel", self.activations or "none")
        return Precision(self.weights)

    def matching(self, names: tuple[str, ...]) -> list[str]:
        """Those of its globs that match one of a module's names."""
        return [p for p in self.modules if any(fnmatch.fnmatchcase(name, p) for name in names)]

    def fits(self, module: Module) -> bool:
        """Whether the module can be what the rule says."""
        return not module.is_fixed and (module.can_be_quantised or self.weights in PLAIN)


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    description: str = ""
    rule: tuple[Rule, ...] = Field(min_length=1)


@dataclass(frozen=True)
class Recipe:
    """A recipe that was read; ``where`` names it in messages."""

    name: str
    where: str
    description: str
    rules: tuple[Rule, ...]
    sha256: str

    @property
    def is_a_file(self) -> bool:
        """Whether somebody wrote it, who wants to know of rules that match nothing."""
        return self.where not in (STORED, *(_where(name) for name in SHIPPED))


@dataclass(frozen=True)
class Resolved:
    """What a recipe means for one model."""

    recipe: Recipe
    modules: tuple[Module, ...]
    precision: dict[str, Precision]  # by module, all of them
    kv_cache: dict[str, str]  # by attention: fp8 or compute
    rule_of: dict[str, int]  # module or attention -> number of the rule that counts, from 1
    unused: tuple[str, ...]  # globs that match nothing, or nothing that is left to them

    @property
    def needs_calibration(self) -> list[str]:
        """Modules and KV caches whose scales come from calibration."""
        static = [name for name, own in self.precision.items() if own.activations == "fp8-static"]
        return static + [name for name, kind in self.kv_cache.items() if kind == "fp8"]

    @property
    def quantises_nothing(self) -> bool:
        """Whether rules ask for FP8 or INT4, and no module of this model becomes it."""
        asked = any(rule.weights in ("fp8", "int4") for rule in self.recipe.rules)
        return asked and not any(own.granularity for own in self.precision.values())

    @property
    def is_tied(self) -> bool:
        """Whether the head multiplies with the embedding."""
        return all(module.name != "lm_head" for module in self.modules)


def read_recipe(name: str | Path) -> Recipe:
    """A shipped recipe by its name, ``stored``, or one from a file.

    Raises:
        UnsupportedError: there is none of this name, or the file is no recipe; names the rule and the key.
    """
    if str(name) == STORED:
        return Recipe(STORED, STORED, "as the checkpoint stores and declares it, activations too", (), "")
    shipped = str(name) in SHIPPED
    return parse_recipe(recipe_bytes(name), str(name) if shipped else Path(name).stem, _where(str(name)))


def recipe_bytes(name: str | Path) -> bytes:
    """The TOML of a shipped recipe, or of one in a file.

    Raises:
        UnsupportedError: there is none.
    """
    if str(name) in SHIPPED:
        return resources.files("shuntyard.exporter").joinpath("recipes", f"{name}.toml").read_bytes()
    path = Path(name)
    known = f"the path of a .toml file, or one of {', '.join((STORED, *SHIPPED))}"
    try:
        if not path.is_file():
            raise UnsupportedError(f"{name}: no such recipe", hint=known)
        return path.read_bytes()
    except OSError as error:
        raise UnsupportedError(f"{name}: cannot be read: {error.strerror}", hint=known) from error


def _where(name: str) -> str:
    """A recipe, in messages."""
    return f"recipe {name}" if name in SHIPPED else name


def parse_recipe(data: bytes, name: str, where: str) -> Recipe:
    """A recipe from a file's bytes; see :func:`read_recipe`."""
    hint = "shuntyard precision CKPT --recipe fp8 --toml prints one; docs/precision.md says what rules can say"
    try:
        raw = tomllib.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # the latter of lists within lists within lists
        raise UnsupportedError(f"{where}: cannot be read as TOML: {error}", hint=hint) from error
    try:
        file = _File.model_validate(raw)
    except ValidationError as error:
        # What is not known says more than what is missing: it is there under another name.
        first = min(error.errors(), key=lambda one: one["type"] != "extra_forbidden")
        place = first["loc"]
        said = f"rule {int(place[1]) + 1}" if len(place) > 1 and place[0] == "rule" else ""
        key = (
            ".".join(str(part) for part in place[2:] if not str(part).isdigit()) if said else ".".join(map(str, place))
        )
        subject = ": ".join(part for part in (where, said, f"key '{key}'" if key else "") if part)
        subject += "" if key else ":"
        value = first.get("input")
        shown = f", not {brief(value)}" if first["type"] in ("literal_error", "string_type", "int_parsing") else ""
        what = {
            "extra_forbidden": "is not known",
            "missing": "is missing",
        }.get(first["type"], first["msg"].removeprefix("Value error, ").removeprefix("Input "))
        raise UnsupportedError(f"{subject} {what}{shown}", hint=hint) from error
    return Recipe(name, where, file.description, file.rule, hashlib.sha256(data).hexdigest())


def resolve(recipe: Recipe, config: Llama4Config) -> Resolved:
    """What each module and each KV cache is to be.

    Raises:
        UnsupportedError: a rule matches only modules that cannot be what it says, or groups that do not divide.
    """
    own = tuple(modules(config))
    layers = config.num_hidden_layers
    precision = {module.name: Precision() for module in own}
    rule_of: dict[str, int] = {}
    used: set[tuple[int, str, str]] = set()
    for number, rule in enumerate(recipe.rules, 1):
        if rule.weights is None:
            continue
        matched = [module for module in own if rule.matching(_names(module.name, layers))]
        fitting = [module for module in matched if rule.fits(module)]
        if matched and not fitting:
            first = matched[0].name
            why = "computes in fp32 always" if matched[0].is_fixed else "is looked up, and stays plain"
            raise UnsupportedError(
                f"{recipe.where}: rule {number}: '{first}' cannot be {rule.weights}: it {why}",
                hint="leave the rule out, or name other modules",
            )
        for module in fitting:
            if module.name in rule_of:
                continue
            rule_of[module.name] = number
            precision[module.name] = rule.precision
            used |= {(number, pattern, "weights") for pattern in rule.matching(_names(module.name, layers))}
            _check_groups(recipe, number, rule.precision, module)
    caches = dict.fromkeys(attentions(config), "compute")
    for number, rule in enumerate(recipe.rules, 1):
        if rule.kv_cache is None:
            continue
        matches = False
        for name in caches:
            found = rule.matching(_names(name, layers))
            matches = matches or bool(found)
            if found and name not in rule_of:
                rule_of[name] = number
                caches[name] = rule.kv_cache
                used |= {(number, pattern, "kv_cache") for pattern in found}
        if not matches:
            raise UnsupportedError(
                f"{recipe.where}: rule {number}: kv_cache is of attentions, and its modules match none",
                hint='modules = "model.layers.*.self_attn"',
            )
    every = [*(_names(module.name, layers) for module in own), *(_names(name, layers) for name in caches)]
    unused = [
        f"rule {number}: '{pattern}'"
        + (f", for its {side}," if len(sides) > 1 else "")
        + (
            " matches nothing that an earlier rule left"
            if any(fnmatch.fnmatchcase(name, pattern) for names in every for name in names)
            else " matches no module"
        )
        for number, rule in enumerate(recipe.rules, 1)
        if (sides := [side for side in ("weights", "kv_cache") if getattr(rule, side) is not None])
        for pattern in rule.modules
        for side in sides
        if (number, pattern, side) not in used
    ]
    return Resolved(recipe, own, precision, caches, rule_of, tuple(unused))


def _names(name: str, layers: int) -> tuple[str, ...]:
    """A module's names: its own, and that with ``first`` or ``last`` in place of its layer's number."""
    layer, part = split_name(name)
    words = [word for word, number in (("first", 0), ("last", layers - 1)) if layer == number]
    return (name, *(f"model.layers.{word}.{part}" for word in words))


def _check_groups(recipe: Recipe, number: int, precision: Precision, module: Module) -> None:
    if not precision.group_size:
        return
    for _, into in module.shapes:
        if into % precision.group_size:
            fitting = [size for size in (256, 128, 64, 32, 16, 8) if all(i % size == 0 for _, i in module.shapes)]
            raise UnsupportedError(
                f"{recipe.where}: rule {number}: '{module.name}' has {into} inputs, no multiple of group_size "
                f"{precision.group_size}",
                hint=f"group_size = {fitting[0]}" if fitting else "leave it out of the rule: no group size divides it",
            )


SCALE_BYTES = {"tensor": 4, "channel": 4, "group": 2}
"""FP8 has fp32 scales, INT4 bf16 ones."""

_BITS = {"fp8": 8, "int4": 4, "bf16": 16, "fp16": 16, "fp32": 32}


def nbytes(module: Module, precision: Precision) -> tuple[int, int]:
    """Bytes of a module's weights and of their scales; of a type, not of ``stored``."""
    weights = module.values * _BITS[precision.weights] // 8
    count = {
        "": 0,
        "tensor": len(module.shapes),
        "channel": sum(out for out, _ in module.shapes),
        "group": sum(out * (into // (precision.group_size or into)) for out, into in module.shapes),
    }[precision.granularity]
    inputs = 4 * len(module.shapes) * module.copies if precision.activations == "fp8-static" else 0
    return weights, module.copies * count * SCALE_BYTES.get(precision.granularity, 0) + inputs
