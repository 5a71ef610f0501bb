"""Settings of all tests, and a cache of traced functions: tracing is nearly all of an export's time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch

from shuntyard.engines.build import Request, build
from shuntyard.exporter.export import export
from tests.checkpoints import raw_config, write_checkpoint, write_tokenizer
from tests.traced import traced_once

hypothesis.settings.register_profile(
    "lean", deadline=None, derandomize=True, database=None, suppress_health_check=list(hypothesis.HealthCheck)
)
hypothesis.settings.load_profile("lean")


@pytest.fixture(scope="session", autouse=True)
def trace_once() -> Iterator[dict[str, Callable[..., Any]]]:
    """Traces each part of each configuration once a session; gives the functions that really trace."""
    torch.set_num_threads(1)  # matrices are tiny: threads would only wait for each other
    with traced_once({}) as real:
        yield real


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of 8 layers in three shards."""
    raw = raw_config(num_hidden_layers=8)
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "random", raw, shards=3)


@pytest.fixture(scope="session")
def model_directory(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What export makes of ``checkpoint``, in fp32."""
    out = tmp_path_factory.mktemp("model") / "out"
    export(checkpoint, out)
    return out


@pytest.fixture(scope="session")
def engine_directory(model_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What build makes of ``model_directory`` for ONNX Runtime, with a context of 40 tokens."""
    out = tmp_path_factory.mktemp("engine") / "out"
    build(model_directory, out, Request(max_context=40))
    return out


@dataclass(frozen=True)
class Worded:
    """A checkpoint with a tokenizer and an end-of-sequence token, its model directory and its engine."""

    checkpoint: Path
    model: Path
    engine: Path


@pytest.fixture(scope="session")
def worded(tmp_path_factory: pytest.TempPathFactory) -> Worded:
    """With a context of 64 tokens."""
    folder = tmp_path_factory.mktemp("worded")
    raw = raw_config(num_hidden_layers=8, bos_token_id=1, eos_token_id=2)
    made = Worded(write_checkpoint(folder / "checkpoint", raw, seed=5), folder / "model", folder / "engine")
    write_tokenizer(made.checkpoint, raw["vocab_size"])
    export(made.checkpoint, made.model)
    build(made.model, made.engine, Request(max_context=64))
    return made
