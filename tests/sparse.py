"""Checkpoints of full size that take no room: real headers, holes for data.

``python -m tests.sparse OUT --model maverick`` writes Maverick's 748 GiB as files of a few KiB each: every
``.safetensors`` header, ``config.json`` and the index are whole, the data behind them is one hole that reads as zeros.
Chosen tensors become real: seeded random values in their place (:func:`fill`). Models and formats: ``tests/sizes.py``.

Shards follow transformers' ``save_pretrained`` (tensors in order, a new shard at 5 GB, larger tensors alone), which
gives the Hub's 50 for Scout and 55 for Maverick.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import math
import zlib
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from tests.sizes import FORMATS, MODELS, Tensor, raw_config, tensors_of

SHARD_BYTES = 5 * 10**9
INDEX = "model.safetensors.index.json"
DTYPES: dict[str, Any] = {"BF16": ml_dtypes.bfloat16, "F8_E4M3": ml_dtypes.float8_e4m3fn, "F32": np.float32}

FP8_SPREAD = 64.0
"""Standard deviation of FP8 values before their scale: 7 of them reach E4M3's largest, 448."""


class Place(NamedTuple):
    """Where a tensor's bytes lie."""

    tensor: Tensor
    file: Path
    offset: int


def shards_of(tensors: Mapping[str, Tensor], limit: int = SHARD_BYTES) -> list[list[str]]:
    """Names by shard, as ``save_pretrained`` splits them: a tensor over the limit has a shard of its own."""
    shards: list[list[str]] = []
    current: list[str] = []
    size = 0
    for name, tensor in tensors.items():
        if tensor.nbytes > limit:
            shards.append([name])
            continue
        if size + tensor.nbytes > limit:
            shards.append(current)
            current, size = [], 0
        current.append(name)
        size += tensor.nbytes
    return [*shards, current] if current else shards


