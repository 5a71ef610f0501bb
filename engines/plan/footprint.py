"""How many bytes an engine's weights, KV cache and activations take: arithmetic on the configuration alone.

Shapes by the legend in ``plugins/contract.py``. What stands here was held to built engines: weights to the size of
TensorRT-RTX plans, caches to engine manifests, activations (``activations.py``) to the tensors of a
plan's layer dump: ``tests/engines/test_plan.py``. ``docs/plan.md`` redoes the arithmetic by hand.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from shuntyard.errors import CheckpointError, UnsupportedError
from shuntyard.exporter.config import Llama4Config
from shuntyard.exporter.modules import EXPERTS, modules
from shuntyard.exporter.parameters import all_weights
from shuntyard.exporter.recipe import STORED, Resolved
from shuntyard.exporter.recipe import nbytes as bytes_of

Component = Literal[
    "embeddings", "attention q, o", "attention k, v", "routed experts", "shared experts", "dense FFN", "routers",
    "norms", "lm_head",
]  # fmt: skip

COMPONENTS: tuple[Component, ...] = (
    "embeddings", "attention q, o", "attention k, v", "routed experts", "shared experts", "dense FFN", "routers",
    "norms", "lm_head",
)  # fmt: skip

ITEM_BITS = {"F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "INT4": 4}

SCALES = "scales"
"""Stands for a type in :class:`StoredBytes`: whatever belongs to quantised weights beside them."""

_TYPES = {"fp32": "F32", "fp16": "F16", "bf16": "BF16", "fp8": "F8_E4M3", "int4": "INT4"}
"""Recipes' names of types, and safetensors'."""

COMPUTE = 2
"""Bytes of a value of the compute type: GPU engines compute in bf16 or fp16."""


def parameters(config: Llama4Config) -> dict[Component, int]:
    """Values of each component, in the order of ``COMPONENTS``, those that the model has."""
    counts: dict[Component, int] = defaultdict(int)
    for name, shape in all_weights(config).items():
        counts[_component(name)] += math.prod(shape)
    return {component: counts[component] for component in COMPONENTS if counts[component]}


Piece = tuple[str, Component, str]
"""A module by its name in ``exporter/modules.py``, empty for norms and biases; its component; its type."""


@dataclass(frozen=True)
class StoredBytes:
    """Bytes by component and type, as files or engines hold them. ``vision`` and ``waived`` are not in ``total``."""

    weights: Mapping[tuple[Component, str], int]
    pieces: Mapping[Piece, int]  # what ``weights`` adds up
    vision: int = 0
    waived: int = 0

    @property
    def total(self) -> int:
        """All components together."""
        return sum(self.weights.values())

    def of(self, component: Component) -> dict[str, int]:
        """One component's bytes by type."""
        return {dtype: count for (own, dtype), count in self.weights.items() if own == component}


def _added_up(pieces: Mapping[Piece, int], vision: int = 0, waived: int = 0) -> StoredBytes:
    weights: dict[tuple[Component, str], int] = defaultdict(int)
    for (_, component, dtype), nbytes in pieces.items():
        weights[component, dtype] += nbytes
    return StoredBytes(dict(weights), dict(pieces), vision, waived)


_BY_NAME: tuple[tuple[str, Component], ...] = (
    (".self_attn.q_proj.", "attention q, o"),
    (".self_attn.o_proj.", "attention q, o"),
    (".self_attn.k_proj.", "attention k, v"),
    (".self_attn.v_proj.", "attention k, v"),
    (".feed_forward.experts.", "routed experts"),
    (".feed_forward.shared_expert.", "shared experts"),
    (".feed_forward.router.", "routers"),
    (".feed_forward.", "dense FFN"),
    ("layernorm.weight", "norms"),
)
_OUTER: dict[str, Component] = {
    "model.embed_tokens.": "embeddings",
    "model.norm.": "norms",
    "lm_head.": "lm_head",
}
_VISION = ("vision_model.", "multi_modal_projector.")
_WAIVED = (".inv_freq", ".freqs", ".input_scale", "_input_scale", ".k_scale", ".v_scale")  # see exporter/weights.py
_BESIDE_WEIGHTS = ("weight_scale", "_proj_scale", "weight_zero_point", "weight_shape", "weight_g_idx")
_DTYPES = {"I32": "INT4"}  # compressed-tensors packs eight INT4 values into each int32


