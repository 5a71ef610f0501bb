"""The checkpoints that full-size tests stand on: are they what transformers would have written?"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors import safe_open

from tests.sizes import FORMATS, MODELS, VISION, raw_config, tensors_of, text_config
from tests.sparse import fill, names_to_fill, places, shards_of, write_sparse

SMALL = text_config(
    attention_chunk_size=8,
    floor_scale=4,
    head_dim=8,
    hidden_size=32,
    intermediate_size=24,
    intermediate_size_mlp=40,
    interleave_moe_layer_step=2,
    num_attention_heads=4,
    num_hidden_layers=4,
    num_key_value_heads=2,
    num_local_experts=4,
    pad_token_id=0,
    rope_scaling=None,
    vocab_size=64,
)
SMALL_VISION = VISION | {
    "hidden_size": 16,
    "image_size": 28,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "projector_input_dim": 24,
    "projector_output_dim": 24,
    "vision_output_dim": 24,
}


@pytest.mark.parametrize("form", ["bf16", "bf16-text"])
@pytest.mark.parametrize("name", ["scout", "maverick"])
def test_names_shapes_and_order_are_those_of_transformers(name: str, form: str) -> None:
    raw = raw_config(MODELS[name], form)
    kind, config = ("Llama4ForCausalLM", "Llama4TextConfig") if form == "bf16-text" else (
        "Llama4ForConditionalGeneration", "Llama4Config",
    )  # fmt: skip
    with torch.device("meta"):
        model = getattr(transformers, kind)(getattr(transformers, config)(**raw))
    theirs = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    assert [(key, tensor.shape) for key, tensor in tensors_of(raw).items()] == list(theirs.items())


def test_shards_are_as_many_as_on_the_hub() -> None:
    counts = {name: len(shards_of(tensors_of(raw_config(MODELS[name], "bf16")))) for name in ("scout", "maverick")}
    assert counts == {"scout": 50, "maverick": 55}


def test_behemoth_has_the_announced_sizes() -> None:
    tensors = tensors_of(raw_config(MODELS["behemoth"], "bf16-text"))
    parameters = {name: math.prod(tensor.shape) for name, tensor in tensors.items()}
    experts = sum(count for name, count in parameters.items() if ".experts." in name)
    active = sum(parameters.values()) - experts + experts // 16
    assert round(active / 1e9) == 288
    assert round(sum(parameters.values()) / 1e12, 1) == 2.0


@pytest.mark.parametrize("form", FORMATS)
def test_full_size_takes_no_room(form: str, tmp_path: Path) -> None:
    raw = raw_config(MODELS["maverick"], form)
    path = write_sparse(tmp_path / "checkpoint", raw)
    shards = list(path.glob("*.safetensors"))
    tensors = tensors_of(raw)
    assert sum(file.stat().st_size for file in shards) > sum(tensor.nbytes for tensor in tensors.values())
    assert sum(512 * file.stat().st_blocks for file in path.iterdir()) < 8 * 2**20
    index = json.loads((path / "model.safetensors.index.json").read_text())
    assert {name: place.file.name for name, place in places(path).items()} == index["weight_map"]


@pytest.mark.parametrize("form", FORMATS)
def test_the_safetensors_library_reads_them(form: str, tmp_path: Path) -> None:
    raw = raw_config(SMALL, form, SMALL_VISION)
    path = write_sparse(tmp_path / "checkpoint", raw, limit=20_000)
    found: dict[str, Any] = {}
    for file in path.glob("*.safetensors"):
        with safe_open(file, "pt") as shard:
            found |= {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118  no iterator
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == {
        name: tensor.shape for name, tensor in tensors_of(raw).items()
    }
    assert not any(tensor.float().any() for tensor in found.values())


@pytest.mark.parametrize("form", ["bf16", "bf16-text"])
def test_what_is_filled_is_what_transformers_loads(form: str, tmp_path: Path) -> None:
    raw = raw_config(SMALL, form, SMALL_VISION)
    path = write_sparse(tmp_path / "checkpoint", raw, limit=20_000)
    names = names_to_fill(tensors_of(raw), {1}, None)
    written = fill(path, names)
    assert written == sum(tensors_of(raw)[name].nbytes for name in names)
    kind = "Llama4ForCausalLM" if form == "bf16-text" else "Llama4ForConditionalGeneration"
    model = getattr(transformers, kind).from_pretrained(path)
    for name, tensor in model.state_dict().items():
        assert bool(tensor.any()) == (name in names), name


def _bytes(path: Path, name: str) -> bytes:
    tensor, file, offset = places(path)[name]
    with file.open("rb") as stream:
        stream.seek(offset)
        return stream.read(tensor.nbytes)


def test_an_expert_is_the_same_whatever_else_is_filled(tmp_path: Path) -> None:
    raw = raw_config(SMALL, "bf16-text")
    name = "model.layers.1.feed_forward.experts.gate_up_proj"
    all_of_them, one = (write_sparse(tmp_path / word, raw) for word in ("all", "one"))
    fill(all_of_them, [name])
    fill(one, [name], experts=[2])
    half = len(_bytes(one, name)) // 4
    everything, single = _bytes(all_of_them, name), _bytes(one, name)
    assert single[2 * half : 3 * half] == everything[2 * half : 3 * half]
    assert not any(single[: 2 * half] + single[3 * half :])
    assert len({everything[e * half : (e + 1) * half] for e in range(4)}) == 4


@pytest.mark.parametrize("form", FORMATS)
def test_filled_weights_have_unit_gain(form: str, tmp_path: Path) -> None:
    raw = raw_config(SMALL | {"hidden_size": 128, "intermediate_size": 256}, form, SMALL_VISION)
    path = write_sparse(tmp_path / "checkpoint", raw)
    fill(path, names_to_fill(tensors_of(raw), {1}, None))
    tensors: dict[str, Any] = {}
    for file in path.glob("*.safetensors"):
        with safe_open(file, "pt") as shard:
            for key in shard.keys():  # noqa: SIM118  no iterator
                if key.removeprefix("language_model.").startswith("model.layers.1."):
                    tensors[key.partition(".layers.1.")[2]] = shard.get_tensor(key).float()
    name, scale = {
        "fp8-meta": ("feed_forward.experts.3.up_proj.weight", "feed_forward.experts.3.up_proj.weight_scale"),
        "fp8-modelopt": ("feed_forward.experts.gate_up_proj", "feed_forward.experts.gate_up_proj_weight_scale"),
    }.get(form, ("feed_forward.experts.gate_up_proj", None))
    weight = tensors[name] * (tensors[scale] if scale else 1.0)
    assert float(weight.std()) * np.sqrt(128) == pytest.approx(1, abs=0.25)
    assert float(tensors["self_attn.q_proj.weight"].std()) > 0
