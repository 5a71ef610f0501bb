"""Looks for tokens that a model's first router all sends to the same expert.

Routing of a whole batch to one expert is the worst load that a mixture of experts can get, and the rarest in a text.
A token's choice depends on its context, so tokens that choose alike alone are tried together, and those that change
their minds are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from shuntyard.validate.stack import Stack
from shuntyard.validate.values import Array, Tokens, module_name

CANDIDATES = 512
"""Tokens that are tried alone, spread over the vocabulary."""

MOST_DISTINCT = 32
"""Tokens that a sequence is made of, at most."""

ROUNDS = 3
"""Times that sequences are run; each reads the layers up to the first router from disk."""

SEED = 20250405


@dataclass(frozen=True)
class OneWay:
    """A sequence most of whose tokens choose the same expert, be it as one of several."""

    tokens: Tokens
    layer: int
    expert: int
    share: float  # of the tokens

    @property
    def module(self) -> str:
        """The layer that routes, as the checkpoint calls it."""
        return module_name(self.layer, "")

    @property
    def note(self) -> str:
        """For the report."""
        return (
            f"all to one expert: {self.share:.0%} of {len(self.tokens)} tokens ({len(set(self.tokens.tolist()))} "
            f"different ones) choose expert {self.expert} of {self.module}"
        )


def spread(vocab_size: int, count: int = CANDIDATES, seed: int = SEED) -> list[int]:
    """At most so many token ids, one drawn from each of as many equal stretches of the vocabulary; ascending."""
    edges = np.linspace(0, vocab_size, min(count, vocab_size) + 1).astype(np.int64)
    return [int(token) for token in np.random.default_rng(seed).integers(edges[:-1], edges[1:])]


def one_way(stack: Stack, length: int, candidates: Sequence[int] | None = None) -> OneWay | None:
    """A sequence of ``length`` tokens that go to one expert of the first MoE layer, and the share that really does.

    Args:
        stack: whose router decides.
        length: tokens of the sequence, at least 1.
        candidates: token ids to choose from; default :func:`spread` over the vocabulary.

    Returns:
        The best of those tried: the largest share, of these the one of most different tokens, two at least wherever
        two choose alike. None if the model has no experts.
    """
    c = stack.config
    if not c.moe_layers:
        return None
    tried = np.array(list(candidates or spread(c.vocab_size))[:CANDIDATES], np.int64)
    margins = np.concatenate(_margins(stack, [tried[i : i + 1] for i in range(len(tried))]))  # [candidates, E]
    expert = int((margins > 0).sum(axis=0).argmax())  # the most popular
    order = np.argsort(-margins[:, expert], kind="stable")
    willing = tried[order][: max(1, int((margins[:, expert] > 0).sum()))]  # the most willing first
    sizes = {min(n, len(willing), length) for n in (2, 4, 8, 16, MOST_DISTINCT)}
    pools = [willing[:n] for n in sorted(sizes)]
    best: OneWay | None = None
    for _ in range(ROUNDS):
        sequences = [np.resize(pool, length) for pool in pools]
        refined: dict[bytes, Tokens] = {}
        for pool, tokens, margin in zip(pools, sequences, _margins(stack, sequences), strict=True):
            stays = margin[:, expert] > 0
            found = OneWay(tokens, min(c.moe_layers), expert, float(stays.mean()))
            if best is None or _rank(found) > _rank(best):
                best = found
            shares = np.array([stays[tokens == token].mean() for token in pool])
            loyal = pool[shares == 1]
            if len(loyal) < 2:  # then the two that stay most often
                loyal = pool[np.argsort(-shares, kind="stable")][:2]
            if len(loyal) < len(pool):
                refined[loyal.tobytes()] = loyal
        pools = list(refined.values())
        if not pools:
            break
    return best


def _rank(found: OneWay) -> tuple[float, int]:
    return found.share, len(set(found.tokens.tolist()))


def _margins(stack: Stack, sequences: list[Tokens]) -> list[Array]:
    """By how much each token of each sequence chooses an expert: ``[S, E]``, above 0 if it is chosen.

    A chosen expert's router logit less the best rejected one's; a rejected one's less the worst chosen one's.
    """
    c = stack.config
    hidden = list(stack.embed(sequences))
    for layer in range(min(c.moe_layers)):
        hidden = [found.hidden for found in stack.layer(layer, hidden)]
    margins = []
    for found in stack.layer(min(c.moe_layers), hidden):
        assert found.router is not None
        margins.append(_choice(found.router, c.num_experts_per_tok))
    return margins


def _choice(logits: Array, chosen: int) -> Array:
    """:func:`_margins` of router logits ``[S, E]`` where so many are chosen; equals go to the lower index."""
    count = logits.shape[1]
    if chosen == count:
        return np.ones_like(logits)
    order = np.argsort(-logits, axis=1, kind="stable")
    rank = np.argsort(order, axis=1, kind="stable")  # of each expert
    last, next_ = (np.take_along_axis(logits, order[:, i : i + 1], axis=1) for i in (chosen - 1, chosen))
    tiny = np.finfo(np.float32).tiny  # a tie is won all the same
    margins: Array = np.where(rank < chosen, np.maximum(logits - next_, tiny), np.minimum(logits - last, 0))
    return margins
