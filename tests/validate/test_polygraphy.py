"""Polygraphy's own command line reads our files and writes what we read; what it did not write is refused."""

from __future__ import annotations

import base64
import copy
import importlib.util
import io
import json
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from shuntyard.engines.build import Request, build
from shuntyard.engines.engine import open_engine
from shuntyard.engines.manifest import CacheShape, load_manifest
from shuntyard.errors import EngineError, NotFiniteError, OutputError
from shuntyard.validate import polygraphy_json
from shuntyard.validate.polygraphy_json import Interface, first_calls, load_outputs, save_inputs, save_outputs
from shuntyard.validate.values import Sequence
from tests.conftest import Worded

installed = pytest.mark.skipif(
    importlib.util.find_spec("polygraphy") is None, reason="Polygraphy is not installed: pip install polygraphy"
)

RANDOM = np.random.default_rng(11)
SEQUENCES = [Sequence(f"{n} tokens", RANDOM.integers(0, 64, n)) for n in (1, 5, 8, 20)]
"""The last is longer than a chunk of 8."""


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command line itself."""
    code = "import sys; from polygraphy.tools._main import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "run", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="module", params=["fp32", "fp16"])
def engine(request: pytest.FixtureRequest, worded: Worded, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param == "fp32":
        return worded.engine
    out = tmp_path_factory.mktemp("fp16") / "engine"
    build(worded.model, out, Request(dtype="fp16", max_context=64))
    return out


@installed
def test_both_directions_and_a_planted_difference(engine: Path, tmp_path: Path) -> None:
    interface = Interface.of(engine)
    assert interface.longest == 8
    (note,) = save_inputs(tmp_path / "inputs.json", SEQUENCES, interface)
    assert note.startswith("inputs.json: 1 of 4 sequences are cut to their first 8 tokens")
    ours = list(first_calls(open_engine(engine), SEQUENCES, interface))
    save_outputs(tmp_path / "ours.json", ours, "shuntyard-onnxruntime")

    graph = str(engine / "engine.onnx")
    given = (graph, "--onnxrt", "--load-inputs", "inputs.json")
    done = run(tmp_path, *given, "--load-outputs", "ours.json", "--save-outputs", "theirs.json")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "vs. shuntyard-onnxruntime | Passed: 4/4 iterations" in done.stdout

    theirs = load_outputs(tmp_path / "theirs.json", SEQUENCES, interface)
    expected = [open_engine(engine).record(interface.piece(sequence)[None]) for sequence in SEQUENCES]
    for sequence, loaded, found in zip(SEQUENCES, theirs, expected, strict=True):
        assert loaded.label == sequence.label and loaded.runner.startswith("onnxrt-runner")
        np.testing.assert_allclose(loaded.logits, found.logits[0], rtol=0, atol=1e-5)
        assert len(loaded.keys) == len(loaded.values) == 8
        for i in range(8):
            np.testing.assert_allclose(loaded.keys[i], found.keys[i][0], rtol=0, atol=1e-5)
            np.testing.assert_allclose(loaded.values[i], found.values[i][0], rtol=0, atol=1e-5)
            assert np.abs(loaded.keys[i]).min(axis=(1, 2)).max() > 0  # the rows are really written

    planted = [dict(outputs) for outputs in ours]
    planted[2]["present.3.value"] = planted[2]["present.3.value"].copy()
    planted[2]["present.3.value"][0, 1, 4, 3] += 0.1
    save_outputs(tmp_path / "planted.json", planted, "shuntyard-planted")
    done = run(tmp_path, *given, "--load-outputs", "planted.json")
    assert done.returncode == 1
    assert "FAILED | Output: 'present.3.value'" in done.stdout and done.stdout.count("FAILED | Output") == 1
    assert "Passed: 3/4 iterations" in done.stdout


@installed
def test_a_directory_of_files_and_a_model_directory(worded: Worded, tmp_path: Path) -> None:
    interface = Interface.of(worded.model)
    assert interface.longest == 8 and interface.dtype == "fp32" and interface.cache[3].rows == 128
    save_inputs(tmp_path / "inputs.json", SEQUENCES, interface)
    done = run(
        tmp_path, str(worded.model / "model.onnx"), "--onnxrt", "--load-inputs", "inputs.json", "--save-outputs", "many"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    loaded = load_outputs(tmp_path / "many", SEQUENCES, interface)
    logits = [open_engine(worded.engine).logits(interface.piece(sequence)[None])[0] for sequence in SEQUENCES]
    for found, expected in zip(loaded, logits, strict=True):
        np.testing.assert_allclose(found.logits, expected, rtol=0, atol=1e-4)
    (tmp_path / "many" / "0000000002.json").unlink()
    with pytest.raises(EngineError, match="many: has the results of 3 feeds, there are 4 sequences"):
        load_outputs(tmp_path / "many", SEQUENCES, interface)


@installed
def test_bf16_goes_as_torch_tensors_and_comes_back(tmp_path: Path) -> None:
    """As for a TensorRT engine, whose caches have all their rows."""
    cache = (CacheShape(layer=0, heads=2, rows=8, head_dim=4),)
    interface = Interface("bf16", 64, 8, cache, static_rows=True)
    save_inputs(tmp_path / "inputs.json", SEQUENCES, interface)
    import polygraphy.comparator
    import polygraphy.json

    feeds = polygraphy.json.load_json(str(tmp_path / "inputs.json"))
    past = feeds[1]["past_key_values.0.key"]
    assert past.dtype == torch.bfloat16 and past.shape == (1, 2, 8, 4) and not past.any()
    assert feeds[1]["input_ids"].tolist() == [SEQUENCES[1].tokens.tolist()]
    assert feeds[1]["logits_indices"].tolist() == feeds[1]["position_ids"].tolist() == [[0, 1, 2, 3, 4]]

    shapes = [interface.output_shapes(len(interface.piece(sequence))) for sequence in SEQUENCES]
    made = [
        {
            name: RANDOM.normal(size=shape).astype(np.float32 if name == "logits" else ml_dtypes.bfloat16)
            for name, shape in of_one.items()
        }
        for of_one in shapes
    ]
    save_outputs(tmp_path / "ours.json", made, "ours")
    tensors = [
        {
            name: torch.from_numpy(array.astype(np.float32)).to(torch.float32 if name == "logits" else torch.bfloat16)
            for name, array in outputs.items()
        }
        for outputs in made
    ]
    results = polygraphy.comparator.RunResults()
    results.add(tensors, runner_name="trt-runner")
    results.save(str(tmp_path / "theirs.json"))
    for file in ("ours.json", "theirs.json"):
        for outputs, found in zip(made, load_outputs(tmp_path / file, SEQUENCES, interface), strict=True):
            count = len(found.logits)
            assert found.logits.tolist() == outputs["logits"][0].tolist()
            key = outputs["present.0.key"][0, :, :count].swapaxes(0, 1)
            assert found.keys[0].shape == (count, 2, 4) and found.keys[0].tolist() == key.tolist()


def encoded(array: Any) -> dict[str, Any]:
    """As Polygraphy saves an array."""
    stream = io.BytesIO()
    np.save(stream, array)
    data = base64.b64encode(stream.getvalue()).decode()
    inner = {"array": data, "polygraphy_class": "ndarray"}
    return {"values": inner, "polygraphy_class": "LazyArray"}


def tensor(data: bytes) -> dict[str, Any]:
    inner = {"tensor": base64.b64encode(data).decode(), "polygraphy_class": "Tensor"}
    return {"values": inner, "polygraphy_class": "LazyArray"}


SMALL = Interface("fp32", 64, 8, (CacheShape(layer=0, heads=2, rows=64, head_dim=4),), static_rows=False)
FEW = SEQUENCES[:2]


@pytest.fixture(scope="module")
def right() -> dict[str, Any]:
    """A file of results that is in order, written without Polygraphy."""
    iterations = [
        {
            "outputs": {
                name: encoded(np.ones(shape, np.float32)) for name, shape in SMALL.output_shapes(len(s.tokens)).items()
            },
            "runtime": 0.1,
            "runner_name": "r",
            "polygraphy_class": "IterationResult",
        }
        for s in FEW
    ]
    return {"lst": [["r", iterations]], "polygraphy_class": "RunResults"}


def outputs_of(raw: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = raw["lst"][0][1][1]["outputs"]
    return found


class Evil:
    """Would write a file when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("evil"),))


