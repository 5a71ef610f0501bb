"""A whole model, about 500M parameters: the shuntyard engine in ONNX Runtime against transformers in PyTorch.

Both compute in fp32 on the CPU from the same bf16 checkpoint, one sequence, each with its own KV cache, greedily. Per
length of the prompt: the time of the prefill (logits of the last token only), then of one token after it. transformers
runs with either attention; what it is compared by is the faster one. Logits are compared first. Loading and memory
are measured in processes of their own.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import timing
from shuntyard.engines.engine import Engine
from shuntyard.engines.manifest import load_manifest
from shuntyard.engines.onnxruntime_runner import OnnxRuntimeRunner

Tokens = NDArray[np.int64]
Floats = NDArray[np.float32]

LARGEST_DIFFERENCE = 1e-3
"""fp32 in another order of summation, through 8 layers, on logits of a few units."""

HERE = Path(__file__).resolve().parent
ATTENTIONS = ("sdpa", "eager")
MEMORY_PROMPT = 512


class Side(Protocol):
    """One of the two that are compared."""

    def logits(self, tokens: Tokens, decode_from: int) -> Floats:
        """``[S] -> [S, V]``, tokens from ``decode_from`` on fed one at a time."""

    def stream(self, tokens: Tokens, count: int) -> Iterator[int]:
        """``count`` new tokens; the first comes with the prefill."""


class EngineSide:
    """The engine through its public interface."""

    def __init__(self, path: Path, threads: int) -> None:
        manifest = load_manifest(path)
        self._engine = Engine(path, manifest, OnnxRuntimeRunner(path / manifest.engine_file, manifest, threads))

    def logits(self, tokens: Tokens, decode_from: int) -> Floats:
        """See :class:`Side`."""
        out: Floats = self._engine.logits(tokens[None], decode_from=decode_from)[0]
        return out

    def stream(self, tokens: Tokens, count: int) -> Iterator[int]:
        """See :class:`Side`."""
        for step in self._engine.stream(tokens[None], count, stop=[]):
            yield int(step[0])


def load_transformers(checkpoint: Path) -> Any:
    """``Llama4ForCausalLM`` in fp32."""
    from transformers import Llama4ForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model: Any = Llama4ForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, local_files_only=True)
    return model.eval()


class TransformersSide:
    """The model called directly, with one kind of attention: without what ``generate`` adds around each token."""

    def __init__(self, model: Any, attention: str) -> None:
        self._model, self._attention = model, attention
        names = inspect.signature(model.forward).parameters
        self._cache_argument = "cache" if "cache" in names else "past_key_values"

    def _begin(self) -> Any:
        """Switches the attention, which another side may have changed, and makes an empty cache."""
        from transformers import DynamicCache

        self._model.set_attn_implementation(self._attention)
        return DynamicCache(config=self._model.config)

    def _forward(self, tokens: Tokens, cache: Any, keep: int) -> Floats:
        arguments = {self._cache_argument: cache, "use_cache": True, "logits_to_keep": keep}
        with torch.inference_mode():
            out: Floats = self._model(torch.from_numpy(tokens)[None], **arguments).logits[0].numpy()
        return out

    def logits(self, tokens: Tokens, decode_from: int) -> Floats:
        """See :class:`Side`."""
        cache = self._begin()
        pieces = [self._forward(tokens[:decode_from], cache, 0)]
        pieces += [self._forward(tokens[i : i + 1], cache, 1) for i in range(decode_from, len(tokens))]
        return np.concatenate(pieces)

    def stream(self, tokens: Tokens, count: int) -> Iterator[int]:
        """See :class:`Side`."""
        return self._generate(self._begin(), tokens, count)  # nothing but the model runs when tokens are asked for

    def _generate(self, cache: Any, ids: Tokens, count: int) -> Iterator[int]:
        for _ in range(count):
            token = int(self._forward(ids, cache, 1)[0].argmax())
            yield token
            ids = np.array([token])


def generation_times(side: Side, tokens: Tokens, new: int) -> tuple[float, float]:
    """Seconds of the prefill with the first token, and the median of the ``new`` tokens after it."""
    stream = side.stream(tokens, new + 1)
    prefill = timing.seconds(lambda: next(stream))
    return prefill, statistics.median(timing.seconds(lambda: next(stream)) for _ in range(new))


def compare(engine: Side, references: dict[str, Side], tokens: Tokens, decode_from: int, new: int) -> dict[str, Any]:
    """Logits and greedy tokens of the engine against transformers'."""
    own, own_tokens = engine.logits(tokens, decode_from), list(engine.stream(tokens, new))
    found: dict[str, Any] = {"tokens": len(tokens), "decode_from": decode_from, "against": {}}
    for name, reference in references.items():
        other = reference.logits(tokens, decode_from)
        found["against"][name] = {
            "max_abs_difference": float(np.abs(own - other).max()),
            "largest_logit": float(np.abs(other).max()),
            "top1_agreement": float((own.argmax(1) == other.argmax(1)).mean()),
            "greedy_tokens_equal": own_tokens == list(reference.stream(tokens, new)),
        }
    return found


