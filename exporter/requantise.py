"""Carries a recipe out on a checkpoint: which tensors the new one has, and how it declares itself.

The new checkpoint is one in compressed-tensors' form (vllm-project/compressed-tensors): a quantised matrix is
``M.weight`` or ``M.weight_packed`` with ``M.weight_scale``, experts are three such modules each, the scale of static
activations is ``M.input_scale``, those of an FP8 KV cache are ``self_attn.k_scale`` and ``self_attn.v_scale``; what is
quantised how stands in ``quantization_config``.

What is stored in the form that is asked for keeps its numbers and scales. What is stored in another one is dequantised
first, and so rounded twice: that is said.
"""

from __future__ import annotations

import math
import re
import struct
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

from shuntyard.errors import UnsupportedError
from shuntyard.exporter.activations import scale_value
from shuntyard.exporter.calibration import Calibration
from shuntyard.exporter.checkpoint import Checkpoint
from shuntyard.exporter.modules import EXPERTS, Module
from shuntyard.exporter.recipe import PLAIN, STORED, Precision, Resolved
from shuntyard.exporter.relayout import DTYPES, Relayout, copied, expert_matrices, expert_targets, piece_of
from shuntyard.exporter.rewrite import Piece, Target
from shuntyard.exporter.rewrite_request import Quantize
from shuntyard.exporter.safetensors_header import TensorEntry, read_values
from shuntyard.exporter.weights import EXPERT_PARTS, Experts, Stored, Weights


@dataclass
class Rewritten:
    """What a recipe makes of a checkpoint."""

    targets: list[Target] = field(default_factory=list)
    twice: list[str] = field(default_factory=list)  # modules that are dequantised and quantised again
    widened: list[str] = field(default_factory=list)  # modules that are dequantised
    precision: dict[str, Precision] = field(default_factory=dict)  # of those that are quantised
    taken: set[str] = field(default_factory=set)  # scales of activations and caches that the checkpoint had
    calibrated: int = 0  # scales that the calibration gave


def carry_out(
    checkpoint: Checkpoint, weights: Weights, resolved: Resolved, calibration: Calibration | None
) -> Rewritten:
    """The tensors of the new checkpoint, in the model's order.

    Raises:
        UnsupportedError: a module cannot become what is asked of it, or needs a calibration that is not given.
        CheckpointError: the calibration is of another checkpoint, or lacks a module.
    """
    return _Writer(checkpoint, weights, resolved, calibration).write()


