"""Runs a whole engine over sequences, in ragged batches, and keeps what it gave by sequence."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Many
from dataclasses import dataclass

import numpy as np

from shuntyard.engines.engine import Engine, Recording
from shuntyard.exporter.config import Llama4Config
from shuntyard.validate.values import Array, LayerValues, Sequence

LOGITS_AT_ONCE = 2**28
"""Logits of a batch that are held at once: 1 GiB."""


@dataclass
class WholeRun:
    """What an engine gave for one sequence, or for its first ``S`` tokens."""

    row: int  # of the sequence among all that are compared
    sequence: Sequence
    logits: Array  # [S, V]
    keys: list[Array]  # of each layer [S, G, D]
    values: list[Array]
    inside: dict[str, Array]  # [S, ...] by name; of a marked engine

    @property
    def length(self) -> int:
        """``S``, also when the logits have been dropped."""
        return len(self.keys[0])

    def embedding(self) -> Array:
        """What goes into the first layer; of a marked engine."""
        return self.inside["model.embed_tokens"]

    def hidden_before(self, layer: int) -> Array:
        """What goes into a layer, ``[S, H]``, or into the head; of a marked engine."""
        return self.inside[f"model.layers.{layer - 1}"] if layer else self.embedding()

    def layer(self, layer: int) -> LayerValues:
        """One layer's values; of a marked engine."""
        name, inside = f"model.layers.{layer}", self.inside
        return LayerValues(
            self.keys[layer],
            self.values[layer],
            inside[f"{name}.self_attn"],
            inside[f"{name}.feed_forward"],
            inside[name],
            inside[f"{name}.input_layernorm"],
            inside[f"{name}.post_attention_layernorm"],
            inside.get(f"{name}.feed_forward.router"),
            inside.get(f"{name}.feed_forward.shared_expert"),
        )


def run_whole(
    engine: Engine, sequences: Many[Sequence], rows: Many[int], decode_from: int | None = None
) -> Iterator[WholeRun]:
    """The runs of the sequences in ``rows``, in that order; batches are as large as the engine and memory allow.

    Raises:
        NotFiniteError: the engine computed NaN or infinity.
    """
    longest = max(len(sequences[row].tokens) for row in rows)
    fit = max(1, LOGITS_AT_ONCE // (longest * engine.manifest.vocab_size))
    size = min(engine.manifest.limits.max_batch, fit)
    for begin in range(0, len(rows), size):
        batch = [sequences[row] for row in rows[begin : begin + size]]
        lengths = [len(s.tokens) for s in batch]
        tokens = np.zeros((len(batch), max(lengths)), np.int64)
        for row, s in enumerate(batch):
            tokens[row, : lengths[row]] = s.tokens
        found = engine.record(tokens, lengths, decode_from=decode_from)
        for row, s in enumerate(batch):
            yield _run(found, row, rows[begin + row], s)


def _run(found: Recording, place_in_batch: int, row: int, sequence: Sequence) -> WholeRun:
    place = place_in_batch, slice(0, len(sequence.tokens))
    return WholeRun(
        row,
        sequence,
        found.logits[place],
        [key[place] for key in found.keys],
        [value[place] for value in found.values],
        {name: value[place] for name, value in found.inside.items()},
    )


def decode_split(config: Llama4Config, longest: int, decode: int) -> int:
    """From where on tokens are fed one at a time: the last ``decode``, or more if a chunk's edge lies further back."""
    chunk = config.attention_chunk_size
    split = max(1, longest - decode)
    edge = 0 if chunk is None else (longest - 1) // chunk * chunk
    return split if edge > split or edge == 0 else max(1, edge - 16)
