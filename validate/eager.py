"""The eager model, the code that is traced for export, as a stack."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from shuntyard.exporter import model
from shuntyard.exporter.config import Llama4Config
from shuntyard.exporter.config_file import load_config_file
from shuntyard.exporter.parameters import LayerKind, kind_of
from shuntyard.validate.dequantise import DequantisedCheckpoint
from shuntyard.validate.stack import Stack, pieces
from shuntyard.validate.values import Array, LayerValues, Tokens


class WeightSource(Protocol):
    """Where the weights come from, as the model takes them: tensors, or products in place of matrices."""

    def outer(self, name: str) -> Tensor:
        """One parameter, such as ``model.norm.weight``."""

    def layer(self, index: int) -> dict[str, Tensor]:
        """A layer's parameters, by their names below ``model.layers.INDEX.``."""


TORCH_TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def eager_label() -> str:
    """What an ``EagerStack`` calls itself."""
    return f"eager model, torch {torch.__version__}"


class EagerStack(Stack):
    """Our model in PyTorch, in any compute type, its weights dequantised: prefill in pieces, then single tokens."""

    def __init__(self, checkpoint: Path, dtype: str = "fp32", weights: WeightSource | None = None) -> None:
        self.label, self.dtype = eager_label(), dtype
        self.config = load_config_file(checkpoint / "config.json").text
        self._weights = weights or DequantisedCheckpoint(checkpoint)
        self._type = TORCH_TYPES[dtype]
        self._rotary = model.RotaryTable(self.config)

    def embed(self, sequences: Sequence[Tokens]) -> Iterator[Array]:
        """See :class:`Stack`."""
        weight = self._weights.outer("model.embed_tokens.weight")
        for tokens in sequences:
            yield model.embed(torch.from_numpy(tokens), weight, self._type).float().numpy()

    def layer(self, index: int, hidden: Sequence[Array]) -> Iterator[LayerValues]:
        """See :class:`Stack`."""
        weights = self._weights.layer(index)
        for array in hidden:
            own = torch.tensor(array)[None].to(self._type)
            try:
                yield self._run(index, weights, own)
            except ValueError:  # the routing op refuses NaN: what comes before it can still be told
                yield self._run(index, weights, own, route=False)

    @torch.no_grad()
    def _run(self, index: int, weights: dict[str, Tensor], hidden: Tensor, *, route: bool = True) -> LayerValues:
        c, kind, length = self.config, kind_of(self.config, index), hidden.shape[1]
        shape = (1, c.num_key_value_heads, c.cache_rows(index, length), c.head_dim)
        past = torch.zeros(shape, dtype=self._type), torch.zeros(shape, dtype=self._type)
        found: list[list[Tensor]] = []
        for begin, end in pieces(length, c.attention_chunk_size):
            positions = torch.arange(begin, end)[None]
            places = self._rotary(positions) if kind.rope else (positions,)
            run = model.decoder_layer if route else _without_routing
            out = run(c, kind, weights, hidden[:, begin:end], places, past)
            past = out.present_key, out.present_value
            rows = places[0][0]
            values = [part[0, :, rows].transpose(0, 1) for part in past]
            values += [out.attention[0], out.feed_forward[0], out.hidden[0]]
            values += [out.attention_input[0], out.feed_forward_input[0]]
            found.append(values + [part for part in (out.router, out.shared) if part is not None])
        return LayerValues(*(torch.cat(parts).float().numpy() for parts in zip(*found, strict=True)))

    def head(self, hidden: Sequence[Array]) -> Iterator[Array]:
        """See :class:`Stack`."""
        norm = self._weights.outer("model.norm.weight")
        tied = self.config.tie_word_embeddings
        weight = self._weights.outer("model.embed_tokens.weight" if tied else "lm_head.weight")
        for array in hidden:
            wide = torch.tensor(array)[None].to(self._type)
            yield model.head(self.config, wide, torch.arange(len(array))[None], norm, weight)[0].numpy()


def _without_routing(
    config: Llama4Config,
    kind: LayerKind,
    w: dict[str, Tensor],
    hidden: Tensor,
    places: tuple[Tensor, ...],
    past: tuple[Tensor, Tensor],
) -> model.LayerOutputs:
    """A layer up to its attention; NaN behind it."""
    _, key, value, attended, before, normed = model.attention_half(config, kind, w, hidden, places, past)
    nothing = torch.full_like(hidden, torch.nan)
    logits = torch.full((hidden.shape[1], config.num_local_experts), torch.nan)
    return model.LayerOutputs(nothing, key, value, attended, nothing, before, normed, logits, nothing[0])
