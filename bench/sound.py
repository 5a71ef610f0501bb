"""Does ``validate`` pass sound engines? Fifty and more, of other shapes, formats and recipes than its bounds are from.

Random models of widths up to 1024 with up to 32 experts, and the trained miniature: as ONNX Runtime engines in fp32 and
fp16, as the exported graph unoptimised, as the eager model in bf16; from bf16, FP8 and INT4 checkpoints, as they are
stored or rewritten. Every one must pass. The table says how near its bounds each number format came.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import timing
from shuntyard.engines.build import Request, build
from shuntyard.exporter.export import export
from shuntyard.exporter.relayout import AS_STORED, Relayout
from shuntyard.validate.bounds import excess
from shuntyard.validate.demo import held_out_text, miniature
from shuntyard.validate.report import Report
from shuntyard.validate.validate import Inputs, Plan, validate
from tests.checkpoints import parsed, random_weights, raw_config, write_checkpoint
from tests.exporter.handmade import CHANNEL, PLAIN, TENSOR, Way, declare_compressed_tensors, declare_modelopt, handmade

LENGTHS = (70, 41, 17, 5, 1)
SEED = 20_000

Write = Callable[[Path, dict[str, Any], dict[str, torch.Tensor]], None]


def plain(path: Path, raw: dict[str, Any], weights: dict[str, torch.Tensor]) -> None:
    """As transformers saves it."""
    write_checkpoint(path, raw, weights)


def quantised(way: Way, *, everything: bool = False, modelopt: bool = False) -> Write:
    """Experts, or all that formats quantise, stored in a way."""

    def write(path: Path, raw: dict[str, Any], weights: dict[str, torch.Tensor]) -> None:
        def of(module: str) -> Way:
            kept = "router" in module or "lm_head" in module
            return way if "experts" in module or (everything and not kept) else PLAIN

        layout = (lambda layer: "fused") if modelopt else (lambda layer: "linear")
        made = handmade(raw, weights, of, layout)
        (declare_modelopt if modelopt else declare_compressed_tensors)(made).write(path)

    return write


@dataclass(frozen=True)
class Case:
    """A model and how it is stored."""

    name: str
    raw: dict[str, Any]
    write: Write = plain
    relayout: Relayout = AS_STORED


def drawn(seed: int) -> dict[str, Any]:
    """A configuration."""
    rng = np.random.default_rng(SEED + seed)

    def one(*values: Any) -> Any:
        return values[int(rng.integers(len(values)))]

    groups, experts = one(1, 2, 3), one(1, 4, 8, 16, 32)
    return raw_config(
        num_hidden_layers=one(3, 4, 6),
        vocab_size=one(64, 500),
        hidden_size=one(32, 96, 256, 512, 1024),
        intermediate_size=one(24, 64, 256),
        intermediate_size_mlp=one(40, 300, 1024),
        num_key_value_heads=groups,
        num_attention_heads=groups * one(1, 2, 5),
        head_dim=one(8, 32, 64, 128),
        num_local_experts=experts,
        num_experts_per_tok=min(experts, one(1, 1, 2)),
        interleave_moe_layer_step=one(1, 2),
        no_rope_layer_interval=one(2, 3, 4),
        attention_chunk_size=one(8, 16, 33, 128, None),
        floor_scale=one(3, 16, 64),
        attn_scale=one(0.1, 0.5),
        use_qk_norm=one(True, False),
        attention_bias=one(True, False),
        tie_word_embeddings=one(True, False),
        rms_norm_eps=one(1e-6, 1e-5),
    )


def cases() -> Iterator[Case]:
    """All models but the miniature."""
    for seed in range(11):
        yield Case(f"random {seed}", drawn(seed))
    small = raw_config(num_hidden_layers=4, hidden_size=64, intermediate_size=32, intermediate_size_mlp=96, head_dim=16)
    yield Case("FP8 by channel", small, quantised(CHANNEL))
    yield Case("FP8 by tensor, everything", small, quantised(TENSOR, everything=True))
    yield Case("FP8 of ModelOpt", small, quantised(TENSOR, everything=True, modelopt=True))
    yield Case("INT4 by group", small, quantised(Way("group", 16)))
    yield Case("INT4 by group, everything", small, quantised(Way("group", 32), everything=True))
    yield Case("rewritten, linear experts", small, plain, Relayout("bf16", "linear"))
    yield Case("FP8 rewritten to fp32", small, quantised(CHANNEL), Relayout("fp32", None))


class Bench:
    """Runs and keeps the rows."""

    def __init__(self, work: Path) -> None:
        self.work, self.rows = work, list[dict[str, Any]]()

    def judged(self, name: str, subject: str, reference: Path, inputs: Inputs, context: int) -> None:
        """One engine."""
        begin = time.perf_counter()
        report = validate(subject, str(reference), Plan(inputs, cache=self.work / "cache", decode=24))
        row = {"case": name, "format": report.dtype, "passed": report.passed, "tokens": report.tokens}
        row |= {"modules": len(report.modules), "worst": worst(report), "flips": len(report.flips)}
        row |= {"failures": [f"{c.name} {c.value} {c.bound} {c.detail}" for c in report.failures]}
        self.rows.append(row | {"seconds": round(time.perf_counter() - begin, 1)})
        said = "passes" if report.passed else f"FAILS: {report.failures[0]}"
        print(f"{name}, {report.dtype}: {said}, {row['worst']:.2g} of a bound", flush=True)

    def model(self, case: Case) -> None:
        """A random model in all its forms."""
        with tempfile.TemporaryDirectory(dir=self.work) as name:
            folder = Path(name)
            seed = sum(map(ord, case.name))
            weights = random_weights(parsed(case.raw), seed=seed, dtype=torch.bfloat16)
            case.write(folder / "checkpoint", case.raw, weights)
            rng = np.random.default_rng(seed)
            lines = [rng.integers(0, case.raw["vocab_size"], n).tolist() for n in LENGTHS]
            (folder / "tokens.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
            export(folder / "checkpoint", folder / "model", relayout=case.relayout)
            self.forms(case.name, folder, folder / "checkpoint", Inputs(tokens=folder / "tokens.jsonl"), 72)

    def forms(self, name: str, folder: Path, checkpoint: Path, inputs: Inputs, context: int) -> None:
        """Engines in fp32 and fp16, the eager model in bf16; the graph of every other one."""
        for dtype in ("fp32", "fp16"):
            build(folder / "model", folder / dtype, Request(dtype=dtype, max_context=context))
            self.judged(f"{name}, engine", str(folder / dtype), checkpoint, inputs, context)
        self.judged(f"{name}, eager", f"eager-bf16:{checkpoint}", checkpoint, inputs, context)
        if len(self.rows) % 2 and not name.startswith(("rewritten", "FP8 rewritten")):
            self.judged(f"{name}, graph", f"graph:{folder / 'model'}", checkpoint, inputs, context)

    def trained(self) -> None:
        """The miniature on text that it has not seen, from another place, and on the built-in sets."""
        with tempfile.TemporaryDirectory(dir=self.work) as name:
            folder = Path(name)
            export(miniature(), folder / "model")
            text = held_out_text()[100_000:]
            sets = ("short", "chunk", "long", "adversarial")
            for what, inputs in (("text", Inputs(text, windows=6)), ("sets", Inputs(sets=sets))):
                (folder / what).mkdir()
                (folder / what / "model").symlink_to(folder / "model")
                self.forms(f"miniature, {what}", folder / what, miniature(), inputs, 1024)


def worst(report: Report) -> float:
    """The module nearest to its bound, as a share of it."""
    return max((excess(m) for m in report.modules if m.mode != "free"), default=0.0)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="scratch directory")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        bench = Bench(Path(folder))
        for case in cases():
            bench.model(case)
        bench.trained()
    table = Table(title="sound models: nearest to a bound, as a share of it")
    for column in ("format", "models", "passed", "nearest", "flips"):
        table.add_column(column)
    for dtype in ("fp32", "fp16", "bf16"):
        own = [row for row in bench.rows if row["format"] == dtype]
        passed = sum(row["passed"] for row in own)
        nearest = max((row["worst"] for row in own), default=0.0)
        table.add_row(dtype, str(len(own)), str(passed), f"{nearest:.2g}", str(sum(row["flips"] for row in own)))
    Console().print(table)
    failed = [row for row in bench.rows if not row["passed"]]
    print(f"{len(bench.rows)} sound models, {len(failed)} false alarms")
    timing.write_json(args.json, {**timing.machine(1), "models": len(bench.rows), "rows": bench.rows})
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
