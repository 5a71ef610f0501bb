"""Full-size Llama 4 models: their configurations, and the tensors of their checkpoints.

    bf16           the Hub's layout: ``Llama4ForConditionalGeneration``, ``language_model.`` before text tensors
    bf16-text      the text model alone, ``Llama4ForCausalLM``, no prefix
    fp8-meta       Meta's Maverick-FP8: compressed-tensors, an FP8 matrix [out, in] an expert with a scale [out, 1]
    fp8-modelopt   NVIDIA's, by ModelOpt: fused experts and Linears in FP8, one scale a tensor, names without prefix

Scout's and Maverick's numbers are those of the released models. Of Behemoth, Meta announced 16 experts, 288B active and
nearly 2T parameters; all else here is **assumed**, chosen so that those come out: Scout's plan (top-1 and a shared
expert, MoE in every layer) with hidden 16384, 96 layers, 128 heads of 128, 8 of them for keys and values, F = 24000:
288B active, 1.99T in all.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

ITEMSIZE = {"BF16": 2, "F8_E4M3": 1, "F32": 4}
FORMATS = ("bf16", "bf16-text", "fp8-meta", "fp8-modelopt")


class Tensor(NamedTuple):
    """What a header says of a tensor."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEMSIZE[self.dtype]


def text_config(**changes: Any) -> dict[str, Any]:
    """Keys and values that Scout and Maverick share, as the Hub's files and their mirrors have them (4.51's names)."""
    return {
        "_attn_implementation_autoset": True,
        "attention_bias": False,
        "attention_chunk_size": 8192,
        "attention_dropout": 0.0,
        "attn_scale": 0.1,
        "attn_temperature_tuning": True,
        "bos_token_id": 200000,
        "cache_implementation": "hybrid",
        "eos_token_id": [200001, 200007, 200008],
        "floor_scale": 8192,
        "for_llm_compressor": False,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 5120,
        "initializer_range": 0.02,
        "interleave_moe_layer_step": 1,
        "intermediate_size": 8192,
        "intermediate_size_mlp": 16384,
        "max_position_embeddings": 10485760,
        "model_type": "llama4_text",
        "no_rope_layers": [],
        "num_attention_heads": 40,
        "num_experts_per_tok": 1,
        "num_hidden_layers": 48,
        "num_key_value_heads": 8,
        "num_local_experts": 16,
        "output_router_logits": False,
        "pad_token_id": 200018,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 16.0,
            "high_freq_factor": 1.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "router_aux_loss_coef": 0.001,
        "router_jitter_noise": 0.0,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_qk_norm": True,
        "vocab_size": 202048,
        **changes,
    }


MODELS = {
    "scout": text_config(),
    "maverick": text_config(
        interleave_moe_layer_step=2,
        max_position_embeddings=1048576,
        num_local_experts=128,
        rope_scaling=None,
        use_qk_norm=False,
    ),
    "behemoth": text_config(
        hidden_size=16384,
        intermediate_size=24000,
        intermediate_size_mlp=48000,
        num_attention_heads=128,
        num_hidden_layers=96,
    ),
}

VISION = {
    "attention_dropout": 0.0,
    "hidden_act": "gelu",
    "hidden_size": 1408,
    "image_size": 336,
    "initializer_range": 0.02,
    "intermediate_size": 5632,
    "model_type": "llama4_vision_model",
    "multi_modal_projector_bias": False,
    "norm_eps": 1e-05,
    "num_attention_heads": 16,
    "num_channels": 3,
    "num_hidden_layers": 34,
    "patch_size": 14,
    "pixel_shuffle_ratio": 0.5,
    "projector_dropout": 0.0,
    "projector_input_dim": 4096,
    "projector_output_dim": 4096,
    "rope_theta": 10000,
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": "default",
    "vision_output_dim": 4096,
}


def raw_config(text: Mapping[str, Any], form: str, vision: Mapping[str, Any] = VISION) -> dict[str, Any]:
    """``config.json`` of a text model's configuration in one of the ``FORMATS``."""
    if form == "bf16-text":
        return {"architectures": ["Llama4ForCausalLM"], **text, "transformers_version": "4.51.0"}
    raw: dict[str, Any] = {
        "architectures": ["Llama4ForConditionalGeneration"],
        "boi_token_index": 200080,
        "eoi_token_index": 200081,
        "image_token_index": 200092,
        "model_type": "llama4",
        "text_config": dict(text),
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.51.0",
        "vision_config": dict(vision),
    }
    if form == "fp8-meta":
        per_channel = {"dynamic": False, "num_bits": 8, "strategy": "channel", "symmetric": True, "type": "float"}
        raw["quantization_config"] = {
            "config_groups": {
                "group_0": {
                    "input_activations": {**per_channel, "dynamic": True, "strategy": "token"},
                    "targets": ["Linear"],
                    "weights": per_channel,
                }
            },
            "format": "float-quantized",
            "ignore": [
                "re:.*self_attn.*", "re:.*router.*", "re:.*shared_expert.*", "re:.*feed_forward\\.(gate|up|down)_proj$",
                "re:.*lm_head", "re:vision_model.*", "re:multi_modal_projector.*",
            ],
            "kv_cache_scheme": None,
            "quant_method": "compressed-tensors",
            "quantization_status": "compressed",
        }  # fmt: skip
    elif form == "fp8-modelopt":
        static = {"dynamic": False, "num_bits": 8, "type": "float"}
        raw["quantization_config"] = {
            "config_groups": {"group_0": {"input_activations": static, "targets": ["Linear"], "weights": static}},
            "ignore": ["lm_head", "*router*", "*vision_model*", "*multi_modal_projector*"],
            "kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"},
            "producer": {"name": "modelopt", "version": "0.47.0"},
            "quant_algo": "FP8",
            "quant_method": "modelopt",
        }
    return raw


