"""What a checkpoint declares about its quantisation, and for which modules.

Two libraries' declarations are understood:

* compressed-tensors: ``quantization_config`` in ``config.json``, with groups of targets and a list of what is ignored
  (vllm-project/compressed-tensors ``quantization/quant_config.py``, ``utils/match.py``). FP8 by tensor or channel, and
  INT4 by group or channel as ``pack-quantized``; symmetric.
* ModelOpt: ``hf_quant_config.json``, the same embedded in ``config.json``, or both
  (NVIDIA/Model-Optimizer ``modelopt/torch/export/convert_hf_config.py``). FP8 by tensor.

Everything else is refused by name. ``exporter/weights.py`` holds the tensors to what is declared.
"""

from __future__ import annotations

import fnmatch
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from shuntyard.errors import CheckpointError, UnsupportedError
from shuntyard.exporter.config import brief, explain
from shuntyard.exporter.strict_json import read_json

LINEAR = "Linear"
"""The class that a target may name instead of modules."""

HF_QUANT_CONFIG = "hf_quant_config.json"

Form = Literal["tensor", "channel", "group"]

_Model = TypeVar("_Model", bound=BaseModel)

EDITED = "config.json was edited, or is of another checkpoint than the shards"


@dataclass(frozen=True)
class Scheme:
    """How a module's weight is stored: FP8 by ``tensor`` or ``channel``, or INT4 by ``group``.

    ``group_size`` is that of INT4; 0 is one group for each output channel.
    """

    form: Form
    group_size: int = 0

    def __str__(self) -> str:
        """For messages."""
        if self.form == "group":
            return f"as INT4 in groups of {self.group_size}" if self.group_size else "as INT4 by channel"
        return f"as FP8 with a scale for each {'output channel' if self.form == 'channel' else 'tensor'}"


Activations = Literal["none", "static", "dynamic", "other"]
"""How a group's inputs are meant to be quantised: FP8 with one number for all, FP8 by token, or in some other way."""


@dataclass(frozen=True)
class Group:
    """Modules that are quantised alike."""

    scheme: Scheme
    targets: tuple[str, ...]
    activations: Activations = "none"
    described: str = ""  # how, in words, where it is some other way


@dataclass(frozen=True)
class Quantization:
    """A checkpoint's declaration."""

    method: str
    source: Path
    groups: tuple[Group, ...]
    ignored: tuple[str, ...]
    kv_cache: bool

    @property
    def activations(self) -> tuple[Activations, ...]:
        """The ways in which inputs are quantised in some group, in the groups' order; empty: none are."""
        return tuple(dict.fromkeys(group.activations for group in self.groups if group.activations != "none"))

    def scheme_of(self, *names: str) -> Scheme | None:
        """The scheme of a Linear that goes by these names; see :meth:`group_of`."""
        group = self.group_of(*names)
        return None if group is None else group.scheme

    def group_of(self, *names: str) -> Group | None:
        """The group of a Linear that goes by these names (with and without the prefix); None: it is plain.

        A name counts before a pattern, a pattern before a class, and of two patterns the first by alphabet, as in
        compressed-tensors' ``match_targets``.
        """
        if any(self._matches(pattern, name) for pattern in self.ignored for name in names):
            return None
        targets = [(target, group) for group in self.groups for target in group.targets]
        for target, group in sorted(targets, key=lambda pair: (pair[0] == LINEAR, "re:" in pair[0], pair[0])):
            if target == LINEAR or any(self._matches(target, name) for name in names):
                return group
        return None

    def _matches(self, pattern: str, name: str) -> bool:
        if self.method == "modelopt":
            # A pattern may name a module that the matched one lies in.
            return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, f"{pattern}.*")
        if pattern.startswith("re:"):
            return re.match(pattern.removeprefix("re:"), name) is not None
        return pattern == name

    def __str__(self) -> str:
        """For ``inspect``."""
        schemes = ", ".join(dict.fromkeys(str(group.scheme).removeprefix("as ") for group in self.groups))
        caches = ", scales for KV caches" if self.kv_cache else ""
        return f"{self.method}: {schemes}; activations {' and '.join(self.activations) or 'none'}{caches}"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _Arguments(_Strict):
    """compressed-tensors' ``QuantizationArgs``: how values are stored, and some keys of how they were found."""

    num_bits: int
    type: Literal["float", "int"] = "int"
    symmetric: Literal[True] = True
    strategy: str | None = None
    group_size: int | None = None
    dynamic: bool | Literal["local"] = False
    block_structure: None = None
    actorder: Literal["group", "dynamic", "weight", "static"] | bool | None = None
    observer: str | None = None
    observer_kwargs: dict[str, Any] | None = None
    scale_dtype: str | None = None
    zp_dtype: str | None = None
    is_mx: Literal[False] = False


