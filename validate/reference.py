"""The independent reference: transformers' own Llama 4, in float32, on the checkpoint's files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from shuntyard.errors import CheckpointError, EngineError
from shuntyard.exporter.config_file import load_config_file
from shuntyard.exporter.quantization import read_quantization
from shuntyard.validate.dequantise import IMAGES, dequantised_state, is_taken_apart, text_config

LARGEST_FREQUENCY_ERROR = 2e-6
"""transformers' frequencies are float32: so much may they be off, relatively, and no more."""


def exact_rotation(frequencies: NDArray[np.float64]) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """transformers' ``Llama4TextRotaryEmbedding.forward``, angles in float64: ``[B, S]`` -> complex ``[B, S, D/2]``.

    In float32 an angle is off by up to ``2**-24`` of the position, and the reference drifts away from what it defines:
    by more than the tolerance of fp32 after some hundred tokens, entirely at a context of millions.
    """
    wide = torch.from_numpy(frequencies)

    def forward(_x: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        angles = position_ids[:, :, None].double() * wide
        return torch.polar(torch.ones_like(angles), angles).to(torch.complex64)

    return forward


class Reference:
    """transformers' ``Llama4ForCausalLM`` with eager attention, and rotary angles in float64."""

    def __init__(self, checkpoint: Path) -> None:
        try:
            from transformers import GenerationConfig, Llama4ForCausalLM, Llama4TextConfig
            from transformers.utils import logging
        except ImportError as error:
            raise EngineError(
                f"the reference needs transformers, which cannot be imported: {error}",
                hint="pip install 'shuntyard[validate]'",
            ) from error
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        file = load_config_file(checkpoint / "config.json")
        config = file.text
        try:
            own = Llama4TextConfig(**text_config(checkpoint))
            # What would change the form of the answer, and nothing that is computed.
            own.return_dict, own.output_attentions, own.output_hidden_states = True, False, False
            own._attn_implementation = "eager"
            if read_quantization(checkpoint, file.quantization) is not None or is_taken_apart(checkpoint):
                model: Any = _of_state(Llama4ForCausalLM, own, dequantised_state(checkpoint))
            else:
                model = _from_files(Llama4ForCausalLM, own, checkpoint)
        except CheckpointError:
            raise
        except Exception as error:
            raise CheckpointError(
                f"{checkpoint}: transformers cannot load it: {' '.join(str(error).split())}",
                hint="the reference reads what transformers reads",
            ) from error
        rotary = model.model.rotary_emb
        exact = config.rope.inverse_frequencies(config.head_dim)
        off = np.abs(rotary.inv_freq.double().numpy() / exact - 1).max()
        if off > LARGEST_FREQUENCY_ERROR or rotary.attention_scaling != 1.0:
            raise CheckpointError(
                f"{checkpoint}: transformers' rotary frequencies are not shuntyard's: {off:.2g} apart",
                hint="check rope_parameters / rope_scaling; if they are right, this is a defect of one of the two",
            )
        rotary.forward = exact_rotation(exact)
        model.generation_config = GenerationConfig()  # greedy is greedy, whatever the checkpoint likes
        self._model: Any = model.eval()

    def logits(self, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        """``[B, S] -> f32 [B, S, V]`` in one forward pass without a cache."""
        with torch.no_grad():
            out: NDArray[np.float32] = self._model(torch.from_numpy(tokens), use_cache=False).logits.numpy()
        return out

    def generate(self, tokens: Sequence[int], max_new_tokens: int) -> list[int]:
        """Greedy continuation of one sequence by transformers' own cache; does not stop at the end token."""
        with torch.no_grad():
            ids = torch.tensor([list(tokens)])
            out = self._model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_new_tokens,
                min_new_tokens=max_new_tokens,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        return [int(token) for token in out[0, len(tokens) :]]


def _from_files(model_class: Any, config: Any, checkpoint: Path) -> Any:
    """transformers' own loading, which must use every tensor but those of a vision tower, and miss none."""
    model, info = model_class.from_pretrained(
        checkpoint,
        config=config,
        dtype=torch.float32,
        attn_implementation="eager",
        local_files_only=True,
        output_loading_info=True,
    )
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        names = sorted(str(name) for name in info.get(what) or () if not str(name).startswith(IMAGES))
        if names:
            raise CheckpointError(
                f"{checkpoint}: transformers reports {what.replace('_', ' ')}: {names[0]} (of {len(names)})",
                hint="a reference with uninitialised or ignored weights proves nothing",
            )
    return model


def _of_state(model_class: Any, config: Any, state: dict[str, torch.Tensor]) -> Any:
    """A model of these weights; every one must be given and have its place."""
    with torch.device("meta"):
        model = model_class(config)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its frequencies are in no file
    if config.tie_word_embeddings:
        state = {**state, "lm_head.weight": state["model.embed_tokens.weight"]}
    model.load_state_dict(state, strict=True, assign=True)
    return model
