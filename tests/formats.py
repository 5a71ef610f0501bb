"""Miniature checkpoints in the formats that Llama 4 is published in, each written by the format's own library.

    write_nested         bf16, ``Llama4ForConditionalGeneration``: text under ``language_model.``, a vision tower beside
    write_fp8_dynamic    compressed-tensors: FP8, a scale a row, activations scaled per token at run time
    write_fp8_static     compressed-tensors: FP8, a scale a tensor, and a calibrated ``input_scale``
    write_int4           compressed-tensors: w4a16, eight numbers in an int32, a scale a group of a row
    write_maverick_fp8   compressed-tensors as Meta's Maverick-FP8: the routed experts alone, one by one
    write_modelopt_fp8   ModelOpt: FP8, a scale a tensor, experts stay fused; optionally scales of an FP8 KV cache

``dequantised_state`` reads any of them back with the arithmetic of the same library, in fp32. ``from_pretrained`` alone
would be no reference: it cannot load ModelOpt's files nor packed zero points, with ``dequantize=True`` it rounds to the
scales' bf16, and without it rounds activations too. ``tests/test_formats.py`` compares the two where it can.

Needs ``compressed_tensors`` or ``modelopt``, whichever the format is of; a caller skips where it is not installed.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import DynamicCache, Llama4Config, Llama4ForCausalLM, Llama4ForConditionalGeneration, Llama4TextConfig
from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.quantizers.base import SequentialLlama4TextExperts

VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
    "projector_input_dim": 16,
    "projector_output_dim": 16,
    "vision_output_dim": 16,
}
BESIDE_THE_TEXT = ("vision_model.", "multi_modal_projector.")
OF_THE_FILE = ("architectures", "dtype", "torch_dtype", "quantization_config")

# The recipe of llm-compressor's examples for Llama 4, and so of most quantised Scouts.
RECIPE = (
    "re:.*lm_head",
    "re:.*self_attn",
    "re:.*router",
    "re:.*vision_model.*",
    "re:.*multi_modal_projector.*",
    "Llama4TextAttention",
)
EXPERTS_ALONE = (*RECIPE, "re:.*shared_expert", r"re:.*feed_forward\.(gate|up|down)_proj")
ALL_LINEARS = tuple(pattern for pattern in RECIPE if "self_attn" not in pattern)

FP8_MAX = 448.0
WHOLE = "5GB"
"""No shard is as large: one file. ``"20KB"`` makes several of a miniature."""


def write_nested(
    path: Path,
    raw: dict[str, Any],
    weights: Mapping[str, Tensor],
    *,
    as_released: bool = False,
    shard_size: str = WHOLE,
) -> Path:
    """bf16 with a vision tower; ``as_released`` spells ``config.json`` as in April 2025, with transformers 4.51."""
    _model(raw, weights, nested=True).save_pretrained(path, max_shard_size=shard_size)
    if as_released:
        _spell_as_released(path / "config.json")
    return path


def write_fp8_dynamic(path: Path, raw: dict[str, Any], weights: Mapping[str, Tensor], **options: Any) -> Path:
    """``X.weight`` e4m3 ``[out, in]``, ``X.weight_scale`` ``[out, 1]``; ``options`` as of ``_compress``."""
    return _compress(path, raw, weights, "FP8_DYNAMIC", **options)


def write_fp8_static(path: Path, raw: dict[str, Any], weights: Mapping[str, Tensor], **options: Any) -> Path:
    """``X.weight`` e4m3 ``[out, in]``, ``X.weight_scale`` and ``X.input_scale`` ``[1]``, attention included."""
    return _compress(path, raw, weights, "FP8", **{"ignore": ALL_LINEARS, **options})


def write_int4(
    path: Path,
    raw: dict[str, Any],
    weights: Mapping[str, Tensor],
    *,
    group: int = 8,
    symmetric: bool = True,
    **options: Any,
) -> Path:
    """``X.weight_packed`` int32 ``[out, ceil(in / 8)]``, ``X.weight_scale`` ``[out, in / group]``, ``weight_shape``."""
    return _compress(path, raw, weights, "W4A16" if symmetric else "W4A16_ASYM", group=group, **options)


def write_maverick_fp8(
    path: Path,
    raw: dict[str, Any],
    weights: Mapping[str, Tensor],
    *,
    plain_layers: tuple[int, ...] = (),
    **options: Any,
) -> Path:
    """Nested, FP8 in the routed experts alone; those of ``plain_layers`` stay in bf16, though one by one as well."""
    plain = [rf"re:.*layers\.{layer}\." for layer in plain_layers]
    return _compress(path, raw, weights, "FP8_DYNAMIC", nested=True, ignore=(*EXPERTS_ALONE, *plain), **options)


def write_modelopt_fp8(
    path: Path,
    raw: dict[str, Any],
    weights: Mapping[str, Tensor],
    *,
    kv: bool = False,
    nested: bool = False,
    as_released: bool = False,
    shard_size: str = WHOLE,
) -> Path:
    """FP8 with one scale a tensor, ``kv`` with scales for the KV cache too.

    ``as_released`` names tensors as NVIDIA's Llama 4 files do, without ``language_model.`` though the config is nested,
    and keeps the description of the format to ``hf_quant_config.json``.
    """
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint
    from modelopt.torch.quantization.utils import update_quant_cfg_with_kv_cache_quant

    recipe = copy.deepcopy(mtq.FP8_DEFAULT_CFG)
    if kv:
        recipe = update_quant_cfg_with_kv_cache_quant(recipe, mtq.FP8_KV_CFG["quant_cfg"])
    model = _model(raw, weights, nested)
    text = getattr(model, "language_model", model)
    model = mtq.quantize(model, recipe, lambda _: text(input_ids=_some_text(raw)))
    # The export runs the whole model on text, where transformers 5.24's nested model looks for this field.
    with mock.patch.object(MoeCausalLMOutputWithPast, "image_outputs", None, create=True):
        export_hf_checkpoint(model, export_dir=path, max_shard_size=shard_size)
    if as_released:
        for file in path.glob("*.safetensors"):
            tensors = load_file(file)
            save_file({name.removeprefix("language_model."): tensor for name, tensor in tensors.items()}, file)
        for file in (*path.glob("*.index.json"), path / "hf_quant_config.json"):
            file.write_text(file.read_text().replace('"language_model.', '"'))
        config = json.loads((path / "config.json").read_text())
        del config["quantization_config"]
        (path / "config.json").write_text(json.dumps(config))
    return path


def text_config(path: Path) -> dict[str, Any]:
    """The text model's part of ``config.json``, as ``Llama4TextConfig`` and ``parse_config`` take it."""
    config = json.loads((path / "config.json").read_text())
    return {key: value for key, value in config.get("text_config", config).items() if key not in OF_THE_FILE}