class _GroupConfig(_Strict):
    targets: list[str]
    weights: _Arguments | None = None
    input_activations: _Arguments | None = None
    output_activations: None = None
    format: str | None = None


class _CompressedTensors(_Strict):
    quant_method: Literal["compressed-tensors"]
    config_groups: dict[str, _GroupConfig] = Field(min_length=1)
    quantization_status: Literal["compressed"] = "compressed"
    format: Literal["float-quantized", "pack-quantized", "naive-quantized", "mixed-precision"]
    ignore: list[str] | None = None
    kv_cache_scheme: _Arguments | None = None
    moe_sparsity_config: None = None
    global_compression_ratio: float | None = None
    sparsity_config: dict[str, Any] = {}
    transform_config: dict[str, Any] = {}
    version: str | None = None


class _Producer(_Strict):
    name: str
    version: str | None = None


class _ModelOpt(_Strict):
    """ModelOpt's section, in either of its two homes."""

    quant_algo: Literal["FP8"]
    kv_cache_quant_algo: Literal["FP8"] | None = None
    exclude_modules: list[str] = []
    group_size: None = None


class _ModelOptFile(_Strict):
    producer: _Producer | None = None
    quantization: _ModelOpt


class _ModelOptEmbedded(_Strict):
    quant_method: Literal["modelopt"]
    quant_algo: Literal["FP8"]
    config_groups: dict[str, _GroupConfig] = {}
    ignore: list[str] = []
    kv_cache_scheme: _Arguments | None = None
    producer: _Producer | None = None


def read_quantization(directory: Path, section: dict[str, Any] | None) -> Quantization | None:
    """The declaration of a checkpoint whose ``config.json`` has this ``quantization_config``; None: not quantised.

    Raises:
        UnsupportedError: a method, an algorithm, a strategy or a key that is not understood; names it.
        CheckpointError: the two declarations contradict each other.
    """
    beside = directory / HF_QUANT_CONFIG
    from_file = _modelopt_file(beside) if beside.exists() else None
    path = directory / "config.json"
    if section is None:
        return from_file
    method = section.get("quant_method")
    if method == "compressed-tensors":
        if from_file is not None:
            raise CheckpointError(
                f"{beside}: declares ModelOpt's quantisation, config.json compressed-tensors'",
                hint="remove the one that is not of these shards",
            )
        return _compressed_tensors(section, path)
    if method == "modelopt":
        embedded = _modelopt_embedded(section, path)
        if from_file is not None and (
            (embedded.kv_cache, set(embedded.ignored)) != (from_file.kv_cache, set(from_file.ignored))
        ):
            raise CheckpointError(
                f"{path}: quantization_config says something else than {HF_QUANT_CONFIG} beside it",
                hint="keep the one that the weights were quantised with",
            )
        return embedded
    raise UnsupportedError(
        f"{path}: quantization_config (quant_method {brief(method)}) is not supported",
        hint="give the bf16 checkpoint, or one in compressed-tensors (FP8, INT4) or ModelOpt (FP8)",
    )


def _parse(model: type[_Model], raw: dict[str, Any], path: Path, where: str) -> _Model:
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        raise explain(error, path, where) from error


