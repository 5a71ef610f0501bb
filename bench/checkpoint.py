"""Writes a random Llama 4 checkpoint of about so many parameters, every feature of the architecture on.

Tensors are made and written shard by shard, so memory stays at one shard however large the checkpoint is.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from shuntyard.exporter.config import parse_config
from shuntyard.exporter.parameters import all_weights

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SHARD_BYTES = 256 * 2**20
WIDTH_STEP = 256  # heads of 64, in groups of four
CHUNK = 512


def raw_config(width: int) -> dict[str, Any]:
    """``config.json`` of 8 layers: dense and MoE in turn, every 4th without RoPE, edges within a thousand tokens."""
    return {
        "model_type": "llama4_text",
        "architectures": ["Llama4ForCausalLM"],
        "vocab_size": 8192,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "intermediate_size_mlp": 4 * width,
        "num_hidden_layers": 8,
        "num_attention_heads": width // 64,
        "num_key_value_heads": width // 256,
        "head_dim": 64,
        "num_local_experts": 16,
        "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 2,
        "no_rope_layer_interval": 4,
        "attention_chunk_size": CHUNK,
        "attn_temperature_tuning": True,
        "floor_scale": CHUNK // 2,
        "attn_scale": 0.1,
        "use_qk_norm": True,
        "max_position_embeddings": 16 * CHUNK,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 16.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 1.0,
            "original_max_position_embeddings": CHUNK,
        },
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
    }


def shapes_of(raw: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor of the checkpoint, by name."""
    return all_weights(parse_config(raw, Path("config.json")))


def parameters_of(raw: dict[str, Any]) -> int:
    """How many parameters a configuration has."""
    return sum(math.prod(shape) for shape in shapes_of(raw).values())


def config_of_about(parameters: int) -> dict[str, Any]:
    """The configuration whose size comes nearest."""
    width = WIDTH_STEP
    while parameters_of(raw_config(width)) < parameters:
        width += WIDTH_STEP
    candidates = [raw_config(max(width - WIDTH_STEP, WIDTH_STEP)), raw_config(width)]
    return min(candidates, key=lambda raw: abs(parameters_of(raw) - parameters))


def random_tensor(name: str, shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Weights with unit gain, so that activations stay near one; norms in 0.5 .. 1.5; router logits spread by 2."""
    tensor = torch.empty(shape, dtype=dtype)
    if len(shape) == 1:
        return tensor.uniform_(0.5, 1.5, generator=generator)
    if "embed_tokens" in name:
        return tensor.normal_(0, 1, generator=generator)
    gain = 2.0 if "router" in name else 1.0
    # Linear weights are [out, in], the experts' [E, in, out].
    return tensor.normal_(0, gain / math.sqrt(shape[1]), generator=generator)


def shards_of(shapes: dict[str, tuple[int, ...]], itemsize: int) -> Iterator[list[str]]:
    """Names, in order, in groups of at most ``SHARD_BYTES``, or of one tensor."""
    names: list[str] = []
    size = 0
    for name, shape in shapes.items():
        nbytes = math.prod(shape) * itemsize
        if names and size + nbytes > SHARD_BYTES:
            yield names
            names, size = [], 0
        names.append(name)
        size += nbytes
    yield names


def write_checkpoint(out: Path, raw: dict[str, Any], dtype: torch.dtype, seed: int = 0) -> int:
    """Writes the new directory ``out``; returns how many parameters it holds."""
    out.mkdir(parents=True)
    names = {value: name for name, value in {"bfloat16": torch.bfloat16, "float16": torch.float16}.items()}
    config = {**raw, "dtype": names.get(dtype, "float32")}
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    generator = torch.Generator().manual_seed(seed)
    shapes = shapes_of(raw)
    shards = list(shards_of(shapes, dtype.itemsize))
    weight_map: dict[str, str] = {}
    for i, own in enumerate(shards):
        file = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        tensors = {name: random_tensor(name, shapes[name], dtype, generator) for name in own}
        save_file(tensors, out / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(own, file)
    total = parameters_of(raw)
    index = {"metadata": {"total_size": total * dtype.itemsize}, "weight_map": weight_map}
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return total


def number(text: str) -> int:
    """``500M`` and the like."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMB]?)", text.upper())
    if match is None:
        raise argparse.ArgumentTypeError(f"'{text}' is no number of parameters; 500M is one")
    return int(float(match[1]) * {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}[match[2]])


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Write a random Llama 4 checkpoint.")
    parser.add_argument("out", type=Path, help="directory to make")
    parser.add_argument("--parameters", type=number, default="500M", help="about how many (default: %(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="type of the weights (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.out.exists():
        parser.error(f"{args.out} exists")
    total = write_checkpoint(args.out, config_of_about(args.parameters), DTYPES[args.dtype], args.seed)
    print(f"{args.out}: {total:,} parameters, {args.dtype}")


if __name__ == "__main__":
    main()
