"""Sound models, the same with a fault of ``faults.py`` planted, and what a report says of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnx_ir as ir
import pytest
import torch
from safetensors.torch import load_file, save_file

from shuntyard.engines import lower
from shuntyard.engines.build import Request, build
from shuntyard.exporter.config_file import load_config_file
from shuntyard.exporter.export import export
from shuntyard.validate.inputs import Inputs
from shuntyard.validate.report import Report
from tests.checkpoints import parsed, random_weights, raw_config, write_checkpoint
from tests.exporter.handmade import CHANNEL, PLAIN, declare_compressed_tensors, handmade
from tests.validate.faults import Fault, Raw, Tensors

LARGE = 2.0**15
"""What the model "large" multiplies in one product and divides out in the next: more than fp16 holds, in between."""


@dataclass(frozen=True)
class Base:
    """A sound model, and what it is run on."""

    checkpoint: Path
    inputs: Inputs
    max_context: int

    @property
    def chunk(self) -> int:
        """Tokens of a chunk."""
        chunk = load_config_file(self.checkpoint / "config.json").text.attention_chunk_size
        assert chunk is not None
        return chunk


def small(**changes: Any) -> Raw:
    """``config.json`` of the random models."""
    return raw_config(**{"num_hidden_layers": 8, "num_experts_per_tok": 1, **changes})


def write_base(folder: Path, name: str) -> Base:
    """One of the random models that faults are planted in, with tokens beyond chunk and floor."""
    own: dict[str, Raw] = {"top-2": {"num_experts_per_tok": 2}, "bias": {"attention_bias": True}}
    raw = small(**own.get(name, {}))
    weights = random_weights(parsed(raw), seed=11, dtype=torch.bfloat16)
    if name == "large":
        up, down = (f"model.layers.1.feed_forward.shared_expert.{part}_proj.weight" for part in ("up", "down"))
        weights[up], weights[down] = weights[up] * LARGE, weights[down] / LARGE
    path = folder / name
    if name == "fp8":
        made = handmade(raw, weights, lambda module: CHANNEL if "experts" in module else PLAIN)
        declare_compressed_tensors(made).write(path)
    else:
        write_checkpoint(path, raw, weights)
    random = np.random.default_rng(3)
    lines = [random.integers(0, raw["vocab_size"], n).tolist() for n in (40, 21, 5)]
    tokens = folder / f"{name}.jsonl"
    tokens.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return Base(path, Inputs(tokens=tokens), 48)


BASES = ("plain", "top-2", "bias", "large", "fp8")


def spoilt(fault: Fault, base: Base, folder: Path) -> Path:
    """The checkpoint that our side reads: a copy where the fault is in its files, else the base's own."""
    if fault.weights is None and fault.config is None:
        return base.checkpoint
    shutil.copytree(base.checkpoint, folder, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json"))
    tensors: Tensors = {}
    for file in sorted(base.checkpoint.glob("*.safetensors")):
        tensors |= load_file(file)
    if fault.weights is not None:
        fault.weights(tensors)
    save_file(tensors, folder / "model.safetensors")
    raw = json.loads((folder / "config.json").read_text())
    if fault.config is not None:
        fault.config(raw, base.chunk)
    (folder / "config.json").write_text(json.dumps(raw))
    return folder


@contextmanager
def code_planted(fault: Fault, base: Base, *, eager: bool) -> Iterator[None]:
    """The exporter's code with the fault; ``eager`` also with what cannot be traced."""
    config = load_config_file(base.checkpoint / "config.json").text
    with pytest.MonkeyPatch.context() as patch:
        for code in (fault.code, fault.eager if eager else None):
            if code is not None:
                code(base.chunk)(patch, config)
        yield


@contextmanager
def run_planted(fault: Fault, base: Base) -> Iterator[None]:
    """ONNX Runtime's runner with the fault."""
    with pytest.MonkeyPatch.context() as patch:
        if fault.run is not None:
            fault.run(patch, base.chunk)
        yield


def export_faulty(fault: Fault, base: Base, folder: Path) -> Path:
    """A model directory of files and code with the fault."""
    checkpoint = spoilt(fault, base, folder / "checkpoint")
    with code_planted(fault, base, eager=False):
        export(checkpoint, folder / "model")
    return folder / "model"


def build_faulty(fault: Fault, base: Base, model: Path, out: Path, dtype: str = "fp32") -> Path:
    """An ONNX Runtime engine of it, with the fault in its graph."""
    right = lower.for_onnxruntime

    def lowered(graph: ir.Model, own: str) -> None:
        right(graph, own)
        if fault.graph is not None:
            fault.graph(base.chunk)(graph)

    with mock.patch.object(lower, "for_onnxruntime", lowered):
        build(model, out, Request(dtype=dtype, max_context=base.max_context))
    return out


@dataclass(frozen=True)
class Verdict:
    """What the validator said of a fault."""

    caught: bool
    named: bool
    culprit: str
    mode: str
    times: float  # how many times its bound the worst value of the culprit's layer is
    failures: list[str] = field(default_factory=list)


def verdict(fault: Fault, report: Report) -> Verdict:
    """Of a report; a check of files alone catches nothing."""
    failures = [check for check in report.failures if not check.name.startswith("files")]
    number = report.culprit.split(".")[2] if report.culprit.startswith("model.layers.") else None
    own = [
        value / bound
        for m in report.modules
        if m.mode == report.culprit_mode and (m.module == report.culprit if number is None else str(m.layer) == number)
        for value, bound in ((m.relative, m.relative_bound), (m.coordinate, m.coordinate_bound))
        if bound and m.ok is False
    ]
    own += [flip.margin / flip.bound for flip in report.flips if number == str(flip.layer) and flip.bound]
    return Verdict(
        bool(failures),
        bool(failures) and fault.is_right(report.culprit),
        report.culprit,
        report.culprit_mode,
        max(own, default=0.0),
        [f"{check.name}: {check.value} ({check.bound})" for check in failures[:6]],
    )
