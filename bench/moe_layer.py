"""One mixture-of-experts layer: routed, as shuntyard's functions are, against dense, as every stock exporter's is.

* ``routed``: ShuntyardMoeRouting, -Experts and -ScatterAdd by their function bodies, in ONNX Runtime.
* ``dense``: transformers' own ``Llama4TextMoe`` through ``torch.onnx.export``, in ONNX Runtime: all experts on all
  tokens by batched MatMul.
* ``eager``: the same module in PyTorch.

All have the same weights in fp32, router and shared expert included.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch
from numpy.typing import NDArray
from onnx_ir.tape import Tape
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import timing
from shuntyard.plugins import functions
from shuntyard.plugins.contract import DOMAIN, DOMAIN_VERSION, EXPERTS, ROUTING, SCATTER_ADD, ExpertsForm, Op

Floats = NDArray[np.float32]

LARGEST_DIFFERENCE = 1e-4
"""fp32 in another order of summation, on outputs near one."""

CLAIM_TOKENS, CLAIM_RATIO = 256, 3.0


def reference_layer(hidden: int, expert: int, experts: int) -> Any:
    """transformers' layer with random weights of unit gain."""
    from transformers import Llama4TextConfig
    from transformers.models.llama4.modeling_llama4 import Llama4TextMoe

    config = Llama4TextConfig(
        hidden_size=hidden, intermediate_size=expert, num_local_experts=experts, num_experts_per_tok=1
    )
    layer = Llama4TextMoe(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in layer.named_parameters():
            # Linear weights are [out, in], the experts' [E, in, out].
            gain = 2.0 if "router" in name else 1.0
            weight.normal_(0, gain / weight.shape[1] ** 0.5, generator=generator)
    return layer


def dense_model(layer: Any, hidden: int) -> bytes:
    """The layer as PyTorch's exporter writes it."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            layer,
            (torch.zeros(1, 7, hidden),),
            input_names=["x"],
            dynamic_shapes=({1: torch.export.Dim("tokens")},),
            dynamo=True,
            opset_version=functions.OPSET,
            verbose=False,
        )
    assert program is not None
    data: bytes = program.model_proto.SerializeToString()
    return data


def routed_model(layer: Any, hidden: int, experts: int) -> bytes:
    """The layer by shuntyard's private ops, wired as the exporter wires them, with their function bodies."""
    tape = Tape()
    weights: dict[str, ir.Value] = {}

    def weight(name: str) -> ir.Value:
        array = layer.get_parameter(name).detach().numpy()
        fp32, shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(array.shape)
        weights[name] = ir.Value(name=name, type=fp32, shape=shape, const_value=ir.tensor(array, name=name))
        return weights[name]

    def linear(x: ir.Value, name: str) -> ir.Value:
        return tape.op("MatMul", [x, tape.op("Transpose", [weight(f"{name}.weight")], {"perm": [1, 0]})])

    def private(op: Op, inputs: list[ir.Value]) -> list[ir.Value]:
        known: dict[str, Any] = {
            "top_k": 1,
            "experts": experts,
            "layout": "fused",
            "group_size": 0,
            "activations": "none",
        }
        attributes = {name: known[name] for name in op.attributes}
        outputs = tape.op_multi_out(op.name, inputs, attributes, domain=DOMAIN, num_outputs=len(op.outputs))
        return list(outputs)

    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["tokens", hidden]))
    scores, offsets, permutation = private(ROUTING, [linear(x, "router")])
    gate_up, down = weight("experts.gate_up_proj"), weight("experts.down_proj")
    (rows,) = private(EXPERTS, [x, scores, offsets, permutation, gate_up, down])
    gate = linear(x, "shared_expert.gate_proj")
    silu = tape.op("Mul", [gate, tape.op("Sigmoid", [gate])])
    shared = linear(tape.op("Mul", [silu, linear(x, "shared_expert.up_proj")]), "shared_expert.down_proj")
    (out,) = private(SCATTER_ADD, [shared, rows, permutation])
    out.name, out.type, out.shape = "out", ir.TensorType(ir.DataType.FLOAT), ir.Shape(["tokens", hidden])
    graph = ir.Graph(
        [x],
        [out],
        nodes=tape.nodes,
        initializers=list(weights.values()),
        opset_imports={"": functions.OPSET, DOMAIN: DOMAIN_VERSION},
        name="routed",
    )
    bodies = [f for f in functions.all_functions([ExpertsForm(experts)]) if "Moe" in f.name]
    data: bytes = ir.to_proto(ir.Model(graph, ir_version=11, functions=bodies)).SerializeToString()
    return data


