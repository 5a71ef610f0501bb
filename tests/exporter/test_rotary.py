"""Rotation by chunk-local positions, held to exact rotation at absolute positions, ten million tokens in."""

from __future__ import annotations

from typing import Any

import mpmath
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from shuntyard.errors import UnsupportedError
from shuntyard.exporter.model import MAX_ROTARY_ROWS, RotaryTable, rotate
from tests.checkpoints import parsed, raw_config

SCOUT_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 16.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
}
DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 500000.0}
SECTIONS = {"llama3": SCOUT_ROPE, "default": DEFAULT_ROPE}
CHUNK, CONTEXT = 8192, 10_485_760


def table(rope: dict[str, Any], chunk: int | None) -> RotaryTable:
    raw = raw_config(head_dim=128, attention_chunk_size=chunk, max_position_embeddings=CONTEXT, rope_parameters=rope)
    return RotaryTable(parsed(raw))


def rotation(rotary: RotaryTable, positions: NDArray[np.int64]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        return rotary.forward(torch.from_numpy(positions)[None])


def frequencies(rope: dict[str, Any]) -> NDArray[np.float64]:
    return parsed(raw_config(head_dim=128, rope_parameters=rope)).rope.inverse_frequencies(128)


@pytest.mark.parametrize("chunk", [CHUNK, None], ids=["chunked", "whole context"])
@pytest.mark.parametrize("rope", SECTIONS.values(), ids=SECTIONS)
def test_table_against_float64(rope: dict[str, Any], chunk: int | None) -> None:
    """Every slot of a chunk; of the whole context the ends and a sample, among them the largest position."""
    rows = chunk or CONTEXT
    sample = np.random.default_rng(0).integers(0, rows, size=8192)
    positions = np.arange(rows) if chunk else np.unique([0, 1, rows // 2, *sample, rows - 2, rows - 1])
    slots, cos, sin = rotation(table(rope, chunk), positions)
    np.testing.assert_array_equal(slots[0].numpy(), positions)
    angles = positions[:, None] * frequencies(rope)  # float64 is good to 2e-9 radians at ten million
    assert np.abs(cos[0].numpy() - np.cos(angles)).max() < 2.5e-7
    assert np.abs(sin[0].numpy() - np.sin(angles)).max() < 2.5e-7


def test_float64_angles_against_fifty_digits() -> None:
    """So float64 may settle the other tests."""
    mpmath.mp.dps = 50
    position, plain = CONTEXT - 1, frequencies(DEFAULT_ROPE)
    for i in (0, 1, 7, 31, 63):
        exact = mpmath.mpf(position) / mpmath.power(500000, mpmath.mpf(2 * i) / 128)
        assert abs(float(mpmath.cos(exact)) - np.cos(position * plain[i])) < 1e-8


def scores(query: NDArray[Any], key: NDArray[Any], angles: NDArray[Any]) -> NDArray[np.float64]:
    """``[S]`` dot products of the rotated last query with every rotated key, in the type of ``angles``."""
    cos, sin = (torch.from_numpy(f(angles))[None] for f in (np.cos, np.sin))
    kind = cos.dtype

    def turned(x: NDArray[Any]) -> torch.Tensor:
        pairs = torch.from_numpy(x).to(kind)[None].unflatten(-1, (-1, 2))
        even, odd = pairs[..., 0], pairs[..., 1]
        return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)

    return (turned(query)[0, -1:] @ turned(key)[0].T)[0].double().numpy()


@pytest.mark.parametrize("rope", SECTIONS.values(), ids=SECTIONS)
def test_chunk_local_scores_ten_million_tokens_in(rope: dict[str, Any]) -> None:
    """Attention scores of a chunk's last query with all keys of the chunk, against float64 at absolute positions.

    Ours are as good as float32 arithmetic; float32 angles at absolute positions are off by what a float32
    near ten million cannot hold: half a position and, times a frequency, up to half a radian.
    """
    rng = np.random.default_rng(1)
    last = CONTEXT // CHUNK - 1
    positions = np.arange(last * CHUNK, (last + 1) * CHUNK)
    assert positions[-1] == CONTEXT - 1
    query, key = (rng.normal(size=(CHUNK, 128)).astype(np.float32) for _ in range(2))
    plain = frequencies(rope)
    exact = scores(query, key, positions[:, None] * plain)
    slots, cos, sin = rotation(table(rope, CHUNK), positions)
    np.testing.assert_array_equal(slots[0].numpy(), np.arange(CHUNK))
    turned = [rotate(torch.from_numpy(x)[None, :, None], cos, sin)[0, :, 0] for x in (query, key)]
    ours = (turned[0][-1:] @ turned[1].T)[0].double().numpy()
    size = np.linalg.norm(query[-1]) * np.linalg.norm(key, axis=1)
    assert (np.abs(ours - exact) / size).max() < 1e-6
    absolute = scores(query, key, positions[:, None].astype(np.float32) * plain.astype(np.float32))
    assert (np.abs(absolute - exact) / size).max() > 1e-2


def test_positions_wrap_at_every_chunk_edge() -> None:
    edges = np.arange(1, CONTEXT // CHUNK) * CHUNK
    rotary = table(SCOUT_ROPE, CHUNK)
    assert not rotation(rotary, edges)[0].any()
    assert (rotation(rotary, edges - 1)[0] == CHUNK - 1).all()


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 7, 8, 100])
def test_small_chunks(chunk: int) -> None:
    positions = np.arange(3 * chunk)
    slots, cos, _ = rotation(table(SCOUT_ROPE, chunk), positions)
    np.testing.assert_array_equal(slots[0].numpy(), positions % chunk)
    assert np.abs(cos[0].numpy() - np.cos((positions % chunk)[:, None] * frequencies(SCOUT_ROPE))).max() < 2.5e-7


def test_more_rows_than_float32_can_divide_are_refused() -> None:
    raw = raw_config(attention_chunk_size=None, max_position_embeddings=MAX_ROTARY_ROWS)
    with pytest.raises(UnsupportedError, match="max_position_embeddings is 16777216.*below 16777216") as refused:
        RotaryTable(parsed(raw))
    assert "float32" in str(refused.value.hint)
    with pytest.raises(UnsupportedError, match="attention_chunk_size is 20000000"):
        RotaryTable(parsed(raw_config(attention_chunk_size=20_000_000)))
    RotaryTable(parsed(raw_config(attention_chunk_size=None, max_position_embeddings=MAX_ROTARY_ROWS - 1)))


def test_division_in_float32_is_exact_below_the_limit() -> None:
    """What the traced graph does with slots: divide by the table's width in float32, and take the floor."""
    rotary = table(SCOUT_ROPE, None)
    slots = np.unique(np.random.default_rng(0).integers(0, MAX_ROTARY_ROWS, size=1_000_000))
    slots = np.concatenate([slots, np.arange(rotary.width, MAX_ROTARY_ROWS, rotary.width) - 1, [MAX_ROTARY_ROWS - 1]])
    quotient = slots.astype(np.float32) / np.float32(rotary.width)
    np.testing.assert_array_equal(np.floor(quotient).astype(np.int64), slots // rotary.width)
