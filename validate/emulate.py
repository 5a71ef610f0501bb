"""The eager model with every module as a precision says, its weights quantised in memory: what a recipe would compute.

The arithmetic of quantised products is that of ``plugins/contract.py``: e4m3
numbers summed in fp32, then scaled once; weights alone are dequantised and rounded to the compute type.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import torch
from torch import Tensor

from shuntyard.errors import UnsupportedError
from shuntyard.exporter.config import Llama4Config
from shuntyard.exporter.modules import EXPERTS, Module, modules
from shuntyard.exporter.parameters import kind_of, layer_weights
from shuntyard.exporter.precision import products_of
from shuntyard.exporter.recipe import STORED, Precision, Resolved
from shuntyard.exporter.weights import EXPERT_PARTS
from shuntyard.validate.eager import TORCH_TYPES, EagerStack, eager_label
from shuntyard.validate.matrices import Matrix, Numbers, quantised

DECLARED = Precision(STORED, activations="declared")
"""As the checkpoint stores the module, its activations as it declares them."""

KEPT_BYTES = 2**30
"""Prepared modules that are kept for the next who asks, at most."""


class Scales(Protocol):
    """What a calibration gives (``exporter/calibration.py``)."""

    def scale(self, module: str) -> float:
        """Of the inputs of a module, or of one expert's matrix: ``...experts.3.up_proj``."""

    def cache_scale(self, attention: str, part: Literal["keys", "values"]) -> float:
        """Of the KV cache of ``model.layers.N.self_attn``."""


class _Linear:
    """A product of quantised rows, or one in a type of its own."""

    def __init__(self, matrix: Matrix, dtype: torch.dtype | None) -> None:
        self._activations, self._dtype = matrix.activations, dtype
        self._input_scale = matrix.input_scale
        if matrix.activations == "none":
            assert dtype is not None
            self.weight, self._scale = matrix.value().to(dtype), torch.ones(1)
        else:
            assert matrix.scale is not None
            self.weight, self._scale = matrix.numbers.float(), matrix.scale.float().reshape(-1)

    def __call__(self, x: Tensor) -> Tensor:
        """``x [..., in]`` -> ``[..., out]`` of its type."""
        if self._activations == "none":
            return (x.to(self._dtype) @ self.weight.T).to(x.dtype)
        codes, factor = torch.ops.shuntyard.quantize(x, self._input_scale)
        rows: Tensor = codes @ self.weight.T * factor * self._scale
        return rows.to(x.dtype)


class _Experts:
    """The routed experts of a layer: gate, up and down, all experts of each."""

    def __init__(self, matrices: list[Matrix], config: Llama4Config, dtype: torch.dtype, own: torch.dtype) -> None:
        self._top_k, self._experts, self._own = config.num_experts_per_tok, config.num_local_experts, own
        self._activations = matrices[0].activations
        if self._activations == "none":
            # As the op does it: dequantised, then rounded to the type of x. Here it is done once.
            self.weights = [matrix.value().to(own) for matrix in matrices]
            self._scales: list[Tensor] = []
            self._inputs: list[Tensor] = []
        else:
            self.weights = [matrix.numbers for matrix in matrices]
            self._scales = [matrix.scale for matrix in matrices if matrix.scale is not None]
            self._inputs = [matrix.input_scale for matrix in matrices if matrix.input_scale is not None]

    def __call__(self, x: Tensor, scores: Tensor, offsets: Tensor, permutation: Tensor) -> Tensor:
        """As ``moe_experts``: ``x [T, H]`` -> ``rows [T * K, H]``."""
        lists = (self.weights, self._scales, self._inputs)
        form = (self._top_k, self._experts, "linear", 0, self._activations)
        own = x.to(self._own) if self._activations == "none" else x
        rows: Tensor = torch.ops.shuntyard.moe_experts(own, scores, offsets, permutation, *lists, *form)
        return rows.to(x.dtype)


class _Cache:
    """What an FP8 cache gives back of keys or values, in their type."""

    def __init__(self, scale: float) -> None:
        self._scale = torch.tensor([scale], dtype=torch.float32)

    def __call__(self, x: Tensor) -> Tensor:
        codes, factor = torch.ops.shuntyard.quantize(x, self._scale)
        rounded: Tensor = codes * factor
        return rounded.to(x.dtype)


