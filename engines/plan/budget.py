"""What is asked of ``plan``, what is known of the checkpoint, and what one GPU then has to hold."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from shuntyard.engines.plan import footprint
from shuntyard.engines.plan.activations import Call, LiveSet, largest_live_set
from shuntyard.engines.plan.footprint import RECIPES, STORED, Cache, Component, StoredBytes
from shuntyard.engines.plan.gpus import GIB, Gpu, find_gpu
from shuntyard.errors import UnsupportedError
from shuntyard.exporter.checkpoint import open_checkpoint
from shuntyard.exporter.config import Llama4Config
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
    weights: str = STORED
    kv: str = "bf16"
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
    _held: dict[str, StoredBytes] = field(default_factory=dict, compare=False, repr=False)

    def held(self, weights: str) -> StoredBytes:
        """What an engine of a recipe, or of the weights as they are stored, holds in all."""
        if weights not in self._held:
            if weights == STORED:
                self._held[weights] = footprint.as_in_engine(self.stored)
            else:
                self._held[weights] = footprint.held_bytes(self.config, RECIPES[weights])
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


def read_model(path: Path) -> Model:
    """Reads a checkpoint's configuration and headers.

    Raises:
        CheckpointError: files are missing, broken or contradict each other.
        UnsupportedError: a configuration or a tensor that shuntyard does not understand.
    """
    checkpoint = open_checkpoint(path)
    match_weights(checkpoint)  # refuses what export would
    tensors = ((entry.name, entry.dtype, entry.nbytes) for header in checkpoint.headers for entry in header.tensors)
    return Model(path, checkpoint.config, footprint.stored_bytes(checkpoint.config, tensors))


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
    if request.weights != STORED and request.weights not in RECIPES:
        raise UnsupportedError(
            f"weights '{request.weights:.40}' are not known", hint=f"one of {', '.join((STORED, *RECIPES))}"
        )
    if request.kv not in KV_ITEM:
        raise UnsupportedError(f"a KV cache in '{request.kv:.40}' is not known", hint=f"one of {', '.join(KV_ITEM)}")
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
        kv=request.kv,
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