def dequantised_state(path: Path) -> dict[str, Tensor]:
    """The text model's weights in fp32 under the names of ``Llama4ForCausalLM``, experts fused."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        tensors |= load_file(file)
    text = {
        name.removeprefix("language_model."): tensor
        for name, tensor in tensors.items()
        if not name.startswith(BESIDE_THE_TEXT)
    }
    described = json.loads((path / "config.json").read_text()).get("quantization_config")
    if described is not None and described["quant_method"] == "compressed-tensors":
        text = _decompressed(text, described)
    elif (path / "hf_quant_config.json").exists():
        text = _scaled(text)
    assert all(tensor.dtype in (torch.bfloat16, torch.float32) for tensor in text.values()), "left as it was packed"
    return _fused({name: tensor.float() for name, tensor in text.items()}, text_config(path))


def _model(raw: dict[str, Any], weights: Mapping[str, Tensor], nested: bool) -> Any:
    """transformers' model in bf16 with these weights, and a random vision tower if ``nested``."""
    text = {key: value for key, value in raw.items() if key not in OF_THE_FILE}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if nested:
            image = {f"{name}_token_index": raw["vocab_size"] - 1 - i for i, name in enumerate(("boi", "eoi", "image"))}
            tied = {"tie_word_embeddings": raw.get("tie_word_embeddings", False)}
            config = Llama4Config(text_config=text, vision_config=VISION, **image, **tied)
            model: Any = Llama4ForConditionalGeneration(config)
        else:
            model = Llama4ForCausalLM(Llama4TextConfig(**text))
    outcome = getattr(model, "language_model", model).load_state_dict(dict(weights), strict=False)
    tied_head = {"lm_head.weight"} if raw.get("tie_word_embeddings") else set()
    assert not set(outcome.missing_keys) - tied_head and not outcome.unexpected_keys, outcome
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        parameter.data = parameter.data.bfloat16()  # .to(bfloat16) would take the rotary tables along
    model.config.dtype = torch.bfloat16
    model.config.architectures = [type(model).__name__]  # ModelOpt asks for it
    return model.eval()