class _Writer:
    def __init__(
        self, checkpoint: Checkpoint, weights: Weights, resolved: Resolved, calibration: Calibration | None
    ) -> None:
        self.checkpoint, self.weights, self.resolved, self.calibration = checkpoint, weights, resolved, calibration
        self.out = Rewritten()

    def write(self) -> Rewritten:
        by_name = {module.name: module for module in self.resolved.modules}
        for name, stored in self.weights.linears.items():
            module = by_name.get(name.removesuffix(".weight"))
            if module is None or name.endswith(".bias"):
                self.out.targets.append(copied(name, stored, stored.entry.dtype))
            else:
                self._linear(module, stored)
            if name.endswith("self_attn.o_proj.weight"):
                self._kv_cache(name.removesuffix(".o_proj.weight"))
        for layer, experts in self.weights.experts.items():
            self._experts(by_name[f"model.layers.{layer}{EXPERTS}"], experts)
        return self.out

    def _linear(self, module: Module, stored: Stored) -> None:
        asked = self.resolved.precision[module.name]
        if module.is_fixed or (asked.weights == STORED and stored.form == "none"):
            dtype = stored.entry.dtype if stored.form == "none" else "F32"  # a router's numbers, times scale: exact
            self.out.targets.append(copied(f"{module.name}.weight", stored, dtype))
        elif asked.weights in PLAIN:
            self.out.widened += [module.name] * (stored.form != "none")
            self.out.targets.append(copied(f"{module.name}.weight", stored, DTYPES[asked.weights]))
        else:
            asked = self._as_stored(module, stored) if asked.weights == STORED else asked
            self.out.precision[module.name] = asked
            self.out.targets += self._quantised(module.name, piece_of(stored), stored, asked, module.shapes[0])

    def _as_stored(self, module: Module, stored: Stored) -> Precision:
        """The precision of a module that stays as it is. Its activations are not quantised: no rule says so."""
        return Precision("int4" if stored.form == "group" else "fp8", stored.form, "none", stored.group_size)

    def _experts(self, module: Module, experts: Experts) -> None:
        asked, first = self.resolved.precision[module.name], experts.parts[0]
        if asked.weights == STORED and first.form != "none":
            asked = self._as_stored(module, first)
        if asked.weights in (STORED, *PLAIN):
            check_alike(module, asked, experts)
            weights = None if asked.weights == STORED else asked.weights
            self.out.widened += [module.name] * (first.form != "none")
            self.out.targets += expert_targets(module.name, experts, Relayout(weights=weights))
            return
        self.out.precision[module.name] = asked
        for part, shape in zip(EXPERT_PARTS, module.shapes, strict=True):
            for e, own in enumerate(expert_matrices(experts)[part]):
                name, stored = f"{module.name}.{e}.{part}", own["stored"]
                self.out.targets += self._quantised(name, piece_of(**own), stored, asked, shape)

    def _quantised(
        self, name: str, piece: Piece, stored: Stored, asked: Precision, shape: tuple[int, int]
    ) -> Iterator[Target]:
        form = cast(Literal["tensor", "channel", "group"], asked.granularity)
        out, into = shape
        is_same = stored.form == form and (form != "group" or stored.group_size == asked.group_size)
        if is_same and form == "group":
            raise UnsupportedError(
                f"{stored.entry.file}: '{name}' is INT4 already, and packed numbers are not written anew",
                hint="--recipe stored takes the whole checkpoint as it is",
            )
        if is_same and not (form == "channel" and piece.index is not None):
            assert stored.scale is not None
            yield Target(f"{name}.weight", "F8_E4M3", shape, ((replace(piece, scale=None),),))
            yield _numbers(f"{name}.weight_scale", stored.scale, (out, 1) if form == "channel" else (1,))
        else:
            if stored.form != "none":
                self.out.twice.append(name)
            how = Quantize(form, asked.group_size, f"{name}.weight_scale")
            own = f"{name}.weight_packed" if form == "group" else f"{name}.weight"
            yield Target(own, how.dtype, shape, ((piece,),), quantize=how)
        if form == "group":
            yield Target(f"{name}.weight_shape", "I64", (2,), (), data=struct.pack("<2q", out, into))
        if asked.activations == "fp8-static":
            yield _number(f"{name}.input_scale", self._input_scale(name))

    def _input_scale(self, name: str) -> float:
        """The file's own scale, else the calibration's."""
        names = [f"{name}.input_scale"]
        if EXPERTS in name:
            module, part = name.split(f"{EXPERTS}.", 1)
            fused = "down_proj" if part.endswith("down_proj") else "gate_up_proj"
            names.append(f"{module}{EXPERTS}.{fused}_input_scale")
        own = self._stored_scale(names)
        return self._calibration(name).scale(name) if own is None else own

    def _stored_scale(self, names: list[str]) -> float | None:
        for name in names:
            if (entry := self.checkpoint.tensors.get(name)) is not None:
                if math.prod(entry.shape) != 1:
                    raise UnsupportedError(
                        f"{entry.file}: tensor '{entry.name}' is {list(entry.shape)}; a scale for activations or a KV "
                        "cache is one number",
                        hint="name other modules in the recipe, or give the checkpoint without these scales",
                    )
                self.out.taken.add(name)
                return scale_value(entry)
        return None

    def _calibration(self, name: str) -> Calibration:
        if self.calibration is None:
            raise UnsupportedError(
                f"{self.resolved.recipe.where}: '{name}' needs a scale for its activations, and there is no "
                "calibration",
                hint="shuntyard calibrate CKPT OUT --text FILE makes one; give it by --calibration OUT",
            )
        self.out.calibrated += 1
        return self.calibration

    def _kv_cache(self, attention: str) -> None:
        if self.resolved.kv_cache[attention] != "fp8":
            return
        for part in ("k", "v"):
            own = self._stored_scale([f"{attention}.{part}_scale", f"{attention}.{part}_proj.{part}_scale"])
            if own is None:
                calibration = self._calibration(attention)
                own = calibration.cache_scale(attention, "keys" if part == "k" else "values")
            self.out.targets.append(_number(f"{attention}.{part}_scale", own))


