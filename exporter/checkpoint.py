"""A checkpoint directory in Hugging Face layout: its files, its configuration and every tensor's place.

Headers are read, data is not.
"""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

from shuntyard.errors import CheckpointError, UnsupportedError
from shuntyard.exporter.config import Llama4Config, load_config
from shuntyard.exporter.model import all_weights
from shuntyard.exporter.safetensors_header import Header, TensorEntry, read_header
from shuntyard.exporter.strict_json import read_json

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

_SHARD_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\.safetensors")

WEIGHT_DTYPES = ("BF16", "F16", "F32")

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
SIDE_FILES = ("config.json", "generation_config.json", INDEX_NAME, *TOKENIZER_FILES)
"""Small files that travel along, where they exist."""


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint. ``tensors`` maps every name to its place."""

    path: Path
    config: Llama4Config
    headers: tuple[Header, ...]
    tensors: dict[str, TensorEntry]

    @property
    def nbytes(self) -> int:
        """Size of all shards in bytes."""
        return sum(header.file_bytes for header in self.headers)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the names, sizes and headers of all shards and ``config.json``; data is not read."""
        digest = hashlib.sha256((self.path / "config.json").read_bytes())
        for header in self.headers:
            digest.update(f"\n{header.file.name} {header.file_bytes} {header.sha256}".encode())
        return digest.hexdigest()


def _read_index(path: Path) -> dict[str, str]:
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: has no weight_map, or an empty one", hint="download it again")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not _SHARD_NAME.fullmatch(file):
            raise CheckpointError(
                f"{path}: tensor '{name}' is said to lie in {file!r:.80}, which is no plain .safetensors file name",
                hint="shards lie beside their index; download it again",
            )
    return weight_map


def _read_headers(path: Path) -> list[Header]:
    """Headers of all shards, checked against the index in both directions."""
    index_path, single = path / INDEX_NAME, path / SINGLE_NAME
    if not os.path.lexists(index_path):
        if single.exists():
            return [read_header(single)]
        others = sorted(p.name for p in path.glob("*.safetensors"))
        if others:
            raise CheckpointError(
                f"{path}: has {others[0]} but neither {SINGLE_NAME} nor {INDEX_NAME}",
                hint=f"download {INDEX_NAME}, it says which shards belong together",
            )
        raise CheckpointError(
            f"{path}: holds no .safetensors file", hint="give the directory of a Hugging Face checkpoint in safetensors"
        )
    weight_map = _read_index(index_path)
    if os.path.lexists(single) and set(weight_map.values()) != {SINGLE_NAME}:
        raise CheckpointError(
            f"{path}: has both {SINGLE_NAME} and {INDEX_NAME}, which lists other shards",
            hint="other readers would take the single file; remove the one that is stale",
        )
    headers = [read_header(path / name) for name in sorted(set(weight_map.values()))]
    for header in headers:
        for tensor in header.tensors:
            if weight_map.get(tensor.name) != header.file.name:
                raise CheckpointError(
                    f"{header.file}: tensor '{tensor.name}' lies here, but {INDEX_NAME} says "
                    f"{weight_map.get(tensor.name, 'nothing')}",
                    hint="the index and the shards are from different checkpoints; download both again",
                )
    found = {tensor.name for header in headers for tensor in header.tensors}
    for name, file in weight_map.items():
        if name not in found:
            raise CheckpointError(
                f"{path / file}: tensor '{name}' is missing, though {INDEX_NAME} lists it",
                hint="the index and the shards are from different checkpoints; download both again",
            )
    return headers


def open_checkpoint(path: Path) -> Checkpoint:
    """Opens a checkpoint directory.

    Raises:
        CheckpointError: files are missing, broken or contradict each other.
        UnsupportedError: the configuration is not one that shuntyard understands.
    """
    if not path.is_dir():
        what = "is no directory" if os.path.lexists(path) else "no such directory"
        raise CheckpointError(f"{path}: {what}", hint="give the directory of a Hugging Face checkpoint")
    config = load_config(path / "config.json")
    headers = _read_headers(path)
    tensors = {tensor.name: tensor for header in headers for tensor in header.tensors}
    return Checkpoint(path, config, tuple(headers), tensors)


def is_derived(name: str) -> bool:
    """Whether a tensor repeats what the configuration says (rotary frequencies that old files carry along)."""
    return name.endswith((".rotary_emb.inv_freq", ".rotary_emb.freqs"))


def match_weights(checkpoint: Checkpoint) -> tuple[dict[str, TensorEntry], list[str]]:
    """Gives every parameter of the model its tensor, and every tensor its parameter.

    Returns:
        Parameter name -> entry, in the model's order, and the names of the tensors that are waived.

    Raises:
        CheckpointError: a parameter has no tensor, or one of another shape.
        UnsupportedError: a tensor that the model does not know, or of a dtype that it cannot take.
    """
    wanted = all_weights(checkpoint.config)
    waived = [name for name in checkpoint.tensors if name not in wanted and is_derived(name)]
    unknown = [name for name in checkpoint.tensors if name not in wanted and name not in waived]
    missing = [name for name in wanted if name not in checkpoint.tensors]
    more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
    if missing:
        also = f"; it has '{unknown[0]}' instead, which is not understood" if unknown else ""
        raise CheckpointError(
            f"{checkpoint.path}: tensor '{missing[0]}' is missing{more}{also}",
            hint="config.json and the shards must be of the same checkpoint",
        )
    if unknown:
        more = f" (nor {len(unknown) - 1} more)" if len(unknown) > 1 else ""
        hint = "leaving it out could change what the model computes; export refuses to guess"
        if unknown[0] == "lm_head.weight":
            hint = "config.json has tie_word_embeddings, which leaves no place for it; which of the two is right?"
        raise UnsupportedError(
            f"{checkpoint.tensors[unknown[0]].file}: tensor '{unknown[0]}' is not understood{more}", hint=hint
        )
    for name, shape in wanted.items():
        entry = checkpoint.tensors[name]
        if entry.dtype not in WEIGHT_DTYPES:
            raise UnsupportedError(
                f"{entry.file}: tensor '{name}' is {entry.dtype}; weights must be one of {', '.join(WEIGHT_DTYPES)}",
                hint="give the bf16 or fp16 checkpoint",
            )
        if entry.shape != shape:
            raise CheckpointError(
                f"{entry.file}: tensor '{name}' has shape {list(entry.shape)}, config.json asks for {list(shape)}",
                hint="config.json and the shards must be of the same checkpoint",
            )
    return {name: checkpoint.tensors[name] for name in wanted}, waived