def open_session(model: bytes, threads: int, profile: Path | None = None) -> onnxruntime.InferenceSession:
    """A session with so many threads."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def contenders(args: argparse.Namespace) -> dict[str, Callable[[Floats], Floats]]:
    """Each takes ``x [T, H]`` and gives ``[T, H]``."""
    layer = reference_layer(args.hidden, args.expert, args.experts)
    dense = open_session(dense_model(layer, args.hidden), args.threads)
    routed = open_session(routed_model(layer, args.hidden, args.experts), args.threads, args.profile)

    def run_eager(x: Floats) -> Floats:
        with torch.inference_mode():
            out: Floats = layer(torch.from_numpy(x))[0].numpy()
        return out

    def run_dense(x: Floats) -> Floats:
        out: Floats = dense.run(None, {"x": x[None]})[0]
        return out

    def run_routed(x: Floats) -> Floats:
        out: Floats = routed.run(None, {"x": x})[0]
        return out

    return {"routed": run_routed, "dense": run_dense, "eager": run_eager}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Compares the contenders' results, then their times, at every number of tokens."""
    torch.set_num_threads(args.threads)
    neighbours = timing.Neighbours()
    runs = contenders(args)
    rng = np.random.default_rng(0)
    rows = []
    for tokens in args.tokens:
        x = rng.normal(size=(tokens, args.hidden)).astype(np.float32)
        results = {name: run(x) for name, run in runs.items()}
        differences = {
            name: float(np.abs(results["routed"] - result).max())
            for name, result in results.items()
            if name != "routed"
        }
        times = timing.take_turns({name: partial(run, x) for name, run in runs.items()}, args.rounds)
        rows.append(
            {
                "tokens": tokens,
                "largest_output": float(np.abs(results["eager"]).max()),
                "max_abs_difference_from_routed": differences,
                "milliseconds": {name: timing.summary(t) for name, t in times.items()},
                "times_faster_than": {name: timing.ratios(times[name], times["routed"]) for name in differences},
            }
        )
    sizes = {"hidden": args.hidden, "expert": args.expert, "experts": args.experts, "top_k": 1, "dtype": "fp32"}
    facts = timing.machine(args.threads) | {"cpu_share_of_others": neighbours.share()}
    return {"what": "one MoE layer", "machine": facts, "layer": sizes, "results": rows}


def print_table(result: dict[str, Any]) -> None:
    """Medians and quartiles on stdout."""
    layer = result["layer"]
    title = f"One MoE layer, H={layer['hidden']} F={layer['expert']} E={layer['experts']} top-1, fp32, ms"
    table = Table(title=title, caption="median (quartiles); ratios round by round")
    for column in ("tokens", "routed", "dense", "eager", "dense / routed", "eager / routed", "max abs"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in result["results"]:
        times = [timing.shown(row["milliseconds"][name]) for name in ("routed", "dense", "eager")]
        faster = [f"{row['times_faster_than'][name]['median']:.2f}x" for name in ("dense", "eager")]
        largest = max(row["max_abs_difference_from_routed"].values())
        table.add_row(str(row["tokens"]), *times, *faster, f"{largest:.1e}")
    Console(width=170).print(table)


def main() -> None:
    """The command line. Exit status 1: results differ, or the routed form is not three times as fast at T = 256."""
    parser = argparse.ArgumentParser(description="One MoE layer: routed against dense.")
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--expert", type=int, default=2048, help="intermediate size of an expert")
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 64, 256, 1024])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--profile", type=Path, help="prefix of ONNX Runtime's profile of the routed form")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    result = measure(args)
    print_table(result)
    timing.write_json(args.json, result)
    failed = False
    for row in result["results"]:
        if max(row["max_abs_difference_from_routed"].values()) > LARGEST_DIFFERENCE:
            print(f"FAIL: at {row['tokens']} tokens the results differ by more than {LARGEST_DIFFERENCE}")
            failed = True
        if row["tokens"] == CLAIM_TOKENS:
            ratio = row["times_faster_than"]["dense"]["median"]
            held = ratio >= CLAIM_RATIO
            failed |= not held
            print(f"{'ok' if held else 'FAIL'}: at {CLAIM_TOKENS} tokens routed is {ratio:.2f} times as fast as dense")
    sys.exit(failed)


if __name__ == "__main__":
    main()