class Preparer:
    """Makes modules of a checkpoint ready to compute, in any precision, and keeps as many as fit.

    Args:
        numbers: the checkpoint.
        dtype: what the model computes in: "fp32", "fp16", "bf16".
        scales: for static activations and FP8 caches that the checkpoint has no scale for.
        where: what is named where such a scale is missing.
    """

    def __init__(self, numbers: Numbers, dtype: str = "fp32", scales: Scales | None = None, where: str = "") -> None:
        self.numbers, self.config, self.dtype = numbers, numbers.config, TORCH_TYPES[dtype]
        self.modules = {module.name: module for module in modules(self.config)}
        self._scales, self.where = scales, where or str(numbers.checkpoint.path)
        self._kept: OrderedDict[tuple[str, Precision, str | None], Any] = OrderedDict()
        self._sizes: dict[tuple[str, Precision, str | None], int] = {}

    def product(self, name: str, precision: Precision, product: str | None = None) -> Any:
        """What takes a module's place among the model's weights: a tensor, or what ``model.linear`` calls.

        ``product`` is the type that a plain module's product is computed in, where it is not the model's.
        """
        key = (name, precision, product)
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        room = KEPT_BYTES - 4 * self.modules[name].values  # what it takes at most
        while self._kept and sum(self._sizes.values()) > room:
            old, _ = self._kept.popitem(last=False)
            del self._sizes[old]
        made = self._make(self.modules[name], precision, product)
        own = made if isinstance(made, Tensor) else made.weight if isinstance(made, _Linear) else None
        self._kept[key] = made
        self._sizes[key] = own.nbytes if own is not None else sum(weight.nbytes for weight in made.weights)
        return made

    def _make(self, module: Module, precision: Precision, product: str | None) -> Any:
        matrices = self._rounded(module, precision)
        own = TORCH_TYPES[product] if product else self.dtype
        if module.kind == "experts":
            return _Experts(matrices, self.config, self.dtype, own)
        (matrix,) = matrices
        if matrix.activations == "none" and own == self.dtype:
            return matrix.value().to(self.dtype)
        return _Linear(matrix, own)

    def _rounded(self, module: Module, precision: Precision) -> list[Matrix]:
        declared = precision == DECLARED
        matrices = self.numbers.matrices(module, declared=declared)
        if module.is_fixed or declared or precision.weights == STORED:
            return matrices
        parts = self.numbers.stored(module)
        # What is stored in the form that is asked for keeps its numbers.
        same = all(p.form == precision.granularity and p.group_size == precision.group_size for p in parts)
        if not (precision.granularity and same):
            matrices = [quantised(matrix.value(), precision) for matrix in matrices]
        activations = precision.activations.removeprefix("fp8-")
        if activations != "static":
            return [replace(matrix, activations=activations) for matrix in matrices]
        names = [module.name]
        if module.kind == "experts":
            names = [f"{module.name}.{e}.{part}" for part in EXPERT_PARTS for e in range(module.copies)]
        return [
            replace(matrix, activations=activations, input_scale=self._input_scale(name))
            for name, matrix in zip(names, matrices, strict=True)
        ]

    def _input_scale(self, name: str) -> Tensor:
        """The file's own scale, else the calibration's."""
        names = [f"{name}.input_scale"]
        if EXPERTS in name:
            module = name.split(f"{EXPERTS}.", 1)[0]
            fused = "down_proj" if name.endswith("down_proj") else "gate_up_proj"
            names.append(f"{module}{EXPERTS}.{fused}_input_scale")
        own = self.numbers.number(*names)
        found = self._calibrated(name).scale(name) if own is None else own
        return torch.tensor([found], dtype=torch.float32)

    def _calibrated(self, name: str) -> Scales:
        if self._scales is None:
            raise UnsupportedError(
                f"{self.where}: '{name}' needs a scale, and there is no calibration",
                hint="shuntyard calibrate CKPT OUT --text FILE makes one; give it by --calibration OUT",
            )
        return self._scales

    def cache(self, attention: str) -> dict[str, Any]:
        """What goes beside an attention's weights where its cache is FP8."""
        found: dict[str, Any] = {}
        for part, kind in (("k", "keys"), ("v", "values")):
            own = self.numbers.number(f"{attention}.{part}_scale", f"{attention}.{part}_proj.{part}_scale")
            if own is None:
                own = self._calibrated(attention).cache_scale(attention, cast(Any, kind))
            found[f"self_attn.{part}_cache"] = _Cache(own)
        return found


