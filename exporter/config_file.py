"""Reads ``config.json`` whole: a text model's, or that of a model with a vision tower, whose text model is nested.

Hugging Face writes the text model's keys at the top (``llama4_text``, ``Llama4ForCausalLM``) or under ``text_config``
(``llama4``, ``Llama4ForConditionalGeneration``). Source: transformers ``models/llama4/configuration_llama4.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shuntyard.errors import CheckpointError, UnsupportedError
from shuntyard.exporter.config import HINT_CONFIG, NOT_IN_THE_GRAPH, Llama4Config, brief, parse_config
from shuntyard.exporter.strict_json import read_json

AROUND_THE_TEXT_MODEL = frozenset(
    {
        "boi_token_id",
        "boi_token_index",
        "eoi_token_id",
        "eoi_token_index",
        "image_token_id",
        "image_token_index",
        "model_type",
        "quantization_config",
        "text_config",
        "tie_word_embeddings",
        "vision_config",
    }
)
"""Keys beside ``text_config``; those of images say nothing about the text model."""

NESTED_IN = "text_config"


@dataclass(frozen=True)
class ConfigFile:
    """What a ``config.json`` says."""

    text: Llama4Config
    multimodal: bool
    quantization: dict[str, Any] | None  # the raw quantization_config


def parse_config_file(raw: dict[str, Any], path: Path) -> ConfigFile:
    """Takes a ``config.json`` apart.

    Raises:
        UnsupportedError: the model type, a key or a value is not supported; its name is in the message.
        CheckpointError: keys are missing or contradict each other.
    """
    if raw.get("model_type") != "llama4":
        quantization = _quantization(raw, path)
        text = {key: value for key, value in raw.items() if key != "quantization_config"}
        return ConfigFile(parse_config(text, path), multimodal=False, quantization=quantization)
    unknown = sorted(set(raw) - AROUND_THE_TEXT_MODEL - NOT_IN_THE_GRAPH)
    if unknown:
        raise UnsupportedError(
            f"{path}: config key '{unknown[0]:.80}' is not understood beside {NESTED_IN}",
            hint="it could change what the model computes; remove it only if you know that it does not",
        )
    inner = raw.get(NESTED_IN)
    if not isinstance(inner, dict):
        raise CheckpointError(f"{path}: {NESTED_IN} is {brief(inner)}, must be an object", hint=HINT_CONFIG)
    text = dict(inner)
    text.setdefault("model_type", "llama4_text")  # transformers takes it as given there
    quantization = _quantization(raw, path)
    nested = _quantization(text, path)
    text.pop("quantization_config", None)
    if quantization is not None and nested is not None and quantization != nested:
        raise CheckpointError(
            f"{path}: quantization_config differs from {NESTED_IN}.quantization_config",
            hint="keep the one that the weights were quantised with",
        )
    _check_tied(raw, text, path)
    config = parse_config(text, path, within=NESTED_IN)
    return ConfigFile(config, multimodal=True, quantization=nested if quantization is None else quantization)


def _quantization(raw: dict[str, Any], path: Path) -> dict[str, Any] | None:
    section = raw.get("quantization_config")
    if section is not None and not isinstance(section, dict):
        raise CheckpointError(f"{path}: quantization_config is {brief(section)}, must be an object", hint=HINT_CONFIG)
    return section


def _check_tied(raw: dict[str, Any], text: dict[str, Any], path: Path) -> None:
    """transformers ties by the text model's key; a file that says something else at its top is not trusted."""
    outer, inner = bool(raw.get("tie_word_embeddings", False)), bool(text.get("tie_word_embeddings", False))
    if "tie_word_embeddings" in raw and outer != inner:
        raise CheckpointError(
            f"{path}: tie_word_embeddings is {outer} at the top and {inner} in {NESTED_IN}",
            hint="set both to what the weights are: with an lm_head.weight of their own they are not tied",
        )


def token_id(raw: dict[str, Any], key: str) -> Any:
    """A token's id (or ids) in a ``config.json``: at the top, or else in ``text_config``; None if in neither."""
    inner = raw.get(NESTED_IN)
    found = raw.get(key)
    return inner.get(key) if found is None and isinstance(inner, dict) else found


def load_config_file(path: Path) -> ConfigFile:
    """Reads and checks a ``config.json``; see :func:`parse_config_file` for what it raises."""
    return parse_config_file(read_json(path), path)
