"""Gives every parameter of the model its tensors: how it is stored, in which form, and in which layout.

A matrix is stored plain, or quantised with its scale beside it (see ``plugins/contract.py`` for the arithmetic):

=========== =============================== ================================ ================================
form        weight                          scale                            names
=========== =============================== ================================ ================================
``none``    BF16, F16, F32                  none                             ``M.weight``
``tensor``  F8_E4M3                         one value                        ``.weight``, ``.weight_scale``
``channel`` F8_E4M3                         one for each output channel      ``.weight``, ``.weight_scale``
``group``   I32, eight INT4 values each     one for each group of a channel  ``.weight_packed``, ``.weight_scale``
=========== =============================== ================================ ================================

Experts are fused in one tensor (``experts.gate_up_proj``, its scale ``experts.gate_up_proj_weight_scale``) or linear,
three modules each (``experts.3.gate_proj``). What is found is held to what the checkpoint declares.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from shuntyard.errors import CheckpointError, UnsupportedError
from shuntyard.exporter.checkpoint import TEXT_PREFIX, Checkpoint, is_derived
from shuntyard.exporter.parameters import all_weights
from shuntyard.exporter.quantization import Scheme
from shuntyard.exporter.safetensors_header import TensorEntry, read_values
from shuntyard.plugins.contract import ExpertsForm

WEIGHT_DTYPES = ("BF16", "F16", "F32")

SAME_CHECKPOINT = "config.json and the shards must be of the same checkpoint"
DAMAGED = "the checkpoint was quantised by a tool that shuntyard does not know, or is damaged"

ACTIVATION_SCALES = {
    ".gate_up_proj_input_scale": ".gate_up_proj",
    ".down_proj_input_scale": ".down_proj",
    ".input_scale": ".weight",
    ".self_attn.k_scale": ".self_attn.k_proj.weight",
    ".self_attn.v_scale": ".self_attn.v_proj.weight",
    ".k_proj.k_scale": ".k_proj.weight",
    ".v_proj.v_scale": ".v_proj.weight",
}
"""Scales for activations and KV caches, and the weight that each belongs to. Nothing of these is quantised here, so
they are waived."""

EXPERT_PARTS = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Stored:
    """How one matrix lies in the files: ``value = entry * scale`` where there is a scale.

    ``activations`` says whether, and how, what is multiplied with it is rounded to FP8; ``input_scale`` is the scale of
    those that are ``static`` (``exporter/activations.py``).
    """

    entry: TensorEntry
    scale: TensorEntry | None = None
    group_size: int = 0
    activations: Literal["none", "static", "dynamic"] = "none"
    input_scale: TensorEntry | None = None

    @property
    def form(self) -> Literal["none", "tensor", "channel", "group"]:
        """``none``, ``tensor``, ``channel`` or ``group``."""
        if self.scale is None:
            return "none"
        if self.group_size:
            return "group"
        return "tensor" if math.prod(self.scale.shape) == 1 else "channel"

    @property
    def scheme(self) -> Scheme | None:
        """The same as a declaration says it; None: plain."""
        form = self.form
        return None if form == "none" else Scheme(form, self.group_size)

    @property
    def elements(self) -> int:
        """How many values it holds."""
        return math.prod(self.entry.shape) * (8 if self.group_size else 1)

    def entries(self) -> Iterator[TensorEntry]:
        """The tensors that it consists of."""
        yield self.entry
        if self.scale is not None:
            yield self.scale
        if self.input_scale is not None:
            yield self.input_scale


@dataclass(frozen=True)
class Experts:
    """The routed experts of one layer, in the order of ``form.weight_names``."""

    form: ExpertsForm
    parts: tuple[Stored, ...]


@dataclass
class Weights:
    """Everything that the model takes from the files: parameters by name, experts by layer, and what is left out."""

    linears: dict[str, Stored] = field(default_factory=dict)
    experts: dict[int, Experts] = field(default_factory=dict)
    waived: list[str] = field(default_factory=list)
    tensors: int = 0  # of the files' tensors that are used
    kv_scales: dict[int, tuple[TensorEntry, TensorEntry]] = field(default_factory=dict)
    """Layers whose keys and values are cached as FP8 numbers, and the scales of both."""

    def stored(self) -> Iterator[tuple[str, Stored]]:
        """Every matrix and vector, with the name of its parameter or expert."""
        yield from self.linears.items()
        for layer, experts in self.experts.items():
            for name, part in zip(experts.form.weight_names, experts.parts, strict=True):
                yield f"model.layers.{layer}.feed_forward.experts.{name}", part

    @property
    def parameters(self) -> int:
        """How many values the model has."""
        return sum(stored.elements for _, stored in self.stored())


def match_weights(checkpoint: Checkpoint, *, alike: bool = True) -> Weights:
    """Finds every parameter's tensors, and uses or waives every tensor.

    The experts of a layer must be stored ``alike``, unless they are going to be written anew in one type.

    Raises:
        CheckpointError: a parameter has no tensor or one of another shape, or the tensors contradict the configuration.
        UnsupportedError: a tensor that the model does not know, or of a type or form that it cannot take.
    """
    return _Matcher(checkpoint, alike).match()


class _Matcher:
    def __init__(self, checkpoint: Checkpoint, alike: bool) -> None:
        self.alike = alike
        self.checkpoint, self.tensors = checkpoint, checkpoint.tensors
        self.used: set[str] = set()
        self.missing: list[str] = []

    def match(self) -> Weights:
        config, weights = self.checkpoint.config, Weights()
        for name, shape in all_weights(config).items():
            if name.endswith(".experts.gate_up_proj"):
                layer = int(name.split(".")[2])
                experts = self._experts(layer, name.removesuffix(".gate_up_proj"))
                if experts is not None:
                    weights.experts[layer] = experts
            elif not name.endswith(".experts.down_proj"):
                stored = self._parameter(name, shape)
                if stored is not None:
                    weights.linears[name] = stored
        left = [name for name in self.tensors if name not in self.used]
        weights.waived = [name for name in left if is_derived(name) or self._is_activation_scale(name)]
        unknown = [name for name in left if name not in set(weights.waived)]
        self._refuse_missing(unknown)
        self._refuse_unknown(unknown)
        weights.tensors = len(self.used)
        return weights

    def _refuse_missing(self, unknown: list[str]) -> None:
        if not self.missing:
            return
        more = f" (and {len(self.missing) - 1} more)" if len(self.missing) > 1 else ""
        also = f"; it has '{unknown[0]}' instead, which is not understood" if unknown else ""
        raise CheckpointError(
            f"{self.checkpoint.path}: tensor '{self.missing[0]}' is missing{more}{also}", hint=SAME_CHECKPOINT
        )

    def _refuse_unknown(self, unknown: list[str]) -> None:
        if not unknown:
            return
        more = f" (nor {len(unknown) - 1} more)" if len(unknown) > 1 else ""
        hint = "leaving it out could change what the model computes; export refuses to guess"
        if unknown[0] == "lm_head.weight":
            hint = "config.json has tie_word_embeddings, which leaves no place for it; which of the two is right?"
        for suffix, reason in _KNOWN_BUT_NOT_SUPPORTED.items():
            if unknown[0].endswith(suffix):
                hint = reason
        entry = self.tensors[unknown[0]]
        raise UnsupportedError(f"{entry.file}: tensor '{entry.name}' is not understood{more}", hint=hint)

    def _is_activation_scale(self, name: str) -> bool:
        """Whether a tensor is a scale for a quantised weight's inputs, or for a KV cache."""
        end = next((end for end in ACTIVATION_SCALES if name.endswith(end)), None)
        if end is None:
            return False
        weight, for_inputs = name.removesuffix(end) + ACTIVATION_SCALES[end], name.endswith("input_scale")
        owner = self.tensors.get(weight if weight in self.used else f"{weight}_packed")
        if owner is None or (for_inputs and owner.dtype in WEIGHT_DTYPES):
            return False
        entry, quantization = self.tensors[name], self.checkpoint.quantization
        declared = quantization is not None and (
            "static" in quantization.activations if for_inputs else quantization.kv_cache
        )
        if not declared:
            source = self.checkpoint.path / "config.json" if quantization is None else quantization.source
            raise CheckpointError(
                f"{entry.file}: tensor '{entry.name}' is a scale for {'activations' if for_inputs else 'a KV cache'}, "
                f"but {source.name} declares none",
                hint=DAMAGED,
            )
        heads = self.checkpoint.config.num_key_value_heads
        sizes = {1} if for_inputs else {1, heads}
        if entry.dtype not in WEIGHT_DTYPES or math.prod(entry.shape) not in sizes:
            raise UnsupportedError(
                f"{entry.file}: tensor '{entry.name}' is {entry.dtype} {list(entry.shape)}; a scale is one number"
                + (f", or one for each of {heads} key/value heads" if len(sizes) > 1 else ""),
                hint=DAMAGED,
            )
        return True

    def _take(self, name: str, shape: tuple[int, ...] | None = None) -> TensorEntry | None:
        """A tensor by its name; None where there is none."""
        entry = self.tensors.get(name)
        if entry is None:
            return None
        self.used.add(name)
        if shape is not None and entry.shape != shape:
            raise CheckpointError(
                f"{entry.file}: tensor '{entry.name}' has shape {list(entry.shape)}, config.json asks for "
                f"{list(shape)}",
                hint=SAME_CHECKPOINT,
            )
        return entry

    def _parameter(self, name: str, shape: tuple[int, ...]) -> Stored | None:
        """A parameter outside the experts. Vectors and embeddings are plain, other matrices may be quantised."""
        if len(shape) == 2 and name.endswith(".weight") and name != "model.embed_tokens.weight":
            return self._linear(name.removesuffix(".weight"), (shape[0], shape[1]))
        entry = self._take(name, shape)
        if entry is None:
            self.missing.append(name)
            return None
        return Stored(self._plain(entry, "is no Linear and no expert: it must be plain"))

    def _plain(self, entry: TensorEntry, why: str = "has no scale beside it") -> TensorEntry:
        if entry.dtype in WEIGHT_DTYPES:
            return entry
        if entry.dtype == "F8_E4M3":
            others = (tensor.name for tensor in self.tensors.values() if tensor.name.startswith(entry.name))
            by_block = any(name.endswith("_scale_inv") for name in others)
            raise CheckpointError(
                f"{entry.file}: tensor '{entry.name}' is F8_E4M3, but {why}",
                hint=_KNOWN_BUT_NOT_SUPPORTED["_scale_inv"] if by_block else DAMAGED,
            )
        raise UnsupportedError(
            f"{entry.file}: tensor '{entry.name}' is {entry.dtype}; weights must be one of "
            f"{', '.join(WEIGHT_DTYPES)}, or F8_E4M3 with a scale",
            hint="give the bf16 or fp16 checkpoint",
        )

    def _linear(self, module: str, shape: tuple[int, int]) -> Stored | None:
        """The weight ``[out, in]`` of a Linear, in whichever form it is there."""
        packed = self._take(f"{module}.weight_packed")
        entry = self._take(f"{module}.weight", shape)
        scale = self._take(f"{module}.weight_scale")
        some = packed or entry
        if some is None:
            self.missing.append(f"{module}.weight")
            return None
        if packed is not None and entry is not None:
            raise CheckpointError(
                f"{entry.file}: tensor '{entry.name}' is there twice, also as '{packed.name}'", hint=DAMAGED
            )
        if packed is not None:
            stored = self._packed(module, packed, scale, shape)
        elif scale is not None:
            stored = self._scaled(some, scale, shape[0])
        else:
            stored = Stored(self._plain(some))
        self._hold_to_declaration(module, stored)
        return stored

    def _scaled(self, entry: TensorEntry, scale: TensorEntry, channels: int) -> Stored:
        if entry.dtype != "F8_E4M3":
            raise UnsupportedError(
                f"{entry.file}: tensor '{entry.name}' is {entry.dtype} and has a scale; only F8_E4M3 is understood so",
                hint=DAMAGED,
            )
        if scale.shape not in ((), (1,), (1, 1), (channels,), (channels, 1)):
            raise UnsupportedError(
                f"{scale.file}: tensor '{scale.name}' has shape {list(scale.shape)}; a scale is one number, or one for "
                f"each of {channels} output channels",
                hint="scales by block are not understood",
            )
        return Stored(entry, self._scale(scale))

    def _scale(self, scale: TensorEntry) -> TensorEntry:
        if scale.dtype not in WEIGHT_DTYPES:
            raise UnsupportedError(
                f"{scale.file}: tensor '{scale.name}' is {scale.dtype}; scales must be one of "
                f"{', '.join(WEIGHT_DTYPES)}",
                hint=DAMAGED,
            )
        return scale

    def _packed(self, module: str, packed: TensorEntry, scale: TensorEntry | None, shape: tuple[int, int]) -> Stored:
        """compressed-tensors' ``pack-quantized``: ``weight_packed``, ``weight_scale`` and the true ``weight_shape``."""
        outputs, inputs = shape
        true_shape = self._take(f"{module}.weight_shape", (2,))
        if scale is None or true_shape is None:
            what = "weight_scale" if scale is None else "weight_shape"
            raise CheckpointError(
                f"{packed.file}: tensor '{packed.name}' has no '{module}.{what}' beside it", hint=DAMAGED
            )
        if packed.dtype != "I32" or packed.shape != (outputs, -(-inputs // 8)) or inputs % 8:
            raise UnsupportedError(
                f"{packed.file}: tensor '{packed.name}' is {packed.dtype} {list(packed.shape)}; INT4 weights "
                f"{list(shape)} are packed as I32 {[outputs, inputs // 8]}",
                hint="eight values an integer along the inputs, whose number is a multiple of eight",
            )
        found = read_values(true_shape).tolist() if true_shape.dtype in ("I64", "I32") else true_shape.dtype
        if found != list(shape):
            raise CheckpointError(
                f"{true_shape.file}: tensor '{true_shape.name}' says {found}, config.json asks for {list(shape)}",
                hint=SAME_CHECKPOINT,
            )
        groups = scale.shape[1] if len(scale.shape) == 2 else 0
        if scale.shape[:1] != (outputs,) or groups < 1 or inputs % groups:
            raise UnsupportedError(
                f"{scale.file}: tensor '{scale.name}' has shape {list(scale.shape)}; INT4 weights {list(shape)} need "
                f"[{outputs}, groups], the groups of equal size",
                hint=DAMAGED,
            )
        return Stored(packed, self._scale(scale), inputs // groups)

    def _hold_to_declaration(self, module: str, stored: Stored) -> None:
        """What the tensors are and what ``config.json`` says of the module must be the same."""
        entry, quantization = stored.entry, self.checkpoint.quantization
        own = entry.name.removesuffix(".weight").removesuffix(".weight_packed")
        # A declaration may be written with the prefix though the tensors are not, or the other way round.
        declared = None if quantization is None else quantization.scheme_of(own, module, TEXT_PREFIX + module)
        found = stored.scheme
        if declared == found or declared in _other_readings(stored):
            return
        if found is None and module.endswith(".feed_forward.router"):
            return  # a class of its own, not Linear, in some versions of transformers
        source = self.checkpoint.path / "config.json" if quantization is None else quantization.source
        raise CheckpointError(
            f"{entry.file}: '{own}' is stored {_say(found)}, but {source.name} declares it {_say(declared)}",
            hint="one of the two is wrong, and shuntyard does not guess which",
        )

    def _experts(self, layer: int, module: str) -> Experts | None:
        c = self.checkpoint.config
        experts, hidden, inner = c.num_local_experts, c.hidden_size, c.intermediate_size
        fused = {"gate_up_proj": (experts, hidden, 2 * inner), "down_proj": (experts, inner, hidden)}
        linear = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
        first_linears = (f"{module}.0.{name}.{kind}" for name in EXPERT_PARTS for kind in ("weight", "weight_packed"))
        if not any(name in self.tensors for name in first_linears):
            parts = [self._fused(module, name, shape) for name, shape in fused.items()]
            layout = "fused"
        else:
            parts = [
                self._linear(f"{module}.{e}.{name}", linear[name]) for name in EXPERT_PARTS for e in range(experts)
            ]
            layout = "linear"
        if any(part is None for part in parts):
            return None
        found = [part for part in parts if part is not None]
        first = found[0]
        for part in found:
            if _kind(part) != _kind(first) and (self.alike or {part.form, first.form} != {"none"}):
                raise UnsupportedError(
                    f"{part.entry.file}: '{part.entry.name}' is stored in another way than '{first.entry.name}'",
                    hint="the experts of a layer must all be stored alike; --weights bf16 writes plain ones so",
                )
        return Experts(ExpertsForm(experts, layout, first.form, first.group_size).check(), tuple(found))

    def _fused(self, module: str, name: str, shape: tuple[int, ...]) -> Stored | None:
        entry, scale = self._take(f"{module}.{name}", shape), self._take(f"{module}.{name}_weight_scale")
        if entry is None:
            self.missing.append(f"{module}.{name}")
            return None
        if scale is None:
            stored = Stored(self._plain(entry))
        else:
            if math.prod(scale.shape) != 1:
                raise UnsupportedError(
                    f"{scale.file}: tensor '{scale.name}' has shape {list(scale.shape)}; the scale of fused experts is "
                    "one number",
                    hint="fused experts with a scale for each channel are not understood",
                )
            stored = self._scaled(entry, scale, 1)
        self._hold_to_declaration(f"{module}.{name}", stored)
        return stored


def _kind(part: Stored) -> tuple[str, str, int, str | None]:
    return part.form, part.entry.dtype, part.group_size, part.scale.dtype if part.scale else None


def _other_readings(stored: Stored) -> list[Scheme]:
    """What else a form can be called: one output channel's scale is one number; one group spans the channel."""
    if stored.form == "tensor" and stored.entry.shape[0] == 1:
        return [Scheme("channel")]
    if stored.form == "group" and stored.group_size == stored.entry.shape[1] * 8:
        return [Scheme("group")]
    return []


def _say(scheme: Scheme | None) -> str:
    return "plain" if scheme is None else str(scheme)


_KNOWN_BUT_NOT_SUPPORTED = {
    "_g_idx": "groups that are permuted (actorder) are not supported; quantise without, or with actorder='static'",
    "_zero_point": "asymmetric quantisation is not supported; quantise symmetrically",
    "_scale_inv": "scales by block, as their inverse, are not supported",
    "_scale_2": "two levels of scales (NVFP4) are not supported",
    "_proj_scale": "fbgemm_fp8 is not supported; give the bf16 checkpoint or one in compressed-tensors",
}
