"""Says which new tensors a rewrite makes: the model's weights in another type, its experts in another layout.

What comes out is a checkpoint of its own: a text model under the names of ``exporter/weights.py``, plain or as it was
quantised, which ``export`` takes as it takes any other.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from shuntyard.errors import UnsupportedError
from shuntyard.exporter.config_file import NESTED_IN, token_id
from shuntyard.exporter.rewrite import Piece, Target
from shuntyard.exporter.strict_json import read_json
from shuntyard.exporter.weights import EXPERT_PARTS, Experts, Stored, Weights

DTYPES = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}
CONFIG_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
LAYOUTS = ("fused", "linear")


@dataclass(frozen=True)
class Relayout:
    """What is asked for; None: as it is stored."""

    weights: str | None = None  # fp32, fp16, bf16
    experts: str | None = None  # fused, linear

    def __bool__(self) -> bool:
        """Whether anything is asked for."""
        return self.weights is not None or self.experts is not None

    def check(self, weights: Weights) -> None:
        """Refuses what cannot be done.

        Raises:
            UnsupportedError: an unknown name, or quantised weights that would have to be cut or joined as they are.
        """
        for what, value, known in (("weights", self.weights, DTYPES), ("experts", self.experts, LAYOUTS)):
            if value is not None and value not in known:
                raise UnsupportedError(f"--{what} {value} is not known", hint=f"one of {', '.join(known)}")
        if self.weights is not None or not self:
            return
        for name, stored in weights.stored():
            if stored.form != "none":
                raise UnsupportedError(
                    f"'{name}' is quantised, and --experts alone leaves values as they are",
                    hint="give --weights bf16 as well: that dequantises",
                )


AS_STORED = Relayout()


def targets(weights: Weights, asked: Relayout) -> list[Target]:
    """The tensors of the new checkpoint, in the model's order."""
    found = [copied(name, stored, _dtype(stored, asked)) for name, stored in weights.linears.items()]
    for layer, experts in weights.experts.items():
        found += expert_targets(f"model.layers.{layer}.feed_forward.experts", experts, asked)
    return found


def _dtype(stored: Stored, asked: Relayout) -> str:
    return stored.entry.dtype if asked.weights is None else DTYPES[asked.weights]


def piece_of(stored: Stored, **cut: Any) -> Piece:
    """A stored matrix, or what is cut out of it, as a piece of a target; quantised ones are dequantised."""
    return Piece(stored.entry, scale=stored.scale, group=stored.group_size, **cut)


def copied(name: str, stored: Stored, dtype: str) -> Target:
    """A parameter by itself, in a type."""
    shape = stored.entry.shape
    if stored.group_size:
        shape = (*shape[:-1], shape[-1] * 8)
    return Target(name, dtype, shape, ((piece_of(stored),),))


def expert_matrices(experts: Experts) -> dict[str, list[dict[str, Any]]]:
    """For gate, up and down, how each expert's matrix ``[out, in]`` is taken out of what is stored."""
    count, parts = experts.form.experts, experts.parts
    if experts.form.layout == "linear":
        return {
            part: [{"stored": stored} for stored in parts[i * count : (i + 1) * count]]
            for i, part in enumerate(EXPERT_PARTS)
        }
    found: dict[str, list[dict[str, Any]]] = {part: [] for part in EXPERT_PARTS}
    gate_up, down = parts
    width = gate_up.entry.shape[-1] // 2
    for e in range(count):
        for part, columns in (("gate_proj", (0, width)), ("up_proj", (width, 2 * width))):
            found[part].append({"stored": gate_up, "index": e, "columns": columns, "transpose": True})
        found["down_proj"].append({"stored": down, "index": e, "transpose": True})
    return found


def expert_targets(module: str, experts: Experts, asked: Relayout) -> Iterator[Target]:
    """The experts of one layer."""
    layout = asked.experts or ("linear" if experts.form.layout == "linear" else "fused")
    dtype = _dtype(experts.parts[0], asked)
    matrices = expert_matrices(experts)
    pieces = {part: [piece_of(**own) for own in owns] for part, owns in matrices.items()}
    if layout == "linear":
        for part, owns in pieces.items():
            for e, piece in enumerate(owns):
                yield Target(f"{module}.{e}.{part}.weight", dtype, piece.shape, ((piece,),))
        return
    count = experts.form.experts
    gate_up: tuple[tuple[Piece, ...], ...]
    inner, hidden = pieces["gate_proj"][0].shape
    if experts.form.layout == "linear":
        turned = {part: [_turned(piece) for piece in owns] for part, owns in pieces.items()}
        gate_up = tuple(zip(turned["gate_proj"], turned["up_proj"], strict=True))
        down = tuple((piece,) for piece in turned["down_proj"])
    else:
        # As they are stored: gate and up side by side.
        gate_up, down = (tuple((piece_of(own, index=e),) for e in range(count)) for own in experts.parts)
    yield Target(f"{module}.gate_up_proj", dtype, (count, hidden, 2 * inner), gate_up)
    yield Target(f"{module}.down_proj", dtype, (count, inner, hidden), down)


def _turned(piece: Piece) -> Piece:
    """The matrix ``[in, out]`` of a stored ``[out, in]``."""
    return replace(piece, transpose=not piece.transpose)


def new_config(checkpoint: Path, asked: Relayout) -> str:
    """``config.json`` of the new checkpoint: the text model's, without a quantisation, of the new type."""
    text = plain_config(checkpoint)
    if asked.weights is not None:
        text["dtype"] = CONFIG_DTYPES[asked.weights]
    return json.dumps(text, indent=2) + "\n"


def plain_config(checkpoint: Path) -> dict[str, Any]:
    """The text model's part of a ``config.json``, without a quantisation and a type."""
    raw = read_json(checkpoint / "config.json")
    text = dict(raw.get(NESTED_IN, raw)) if raw.get("model_type") == "llama4" else dict(raw)
    text.setdefault("model_type", "llama4_text")
    text["architectures"] = ["Llama4ForCausalLM"]
    for key in ("quantization_config", "dtype", "torch_dtype"):
        text.pop(key, None)
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        text[key] = token_id(raw, key)
    return text