def check_alike(module: Module, asked: Precision, experts: Experts) -> None:
    """Refuses plain experts of several types that no rule brings into one.

    Raises:
        UnsupportedError: they are such.
    """
    first = experts.parts[0].entry
    other = next((part.entry for part in experts.parts if part.entry.dtype != first.dtype), None)
    if asked.weights == STORED and other is not None:
        raise UnsupportedError(
            f"{other.file}: '{other.name}' is {other.dtype}, '{first.name}' {first.dtype}, and the experts of a layer "
            "must all be stored alike",
            hint=f"a rule for '{module.name}', as with weights = \"bf16\"",
        )


def _number(name: str, value: float) -> Target:
    return Target(name, "F32", (1,), (), data=struct.pack("<f", value))


def _numbers(name: str, scale: TensorEntry, shape: tuple[int, ...]) -> Target:
    """A scale's values in fp32, which is exact."""
    return Target(name, "F32", shape, (), data=read_values(scale).astype("<f4").tobytes())


def quantised_config(rewritten: Rewritten, resolved: Resolved) -> dict[str, Any] | None:
    """``quantization_config`` of the new checkpoint; None: nothing is quantised."""
    if not rewritten.precision and "fp8" not in resolved.kv_cache.values():
        return None
    targets: dict[Precision, list[str]] = defaultdict(list)
    for name, precision in rewritten.precision.items():
        targets[precision].append(_target(name))
    if not targets:  # FP8 caches alone; a declaration has a group, if only one of no modules
        targets[Precision("fp8", "tensor")] = []
    formats = {"int4": "pack-quantized", "fp8": "float-quantized"}
    used = sorted({formats[precision.weights] for precision in targets}) or ["float-quantized"]
    plain = [
        _target(module.name)
        for module in resolved.modules
        if module.name not in rewritten.precision and module.kind != "embedding"
    ]
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": used[0] if len(used) == 1 else "mixed-precision",
        "config_groups": {
            f"group_{i}": {
                "targets": own,
                "weights": _weights(precision),
                "input_activations": _activations(precision),
                "format": formats[precision.weights],
            }
            for i, (precision, own) in enumerate(targets.items())
        },
        "ignore": plain,
        **({"kv_cache_scheme": _arguments("tensor")} if "fp8" in resolved.kv_cache.values() else {}),
    }


def _target(name: str) -> str:
    return f"re:{re.escape(name)}\\..*" if name.endswith(EXPERTS) else name


def _arguments(strategy: str, **others: Any) -> dict[str, Any]:
    return {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False, "strategy": strategy, **others}


def _weights(precision: Precision) -> dict[str, Any]:
    if precision.weights == "int4":
        return _arguments("group", num_bits=4, type="int", group_size=precision.group_size)
    return _arguments(precision.granularity)


def _activations(precision: Precision) -> dict[str, Any] | None:
    if precision.activations == "none":
        return None
    dynamic = precision.activations == "fp8-dynamic"
    return _arguments("token" if dynamic else "tensor", dynamic=dynamic)
