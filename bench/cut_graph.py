"""A few layers of an exported graph in ONNX Runtime: the export's own calls, functions and weights, but fewer.

The embedding, each chosen layer (with the rotary table, if it takes it) and the head become a graph each, since one
graph of two of Scout's layers took more than 14 GB: ONNX Runtime casts weights of later calls early, ``lm_head`` first
of all. They lie beside ``model.onnx`` and refer to the same files, so nothing is copied. They run one after the other,
in a process of their own, whose memory can then be told.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
from numpy.typing import NDArray

from shuntyard.engines.cut import HIDDEN, isolate

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"

Tokens = NDArray[np.int64]
Floats = NDArray[np.float32]

NOT_FOLDED = ["ConstantFolding"]
"""The optimizer that is off: it would keep an fp32 copy of every expert."""


def layer_name(layer: int) -> str:
    """The name of a layer's call, and of its output."""
    return f"model.layers.{layer}"


def router_name(layer: int) -> str:
    """The name of a layer's router logits, if it routes."""
    return f"{layer_name(layer)}.feed_forward.router"


def swap(model: ir.Model, names: Sequence[str]) -> None:
    """A mistake to plant: where two weights lie in the files, exchanged."""
    tensors = [model.graph.initializers[name].const_value for name in names if name in model.graph.initializers]
    for name, tensor in zip(names, reversed(tensors), strict=False):
        value = model.graph.initializers[name]
        assert isinstance(tensor, ir.ExternalTensor) and value.shape == tensor.shape and value.dtype == tensor.dtype
        value.const_value = ir.ExternalTensor(
            tensor.location,
            tensor.offset,
            tensor.length,
            tensor.dtype,
            shape=tensor.shape,
            name=name,
            base_dir=tensor.base_dir,
        )


def open_session(graph: Path, threads: int) -> onnxruntime.InferenceSession:
    """A session that takes no more memory than the values that are alive, and maps the weights."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    options.enable_cpu_mem_arena = options.enable_mem_pattern = False
    return onnxruntime.InferenceSession(
        str(graph), options, providers=["CPUExecutionProvider"], disabled_optimizers=NOT_FOLDED
    )


def run(
    sessions: Sequence[onnxruntime.InferenceSession], tokens: Tokens, prefill: int
) -> tuple[dict[str, Floats], list[float]]:
    """One sequence ``[S]``: ``prefill`` tokens in one call, each other in its own, from an empty cache.

    A session's first output is the next one's ``HIDDEN``. Returns what they give for all tokens, by name, each
    ``[S, ...]``; and the seconds of each call.
    """
    cache = {}
    for past in (value for session in sessions for value in session.get_inputs()):
        if past.name.startswith("past_key_values."):
            _, heads, _, head_dim = past.shape
            cache[past.name] = np.zeros((1, heads, len(tokens), head_dim), np.float32)
    found: dict[str, list[Floats]] = {}
    seconds = []
    for begin, end in [(0, prefill), *((i, i + 1) for i in range(prefill, len(tokens)))]:
        known: dict[str, NDArray[Any]] = {
            "input_ids": tokens[None, begin:end],
            "position_ids": np.arange(begin, end)[None],
            "logits_indices": np.arange(end - begin)[None],
        }
        outputs: dict[str, Floats] = {}
        start = time.perf_counter()
        for session in sessions:
            feeds = {value.name: (known | cache)[value.name] for value in session.get_inputs()}
            names = [value.name for value in session.get_outputs()]
            outputs |= dict(zip(names, session.run(names, feeds), strict=True))
            known[HIDDEN] = outputs[names[0]]
        seconds.append(time.perf_counter() - start)
        cache = {name: outputs.pop(name.replace("past_key_values", "present")) for name in cache}
        for name, array in outputs.items():
            found.setdefault(name, []).append(array.reshape(end - begin, -1))
    return {name: np.concatenate(arrays) for name, arrays in found.items()}, seconds


def main() -> None:
    """The command line: leaves the graphs in MODEL, ``OUT.npz`` with what they gave, ``OUT.json`` with the time."""
    parser = argparse.ArgumentParser(description="Cut an exported graph and run it.")
    parser.add_argument("model", type=Path, help="the export's directory")
    parser.add_argument("out", type=Path, help="where results go, without the files' endings")
    parser.add_argument("--layers", type=int, nargs="+", required=True)
    parser.add_argument("--tokens", type=int, nargs="+", required=True)
    parser.add_argument("--prefill", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--swap", nargs=2, default=(), metavar="WEIGHT", help="plant this mistake, in one layer")
    args = parser.parse_args()
    graphs, calls = [], set()
    for name in (EMBEDDING, *map(layer_name, args.layers), HEAD):
        model = ir.load(args.model / "model.onnx")
        facts: dict[str, Any] = {"calls_of_the_export": len(model.graph)}
        isolate(model, name, args.model / "model.onnx")
        swap(model, args.swap)
        calls |= {node.name for node in model.graph}
        graphs.append(args.model / f"{args.out.name}.{name}.onnx")
        ir.save(model, graphs[-1])
    start = time.perf_counter()
    sessions = [open_session(graph, args.threads) for graph in graphs]
    facts |= {"calls": len(calls), "open_seconds": time.perf_counter() - start}
    found, seconds = run(sessions, np.asarray(args.tokens, np.int64), args.prefill)
    np.savez(args.out.with_suffix(".npz"), **found)  # type: ignore[arg-type]
    facts |= {"prefill_seconds": seconds[0], "token_seconds": seconds[1:]}
    args.out.with_suffix(".json").write_text(json.dumps(facts), encoding="utf-8")


if __name__ == "__main__":
    main()