def stored_bytes(config: Llama4Config, tensors: Iterable[tuple[str, str, int]]) -> StoredBytes:
    """Adds up a checkpoint's tensors, given as name, safetensors dtype and bytes; with or without ``language_model.``.

    Raises:
        UnsupportedError: a tensor whose component is not known.
        CheckpointError: a component does not hold as many values as the configuration asks for.
    """
    own_modules = {module.name for module in modules(config)}
    pieces: dict[Piece, int] = defaultdict(int)
    values: dict[Component, int] = defaultdict(int)
    vision = waived = 0
    for full_name, dtype, nbytes in tensors:
        name = full_name.removeprefix("language_model.")
        if name.startswith(_VISION):
            vision += nbytes
        elif name.endswith(_WAIVED):
            waived += nbytes
        else:
            component, module = _component(name), _module(name)
            module = module if module in own_modules else ""
            if name.endswith(_BESIDE_WEIGHTS):
                pieces[module, component, SCALES] += nbytes
                continue
            own = _DTYPES.get(dtype, dtype)
            if own not in ITEM_BITS:
                raise UnsupportedError(f"tensor '{name}' is {dtype}", hint=f"one of {', '.join(ITEM_BITS)}")
            pieces[module, component, own] += nbytes
            values[component] += nbytes * 8 // ITEM_BITS[own]
    for component, wanted in parameters(config).items():
        if values[component] != wanted:
            raise CheckpointError(
                f"the tensors of {component} hold {values[component]:,} values, config.json asks for {wanted:,}",
                hint="config.json and the shards must be of the same checkpoint",
            )
    return _added_up(pieces, vision, waived)


def _module(name: str) -> str:
    """The module that a tensor is of."""
    if name.endswith(".bias"):
        return ""
    before, experts, _ = name.partition(f"{EXPERTS}.")
    return before + EXPERTS if experts else name.rpartition(".")[0]


def _component(name: str) -> Component:
    for module, component in _OUTER.items():
        if name.startswith(module):
            return component
    if name.startswith("model.layers."):
        for part, component in _BY_NAME:
            if part in name:
                return component
    raise UnsupportedError(
        f"tensor '{name}' is not understood", hint="shuntyard export CKPT OUT says more of what it does not know"
    )


def held_bytes(stored: StoredBytes, resolved: Resolved) -> StoredBytes:
    """What an engine holds of a checkpoint's weights under a recipe.

    A module that no rule matches is held as it is stored, and so are norms and biases. Of what is plain there, experts
    go to their plugin as they are, and embeddings are looked up as they are; other fp32 weights are rounded to the
    compute type when the engine is built. What a rule makes fp32 or fp16 computes in that type, and stays it. Routers
    are widened to fp32, whatever the rules say.
    """
    pieces: dict[Piece, int] = defaultdict(int)
    for module in resolved.modules:
        own = resolved.precision[module.name]
        if own.weights != STORED:
            component = _component(f"{module.name}.")
            weights, scales = bytes_of(module, own)
            pieces[module.name, component, _TYPES[own.weights]] += weights
            if scales:
                pieces[module.name, component, SCALES] += scales
    for (name, component, dtype), count in stored.pieces.items():
        if not name or resolved.precision[name].weights == STORED:
            held = _in_engine(component, dtype)
            size = count if held == dtype else count * ITEM_BITS[held] // ITEM_BITS[dtype]
            pieces[name, component, held] += size
    return _added_up(pieces, stored.vision, stored.waived)


