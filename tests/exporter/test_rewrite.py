"""Rewritten weights, bit by bit, against numpy on whole tensors; and what is refused.

Tiles, bands and chunks are made tiny here, so that small tensors have all their edges.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save_file

from shuntyard.errors import CheckpointError, UnsupportedError
from shuntyard.exporter import rewrite as rewriting
from shuntyard.exporter import rewrite_kernels, rewrite_shards
from shuntyard.exporter.resumable import resumable_directory
from shuntyard.exporter.rewrite import Piece, Target, request_key, rewrite
from shuntyard.exporter.safetensors_header import ITEM_BITS, TensorEntry, read_header

NUMPY: dict[str, Any] = {
    "BF16": ml_dtypes.bfloat16,
    "F16": np.float16,
    "F32": np.float32,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
}
TORCH = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F8_E4M3": torch.float8_e4m3fn,
    "I32": torch.int32,
    "I64": torch.int64,
}
LARGEST = {"BF16": 3.3895314e38, "F16": 65504.0, "F32": 3.4028235e38, "F8_E4M3": 448.0}


@pytest.fixture(autouse=True)
def tiny_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rewrite_kernels, "TILE_ROWS", 3)
    monkeypatch.setattr(rewrite_kernels, "TILE_COLUMNS", 5)
    monkeypatch.setattr(rewrite_kernels, "TILE_VALUES", 7)
    monkeypatch.setattr(rewrite_kernels, "_MOST_VECTORS", 2)
    monkeypatch.setattr(rewrite_shards, "LEAST_RUN", 4)
    monkeypatch.setattr(rewriting, "WRITE_BYTES", 12)


def tensor_of(array: NDArray[Any], dtype: str) -> torch.Tensor:
    if array.size == 0:
        return torch.empty(array.shape, dtype=TORCH[dtype])
    bits = torch.from_numpy(np.ascontiguousarray(array).view(np.uint8).reshape(-1).copy())
    return bits.view(TORCH[dtype]).reshape(array.shape)


def write_source(path: Path, arrays: dict[str, tuple[str, NDArray[Any]]]) -> dict[str, TensorEntry]:
    """A file by the safetensors library; its entries by name."""
    save_file({name: tensor_of(array, dtype) for name, (dtype, array) in arrays.items()}, path)
    return {entry.name: entry for entry in read_header(path).tensors}


def run(targets: Sequence[Target], out: Path, **options: Any) -> dict[str, NDArray[np.uint8]]:
    """Rewrites into ``out``; the bytes of every tensor, as the safetensors library reads them back."""
    asked = {name: options[name] for name in ("shard_bytes", "chunk_bytes") if name in options}
    with resumable_directory(out, request_key(targets, "source", **asked)) as work:
        headers = rewrite(targets, work, source_fingerprint="source", **options)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    asked_for = {stored.name: stored for target in targets for stored in target.stored}
    found: dict[str, NDArray[np.uint8]] = {}
    for header in headers:
        with safe_open(out / header.file.name, "pt") as file:
            assert file.metadata() == {"format": "pt"}
            for name in file.keys():  # noqa: SIM118, no mapping
                tensor = file.get_tensor(name)
                own = asked_for[name]
                assert (tuple(tensor.shape), tensor.dtype) == (own.shape, TORCH[own.dtype])
                assert index["weight_map"][name] == header.file.name
                found[name] = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
        for entry in header.tensors:
            assert entry.offset % (ITEM_BITS[entry.dtype] // 8) == 0
    assert index["metadata"]["total_size"] == sum(len(data) for data in found.values())
    assert sorted(found) == sorted(index["weight_map"]) == sorted(asked_for)
    assert {p.name for p in out.iterdir()} == {"model.safetensors.index.json", *index["weight_map"].values()}
    return found


@dataclass
class Made:
    """A piece, its stored arrays, and the matrix that it stands for, in the type that a cast begins with."""

    piece: Piece
    arrays: dict[str, tuple[str, NDArray[Any]]]
    value: NDArray[Any]


def place_of(name: str, dtype: str, shape: tuple[int, ...]) -> TensorEntry:
    """An entry whose place is not known yet."""
    return TensorEntry(name, dtype, shape, Path(), 0, 0)


def numbers(rng: np.random.Generator, shape: tuple[int, ...], dtype: str, largest: float) -> NDArray[Any]:
    """Values of all magnitudes that the type has below ``largest``, zeros of both signs, and the type's extremes."""
    exponents = rng.uniform(-30, min(20, math.log2(largest)), shape)
    values = np.exp2(exponents) * rng.choice([-1.0, 1.0], shape)
    special = rng.integers(0, 8, shape)
    values = np.where(special == 0, -0.0, np.where(special == 1, min(largest, LARGEST[dtype]), values))
    with np.errstate(over="ignore"):
        return values.astype(np.float32).astype(NUMPY[dtype])