class Emulation:
    """A checkpoint's weights as the model takes them, with each module as a map says; see ``eager.WeightSource``.

    Modules that the map leaves out are as they are stored. ``kv_cache`` says "fp8" of attentions whose cache is.
    ``products`` are types that plain modules compute in, where it is not the model's.
    """

    def __init__(
        self,
        preparer: Preparer,
        precision: Mapping[str, Precision],
        kv_cache: Mapping[str, str] | None = None,
        products: Mapping[str, str] | None = None,
    ) -> None:
        self.preparer, self.precision = preparer, precision
        self._kv_cache, self._products = kv_cache or {}, products or {}

    def outer(self, name: str) -> Tensor:
        """The embedding, the last norm, or the head."""
        module = name.removesuffix(".weight")
        if module not in self.preparer.modules:
            return self.preparer.numbers.plain(name)
        return cast(Tensor, self._module(module))

    def layer(self, index: int) -> dict[str, Tensor]:
        """A layer's parameters, by their names below ``model.layers.INDEX.``."""
        config, prefix = self.preparer.config, f"model.layers.{index}."
        found: dict[str, Any] = {}
        for name, shape in layer_weights(config, kind_of(config, index)).items():
            if name.startswith("feed_forward.experts."):
                found["feed_forward.experts"] = self._module(f"{prefix}feed_forward.experts")
            elif len(shape) == 2 and not name.endswith(".router.weight"):
                found[name] = self._module(prefix + name.removesuffix(".weight"))
            else:
                found[name] = self.preparer.numbers.plain(prefix + name)
        if self._kv_cache.get(f"{prefix}self_attn") == "fp8":
            found |= self.preparer.cache(f"{prefix}self_attn")
        return found

    def key(self, layer: int | None) -> tuple[Any, ...]:
        """Emulations of one checkpoint with the same key of a layer have the same layer; None: outside the layers."""
        own = [module.name for module in self.preparer.modules.values() if module.layer == layer]
        cache = "" if layer is None else self._kv_cache.get(f"model.layers.{layer}.self_attn", "")
        return (*((self.precision.get(n), self._products.get(n)) for n in own), cache == "fp8")

    def _module(self, name: str) -> Any:
        return self.preparer.product(name, self.precision.get(name, Precision()), self._products.get(name))


def emulation_of(preparer: Preparer, resolved: Resolved) -> Emulation:
    """What a recipe would make of a checkpoint; of ``stored``, what the checkpoint declares."""
    if not resolved.recipe.rules:
        return _as_declared(preparer)
    return Emulation(preparer, resolved.precision, resolved.kv_cache, products_of(resolved))


def _as_declared(preparer: Preparer, products: Mapping[str, str] | None = None) -> Emulation:
    """What the checkpoint declares, now that it can be carried out."""
    caches = {f"model.layers.{layer}.self_attn": "fp8" for layer in preparer.numbers.declared().kv_scales}
    return Emulation(preparer, dict.fromkeys(preparer.modules, DECLARED), caches, products)


class EmulatedStack(EagerStack):
    """A recipe, or what a directory declares, as a stack: our eager model with its modules so."""

    def __init__(self, emulation: Emulation, dtype: str, what: str) -> None:
        super().__init__(emulation.preparer.numbers.checkpoint.path, dtype, emulation)
        self.label = f"{eager_label()}, {what}"

    @classmethod
    def of_recipe(
        cls, checkpoint: Path, resolved: Resolved, scales: Scales | None = None, dtype: str = "fp32"
    ) -> EmulatedStack:
        """What a recipe would make of a checkpoint.

        Raises:
            CheckpointError: the checkpoint is broken, or a scale in it is no positive number.
            UnsupportedError: something in it is not understood, or a scale is missing; the layer that needs it says so.
        """
        preparer = Preparer(Numbers(checkpoint), dtype, scales, resolved.recipe.where)
        return cls(emulation_of(preparer, resolved), dtype, f"by recipe {resolved.recipe.name}")

    @classmethod
    def as_declared(
        cls,
        directory: Path,
        dtype: str = "fp32",
        *,
        activations: bool = True,
        products: Mapping[str, str] | None = None,
    ) -> EmulatedStack:
        """A checkpoint or model directory as it is: weights as they are stored, the rest as it declares it.

        Args:
            directory: the checkpoint or model directory.
            dtype: what is computed in.
            activations: whether inputs and KV caches are rounded as they are declared to be; else they are left alone.
            products: types that plain modules compute in, by module, where it is not ``dtype``.

        Raises:
            CheckpointError: the checkpoint is broken, or a scale is missing or no positive number.
            UnsupportedError: something in it is not understood, or cannot be carried out.
        """
        preparer = Preparer(Numbers(directory), dtype)
        own = _as_declared(preparer, products) if activations else Emulation(preparer, {}, {}, products)
        return cls(own, dtype, "as declared" if activations else "as stored")
