"""Quantised weights: the definition against arithmetic one number at a time, and the stream against the definition."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from shuntyard.errors import CheckpointError, UnsupportedError
from shuntyard.exporter import quantise_native, quantise_stream, rewrite_kernels
from shuntyard.exporter.quantise import DENOMINATORS, quantise_matrix
from shuntyard.exporter.resumable import resumable_directory
from shuntyard.exporter.rewrite import Piece, Quantize, Target, request_key, rewrite
from shuntyard.exporter.safetensors_header import TensorEntry
from tests.exporter.test_rewrite import Made, folders, located, make_piece, run, tiny_tiles, write_source

__all__ = ["folders", "tiny_tiles"]  # fixtures

SMALLEST, LARGEST = 2.0**-149, 3.4028235e38


@pytest.fixture(autouse=True)
def tiny_bands(tiny_tiles: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantise_stream, "BAND_VALUES", 40)
    monkeypatch.setattr(quantise_stream, "TURNED_BYTES", 150)
    monkeypatch.setattr(quantise_stream, "_TILE_VALUES", 20)


def forms(columns: int) -> list[Quantize]:
    """All that a matrix of so many columns can be quantised to."""
    groups = [g for g in range(1, columns + 1) if columns % g == 0 and columns % 8 == 0]
    return [Quantize("tensor", 0, "s"), Quantize("channel", 0, "s"), *(Quantize("group", g, "s") for g in groups)]


def values_of(rng: np.random.Generator, rows: int, columns: int) -> NDArray[np.float32]:
    """Rows of all magnitudes, among them zeros, subnormal numbers and the largest."""
    scale = np.exp2(rng.uniform(-149, 127, (rows, 1)))
    w = np.clip(rng.normal(size=(rows, columns)) * scale, -LARGEST, LARGEST).astype(np.float32)
    for row in range(rows):
        kind = rng.integers(0, 8)
        if kind < 4:
            w[row, rng.integers(0, columns)] = [0.0, -LARGEST, SMALLEST, -448.0][kind]
        elif kind == 4:
            w[row] = [0.0, -0.0][rng.integers(0, 2)]
    return w


@st.composite
def matrices(draw: Any, most_rows: int = 6) -> tuple[NDArray[np.float32], Quantize]:
    """A matrix, and a way to quantise it."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    rows = draw(st.one_of(st.integers(1, 6), st.integers(1, most_rows)))
    columns = draw(st.one_of(st.integers(1, 12), st.sampled_from([16, 24, 40, 136])))
    return values_of(rng, rows, columns), draw(st.sampled_from(forms(columns)))


def unpacked(packed: NDArray[np.int32]) -> NDArray[np.int64]:
    words = packed.view(np.uint32)
    return np.stack([(words >> np.uint32(4 * i)) & 15 for i in range(8)], axis=2).reshape(len(words), -1) - np.int64(8)


def rounded(exact: np.float32) -> np.float32:
    return np.float32(min(max(round(float(exact)), -8), 7))  # half to even, as Python rounds


def int4_of_group(w: NDArray[np.float32]) -> tuple[list[int], np.float32]:
    """One number at a time."""
    f = np.float32
    largest = f(max(abs(value) for value in w))
    if largest == 0:
        return [0] * len(w), f(1)
    best, scale = f(np.inf), f(1)
    for denominator in DENOMINATORS:
        tried = f(ml_dtypes.bfloat16(max(largest / denominator, f(2.0**-126))))
        sums = [f(0)] * 16
        for i, value in enumerate(w):
            exact = value * (f(1) / tried)
            sums[i % 16] += (exact - rounded(exact)) * (exact - rounded(exact))
        while len(sums) > 1:
            half = len(sums) // 2
            sums = [sums[i] + sums[i + half] for i in range(half)]
        error = sums[0] * ((tried / largest) * (tried / largest))
        if error < best:
            best, scale = error, tried
    return [int(rounded(value / scale)) for value in w], scale


