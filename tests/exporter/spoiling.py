"""Sound checkpoints of every form, ways to spoil them, and what a refusal must look like."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from shuntyard.errors import CheckpointError, ShuntyardError, UnsupportedError
from shuntyard.exporter.checkpoint import open_checkpoint
from shuntyard.exporter.weights import Weights, match_weights
from tests.checkpoints import parsed, random_weights, raw_config
from tests.exporter.handmade import (
    CHANNEL,
    PLAIN,
    TENSOR,
    Handmade,
    Way,
    declare_compressed_tensors,
    declare_modelopt,
    handmade,
    linear,
)

# No matrix is square, and no two of its sides are alike: shapes tell everything apart.
RAW = raw_config(
    vocab_size=48, hidden_size=32, intermediate_size=64, intermediate_size_mlp=96, head_dim=16, num_hidden_layers=2
)
INT4 = Way("group", 16)
ATTENTION = "model.layers.0.self_attn"
Q = f"{ATTENTION}.q_proj"  # [64, 32]
EXPERTS = "model.layers.1.feed_forward.experts"
EXPERT = f"{EXPERTS}.3.down_proj"  # [32, 64], in layout linear
ROUTER = "model.layers.1.feed_forward.router"
VISION = {
    "vision_model.patch_embedding.linear.weight": torch.ones(4, 4),
    "multi_modal_projector.linear_1.weight": torch.ones(4),
}

Spoil = Callable[[Handmade], Any]


def sound(way: Way, layout: str = "linear") -> Handmade:
    """A checkpoint with nothing wrong, stored in one way but for the head and the router."""
    made = _stored(way, layout)
    return made if way == PLAIN else declare_compressed_tensors(made)


def modelopt(kv: str | None = None) -> Handmade:
    """The same as ModelOpt writes it: FP8 with a scale a tensor, experts fused."""
    return declare_modelopt(_stored(TENSOR, "fused"), kv)


def _stored(way: Way, layout: str) -> Handmade:
    weights = random_weights(parsed(RAW), seed=2)
    return handmade(RAW, weights, lambda name: PLAIN if name in ("lm_head", ROUTER) else way, lambda layer: layout)


FORMS: dict[str, Callable[[], Handmade]] = {
    "plain": lambda: sound(PLAIN),
    "plain, fused": lambda: sound(PLAIN, "fused"),
    "tensor": lambda: sound(TENSOR),
    "tensor, fused": lambda: sound(TENSOR, "fused"),
    "tensor, scales [1, 1]": lambda: sound(Way("tensor", scale_shape=(1, 1))),
    "channel": lambda: sound(CHANNEL),
    "channel, scales in a row": lambda: sound(Way("channel", scale_shape=(-1,))),
    "channel, fp32 scales": lambda: sound(Way("channel", scale=torch.float32)),
    "group": lambda: sound(INT4),
    "group of the whole channel of some": lambda: sound(Way("group", 32)),
    "modelopt": modelopt,
}


def nested(made: Handmade, prefix: str = "language_model.") -> Handmade:
    """The same with a vision tower, the configuration within another."""
    text = dict(made.raw)
    quantization = text.pop("quantization_config", None)
    around = {"model_type": "llama4", "text_config": text, "vision_config": {"hidden_size": 4}}
    made.raw = around if quantization is None else {**around, "quantization_config": quantization}
    made.tensors = {prefix + name: tensor for name, tensor in made.tensors.items()} | VISION
    return made


def match(made: Handmade, folder: Path) -> Weights:
    """The weights of a checkpoint that is written to ``folder``."""
    return match_weights(open_checkpoint(made.write(folder / "checkpoint")))


def refusal(made: Handmade, folder: Path, run: Callable[[Path], Any] | None = None) -> ShuntyardError:
    """The error, which must name a file of the checkpoint, fit a line and have a hint."""
    path = made.write(folder / "checkpoint")
    with pytest.raises((UnsupportedError, CheckpointError)) as refused:
        (run or (lambda path: match_weights(open_checkpoint(path))))(path)
    error = refused.value
    assert error.message.startswith(str(path))
    assert "\n" not in error.message and len(error.message.replace(str(path), "")) < 300, error.message
    assert error.hint and "\n" not in error.hint
    return error


def change(name: str, by: Callable[[Tensor], Tensor]) -> Spoil:
    """Changes one tensor."""

    def spoil(made: Handmade) -> None:
        made.tensors[name] = by(made.tensors[name])

    return spoil


def added(name: str, tensor: Tensor) -> Spoil:
    """Adds a tensor, or puts it in the place of one."""
    return lambda made: made.tensors.update({name: tensor})


def without(*names: str) -> Spoil:
    """Takes tensors away."""

    def spoil(made: Handmade) -> None:
        for name in names:
            del made.tensors[name]

    return spoil


def renamed(old: str, new: str) -> Spoil:
    """Changes a part of all names."""

    def spoil(made: Handmade) -> None:
        made.tensors = {name.replace(old, new): tensor for name, tensor in made.tensors.items()}

    return spoil


def replaced(module: str, way: Way) -> Spoil:
    """Stores one module in another way than is declared."""

    def spoil(made: Handmade) -> None:
        for name in [name for name in made.tensors if name.startswith(f"{module}.")]:
            del made.tensors[name]
        value = made.values[f"{EXPERTS}.down_proj"][3].T if module == EXPERT else made.values[f"{module}.weight"]
        made.tensors |= linear(module, value, way)[0]

    return spoil


def text_keys(**changes: Any) -> Spoil:
    """Changes keys within ``text_config``."""
    return lambda made: made.raw["text_config"].update(changes)


def keys(**changes: Any) -> Spoil:
    """Changes keys at the top of ``config.json``."""
    return lambda made: made.raw.update(changes)
