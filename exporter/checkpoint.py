"""A checkpoint directory in Hugging Face layout: its files, its configuration and every tensor's place.

Headers are read, data is not.
"""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

from shuntyard.errors import CheckpointError
from shuntyard.exporter.config import Llama4Config
from shuntyard.exporter.config_file import load_config_file
from shuntyard.exporter.quantization import HF_QUANT_CONFIG, Quantization, read_quantization
from shuntyard.exporter.safetensors_header import Header, TensorEntry, read_header
from shuntyard.exporter.strict_json import read_json

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

_SHARD_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\.safetensors")

TEXT_PREFIX = "language_model."
"""What stands before the text model's names in a checkpoint with a vision tower."""

VISION_PREFIXES = ("vision_model.", "multi_modal_projector.")

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
SIDE_FILES = ("config.json", "generation_config.json", HF_QUANT_CONFIG, INDEX_NAME, *TOKENIZER_FILES)
"""Small files that travel along, where they exist."""


SMALL = 2**21
"""Bytes of a tensor that is read whole to tell two checkpoints apart; the largest router of Llama 4 has 1.3 MB."""


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint.

    ``tensors`` maps the text model's names, without a prefix, to their places; an entry's own name is the file's.
    """

    path: Path
    config: Llama4Config
    quantization: Quantization | None
    headers: tuple[Header, ...]
    tensors: dict[str, TensorEntry]
    vision: tuple[TensorEntry, ...]

    @property
    def nbytes(self) -> int:
        """Size of all shards in bytes."""
        return sum(header.file_bytes for header in self.headers)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the names, sizes and headers of all shards and ``config.json``; data is not read."""
        digest = hashlib.sha256((self.path / "config.json").read_bytes())
        if (self.path / HF_QUANT_CONFIG).is_file():
            digest.update((self.path / HF_QUANT_CONFIG).read_bytes())
        for header in self.headers:
            digest.update(f"\n{header.file.name} {header.file_bytes} {header.sha256}".encode())
        return digest.hexdigest()

    def small_tensors_sha256(self) -> str:
        """SHA-256 over the data of every tensor of at most ``SMALL`` bytes: all scales, norms, biases and routers.

        What headers cannot tell apart, a damaged scale or another fine-tune of the same shapes, differs here, and
        reading it takes seconds at any size.

        Raises:
            CheckpointError: a file cannot be read, or became shorter; names it.
        """
        digest = hashlib.sha256()
        for header in self.headers:
            try:
                with header.file.open("rb") as stream:
                    for tensor in header.tensors:
                        if tensor.nbytes <= SMALL:
                            stream.seek(tensor.offset)
                            data = stream.read(tensor.nbytes)
                            if len(data) < tensor.nbytes:
                                raise CheckpointError(
                                    f"{header.file}: ends within tensor '{tensor.name}'", hint="download the file again"
                                )
                            digest.update(tensor.name.encode())
                            digest.update(data)
            except OSError as error:
                raise CheckpointError(
                    f"{header.file}: cannot be read: {error.strerror}", hint="check the disk"
                ) from error
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
    file = load_config_file(path / "config.json")
    quantization = read_quantization(path, file.quantization)
    headers = _read_headers(path)
    tensors = {tensor.name: tensor for header in headers for tensor in header.tensors}
    vision: list[TensorEntry] = []
    if file.multimodal:
        vision = [tensor for name, tensor in tensors.items() if name.startswith(VISION_PREFIXES)]
        tensors = _without_prefix(
            path, {name: t for name, t in tensors.items() if not name.startswith(VISION_PREFIXES)}
        )
    return Checkpoint(path, file.text, quantization, tuple(headers), tensors, tuple(vision))


def _without_prefix(path: Path, tensors: dict[str, TensorEntry]) -> dict[str, TensorEntry]:
    """The text model's tensors by the names that they have in a checkpoint without a vision tower."""
    own = {name.removeprefix(TEXT_PREFIX): tensor for name, tensor in tensors.items()}
    if len(own) < len(tensors):
        twice = next(name for name in tensors if not name.startswith(TEXT_PREFIX) and TEXT_PREFIX + name in tensors)
        raise CheckpointError(
            f"{path}: tensor '{twice}' is there twice, also as '{TEXT_PREFIX}{twice}'",
            hint="the shards are of different checkpoints; download them again",
        )
    return own


def is_derived(name: str) -> bool:
    """Whether a tensor repeats what the configuration says (rotary frequencies that old files carry along)."""
    return name.endswith((".rotary_emb.inv_freq", ".rotary_emb.freqs"))
