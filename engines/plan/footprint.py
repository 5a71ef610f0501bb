"""How many bytes an engine's weights, KV cache and activations take: arithmetic on the configuration alone.

Shapes by the legend in ``plugins/contract.py``. What stands here was held to built engines: weights to the size of
TensorRT-RTX plans, caches to engine manifests, activations (``activations.py``) to the tensors of a
plan's layer dump: ``tests/engines/test_plan.py``. ``docs/plan.md`` redoes the arithmetic by hand.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from shuntyard.errors import CheckpointError, UnsupportedError
from shuntyard.exporter.config import Llama4Config

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

COMPUTE = 2
"""Bytes of a value of the compute type: GPU engines compute in bf16 or fp16."""

_LINEARS: tuple[Component, ...] = ("attention q, o", "attention k, v", "routed experts", "shared experts", "dense FFN")


@dataclass(frozen=True)
class Part:
    """``copies`` matrices ``[out, into]`` of one component, a vector with ``into`` 0; ``layer`` None: of no layer."""

    component: Component
    layer: int | None
    out: int
    into: int
    copies: int = 1

    @property
    def values(self) -> int:
        """How many values they hold."""
        return self.copies * self.out * max(self.into, 1)


def parts(config: Llama4Config) -> Iterator[Part]:
    """Every parameter of the model."""
    hidden, expert, dense = config.hidden_size, config.intermediate_size, config.intermediate_size_mlp
    queries, keys = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
    yield Part("embeddings", None, config.vocab_size, hidden)
    if not config.tie_word_embeddings:
        yield Part("lm_head", None, config.vocab_size, hidden)
    yield Part("norms", None, hidden, 0)
    for i in range(config.num_hidden_layers):
        yield Part("norms", i, hidden, 0, copies=2)
        yield Part("attention q, o", i, queries, hidden)
        yield Part("attention q, o", i, hidden, queries)
        yield Part("attention k, v", i, keys, hidden, copies=2)
        if config.attention_bias:
            yield Part("attention q, o", i, queries, 0)
            yield Part("attention q, o", i, hidden, 0)
            yield Part("attention k, v", i, keys, 0, copies=2)
        if config.is_moe(i):
            yield Part("routers", i, config.num_local_experts, hidden)
            yield Part("routed experts", i, 2 * expert, hidden, copies=config.num_local_experts)
            yield Part("routed experts", i, hidden, expert, copies=config.num_local_experts)
            yield Part("shared experts", i, expert, hidden, copies=2)
            yield Part("shared experts", i, hidden, expert)
        else:
            yield Part("dense FFN", i, dense, hidden, copies=2)
            yield Part("dense FFN", i, hidden, dense)


def parameters(config: Llama4Config) -> dict[Component, int]:
    """Values of each component, in the order of ``COMPONENTS``, those that the model has."""
    counts: dict[Component, int] = defaultdict(int)
    for part in parts(config):
        counts[part.component] += part.values
    return {component: counts[component] for component in COMPONENTS if counts[component]}


@dataclass(frozen=True)
class StoredBytes:
    """Bytes by component and type, as files or engines hold them. ``vision`` and ``waived`` are not in ``total``."""

    weights: Mapping[tuple[Component, str], int]
    vision: int = 0
    waived: int = 0

    @property
    def total(self) -> int:
        """All components together."""
        return sum(self.weights.values())

    def of(self, component: Component) -> dict[str, int]:
        """One component's bytes by type."""
        return {dtype: count for (own, dtype), count in self.weights.items() if own == component}


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
    weights: dict[tuple[Component, str], int] = defaultdict(int)
    values: dict[Component, int] = defaultdict(int)
    vision = waived = 0
    for full_name, dtype, nbytes in tensors:
        name = full_name.removeprefix("language_model.")
        if name.startswith(_VISION):
            vision += nbytes
        elif name.endswith(_WAIVED):
            waived += nbytes
        else:
            component = _component(name)
            if name.endswith(_BESIDE_WEIGHTS):
                weights[component, SCALES] += nbytes
                continue
            own = _DTYPES.get(dtype, dtype)
            if own not in ITEM_BITS:
                raise UnsupportedError(f"tensor '{name}' is {dtype}", hint=f"one of {', '.join(ITEM_BITS)}")
            weights[component, own] += nbytes
            values[component] += nbytes * 8 // ITEM_BITS[own]
    for component, wanted in parameters(config).items():
        if values[component] != wanted:
            raise CheckpointError(
                f"the tensors of {component} hold {values[component]:,} values, config.json asks for {wanted:,}",
                hint="config.json and the shards must be of the same checkpoint",
            )
    return StoredBytes(dict(weights), vision, waived)


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