def _some_text(raw: dict[str, Any]) -> Tensor:
    """Tokens to calibrate with, longer than a chunk."""
    return torch.randint(0, raw["vocab_size"], (2, 24), generator=torch.Generator().manual_seed(0))


def _spell_as_released(file: Path) -> None:
    """Rewrites ``config.json`` with the keys that Meta's files have: rope in two keys, derived lists left out."""
    config = json.loads(file.read_text())
    for part in (config, config["text_config"]):
        part["torch_dtype"] = config.get("dtype", "bfloat16")
        part.pop("dtype", None)
    text, vision = config["text_config"], config["vision_config"]
    for part in (text, vision):
        rope = part.pop("rope_parameters")
        part["_attn_implementation_autoset"] = True
        part["rope_theta"] = rope.pop("rope_theta")
        if part is text:
            part["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    by_interval = [int((i + 1) % text["no_rope_layer_interval"] != 0) for i in range(text["num_hidden_layers"])]
    text["no_rope_layers"] = [] if text["no_rope_layers"] == by_interval else text["no_rope_layers"]
    del text["layer_types"]
    text["for_llm_compressor"] = False
    vision["vision_feature_layer"] = -1
    config["transformers_version"] = "4.51.0.dev0"
    file.write_text(json.dumps(config, indent=2))


def _compress(
    path: Path,
    raw: dict[str, Any],
    weights: Mapping[str, Tensor],
    preset: str,
    *,
    nested: bool = False,
    ignore: tuple[str, ...] = RECIPE,
    group: int | None = None,
    kv: bool = False,
    scale_dtype: torch.dtype = torch.bfloat16,
    ignore_by_recipe: bool = False,
    shard_size: str = WHOLE,
) -> Path:
    """Quantises by one of the library's presets, ranges from the weights' extremes, and saves as llm-compressor does.

    ``ignore_by_recipe`` writes the patterns themselves into ``config.json``, not the names that they stand for.
    ``kv`` adds ``self_attn.k_scale`` and ``v_scale``.
    """
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        apply_quantization_config,
        preset_name_to_scheme,
    )

    model = _model(raw, weights, nested)
    text = getattr(model, "language_model", model)
    _one_module_an_expert(text)
    scheme = preset_name_to_scheme(preset, ["Linear"])
    if group is not None:
        scheme.weights.group_size = group
    apply_quantization_config(model, QuantizationConfig(config_groups={"group_0": scheme}, ignore=list(ignore)))
    with _largest_inputs(text) as inputs, _largest_cached() as cached:
        text(input_ids=_some_text(raw), cache=DynamicCache(config=text.config))
    for module in model.modules():
        args = getattr(getattr(module, "quantization_scheme", None), "weights", None)
        if args is not None:
            _set_scales(module, args, inputs.get(module, torch.ones(())), scale_dtype)
    if kv:  # the library knows no attention module in transformers 5.24, which calls the cache's argument otherwise
        for i, layer in enumerate(text.model.layers):
            for name, largest in zip(("k_scale", "v_scale"), cached[i], strict=True):
                layer.self_attn.register_buffer(name, (largest / FP8_MAX).to(scale_dtype).reshape(1))
    compressor = ModelCompressor.from_pretrained_model(model)
    assert compressor.quantization_config is not None
    if kv:
        compressor.quantization_config.kv_cache_scheme = QuantizationArgs(
            num_bits=8, type="float", strategy="tensor", symmetric=True, dynamic=False
        )
    if ignore_by_recipe:
        compressor.quantization_config.ignore = list(ignore)
    compressor.compress_model(model)
    model.save_pretrained(path, max_shard_size=shard_size)
    compressor.update_config(str(path))
    return path


def _one_module_an_expert(text: Any) -> None:
    """Replaces fused experts by the module that transformers loads compressed-tensors into: a Linear a projection."""
    for layer in text.model.layers:
        if not layer.is_moe_layer:
            continue
        fused, experts = layer.feed_forward.experts, SequentialLlama4TextExperts(text.config)
        expert: Any
        for i, expert in enumerate(experts):
            gate, up = fused.gate_up_proj[i].chunk(2, dim=-1)
            for linear, weight in zip(
                (expert.gate_proj, expert.up_proj, expert.down_proj), (gate, up, fused.down_proj[i]), strict=True
            ):
                linear.weight = nn.Parameter(weight.T.contiguous(), requires_grad=False)
        layer.feed_forward.experts = experts


