"""The independent reference: transformers' own Llama 4, in float32, on the checkpoint's files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from shuntyard.errors import CheckpointError, EngineError


class Reference:
    """transformers' ``Llama4ForCausalLM`` with eager attention."""

    def __init__(self, checkpoint: Path) -> None:
        try:
            from transformers import Llama4ForCausalLM
            from transformers.utils import logging
        except ImportError as error:
            raise EngineError(
                f"the reference needs transformers, which cannot be imported: {error}",
                hint="pip install 'shuntyard[validate]'",
            ) from error
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        try:
            loaded: Any = Llama4ForCausalLM.from_pretrained(
                checkpoint,
                dtype=torch.float32,
                attn_implementation="eager",
                local_files_only=True,
                output_loading_info=True,
            )
        except Exception as error:
            raise CheckpointError(
                f"{checkpoint}: transformers cannot load it: {error}",
                hint="the reference reads what transformers reads",
            ) from error
        model, info = loaded
        for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if info.get(what):
                names = sorted(str(name) for name in info[what])
                raise CheckpointError(
                    f"{checkpoint}: transformers reports {what.replace('_', ' ')}: {names[0]} (of {len(names)})",
                    hint="a reference with uninitialised or ignored weights proves nothing",
                )
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
