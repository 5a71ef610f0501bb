"""Scout and Maverick at their full width: the exported graph against transformers, on real weights, layer by layer.

A sparse checkpoint of full size (``tests/sparse.py``) gets random values in two layers, the embedding and the head,
and is exported whole, all 48 layers. What is real of the graph is cut out (``bench/cut_graph.py``) and runs in ONNX
Runtime in fp32: one call of some tokens, then single ones from the cache. transformers computes the same twice, in
fp32 and in float64, from the same files, one layer in memory at a time.

The bound is measured, not chosen: the graph may be as far from float64 as transformers' own fp32 is, times a small
factor. With ``--plant``, weights of the graph change places, and the check must find that too.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from torch import Tensor, nn
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import process, timing
from bench.cut_graph import layer_name, router_name
from shuntyard.exporter.config_file import load_config_file
from shuntyard.validate.dequantise import text_config
from shuntyard.validate.reference import LARGEST_FREQUENCY_ERROR, exact_rotation
from tests.sizes import MODELS, raw_config
from tests.sparse import INDEX, fill, names_to_fill, places, write_sparse

Arrays = Mapping[str, NDArray[Any]]

PREFIX = "language_model."
OUTER = ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")

PREFILL, DECODED = 24, 4
"""Tokens of the sequence: in the first call, and one at a time after it."""

GROUP = 4
"""Experts that the reference has in memory at once: 4 GB in float64."""

VOCABULARY_SLICE = 25_600
"""Rows of ``lm_head`` that the reference has in memory at once: 1 GB in float64."""

NOISE_FACTOR = 4.0
"""The graph's largest difference from float64, in those of transformers' fp32. Both sum the same products in fp32, in
different orders (MLAS and MKL block them differently), so their errors are of one size; the largest of millions of
logits varies little. A wrong weight is off by ten thousand times as much."""

LARGEST_NOISE = 1e-4
"""What transformers' fp32 may be off from float64, relative to the largest logit: 2**-24 a rounding, and sums of up
to 16,384 products. Were it more, as when fp32 and float64 choose different experts, the bound would mean nothing."""

HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
"""For the graph's process, above all: it allocates gigabytes anew in every call, which is slow in small pages."""

LIMITS = process.Limits(memory_mib=14 * 1024, seconds=3600)


@dataclass(frozen=True)
class Plan:
    """What of a model is real, and two weights of one shape that ``--plant`` exchanges."""

    layers: tuple[int, ...]
    experts: tuple[int, ...]
    exchanged: tuple[str, str]


PLANS = {
    # RoPE and NoPE, both routed; experts in one tensor.
    "scout": Plan(
        (2, 3),
        tuple(range(16)),
        ("model.layers.3.self_attn.k_proj.weight", "model.layers.3.self_attn.v_proj.weight"),
    ),
    # RoPE and dense, NoPE and routed; each expert an initializer of its own. All 128 are cast, 8 are no holes.
    "maverick": Plan(
        (0, 3),
        (0, 17, 38, 63, 64, 90, 101, 127),
        ("model.layers.3.feed_forward.experts.down_proj.63", "model.layers.3.feed_forward.experts.down_proj.64"),
    ),
}


def make_checkpoint(checkpoint: Path, plan: Plan, text: Mapping[str, Any]) -> int:
    """Writes the sparse checkpoint with real weights in its place; how many bytes are real.

    Routers' rows of experts that are holes are zero: a token chooses one only if all real ones have negative logits.
    """
    write_sparse(checkpoint, raw_config(text, "bf16"))
    where = places(checkpoint)
    names = [PREFIX + name for name in OUTER] + names_to_fill(where, plan.layers, None)
    written = fill(checkpoint, names, plan.experts)
    for name in names:
        if name.endswith("router.weight"):
            tensor, file, offset = where[name]
            row = tensor.nbytes // tensor.shape[0]
            with file.open("r+b") as stream:
                for hole in set(range(tensor.shape[0])) - set(plan.experts):
                    stream.seek(offset + hole * row)
                    stream.write(bytes(row))
    return written


class Weights:
    """The checkpoint's tensors by name, in one type; no more of them in memory than is asked for."""

    def __init__(self, checkpoint: Path, dtype: torch.dtype) -> None:
        self.checkpoint, self.dtype = checkpoint, dtype
        self.files: dict[str, str] = json.loads((checkpoint / INDEX).read_text(encoding="utf-8"))["weight_map"]

    def rows(self, name: str, first: int | None = None, last: int | None = None) -> Tensor:
        """Rows ``first .. last - 1`` of a tensor, by default all."""
        with safe_open(self.checkpoint / self.files[PREFIX + name], "pt") as file:
            rows: Tensor = file.get_slice(PREFIX + name)[first:last]
        return rows.to(self.dtype)

    def picked(self, name: str, rows: Sequence[int]) -> Tensor:
        """Single rows, side by side."""
        first = self.rows(name, rows[0], rows[0] + 1)
        picked = first.new_empty(len(rows), *first.shape[1:])
        for i, row in enumerate(rows):
            picked[i] = self.rows(name, row, row + 1)[0]
        return picked


