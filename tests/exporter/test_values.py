"""Reading all values: what is not finite, not a scale, or too large is found wherever it lies."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from shuntyard.errors import CheckpointError, ShuntyardError
from shuntyard.exporter import split as split_module
from shuntyard.exporter.checkpoint import open_checkpoint
from shuntyard.exporter.export import export
from shuntyard.exporter.split import cut_large
from shuntyard.exporter.values import check_finite, has_equal_rows
from shuntyard.exporter.weights import match_weights
from tests.exporter.handmade import Handmade, packed
from tests.exporter.spoiling import EXPERT, EXPERTS, FORMS, INT4, Q, Spoil, added, change, match, refusal, sound

FP16 = 65504.0
W, S, P = f"{Q}.weight", f"{Q}.weight_scale", f"{Q}.weight_packed"
DOWN = f"{EXPERTS}.down_proj"


def values(made: Handmade, folder: Path, largest: float | None = None) -> ShuntyardError:
    """The error of reading all values, after everything else was found to be in order."""
    error = refusal(made, folder, lambda path: check_finite(cut_large(match_weights(open_checkpoint(path))), largest))
    assert match_weights(open_checkpoint(folder / "checkpoint"))
    return error


def one_value(value: float, *at: int) -> Callable[[Tensor], Tensor]:
    def by(tensor: Tensor) -> Tensor:
        changed = tensor.float().clone()
        changed[at] = value
        return changed.to(tensor.dtype)

    return by


def one_byte(byte: int, *at: int) -> Callable[[Tensor], Tensor]:
    def by(tensor: Tensor) -> Tensor:
        changed = tensor.clone().view(torch.uint8)
        changed[at] = byte
        return changed.view(tensor.dtype)

    return by


NAN, INF = math.nan, math.inf
BAD: dict[str, tuple[str, Spoil, str]] = {
    "negative": ("channel", change(S, one_value(-0.5, 7, 0)), f"'{S}' at [7, 0] holds -0.5, which is negative"),
    "negative, one number": ("tensor", change(S, one_value(-0.5)), f"'{S}' at [] holds -0.5, which is negative"),
    "negative, INT4": ("group", change(S, one_value(-2.0, 63, 1)), f"'{S}' at [63, 1] holds -2.0, which is negative"),
    "negative, fused": ("modelopt", change(f"{DOWN}_weight_scale", one_value(-1.0)), "_scale' at [] holds -1.0, which"),
    "NaN": ("channel", change(S, one_value(NAN, 7, 0)), f"'{S}' at [7, 0] holds nan, which is not finite"),
    "NaN, INT4": ("group", change(S, one_value(NAN, 7, 1)), f"'{S}' at [7, 1] holds nan, which is not finite"),
    "infinite": ("channel", change(S, one_value(INF, 7, 0)), f"'{S}' at [7, 0] holds inf, which is not finite"),
    "infinite, INT4": ("group", change(S, one_value(INF, 0, 0)), f"'{S}' at [0, 0] holds inf, which is not finite"),
    "infinite, one number": ("tensor", change(S, one_value(INF)), f"'{S}' at [] holds inf, which is not finite"),
    "FP8's NaN": ("channel", change(W, one_byte(0x7F, 5, 31)), f"'{W}' at [5, 31] holds nan, which is not finite"),
    "FP8's negative NaN": ("tensor", change(W, one_byte(0xFF, 63, 0)), f"'{W}' at [63, 0] holds nan, which is not"),
    "FP8's NaN, an expert": ("channel", change(f"{EXPERT}.weight", one_byte(0x7F, 0, 0)), f"'{EXPERT}.weight' at [0, "),
    "FP8's NaN, fused": ("modelopt", change(DOWN, one_byte(0x7F, 3, 63, 31)), f"'{DOWN}' at [3, 63, 31] holds nan"),
    "products past fp32": ("channel", added(S, torch.full((64, 1), 3e38)), f"'{W}' at [0, "),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_values(case: str, tmp_path: Path) -> None:
    form, spoil, message = BAD[case]
    made = FORMS[form]()
    spoil(made)
    error = values(made, tmp_path)
    assert isinstance(error, CheckpointError) and message in error.message


def test_export_reads_them_where_that_is_asked_for(tmp_path: Path) -> None:
    made = FORMS["channel"]()
    change(S, one_value(NAN, 7, 0))(made)
    path = made.write(tmp_path / "checkpoint")
    with pytest.raises(CheckpointError, match="holds nan"):
        export(path, tmp_path / "out", check_values=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("piece", [1, 100, 700, 10**6])
def test_the_last_value_is_read(piece: int, split: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In pieces that end within a row, within a matrix, or not at all."""
    monkeypatch.setattr("shuntyard.exporter.values._PIECE", piece)
    if split:
        monkeypatch.setattr(split_module, "LARGEST_TENSOR", 1000)
    for form, name, place in (
        ("channel", W, "[63, 31]"),
        ("tensor", W, "[63, 31]"),
        ("modelopt", DOWN, "[63, 31]" if split else "[3, 63, 31]"),
        ("plain, fused", DOWN, "[63, 31]" if split else "[3, 63, 31]"),
    ):
        made = FORMS[form]()
        last = (-1,) * made.tensors[name].dim()
        change(name, one_value(NAN, *last))(made)
        assert f"at {place} holds nan" in values(made, tmp_path / form).message