def write_sparse(out: Path, raw: Mapping[str, Any], limit: int = SHARD_BYTES) -> Path:
    """Writes the new directory ``out``: configuration, index, and shards whose data is a hole."""
    out.mkdir(parents=True)
    (out / "config.json").write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
    tensors = tensors_of(raw)
    shards = shards_of(tensors, limit)
    weight_map: dict[str, str] = {}
    for i, names in enumerate(shards):
        file = out / f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in names:
            begin, end = end, end + tensors[name].nbytes
            header[name] = {"dtype": tensors[name].dtype, "shape": tensors[name].shape, "data_offsets": [begin, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # data begins at a multiple of 8, as the safetensors library writes it
        with file.open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            stream.truncate(8 + len(text) + end)
        weight_map |= dict.fromkeys(names, file.name)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (out / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return out


def places(checkpoint: Path) -> dict[str, Place]:
    """Every tensor's place, read from the headers."""
    found: dict[str, Place] = {}
    for file in sorted(checkpoint.glob("*.safetensors")):
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
        for name, entry in header.items():
            if name != "__metadata__":
                tensor = Tensor(entry["dtype"], tuple(entry["shape"]))
                found[name] = Place(tensor, file, 8 + length + entry["data_offsets"][0])
    return found


def _values(name: str, tensor: Tensor, fan_in: int, rng: np.random.Generator) -> NDArray[Any]:
    """One matrix, vector or scalar: weights of unit gain, so that activations stay near one through many layers."""
    shape, quantized = tensor.shape, tensor.dtype == "F8_E4M3"
    if name.endswith("weight_scale"):
        return np.asarray(rng.uniform(0.8, 1.2, shape) / (FP8_SPREAD * math.sqrt(fan_in)))
    if name.endswith("_scale"):
        return np.asarray(rng.uniform(0.01, 0.02, shape))  # of inputs, keys and values: the largest is about 4 to 8
    if "norm" in name and name.endswith(".weight"):
        return rng.uniform(0.5, 1.5, shape)
    if quantized:
        gain = FP8_SPREAD
    elif name.endswith(("embed_tokens.weight", "class_embedding", "positional_embedding_vlm")):
        gain = 1.0
    else:
        gain = (0.1 if name.endswith(".bias") else 2.0 if "router" in name else 1.0) / math.sqrt(fan_in)
    values = rng.standard_normal(shape, np.float32)
    values *= gain
    return values.clip(-448, 448, out=values) if quantized else values


def fill(checkpoint: Path, names: Iterable[str], experts: Collection[int] | None = None, seed: int = 0) -> int:
    """Writes seeded random values into the named tensors; of fused experts, only into ``experts`` where given.

    A matrix depends on the seed, its name and its expert alone, not on what else is filled, and of a tensor of
    ``[E, ...]`` only one expert is in memory at a time. Returns how many bytes were written.
    """
    where = places(checkpoint)
    written = 0
    for name in names:
        tensor, file, offset = where[name]
        scaled = where.get(name.replace("_weight_scale", "").replace(".weight_scale", ".weight"), where[name]).tensor
        # Linear weights are [out, in], fused experts [E, in, out]: the second axis is what is summed over.
        fan_in = scaled.shape[1] if len(scaled.shape) > 1 else 1
        fused = len(tensor.shape) == 3
        part = tensor._replace(shape=tensor.shape[1:]) if fused else tensor
        with file.open("r+b") as stream:
            for e in range(tensor.shape[0]) if fused else (0,):
                if fused and experts is not None and e not in experts:
                    continue
                values = _values(name, part, fan_in, np.random.default_rng([seed, zlib.crc32(name.encode()), e]))
                stream.seek(offset + e * part.nbytes)
                written += stream.write(np.ascontiguousarray(values.astype(DTYPES[tensor.dtype])).tobytes())
    return written


def names_to_fill(names: Iterable[str], layers: Collection[int], experts: Collection[int] | None) -> list[str]:
    """The text model's tensors in ``layers``; where experts lie apart, those of ``experts`` only."""
    chosen = []
    for name in names:
        words = name.removeprefix("language_model.").split(".")
        if words[:2] != ["model", "layers"] or int(words[2]) not in layers:
            continue
        apart = "experts" in words and words[words.index("experts") + 1].isdigit()
        if not apart or experts is None or int(words[words.index("experts") + 1]) in experts:
            chosen.append(name)
    return chosen


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Write a sparse Llama 4 checkpoint of full size.")
    parser.add_argument("out", type=Path, help="directory to make")
    parser.add_argument("--model", choices=MODELS, required=True)
    parser.add_argument("--format", choices=FORMATS, default=FORMATS[0])
    parser.add_argument("--real-layers", default="", help="layers of the text model to fill, as 0,3")
    parser.add_argument("--real-experts", default="", help="of those layers, only these experts, as 0,5")
    parser.add_argument("--real", nargs="*", default=[], metavar="PATTERN", help="tensors to fill, as '*.norm.weight'")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.out.exists():
        parser.error(f"{args.out} exists")
    raw = raw_config(MODELS[args.model], args.format)
    write_sparse(args.out, raw)
    tensors = tensors_of(raw)
    layers = {int(word) for word in args.real_layers.split(",") if word}
    experts = {int(word) for word in args.real_experts.split(",") if word} or None
    names = names_to_fill(tensors, layers, experts)
    names += [n for n in tensors if n not in names and any(fnmatch.fnmatchcase(n, p) for p in args.real)]
    written = fill(args.out, names, experts, args.seed)
    parameters = sum(math.prod(t.shape) for n, t in tensors.items() if not n.endswith("_scale"))
    used = 512 * sum(path.stat().st_blocks for path in args.out.iterdir())
    print(
        f"{args.out}: {parameters:,} parameters in {len(tensors):,} tensors, {len(shards_of(tensors))} shards, "
        f"{sum(t.nbytes for t in tensors.values()):,} bytes of data, {written:,} of them real, {used:,} bytes on disk"
    )


if __name__ == "__main__":
    main()