def run(arguments: list[str]) -> float:
    """Runs a Python program to its end; seconds."""
    begin = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=sys.stderr)
    return time.perf_counter() - begin


def prepare(work: Path, parameters: str) -> dict[str, float]:
    """Checkpoint, model and engine under ``work``, by the command line; what is there already is used."""
    steps = {
        "checkpoint": [str(HERE / "checkpoint.py"), str(work / "checkpoint"), "--parameters", parameters],
        "model": ["-m", "shuntyard.cli", "export", str(work / "checkpoint"), str(work / "model")],
        "engine": ["-m", "shuntyard.cli", "build", str(work / "model"), str(work / "engine"), "--max-batch", "1"],
    }
    return {name: run(arguments) for name, arguments in steps.items() if not (work / name).exists()}


def memory() -> dict[str, float]:
    """This process's resident memory and its peak in MiB, as the kernel counts them."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    fields = {words[0].rstrip(":"): words[1] for words in lines if len(words) > 1}
    return {"resident": int(fields["VmRSS"]) / 1024, "peak": int(fields["VmHWM"]) / 1024}


def child(which: str, path: Path, threads: int) -> None:
    """One side alone: loads it, generates, and prints what that took as JSON."""
    torch.set_num_threads(threads)
    before = memory()["resident"]
    begin = time.perf_counter()
    side: Side = (
        EngineSide(path, threads) if which == "engine" else TransformersSide(load_transformers(path), ATTENTIONS[0])
    )
    load = time.perf_counter() - begin
    loaded = memory()
    tokens = np.random.default_rng(0).integers(0, 1000, MEMORY_PROMPT)
    list(side.stream(tokens, 8))
    after = memory()
    facts = {
        "load_seconds": load,
        "before_mib": before,
        "loaded_mib": loaded["resident"],
        "peak_loading_mib": loaded["peak"],
        "in_use_mib": after["resident"],
        "peak_mib": after["peak"],
    }
    print(json.dumps(facts))


def measure_alone(work: Path, threads: int, rounds: int) -> dict[str, dict[str, float]]:
    """Medians of :func:`child`, both sides in turn."""
    paths = {"engine": work / "engine", "transformers": work / "checkpoint"}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in paths}
    for _ in range(rounds):
        for name, path in paths.items():
            command = [sys.executable, __file__, "--alone", name, str(path), "--threads", str(threads)]
            out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            found[name].append(json.loads(out.splitlines()[-1]))
    return {
        name: {key: statistics.median(one[key] for one in every) for key in every[0]} for name, every in found.items()
    }


def measure(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Everything, as one JSON-ready record."""
    neighbours = timing.Neighbours()
    preparation = prepare(work, args.parameters)
    alone = measure_alone(work, args.threads, args.load_rounds)
    torch.set_num_threads(args.threads)
    model = load_transformers(work / "checkpoint")
    references: dict[str, Side] = {f"transformers {name}": TransformersSide(model, name) for name in ATTENTIONS}
    sides: dict[str, Side] = {"engine": EngineSide(work / "engine", args.threads), **references}
    vocab = json.loads((work / "checkpoint" / "config.json").read_text())["vocab_size"]
    rng = np.random.default_rng(0)
    longest = max(args.lengths)
    comparison = compare(sides["engine"], references, rng.integers(0, vocab, longest), longest - 24, args.new)
    rows = []
    for length in args.lengths:
        tokens = rng.integers(0, vocab, length)
        times: dict[str, dict[str, list[float]]] = {"prefill": {}, "decode": {}}
        names = list(sides)
        for i in range(-1, args.rounds):  # the first round warms up
            turn = i % len(names)
            for name in names[turn:] + names[:turn]:
                timing.settle()
                for phase, spent in zip(times, generation_times(sides[name], tokens, args.new), strict=True):
                    if i >= 0:
                        times[phase].setdefault(name, []).append(spent)
        for phase, by_side in times.items():
            rival = min(references, key=lambda name: statistics.median(by_side[name]))
            rows.append(
                {
                    "phase": phase,
                    "context": length,
                    "milliseconds": {name: timing.summary(spent) for name, spent in by_side.items()},
                    "rival": rival,
                    "times_faster": timing.ratios(by_side[rival], by_side["engine"]),
                }
            )
    size = sum(path.stat().st_size for path in (work / "checkpoint").glob("*.safetensors"))
    return {
        "what": "a whole model",
        "machine": timing.machine(args.threads) | {"cpu_share_of_others": neighbours.share()},
        "checkpoint_bytes": size,
        "preparation_seconds": preparation,
        "alone": alone,
        "comparison": comparison,
        "results": rows,
    }


