"""What each module of a checkpoint is, read off its tensors and declarations: the record that engines are held to."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Literal

from pydantic import BaseModel, ConfigDict

from shuntyard.exporter.config import Llama4Config
from shuntyard.exporter.modules import EXPERTS, modules
from shuntyard.exporter.recipe import PLAIN, STORED, Precision, Resolved
from shuntyard.exporter.relayout import DTYPES
from shuntyard.exporter.weights import Stored, Weights

EMBEDDING = "model.embed_tokens"

_PLAIN = {stored: name for name, stored in DTYPES.items()}
_ACTIVATIONS = {"none": "none", "static": "fp8-static", "dynamic": "fp8-dynamic"}


class ModulePrecision(BaseModel):
    """One module: how its weights are stored, what its inputs are rounded to, and what its product computes in."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    weights: Literal["fp8", "int4", "bf16", "fp16", "fp32"]
    granularity: Literal["", "tensor", "channel", "group"] = ""
    group_size: int = 0
    activations: Literal["none", "fp8-static", "fp8-dynamic"] = "none"
    product: Literal["", "fp32", "fp16"] = ""  # empty: the engine's type, or fp8 where the activations are

    def __str__(self) -> str:
        """For people."""
        own = Precision(self.weights, self.granularity, self.activations, self.group_size)
        return str(own) + (f", computed in {self.product}" if self.product else "")

    def computes_in(self, dtype: str) -> str:
        """The type of the product in an engine of ``dtype``: fp8 where activations are quantised."""
        return "fp8" if self.activations != "none" else self.product or dtype


def precision_of(
    weights: Weights, config: Llama4Config, products: Mapping[str, str] | None = None
) -> dict[str, ModulePrecision]:
    """The precision of every module; a layer's experts are alike."""
    products = dict(products or {})
    if config.tie_word_embeddings and "lm_head" in products:
        products[EMBEDDING] = products["lm_head"]
    found = {}
    for module in modules(config):
        if module.kind == "experts":
            assert module.layer is not None
            stored = weights.experts[module.layer].parts[0]
        else:
            stored = weights.linears[f"{module.name}.weight"]
        found[module.name] = _of(stored, products.get(module.name, ""))
    return found


def _of(stored: Stored, product: str) -> ModulePrecision:
    if stored.form == "none":
        return ModulePrecision.model_validate({"weights": _PLAIN[stored.entry.dtype], "product": product})
    return ModulePrecision.model_validate(
        {
            "weights": "int4" if stored.form == "group" else "fp8",
            "granularity": stored.form,
            "group_size": stored.group_size,
            "activations": _ACTIVATIONS[stored.activations],
            "product": product,
        }
    )


def products_of(resolved: Resolved) -> dict[str, str]:
    """The modules whose product a recipe wants in a type of its own: those that a rule makes fp32 or fp16.

    bf16 is no type of its own: such a module computes in the engine's type, which is bf16 on GPUs.
    """
    kinds = {module.name: module.kind for module in resolved.modules}
    found = {
        name: own.weights
        for name, own in resolved.precision.items()
        if own.weights in ("fp32", "fp16") and kinds[name] in ("linear", "experts")
    }
    embedding = resolved.precision[EMBEDDING].weights
    if resolved.is_tied and embedding in ("fp32", "fp16"):
        found["lm_head"] = embedding  # the head multiplies with it
    return found


def differences(resolved: Resolved, found: Mapping[str, ModulePrecision], fp8_caches: Collection[int]) -> list[str]:
    """Modules and KV caches that are not what a recipe asked for, in words; there should be none."""
    products, wrong = products_of(resolved), []
    if resolved.is_tied and "lm_head" in products:
        products[EMBEDDING] = products["lm_head"]
    for name, asked in resolved.precision.items():
        is_plain = asked.weights in PLAIN
        own = found[name]
        got = Precision(own.weights, own.granularity, own.activations, own.group_size)
        if is_plain and own.granularity == "":
            got = got._replace(activations=asked.activations)
        one_row = own.granularity == "tensor" and asked.granularity == "channel" and not name.endswith(EXPERTS)
        if one_row and _rows(resolved, name) == 1:
            got = got._replace(granularity="channel")  # one output channel's scale is one number
        if own.granularity == "group" and asked.group_size == 0:
            got = got._replace(group_size=0)
        if asked.weights == STORED:  # no rule is about it: its activations are not quantised, though declared
            if own.activations != "none":
                wrong.append(f"{name} was to have inputs as they are, and is {own}")
        elif got != asked or own.product != products.get(name, ""):
            wrong.append(f"{name} was to be {asked}, and is {own}")
    for layer, (name, asked_cache) in enumerate(resolved.kv_cache.items()):
        if (asked_cache == "fp8") != (layer in fp8_caches):
            wrong.append(f"the KV cache of {name} was to be {asked_cache}, and is not")
    return wrong


def _rows(resolved: Resolved, name: str) -> int:
    return next(module.shapes[0][0] for module in resolved.modules if module.name == name)
