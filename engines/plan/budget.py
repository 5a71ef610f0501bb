"""What is asked of ``plan``, what is known of the checkpoint, and what one GPU then has to hold."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from shuntyard.engines.plan import footprint
from shuntyard.engines.plan.activations import Call, LiveSet, largest_live_set
from shuntyard.engines.plan.footprint import Cache, Component, StoredBytes
from shuntyard.engines.plan.gpus import GIB, Gpu, find_gpu
from shuntyard.errors import UnsupportedError
from shuntyard.exporter.checkpoint import open_checkpoint
from shuntyard.exporter.config import Llama4Config
from shuntyard.exporter.recipe import STORED, Resolved, read_recipe, resolve
from shuntyard.exporter.requantise import check_alike
from shuntyard.exporter.weights import match_weights

KV_ITEM = {"bf16": 2, "fp8": 1}
"""Bytes of a value in the KV cache."""

DEFAULT_CONTEXT = 8192
"""As ``build``'s."""

MOST = 2**30
"""Of anything that is counted; largest batches are looked for up to it."""

RESERVE = GIB
"""What is kept free on each GPU: the CUDA context (0.6 GiB on an H200), kernels, what TensorRT keeps for an execution
context, the allocator's rounding (at most 2 MiB for each of the caches' tensors), NCCL's buffers."""


@dataclass(frozen=True)
class Request:
    """What is asked: an engine, and the GPUs that it shall run on. ``reserve`` is in bytes, for each GPU."""

    gpu: str = "h100"
    gpus: int = 1
    context: int | None = None  # default: the model's, at most DEFAULT_CONTEXT
    batch: int = 1
    tokens: int = 512  # of a sequence in one call; as build's
    weights: str = STORED  # a recipe's name, or the path of its file
    kv: str | None = None  # default: the recipe's
    all_logits: bool = False
    reserve: int = RESERVE


@dataclass(frozen=True)
class Asked:
    """A request that was checked: every field says what will be computed with."""

    gpu: Gpu
    gpus: int
    context: int
    batch: int
    tokens: int  # before a call is cut to the context and the chunk
    weights: str
    kv: str
    all_logits: bool
    reserve: int


@dataclass(frozen=True)
class Model:
    """All that is known of a checkpoint."""

    path: Path
    config: Llama4Config
    stored: StoredBytes
    _resolved: dict[str, Resolved] = field(default_factory=dict, compare=False, repr=False)
    _held: dict[str, StoredBytes] = field(default_factory=dict, compare=False, repr=False)

    def resolved(self, weights: str) -> Resolved:
        """What a recipe, by its name or its file's path, means for the model.

        Raises:
            UnsupportedError: there is no such recipe, it is none, or it asks for what a module cannot be.
        """
        if weights not in self._resolved:
            self._resolved[weights] = resolve(read_recipe(weights), self.config)
        return self._resolved[weights]

    def held(self, weights: str) -> StoredBytes:
        """What an engine of a recipe holds in all; raises as :meth:`resolved` does."""
        if weights not in self._held:
            self._held[weights] = footprint.held_bytes(self.stored, self.resolved(weights))
        return self._held[weights]


@dataclass(frozen=True)
class Budget:
    """What one GPU has to hold, and has. Bytes."""

    weights: dict[Component, int]
    cache: Cache
    live: LiveSet
    reserve: int
    usable: int

    @property
    def needed(self) -> int:
        """Everything together."""
        return self.fixed + self.cache.local_bytes + self.cache.global_bytes + self.live.nbytes

    @property
    def fixed(self) -> int:
        """What no context and no batch changes: weights and reserve."""
        return sum(self.weights.values()) + self.reserve

    @property
    def left(self) -> int:
        """What stays free; negative: what is missing."""
        return self.usable - self.needed

    @property
    def fits(self) -> bool:
        """Whether it does."""
        return self.left >= 0


_COUNT = re.compile(r"([1-9]\d{0,11})([kKM]?)", re.ASCII)


def parse_tokens(text: str) -> int:
    """A number of tokens: ``8192``, ``128k`` (times 1,024), ``1M`` or ``10M`` (times 1,048,576).

    Raises:
        ValueError: it is none.
    """
    match = _COUNT.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r:.40} is no number of tokens such as 8192, 128k or 1M")
    return int(match[1]) * {"": 1, "k": 2**10, "K": 2**10, "M": 2**20}[match[2]]


