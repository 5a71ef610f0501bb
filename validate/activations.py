"""What the reference does to the inputs of products that an engine quantises, and what that leaves open.

Written apart from the exporter: transformers' Linears get hooks, and its experts another forward pass, that put
``e4m3(x / s) * s`` in the place of ``x``. Weights and everything else stay transformers' own.

Rounding is a step: where ``x / s`` lies within the noise of a computation from the middle between two e4m3 numbers, the
engine may rightly take the other one, and the product is off by much more than noise. Which tokens that can happen to,
and what comes of it, the reference says by itself: each sequence is run twice side by side, once as it is and once with
every number that noise can turn turned. Where the two differ is *slack*: by so much bounds are wider, for that token
and module alone. A token where no number is near a step has none.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shuntyard.errors import EngineError
from shuntyard.validate.dequantise import EXPERT_PARTS, DequantisedCheckpoint
from shuntyard.validate.values import PARTS, Array, LayerValues

LARGEST = 448.0
LEAST_AMAX = 2.0**-100
"""A token's largest magnitude counts for no less: a token of zeros needs a scale, too."""

EXPERTS = "feed_forward.experts"


@dataclass(frozen=True)
class Activations:
    """Modules whose inputs are rounded: by name "static" or "dynamic"; and the noise that may turn a number.

    ``noise`` is relative to a token's root mean square, and to the number itself.
    """

    kinds: Mapping[str, str]
    noise: float

    @property
    def label(self) -> str:
        """For the name of a stack: tells apart what gives other values."""
        told = json.dumps([sorted(self.kinds.items()), self.noise])
        return f"activations in FP8 in {len(self.kinds)} modules ({hashlib.sha256(told.encode()).hexdigest()[:8]})"


def described(kinds: Mapping[str, str]) -> str:
    """For people: ``31 modules (3 static, 28 by token)``."""
    static = sum(kind == "static" for kind in kinds.values())
    ways = [f"{static} static"] * bool(static) + [f"{len(kinds) - static} by token"] * (static < len(kinds))
    return f"{len(kinds)} module{'s' * (len(kinds) != 1)} ({', '.join(ways)})"


def e4m3(x: Tensor) -> Tensor:
    """The nearest e4m3 numbers, as fp32; what is larger than all of them becomes the largest."""
    return x.clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn).float()


def rounded(x: Tensor, scale: Tensor | None, noise: float) -> Tensor:
    """``x [2, ..., in]``: the values as they are, and with what can be turned turned; each rounded to e4m3 numbers.

    ``scale``: one number, or what broadcasts against ``x[0]``; None: by token.
    """
    straight, twin = x.float()
    own, other = _scale(straight, scale), _scale(twin, scale)
    difference = twin - straight
    codes = e4m3(straight / own)
    # What came before may have turned numbers, too: in the engine others than in the twin, of the same size.
    reach = noise * (_rms(straight) + straight.abs()) + _rms(difference)
    low, high, turned = e4m3((straight - reach) / own), e4m3((straight + reach) / own), e4m3(twin / other)
    odd = torch.arange(x.shape[-1]) % 2 == 0  # where both can be, every other one: they must not add up to a shift
    first, second = torch.where(odd, low, high), torch.where(odd, high, low)
    found = torch.where(turned != codes, turned, torch.where(first != codes, first, second))
    return torch.stack([codes * own, found * other])


def _scale(x: Tensor, scale: Tensor | None) -> Tensor:
    return x.abs().amax(-1, keepdim=True).clamp(min=LEAST_AMAX) / LARGEST if scale is None else scale


def _rms(x: Tensor) -> Tensor:
    return x.pow(2).mean(-1, keepdim=True).sqrt()