@contextlib.contextmanager
def computing_in(dtype: torch.dtype) -> Iterator[None]:
    """Lets transformers compute in ``dtype``: its norms and rotation widen by ``.float()``, which narrows float64."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        if dtype == torch.float64:
            stack.enter_context(mock.patch.object(torch.Tensor, "float", torch.Tensor.double))
        yield


class ReferenceLayer:
    """One layer of transformers' own ``Llama4TextModel``: ``hidden [1, S, H]`` -> the same and router logits.

    A MoE layer has ``GROUP`` experts at a time and answers once for each group; a token's answer is that of the group
    with its highest logit. That is what the whole layer gives, as only one expert takes part (top-1).
    """

    def __init__(self, weights: Weights, layer: int, experts: Sequence[int]) -> None:
        from transformers import Llama4TextConfig
        from transformers.models.llama4.modeling_llama4 import Llama4TextModel, Llama4TextRotaryEmbedding

        text = text_config(weights.checkpoint)
        whole: Any = Llama4TextConfig(**text)
        assert whole.num_experts_per_tok == 1
        self.weights, self.name, self.experts = weights, f"model.layers.{layer}.", experts
        self.moe, self.num_experts = layer in whole.moe_layers, whole.num_local_experts
        changes = {
            "num_hidden_layers": 1,
            "no_rope_layers": [whole.no_rope_layers[layer]],
            "moe_layers": [0] if self.moe else [],
            "num_local_experts": GROUP,
            "vocab_size": 1,
            "pad_token_id": None,
        }
        config = Llama4TextConfig(**{**text, **changes})
        config._attn_implementation = "eager"
        with torch.device("meta"):
            self.model: Any = Llama4TextModel(config).eval()
        self.model.embed_tokens = self.model.norm = nn.Identity()
        ours = load_config_file(weights.checkpoint / "config.json").text
        exact = ours.rope.inverse_frequencies(ours.head_dim)
        theirs = Llama4TextRotaryEmbedding(config).inv_freq.double().numpy()
        assert np.abs(theirs / exact - 1).max() <= LARGEST_FREQUENCY_ERROR
        self.model.rotary_emb.forward = exact_rotation(exact)
        self.state = {
            name.removeprefix(PREFIX + self.name): weights.rows(name.removeprefix(PREFIX))
            for name in weights.files
            if name.startswith(PREFIX + self.name) and not (self.moe and (".experts." in name or ".router." in name))
        }

    def answer(self, hidden: Tensor, routed: Mapping[str, Tensor]) -> Tensor:
        """What the model gives, with these weights beside those that every group has."""
        state = {f"layers.0.{name}": tensor for name, tensor in {**self.state, **routed}.items()}
        self.model.load_state_dict(state, strict=True, assign=True)
        out: Tensor = self.model(inputs_embeds=hidden, use_cache=False).last_hidden_state
        return out

    def __call__(self, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        """Router logits ``[S, E]`` where the layer routes."""
        if not self.moe:
            return self.answer(hidden, {}), None
        seen: list[Tensor] = []
        self.model.layers[0].feed_forward.router.register_forward_hook(lambda *given: seen.append(given[2][1]))
        logits = hidden.new_zeros(hidden.shape[1], self.num_experts)  # [S, E]; zero for holes, as their rows are
        best = hidden.new_full((hidden.shape[1],), -torch.inf)
        out = torch.empty_like(hidden)
        for first in range(0, len(self.experts), GROUP):
            group = list(self.experts[first : first + GROUP])
            routed = {
                f"feed_forward.{name}": self.weights.picked(f"{self.name}feed_forward.{name}", group)
                for name in ("router.weight", "experts.gate_up_proj", "experts.down_proj")
            }
            answer = self.answer(hidden, routed)
            logits[:, group] = seen.pop()
            highest = logits[:, group].max(1).values
            out[0, highest > best] = answer[0, highest > best]
            best = torch.maximum(best, highest)
        return out, logits


def reference(checkpoint: Path, plan: Plan, tokens: Sequence[int], dtype: torch.dtype) -> dict[str, NDArray[Any]]:
    """transformers' hidden states, router logits and logits of every token, under the graph's names."""
    from transformers.models.llama4.modeling_llama4 import Llama4TextRMSNorm

    weights = Weights(checkpoint, dtype)
    found: dict[str, NDArray[Any]] = {}
    with computing_in(dtype):
        hidden = weights.picked("model.embed_tokens.weight", tokens)[None]
        for layer in plan.layers:
            hidden, logits = ReferenceLayer(weights, layer, plan.experts)(hidden)
            found[layer_name(layer)] = hidden[0].numpy()
            if logits is not None:
                found[router_name(layer)] = logits.numpy()
        config = text_config(checkpoint)
        norm = Llama4TextRMSNorm(config["hidden_size"], config["rms_norm_eps"])
        norm.load_state_dict({"weight": weights.rows("model.norm.weight")}, assign=True)
        normed, vocabulary = norm(hidden)[0], config["vocab_size"]
        slices = [
            nn.functional.linear(normed, weights.rows("lm_head.weight", first, first + VOCABULARY_SLICE))
            for first in range(0, vocabulary, VOCABULARY_SLICE)
        ]
        found["logits"] = torch.cat(slices, 1).numpy()
    return found


def compare(graph: Arrays, fp32: Arrays, exact: Arrays, plan: Plan) -> dict[str, Any]:
    """Differences, routing and top tokens, and what of it is wrong (``failures``)."""
    differences = {
        name: {
            "largest": float(np.abs(right).max()),
            "graph_from_float64": float(np.abs(graph[name] - right).max()),
            "transformers_from_float64": float(np.abs(fp32[name] - right).max()),
            "graph_from_transformers": float(np.abs(graph[name] - fp32[name]).max()),
        }
        for name, right in exact.items()
    }
    failures = []
    for name, found in differences.items():
        noise = found["transformers_from_float64"]
        found["bound"] = NOISE_FACTOR * noise
        # NaN compares false, and must not pass.
        if not noise <= LARGEST_NOISE * found["largest"]:
            failures.append(f"{name}: transformers itself is {noise:.1e} from float64")
        if not found["graph_from_float64"] <= found["bound"]:
            failures.append(f"{name}: off by {found['graph_from_float64']:.1e}, bound {found['bound']:.1e}")
    routing = {}
    for name in (name for name in exact if name.endswith("router")):
        chosen, right = graph[name].argmax(1), exact[name].argmax(1)
        highest = np.sort(exact[name], 1)
        routing[name] = {
            "differ": int((chosen != right).sum()),
            "experts_chosen": len(np.unique(chosen)),
            "smallest_margin": float((highest[:, -1] - highest[:, -2]).min()),
        }
        if (chosen != right).any():
            failures.append(f"{name}: {routing[name]['differ']} tokens go to another expert")
        if not np.isin(chosen, plan.experts).all():
            failures.append(f"{name}: a token chose an expert that is a hole")
    top = int((graph["logits"].argmax(1) != exact["logits"].argmax(1)).sum())
    if top:
        failures.append(f"{top} top tokens differ")
    return {"differences": differences, "routing": routing, "top_tokens_differ": top, "failures": failures}


def run_alone(command: Sequence[str], log: Path) -> process.Outcome:
    """Runs a program to its end, within the limits."""
    outcome = process.run([sys.executable, *command], log, LIMITS, os.environ | HUGE_PAGES)
    if outcome.status:
        raise RuntimeError(f"{command[:3]}: {outcome.stopped or log.read_text(errors='replace')[-2000:]}")
    return outcome


def run_graph(
    model: Path, out: Path, plan: Plan, tokens: Sequence[int], threads: int, plant: bool
) -> tuple[Arrays, dict[str, Any]]:
    """What the cut graph gives for ``tokens``, and what that took; with ``plant`` the wrong graph."""
    command = [str(Path(__file__).with_name("cut_graph.py")), str(model), str(out), "--threads", str(threads)]
    command += ["--prefill", str(PREFILL), "--layers", *map(str, plan.layers), "--tokens", *map(str, tokens)]
    command += ["--swap", *plan.exchanged] if plant else []
    outcome = run_alone(command, out.with_suffix(".log"))
    with np.load(out.with_suffix(".npz")) as file:
        found = dict(file)
    took: dict[str, Any] = json.loads(out.with_suffix(".json").read_text(encoding="utf-8"))
    return found, took | outcome.as_dict()


def measure(plan: Plan, text: Mapping[str, Any], work: Path, threads: int, plant: bool) -> dict[str, Any]:
    """Everything about one model, in the empty directory ``work``."""
    checkpoint, model = work / "checkpoint", work / "model"
    begin = time.perf_counter()
    real = make_checkpoint(checkpoint, plan, text)
    fill_seconds = time.perf_counter() - begin
    facts: dict[str, Any] = {
        "layers": plan.layers,
        "real_experts": len(plan.experts),
        "bytes": sum(place.tensor.nbytes for place in places(checkpoint).values()),
        "real_bytes": real,
        "fill_seconds": fill_seconds,
    }
    export = ["-m", "shuntyard.cli", "export", "--text-only", str(checkpoint), str(model)]
    facts["export"] = run_alone(export, work / "export.log").as_dict()
    facts["export"]["bytes_written"] = process.written_bytes(model, checkpoint)
    tokens = np.random.default_rng(0).integers(0, text["vocab_size"], PREFILL + DECODED).tolist()
    found, facts["graph"] = run_graph(model, work / "cut", plan, tokens, threads, False)
    answers = {}
    for dtype in (torch.float32, torch.float64):
        begin = time.perf_counter()
        answers[dtype] = reference(checkpoint, plan, tokens, dtype)
        facts[f"transformers_{str(dtype).removeprefix('torch.')}_seconds"] = time.perf_counter() - begin
    facts |= compare(found, answers[torch.float32], answers[torch.float64], plan)
    facts["own_peak_mib_so_far"] = process.memory_mib(os.getpid())[0]
    if plant:
        # The first call is enough to find it.
        known = [{name: array[:PREFILL] for name, array in answer.items()} for answer in answers.values()]
        wrong, _ = run_graph(model, work / "planted", plan, tokens[:PREFILL], threads, True)
        facts["planted"] = {"exchanged": plan.exchanged, **compare(wrong, known[0], known[1], plan)}
        if not facts["planted"]["failures"]:
            facts["failures"].append("the planted mistake was not found")
    return facts


def report(name: str, facts: Mapping[str, Any]) -> None:
    """The figures on stdout."""
    graph, export, logits = facts["graph"], facts["export"], facts["differences"]["logits"]
    lines = [
        f"{name}: {facts['bytes']:,} bytes, {facts['real_bytes']:,} of them real, layers {facts['layers']}",
        f"export: {export['seconds']:.0f} s, {export['peak_mib']:,.0f} MiB, {export['bytes_written']:,} bytes written",
        f"graph: {graph['calls']} of {graph['calls_of_the_export']} calls, opened in {graph['open_seconds']:.1f} s",
        f"  prefill {graph['prefill_seconds']:.0f} s, a token {np.median(graph['token_seconds']):.0f} s",
        f"  peak {graph['peak_mib']:,.0f} MiB, {graph['peak_anonymous_mib']:,.0f} of them not pages of files",
        f"logits: up to {logits['largest']:.2f}",
        f"  graph from float64: {logits['graph_from_float64']:.1e}, bound {logits['bound']:.1e}",
        f"  transformers' fp32 from float64: {logits['transformers_from_float64']:.1e}",
        f"  graph from transformers' fp32: {logits['graph_from_transformers']:.1e}",
        *(f"{n}: {r['experts_chosen']} experts chosen, {r['differ']} differ" for n, r in facts["routing"].items()),
        *(f"planted mistake found: {failure}" for failure in facts.get("planted", {}).get("failures", [])),
        *(f"FAILED: {failure}" for failure in facts["failures"]),
    ]
    print("\n  ".join(lines))


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Compare full-width layers of exported graphs with transformers.")
    parser.add_argument("--model", choices=PLANS, help="default: both")
    parser.add_argument("--work", type=Path, help="a directory with 16 GB of room (default: the system's for such)")
    parser.add_argument("--json", type=Path, help="a file for the figures; those of the other model stay in it")
    parser.add_argument("--plant", action="store_true", help="a mistake in the graph, too, which must be found")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.set_verbosity_error()
    results: dict[str, Any] = {}
    for name in [args.model] if args.model else PLANS:
        neighbours = timing.Neighbours()
        with tempfile.TemporaryDirectory(dir=args.work) as work:
            facts = measure(PLANS[name], MODELS[name], Path(work), args.threads, args.plant)
        machine = timing.machine(args.threads) | {"cpu_share_of_others": neighbours.share()}
        results[name] = {"machine": machine, **facts}
        report(name, facts)
    if args.json:
        kept = json.loads(args.json.read_text(encoding="utf-8"))["results"] if args.json.exists() else {}
        timing.write_json(args.json, {"what": "layers of full width", "results": kept | results})
    return int(any(facts["failures"] for facts in results.values()))


if __name__ == "__main__":
    sys.exit(main())