@pytest.mark.parametrize("piece", [1, 100, 700, 10**6])
def test_channels_are_scaled_by_their_own_scale(piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one product that is too large is that of the largest scale, in whichever piece it is."""
    monkeypatch.setattr("shuntyard.exporter.values._PIECE", piece)
    made = FORMS["channel"]()
    made.tensors[W] = torch.full((64, 32), 2.0).to(torch.float8_e4m3fn)
    made.tensors[S] = torch.full((64, 1), 0.5)
    made.tensors[S][41] = 40000.0
    error = values(made, tmp_path, largest=FP16)
    assert f"'{W}' at [41, 0] holds 80000.0, which is beyond 65504" in error.message
    assert "--dtype" in str(error.hint)


TOO_LARGE: dict[str, tuple[str, Spoil, str]] = {
    "tensor": ("tensor", added(S, torch.tensor([200.0])), f"'{W}' at "),
    "channel": ("channel", change(S, one_value(4096.0, 9, 0)), f"'{W}' at [9, "),
    "fused": ("modelopt", added(f"{DOWN}_weight_scale", torch.tensor(200.0).bfloat16()), f"'{DOWN}' at ["),
    "INT4": ("group", change(S, one_value(20000.0, 9, 1)), f"'{Q}.weight_packed' stands for "),
    "plain": ("plain", change(W, one_value(65536.0, 9, 1)), f"'{W}' at [9, 1] holds 65536.0"),
}  # fmt: skip


@pytest.mark.parametrize("case", TOO_LARGE)
def test_values_beyond_the_compute_type(case: str, tmp_path: Path) -> None:
    form, spoil, message = TOO_LARGE[case]
    made = FORMS[form]()
    spoil(made)
    path = made.write(tmp_path / "checkpoint")
    check_finite(match_weights(open_checkpoint(path)))  # in fp32 they are fine
    check_finite(match_weights(open_checkpoint(path)), largest=3e38)
    error = values(made, tmp_path / "again", largest=FP16)
    assert message in error.message and "which is beyond 65504" in error.message


def test_int4_is_judged_by_the_numbers_that_it_holds(tmp_path: Path) -> None:
    """With a scale of 8192, 7 is within fp16 and -8 beyond it."""
    made = sound(INT4)
    numbers = torch.zeros(64, 32, dtype=torch.int32)
    numbers[9, 16:] = 7
    numbers[9, :16] = -8  # of another group, whose scale is 1
    scale = torch.ones(64, 2)
    scale[9, 1] = 8192
    made.tensors |= {S: scale, P: packed(numbers)}
    check_finite(match(made, tmp_path / "sevens"), largest=FP16)
    numbers[9, 21] = -8
    made.tensors[P] = packed(numbers)
    error = values(made, tmp_path / "one -8", largest=FP16)
    assert f"'{P}' stands for -65536 at [9, 21], which is beyond 65504" in error.message and "--dtype" in error.hint


EQUAL_ROWS = {"plain": ("weight", ""), "tensor": ("weight", ""), "channel": ("weight", "weight_scale"),
              "group": ("weight_packed", "weight_scale")}  # fmt: skip


@pytest.mark.parametrize("form", EQUAL_ROWS)
def test_rows_that_are_equal(form: str, tmp_path: Path) -> None:
    """Quantised rows are equal if numbers and scales are; the same numbers under two scales are not."""
    number, scale = (f"{Q}.{name}" if name else "" for name in EQUAL_ROWS[form])
    made = FORMS[form]()

    def equal(name: str) -> bool:
        return has_equal_rows(match(made, tmp_path / name).linears[W])

    assert not equal("sound")
    made.tensors[number] = made.tensors[number].clone()
    made.tensors[number].view(torch.uint8)[5] = made.tensors[number].view(torch.uint8)[40]
    if scale:
        made.tensors[scale] = made.tensors[scale].clone()
        made.tensors[scale][5] = 2 * made.tensors[scale][40]
        assert not equal("two scales")
        made.tensors[scale][5] = made.tensors[scale][40]
    assert equal("equal")
