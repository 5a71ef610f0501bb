"""Numbers between two sets of logits. ``T`` tokens, ``V`` words; everything in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def log_softmax(logits: Array) -> NDArray[np.float64]:
    """Log-probabilities over the last axis."""
    wide = logits.astype(np.float64)
    shifted = wide - wide.max(axis=-1, keepdims=True)
    out: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return out


def kl(reference: Array, other: Array) -> NDArray[np.float64]:
    """KL(reference || other) of each token, in nats: ``[T, V], [T, V] -> [T]``."""
    return kl_of_logs(log_softmax(reference), log_softmax(other))


def kl_of_logs(p: Array, q: Array) -> NDArray[np.float64]:
    """The same, of log-probabilities."""
    out: NDArray[np.float64] = (np.exp(p) * (p - q)).sum(axis=-1)
    return out


def negative_log_likelihood(logits: Array, targets: Array) -> NDArray[np.float64]:
    """Of each target token, in nats: ``[T, V], [T] -> [T]``."""
    return loss_of_logs(log_softmax(logits), targets)


def loss_of_logs(p: Array, targets: Array) -> NDArray[np.float64]:
    """The same, of log-probabilities."""
    return -np.take_along_axis(p, targets[:, None], axis=-1)[:, 0]


def top1_agreement(reference: Array, other: Array) -> float:
    """Share of tokens with the same most likely next token."""
    return float((reference.argmax(axis=-1) == other.argmax(axis=-1)).mean())


def worst(reference: Array, other: Array) -> tuple[float, list[int]]:
    """Largest absolute difference and where it is."""
    difference = np.abs(reference.astype(np.float64) - other)
    place = np.unravel_index(int(difference.argmax()), difference.shape)
    return float(difference[place]), [int(i) for i in place]
