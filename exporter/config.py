"""Reads ``config.json`` of a Llama 4 text model, strictly: a key that is not understood is refused by name.

Sources of the semantics: transformers ``models/llama4/configuration_llama4.py`` (defaults, derived lists) and
``modeling_rope_utils.py`` (``_compute_llama3_parameters``).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from shuntyard.errors import CheckpointError, UnsupportedError

Index = Annotated[int, Field(ge=0, lt=2**31, strict=True)]
Positive = Annotated[int, Field(gt=0, lt=2**31, strict=True)]
Number = Annotated[float, Field(gt=0, allow_inf_nan=False, strict=True)]
NotBelowOne = Annotated[float, Field(ge=1, allow_inf_nan=False, strict=True)]
Flag = Annotated[bool, BeforeValidator(lambda v: bool(v) if isinstance(v, int) else v), Field(strict=True)]

MAX_LAYERS = 4096
"""Bounds the lists that are made before any tensor is asked for."""

# Keys that say nothing about what the graph computes: they steer training, generation or the tooling.
NOT_IN_THE_GRAPH = frozenset(
    {
        "_attn_implementation_autoset",
        "_name_or_path",
        "architectures",
        "attention_dropout",
        "bos_token_id",
        "cache_implementation",
        "chunk_size_feed_forward",
        "dtype",
        "eos_token_id",
        "for_llm_compressor",
        "id2label",
        "initializer_range",
        "is_encoder_decoder",
        "label2id",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "pad_token_id",
        "problem_type",
        "return_dict",
        "router_aux_loss_coef",
        "router_jitter_noise",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)


class Rope(BaseModel):
    """Rotary position embedding: ``default``, or ``llama3`` with its four factors."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rope_type: Literal["default", "llama3"] = "default"
    rope_theta: NotBelowOne = 500000.0
    factor: NotBelowOne | None = None
    low_freq_factor: Number | None = None
    high_freq_factor: Number | None = None
    original_max_position_embeddings: Positive | None = None

    @model_validator(mode="after")
    def _llama3_is_complete(self) -> Rope:
        factors = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        given = [name for name in factors if getattr(self, name) is not None]
        if self.rope_type == "llama3" and len(given) < len(factors):
            raise ValueError(f"rope type llama3 needs {', '.join(sorted(set(factors) - set(given)))}")
        if self.rope_type == "default" and given:
            raise ValueError(f"rope type default takes no {', '.join(given)}")
        return self

    def inverse_frequencies(self, head_dim: int) -> NDArray[np.float64]:
        """Radians per position of each rotated pair, ``[D/2]``, in float64.

        llama3 keeps short wavelengths, divides the long ones by ``factor`` and blends between
        (transformers ``_compute_llama3_parameters``, which does the same in float32).
        """
        exponents = np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
        plain: NDArray[np.float64] = 1.0 / np.power(self.rope_theta, exponents)
        if self.rope_type == "default":
            return plain
        assert self.factor and self.low_freq_factor and self.high_freq_factor
        assert self.original_max_position_embeddings
        original = self.original_max_position_embeddings
        wavelength = 2 * math.pi / plain
        slowed = plain / self.factor
        if self.high_freq_factor == self.low_freq_factor:
            blended = slowed  # an empty band: nothing lies strictly between the two bounds
        else:
            smooth = (original / wavelength - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
            blended = (1 - smooth) * slowed + smooth * plain
        is_long = wavelength > original / self.low_freq_factor
        is_short = wavelength < original / self.high_freq_factor
        return np.where(is_long, slowed, np.where(is_short, plain, blended))


class Llama4Config(BaseModel):
    """What the graph depends on, under Hugging Face's names; see the legend in ``plugins/contract.py``."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    vocab_size: Positive
    hidden_size: Positive
    intermediate_size: Positive
    intermediate_size_mlp: Positive
    num_hidden_layers: Positive
    num_attention_heads: Positive
    num_key_value_heads: Positive
    head_dim: Positive
    num_local_experts: Index
    num_experts_per_tok: Index
    max_position_embeddings: Positive
    rms_norm_eps: Number
    hidden_act: Literal["silu"] = "silu"
    attention_bias: Flag = False
    use_qk_norm: Flag = True
    tie_word_embeddings: Flag = False
    attention_chunk_size: Positive | None
    attn_temperature_tuning: Flag = True
    floor_scale: Number = 8192
    attn_scale: Annotated[float, Field(ge=0, allow_inf_nan=False, strict=True)] = 0.1
    rope: Rope
    no_rope_layers: tuple[Literal[0, 1], ...]
    moe_layers: tuple[Index, ...]

    @model_validator(mode="after")
    def _fits_together(self) -> Llama4Config:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError("num_attention_heads must be a multiple of num_key_value_heads")
        if self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}: RoPE rotates pairs, it must be even")
        if self.moe_layers and min(self.num_experts_per_tok, self.num_local_experts) < 1:
            raise ValueError("moe_layers names layers, but num_local_experts or num_experts_per_tok is 0")
        if self.num_experts_per_tok > self.num_local_experts and self.moe_layers:
            raise ValueError("num_experts_per_tok is larger than num_local_experts")
        if len(self.no_rope_layers) != self.num_hidden_layers:
            raise ValueError(
                f"no_rope_layers has {len(self.no_rope_layers)} entries for {self.num_hidden_layers} layers"
            )
        if len(set(self.moe_layers)) < len(self.moe_layers):
            raise ValueError("moe_layers names a layer twice")
        if not all(0 <= i < self.num_hidden_layers for i in self.moe_layers):
            raise ValueError(f"moe_layers names a layer outside 0..{self.num_hidden_layers - 1}")
        return self

    def uses_rope(self, layer: int) -> bool:
        """Whether a layer is a RoPE layer (chunked, positions rotated) or a NoPE layer (global)."""
        return self.no_rope_layers[layer] == 1

    def is_moe(self, layer: int) -> bool:
        """Whether a layer's feed-forward is routed (with a shared expert) or dense."""
        return layer in self.moe_layers

    def doubts(self) -> list[str]:
        """What a user should know of a configuration that is valid, but may not be that of the weights."""
        rope = self.rope
        is_scout = (self.hidden_size, self.num_hidden_layers, self.num_local_experts) == (5120, 48, 16)
        if is_scout and (rope.rope_type, rope.factor, rope.high_freq_factor) == ("llama3", 8, 4):
            doubt = (
                "note: rope scaling is factor 8, high_freq_factor 4, as in Scout's first config.json; Meta's own code "
                "computes Scout with 16 and 1 (docs/semantics.md). shuntyard follows config.json"
            )
            return [doubt]
        return []

    def cache_rows(self, layer: int, context: int) -> int:
        """Rows of a layer's KV cache for a context of so many tokens: a chunked layer holds one chunk."""
        chunk = self.attention_chunk_size
        return min(chunk, context) if chunk is not None and self.uses_rope(layer) else context


HINT_CONFIG = "config.json is damaged or was edited; download it again"

_TAKEN_APART = frozenset(
    {
        "interleave_moe_layer_step",
        "layer_types",
        "model_type",
        "moe_layers",
        "no_rope_layer_interval",
        "no_rope_layers",
        "rope_parameters",
        "rope_scaling",
        "rope_theta",
    }
)


def _rope_section(raw: dict[str, Any], path: Path) -> dict[str, Any]:
    """The rope keys of either spelling: ``rope_parameters``, or ``rope_theta`` with ``rope_scaling``."""
    given = [raw[key] for key in ("rope_parameters", "rope_scaling") if raw.get(key) is not None]
    if not all(isinstance(section, dict) for section in given):
        raise CheckpointError(f"{path}: rope_parameters / rope_scaling must be an object", hint=HINT_CONFIG)
    if len(given) > 1:
        raise CheckpointError(
            f"{path}: has both rope_parameters and rope_scaling", hint="keep the one that the weights were trained with"
        )
    section = dict(given[0]) if given else {}
    old_name = section.pop("type", None)
    if section.setdefault("rope_type", old_name or "default") != (old_name or section["rope_type"]):
        raise CheckpointError(
            f"{path}: rope_scaling has type {brief(old_name)} and rope_type {brief(section['rope_type'])}",
            hint="keep the one that the weights were trained with",
        )
    theta = raw.get("rope_theta")
    if theta is not None and section.setdefault("rope_theta", theta) != theta:
        raise CheckpointError(
            f"{path}: rope_theta and rope_parameters.rope_theta differ",
            hint="keep the one that the weights were trained with",
        )
    if section["rope_type"] not in ("default", "llama3"):
        raise UnsupportedError(
            f"{path}: rope type {brief(section['rope_type'])} is not supported",
            hint="Llama 4 uses 'default' or 'llama3'; check rope_parameters / rope_scaling",
        )
    return section


def _layer_lists(raw: dict[str, Any], path: Path) -> tuple[Any, Any]:
    """``no_rope_layers`` and ``moe_layers``, derived from their intervals where they are not given."""
    layers = _count(raw, "num_hidden_layers", None, path, largest=MAX_LAYERS)
    interval = _count(raw, "no_rope_layer_interval", 4, path)
    # A model without MoE has an empty list, and may have a step of 0 (as transformers converts Llama Guard 4).
    step = 1 if raw.get("moe_layers") == [] else _count(raw, "interleave_moe_layer_step", 1, path)
    for key in ("no_rope_layers", "moe_layers"):
        if not isinstance(raw.get(key), list | None):
            raise CheckpointError(f"{path}: {key} is {brief(raw[key])}, must be a list", hint=HINT_CONFIG)
    no_rope, moe = raw.get("no_rope_layers"), raw.get("moe_layers")
    # An empty no_rope_layers counts as not given, an empty moe_layers does not: as in transformers.
    no_rope = no_rope or [int((i + 1) % interval != 0) for i in range(layers)]
    return no_rope, list(range(step - 1, layers, step)) if moe is None else moe


def _count(raw: dict[str, Any], key: str, default: int | None, path: Path, largest: int = 2**31 - 1) -> int:
    """A positive integer that is needed before the model of the whole configuration checks all others."""
    value = raw.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= largest:
        raise CheckpointError(f"{path}: {key} is {brief(value)}, must be an integer in 1..{largest}", hint=HINT_CONFIG)
    return value


def parse_config(raw: dict[str, Any], path: Path, within: str = "") -> Llama4Config:
    """Checks and completes a text model's configuration, found under the key ``within`` where that is given.

    Raises:
        UnsupportedError: the model type, a key or a value is not supported; its name is in the message.
        CheckpointError: keys are missing or contradict each other.
    """
    where = f"{path}: {within}" if within else f"{path}"
    model_type = raw.get("model_type")
    if model_type != "llama4_text":
        raise UnsupportedError(
            f"{where}: model_type {brief(model_type)} is not supported",
            hint="shuntyard exports Llama 4: model_type 'llama4_text', or 'llama4' with a text_config",
        )
    known_keys = set(Llama4Config.model_fields) - {"rope"} | _TAKEN_APART | NOT_IN_THE_GRAPH
    unknown = sorted(set(raw) - known_keys)
    if unknown:
        raise UnsupportedError(
            f"{where}: config key '{unknown[0]:.80}' is not understood"
            + (f" (nor {brief(unknown[1:])})" if unknown[1:] else ""),
            hint="it could change what the model computes; remove it only if you know that it does not",
        )
    if raw.get("is_encoder_decoder"):
        raise UnsupportedError(
            f"{where}: is_encoder_decoder is true", hint="Llama 4 is a decoder; config.json is of another model"
        )
    fields = {key: value for key, value in raw.items() if key in Llama4Config.model_fields}
    fields["no_rope_layers"], fields["moe_layers"] = _layer_lists(raw, path)
    fields["rope"] = _rope_section(raw, path)
    try:
        config = Llama4Config.model_validate(fields)
    except ValidationError as error:
        raise explain(error, path, within) from error
    _check_layer_types(raw.get("layer_types"), config, path)
    return config


def brief(value: Any) -> str:
    """A value in one short line, whatever it is."""
    if isinstance(value, int) and abs(value) >= 10**20:
        return "an integer of more than 20 digits"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def explain(error: ValidationError, path: Path, within: str = "") -> CheckpointError | UnsupportedError:
    """The first thing that pydantic found, in one line; ``within`` is the key that holds what was checked."""
    first = error.errors()[0]
    where = ".".join([within] * bool(within) + [str(part) for part in first["loc"]]) or "configuration"
    given = "" if first["type"] in ("missing", "value_error") else f", got {brief(first['input'])}"
    message = f"{path}: {where}: {first['msg'].removeprefix('Value error, ')}{given}"
    if first["type"] in ("literal_error", "extra_forbidden", "none_required"):
        return UnsupportedError(message, hint="shuntyard computes no other; changing config.json changes the model")
    return CheckpointError(message, hint=HINT_CONFIG)


def _check_layer_types(layer_types: Any, config: Llama4Config, path: Path) -> None:
    """``layer_types`` repeats what ``no_rope_layers`` and ``attention_chunk_size`` say: refuse a contradiction."""
    if layer_types is None:
        return
    if not isinstance(layer_types, list) or len(layer_types) != config.num_hidden_layers:
        raise CheckpointError(
            f"{path}: layer_types must be a list of {config.num_hidden_layers} entries, got {brief(layer_types)}",
            hint=HINT_CONFIG,
        )
    for i in range(config.num_hidden_layers):
        chunked = config.uses_rope(i) and config.attention_chunk_size is not None
        expected = "chunked_attention" if chunked else "full_attention"
        if layer_types[i] != expected:
            raise UnsupportedError(
                f"{path}: layer_types[{i}] is {brief(layer_types[i])}, but no_rope_layers and attention_chunk_size "
                f"make layer {i} '{expected}'",
                hint="a RoPE layer attends within its chunk, a NoPE layer to everything; other mixes are not supported",
            )