def print_tables(result: dict[str, Any]) -> None:
    """Medians and quartiles on stdout."""
    console = Console(width=160)
    names = list(result["results"][0]["milliseconds"])
    table = Table(title="ms: prefill of a prompt, decode of one token behind it", caption="median (quartiles)")
    for column in ("", "context", *names, "times faster"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in result["results"]:
        faster = f"{row['times_faster']['median']:.2f}x"
        times = [timing.shown(row["milliseconds"][name]) for name in names]
        table.add_row(row["phase"], str(row["context"]), *times, faster)
    console.print(table)
    table = Table(title="each alone in a process")
    for column in ("", "load s", "loaded MiB", "peak while loading", "in use", "peak"):
        table.add_column(column, justify="right")
    for name, one in result["alone"].items():
        keys = ("loaded_mib", "peak_loading_mib", "in_use_mib", "peak_mib")
        table.add_row(name, f"{one['load_seconds']:.1f}", *(f"{one[key]:,.0f}" for key in keys))
    console.print(table)
    for name, one in result["comparison"]["against"].items():
        console.print(
            f"{name}: logits within {one['max_abs_difference']:.1e} (largest {one['largest_logit']:.1f}), "
            f"top-1 agreement {one['top1_agreement']:.4f}, greedy tokens equal: {one['greedy_tokens_equal']}"
        )


def verdict(result: dict[str, Any]) -> bool:
    """Says what failed: results that differ, or a phase in which the engine is not the faster one."""
    failures = [
        f"logits differ from {name}'s by {one['max_abs_difference']:.1e}"
        for name, one in result["comparison"]["against"].items()
        if one["max_abs_difference"] > LARGEST_DIFFERENCE
    ]
    failures += [
        f"{row['phase']} at {row['context']}: the engine is not faster than {row['rival']}"
        for row in result["results"]
        if row["times_faster"]["median"] <= 1
    ]
    for failure in failures:
        print(f"FAIL: {failure}")
    if not failures:
        print("ok: the engine is faster in prefill and decode at every length")
    return not failures


def main() -> None:
    """The command line. Exit status 1: logits differ, or the engine is not the faster one throughout."""
    parser = argparse.ArgumentParser(description="A whole model: the engine against transformers.")
    parser.add_argument("--work", type=Path, help="keeps what is made there  [default: a temporary directory]")
    parser.add_argument("--parameters", default="500M")
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 256, 512, 1024])
    parser.add_argument("--new", type=int, default=16, help="tokens to decode")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--load-rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path)
    parser.add_argument("--alone", nargs=2, metavar=("SIDE", "PATH"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.alone:
        child(args.alone[0], Path(args.alone[1]), args.threads)
        return
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        result = measure(args, work)
    print_tables(result)
    timing.write_json(args.json, result)
    sys.exit(not verdict(result))


if __name__ == "__main__":
    main()
