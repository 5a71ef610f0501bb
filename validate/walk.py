"""Many emulations of one checkpoint, run layer by layer over the same windows of tokens, and compared with the first.

Emulations that agree in all modules up to a layer share its output, so that each further one costs the layers from its
first difference on; a layer's weights are prepared once for all that have them alike. What is in memory is one layer's
weights, the hidden states of the emulations at hand, and a few logits.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shuntyard.exporter import model
from shuntyard.exporter.config import Llama4Config
from shuntyard.exporter.parameters import kind_of
from shuntyard.validate import metrics
from shuntyard.validate.emulate import Emulation
from shuntyard.validate.logits import AT_ONCE
from shuntyard.validate.values import Tokens

Floats = NDArray[np.float64]

STATE_BYTES = 2**30
"""Hidden states that are held at once: emulations beyond it are run in further batches, the first again in each."""

TOKENS_AT_ONCE = 2**12
"""Of the windows that are run as one batch."""


@dataclass(frozen=True)
class Outcome:
    """An emulation against the first one. Means over a window's tokens, for each of ``n`` windows.

    ``router``: share of tokens whose experts are the same set, by MoE layer; empty without such layers.
    """

    tokens: NDArray[np.int64]  # [n] tokens of each window; those with a next one are one fewer
    kl: Floats  # [n] KL(first || this), nats
    nll: Floats  # [n] of the next token, nats
    top1: Floats  # [n] share of tokens with the same most likely next one
    router: dict[int, float]

    @property
    def mean_kl(self) -> float:
        """By token."""
        return float(self.kl @ self.tokens / self.tokens.sum())

    @property
    def mean_top1(self) -> float:
        """Share of all tokens."""
        return float(self.top1 @ self.tokens / self.tokens.sum())

    @property
    def mean_nll(self) -> float:
        """By token that has a next one."""
        counts = self.tokens - 1
        return float(self.nll @ counts / counts.sum())

    @property
    def perplexity(self) -> float:
        """exp of the mean loss."""
        return float(np.exp(min(self.mean_nll, 700.0)))


_ByWindow = tuple[NDArray[np.int64], Floats, Floats, Floats]
"""Tokens, KL, loss and agreement."""


class Walker:
    """Runs emulations over windows.

    Args:
        config: the checkpoint's.
        windows: tokens of each, at least 2.
        progress: hears how many layers of how many were run; a batch adds to both.
    """

    def __init__(
        self,
        config: Llama4Config,
        windows: Sequence[Tokens],
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        self.config, self._progress = config, progress
        self._rotary = model.RotaryTable(config)
        self._groups = list(_groups(windows))
        self.layers_run = self._planned = 0
        self._state_bytes = 4 * config.hidden_size * sum(len(window) for window in windows)

    def cost(self, emulations: Sequence[Emulation]) -> int:
        """Layers that :meth:`run` would run, each over all windows."""
        batches = ([emulations[i] for i in own] for own in self._batches(emulations))
        return sum(len(set(state)) for own in batches for state in self._states(own)[1:-1])

    def run(self, emulations: Sequence[Emulation]) -> list[Outcome]:
        """All against the first, which is compared with itself."""
        self._planned += self.cost(emulations)
        found: dict[int, Outcome] = {}
        for own in self._batches(emulations):
            found |= dict(zip(own, self._run([emulations[i] for i in own]), strict=True))
        return [found[i] for i in range(len(emulations))]

    def _batches(self, emulations: Sequence[Emulation]) -> Iterator[list[int]]:
        """Numbers of those that are run together; the first is of all batches."""
        most = max(2, STATE_BYTES // self._state_bytes)
        others = range(1, len(emulations))
        for begin in range(0, max(len(others), 1), most - 1):
            yield [0, *others[begin : begin + most - 1]]

    def _states(self, emulations: Sequence[Emulation]) -> list[list[int]]:
        """Behind the embedding, each layer and the head: of which group of emulations that are alike so far each is."""
        outer = [emulation.key(None) for emulation in emulations]
        found = [_numbered([key[0] for key in outer])]  # the embedding is the first of the modules
        for layer in range(self.config.num_hidden_layers):
            found.append(_numbered([(a, e.key(layer)) for a, e in zip(found[-1], emulations, strict=True)]))
        return [*found, _numbered(list(zip(found[-1], outer, strict=True)))]

    @torch.inference_mode()
    def _run(self, emulations: Sequence[Emulation]) -> list[Outcome]:
        c, (before, *layers, heads) = self.config, self._states(emulations)
        hidden = {own: self._embed(emulations[number]) for own, number in _firsts(before)}
        routers: list[dict[int, float]] = [{} for _ in emulations]
        for i, after in enumerate(layers):
            found: dict[int, list[Tensor]] = {}
            chosen: dict[int, list[Tensor]] = {}
            for own, number in _firsts(after):
                found[own], routed = self._layer(i, emulations[number], hidden[before[number]])
                chosen[own] = [_chosen(logits, c.num_experts_per_tok) for logits in routed]
                self.layers_run += 1
                self._progress(self.layers_run, self._planned)
            if c.is_moe(i):
                same = {own: _same(chosen[after[0]], experts) for own, experts in chosen.items()}
                for router, own in zip(routers, after, strict=True):
                    router[i] = same[own]
            hidden, before = found, after
        measured = self._heads([(emulations[n], hidden[before[n]]) for _, n in _firsts(heads)])
        return [Outcome(*measured[own], router) for own, router in zip(heads, routers, strict=True)]

    def _embed(self, emulation: Emulation) -> list[Tensor]:
        weight = emulation.outer("model.embed_tokens.weight")
        return [model.embed(tokens, weight, emulation.preparer.dtype) for tokens in self._groups]

    def _layer(self, index: int, emulation: Emulation, hidden: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """A layer's output ``[B, S, H]`` for each group of windows, and of MoE layers the router's logits."""
        weights = emulation.layer(index)
        try:
            found = [self._call(index, weights, own) for own in hidden]
        except ValueError as error:
            if "NaN" not in str(error):
                raise
            # The routing op refuses it. What comes of it is told by its KL, which is then no number either.
            return [torch.full_like(own, torch.nan) for own in hidden], []
        return [out for out, _ in found], [router for _, router in found if router is not None]

    def _call(self, index: int, weights: dict[str, Tensor], hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        c, kind, (batch, length, _) = self.config, kind_of(self.config, index), hidden.shape
        shape = (batch, c.num_key_value_heads, c.cache_rows(index, length), c.head_dim)
        past = torch.zeros(shape, dtype=hidden.dtype), torch.zeros(shape, dtype=hidden.dtype)
        outs, routers = [], []
        edges = [*range(0, length, c.attention_chunk_size or length), length]
        for begin, end in pairwise(edges):
            positions = torch.arange(begin, end)[None].expand(batch, -1)
            places = self._rotary(positions) if kind.rope else (positions,)
            out = model.decoder_layer(c, kind, weights, hidden[:, begin:end], places, past)
            past = out.present_key, out.present_value
            outs.append(out.hidden)
            if out.router is not None:
                routers.append(out.router.view(batch, end - begin, -1))
        return torch.cat(outs, dim=1), torch.cat(routers, dim=1) if routers else None

    def _heads(
        self, runs: list[tuple[Emulation, list[Tensor]]]
    ) -> list[tuple[NDArray[np.int64], Floats, Floats, Floats]]:
        """Tokens, KL, loss and agreement by window of each run, against the first."""
        c, rows = self.config, max(1, AT_ONCE // self.config.vocab_size)
        name = "model.embed_tokens.weight" if c.tie_word_embeddings else "lm_head.weight"
        weights = [(emulation.outer("model.norm.weight"), emulation.outer(name)) for emulation, _ in runs]
        sums = np.zeros((len(runs), 3, sum(len(group) for group in self._groups)))
        counts = np.array([group.shape[1] for group in self._groups for _ in group], np.int64)
        places = [(g, b) for g, group in enumerate(self._groups) for b in range(len(group))]
        for window, (g, b) in enumerate(places):
            tokens = self._groups[g][b].numpy()
            for begin in range(0, len(tokens), rows):
                targets = tokens[begin + 1 : begin + 1 + rows]
                at = torch.arange(begin, min(begin + rows, len(tokens)))[None]
                base: Floats | None = None
                for run, (_, hidden) in enumerate(runs):
                    logits = model.head(c, hidden[g][b : b + 1], at, *weights[run])[0].numpy()
                    logs = metrics.log_softmax(logits)
                    base = logs if base is None else base
                    sums[run, 0, window] += np.maximum(0.0, metrics.kl_of_logs(base, logs)).sum()
                    sums[run, 1, window] += metrics.loss_of_logs(logs[: len(targets)], targets).sum()
                    sums[run, 2, window] += (base.argmax(axis=1) == logs.argmax(axis=1)).sum()
        return [(counts, kl / counts, nll / (counts - 1), top1 / counts) for kl, nll, top1 in sums]


def _groups(windows: Sequence[Tokens]) -> Iterator[Tensor]:
    """Windows of one length side by side, ``[B, S]``, in their order within a length."""
    for length in dict.fromkeys(len(window) for window in windows):
        own = [torch.from_numpy(np.ascontiguousarray(window)) for window in windows if len(window) == length]
        most = max(1, TOKENS_AT_ONCE // length)
        for begin in range(0, len(own), most):
            yield torch.stack(own[begin : begin + most])


def _numbered(keys: Sequence[Hashable]) -> list[int]:
    """Equal keys get one number, in the order in which they come."""
    numbers: dict[Hashable, int] = {}
    return [numbers.setdefault(key, len(numbers)) for key in keys]


def _firsts(groups: Sequence[int]) -> list[tuple[int, int]]:
    """Each group's number, and its first member's."""
    return [(own, groups.index(own)) for own in sorted(set(groups))]


def _chosen(logits: Tensor, top_k: int) -> Tensor:
    """Which experts each token goes to, as a set: ``[B, S, E]`` -> bool of that shape; the first of equal ones."""
    best = torch.sort(logits, dim=-1, descending=True, stable=True).indices[..., :top_k]
    return torch.zeros_like(logits, dtype=torch.bool).scatter_(-1, best, torch.ones_like(best, dtype=torch.bool))


def _same(first: list[Tensor], second: list[Tensor]) -> float:
    """Share of tokens whose experts are the same; of none, where there are no experts to tell."""
    if len(first) != len(second):
        return 0.0
    found = torch.cat([(a == b).all(-1).flatten() for a, b in zip(first, second, strict=True)])
    return float(found.double().mean())
