"""A few layers of an exported graph in ONNX Runtime: the export's own graph, shorter.

The embedding, the rotary table, the chosen layers and the head stay as they are, each with its call, function and
weights; a layer's hidden state comes from the chosen one before it. The cut graph lies beside ``model.onnx`` and
refers to the same files, so nothing is copied. It runs in a process of its own, whose memory can then be told.
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
from onnx_ir.passes.common import RemoveUnusedFunctionsPass, RemoveUnusedNodesPass

EMBEDDING, ROTARY, HEAD = "model.embed_tokens", "model.rotary_emb", "lm_head"

NOT_FOLDED = ["ConstantFolding"]
"""The optimizer that is off: it would keep an fp32 copy of every expert, and with it of Maverick's holes."""


def layer_name(layer: int) -> str:
    """The name of a layer's call, and of its output."""
    return f"model.layers.{layer}"


def router_name(layer: int) -> str:
    """The name of a layer's router logits, if it routes."""
    return f"{layer_name(layer)}.feed_forward.router"


def cut(model: ir.Model, layers: Sequence[int]) -> None:
    """Takes all but ``layers`` out of an exported model, in place; their hidden states and router logits are outputs."""
    graph = model.graph
    calls = {str(node.name): node for node in graph}
    hidden = calls[EMBEDDING].outputs[0]
    seen, presents = [], []
    for layer in layers:
        call = calls[layer_name(layer)]
        call.replace_input_with(0, hidden)
        hidden, key, value, *routed = call.outputs
        seen += [hidden, *routed]
        presents += [key, value]
    calls[HEAD].replace_input_with(0, hidden)
    graph.outputs[:] = [calls[HEAD].outputs[0], *presents, *seen]
    RemoveUnusedNodesPass()(model)
    RemoveUnusedFunctionsPass()(model)
    graph.inputs[:] = [value for value in graph.inputs if value.uses()]


def swap(model: ir.Model, first: str, second: str) -> None:
    """A mistake to plant: two weights of the same shape, each at the other's place in the files."""
    one, other = (model.graph.initializers[name] for name in (first, second))
    tensors = one.const_value, other.const_value
    for value, tensor in zip((other, one), tensors, strict=True):
        if not isinstance(tensor, ir.ExternalTensor) or value.shape != tensor.shape or value.dtype != tensor.dtype:
            raise ValueError(f"'{first}' and '{second}' are not two tensors of one kind")
        value.const_value = ir.ExternalTensor(
            tensor.location,
            tensor.offset,
            tensor.length,
            tensor.dtype,
            shape=tensor.shape,
            name=str(value.name),
            base_dir=tensor.base_dir,
        )


def run(graph: Path, tokens: NDArray[np.int64], prefill: int, threads: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """One sequence ``[S]``: ``prefill`` tokens in one call, each other in its own, from an empty cache.

    Returns what the graph gives for all tokens, by name, each ``[S, ...]``; and the seconds that it took.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    begin = time.perf_counter()
    session = onnxruntime.InferenceSession(
        str(graph), options, providers=["CPUExecutionProvider"], disabled_optimizers=NOT_FOLDED
    )
    opened = time.perf_counter() - begin
    cache = {}
    for past in session.get_inputs():
        if past.name.startswith("past_key_values."):
            _, heads, _, head_dim = past.shape
            cache[past.name] = np.zeros((1, heads, len(tokens), head_dim), np.float32)
    names = [output.name for output in session.get_outputs()]
    found: dict[str, list[Any]] = {}
    seconds = []
    for first, last in [(0, prefill), *((i, i + 1) for i in range(prefill, len(tokens)))]:
        feeds = {
            "input_ids": tokens[None, first:last],
            "position_ids": np.arange(first, last)[None],
            "logits_indices": np.arange(last - first)[None],
        }
        begin = time.perf_counter()
        outputs = dict(zip(names, session.run(names, feeds | cache), strict=True))
        seconds.append(time.perf_counter() - begin)
        cache = {name: outputs.pop(name.replace("past_key_values", "present")) for name in cache}
        for name, array in outputs.items():
            found.setdefault(name, []).append(array.reshape(last - first, -1))
    joined = {name: np.concatenate(arrays) for name, arrays in found.items()}
    return joined, {"open_seconds": opened, "prefill_seconds": seconds[0], "token_seconds": seconds[1:]}


def main() -> None:
    """The command line: leaves the cut graph, ``OUT.npz`` with what it gave, and ``OUT.json`` with what it took."""
    parser = argparse.ArgumentParser(description="Cut an exported graph and run it.")
    parser.add_argument("model", type=Path, help="the export's directory")
    parser.add_argument("out", type=Path, help="where results go, without the files' endings")
    parser.add_argument("--layers", type=int, nargs="+", required=True)
    parser.add_argument("--tokens", type=int, nargs="+", required=True)
    parser.add_argument("--prefill", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--swap", nargs=2, metavar="WEIGHT", help="plant this mistake")
    args = parser.parse_args()
    model = ir.load(args.model / "model.onnx")
    facts: dict[str, Any] = {"initializers_before": len(model.graph.initializers), "nodes_before": len(model.graph)}
    cut(model, args.layers)
    if args.swap:
        swap(model, *args.swap)
    facts |= {"initializers": len(model.graph.initializers), "nodes": len(model.graph)}
    graph = args.model / f"{args.out.name}.onnx"
    ir.save(model, graph)
    found, seconds = run(graph, np.asarray(args.tokens, np.int64), args.prefill, args.threads)
    np.savez(args.out.with_suffix(".npz"), **found)
    args.out.with_suffix(".json").write_text(json.dumps(facts | seconds), encoding="utf-8")


if __name__ == "__main__":
    main()