class TestDefinition:
    @given(matrices())
    def test_one_number_at_a_time(self, asked: tuple[NDArray[np.float32], Quantize]) -> None:
        w, how = asked
        codes, scale = quantise_matrix(w, how)
        rows, columns = w.shape
        if how.form == "group":
            assert (codes.dtype.name, codes.shape) == ("int32", (rows, columns // 8))
            assert (scale.dtype.name, scale.shape) == ("bfloat16", (rows, columns // how.group_size))
            for row in range(rows):
                for g in range(columns // how.group_size):
                    cut = slice(g * how.group_size, (g + 1) * how.group_size)
                    wanted, own = int4_of_group(w[row, cut])
                    assert (unpacked(codes)[row, cut].tolist(), np.float32(scale[row, g])) == (wanted, own)
            return
        assert (codes.dtype.name, codes.shape, scale.dtype.name) == ("float8_e4m3fn", w.shape, "float32")
        assert scale.shape == ((rows, 1) if how.form == "channel" else (1,))
        for row in range(rows):
            largest = np.float32(max(abs(v) for v in (w[row] if how.form == "channel" else w.reshape(-1))))
            own = max(largest / np.float32(448), np.float32(2.0**-126)) if largest else np.float32(1)
            assert scale.reshape(-1)[row if how.form == "channel" else 0] == own
            wanted = [ml_dtypes.float8_e4m3fn(min(max(v / own, np.float32(-448)), np.float32(448))) for v in w[row]]
            assert codes[row].tobytes() == np.array(wanted).tobytes()

    def test_the_largest_value_is_448(self) -> None:
        w = np.array([[1, -3, 2], [0.1, 0, 0.0001]], np.float32)
        codes, scale = quantise_matrix(w, Quantize("channel"))
        assert codes[0, 1] == -448 and codes[1, 0] == 448
        assert np.abs(codes.astype(np.float32) * scale - w).max() <= 3 / 28

    def test_int4_is_no_worse_than_any_candidate(self) -> None:
        """In float64, but for the rounding of two sums in fp32."""
        w = np.random.default_rng(0).standard_t(4, (64, 128)).astype(np.float32)
        codes, scale = quantise_matrix(w, Quantize("group", 128))
        own = ((unpacked(codes) * scale.astype(np.float64) - w) ** 2).sum(axis=1)
        for denominator in DENOMINATORS:
            s = (np.abs(w).max(axis=1) / denominator).astype(ml_dtypes.bfloat16).astype(np.float64)[:, None]
            errors = ((np.clip(np.rint(w / s), -8, 7) * s - w) ** 2).sum(axis=1)
            assert (own <= errors * (1 + 1e-5)).all()

    def test_int4_is_better_than_a_fixed_scale(self) -> None:
        """By a tenth for normal values in groups of 32: that is what the search is for."""
        w = np.random.default_rng(0).normal(size=(64, 1024)).astype(np.float32)
        codes, scale = quantise_matrix(w, Quantize("group", 32))
        error = ((unpacked(codes) * np.repeat(scale.astype(np.float32), 32, axis=1) - w) ** 2).mean()
        s = np.abs(w.reshape(64, 32, 32)).max(axis=2, keepdims=True) / np.float32(7.5)
        fixed = np.clip(np.rint(w.reshape(64, 32, 32) / s), -8, 7) * s
        assert error < 0.9 * ((fixed.reshape(w.shape) - w) ** 2).mean()


@st.composite
def requests(draw: Any) -> tuple[list[list[Made]], Quantize, dict[str, int]]:
    """A mosaic of pieces of all kinds, how to quantise it, and sizes of chunks and shards."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    widths = draw(st.lists(st.integers(1, 11), min_size=1, max_size=3))
    if draw(st.booleans()):
        widths.append(8 - sum(widths) % 8)
    how = draw(st.sampled_from(forms(sum(widths))))
    heights = draw(st.lists(st.integers(1, 11), min_size=1, max_size=1 if how.form == "tensor" else 3))
    mosaic = [
        [make_piece(draw, f"{i}.{k}", h, w, "F32", rng) for k, w in enumerate(widths)] for i, h in enumerate(heights)
    ]
    return mosaic, how, {"chunk_bytes": draw(st.integers(1, 200)), "shard_bytes": draw(st.integers(1, 500))}


def quantised_twin(target: Target, whole: NDArray[np.float32]) -> dict[str, bytes]:
    assert target.quantize is not None
    codes, scale = quantise_matrix(whole, target.quantize)
    return {target.name: codes.tobytes(), target.quantize.scale_name: scale.tobytes()}


def check(targets: Sequence[Target], wanted: dict[str, bytes], out: Path, **options: Any) -> None:
    found = run(targets, out, **options)
    assert {name: data.tobytes() for name, data in found.items()} == wanted


@contextlib.contextmanager
def numpy_alone(alone: bool) -> Iterator[None]:
    """Without the compiled twin, where that is asked for."""
    assert quantise_native.native() is not None
    with pytest.MonkeyPatch.context() as patch:
        if alone:
            patch.setattr(quantise_stream, "native", lambda: None)
        yield


@given(matrices(400), st.sampled_from(["BF16", "F32"]), st.booleans(), st.integers(0, 2))
@settings(max_examples=300)
def test_the_compiled_twin(asked: tuple[NDArray[np.float32], Quantize], source: str, turned: bool, best: int) -> None:
    w, how = asked
    native = quantise_native.native()
    assert native is not None
    with np.errstate(over="ignore"):
        values: NDArray[Any] = w if source == "F32" else w.astype(ml_dtypes.bfloat16)
    values = np.where(np.isfinite(values.astype(np.float32)), values, values.dtype.type(1))
    codes, scales = quantise_matrix(values.astype(np.float32), how)
    own, own_scales = np.zeros_like(codes), np.zeros_like(scales) if how.form != "tensor" else scales
    given = np.asfortranarray(values) if turned else values
    native.quantise_rows(given, how, own, own_scales, best)
    assert (own.tobytes(), own_scales.tobytes()) == (codes.tobytes(), scales.tobytes())


def test_the_compiled_twin_rounds_every_tie() -> None:
    """All e4m3 numbers, those halfway between two of them, and their neighbours in fp32, of both signs."""
    bits = np.arange(0x7F, dtype=np.uint8)
    numbers = bits.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    halves = (numbers[1:] + numbers[:-1]) / 2
    near = np.concatenate([numbers, halves])
    near = np.concatenate([near, np.nextafter(near, np.float32(0)), np.nextafter(near, np.float32(449))])
    w = np.concatenate([near, -near]).reshape(1, -1)
    native, how = quantise_native.native(), Quantize("tensor")
    assert native is not None
    for best in range(3):
        codes = np.zeros(w.shape, np.uint8)
        native.quantise_rows(w, how, codes, np.ones(1, np.float32), best)
        assert codes.tobytes() == np.clip(w, -448, 448).astype(ml_dtypes.float8_e4m3fn).tobytes()
        assert set(bits) <= set(codes[0])


@given(requests(), st.integers(1, 3), st.sampled_from(["numpy", "native"]))
@settings(max_examples=150)
def test_any_mosaic(
    folders: Iterator[Path], asked: tuple[list[list[Made]], Quantize, dict[str, int]], workers: int, made_by: str
) -> None:
    folder = next(folders)
    folder.mkdir()
    mosaic, how, sizes = asked
    arrays = {name: array for line in mosaic for made in line for name, array in made.arrays.items()}
    entries = write_source(folder / "source.safetensors", arrays)
    whole = np.concatenate([np.concatenate([m.value.astype(np.float32) for m in line], axis=1) for line in mosaic])
    pieces = tuple(tuple(located(made.piece, entries) for made in line) for line in mosaic)
    target = Target("new", how.dtype, whole.shape, pieces, how)
    plain = Target("plain", "F32", whole.shape, pieces)
    wanted = quantised_twin(target, whole) | {"plain": whole.tobytes()}
    with numpy_alone(made_by == "numpy"):
        check([target, plain], wanted, folder / "out", workers=workers, **sizes)


@given(matrices(), st.booleans(), st.sampled_from(["BF16", "F32"]), st.integers(1, 300))
@settings(max_examples=100)
def test_any_values(
    folders: Iterator[Path], asked: tuple[NDArray[np.float32], Quantize], turned: bool, source: str, chunk: int
) -> None:
    folder = next(folders)
    folder.mkdir()
    w, how = asked
    with np.errstate(over="ignore"):
        stored = w if source == "F32" else w.astype(ml_dtypes.bfloat16)
    stored = np.where(np.isfinite(stored.astype(np.float32)), stored, stored.dtype.type(1))
    entries = write_source(folder / "a.safetensors", {"w": (source, stored.T.copy() if turned else stored)})
    target = Target("new", how.dtype, w.shape, ((Piece(entries["w"], transpose=turned),),), how)
    check([target], quantised_twin(target, stored.astype(np.float32)), folder / "out", chunk_bytes=chunk)


@pytest.mark.parametrize("how", forms(48), ids=lambda how: f"{how.form}{how.group_size or ''}")
def test_the_same_bytes_with_any_number_of_workers(tmp_path: Path, how: Quantize) -> None:
    """Experts as Llama 4 stores them, fused; and a matrix that is left as it is."""
    stored = np.random.default_rng(0).normal(size=(3, 48, 26)).astype(ml_dtypes.bfloat16)
    entries = write_source(tmp_path / "a.safetensors", {"a": ("BF16", stored)})
    targets, wanted = [Target("plain", "BF16", stored.shape, ((Piece(entries["a"]),),))], {"plain": stored.tobytes()}
    for e in range(3):
        for part, c in (("gate", 0), ("up", 13)):
            own = replace(how, scale_name=f"{e}.{part}.scale")
            piece = Piece(entries["a"], e, (c, c + 13), transpose=True)
            targets.append(Target(f"{e}.{part}", how.dtype, (13, 48), ((piece,),), own))
            wanted |= quantised_twin(targets[-1], stored[e, :, c : c + 13].T.astype(np.float32))
    files = []
    for workers in (1, 2, 7):
        with numpy_alone(workers == 2):
            check(targets, wanted, tmp_path / str(workers), workers=workers, chunk_bytes=200, shard_bytes=1500)
        files.append({p.name: p.read_bytes() for p in (tmp_path / str(workers)).iterdir()})
    assert len(files[0]) > 3
    assert files[0] == files[1] == files[2]


class TestRefused:
    @pytest.mark.parametrize("how", forms(8), ids=lambda how: f"{how.form}{how.group_size or ''}")
    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize(("source", "transpose"), [("BF16", False), ("BF16", True), ("F32", False), ("F16", True)])
    def test_not_finite(self, tmp_path: Path, how: Quantize, bad: float, source: str, transpose: bool) -> None:
        dtype: Any = {"BF16": ml_dtypes.bfloat16, "F32": np.float32, "F16": np.float16}[source]
        stored = np.ones((2, 8, 8), dtype)
        stored[1, 4, 7] = bad
        entries = write_source(tmp_path / "a.safetensors", {"some.weight": (source, stored)})
        target = Target("new", how.dtype, (8, 8), ((Piece(entries["some.weight"], 1, transpose=transpose),),), how)
        with pytest.raises(CheckpointError, match=r"tensor 'some.weight' at \[1, 4, 7\] holds .*, which is not finite"):
            run([target], tmp_path / "out", chunk_bytes=20)
        assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]

    @pytest.fixture
    def entry(self, tmp_path: Path) -> TensorEntry:
        return write_source(tmp_path / "a.safetensors", {"a": ("F32", np.ones((24, 24), np.float32))})["a"]

    def refuse(self, tmp_path: Path, targets: Sequence[Target], match: str, kind: type = UnsupportedError) -> None:
        with pytest.raises(kind, match=match), resumable_directory(tmp_path / "out", "0" * 64) as work:
            rewrite(targets, work, source_fingerprint="")
        assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]

    @pytest.mark.parametrize("dtype", ["BF16", "I32"])
    def test_types(self, tmp_path: Path, entry: TensorEntry, dtype: str) -> None:
        target = Target("new", dtype, (24, 24), ((Piece(entry),),), Quantize("channel", 0, "s"))
        self.refuse(tmp_path, [target], f"'new': {dtype} is not what is quantised by channel")

    @pytest.mark.parametrize(
        "how", [Quantize("block", 0, "s"), Quantize("channel", 8, "s"), Quantize("group", 0, "s")]  # type: ignore[arg-type]
    )  # fmt: skip
    def test_forms(self, tmp_path: Path, entry: TensorEntry, how: Quantize) -> None:
        target = Target("new", how.dtype, (24, 24), ((Piece(entry),),), how)
        self.refuse(tmp_path, [target], f"'new' cannot be quantised by {how.form} with groups of")

    @pytest.mark.parametrize("group", [5, 16, 48])
    def test_groups(self, tmp_path: Path, entry: TensorEntry, group: int) -> None:
        target = Target("new", "I32", (24, 24), ((Piece(entry),),), Quantize("group", group, "s"))
        self.refuse(tmp_path, [target], f"cannot be quantised in groups of {group}")

    def test_columns_that_cannot_be_packed(self, tmp_path: Path, entry: TensorEntry) -> None:
        target = Target("new", "I32", (24, 12), ((Piece(entry, columns=(0, 12)),),), Quantize("group", 4, "s"))
        self.refuse(tmp_path, [target], "cannot be quantised in groups of 4")

    @pytest.mark.parametrize("shape", [(576,), (2, 12, 24), (0, 24), (24, 0), (1, 2**20 + 1)])
    def test_shapes(self, tmp_path: Path, entry: TensorEntry, shape: tuple[int, ...]) -> None:
        target = Target("new", "F8_E4M3", shape, ((Piece(entry),),), Quantize("channel", 0, "s"))
        self.refuse(tmp_path, [target], "tensor 'new' of shape .* cannot be quantised")

    def test_rows_of_blocks_by_tensor(self, tmp_path: Path, entry: TensorEntry) -> None:
        target = Target("new", "F8_E4M3", (48, 24), ((Piece(entry),), (Piece(entry),)), Quantize("tensor", 0, "s"))
        self.refuse(tmp_path, [target], "several rows of blocks")

    def test_names(self, tmp_path: Path, entry: TensorEntry) -> None:
        for name in ("", "new", "other"):
            targets = [
                Target("other", "F32", (24, 24), ((Piece(entry),),)),
                Target("new", "F8_E4M3", (24, 24), ((Piece(entry),),), Quantize("channel", 0, name)),
            ]
            self.refuse(tmp_path, targets, f"tensor '{name}' would be written twice, or is no name", CheckpointError)


def test_each_way_to_quantise_has_its_key(tmp_path: Path) -> None:
    entry = write_source(tmp_path / "a.safetensors", {"a": ("F32", np.ones((24, 24), np.float32))})["a"]
    hows = [None, *forms(24), Quantize("channel", 0, "other")]
    keys = {request_key([Target("new", "F8_E4M3", (24, 24), ((Piece(entry),),), how)], "") for how in hows}
    assert len(keys) == len(hows)


def test_progress_counts_scales_too(tmp_path: Path) -> None:
    entry = write_source(tmp_path / "a.safetensors", {"a": ("F32", np.ones((4, 8), np.float32))})["a"]
    for how, size in ((Quantize("tensor", 0, "s"), 36), (Quantize("channel", 0, "s"), 48)):
        seen: list[tuple[int, int]] = []
        run(
            [Target("new", how.dtype, (4, 8), ((Piece(entry),),), how)],
            tmp_path / how.form,
            chunk_bytes=16,
            progress=lambda name, done, total, seen=seen: seen.append((done, total)),
        )
        assert seen == [(done, size) for done in ((0, 36) if how.form == "tensor" else (0, 24, 48))]


def test_tiles_are_tiny_here() -> None:
    assert rewrite_kernels.TILE_VALUES < 10 and quantise_stream.BAND_VALUES < 100