def _vision_shapes(vision: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The vision tower, in the order of ``Llama4VisionModel``'s state dict."""
    width, inner = vision["hidden_size"], vision["intermediate_size"]
    patches = (vision["image_size"] // vision["patch_size"]) ** 2
    yield "class_embedding", (width,)
    yield "positional_embedding_vlm", (patches + 1, width)
    yield "patch_embedding.linear.weight", (width, vision["num_channels"] * vision["patch_size"] ** 2)
    for norm in ("layernorm_pre", "layernorm_post"):
        yield f"{norm}.weight", (width,)
        yield f"{norm}.bias", (width,)
    for i in range(vision["num_hidden_layers"]):
        linears = {f"self_attn.{part}_proj": (width, width) for part in "qkvo"}
        for name, shape in (linears | {"mlp.fc1": (inner, width), "mlp.fc2": (width, inner)}).items():
            yield f"model.layers.{i}.{name}.weight", shape
            yield f"model.layers.{i}.{name}.bias", shape[:1]
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"model.layers.{i}.{norm}.weight", (width,)
            yield f"model.layers.{i}.{norm}.bias", (width,)
    shuffled = round(width / vision["pixel_shuffle_ratio"] ** 2)
    yield "vision_adapter.mlp.fc1.weight", (vision["projector_input_dim"], shuffled)
    yield "vision_adapter.mlp.fc2.weight", (vision["projector_output_dim"], vision["projector_input_dim"])


def _text_shapes(text: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The text model in bf16, in the order of ``Llama4ForCausalLM``'s state dict."""
    hidden, inner, experts = text["hidden_size"], text["intermediate_size"], text["num_local_experts"]
    queries = text["num_attention_heads"] * text["head_dim"]
    keys = text["num_key_value_heads"] * text["head_dim"]
    step = text["interleave_moe_layer_step"]
    yield "model.embed_tokens.weight", (text["vocab_size"], hidden)
    for i in range(text["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        yield f"{layer}.self_attn.q_proj.weight", (queries, hidden)
        yield f"{layer}.self_attn.k_proj.weight", (keys, hidden)
        yield f"{layer}.self_attn.v_proj.weight", (keys, hidden)
        yield f"{layer}.self_attn.o_proj.weight", (hidden, queries)
        dense, width = f"{layer}.feed_forward", text["intermediate_size_mlp"]
        if i % step == step - 1:
            yield f"{layer}.feed_forward.experts.gate_up_proj", (experts, hidden, 2 * inner)
            yield f"{layer}.feed_forward.experts.down_proj", (experts, inner, hidden)
            yield f"{layer}.feed_forward.router.weight", (experts, hidden)
            dense, width = f"{layer}.feed_forward.shared_expert", inner
        yield f"{dense}.gate_proj.weight", (width, hidden)
        yield f"{dense}.up_proj.weight", (width, hidden)
        yield f"{dense}.down_proj.weight", (hidden, width)
        yield f"{layer}.input_layernorm.weight", (hidden,)
        yield f"{layer}.post_attention_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (text["vocab_size"], hidden)


def _meta_fp8(name: str, shape: tuple[int, ...]) -> Iterator[tuple[str, Tensor]]:
    """Meta's: fused experts come apart into three FP8 Linears each; everything else stays bf16."""
    if ".experts." not in name:
        yield name, Tensor("BF16", shape)
        return
    prefix, _, matrix = name.rpartition(".")
    count, rows, columns = shape
    parts = {"gate_proj": columns // 2, "up_proj": columns // 2} if matrix == "gate_up_proj" else {matrix: columns}
    for e in range(count):
        for part, out in parts.items():
            yield f"{prefix}.{e}.{part}.weight", Tensor("F8_E4M3", (out, rows))
            yield f"{prefix}.{e}.{part}.weight_scale", Tensor("BF16", (out, 1))


def _modelopt_fp8(name: str, shape: tuple[int, ...]) -> Iterator[tuple[str, Tensor]]:
    """ModelOpt's: fused experts, attention and MLPs in FP8, with scalar scales of weights, inputs, keys and values."""
    linear = name.endswith("_proj.weight")
    if not linear and ".experts." not in name:
        yield name, Tensor("BF16", shape)
        return
    scales = f"{name}_" if ".experts." in name else name.removesuffix("weight")
    yield name, Tensor("F8_E4M3", shape)
    yield f"{scales}weight_scale", Tensor("F32", ())
    yield f"{scales}input_scale", Tensor("F32", ())
    for cached in "kv":
        if f".{cached}_proj." in name:
            yield f"{scales}{cached}_scale", Tensor("F32", ())


def tensors_of(raw: Mapping[str, Any]) -> dict[str, Tensor]:
    """Every tensor of a checkpoint with this ``config.json``, in order."""
    found: dict[str, Tensor] = {}
    text, prefix = raw.get("text_config", raw), ""
    method = raw.get("quantization_config", {}).get("quant_method")
    if "text_config" in raw:
        for name, shape in _vision_shapes(raw["vision_config"]):
            found[f"vision_model.{name}"] = Tensor("BF16", shape)
        found["multi_modal_projector.linear_1.weight"] = Tensor(
            "BF16", (text["hidden_size"], raw["vision_config"]["vision_output_dim"])
        )
        prefix = "" if method == "modelopt" else "language_model."
    for name, shape in _text_shapes(text):
        if method is None:
            found[prefix + name] = Tensor("BF16", shape)
        else:
            found |= dict((_meta_fp8 if method == "compressed-tensors" else _modelopt_fp8)(prefix + name, shape))
    return found
