"""A few layers of an exported graph in ONNX Runtime: the export's own graph, shorter.

The embedding, the rotary table, the chosen layers and the head stay as they are, each with its call, function and
weights; a layer's hidden state comes from the chosen one before it. The head becomes a second graph: in one, ONNX
Runtime would cast ``lm_head`` first of all, and hold its 4 GB while the experts run. Both lie beside ``model.onnx``
and refer to the same files, so nothing is copied. They run in a process of its own, whose memory can then be told.
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

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
HIDDEN = "hidden"

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


def cut_body(model: ir.Model, layers: Sequence[int]) -> None:
    """Leaves the embedding and ``layers`` of an exported model, in place.

    Outputs are their caches, hidden states and router logits.
    """
    calls = {str(node.name): node for node in model.graph}
    hidden = calls[EMBEDDING].outputs[0]
    outputs: list[ir.Value] = []
    for layer in layers:
        calls[layer_name(layer)].replace_input_with(0, hidden)
        outputs += calls[layer_name(layer)].outputs
        hidden = calls[layer_name(layer)].outputs[0]
    model.graph.outputs[:] = outputs
    _remove_unused(model)


def cut_head(model: ir.Model) -> None:
    """Leaves the head of an exported model, in place; the hidden state before it becomes the input ``HIDDEN``."""
    call = next(node for node in model.graph if node.name == HEAD)
    last = call.inputs[0]
    assert last is not None
    hidden = ir.Value(name=HIDDEN, type=last.type, shape=last.shape)
    call.replace_input_with(0, hidden)
    model.graph.inputs.append(hidden)
    model.graph.outputs[:] = call.outputs
    _remove_unused(model)


def _remove_unused(model: ir.Model) -> None:
    RemoveUnusedNodesPass()(model)
    RemoveUnusedFunctionsPass()(model)  # type: ignore[no-untyped-call]
    model.graph.inputs[:] = [value for value in model.graph.inputs if value.uses()]


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


def open_session(graph: Path, threads: int) -> onnxruntime.InferenceSession:
    """A session that takes no more memory than the values that are alive, and maps the weights."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    options.enable_cpu_mem_arena = options.enable_mem_pattern = False
    return onnxruntime.InferenceSession(
        str(graph), options, providers=["CPUExecutionProvider"], disabled_optimizers=NOT_FOLDED
    )


def run(
    body: onnxruntime.InferenceSession, head: onnxruntime.InferenceSession, tokens: Tokens, prefill: int, last: str
) -> tuple[dict[str, Floats], list[float]]:
    """One sequence ``[S]``: ``prefill`` tokens in one call, each other in its own, from an empty cache.

    The head takes the body's output ``last``. Returns what the graphs give for all tokens, by name, each
    ``[S, ...]``; and the seconds of each call.
    """
    cache = {}
    for past in body.get_inputs():
        if past.name.startswith("past_key_values."):
            _, heads, _, head_dim = past.shape
            cache[past.name] = np.zeros((1, heads, len(tokens), head_dim), np.float32)
    names = [output.name for output in body.get_outputs()]
    found: dict[str, list[Floats]] = {}
    seconds = []
    for begin, end in [(0, prefill), *((i, i + 1) for i in range(prefill, len(tokens)))]:
        feeds = {"input_ids": tokens[None, begin:end], "position_ids": np.arange(begin, end)[None]} | cache
        start = time.perf_counter()
        outputs = dict(zip(names, body.run(names, feeds), strict=True))
        every = np.arange(end - begin)[None]
        (outputs["logits"],) = head.run(["logits"], {HIDDEN: outputs[last], "logits_indices": every})
        seconds.append(time.perf_counter() - start)
        cache = {name: outputs.pop(name.replace("past_key_values", "present")) for name in cache}
        for name, array in outputs.items():
            found.setdefault(name, []).append(array.reshape(end - begin, -1))
    return {name: np.concatenate(arrays) for name, arrays in found.items()}, seconds


def main() -> None:
    """The command line: leaves both graphs in MODEL, ``OUT.npz`` with what they gave, ``OUT.json`` with the time."""
    parser = argparse.ArgumentParser(description="Cut an exported graph and run it.")
    parser.add_argument("model", type=Path, help="the export's directory")
    parser.add_argument("out", type=Path, help="where results go, without the files' endings")
    parser.add_argument("--layers", type=int, nargs="+", required=True)
    parser.add_argument("--tokens", type=int, nargs="+", required=True)
    parser.add_argument("--prefill", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--swap", nargs=2, metavar="WEIGHT", help="plant this mistake")
    args = parser.parse_args()
    body, head = (ir.load(args.model / "model.onnx") for _ in range(2))
    facts: dict[str, Any] = {"calls_of_the_export": len(body.graph)}
    cut_body(body, args.layers)
    cut_head(head)
    if args.swap:
        swap(body, *args.swap)
    graphs = [args.model / f"{args.out.name}.{part}.onnx" for part in ("body", "head")]
    for model, graph in zip((body, head), graphs, strict=True):
        ir.save(model, graph)
    start = time.perf_counter()
    sessions = [open_session(graph, args.threads) for graph in graphs]
    facts |= {"calls": len(body.graph) + len(head.graph), "open_seconds": time.perf_counter() - start}
    tokens = np.asarray(args.tokens, np.int64)
    found, seconds = run(sessions[0], sessions[1], tokens, args.prefill, layer_name(args.layers[-1]))
    np.savez(args.out.with_suffix(".npz"), **found)  # type: ignore[arg-type]
    facts |= {"prefill_seconds": seconds[0], "token_seconds": seconds[1:]}
    args.out.with_suffix(".json").write_text(json.dumps(facts), encoding="utf-8")


if __name__ == "__main__":
    main()
