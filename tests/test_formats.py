"""The miniatures of ``tests/formats.py`` mean what transformers, where it can read them, says that they mean."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import Llama4ForCausalLM, Llama4ForConditionalGeneration, Llama4TextConfig

from tests import formats
from tests.checkpoints import parsed, random_weights, raw_config

IDS = torch.arange(40)[None] % 64
RAW = raw_config()
E4M3 = 2.0**-4  # half a unit in the last of three bits, relative to the number
BF16 = 2.0**-8


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return random_weights(parsed(RAW), seed=3)


def logits(path: Path) -> Tensor:
    model = Llama4ForCausalLM(Llama4TextConfig(**formats.text_config(path))).eval()
    model.load_state_dict(formats.dequantised_state(path), strict=True)
    with torch.no_grad():
        out: Tensor = model(IDS).logits
    return out


def tensors_of(path: Path) -> dict[str, Tensor]:
    return {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_rounded(path: Path, weights: dict[str, Tensor], bound: Callable[[str, Tensor], Tensor]) -> None:
    state = formats.dequantised_state(path)
    assert state.keys() == weights.keys()
    for name, exact in weights.items():
        assert bool(((state[name] - exact).abs() <= bound(name, exact)).all()), name


def e4m3_bound(_: str, exact: Tensor) -> Tensor:
    """Rounded to bf16, scaled by a bf16 scale, rounded to e4m3: subnormals are as coarse as 2^-9 of the scale."""
    largest = exact.abs().amax() if exact.dim() == 1 else exact.abs().flatten(1).amax()
    return exact.abs() * (E4M3 + 2 * BF16) + largest / 448 * 2.0**-9


@pytest.mark.parametrize("as_released", [False, True])
def test_nested_bf16_is_what_transformers_loads(tmp_path: Path, weights: dict[str, Tensor], as_released: bool) -> None:
    path = formats.write_nested(tmp_path / "x", RAW, weights, as_released=as_released, shard_size="20KB")
    loaded = Llama4ForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(IDS).logits, logits(path), rtol=0, atol=1e-6)
    assert len(list(path.glob("*.safetensors"))) > 2
    assert_rounded(path, weights, lambda _, exact: exact.abs() * BF16)


COMPRESSED: dict[str, tuple[Callable[..., Path], dict[str, Any]]] = {
    "fp8 dynamic": (formats.write_fp8_dynamic, {}),
    "fp8 dynamic nested, fp32 scales": (formats.write_fp8_dynamic, {"nested": True, "scale_dtype": torch.float32}),
    "fp8 static": (formats.write_fp8_static, {}),
    "fp8 static by recipe": (formats.write_fp8_static, {"ignore_by_recipe": True}),
    "int4": (formats.write_int4, {"shard_size": "20KB"}),
    "int4 asymmetric": (formats.write_int4, {"symmetric": False}),
    "maverick": (formats.write_maverick_fp8, {"plain_layers": (3,)}),
}


@pytest.mark.parametrize("case", COMPRESSED)
def test_compressed_tensors_are_what_transformers_decompresses(
    tmp_path: Path, weights: dict[str, Tensor], case: str
) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.quantization import disable_quantization

    write, options = COMPRESSED[case]
    path = write(tmp_path / "x", RAW, weights, **options)
    if case != "int4 asymmetric":  # transformers gives the zero points the wrong shape and stops
        nested = "text_config" in json.loads((path / "config.json").read_text())
        loaded: Any = (Llama4ForConditionalGeneration if nested else Llama4ForCausalLM).from_pretrained(
            path, dtype=torch.float32
        )
        loaded.hf_quantizer.compressor.decompress_model(loaded)
        loaded.apply(disable_quantization)
        with torch.no_grad():
            got = getattr(loaded, "language_model", loaded).eval()(IDS).logits
        torch.testing.assert_close(got, logits(path), rtol=0, atol=2e-5)
    if "int4" in case:

        def bound(name: str, exact: Tensor) -> Tensor:
            # Half a step, and up to half a step more where 7.5 is clipped to 7.
            step = 2 * exact.abs().amax() / 15
            return exact.abs() * 2 * BF16 + (step if "feed_forward" in name else 0.0)

        assert_rounded(path, weights, bound)
    else:
        assert_rounded(path, weights, e4m3_bound)


def test_what_maverick_leaves_alone(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    pytest.importorskip("compressed_tensors")
    path = formats.write_maverick_fp8(tmp_path / "x", RAW, weights, plain_layers=(3,))
    scaled = {name.removesuffix("_scale") for name in tensors_of(path) if name.endswith("_scale")}
    stem = "language_model.model.layers.1.feed_forward.experts"
    assert scaled == {f"{stem}.{e}.{part}_proj.weight" for e in range(4) for part in ("gate", "up", "down")}
    assert tensors_of(path)[f"{stem.replace('1', '3')}.0.up_proj.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize("options", [{}, {"kv": True}, {"kv": True, "nested": True, "as_released": True}], ids=str)
def test_modelopt(tmp_path: Path, weights: dict[str, Tensor], options: dict[str, Any]) -> None:
    pytest.importorskip("modelopt.torch.quantization")
    path = formats.write_modelopt_fp8(tmp_path / "x", RAW, weights, **options)
    assert_rounded(path, weights, e4m3_bound)
    tensors, state = tensors_of(path), formats.dequantised_state(path)
    packed = {name for name, tensor in tensors.items() if tensor.dtype == torch.float8_e4m3fn}
    for name in packed:
        scale = tensors[f"{name}_scale" if name.endswith(".weight") else f"{name}_weight_scale"]
        assert scale.shape == () and torch.equal(state[name], tensors[name].float() * scale)
    assert "model.layers.1.feed_forward.experts.gate_up_proj" in packed and len(packed) == 4 * 4 + 2 * 3 + 2 * 5
    assert ("model.layers.0.self_attn.k_proj.k_scale" in tensors) == bool(options.get("kv"))


def test_scales_of_a_compressed_kv_cache(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    pytest.importorskip("compressed_tensors")
    path = formats.write_fp8_static(tmp_path / "x", RAW, weights, kv=True)
    scales = {name: tensor for name, tensor in tensors_of(path).items() if name.endswith(("k_scale", "v_scale"))}
    assert len(scales) == 8 and len({float(scale) for scale in scales.values()}) == 8
    assert json.loads((path / "config.json").read_text())["quantization_config"]["kv_cache_scheme"]["num_bits"] == 8
    assert_rounded(path, weights, e4m3_bound)