def make_piece(draw: Any, name: str, rows: int, columns: int, target: str, rng: np.random.Generator) -> Made:
    """A stored tensor from which a piece of this shape can be taken, in a way that is drawn."""
    form = draw(st.sampled_from(["BF16", "F16", "F32", "F8_E4M3", "tensor", "channel", "group"]))
    transpose, parts = draw(st.booleans()), draw(st.sampled_from([0, 0, 1, 3]))
    stored_rows, taken = (columns, rows) if transpose else (rows, columns)
    before, after = draw(st.sampled_from([(0, 0), (0, taken), (taken, 0), (3, 2)]))
    if form == "group":
        after += -(before + taken + after) % 8
    width = before + taken + after
    lead = (parts,) if parts else ()
    index = draw(st.integers(0, parts - 1)) if parts else None
    cut = (before, before + taken) if before or after else None
    arrays: dict[str, tuple[str, NDArray[Any]]] = {}
    scale, group = None, 0
    if form in NUMPY:
        limit = min(LARGEST[form], LARGEST[target]) * 0.99
        stored = numbers(rng, (*lead, stored_rows, width), form, limit)
        arrays[name], value = (form, stored), stored
    else:
        scale_dtype = draw(st.sampled_from(["F32", "BF16", "F16"]))
        if form == "group":
            group = draw(st.sampled_from([1, 4, 8, 5, width]))
            q = rng.integers(-8, 8, (*lead, stored_rows, width))
            packed = np.zeros((*lead, stored_rows, width // 8), np.uint32)
            for nibble in range(8):
                packed |= (q[..., nibble::8] + 8).astype(np.uint32) << np.uint32(4 * nibble)
            arrays[name] = ("I32", packed.view(np.int32))
            scale_shape: tuple[int, ...] = (*lead, stored_rows, -(-width // group))
        else:
            fp8 = numbers(rng, (*lead, stored_rows, width), "F8_E4M3", 440.0)
            arrays[name], q = ("F8_E4M3", fp8), fp8.astype(np.float32)
            if form == "tensor":
                # As many as there are rows could be one for each row: that is refused, and tested elsewhere.
                stacked = [(parts,), (parts, 1, 1)] if parts and parts != stored_rows else []
                scale_shape = draw(st.sampled_from([(), (1,), (1, 1), *stacked]))
            else:
                scale_shape = draw(st.sampled_from([(*lead, stored_rows, 1), (*lead, stored_rows)]))
        scales = (rng.uniform(0.001, 1.0, scale_shape)).astype(NUMPY[scale_dtype])
        arrays[f"{name}.scale"] = (scale_dtype, scales)
        scale = place_of(f"{name}.scale", scale_dtype, scales.shape)
        wide = scales.astype(np.float32)
        if form == "group":
            wide = np.repeat(wide, group, axis=-1)[..., :width]
        elif math.prod(scale_shape) == 1 or form == "tensor":
            wide = wide.reshape(*([-1, 1, 1] if parts and wide.size > 1 else [1] * (2 + len(lead))))
        else:
            wide = wide.reshape(*lead, stored_rows, 1)
        value = q.astype(np.float32) * wide
    entry = place_of(name, arrays[name][0], arrays[name][1].shape)
    matrix = value[index] if index is not None else value
    matrix = matrix[:, before : before + taken]
    piece = Piece(entry, index, cut, transpose, scale, group)
    return Made(piece, arrays, matrix.T if transpose else matrix)


def located(piece: Piece, entries: dict[str, TensorEntry]) -> Piece:
    scale = entries[piece.scale.name] if piece.scale else None
    return replace(piece, entry=entries[piece.entry.name], scale=scale)


def cast(value: NDArray[Any], dtype: str) -> NDArray[Any]:
    with np.errstate(over="ignore"):
        return value.astype(NUMPY[dtype])


@st.composite
def requests(draw: Any) -> tuple[list[list[list[Made]]], list[str], dict[str, int]]:
    """Some targets as mosaics of pieces, their types, and sizes of shards and chunks."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    mosaics, dtypes = [], []
    size = st.integers(1, 11)
    for t in range(draw(st.integers(1, 3))):
        dtype = draw(st.sampled_from(["F32", "F16", "BF16", "F8_E4M3"]))
        widths, heights = draw(st.lists(size, min_size=1, max_size=3)), draw(st.lists(size, min_size=1, max_size=3))
        mosaics.append(
            [
                [make_piece(draw, f"{t}.{i}.{k}", h, w, dtype, rng) for k, w in enumerate(widths)]
                for i, h in enumerate(heights)
            ]
        )
        dtypes.append(dtype)
    sizes = {"chunk_bytes": draw(st.integers(1, 200)), "shard_bytes": draw(st.integers(1, 2000))}
    return mosaics, dtypes, sizes


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A new folder each time."""
    base = tmp_path_factory.mktemp("rewrite")
    return (base / str(i) for i in range(10**9))


@given(requests(), st.integers(1, 3))
@settings(max_examples=100)
def test_any_mosaic(
    folders: Iterator[Path], asked: tuple[list[list[list[Made]]], list[str], dict[str, int]], workers: int
) -> None:
    folder = next(folders)
    folder.mkdir()
    mosaics, dtypes, sizes = asked
    entries: dict[str, TensorEntry] = {}
    for t, mosaic in enumerate(mosaics):
        arrays = {name: array for line in mosaic for made in line for name, array in made.arrays.items()}
        entries |= write_source(folder / f"source-{t}.safetensors", arrays)
    targets, wanted = [], {}
    for t, (mosaic, dtype) in enumerate(zip(mosaics, dtypes, strict=True)):
        # Values that a scale made may be too large for fp8.
        whole = np.concatenate([np.concatenate([cast(m.value, dtype) for m in line], axis=1) for line in mosaic])
        pieces = tuple(tuple(located(made.piece, entries) for made in line) for line in mosaic)
        targets.append(Target(f"new.{t}", dtype, whole.shape, pieces))
        wanted[f"new.{t}"] = whole
    if all(np.isfinite(whole.astype(np.float32)).all() for whole in wanted.values()):
        found = run(targets, folder / "out", workers=workers, **sizes)
        for name, whole in wanted.items():
            assert found[name].tobytes() == whole.tobytes(), name
    else:
        with pytest.raises(CheckpointError, match="which is beyond"):
            run(targets, folder / "out", workers=workers, **sizes)


@pytest.mark.parametrize("shape", [(7,), (1,), (), (3, 5, 2), (2, 0, 3), (0,), (4, 4, 4, 4)], ids=str)
def test_shapes_of_all_ranks(tmp_path: Path, shape: tuple[int, ...]) -> None:
    values = np.random.default_rng(0).normal(size=shape).astype(ml_dtypes.bfloat16)
    entries = write_source(tmp_path / "a.safetensors", {"a": ("BF16", np.asarray(values))})
    found = run([Target("new", "F32", shape, ((Piece(entries["a"]),),))], tmp_path / "out", chunk_bytes=16)
    assert found["new"].tobytes() == np.asarray(values).astype(np.float32).tobytes()


def every_finite(dtype: str) -> NDArray[Any]:
    bits = np.arange(2 ** (8 * np.dtype(NUMPY[dtype]).itemsize)).astype(f"u{np.dtype(NUMPY[dtype]).itemsize}")
    values = bits.view(NUMPY[dtype])
    finite: NDArray[Any] = values[np.isfinite(values.astype(np.float32))]
    return finite


@pytest.mark.parametrize("target", ["F32", "F16", "BF16", "F8_E4M3"])
@pytest.mark.parametrize("source", ["BF16", "F16", "F8_E4M3"])
def test_every_value_of_a_type(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, target: str) -> None:
    """Every value of the source's type that fits, subnormal ones too, rounds as ml_dtypes does it."""
    monkeypatch.undo()
    values = every_finite(source)
    fitting = values[np.isfinite(cast(values, target).astype(np.float32))]
    entries = write_source(tmp_path / "a.safetensors", {"a": (source, fitting)})
    found = run([Target("new", target, fitting.shape, ((Piece(entries["a"]),),))], tmp_path / "out")
    assert found["new"].tobytes() == cast(fitting, target).tobytes()


def test_the_same_bytes_with_any_number_of_workers(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    stored = rng.normal(size=(3, 20, 26)).astype(ml_dtypes.bfloat16)
    entries = write_source(tmp_path / "a.safetensors", {"a": ("BF16", stored)})
    targets = [
        Target(f"{e}.{part}", "F16", (13, 20), ((Piece(entries["a"], e, (c, c + 13), transpose=True),),))
        for e in range(3)
        for part, c in (("gate", 0), ("up", 13))
    ]
    files = []
    for workers in (1, 2, 7):
        run(targets, tmp_path / str(workers), workers=workers, chunk_bytes=64, shard_bytes=1200)
        files.append({p.name: p.read_bytes() for p in (tmp_path / str(workers)).iterdir()})
    assert len(files[0]) == 4
    assert files[0] == files[1] == files[2]


def test_reads_and_writes_that_take_a_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a signal or a network's file system may have it."""
    monkeypatch.setattr(rewrite_kernels, "native", lambda: None)  # which has its own pread
    preadv, pwrite = os.preadv, os.pwrite
    monkeypatch.setattr(os, "preadv", lambda fd, views, offset: preadv(fd, [memoryview(views[0])[:3]], offset))
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: pwrite(fd, data[:5], offset))
    stored = np.random.default_rng(0).normal(size=(9, 10)).astype(np.float32)
    entries = write_source(tmp_path / "a.safetensors", {"a": ("F32", stored)})
    turned = Target("turned", "F32", (10, 9), ((Piece(entries["a"], transpose=True),),))
    half = Target("half", "BF16", (9, 10), ((Piece(entries["a"]),),))
    found = run([turned, half], tmp_path / "out", chunk_bytes=100)
    assert found["turned"].tobytes() == stored.T.tobytes()
    assert found["half"].tobytes() == stored.astype(ml_dtypes.bfloat16).tobytes()


def test_given_bytes(tmp_path: Path) -> None:
    """Tensors that are made of nothing, among others; of any type, and empty too."""
    entries = write_source(tmp_path / "a.safetensors", {"a": ("BF16", np.ones((3, 4), ml_dtypes.bfloat16))})
    shape, scale = np.array([3, 4], np.int64).tobytes(), np.array([0.25], np.float32).tobytes()
    targets = [
        Target("a", "BF16", (3, 4), ((Piece(entries["a"]),),)),
        Target("a.shape", "I64", (2,), (), data=shape),
        Target("a.scale", "F32", (1,), (), data=scale),
        Target("none", "I32", (0,), (), data=b""),
    ]
    found = run(targets, tmp_path / "out", chunk_bytes=4)
    assert (found["a.shape"].tobytes(), found["a.scale"].tobytes(), len(found["none"])) == (shape, scale, 0)
    key = request_key(targets, "")
    targets[2] = replace(targets[2], data=b"\0\0\0\0")
    assert request_key(targets, "") != key


def test_wide_types_come_first(tmp_path: Path) -> None:
    """So that each tensor is aligned to its own type, whatever odd sizes stand before it."""
    entries = write_source(tmp_path / "a.safetensors", {"a": ("BF16", np.ones(3, ml_dtypes.bfloat16))})
    dtypes = ["F8_E4M3", "F16", "F32", "BF16"]
    run([Target(f"{d}", d, (3,), ((Piece(entries["a"]),),)) for d in dtypes], tmp_path / "out")
    [header] = [read_header(p) for p in (tmp_path / "out").glob("*.safetensors")]
    assert [entry.name for entry in header.tensors] == ["F32", "F16", "BF16", "F8_E4M3"]
    assert header.tensors[0].offset % 8 == 0


def test_progress_counts_bytes(tmp_path: Path) -> None:
    entries = write_source(tmp_path / "a.safetensors", {"a": ("F32", np.ones((8, 8), np.float32))})
    seen: list[tuple[str, int, int]] = []
    run(
        [Target("new", "F32", (8, 8), ((Piece(entries["a"]),),))],
        tmp_path / "out",
        chunk_bytes=64,
        progress=lambda *call: seen.append(call),
    )
    assert seen == [("", 0, 256), *(("new", done, 256) for done in (64, 128, 192, 256))]


class Refused:
    """One stored value is bad; the error names it."""

    def refuse(self, tmp_path: Path, array: NDArray[Any], source: str, target: str, **piece: Any) -> str:
        entries = write_source(tmp_path / "a.safetensors", {"some.weight": (source, array)})
        taken = Piece(entries["some.weight"], **piece)
        request = Target("new", target, taken.shape, ((taken,),))
        with pytest.raises(CheckpointError) as caught:
            run([request], tmp_path / "out", chunk_bytes=32)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors"]
        assert f"{tmp_path / 'a.safetensors'}: tensor 'some.weight' at " in caught.value.message
        return caught.value.message


class TestRefusedValues(Refused):
    @pytest.mark.parametrize("transpose", [False, True])
    @pytest.mark.parametrize("target", ["F32", "F16", "BF16", "F8_E4M3"])
    @pytest.mark.parametrize("source", ["BF16", "F16", "F32", "F8_E4M3"])
    @pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf, -math.inf])
    def test_not_finite(self, tmp_path: Path, bad: float, source: str, target: str, transpose: bool) -> None:
        array = np.ones((2, 6, 9), NUMPY[source])
        array[1, 4, 7] = bad
        shown = "nan" if np.isnan(bad) or source == "F8_E4M3" else str(bad)
        message = self.refuse(tmp_path, array, source, target, index=1, columns=(2, 9), transpose=transpose)
        assert f"at [1, 4, 7] holds {shown}, which is not finite" in message

    @pytest.mark.parametrize(
        ("value", "source", "target"),
        [
            (65536.0, "BF16", "F16"),
            (-65536.0, "BF16", "F16"),
            (65520.0, "F32", "F16"),
            (3.4e38, "F32", "BF16"),
            (-480.0, "BF16", "F8_E4M3"),
        ],
    )
    def test_too_large(self, tmp_path: Path, value: float, source: str, target: str) -> None:
        array = np.ones((6, 9), NUMPY[source])
        array[5, 0] = value
        message = self.refuse(tmp_path, array, source, target, transpose=True)
        assert f"at [5, 0] holds {float(array[5, 0])}, which is beyond" in message
        assert f"the largest value of {target}" in message

    def test_what_rounds_down_to_the_largest(self, tmp_path: Path) -> None:
        entries = write_source(tmp_path / "a.safetensors", {"a": ("F32", np.array([65519.99, -65519.99], np.float32))})
        found = run([Target("new", "F16", (2,), ((Piece(entries["a"]),),))], tmp_path / "out")
        assert found["new"].view(np.float16).tolist() == [65504.0, -65504.0]

    def test_products(self, tmp_path: Path) -> None:
        """448 * 200 fits fp32 and bf16, not fp16."""
        fp8 = np.full((4, 6), 448, ml_dtypes.float8_e4m3fn)
        scales = np.array([1, 1, 200, 1], np.float32)
        entries = write_source(tmp_path / "a.safetensors", {"q": ("F8_E4M3", fp8), "s": ("F32", scales)})
        piece = Piece(entries["q"], scale=entries["s"])
        run([Target("new", "BF16", (4, 6), ((piece,),))], tmp_path / "wide")
        with pytest.raises(CheckpointError, match=r"tensor 'q' at \[2, 0\] holds 89600.0, which is beyond 65504"):
            run([Target("new", "F16", (4, 6), ((piece,),))], tmp_path / "narrow")

    def test_scales(self, tmp_path: Path) -> None:
        fp8, scales = np.ones((4, 6), ml_dtypes.float8_e4m3fn), np.array([1, 1, np.inf, 1], np.float32)
        entries = write_source(tmp_path / "a.safetensors", {"q": ("F8_E4M3", fp8), "s": ("F32", scales)})
        with pytest.raises(CheckpointError, match=r"tensor 's' at \[2\] holds inf, which is not finite"):
            run([Target("new", "F32", (4, 6), ((Piece(entries["q"], scale=entries["s"]),),))], tmp_path / "out")

    def test_negative_scales(self, tmp_path: Path) -> None:
        fp8, scales = np.ones((4, 6), ml_dtypes.float8_e4m3fn), np.array([1, 1, -0.5, 1], np.float32)
        entries = write_source(tmp_path / "a.safetensors", {"q": ("F8_E4M3", fp8), "s": ("F32", scales)})
        with pytest.raises(CheckpointError, match=r"tensor 's' holds -0.5: a scale is not negative"):
            run([Target("new", "F32", (4, 6), ((Piece(entries["q"], scale=entries["s"]),),))], tmp_path / "out")

    def test_int4(self, tmp_path: Path) -> None:
        packed, scales = np.zeros((2, 3, 2), np.int32), np.ones((2, 3, 2), np.float32)
        scales[1, 2, 1] = 3e38  # times -8
        entries = write_source(tmp_path / "a.safetensors", {"q": ("I32", packed), "s": ("F32", scales)})
        piece = Piece(entries["q"], 1, (3, 15), True, entries["s"], 8)
        with pytest.raises(CheckpointError, match=r"tensor 'q' at \[1, 2, 8\] holds -inf, which is not finite"):
            run([Target("new", "F32", (12, 3), ((piece,),))], tmp_path / "out")


class TestRefusedRequests:
    @pytest.fixture
    def entries(self, tmp_path: Path) -> dict[str, TensorEntry]:
        arrays: dict[str, tuple[str, NDArray[Any]]] = {
            "a": ("BF16", np.ones((2, 4, 6), ml_dtypes.bfloat16)),
            "q": ("F8_E4M3", np.ones((4, 6), ml_dtypes.float8_e4m3fn)),
            "packed": ("I32", np.zeros((4, 2), np.int32)),
            "square": ("F8_E4M3", np.ones((2, 2, 3), ml_dtypes.float8_e4m3fn)),
            "two": ("F32", np.ones(2, np.float32)),
            "four": ("F32", np.ones(4, np.float32)),
            "grid": ("F32", np.ones((4, 2), np.float32)),
        }
        return write_source(tmp_path / "a.safetensors", arrays)

    def refuse(self, tmp_path: Path, targets: Sequence[Target], match: str, kind: type = CheckpointError) -> None:
        with pytest.raises(kind, match=match), resumable_directory(tmp_path / "out", "0" * 64) as work:
            rewrite(targets, work, source_fingerprint="")
        assert not [p for p in tmp_path.iterdir() if p.name != "a.safetensors"]

    @pytest.mark.parametrize(
        ("shape", "index", "columns"),
        [((4, 6), 2, None), ((4, 6), -1, None), ((4, 3), 0, (4, 7)), ((4, 1), 0, (3, 2))],
    )
    def test_cuts(
        self,
        tmp_path: Path,
        entries: dict[str, TensorEntry],
        shape: tuple[int, int],
        index: int,
        columns: tuple[int, int] | None,
    ) -> None:
        target = Target("new", "F32", shape, ((Piece(entries["a"], index, columns),),))
        self.refuse(tmp_path, [target], r"tensor 'a' of shape \[2, 4, 6\] has no (part|columns)")

    @pytest.mark.parametrize("shape", [(4, 7), (5, 6), (3, 6), (24,), ()])
    def test_shapes(self, tmp_path: Path, entries: dict[str, TensorEntry], shape: tuple[int, ...]) -> None:
        target = Target("new", "F32", shape, ((Piece(entries["a"], 0),),))
        self.refuse(tmp_path, [target], "tensor 'new' of shape .* cannot be put together")

    def test_ragged_rows(self, tmp_path: Path, entries: dict[str, TensorEntry]) -> None:
        a = entries["a"]
        target = Target("new", "F32", (4, 10), ((Piece(a, 0), Piece(a, 0, transpose=True)),))
        self.refuse(tmp_path, [target], "tensor 'new' .* cannot be put together")

    @pytest.mark.parametrize("dtype", ["F64", "I32", "F8_E5M2", "F4"])
    def test_types(self, tmp_path: Path, entries: dict[str, TensorEntry], dtype: str) -> None:
        target = Target("new", dtype, (4, 6), ((Piece(entries["a"], 0),),))
        self.refuse(tmp_path, [target], f"{dtype} cannot be written", UnsupportedError)

    def test_integers(self, tmp_path: Path, entries: dict[str, TensorEntry]) -> None:
        target = Target("new", "F32", (4, 2), ((Piece(entries["packed"]),),))
        self.refuse(tmp_path, [target], "'packed' is I32, which cannot be rewritten", UnsupportedError)

    def test_given_bytes(self, tmp_path: Path, entries: dict[str, TensorEntry]) -> None:
        short = Target("new", "I64", (2,), (), data=bytes(15))
        self.refuse(tmp_path, [short], r"tensor 'new' of shape \[2\] cannot be put together")
        both = Target("new", "F32", (2, 1), ((Piece(entries["two"], transpose=True),),), data=bytes(8))
        self.refuse(tmp_path, [both], r"tensor 'new' of shape \[2, 1\] cannot be put together")
        packed = Target("new", "F4", (2,), (), data=bytes(1))
        self.refuse(tmp_path, [packed], "F4 cannot be written", UnsupportedError)

    def test_twice(self, tmp_path: Path, entries: dict[str, TensorEntry]) -> None:
        target = Target("new", "F32", (2, 4, 6), ((Piece(entries["a"]),),))
        self.refuse(tmp_path, [target, target], "tensor 'new' would be written twice")

    @pytest.mark.parametrize(
        ("weight", "scale", "index", "group"),
        [("q", "two", None, 0), ("q", "grid", None, 0), ("packed", "grid", None, 4), ("square", "two", 0, 0)],
    )
    def test_scales(
        self,
        tmp_path: Path,
        entries: dict[str, TensorEntry],
        weight: str,
        scale: str,
        index: int | None,
        group: int,
    ) -> None:
        """The last one could be a scale for each expert, or for each row of all: two layouts fit, none is guessed."""
        piece = Piece(entries[weight], index, scale=entries[scale], group=group)
        self.refuse(tmp_path, [Target("new", "F32", piece.shape, ((piece,),))], f"'{scale}' .* is no scale for")

    def test_scales_of_plain_weights(self, tmp_path: Path, entries: dict[str, TensorEntry]) -> None:
        piece = Piece(entries["a"], 0, scale=entries["four"])
        target = Target("new", "F32", (4, 6), ((piece,),))
        self.refuse(tmp_path, [target], "'a' is BF16 and has a scale", UnsupportedError)

    def test_int4_without_scale(self, tmp_path: Path, entries: dict[str, TensorEntry]) -> None:
        target = Target("new", "F32", (4, 16), ((Piece(entries["packed"], group=8),),))
        self.refuse(tmp_path, [target], "'packed' is int4, but has no scale")
