"""A calibration is read as it was written, or refused by the name of what is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from shuntyard.errors import CheckpointError
from shuntyard.exporter.calibration import LEAST_CLIP, Calibration, read_calibration
from shuntyard.exporter.checkpoint import open_checkpoint
from tests.checkpoints import raw_config, write_checkpoint

Q_PROJ, ATTENTION = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn"
SOUND: dict[str, Any] = {
    "format": 1,
    "kind": "calibration",
    "shuntyard": "0.1.0",
    "checkpoint_fingerprint": "a" * 64,
    "small_tensors_sha256": "c" * 64,
    "text": "text.txt",
    "text_sha256": "0" * 64,
    "tokens": 64,
    "windows": 2,
    "length": 32,
    "method": "percentile 99.9",
    "reference": "transformers 5.24.0",
    "inputs": {Q_PROJ: 3.5, "lm_head": 12},
    "keys": {ATTENTION: 2.25},
    "values": {ATTENTION: 0.1},
    "unreached": [],
    "zero": [],
}


def written(folder: Path, text: str | bytes) -> Path:
    path = folder / "calibration.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_what_is_written_is_read(tmp_path: Path) -> None:
    made = Calibration.model_validate(SOUND)
    read = read_calibration(written(tmp_path, made.model_dump_json(indent=1)))
    assert read == made
    assert read.scale(Q_PROJ) == 3.5 / 448
    assert read.scale("lm_head") == float(np.float32(12) / np.float32(448))
    assert read.cache_scale(ATTENTION, "keys") == float(np.float32(2.25) / np.float32(448))
    assert read.cache_scale(ATTENTION, "values") == float(np.float32(0.1) / np.float32(448))


@given(st.floats(LEAST_CLIP, float(np.finfo(np.float32).max), width=32))
def test_a_scale_is_a_normal_number_of_fp32(clip: float) -> None:
    made = Calibration.model_validate(SOUND | {"inputs": {Q_PROJ: clip}})
    scale = np.float32(made.scale(Q_PROJ))
    assert float(scale) == made.scale(Q_PROJ) and scale == np.float32(clip) / np.float32(448)
    assert np.finfo(np.float32).tiny <= scale < np.inf
    assert json.loads(made.model_dump_json())["inputs"][Q_PROJ] == clip


@pytest.mark.parametrize("name", ["lm_heads", ATTENTION, "model.layers.1.self_attn.q_proj"])
def test_a_module_that_was_not_calibrated(name: str) -> None:
    with pytest.raises(CheckpointError, match=f"does not have '{name}'"):
        Calibration.model_validate(SOUND).scale(name)


def test_a_cache_that_was_not_calibrated() -> None:
    with pytest.raises(CheckpointError, match=r"does not have 'model\.layers\.1\.self_attn'"):
        Calibration.model_validate(SOUND).cache_scale("model.layers.1.self_attn", "keys")


BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "zero": ({"inputs": {Q_PROJ: 0.0}}, rf"inputs\.{Q_PROJ}: .*greater than 0, got 0"),
    "negative": ({"keys": {ATTENTION: -1.5}}, rf"keys\.{ATTENTION}: .*greater than 0, got -1\.5"),
    "too small": ({"values": {ATTENTION: 1e-40}}, rf"values\.{ATTENTION}: 1e-40 is out of the range of fp32"),
    "too large": ({"inputs": {Q_PROJ: 1e39}}, rf"inputs\.{Q_PROJ}: 1e\+39 is out of the range of fp32"),
    "text for a number": ({"inputs": {Q_PROJ: "3.5"}}, rf"inputs\.{Q_PROJ}: .*valid number"),
    "no number": ({"inputs": {Q_PROJ: None}}, rf"inputs\.{Q_PROJ}: .*valid number"),
    "truth for a number": ({"inputs": {Q_PROJ: True}}, rf"inputs\.{Q_PROJ}: .*valid number"),
    "a list": ({"inputs": [3.5]}, r"inputs: .*dictionary"),
    "another format": ({"format": 2}, r"format: .*, got 2"),
    "another kind": ({"kind": "recipe"}, r"kind: .*'recipe'"),
    "an unknown key": ({"scales": {}}, r"scales: .*not permitted"),
    "no tokens": ({"tokens": 0}, r"tokens: .*greater than or equal to 1"),
    "half a token": ({"tokens": 1.5}, r"tokens: .*integer"),
    "no fingerprint": ({"checkpoint_fingerprint": "abc"}, r"checkpoint_fingerprint: "),
    "unreached": ({"unreached": "all"}, r"unreached: .*list"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_ones_are_refused_by_file_and_key(tmp_path: Path, case: str) -> None:
    changes, message = BROKEN[case]
    path = written(tmp_path, json.dumps(SOUND | changes))
    with pytest.raises(CheckpointError, match=message) as refusal:
        read_calibration(path)
    assert refusal.value.message.startswith(f"{path}: ") and "\n" not in refusal.value.message
    assert "calibrate" in refusal.value.hint


@pytest.mark.parametrize("key", SOUND)
def test_every_key_must_be_there(tmp_path: Path, key: str) -> None:
    path = written(tmp_path, json.dumps({name: value for name, value in SOUND.items() if name != key}))
    with pytest.raises(CheckpointError, match=f"calibration.json: {key}: is missing"):
        read_calibration(path)


@pytest.mark.parametrize("text", [b"", b"{", b"[1]", b"\xff", b'{"format": 1, "format": 1}', b'{"inputs": {"a": NaN}}'])
def test_what_is_no_json_is_refused(tmp_path: Path, text: bytes) -> None:
    with pytest.raises(CheckpointError, match=r"calibration\.json: ") as refusal:
        read_calibration(written(tmp_path, text))
    assert "calibrate" in refusal.value.hint


def test_an_infinite_number_is_refused(tmp_path: Path) -> None:
    text = json.dumps(SOUND).replace("2.25", "1e999")
    with pytest.raises(CheckpointError, match=rf"keys\.{ATTENTION}: .*finite"):
        read_calibration(written(tmp_path, text))


def test_none_is_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such calibration"):
        read_calibration(tmp_path / "calibration.json")
    with pytest.raises(CheckpointError, match="no such calibration"):
        read_calibration(tmp_path)


def test_it_is_of_one_checkpoint(tmp_path: Path) -> None:
    own = open_checkpoint(write_checkpoint(tmp_path / "own", raw_config()))
    other = open_checkpoint(write_checkpoint(tmp_path / "other", raw_config(floor_scale=5)))
    sample = own.small_tensors_sha256()
    made = Calibration.model_validate(
        SOUND | {"checkpoint_fingerprint": own.fingerprint, "small_tensors_sha256": sample}
    )
    made.check(own)
    tuned = open_checkpoint(write_checkpoint(tmp_path / "tuned", raw_config(), seed=3))
    assert tuned.fingerprint == own.fingerprint  # of the same shapes
    with pytest.raises(CheckpointError, match="of the same shapes: norms, routers or scales differ"):
        made.check(tuned)
    with pytest.raises(CheckpointError, match="is of another checkpoint") as refusal:
        made.check(other)
    assert str(other.path) in refusal.value.message and refusal.value.hint == "shuntyard calibrate this one"


def test_it_cannot_be_changed() -> None:
    with pytest.raises(ValidationError):
        Calibration.model_validate(SOUND).tokens = 3