def _compressed_tensors(section: dict[str, Any], path: Path) -> Quantization:
    config = _parse(_CompressedTensors, section, path, "quantization_config")
    for key in ("sparsity_config", "transform_config"):
        value = getattr(config, key)
        if value and value.get("format") != "dense":  # older versions write at length that nothing is sparse
            raise UnsupportedError(
                f"{path}: quantization_config.{key} is {brief(value)}: sparsity and transforms are not supported",
                hint="give the checkpoint that was quantised without",
            )
    groups = []
    for name, group in config.config_groups.items():
        where = f"{path}: quantization_config.config_groups.{name}"
        if group.weights is None:
            raise UnsupportedError(f"{where}: quantises no weights", hint="only weights' quantisation is understood")
        known = [t for t in group.targets if t in (LINEAR, "lm_head") or t.startswith("re:") or "." in t]
        if len(known) < len(group.targets):
            odd = next(target for target in group.targets if target not in known)
            raise UnsupportedError(
                f"{where}: target {brief(odd)} is not understood", hint="targets are 'Linear', names, or 're:' patterns"
            )
        activations, described = _activations(group.input_activations)
        groups.append(Group(_scheme(group.weights, where), tuple(group.targets), activations, described))
    ignored = tuple(config.ignore or ())
    _check_patterns([*ignored, *(target for group in groups for target in group.targets)], path)
    return Quantization("compressed-tensors", path, tuple(groups), ignored, config.kv_cache_scheme is not None)


def _activations(arguments: _Arguments | None) -> tuple[Activations, str]:
    """How inputs are quantised, and the same in words. Nothing is refused: who exports decides if they are."""
    if arguments is None:
        return "none", ""
    strategy = arguments.strategy or ("token" if arguments.dynamic else "tensor")
    described = f"{arguments.type} of {arguments.num_bits} bits by {strategy}, " + (
        "dynamic" if arguments.dynamic else "static"
    )
    if (arguments.type, arguments.num_bits) == ("float", 8):
        if strategy == "token" and arguments.dynamic is True:
            return "dynamic", described
        if strategy == "tensor" and arguments.dynamic is False:
            return "static", described
    return "other", described


def _scheme(weights: _Arguments, where: str) -> Scheme:
    """The form that compressed-tensors' arguments mean."""
    size = weights.group_size
    inferred = "tensor" if size is None else "channel" if size == -1 else "group"
    what = (weights.type, weights.num_bits, weights.strategy or inferred)
    if weights.actorder in ("group", True, "dynamic"):
        raise UnsupportedError(
            f"{where}: weights.actorder is {brief(weights.actorder)}: permuted groups are not supported",
            hint="quantise without actorder, or with 'static' or 'weight'",
        )
    if weights.dynamic:
        raise UnsupportedError(f"{where}: weights.dynamic is true", hint="weights are quantised once")
    if what[2] in ("tensor", "channel") and size not in (None, -1):
        raise UnsupportedError(
            f"{where}: weights.group_size is {size}, but strategy is {brief(what[2])}", hint="one of the two is wrong"
        )
    if what == ("float", 8, "tensor"):
        return Scheme("tensor")
    if what == ("float", 8, "channel"):
        return Scheme("channel")
    if what == ("int", 4, "group") and size is not None and size > 0:
        return Scheme("group", size)
    if what == ("int", 4, "channel"):
        return Scheme("group")
    raise UnsupportedError(
        f"{where}: weights of type {weights.type} with {weights.num_bits} bits, strategy {brief(what[2])}, "
        "are not supported",
        hint="FP8 by tensor or channel, and INT4 by group or channel are",
    )


def _check_patterns(patterns: list[str], path: Path) -> None:
    for pattern in patterns:
        if pattern.startswith("re:"):
            try:
                re.compile(pattern.removeprefix("re:"))
            except re.error as error:
                raise CheckpointError(
                    f"{path}: quantization_config: {brief(pattern)} is no regular expression: {error}", hint=EDITED
                ) from error


def _modelopt_file(path: Path) -> Quantization:
    config = _parse(_ModelOptFile, read_json(path), path, "").quantization
    return _modelopt(path, config.exclude_modules, config.kv_cache_quant_algo is not None)


def _modelopt_embedded(section: dict[str, Any], path: Path) -> Quantization:
    config = _parse(_ModelOptEmbedded, section, path, "quantization_config")
    for name, group in config.config_groups.items():
        weights, where = group.weights, f"{path}: quantization_config.config_groups.{name}"
        if weights is None or _scheme(weights, where) != Scheme("tensor") or group.targets != [LINEAR]:
            raise UnsupportedError(f"{where}: is not ModelOpt's FP8 of all Linears", hint=EDITED)
    return _modelopt(path, config.ignore, config.kv_cache_scheme is not None)


def _modelopt(path: Path, ignored: list[str], kv_cache: bool) -> Quantization:
    group = Group(Scheme("tensor"), (LINEAR,), "static")
    return Quantization("modelopt", path, (group,), tuple(ignored), kv_cache)
