"""An exported graph, or an ONNX Runtime engine, as a stack: its layers cut out and run one by one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import onnxruntime

from shuntyard.engines.cut import HIDDEN, CutGraph, Part
from shuntyard.engines.onnxruntime_runner import NUMPY_TYPES
from shuntyard.exporter.config_file import load_config_file
from shuntyard.exporter.parameters import kind_of
from shuntyard.validate.stack import Stack, pieces
from shuntyard.validate.values import Array, LayerValues, Tokens

TOKENS_AT_ONCE = 2048
"""Of a batch: bounds the memory of what a layer computes."""


def graph_label(*, optimise: bool) -> str:
    """What a ``GraphStack`` calls itself."""
    return f"{'engine' if optimise else 'graph'}'s layers, ONNX Runtime {onnxruntime.__version__}"


class GraphStack(Stack):
    """Each call of the graph in a session of its own, KV cache included: prefill in pieces, then single tokens."""

    def __init__(self, graph: Path, dtype: str, *, optimise: bool, longest: int | None = None) -> None:
        self.label, self.dtype = graph_label(optimise=optimise), dtype
        self.config = load_config_file(graph.parent / "config.json").text
        self._graph = CutGraph(graph, optimise=optimise)
        self._type, self._longest = NUMPY_TYPES[dtype], longest

    def wiring(self) -> list[tuple[str, str]]:
        """See :class:`Stack`."""
        return self._graph.wiring(self.config.num_hidden_layers)

    def embed(self, sequences: Sequence[Tokens]) -> Iterator[Array]:
        """See :class:`Stack`."""
        part = self._graph.part("model.embed_tokens")
        for tokens in sequences:
            yield part.run({"input_ids": tokens[None]})["model.embed_tokens"][0].astype(np.float32)

    def layer(self, index: int, hidden: Sequence[Array]) -> Iterator[LayerValues]:
        """See :class:`Stack`. Sequences of the same length are run as a batch, as an engine would."""
        part = self._graph.part(f"model.layers.{index}")
        found: dict[int, LayerValues] = {}
        for rows in _batches([len(array) for array in hidden]):
            batch = np.stack([hidden[row] for row in rows]).astype(self._type)
            found |= dict(zip(rows, self._run(part, index, batch), strict=True))
        for row in range(len(hidden)):
            yield found.pop(row)

    def _run(self, part: Part, index: int, hidden: Array) -> list[LayerValues]:
        c, kind, (batch, length, _) = self.config, kind_of(self.config, index), hidden.shape
        names = [f"past_key_values.{index}.{name}" for name in ("key", "value")]
        # A layer that is wired to another's cache gets an empty one: what it should have read is not there then.
        caches = {*names, *(name for name in part.inputs if name.startswith("past_key_values."))}
        shape = (batch, c.num_key_value_heads, c.cache_rows(index, length), c.head_dim)
        cache = {name: np.zeros(shape, self._type) for name in caches}
        found: list[list[Array]] = []
        chunk = c.attention_chunk_size
        layer = f"model.layers.{index}"
        inside = ["self_attn", "feed_forward", "", "input_layernorm", "post_attention_layernorm"]
        inside += ["feed_forward.router", "feed_forward.shared_expert"] * kind.moe
        for begin, end in pieces(length, chunk, self._longest):
            positions = np.arange(begin, end)
            ids = np.ascontiguousarray(np.broadcast_to(positions, (batch, end - begin)))
            out = part.run({HIDDEN: hidden[:, begin:end], "position_ids": ids, **cache})
            written = dict(zip(names, list(out.values())[1:3], strict=True))  # by place: the name may be another's
            cache |= written
            rows = positions % chunk if kind.rope and chunk else positions
            values = [value[:, :, rows].swapaxes(1, 2) for value in written.values()]
            parts = [out[f"{layer}.{name}" if name else layer] for name in inside]
            found.append(values + [part.reshape(batch, end - begin, -1) for part in parts])
        whole = [np.concatenate(parts, axis=1).astype(np.float32) for parts in zip(*found, strict=True)]
        return [LayerValues(*(value[row] for value in whole)) for row in range(batch)]

    def head(self, hidden: Sequence[Array]) -> Iterator[Array]:
        """See :class:`Stack`."""
        part = self._graph.part("lm_head")
        for array in hidden:
            feeds = {HIDDEN: array[None].astype(self._type), "logits_indices": np.arange(len(array))[None]}
            yield part.run(feeds)["logits"][0]


def _batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Rows of the same length together, of at most ``TOKENS_AT_ONCE`` tokens."""
    for length in sorted(set(lengths)):
        rows = [row for row, own in enumerate(lengths) if own == length]
        size = max(1, TOKENS_AT_ONCE // length)
        yield from (rows[i : i + size] for i in range(0, len(rows), size))
