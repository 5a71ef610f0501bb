"""What tests of recipes share: rules in TOML, calibrations made up, and what is in a checkpoint's files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from safetensors.torch import load_file
from torch import Tensor

from shuntyard.exporter.calibration import Calibration
from shuntyard.exporter.checkpoint import open_checkpoint
from shuntyard.exporter.modules import attentions, modules
from shuntyard.exporter.recipe import Recipe, parse_recipe

EXPERT_PARTS = ("gate_proj", "up_proj", "down_proj")


def rule(modules: object, **keys: object) -> str:
    """A rule in TOML."""
    lines = (f"{key} = {json.dumps(value)}" for key, value in ({"modules": modules} | keys).items())
    return "\n".join(("[[rule]]", *lines, ""))


def recipe(*rules: str) -> Recipe:
    """A recipe of such rules."""
    return parse_recipe("".join(rules).encode(), "own", "own.toml")


def write_calibration(path: Path, checkpoint: Path, low: float = 1.0, high: float = 6.0, seed: int = 0) -> Path:
    """A calibration of a checkpoint with a clip of its own for every matrix and cache."""
    opened = open_checkpoint(checkpoint)
    rng = np.random.default_rng(seed)

    def clip() -> float:
        return float(np.float32(rng.uniform(low, high)))

    names = []
    for module in modules(opened.config):
        experts = [f"{module.name}.{e}.{part}" for e in range(module.copies) for part in EXPERT_PARTS]
        names += experts if module.kind == "experts" else [module.name]
    made = Calibration(
        shuntyard="0.0.0",
        checkpoint_fingerprint=opened.fingerprint,
        small_tensors_sha256=opened.small_tensors_sha256(),
        text="text.txt",
        text_sha256="0" * 64,
        tokens=8,
        windows=1,
        length=8,
        method="amax",
        reference="made up",
        inputs={name: clip() for name in names},
        keys={name: clip() for name in attentions(opened.config)},
        values={name: clip() for name in attentions(opened.config)},
    )
    path.write_text(made.model_dump_json())
    return path


def tensors_of(directory: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint, by the names in its files."""
    found: dict[str, Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        found |= load_file(file)
    return found


def matrices_of(values: Mapping[str, Tensor]) -> Iterator[tuple[str, str, Tensor]]:
    """Each matrix ``[out, in]`` of a state dict with fused experts: its module in a rewritten file, and in recipes."""
    for name, value in values.items():
        if name.endswith("experts.gate_up_proj"):
            module = name.removesuffix(".gate_up_proj")
            down = values[f"{module}.down_proj"]
            for e in range(len(value)):
                matrices = (*value[e].chunk(2, dim=1), down[e])
                for part, matrix in zip(EXPERT_PARTS, matrices, strict=True):
                    yield f"{module}.{e}.{part}", module, matrix.T.contiguous()
        elif value.dim() == 2:
            yield name.removesuffix(".weight"), name.removesuffix(".weight"), value