def pickled() -> bytes:
    stream = io.BytesIO()
    torch.save(Evil(), stream)
    return stream.getvalue()


def packed() -> bytes:
    stream = io.BytesIO()
    torch.save(torch.ones(1, 5, 64), stream)
    out = io.BytesIO()
    with zipfile.ZipFile(stream) as source, zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    return out.getvalue()


def saved(value: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def header_of(shape: tuple[int, ...]) -> dict[str, Any]:
    """An array file that promises more than it holds."""
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": "<f4", "fortran_order": False, "shape": shape})
    data = base64.b64encode(stream.getvalue()).decode()
    return {"values": {"array": data, "polygraphy_class": "ndarray"}, "polygraphy_class": "LazyArray"}


def logits(value: dict[str, Any]) -> Callable[[dict[str, Any]], None]:
    return lambda raw: outputs_of(raw).update(logits=value)


NAN = np.ones((1, 5, 64), np.float32)
NAN[0, 3, 7] = np.nan
WHERE = "sequence '5 tokens': output 'logits' "


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda raw: outputs_of(raw).pop("present.0.value"), "output 'present.0.value' is missing"),
        (lambda raw: outputs_of(raw).update(more=1), "output 'more' is none of the graph's"),
        (lambda raw: raw["lst"][0][1].pop(), "has the results of 1 feeds, there are 2 sequences"),
        (lambda raw: raw["lst"].append(["s", []]), r"holds results of 2 runners \['r', 's'\]"),
        (lambda raw: raw["lst"].clear(), "holds results of 0 runners"),
        (lambda raw: raw["lst"].append([1]), "'lst' is no list of runners"),
        (lambda raw: raw.update(polygraphy_class="TacticReplayData"), "must be a RunResults .*'TacticReplayData'"),
        (lambda raw: raw["lst"][0][1].append([]), "runner 'r' must be a IterationResult .*got list"),
        (logits({"polygraphy_class": "Evil"}), WHERE + "must be a LazyArray .* got 'Evil'"),
        (logits({"polygraphy_class": "LazyArray", "values": {}}), WHERE + "must be a ndarray .* got None"),
        (logits(encoded(np.ones((1, 4, 64), np.float32))), WHERE + r"is float32 \[1, 4, 64\], must be float32 \[1, 5"),
        (logits(encoded(np.ones((1, 5, 64), np.float64))), WHERE + "is float64 .* must be float32"),
        (logits(encoded(np.ones((1, 5, 64), ml_dtypes.bfloat16))), WHERE + r"is damaged: it holds \|V2, not numbers"),
        (logits(encoded(np.array([Evil()]))), WHERE + r"is damaged: it holds object, not numbers"),
        (logits(header_of((10**6, 10**6))), WHERE + "is damaged: 0 bytes are no float32"),
        (logits(tensor(pickled())), WHERE + "is damaged: Weights only load failed"),
        (logits(tensor(pickle.dumps(Evil()))), WHERE + "is damaged: File is not a zip file"),
        (logits(tensor(packed())), WHERE + "is damaged: the archive is packed"),
        (logits(tensor(saved([torch.ones(1)]))), WHERE + "is damaged: it is no dense tensor"),
        (logits(tensor(saved(torch.ones(1).expand(10**9)))), WHERE + "is damaged: it repeats its values"),
    ],
)
def test_files_that_are_not_of_these_feeds_are_refused(
    right: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    spoil: Callable[[dict[str, Any]], None],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "theirs.json"
    path.write_text(json.dumps(right))
    assert len(load_outputs(path, FEW, SMALL)) == 2
    raw = copy.deepcopy(right)
    spoil(raw)
    path.write_text(json.dumps(raw))
    with pytest.raises(EngineError, match=rf"theirs\.json: .*{message}") as caught:
        load_outputs(path, FEW, SMALL)
    assert caught.value.hint and len(caught.value.message) < 700
    assert not (tmp_path / "evil").exists()


def test_what_is_not_finite_is_refused(right: dict[str, Any], tmp_path: Path) -> None:
    raw = copy.deepcopy(right)
    outputs_of(raw)["logits"] = encoded(NAN)
    path = tmp_path / "theirs.json"
    path.write_text(json.dumps(raw))
    with pytest.raises(NotFiniteError, match=rf"theirs\.json: {WHERE}is not finite, first at \[0, 3, 7\]"):
        load_outputs(path, FEW, SMALL)


def test_one_of_several_runners_is_read(right: dict[str, Any], tmp_path: Path) -> None:
    raw = copy.deepcopy(right)
    raw["lst"].append(["s", copy.deepcopy(raw["lst"][0][1])])
    raw["lst"][1][1][1]["outputs"]["logits"] = encoded(np.full((1, 5, 64), 2, np.float32))
    path = tmp_path / "theirs.json"
    path.write_text(json.dumps(raw))
    assert [found.logits[0, 0] for found in load_outputs(path, FEW, SMALL, runner="s")] == [1, 2]
    with pytest.raises(EngineError, match="none of one runner 't'"):
        load_outputs(path, FEW, SMALL, runner="t")


@pytest.mark.parametrize(("text", "message"), [("", "is no valid JSON"), ("[1]", "must be a RunResults .* got list")])
def test_what_is_no_result_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "theirs.json"
    path.write_text(text)
    with pytest.raises(EngineError, match=message):
        load_outputs(path, FEW, SMALL)
    with pytest.raises(EngineError, match=r"none\.json: cannot be read: No such file"):
        load_outputs(tmp_path / "none.json", FEW, SMALL)
    (tmp_path / "empty").mkdir()
    with pytest.raises(EngineError, match=r"empty: holds no \*\.json"):
        load_outputs(tmp_path / "empty", FEW, SMALL)


def test_without_polygraphy_there_is_a_hint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "polygraphy.json", None)
    monkeypatch.setitem(sys.modules, "polygraphy.comparator", None)
    for write in (
        lambda path: save_inputs(path, FEW, SMALL),
        lambda path: save_outputs(path, [], "ours"),
    ):
        with pytest.raises(EngineError, match="cannot be imported") as caught:
            write(tmp_path / "out.json")
        assert caught.value.hint == "pip install 'shuntyard[polygraphy]'"


@installed
def test_nothing_is_overwritten_or_made_up(tmp_path: Path) -> None:
    path = tmp_path / "inputs.json"
    path.write_text("mine")
    with pytest.raises(OutputError, match="exists already"):
        save_inputs(path, FEW, SMALL)
    assert path.read_text() == "mine"
    with pytest.raises(OutputError, match="must end in .json"):
        save_inputs(tmp_path / "inputs", FEW, SMALL)
    with pytest.raises(OutputError, match="cannot be written: No such file"):
        save_inputs(tmp_path / "none" / "inputs.json", FEW, SMALL)
    for bad in ([64], [-1], []):
        with pytest.raises(EngineError, match=r"sequence 'bad' is empty or has a token outside 0\.\.63"):
            save_inputs(tmp_path / "new.json", [Sequence("bad", np.array(bad, np.int64))], SMALL)


def test_a_marked_engine_is_refused(worded: Worded, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = load_manifest(worded.engine).model_copy(update={"marked": ["model.layers.0"]})
    monkeypatch.setattr(polygraphy_json, "load_manifest", lambda directory: manifest)
    with pytest.raises(EngineError, match="its values in between are outputs too"):
        Interface.of(worded.engine)
