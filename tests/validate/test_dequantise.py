"""The reference's own reading of quantised files, against values that are known and the formats' own libraries."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from shuntyard.errors import CheckpointError
from shuntyard.validate.dequantise import dequantised_state
from shuntyard.validate.reference import Reference
from tests.checkpoints import parsed, random_weights, raw_config
from tests.exporter.handmade import CHANNEL, PLAIN, TENSOR, Way, declare_compressed_tensors, handmade

RAW = raw_config(intermediate_size=32, intermediate_size_mlp=48)


@pytest.mark.parametrize("way", [CHANNEL, TENSOR, Way("group", 16, torch.float16), PLAIN], ids=str)
@pytest.mark.parametrize("layout", ["linear", "fused"])
def test_values(way: Way, layout: str, tmp_path: Path) -> None:
    if layout == "fused" and way.form in ("channel", "group"):
        pytest.skip("fused experts come plain or with one scale")
    weights = random_weights(parsed(RAW), dtype=torch.bfloat16)
    made = handmade(RAW, weights, lambda module: PLAIN if "router" in module else way, lambda layer: layout)
    checkpoint = declare_compressed_tensors(made).write(tmp_path / "checkpoint")
    state = dequantised_state(checkpoint)
    assert state.keys() == made.values.keys()
    for name, value in made.values.items():
        assert torch.equal(state[name], value.float()), name


def test_reference_of_a_quantised_checkpoint(tmp_path: Path) -> None:
    weights = random_weights(parsed(RAW), dtype=torch.bfloat16)
    made = declare_compressed_tensors(handmade(RAW, weights, lambda m: PLAIN if "router" in m else CHANNEL))
    reference = Reference(made.write(tmp_path / "checkpoint"))
    state = reference._model.state_dict()
    for name, value in made.values.items():
        assert torch.equal(state[name], value.float()), name


def test_a_number_without_its_scale_is_no_weight(tmp_path: Path) -> None:
    weights = random_weights(parsed(RAW), dtype=torch.bfloat16)
    made = declare_compressed_tensors(handmade(RAW, weights, lambda m: PLAIN if "router" in m else CHANNEL))
    del made.tensors["model.layers.0.self_attn.q_proj.weight_scale"]
    with pytest.raises(CheckpointError, match=r"q_proj.weight' is torch.float8_e4m3fn without a scale"):
        dequantised_state(made.write(tmp_path / "checkpoint"))


def test_files_outside_the_index_are_no_part_of_the_checkpoint(tmp_path: Path) -> None:
    weights = random_weights(parsed(RAW), dtype=torch.bfloat16)
    made = declare_compressed_tensors(handmade(RAW, weights, lambda m: PLAIN if "router" in m else CHANNEL))
    checkpoint = made.write(tmp_path / "checkpoint")
    save_file({"lm_head.weight": torch.zeros(64, 32)}, checkpoint / "old.safetensors")
    assert torch.equal(dequantised_state(checkpoint)["lm_head.weight"], made.values["lm_head.weight"].float())


def test_plain_experts_one_by_one_are_read_too(tmp_path: Path) -> None:
    weights = random_weights(parsed(RAW), dtype=torch.bfloat16)
    made = handmade(RAW, weights, lambda module: PLAIN)
    state = Reference(made.write(tmp_path / "checkpoint"))._model.state_dict()
    for name, value in made.values.items():
        assert torch.equal(state[name], value.float()), name