def read_model(path: Path, weights: str = STORED) -> Model:
    """Reads a checkpoint's configuration and headers, to be held as the recipe ``weights`` says.

    Raises:
        CheckpointError: files are missing, broken or contradict each other.
        UnsupportedError: a configuration, a tensor or a recipe that shuntyard does not understand.
    """
    recipe = read_recipe(weights)
    checkpoint = open_checkpoint(path)
    matched = match_weights(checkpoint, alike=not recipe.rules)  # refuses what export would
    tensors = ((entry.name, entry.dtype, entry.nbytes) for header in checkpoint.headers for entry in header.tensors)
    model = Model(path, checkpoint.config, footprint.stored_bytes(checkpoint.config, tensors))
    resolved = model.resolved(weights)
    for module in resolved.modules:
        if module.kind == "experts" and module.layer is not None:
            check_alike(module, resolved.precision[module.name], matched.experts[module.layer])
    return model


def cache_type(resolved: Resolved) -> str:
    """The type of the KV cache under a recipe, as ``--kv`` names it.

    Raises:
        UnsupportedError: the recipe wants FP8 in some layers only.
    """
    kinds = resolved.kv_cache
    narrow = [name for name, kind in kinds.items() if kind == "fp8"]
    if narrow and len(narrow) < len(kinds):
        raise UnsupportedError(
            f"{resolved.recipe.where}: the KV cache is fp8 in {len(narrow)} of {len(kinds)} layers, as '{narrow[0]}'; "
            "plan counts caches of one type",
            hint="--kv fp8 or --kv bf16 counts all of them so",
        )
    return "fp8" if narrow else "bf16"


def check_request(model: Model, request: Request) -> Asked:
    """Completes a request.

    Raises:
        UnsupportedError: it asks for what the model or shuntyard cannot do; the hint says what can be asked.
    """
    config = model.config
    longest = config.max_position_embeddings
    context = min(longest, DEFAULT_CONTEXT) if request.context is None else request.context
    if context > longest:
        raise UnsupportedError(
            f"a context of {context:,} is beyond the model's max_position_embeddings, {longest:,}",
            hint="the model was not trained for it",
        )
    for name, value in (("context", context), ("batch", request.batch), ("tokens", request.tokens)):
        if not 1 <= value <= MOST:
            raise UnsupportedError(f"{name} is {value}, must be in 1..{MOST}", hint="it is a number of them")
    if not 0 <= request.reserve <= MOST * GIB:
        raise UnsupportedError("the reserve is negative or huge", hint="it is memory to leave free; 1 GiB is usual")
    resolved = model.resolved(request.weights)
    kv = cache_type(resolved) if request.kv is None else request.kv
    if kv not in KV_ITEM:
        raise UnsupportedError(f"a KV cache in '{kv:.40}' is not known", hint=f"one of {', '.join(KV_ITEM)}")
    obstacle = footprint.uneven(config, request.gpus) if request.gpus >= 1 else "anything"
    if obstacle is not None:
        possible = ", ".join(map(str, footprint.possible_gpus(config)))
        raise UnsupportedError(
            f"{request.gpus} GPUs cannot share {obstacle} evenly", hint=f"this model can be cut for {possible}"
        )
    asked = Asked(
        gpu=find_gpu(request.gpu),
        gpus=request.gpus,
        context=context,
        batch=request.batch,
        tokens=request.tokens,
        weights=request.weights,
        kv=kv,
        all_logits=request.all_logits,
        reserve=request.reserve,
    )
    if lacks_fp8(model, asked):
        raise UnsupportedError(
            f"gpu '{asked.gpu.name}' is {asked.gpu.target}, for which TensorRT compiles nothing that holds FP8",
            hint="--weights bf16 or int4-experts with --kv bf16, or a GPU from sm89 on",
        )
    return asked


def lacks_fp8(model: Model, asked: Asked) -> bool:
    """Whether the engine would hold FP8 and the GPU has none: TensorRT-RTX "cannot compile for target(s) sm80" then."""
    if asked.gpu.has_fp8:
        return False
    return asked.kv == "fp8" or "F8_E4M3" in {dtype for _, dtype in model.held(asked.weights).weights}


def budget_of(model: Model, asked: Asked) -> Budget:
    """What one GPU has to hold."""
    call = Call(asked.batch, asked.tokens, asked.context, asked.gpus, asked.all_logits)
    return Budget(
        weights=footprint.weights_per_gpu(model.config, model.held(asked.weights), asked.gpus),
        cache=footprint.kv_cache(model.config, asked.batch, asked.context, KV_ITEM[asked.kv], asked.gpus),
        live=largest_live_set(model.config, call),
        reserve=asked.reserve,
        usable=asked.gpu.usable,
    )
