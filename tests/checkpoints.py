"""Random checkpoints: raw configurations, weights that make every part matter, and files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers
import torch
from safetensors.torch import save_file
from torch import Tensor

from shuntyard.exporter.config import Llama4Config, parse_config
from shuntyard.exporter.parameters import all_weights

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 16.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 1.0,
    "original_max_position_embeddings": 16,
}


def raw_config(**changes: Any) -> dict[str, Any]:
    """``config.json`` of a small text model; every feature is on and its edges lie within a few dozen tokens."""
    raw: dict[str, Any] = {
        "model_type": "llama4_text",
        "architectures": ["Llama4ForCausalLM"],
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 24,
        "intermediate_size_mlp": 40,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "interleave_moe_layer_step": 2,
        "no_rope_layer_interval": 4,
        "attention_chunk_size": 8,
        "floor_scale": 4,
        "attn_scale": 0.1,
        "attn_temperature_tuning": True,
        "use_qk_norm": True,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_parameters": LLAMA3_ROPE,
    }
    return {key: value for key, value in (raw | changes).items() if value is not ...}


def parsed(raw: dict[str, Any]) -> Llama4Config:
    """The configuration as the exporter reads it."""
    return parse_config(raw, Path("config.json"))


def random_weights(config: Llama4Config, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Normal weights with unit gain, norms in 0.5 .. 1.5, routers with logits a few units apart."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in all_weights(config).items():
        if name.endswith(".bias"):
            tensor = torch.randn(shape, generator=generator) * 0.5
        elif len(shape) == 1:
            tensor = 0.5 + torch.rand(shape, generator=generator)
        else:
            # Linear weights are [out, in], the experts' are [E, in, out].
            fan_in = shape[1]
            gain = 2.0 if "router" in name else fan_in**0.5 if "embed_tokens" in name else 1.0
            tensor = torch.randn(shape, generator=generator) * gain / fan_in**0.5
        weights[name] = tensor.to(dtype)
    return weights


def write_checkpoint(
    path: Path, raw: dict[str, Any], weights: dict[str, Tensor] | None = None, shards: int = 1, seed: int = 0
) -> Path:
    """Writes a checkpoint directory, in one file or in ``shards`` of them with an index."""
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(raw))
    weights = random_weights(parsed(raw), seed) if weights is None else weights
    if shards == 1:
        save_file(weights, path / "model.safetensors")
        return path
    names = list(weights)
    weight_map: dict[str, str] = {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        own = names[i::shards]
        save_file({name: weights[name] for name in own}, path / file)
        weight_map |= dict.fromkeys(own, file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


def write_tokenizer(path: Path, vocabulary: int) -> None:
    """A tokenizer whose words are ``w0`` to ``w<vocabulary - 1>``, so that any token can be written."""
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(vocabulary)}, unk_token="w0"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    inner.save(str(path / "tokenizer.json"))


def random_text(words: int, vocabulary: int, seed: int = 0) -> str:
    """Text for such a tokenizer."""
    generator = torch.Generator().manual_seed(seed)
    return " ".join(f"w{i}" for i in torch.randint(0, vocabulary, (words,), generator=generator).tolist())
