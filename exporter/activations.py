"""Attaches to the weights how their inputs are quantised, as the checkpoint declares it.

A declaration is carried out only where it is asked for: who exports a quantised checkpoint without a recipe gets an
engine that is never less exact than the file. Then every declared module must be one that can be carried out: FP8
weights, inputs in FP8 with one number for all (``static``, its scale stored beside the weight) or by token
(``dynamic``). Anything else is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from shuntyard.errors import CheckpointError, UnsupportedError
from shuntyard.exporter.checkpoint import TEXT_PREFIX, Checkpoint
from shuntyard.exporter.quantise import LEAST_SCALE
from shuntyard.exporter.quantization import Quantization
from shuntyard.exporter.safetensors_header import TensorEntry, read_values
from shuntyard.exporter.weights import WEIGHT_DTYPES, Experts, Stored, Weights

_NOT_ASKED = "export without --recipe: activations are then left as they are"


def attach_activations(weights: Weights, checkpoint: Checkpoint) -> Weights:
    """The same weights with their activations; scales that are used are waived no longer.

    Raises:
        UnsupportedError: a module's activations are declared in a way that cannot be carried out.
        CheckpointError: a scale is missing, or is no positive number.
    """
    quantization = checkpoint.quantization
    if quantization is None:
        return weights
    used: set[str] = set()
    linears = {
        name: _attach(stored, name.removesuffix(".weight"), quantization, checkpoint, used)
        for name, stored in weights.linears.items()
    }
    experts: dict[int, Experts] = {}
    for layer, own in weights.experts.items():
        module = f"model.layers.{layer}.feed_forward.experts"
        parts = tuple(
            _attach(stored, name, quantization, checkpoint, used)
            for name, stored in zip(_names(module, own), own.parts, strict=True)
        )
        kinds = {part.activations for part in parts}
        if len(kinds) > 1:
            raise UnsupportedError(
                f"{quantization.source}: the experts of '{module}' have activations {' and '.join(sorted(kinds))}",
                hint=_NOT_ASKED,
            )
        experts[layer] = Experts(own.form._replace(activations=kinds.pop()).check(), parts)
    kv_scales = dict(_kv_scales(checkpoint, used)) if quantization.kv_cache else {}
    waived = [name for name in weights.waived if name not in used]
    return Weights(linears, experts, waived, weights.tensors + len(used), kv_scales)


def _kv_scales(checkpoint: Checkpoint, used: set[str]) -> Iterator[tuple[int, tuple[TensorEntry, TensorEntry]]]:
    """The scales of the KV caches; a layer that has none keeps its cache in the compute type."""
    for layer in range(checkpoint.config.num_hidden_layers):
        attention = f"model.layers.{layer}.self_attn"
        found = {
            part: name
            for part in ("k", "v")
            for name in (f"{attention}.{part}_scale", f"{attention}.{part}_proj.{part}_scale")
            if name in checkpoint.tensors
        }
        if len(found) == 1:
            raise CheckpointError(
                f"{checkpoint.path}: '{attention}' has a scale for {'keys' if 'k' in found else 'values'} alone",
                hint="the checkpoint was not calibrated; " + _NOT_ASKED,
            )
        if found:
            keys, values = (checkpoint.tensors[found[part]] for part in ("k", "v"))
            for entry in (keys, values):
                _check_scale(entry)
            used |= set(found.values())
            yield layer, (keys, values)


def _names(module: str, experts: Experts) -> Iterator[str]:
    """The module of each part, as the file calls it."""
    for name in experts.form.weight_names:
        if experts.form.layout == "linear":
            part, number = name.split(".")
            yield f"{module}.{number}.{part}_proj"
        else:
            yield f"{module}.{name.split('.')[0]}_proj"


def _attach(stored: Stored, module: str, quantization: Quantization, checkpoint: Checkpoint, used: set[str]) -> Stored:
    if stored.form == "none":
        return stored
    own = stored.entry.name.removesuffix(".weight").removesuffix(".weight_packed")
    group = quantization.group_of(own, module, TEXT_PREFIX + module)
    if group is None or group.activations == "none":
        return stored
    if group.activations == "other" or stored.form == "group":
        raise UnsupportedError(
            f"{quantization.source}: '{module}' has weights {stored.scheme} and activations {group.described}: "
            "inputs of FP8 weights in FP8, static by tensor or dynamic by token, are supported",
            hint=_NOT_ASKED,
        )
    if group.activations == "dynamic":
        return replace(stored, activations="dynamic")
    is_fused = module.endswith(("experts.gate_up_proj", "experts.down_proj"))
    name = f"{module}_input_scale" if is_fused else f"{module}.input_scale"
    entry = checkpoint.tensors.get(name)
    if entry is None:
        raise CheckpointError(
            f"{stored.entry.file}: '{module}' has static activations by {quantization.source.name}, but there is no "
            f"tensor '{name}'",
            hint="the checkpoint was not calibrated; " + _NOT_ASKED,
        )
    _check_scale(entry)
    used.add(name)
    return replace(stored, activations="static", input_scale=entry)


def _check_scale(entry: TensorEntry) -> None:
    if entry.dtype not in WEIGHT_DTYPES or math.prod(entry.shape) != 1:
        raise UnsupportedError(
            f"{entry.file}: tensor '{entry.name}' is {entry.dtype} {list(entry.shape)}; a scale for activations or "
            "a KV cache is one number",
            hint=_NOT_ASKED,
        )
    scale_value(entry)


def scale_value(entry: TensorEntry) -> float:
    """The number that a scale of activations or of a KV cache is.

    Raises:
        CheckpointError: it is not positive, not finite, or too small to divide by.
    """
    value = float(read_values(entry).reshape(-1)[0])
    if not LEAST_SCALE <= value < math.inf:
        raise CheckpointError(
            f"{entry.file}: tensor '{entry.name}' holds {value}: a scale is a positive, normal number",
            hint="the checkpoint is damaged, or was not calibrated",
        )
    return value
