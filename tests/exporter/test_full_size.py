"""Models of full size: an export costs kinds of layers, not parameters, and refers to every byte of the weights.

The checkpoints are sparse (``tests/sparse.py``). Exports run in processes of their own, whose memory the kernel tells.
"""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import pytest

from tests.sizes import MODELS, raw_config
from tests.sparse import Place, places, write_sparse

LARGEST_PEAK_MIB = 1024
"""An export of the miniature takes about 400 MiB, nearly all of it torch's; the headers of Maverick-FP8 add 200."""

LARGEST_WRITTEN = 20 * 10**6
"""Bytes: the graph, the manifest, and copies of the checkpoint's small files."""

LARGEST_TENSOR = 2**31
"""Elements of an initializer: runtimes count them in 32 bits (Maverick's fused experts have 10.7e9)."""

VISION = ("vision_model.", "multi_modal_projector.")


@dataclass(frozen=True)
class Exported:
    """A model directory, what the command said, and the memory that it took."""

    checkpoint: Path
    path: Path
    said: dict[str, Any]
    peak_mib: float


EXPORT = """
import re, sys
from pathlib import Path
from shuntyard.cli import main
status = main(["export", "--text-only", "--json", *sys.argv[1:]], standalone_mode=False)
print(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1], file=sys.stderr)
sys.exit(status)
"""


def export(checkpoint: Path, out: Path) -> Exported:
    """``shuntyard export --text-only --json`` in a process of its own, which ends by telling its peak."""
    command = [sys.executable, "-c", EXPORT, str(checkpoint), str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return Exported(checkpoint, out, json.loads(done.stdout), int(done.stderr.split()[-1]) / 1024)


@pytest.fixture(
    scope="module", params=[("scout", "bf16"), ("maverick", "bf16"), ("maverick", "fp8-meta")], ids="-".join
)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A model of full size in the Hub's layout, with its vision tower."""
    model, form = request.param
    folder = tmp_path_factory.mktemp(f"{model}-{form}")
    return export(write_sparse(folder / "checkpoint", raw_config(MODELS[model], form)), folder / "model")


def text_places(checkpoint: Path) -> dict[str, Place]:
    """Where the text model's tensors lie."""
    return {name: place for name, place in places(checkpoint).items() if not name.startswith(VISION)}


def external_data(exported: Exported) -> dict[str, tuple[Path, int, int]]:
    """File, offset and length of every initializer that lies outside the graph."""
    found = {}
    for tensor in onnx.load(exported.path / "model.onnx", load_external_data=False).graph.initializer:
        place = {entry.key: entry.value for entry in tensor.external_data}
        if place:
            found[tensor.name] = exported.path / place["location"], int(place["offset"]), int(place["length"])
    return found


def test_memory_does_not_grow_with_the_model(exported: Exported) -> None:
    assert exported.peak_mib < LARGEST_PEAK_MIB


def test_nothing_of_the_weights_is_copied(exported: Exported) -> None:
    own = [path for path in exported.path.iterdir() if path.stat().st_nlink == 1]
    assert not [path.name for path in own if path.suffix == ".safetensors"]
    assert sum(path.stat().st_size for path in own) < LARGEST_WRITTEN
    assert exported.said["bytes_written"] < LARGEST_WRITTEN
    # A hole that was written to would not be one any more.
    assert sum(512 * path.stat().st_blocks for path in exported.checkpoint.iterdir()) < LARGEST_WRITTEN


def test_every_byte_of_the_text_model_is_referred_to_once(exported: Exported) -> None:
    spans: dict[int, list[tuple[int, int]]] = {}
    for file, offset, length in external_data(exported).values():
        spans.setdefault(file.stat().st_ino, []).append((offset, offset + length))
    wanted: dict[Path, list[tuple[int, int]]] = {}
    for tensor, file, offset in text_places(exported.checkpoint).values():
        wanted.setdefault(file, []).append((offset, offset + tensor.nbytes))
    for file, own in wanted.items():
        found = sorted(spans.pop(file.stat().st_ino, []))
        assert _joined(found) == _joined(sorted(own)), file.name
        assert all(first[1] <= second[0] for first, second in itertools.pairwise(found)), file.name
    assert not spans


def _joined(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Spans in order, those that touch made one."""
    out: list[tuple[int, int]] = []
    for begin, end in spans:
        if out and out[-1][1] == begin:
            out[-1] = out[-1][0], end
        else:
            out.append((begin, end))
    return out


def test_each_weight_lies_where_its_name_says(exported: Exported) -> None:
    own = {name.removeprefix("language_model."): place for name, place in text_places(exported.checkpoint).items()}
    parts = 0
    for name, (file, offset, length) in external_data(exported).items():
        plain = name.removeprefix("language_model.")
        if plain in own:
            (tensor, source, begin), expert = own[plain], 0
            assert length == tensor.nbytes
        else:  # an expert of a fused tensor, called TENSOR.EXPERT
            whole, _, last = plain.rpartition(".")
            (tensor, source, begin), expert = own[whole], int(last)
            assert length * tensor.shape[0] == tensor.nbytes
            parts += 1
        assert file.samefile(source), name
        assert offset == begin + expert * length, name
    assert bool(parts) == any(math.prod(place.tensor.shape) >= LARGEST_TENSOR for place in own.values())


def test_shapes_are_the_checkpoints_and_none_passes_31_bits(exported: Exported) -> None:
    own = {name.removeprefix("language_model."): place for name, place in text_places(exported.checkpoint).items()}
    model = onnx.load(exported.path / "model.onnx", load_external_data=False)
    for tensor in model.graph.initializer:
        assert math.prod(tensor.dims) < LARGEST_TENSOR, tensor.name
        place = own.get(tensor.name.removeprefix("language_model."))
        if place and tensor.external_data:
            assert math.prod(tensor.dims) == math.prod(place.tensor.shape), tensor.name


def test_the_vision_tower_is_waived_by_name(exported: Exported) -> None:
    vision = {name for name in places(exported.checkpoint) if name.startswith(VISION)}
    assert vision and set(exported.said["waived"]) == vision