@contextmanager
def _largest_inputs(text: nn.Module) -> Iterator[dict[nn.Module, Tensor]]:
    """Largest absolute input of each Linear, over the calls made within."""
    seen: dict[nn.Module, Tensor] = {}

    def look(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen[module] = torch.maximum(seen.get(module, torch.zeros(())), inputs[0].float().abs().max())

    handles = [m.register_forward_pre_hook(look) for m in text.modules() if isinstance(m, nn.Linear)]
    # The scales are not there yet: what is measured is the model as it was.
    quantised: list[Any] = [module for module in text.modules() if hasattr(module, "quantization_scheme")]
    for module in quantised:
        module.quantization_enabled = False
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
        for module in quantised:
            module.quantization_enabled = True


@contextmanager
def _largest_cached() -> Iterator[dict[int, tuple[Tensor, Tensor]]]:
    """Largest absolute key and value that each layer put into a cache, over the calls made within."""
    seen: dict[int, tuple[Tensor, Tensor]] = {}
    update = DynamicCache.update

    def look(cache: Any, keys: Tensor, values: Tensor, layer: int, *rest: Any, **more: Any) -> Any:
        seen[layer] = keys.float().abs().max(), values.float().abs().max()
        return update(cache, keys, values, layer, *rest, **more)

    with mock.patch.object(DynamicCache, "update", look):
        yield seen


def _set_scales(module: Any, args: Any, largest_input: Tensor, scale_dtype: torch.dtype) -> None:
    """Fills a quantised Linear's scales (and zero points) from its weight's extremes."""
    from compressed_tensors.quantization.utils import calculate_qparams

    weight = module.weight.float()
    if args.strategy == "tensor":
        parts = weight.reshape(1, -1)
    elif args.strategy == "channel":
        parts = weight[:, None]
    else:
        parts = weight.unflatten(-1, (-1, args.group_size))
    scale, zero_point = calculate_qparams(parts.amin(-1), parts.amax(-1), args)
    module.weight_scale = nn.Parameter(scale.reshape(module.weight_scale.shape).to(scale_dtype), requires_grad=False)
    if not args.symmetric:
        module.weight_zero_point.copy_(zero_point.reshape(module.weight_zero_point.shape).round())
    if getattr(module, "input_scale", None) is not None:
        module.input_scale = nn.Parameter((largest_input / FP8_MAX).to(scale_dtype).reshape(1), requires_grad=False)


def _decompressed(tensors: Mapping[str, Tensor], described: dict[str, Any]) -> dict[str, Tensor]:
    """What compressed-tensors makes of each module that has a scale. It multiplies in the scales' type: fp32 here."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    config = QuantizationConfig.model_validate(described)
    (scheme,) = config.config_groups.values()
    compressor = BaseCompressor.get_value_from_registry(config.format)
    modules: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        module, _, parameter = name.rpartition(".")
        modules.setdefault(module, {})[parameter] = tensor
    out: dict[str, Tensor] = {}
    for module, parameters in modules.items():
        if "weight_scale" in parameters:
            scale = parameters["weight_scale"].float()
            parameters = compressor.decompress({**parameters, "weight_scale": scale}, scheme)
        kept = {name: tensor for name, tensor in parameters.items() if not name.startswith(("weight_", "input_"))}
        out |= {f"{module}.{name}": tensor for name, tensor in kept.items() if name not in ("k_scale", "v_scale")}
    return out


def _scaled(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What ModelOpt's own tensor class makes of each e4m3 tensor and its scale."""
    from modelopt.torch.quantization.qtensor import FP8QTensor

    out: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if tensor.dtype == torch.float8_e4m3fn:
            scale = tensors[f"{name}_scale" if name.endswith(".weight") else f"{name}_weight_scale"]
            tensor = FP8QTensor(tensor.shape, torch.float32, tensor).dequantize(scale=scale.float())
        elif name.endswith("_scale"):
            continue
        out[name] = tensor
    return out


def _fused(tensors: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    """Single experts' Linears ``[out, in]`` stacked to ``gate_up_proj [E, H, 2F]`` and ``down_proj [E, F, H]``."""
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}.feed_forward.experts"
        if f"{prefix}.0.gate_proj.weight" not in tensors:
            continue
        gate, up, down = (
            torch.stack([tensors.pop(f"{prefix}.{e}.{part}_proj.weight").T for e in range(config["num_local_experts"])])
            for part in ("gate", "up", "down")
        )
        tensors |= {f"{prefix}.gate_up_proj": torch.cat([gate, up], dim=-1), f"{prefix}.down_proj": down}
    return tensors
