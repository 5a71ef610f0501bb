"""Declarations of quantisation, as libraries write them, and how a refusal of one must look."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from shuntyard.errors import CheckpointError, ShuntyardError, UnsupportedError
from shuntyard.exporter.quantization import Quantization, read_quantization

WEIGHTS: dict[str, Any] = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel", "dynamic": False}
INT4 = WEIGHTS | {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128}
DYNAMIC = WEIGHTS | {"strategy": "token", "dynamic": True}
STATIC = WEIGHTS | {"strategy": "tensor"}
Q = "model.layers.0.self_attn.q_proj"
UP = "model.layers.0.feed_forward.up_proj"


def group(weights: dict[str, Any] | None = None, *targets: str, **changes: Any) -> dict[str, Any]:
    raw: dict[str, Any] = {"targets": list(targets or ["Linear"]), "weights": weights or WEIGHTS}
    return {key: value for key, value in (raw | changes).items() if value is not ...}


def compressed_tensors(*groups: dict[str, Any], **changes: Any) -> dict[str, Any]:
    raw: dict[str, Any] = {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "config_groups": {f"group_{i}": one for i, one in enumerate(groups or [group()])},
        "ignore": ["lm_head"],
    }
    return {key: value for key, value in (raw | changes).items() if value is not ...}


def modelopt(**changes: Any) -> dict[str, Any]:
    """The section that is embedded in ``config.json``."""
    weights = {"dynamic": False, "num_bits": 8, "type": "float"}
    raw: dict[str, Any] = {
        "quant_method": "modelopt",
        "quant_algo": "FP8",
        "config_groups": {"group_0": {"input_activations": weights, "weights": weights, "targets": ["Linear"]}},
        "ignore": ["lm_head"],
        "producer": {"name": "modelopt", "version": "0.47.0"},
    }
    return {key: value for key, value in (raw | changes).items() if value is not ...}


def beside(**changes: Any) -> dict[str, Any]:
    """``hf_quant_config.json``."""
    inner: dict[str, Any] = {"quant_algo": "FP8", "kv_cache_quant_algo": None, "exclude_modules": ["lm_head"]}
    inner = {key: value for key, value in (inner | changes).items() if value is not ...}
    return {"producer": {"name": "modelopt", "version": "0.47.0"}, "quantization": inner}


def read(folder: Path, section: dict[str, Any] | None, file: Any = None) -> Quantization | None:
    if file is not None:
        text = file if isinstance(file, str) else json.dumps(file)
        (folder / "hf_quant_config.json").write_text(text)
    return read_quantization(folder, section)


def declared(folder: Path, section: dict[str, Any] | None, file: Any = None) -> Quantization:
    found = read(folder, section, file)
    assert found is not None
    return found


def refusal(folder: Path, section: dict[str, Any] | None, file: Any = None) -> ShuntyardError:
    """The error, which must name the file, fit a line and have a hint."""
    with pytest.raises((UnsupportedError, CheckpointError)) as refused:
        read(folder, section, file)
    error = refused.value
    names = [str(folder / name) for name in ("config.json", "hf_quant_config.json")]
    assert error.message.startswith(tuple(f"{name}: " for name in names))
    assert "\n" not in error.message and len(error.message.replace(str(folder), "")) < 300, error.message
    assert error.hint and "\n" not in error.hint
    return error