class RoundedInputs:
    """Puts the rounding into transformers' modules.

    Raises:
        CheckpointError: a static scale is missing, or is no positive number.
    """

    def __init__(self, activations: Activations, weights: DequantisedCheckpoint) -> None:
        self._kinds, self._noise, self._weights = activations.kinds, activations.noise, weights

    def touches(self, layer: int) -> bool:
        """Whether any module of the layer has its inputs rounded."""
        return any(name.startswith(f"model.layers.{layer}.") for name in self._kinds)

    def __contains__(self, name: str) -> bool:
        return name in self._kinds

    def hook(self, name: str) -> Callable[[Any, tuple[Any, ...]], tuple[Tensor]]:
        """A forward pre-hook for a Linear, whose input is ``[2, S, in]`` or ``[2 * S, in]``."""
        scale = self._weights.input_scale(f"{name}.input_scale") if self._kinds[name] == "static" else None

        def round_input(_module: Any, arguments: tuple[Any, ...]) -> tuple[Tensor]:
            (x,) = arguments
            return (rounded(x.reshape(2, -1, x.shape[-1]), scale, self._noise).reshape(x.shape),)

        return round_input

    def apply(self, layer: Any, index: int, label: str) -> None:
        """To a layer of transformers, in place.

        Raises:
            EngineError: the layer has no module of a name; of the release that is installed nothing is known then.
        """
        prefix = f"model.layers.{index}."
        for name in self._kinds:
            if not name.startswith(prefix):
                continue
            try:
                module = layer.get_submodule(name.removeprefix(prefix))
            except AttributeError as error:
                raise EngineError(f"{label}: its layer has no '{name}'", hint="see shuntyard's releases") from error
            if name == prefix + EXPERTS:
                module.forward = self._experts(module, name)
            else:
                module.register_forward_pre_hook(self.hook(name))

    def _experts(self, experts: Any, name: str) -> Callable[[Tensor], Tensor]:
        """transformers' experts, which it runs densely on ``[E * 2 * S, H]``, with rounded inputs and hidden rows."""
        count = len(experts.down_proj)
        scales: list[Tensor | None] = [None] * 3
        if self._kinds[name] == "static":
            scales = [
                torch.stack([self._expert_scale(name, e, part) for e in range(count)]).reshape(count, 1)
                for part in EXPERT_PARTS
            ]

        def forward(hidden_states: Tensor) -> Tensor:
            x = hidden_states.view(count, 2, -1, hidden_states.shape[-1]).transpose(0, 1)  # [2, E, S, H]
            routed = (x != 0).any(-1).any(0)  # [E, S]; the rows of tokens that are not routed to an expert are zero
            x = x[:, routed]  # [2, R, H], by expert
            own = [None if scale is None else scale.expand(routed.shape)[routed][:, None] for scale in scales]
            gate_proj, up_proj = experts.gate_up_proj.chunk(2, dim=-1)
            lengths = routed.sum(1).tolist()
            gate = _by_expert(rounded(x, own[0], self._noise), gate_proj, lengths)
            up = _by_expert(rounded(x, own[1], self._noise), up_proj, lengths)
            hidden = rounded(up * experts.act_fn(gate), own[2], self._noise)
            out = hidden_states.new_zeros(2, *routed.shape, hidden_states.shape[-1])
            out[:, routed] = _by_expert(hidden, experts.down_proj, lengths)
            return out.transpose(0, 1).reshape(-1, out.shape[-1])

        return forward

    def _expert_scale(self, module: str, expert: int, part: str) -> Tensor:
        fused = "down_proj" if part == "down_proj" else "gate_up_proj"
        return self._weights.input_scale(f"{module}.{expert}.{part}.input_scale", f"{module}.{fused}_input_scale")


def _by_expert(rows: Tensor, weights: Tensor, lengths: list[int]) -> Tensor:
    """``rows [2, R, in]``, each expert's together, by ``weights [E, in, out]``."""
    parts = [own @ weight for own, weight in zip(rows.split(lengths, dim=1), weights, strict=True)]
    return torch.cat(parts, dim=1)


def slack_of(straight: LayerValues, twin: LayerValues) -> Array:
    """``[S, len(PARTS), 2]``: of each token and part the root mean square, and the largest, of the difference."""
    found = np.zeros((len(straight.hidden), len(PARTS), 2), np.float32)
    for i, part in enumerate(PARTS):
        ours, theirs = straight.part(part), twin.part(part)
        if ours is not None and theirs is not None:
            found[:, i] = difference_of(ours, theirs)
    if straight.router is not None:
        # A few logits, of one expert a single one, may happen to stay though what they are made of does not.
        wide = straight.feed_forward_input.astype(np.float64)
        before = found[:, PARTS.index("post_attention_layernorm"), :1]
        share = before / np.maximum(np.sqrt(np.mean(wide**2, axis=1, keepdims=True)), np.finfo(np.float32).tiny)
        router = PARTS.index("feed_forward.router")
        typical = float(np.sqrt(np.mean(straight.router.astype(np.float64) ** 2)))
        found[:, router] = np.maximum(found[:, router], share * typical)
    return found


def difference_of(a: Array, b: Array) -> Array:
    """``[S, ...]`` twice -> ``[S, 2]``: root mean square and largest of the difference."""
    off = np.abs(a.astype(np.float64) - b).reshape(len(a), -1)
    return np.stack([np.sqrt(np.mean(off**2, axis=1)), off.max(axis=1)], axis=1).astype(np.float32)
