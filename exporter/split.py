"""Cuts fused experts that are too large for one tensor: the same bytes of the same file, one initializer an expert."""

from __future__ import annotations

from dataclasses import replace

from shuntyard.exporter.weights import Experts, Weights

LARGEST_TENSOR = 2**31 - 1
"""Elements of a tensor that every runtime takes: TensorRT counts a tensor's elements in 32 bits."""


def cut_large(weights: Weights) -> Weights:
    """The same weights, fused experts of more than ``LARGEST_TENSOR`` elements in layout ``split``."""
    experts = {
        layer: _split(own)
        if own.form.layout == "fused" and max(part.elements for part in own.parts) > LARGEST_TENSOR
        else own
        for layer, own in weights.experts.items()
    }
    return replace(weights, experts=experts)


def _split(experts: Experts) -> Experts:
    """Fused experts cut between experts: slices of the same bytes."""
    form, slices = experts.form, []
    for part in experts.parts:
        size = part.entry.nbytes // form.experts
        for e in range(form.experts):
            entry = replace(
                part.entry,
                name=f"{part.entry.name}.{e}",
                shape=part.entry.shape[1:],
                offset=part.entry.offset + e * size,
                nbytes=size,
            )
            slices.append(replace(part, entry=entry))
    return Experts(form._replace(layout="split"), tuple(slices))