@dataclass(frozen=True)
class Recipe:
    """What an engine's weights are to be. Types by safetensors' names; all that is not named stays BF16."""

    name: str
    title: str
    experts: str = "BF16"
    linears: str = "BF16"
    spare_ends: bool = False  # the first and the last layer's routed experts stay BF16, as in Meta's own code

    def type_of(self, part: Part, layers: int) -> str:
        """The type of a part in a model of so many layers."""
        if part.into == 0 or part.component not in _LINEARS:
            return "F32" if part.component == "routers" else "BF16"  # the graph computes routers in fp32
        if part.component != "routed experts":
            return self.linears
        return "BF16" if self.spare_ends and part.layer in (0, layers - 1) else self.experts


GROUP = 128
"""Values that share a scale in INT4."""

STORED = "stored"
"""The recipe that changes nothing: weights as the checkpoint holds them."""

RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe("bf16", "everything in BF16"),
        Recipe("fp8-meta", "as fp8, but the first and the last layer's experts in BF16", "F8_E4M3", spare_ends=True),
        Recipe("fp8", "routed experts in FP8, an fp32 scale for each output channel", "F8_E4M3"),
        Recipe("fp8-all-linear", "fp8, and attention, shared experts and dense FFN too", "F8_E4M3", "F8_E4M3"),
        Recipe("int4-experts", f"routed experts in INT4, a bf16 scale for each {GROUP} values", "INT4"),
    )
}
"""From the least to the most that is lost."""


def held_bytes(config: Llama4Config, recipe: Recipe) -> StoredBytes:
    """What an engine of a recipe holds.

    Raises:
        UnsupportedError: the model's matrices cannot be cut into INT4's groups.
    """
    weights: dict[tuple[Component, str], int] = defaultdict(int)
    for part in parts(config):
        dtype = recipe.type_of(part, config.num_hidden_layers)
        weights[part.component, dtype] += part.values * ITEM_BITS[dtype] // 8
        if dtype == "F8_E4M3":
            weights[part.component, SCALES] += 4 * part.copies * part.out
        elif dtype == "INT4":
            if part.into % GROUP:
                raise UnsupportedError(
                    f"weights '{recipe.name}': {part.into} inputs of {part.component} are no multiple of {GROUP}",
                    hint="this model can be held in bf16 or fp8",
                )
            weights[part.component, SCALES] += 2 * part.copies * part.out * part.into // GROUP
    return StoredBytes(dict(weights))


def as_in_engine(stored: StoredBytes) -> StoredBytes:
    """What an engine holds of plain weights as they are stored.

    Experts go to their plugin as they are, embeddings are looked up as they are, and what is quantised stays so. Other
    fp32 weights are rounded to the compute type when the engine is built; routers are widened to fp32.
    """
    weights: dict[tuple[Component, str], int] = defaultdict(int)
    for (component, dtype), nbytes in stored.weights.items():
        own = dtype
        if component == "routers" and dtype in ("BF16", "F16"):
            own = "F32"
        elif dtype == "F32" and component not in ("routers", "routed experts", "embeddings"):
            own = "BF16"
        weights[component, own] += nbytes if own == dtype else nbytes * ITEM_BITS[own] // ITEM_BITS[dtype]
    return StoredBytes(dict(weights), stored.vision, stored.waived)


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
