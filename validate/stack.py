"""A stack: anything that can embed tokens, run one layer on given hidden states, and make logits.

transformers, the eager model, an exported graph and an ONNX Runtime engine are stacks, so any two of them can be
compared, layer by layer, each fed its own values (free-running) or the other's (teacher-forced).
"""

from __future__ import annotations

import abc
from collections.abc import Iterator, Sequence

from shuntyard.exporter.config import Llama4Config
from shuntyard.validate.values import Array, LayerValues, Tokens


class Stack(abc.ABC):
    """One model, run a layer at a time over all sequences, so that memory is one layer's.

    Sequences are independent: each begins at position 0 with an empty cache. Arrays that come out are float32.
    """

    label: str  # for people
    dtype: str  # "fp32", "fp16", "bf16": what it computes in
    config: Llama4Config

    def wiring(self) -> list[tuple[str, str]]:
        """Parts that the whole model connects otherwise than running them one after the other does, and how."""
        return []

    @abc.abstractmethod
    def embed(self, sequences: Sequence[Tokens]) -> Iterator[Array]:
        """``i64 [S]`` of each sequence -> hidden ``[S, H]`` of each."""

    @abc.abstractmethod
    def layer(self, index: int, hidden: Sequence[Array]) -> Iterator[LayerValues]:
        """Layer ``index`` on the hidden states ``[S, H]`` that go into it, of each sequence."""

    @abc.abstractmethod
    def head(self, hidden: Sequence[Array]) -> Iterator[Array]:
        """Final norm and ``lm_head``: ``[S, H]`` of each sequence -> logits ``[S, V]`` of each."""

    def head_slack(self, hidden: Sequence[Array]) -> Iterator[Array] | None:
        """By how much rounding alone may turn logits: root mean square and largest, ``[S, 2]``; None: not at all."""
        return None


SINGLES = 4
"""So many tokens at the end of a sequence are fed one at a time, as generation does."""


def pieces(length: int, chunk: int | None, longest: int | None = None) -> Iterator[tuple[int, int]]:
    """Where each call begins and ends: at chunks' edges, after ``longest`` tokens, and the last tokens one by one."""
    begin = 0
    while begin < length:
        edge = length if chunk is None else (begin // chunk + 1) * chunk
        end = min(edge, length, begin + (longest or length))
        singles = max(1, length - SINGLES)
        end = begin + 1 if begin >= singles else min(end, singles)
        yield begin, end
        begin = end
