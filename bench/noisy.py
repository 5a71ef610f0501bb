"""Engines of known quality: the miniature's weights with random relative noise, held to the weights as they are.

Rounding to a format's mantissa is such noise, of about 2^-9 for bf16 and 2^-12 for fp16; another seed is another build
of the same quality. Everything runs in fp32 in the eager model, layer by layer, so that a layer can also be fed what
the original's layers were fed. What comes out are the numbers that a validation keeps of each sequence.
"""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from shuntyard.engines.text import Tokenizer
from shuntyard.exporter.checkpoint import open_checkpoint
from shuntyard.exporter.config import Llama4Config
from shuntyard.exporter.model import RotaryTable, Weights, decoder_layer, embed, head
from shuntyard.exporter.parameters import kind_of, layer_weights
from shuntyard.validate import metrics
from shuntyard.validate.report import SequenceMetrics

MINIATURE = Path(__file__).resolve().parents[1] / "examples" / "miniature"
BATCH = 32  # windows at a time; logits in float64 are 32 * 128 * 2048 * 8 bytes


@dataclass(frozen=True)
class Pass:
    """One batch through a model. ``inputs[i] [B, S, H]`` is what layer ``i`` was fed, the last what the head was."""

    inputs: list[Tensor]
    routers: list[Tensor]  # f32 [B, S, E] of each MoE layer
    logits: NDArray[np.float32]  # [B, S, V]


class Miniature:
    """The trained miniature and its held-out text, in windows of ``length`` tokens."""

    def __init__(self, length: int, count: int) -> None:
        self.config: Llama4Config = open_checkpoint(MINIATURE).config
        self.weights: dict[str, Tensor] = {}
        for shard in sorted(MINIATURE.glob("*.safetensors")):
            self.weights |= {name: value.float() for name, value in load_file(shard).items()}
        self.rotary = RotaryTable(self.config)
        text = (MINIATURE / "held_out.txt").read_text(encoding="utf-8")
        first, *body = Tokenizer.from_directory(MINIATURE).encode(text)
        whole = len(body) // (length - 1)
        if whole < count:
            raise SystemExit(f"the held-out text has {whole} windows of {length} tokens, not {count}")
        # Spread over the whole text: lexicon and Bible are of different kinds.
        places = np.linspace(0, whole - 1, count).round().astype(int)
        rows = [[first, *body[i * (length - 1) : (i + 1) * (length - 1)]] for i in places]
        self.windows = np.array(rows, np.int64)  # [count, length]
        self._original: list[Pass] = []
        with torch.inference_mode():
            for batch in self._batches():
                self._original.append(self._pass(self.weights, batch))

    def _batches(self) -> list[Tensor]:
        return list(torch.from_numpy(self.windows).split(BATCH))

    def noisy(self, size: float, seed: int) -> dict[str, Tensor]:
        """Every weight times ``1 + size * normal``; norms too."""
        generator = torch.Generator().manual_seed(seed)
        return {
            name: value * (1 + size * torch.randn(value.shape, generator=generator))
            for name, value in self.weights.items()
        }

    def _layer(self, w: Weights, layer: int, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        """One layer on whole sequences ``[B, S, H]``, a chunk a call; and its router's logits."""
        c, (batch, length, _) = self.config, hidden.shape
        kind = kind_of(c, layer)
        own = {name: w[f"model.layers.{layer}.{name}"] for name in layer_weights(c, kind)}
        shape = (batch, c.num_key_value_heads, c.cache_rows(layer, length), c.head_dim)
        past = (torch.zeros(shape), torch.zeros(shape))
        outs, routers = [], []
        step = c.attention_chunk_size or length
        for begin in range(0, length, step):
            piece = hidden[:, begin : begin + step]
            positions = torch.arange(begin, begin + piece.shape[1]).expand(batch, -1)
            places = self.rotary(positions) if kind.rope else (positions,)
            out = decoder_layer(c, kind, own, piece, places, past)
            past = (out.present_key, out.present_value)
            outs.append(out.hidden)
            if out.router is not None:
                routers.append(out.router.view(batch, piece.shape[1], -1))
        return torch.cat(outs, 1), torch.cat(routers, 1) if routers else None

    def _pass(self, w: Weights, ids: Tensor) -> Pass:
        hidden = embed(ids, w["model.embed_tokens.weight"], torch.float32)
        inputs, routers = [hidden], []
        for layer in range(self.config.num_hidden_layers):
            hidden, router = self._layer(w, layer, hidden)
            inputs.append(hidden)
            routers += [] if router is None else [router]
        every = torch.arange(ids.shape[1]).expand_as(ids)
        logits = head(self.config, hidden, every, w["model.norm.weight"], w["lm_head.weight"])
        return Pass(inputs, routers, logits.numpy())

    def loss(self, w: Weights) -> float:
        """Mean negative log-likelihood of all windows, in nats."""
        with torch.inference_mode():
            losses = [
                functional.cross_entropy(torch.from_numpy(self._pass(w, ids).logits)[:, :-1].mT, ids[:, 1:])
                * (len(ids) / len(self.windows))
                for ids in self._batches()
            ]
        return float(torch.stack(losses).double().sum())

    def measure(self, w: Weights) -> list[SequenceMetrics]:
        """Every window's numbers for an engine with these weights."""
        out: list[SequenceMetrics] = []
        with torch.inference_mode():
            for ids, original in zip(self._batches(), self._original, strict=True):
                logits = self._pass(w, ids).logits
                missed, squares = self._forced(w, original)
                for row in range(len(ids)):
                    label = f"window {len(out)}"
                    tokens = ids[row].numpy()
                    free = _compare(label, tokens, original.logits[row], logits[row])
                    out.append(
                        dataclasses.replace(free, routing_miss=float(missed[row]), forced_error=float(squares[row]))
                    )
        return out

    def _forced(self, w: Weights, original: Pass) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Each layer alone on the original's input: share of other experts, rms relative error; each ``[B]``."""
        missed, squares, seen = [], [], 0
        for layer in range(self.config.num_hidden_layers):
            out, router = self._layer(w, layer, original.inputs[layer])
            right = original.inputs[layer + 1]
            # Of what the layer adds, as the residual stream would hide the error of a single one.
            added = right - original.inputs[layer]
            squares.append((out - right).square().sum((1, 2)) / added.square().sum((1, 2)))
            if router is not None:
                missed.append((router.argmax(-1) != original.routers[seen].argmax(-1)).double().mean(1))
                seen += 1
        return torch.stack(missed).mean(0).numpy(), torch.stack(squares).mean(0).sqrt().double().numpy()


def _compare(
    label: str, ids: NDArray[np.int64], right: NDArray[np.float32], ours: NDArray[np.float32]
) -> SequenceMetrics:
    """What the logits ``[S, V]`` of one sequence say."""
    best, theirs = (np.argpartition(-logits, 5, axis=-1)[:, :5] for logits in (ours, right))
    overlap = (best[:, :, None] == theirs[:, None, :]).any(2).mean()
    return SequenceMetrics(
        label=label,
        sha256=hashlib.sha256(ids.astype("<i8").tobytes()).hexdigest(),
        tokens=len(ids),
        nll=float(metrics.negative_log_likelihood(ours[:-1], ids[1:]).mean()),
        nll_reference=float(metrics.negative_log_likelihood(right[:-1], ids[1:]).mean()),
        kl=float(metrics.kl(right, ours).mean()),
        top1_miss=1 - metrics.top1_agreement(right, ours),
        top5_miss=float(1 - overlap),
        routing_miss=None,
        forced_error=None,
    )
