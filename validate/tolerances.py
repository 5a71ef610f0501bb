"""The one table of tolerances, by the number format that an engine computes in, each with its reason.

The reference computes in fp32. Where a bound is None the metric is reported and not judged.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tolerance:
    """Bounds on an engine against the fp32 reference on the same tokens."""

    max_abs: float | None
    """Largest difference of any logit."""
    mean_kl: float
    """Mean over tokens of KL(reference || engine), in nats."""
    top1: float
    """Least share of tokens whose most likely next token is the same."""
    perplexity: float
    """Largest relative difference of the perplexities."""
    tie: float
    """Greedy tokens may part where the reference's best two logits are closer than this."""
    reason: str


TOLERANCES = {
    "fp32": Tolerance(
        max_abs=1e-4,
        mean_kl=1e-8,
        top1=0.999,
        perplexity=1e-5,
        tie=1e-4,
        reason="the same arithmetic in another order of summation: correct engines are within 5e-6, "
        "the mildest of the known mistakes is off by 2.3",
    ),
    "fp16": Tolerance(
        max_abs=None,
        mean_kl=1e-3,
        top1=0.98,
        perplexity=2e-3,
        tie=5e-2,
        reason="11 bits of mantissa; near ties in the router flip experts, so no single logit is bounded. A correct "
        "fp16 model was within KL 9e-6 and top-1 .993; the mildest mistakes (rope scaling, temperature) reach KL 8e-4 "
        "with top-1 .980 and KL 5e-3 with .920, so this format alone cannot rule out a mistake in rope scaling",
    ),
    "bf16": Tolerance(
        max_abs=None,
        mean_kl=3e-2,
        top1=0.85,
        perplexity=2e-2,
        tie=5e-1,
        reason="8 bits of mantissa flip experts often: a correct bf16 model was at KL 1.2e-2, top-1 .892. Mistakes as "
        "mild as temperature (KL 5e-3) hide below that: hold an fp32 engine of the same model directory to the "
        "reference too",
    ),
}
"""Figures: a miniature Llama 4 of 14.8M parameters, transformers against Meta's code and planted mistakes."""