def _in_engine(component: Component, dtype: str) -> str:
    """The type in which an engine holds what is stored."""
    if component == "routers" and dtype in ("BF16", "F16"):
        return "F32"
    if dtype == "F32" and component not in ("routers", "routed experts", "embeddings"):
        return "BF16"
    return dtype


# Several GPUs: attention and dense matrices are cut by heads and columns, routed experts by whole experts, the
# vocabulary by rows; norms and routers are on every GPU.


def possible_gpus(config: Llama4Config, most: int = 64) -> list[int]:
    """The numbers of GPUs, up to ``most``, that a model can be cut into evenly."""
    return [n for n in range(1, most + 1) if uneven(config, n) is None]


def uneven(config: Llama4Config, gpus: int) -> str | None:
    """What cannot be cut into so many parts; None: everything can. Few key/value heads are copied instead."""
    keys = config.num_key_value_heads
    has_dense = len(config.moe_layers) < config.num_hidden_layers
    if keys % gpus and gpus % keys:
        return f"{keys} key/value heads"
    for count, what, used in (
        (config.num_attention_heads, "query heads", True),
        (config.num_local_experts, "experts", bool(config.moe_layers)),
        (config.intermediate_size, "columns of the shared experts", bool(config.moe_layers)),
        (config.intermediate_size_mlp, "columns of the dense FFN", has_dense),
    ):
        if used and count % gpus:
            return f"{count} {what}"
    return None


def key_heads(config: Llama4Config, gpus: int) -> int:
    """Key/value heads on each GPU."""
    return max(1, config.num_key_value_heads // gpus)


def weights_per_gpu(config: Llama4Config, held: StoredBytes, gpus: int) -> dict[Component, int]:
    """Bytes of each component on one GPU. Scales of cut matrices are counted whole, those of routed experts divided."""
    rows = -(-config.vocab_size // gpus)
    shares: dict[Component, tuple[int, int]] = {
        "embeddings": (rows, config.vocab_size),
        "lm_head": (rows, config.vocab_size),
        "attention k, v": (key_heads(config, gpus), config.num_key_value_heads),
        "norms": (1, 1),
        "routers": (1, 1),
    }
    found: dict[Component, int] = {}
    for component in COMPONENTS:
        of, out_of = shares.get(component, (1, gpus))
        for dtype, nbytes in held.of(component).items():
            whole = dtype == SCALES and component != "routed experts"
            found[component] = found.get(component, 0) + (nbytes if whole else -(-nbytes * of // out_of))
    return found


@dataclass(frozen=True)
class Cache:
    """A KV cache. Bytes are those of one GPU; ``naive`` is what it would take if no layer were local."""

    local_layers: int
    local_rows: int
    global_layers: int
    global_rows: int
    row_bytes: int  # keys and values of one position in one layer
    batch: int

    @property
    def local_bytes(self) -> int:
        """Layers that hold one chunk."""
        return self.batch * self.local_layers * self.local_rows * self.row_bytes

    @property
    def global_bytes(self) -> int:
        """Layers that hold the context."""
        return self.batch * self.global_layers * self.global_rows * self.row_bytes

    @property
    def naive(self) -> int:
        """All layers, if each held the context."""
        return self.batch * (self.local_layers + self.global_layers) * self.global_rows * self.row_bytes


def kv_cache(config: Llama4Config, batch: int, context: int, item: int, gpus: int = 1) -> Cache:
    """The cache for ``batch`` sequences of ``context`` tokens, ``item`` bytes a value, on each of ``gpus`` GPUs."""
    local = [i for i in range(config.num_hidden_layers) if is_local(config, i)]
    return Cache(
        local_layers=len(local),
        local_rows=config.cache_rows(local[0], context) if local else 0,
        global_layers=config.num_hidden_layers - len(local),
        global_rows=context,
        row_bytes=2 * key_heads(config, gpus) * config.head_dim * item,
        batch=batch,
    )


def is_local(config: Llama4Config, layer: int) -> bool:
    """Whether a layer attends within its chunk only, and caches one chunk."""
    return config.uses_rope(layer) and config.attention_chunk_size is not None
