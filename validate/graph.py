"""An exported graph, or an ONNX Runtime engine, as a stack: its layers cut out and run one by one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from shuntyard.engines.cut import HIDDEN, CutGraph, Part
from shuntyard.exporter.config_file import load_config_file
from shuntyard.exporter.parameters import kind_of
from shuntyard.validate.stack import Stack, pieces
from shuntyard.validate.values import Array, LayerValues, Tokens

_NUMPY: dict[str, Any] = {"fp32": np.float32, "fp16": np.float16}


def graph_label(*, optimise: bool) -> str:
    """What a ``GraphStack`` calls itself."""
    return f"{'engine' if optimise else 'graph'}'s layers, ONNX Runtime {onnxruntime.__version__}"


class GraphStack(Stack):
    """Each call of the graph in a session of its own, KV cache included: prefill in pieces, then single tokens."""

    def __init__(self, graph: Path, dtype: str, *, optimise: bool, longest: int | None = None) -> None:
        self.label, self.dtype = graph_label(optimise=optimise), dtype
        self.config = load_config_file(graph.parent / "config.json").text
        self._graph = CutGraph(graph, optimise=optimise)
        self._type, self._longest = _NUMPY[dtype], longest

    def embed(self, sequences: Sequence[Tokens]) -> Iterator[Array]:
        """See :class:`Stack`."""
        part = self._graph.part("model.embed_tokens")
        for tokens in sequences:
            yield part.run({"input_ids": tokens[None]})["model.embed_tokens"][0].astype(np.float32)

    def layer(self, index: int, hidden: Sequence[Array]) -> Iterator[LayerValues]:
        """See :class:`Stack`."""
        part = self._graph.part(f"model.layers.{index}")
        for array in hidden:
            yield self._run(part, index, array[None].astype(self._type))

    def _run(self, part: Part, index: int, hidden: Array) -> LayerValues:
        c, kind, length = self.config, kind_of(self.config, index), hidden.shape[1]
        names = [f"past_key_values.{index}.{name}" for name in ("key", "value")]
        # A layer that is wired to another's cache gets an empty one: what it should have read is not there then.
        caches = {*names, *(name for name in part.inputs if name.startswith("past_key_values."))}
        shape = (1, c.num_key_value_heads, c.cache_rows(index, length), c.head_dim)
        cache = {name: np.zeros(shape, self._type) for name in caches}
        found: list[list[Array]] = []
        chunk = c.attention_chunk_size
        for begin, end in pieces(length, chunk, self._longest):
            positions = np.arange(begin, end)
            out = part.run({HIDDEN: hidden[:, begin:end], "position_ids": positions[None], **cache})
            written = dict(zip(names, list(out.values())[1:3], strict=True))  # by place: the name may be another's
            cache |= written
            rows = positions % chunk if kind.rope and chunk else positions
            layer = f"model.layers.{index}"
            values = [value[0][:, rows].swapaxes(0, 1) for value in written.values()]
            values += [out[f"{layer}.{name}"][0] for name in ("self_attn", "feed_forward")] + [out[layer][0]]
            values += [out[f"{layer}.{name}"][0] for name in ("input_layernorm", "post_attention_layernorm")]
            if kind.moe:
                values += [out[f"{layer}.feed_forward.{name}"] for name in ("router", "shared_expert")]
            found.append(values)
        return LayerValues(*(np.concatenate(parts).astype(np.float32) for parts in zip(*found, strict=True)))

    def head(self, hidden: Sequence[Array]) -> Iterator[Array]:
        """See :class:`Stack`."""
        part = self._graph.part("lm_head")
        for array in hidden:
            feeds = {HIDDEN: array[None].astype(self._type), "logits_indices": np.arange(len(array))[None]}
            yield part.run(feeds)["logits"][0]
