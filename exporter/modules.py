"""The modules whose precision can be chosen: the model's matrices, under the checkpoint's names.

The routed experts of a layer are one module, ``model.layers.N.feed_forward.experts``: they are stored alike. Norms and
biases are none: they keep their type. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from shuntyard.exporter.config import Llama4Config
from shuntyard.exporter.parameters import kind_of, layer_weights

Kind = Literal["embedding", "router", "linear", "experts"]

EXPERTS = ".feed_forward.experts"
ROUTER = ".feed_forward.router"


@dataclass(frozen=True)
class Module:
    """``copies`` matrices ``[out, into]`` of each of ``shapes``; ``layer`` None: of no layer."""

    name: str
    kind: Kind
    layer: int | None
    shapes: tuple[tuple[int, int], ...]
    copies: int = 1

    @property
    def values(self) -> int:
        """How many values it holds."""
        return self.copies * sum(out * into for out, into in self.shapes)

    @property
    def can_be_quantised(self) -> bool:
        """Embeddings are looked up, routers decide: both stay plain."""
        return self.kind in ("linear", "experts")

    @property
    def is_fixed(self) -> bool:
        """Whether no rule changes it: a router computes in fp32 from what is stored."""
        return self.kind == "router"


def modules(config: Llama4Config) -> Iterator[Module]:
    """All of them, in the model's order. With tied embeddings ``lm_head`` is the embedding, and no module."""
    hidden, expert = config.hidden_size, config.intermediate_size
    vocabulary = (config.vocab_size, hidden)
    yield Module("model.embed_tokens", "embedding", None, (vocabulary,))
    for i in range(config.num_hidden_layers):
        for name, shape in layer_weights(config, kind_of(config, i)).items():
            own = f"model.layers.{i}.{name}"
            if name.endswith(".experts.gate_up_proj"):
                shapes = ((expert, hidden), (expert, hidden), (hidden, expert))
                yield Module(own.removesuffix(".gate_up_proj"), "experts", i, shapes, config.num_local_experts)
            elif len(shape) == 2 and name.endswith(".weight"):
                kind: Kind = "router" if name.endswith(".router.weight") else "linear"
                yield Module(own.removesuffix(".weight"), kind, i, ((shape[0], shape[1]),))
    if not config.tie_word_embeddings:
        yield Module("lm_head", "linear", None, (vocabulary,))


def split_name(name: str) -> tuple[int | None, str]:
    """The layer of a module and its name within it; None and its own name, where it is of no layer."""
    parts = name.split(".", 3)
    return (int(parts[2]), parts[3]) if parts[:2] == ["model", "layers"] else (None, name)


def attentions(config: Llama4Config) -> list[str]:
    """The modules that hold a KV cache: ``model.layers.N.self_attn``."""
    return [f"model.layers.{i}.self_attn" for i in range(config.num_hidden_layers)]
