"""The conformance runner: right kernels pass, and every fault that it is there for is found."""

from __future__ import annotations

import struct
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.plugins.bounds import bounds_of, exactly
from tests.plugins.conformance.__main__ import main, run, write
from tests.plugins.conformance.expected import Part, product, rows_between, slack_of_codes
from tests.plugins.conformance.files import (
    Between,
    Bits,
    Candidates,
    Case,
    Exact,
    Input,
    Literal,
    Near,
    OneOf,
    Output,
    Table,
    Uniform,
    literal,
    read_results,
)
from tests.plugins.conformance.judge import judge
from tests.plugins.conformance.make import MOST_JUDGED, make_cases
from tests.plugins.conformance.timing import timed_cases
from tests.plugins.forms import FORMATS, FP8, QUANTISING, form_of
from tests.plugins.native_build import CHUNKS, CMakeBuild, feeds_of
from tests.plugins.test_experts import by_oracle
from tests.tolerances import FP32_SUMS, TENSOR_CORE_SUMS

WORK = 100_000


@pytest.fixture(scope="module")
def runner(built: CMakeBuild) -> Path:
    return built.directory / "plugins/native/conformance/shuntyard_conformance"


@pytest.fixture(scope="module")
def library(built: CMakeBuild) -> Path:
    return built.directory / "plugins/native/tests/libshuntyard_on_host.so"


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    return list(make_cases(60, FP32_SUMS, WORK))


def says(runner: Path, library: Path, file: Path, *options: str) -> tuple[int, str]:
    command = [str(runner), str(library), str(file), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def test_the_host_build_passes(runner: Path, library: Path, cases: list[Case]) -> None:
    """By the runner's own judgement and by numpy's, with every tactic that there is."""
    status, text, wrong = run(runner, library, cases, ["--every-tactic"])
    assert (status, wrong) == (0, []), text
    assert f"{len(cases)} cases, " in text and " 0 failures" in text


def test_tensors_may_lie_anywhere(runner: Path, library: Path, cases: list[Case]) -> None:
    """On multiples of 4 bytes: what is chosen by shape takes that, too."""
    status, text, wrong = run(runner, library, cases, ["--shift", "4"])
    assert (status, wrong) == (0, []), text


def test_cases_are_of_every_kind(cases: list[Case]) -> None:
    for words in (
        *[("fused",), ("split",), ("linear",), ("none",), ("tensor",), ("channel",), ("group",)],
        *[("static",), ("dynamic",), ("broken",), ("with NaN",), ("T=0",), ("one expert",), ("zipf",), ("whole",)],
        *[("routing", "ties"), ("routing", "extreme"), ("scatter", "broken"), ("scatter", "NaN"), ("bf16 x fp32",)],
    ):
        assert any(all(word in case.name for word in words) for case in cases), words


def test_broken_indices_that_leave_two_answers_are_known(cases: list[Case]) -> None:
    assert any(case.runs_may_differ for case in cases)
    assert all("broken" in case.name for case in cases if case.runs_may_differ)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("behind", "wrote outside: at byte 2 behind the end of output 0"),
        ("before", "wrote outside: 3 bytes before output 0"),
        ("input", "changed input 0 at byte"),
        ("unstable", "run again: not the first run's bytes: output 0 at element 0"),
        ("wrong", "output 0: element ["),
        ("stale", "output 0: element ["),
        ("refusing", "enqueue fails"),
        ("forgetful", "createPlugin gives nothing from what getFieldsToSerialize has stored"),
        ("type", "output 0 is announced as ["),
        ("shape", "output 0 is announced as [977"),
        ("formats", "supportsFormatCombination refuses tensor 0"),
        ("tactic", "(tactic 977): output 0: element ["),
    ],
)
def test_faults_are_found(built: CMakeBuild, runner: Path, tmp_path: Path, fault: str, words: str) -> None:
    """In every case of routing and scatter-add that writes anything."""
    link, file = tmp_path / f"faulty-{fault}.so", tmp_path / "cases.bin"
    link.symlink_to(built.directory / "plugins/native/conformance/libshuntyard_faulty.so")
    own = [case for case in make_cases(20, FP32_SUMS, WORK, seed=3, ops=(0, 2)) if case.outputs[0].shape[0]]
    own = [case for case in own if not case.runs_may_differ and np.prod(case.outputs[0].shape) <= MOST_JUDGED]
    assert len(own) >= 6
    write(file, own)
    status, text = says(runner, link, file, "--every-tactic")
    assert status == 1 and words in text and f" {len(own)} failures" in text, text


def test_the_faulty_library_is_right_but_for_its_fault(
    built: CMakeBuild, runner: Path, tmp_path: Path, cases: list[Case]
) -> None:
    link, file = tmp_path / "faulty-none.so", tmp_path / "cases.bin"
    link.symlink_to(built.directory / "plugins/native/conformance/libshuntyard_faulty.so")
    write(file, cases)
    assert says(runner, link, file)[0] == 0


def moved(case: Case) -> Case:
    """The case, but its last output must have another number in one place."""
    output = case.outputs[-1]
    judgement: Any = output.judgement
    if isinstance(judgement, OneOf):
        rows = list(judgement.rows)
        last = rows[-1]
        rows[-1] = Candidates(False, [(high + 1, high + 1) for _, high in last.bounds])
        judgement = OneOf(rows)
    else:
        names = ("low", "high") if isinstance(judgement, Between) else ("values",)
        arrays = {name: getattr(judgement, name).copy() for name in names}
        place = int(np.flatnonzero(np.isfinite(arrays[names[0]].astype(np.float64)))[-1])
        for array in arrays.values():
            array[place] = array[place] * 2 + 1
        judgement = judgement._replace(**arrays)
    return replace(case, outputs=[*case.outputs[:-1], Output(output.shape, output.dtype, judgement)])


def test_every_judgement_can_fail(runner: Path, library: Path, cases: list[Case]) -> None:
    """By the runner and by numpy alike: each case with one number moved."""
    able = [case for case in cases if case.outputs[-1].shape[0] and "NaN" not in case.name]
    wrong = [moved(case) for case in able]
    status, text, found = run(runner, library, wrong, ["--most-failures", "1000"])
    assert status == 1
    assert len(found) == len(wrong)
    for case in wrong:
        assert f"FAIL {case.name}: output {len(case.outputs) - 1}: " in text, case.name
    kinds = {type(case.outputs[-1].judgement) for case in wrong}
    assert kinds == {Exact, Between, OneOf}


@pytest.mark.parametrize("dtype", [np.float32, np.float16, FORMATS["bf16"]])
def test_numbers_at_the_edge_of_their_bounds(runner: Path, library: Path, tmp_path: Path, dtype: Any) -> None:
    """A scatter-add whose results are known: bounds of its bits hold, and the next number is out."""
    base = np.asarray([[1.5, -2, 0.5, np.inf, np.nan, 2.0**-14]], dtype)
    inputs = [literal(base), literal(np.zeros((1, 6), dtype)), literal(np.zeros(1, np.int32))]

    def status_of(judgement: Any) -> int:
        file = tmp_path / "case.bin"
        write(file, [Case("one", 2, inputs, [Output(base.shape, base.dtype, judgement)], 1)])
        return says(runner, library, file)[0]

    flat = base.reshape(-1)
    assert status_of(Exact(1, flat)) == status_of(Between(1, flat, flat)) == status_of(Near(0, 1, flat)) == 0
    for place in range(6):
        for up in (True, False):
            off = flat.copy()
            bits = off.view(f"i{base.dtype.itemsize}")
            bits[place] += 1 if up else -1
            if np.isnan(flat[place].astype(np.float32)):
                off[place] = 1
            assert status_of(Exact(1, off)) == status_of(Between(1, off, off)) == 1
            held = np.isinf(flat[place].astype(np.float32)) or place == 4
            assert status_of(Near(1, 1, off)) == (1 if held else 0)


def test_sources_are_the_same_here_and_there(runner: Path, library: Path, cases: list[Case]) -> None:
    """Scatter-add of zeros hands its base through: what the runner has made is what is made here."""
    made = []
    tables = {"fp32": [-2.5, np.inf, 3], "fp16": [0.1, -0.0, 6e-8, 65504], "bf16": [1e-40, 1, -3e38]}
    for name, dtype in FORMATS.items():
        shape, bits = (257, 3), {"fp32": 24, "fp16": 11, "bf16": 8}[name]
        sources: Sequence[Any] = [
            Table(2**63 - 1, np.asarray(tables[name], dtype)),
            *(Uniform(seed, bits, exponent) for seed, exponent in ((0, -bits), (5, -24 if name == "fp16" else -40))),
            *([Uniform(9, 24, -20, np.asarray([0.1, -7, 1e6], np.float32))] if name == "fp32" else []),
        ]
        for number, source in enumerate(sources):
            base = Input(shape, np.dtype(dtype), source, {0: 1, 770: -2})
            zeros = np.zeros((257, 3), dtype) * np.asarray(-1, dtype)
            slots = literal(np.arange(257, dtype=np.int32))
            expected = Exact(1, base.make().reshape(-1))
            output = Output(shape, np.dtype(dtype), expected)
            made.append(Case(f"{name} {number}", 2, [base, literal(zeros), slots], [output], 1))
    bits_of = Input((4, 1), np.dtype(np.float32), Bits(1))
    assert len({*bits_of.make().reshape(-1).view(np.uint32).tolist()}) == 4
    status, text, wrong = run(runner, library, made, [])
    assert (status, wrong) == (0, []), text


def test_results_are_read_whole(tmp_path: Path) -> None:
    file = tmp_path / "results"
    file.write_bytes(struct.pack("<H3siIQ2s", 3, b"one", 7, 1, 2, b"ab"))
    assert [tuple(result) for result in read_results(file)] == [("one", 7, [b"ab"])]
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(AssertionError, match="ends within a result"):
        list(read_results(file))


def test_what_cannot_be_run(runner: Path, library: Path, tmp_path: Path, cases: list[Case]) -> None:
    file = tmp_path / "cases.bin"
    write(file, cases[:2])
    whole = file.read_bytes()
    for arguments, words in (
        ((library,), "give a plugin library and a file of cases"),
        ((library, file, "--tactic", "x"), "--tactic: x is no number"),
        ((library, file, "--tactic"), "--tactic needs a value"),
        ((library, file, "--tactic", "4294967296"), "--tactic: 4294967296 is not from 0 to 2147483647"),
        ((library, file, "--every", "0"), "--every: 0 is not from 1 to "),
        ((library, file, "--wrong"), "there is no option --wrong"),
        ((library, file, "-x"), "there is no option -x"),
        ((library, file, "--shift", "3"), "--shift must be a multiple of 4"),
        ((tmp_path / "none.so", file), "none.so"),
        ((library, tmp_path / "none.bin"), "none.bin cannot be opened"),
        ((library, library), "is no file of cases"),
        ((library, file, "--time"), "--time needs a GPU"),
    ):
        done = subprocess.run([str(runner), *map(str, arguments)], capture_output=True, text=True, check=False)
        assert done.returncode == 2 and words in done.stderr, (arguments, done.stderr)
    assert says(runner, library, file, "--only", "no such case") == (
        1,
        says(runner, library, file, "--only", "no such case")[1],
    )
    assert says(runner, library, file, "--tactic", "977")[0] == 1  # nothing has run
    file.write_bytes(whole[:-1])
    assert says(runner, library, file)[0] == 2
    file.write_bytes(whole[:8] + struct.pack("<I", 2) + whole[12:])
    assert "this program reads version 1" in says(runner, library, file)[1]


def test_the_runner_says_what_it_takes(runner: Path) -> None:
    done = subprocess.run([str(runner), "--help"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "shuntyard_conformance LIBRARY CASES [options]" in done.stdout and "--most-failures N" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_command_line(runner: Path, library: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "cases.bin.gz"
    assert main(["--cases", "3", "--most-work", "1e5", "--sums", "tensor", "--write", str(file)]) == 0
    assert capsys.readouterr().out.startswith("9 cases, ")
    unpacked = subprocess.run(["gzip", "-dc", str(file)], capture_output=True, check=True).stdout
    done = subprocess.run([str(runner), str(library), "-"], input=unpacked, capture_output=True, check=False)
    assert done.returncode == 0 and b"9 cases, 27 runs, 0 failures" in done.stdout
    assert main(["--cases", "2", "--most-work", "1e5", "--runner", str(runner), "--library", str(library)]) == 0
    assert "numpy finds 0 wrong" in capsys.readouterr().out


def test_timed_cases_are_small_to_store() -> None:
    made = list(timed_cases())
    assert len({case.name for case in made}) == len(made)
    assert sum(len(case.pack()) for case in made) < 8 << 20
    weights = [sum(int(np.prod(tensor.shape)) for tensor in case.inputs) for case in made]
    assert max(weights) > 128 * 3 * 5120 * 8192


# -- the bounds


@pytest.mark.parametrize("kind", QUANTISING)
def test_bounds_are_those_of_the_other_tests(kind: tuple[str, ...]) -> None:
    """Two ways to the same intervals, as far as activations are quantised."""

    for compute in FORMATS:
        feeds, made, top_k = feeds_of({**CHUNKS, "T": 20, "H": 16}, compute, "fp32", form_of(kind, 5))
        mine = rows_between(feeds, made, top_k, FP32_SUMS)
        theirs = bounds_of(feeds, made, top_k)
        size = abs(np.stack(theirs)).max()
        for own, other in zip(mine, theirs, strict=True):
            np.testing.assert_allclose(own, other, rtol=0, atol=size * 2.0**-20)


def cut_off(terms: np.ndarray[Any, Any], bits: int) -> float:
    """A sum as tensor cores make it: 32 terms at a time, lined up with the largest, cut off below ``bits``."""
    total = 0.0
    for block in np.split(terms, range(128, len(terms), 128)):
        inside = 0.0
        for step in np.split(block, range(32, len(block), 32)):
            lined = np.append(step, inside)
            unit = 2.0 ** (np.floor(np.log2(max(abs(lined).max(), 1e-30))) - bits)
            inside = float((np.trunc(lined / unit) * unit).sum())
        total += inside
    return total


@pytest.mark.parametrize("depth", [8, 32, 100, 128, 200, 512])
def test_slack_holds_what_tensor_cores_cut_off(depth: int) -> None:
    rng = np.random.default_rng(depth)
    worst = 0.0
    for _ in range(40):
        codes = (rng.normal(size=(4, depth)) * 100).astype(FP8).astype(np.float64)
        matrix = (rng.normal(size=(depth, 3)) * 50).astype(FP8).astype(np.float64)
        slack = slack_of_codes(exactly(codes), matrix, TENSOR_CORE_SUMS)
        for row, column in np.ndindex(4, 3):
            terms = codes[row] * matrix[:, column]
            off = abs(cut_off(terms, 13) - terms.sum())
            assert off <= slack[row, column]
            worst = max(worst, off / max(slack[row, column], 1e-9))
    assert worst > 0.01  # not a bound that nothing ever comes near


def test_slack_is_none_where_sums_are_exact() -> None:
    rng = np.random.default_rng(0)
    codes, matrix = rng.integers(-2, 3, size=(5, 300)) * 16.0, rng.integers(-2, 3, size=(300, 4)) * 0.5
    assert not slack_of_codes(exactly(codes), matrix, TENSOR_CORE_SUMS).any()
    codes[2, 7] = 2.0**-9  # which the others' units are too large for
    slack = slack_of_codes(exactly(codes), matrix, TENSOR_CORE_SUMS)
    assert (slack[2] > 0).all() or not matrix[7].all()
    assert not slack[[0, 1, 3, 4]].any()
    for row, column in np.ndindex(2, 4):
        assert cut_off(codes[row] * matrix[:, column], 13) == codes[row] @ matrix[:, column]


def test_bounds_of_a_product_hold_every_order() -> None:
    """Sums in fp32, forwards, backwards and in pairs."""
    rng = np.random.default_rng(1)
    x, w = rng.normal(size=(6, 500)).astype(np.float32), rng.normal(size=(500, 4)).astype(np.float32)
    bounds = product(exactly(x), Part(w.astype(np.float64), None, None), FP32_SUMS, np.dtype(np.float32))
    for order in (np.arange(500), np.arange(500)[::-1], rng.permutation(500)):
        sums = np.zeros((6, 4), np.float32)
        for i in order:
            sums += x[:, i : i + 1] * w[i]
        assert ((bounds.low <= sums) & (sums <= bounds.high)).all()
    assert ((bounds.high - bounds.low) < 2 * 502 * 2.0**-24 * (abs(x) @ abs(w)) + 1e-5).all()


def test_judging_by_numpy_sees_what_is_missing(cases: list[Case]) -> None:
    case = next(case for case in cases if case.outputs[0].shape[0] > 1)
    short = [bytes(output.dtype.itemsize) for output in case.outputs]
    assert "has 1 elements" in judge(case, short)[0]
    assert isinstance(case.inputs[-1].source, (Literal, Table, Uniform))


@pytest.mark.parametrize("kind", QUANTISING)
def test_mistakes_are_out_of_tensor_cores_bounds(kind: tuple[str, ...]) -> None:
    """The oracle is within them; rows of the expert next door, without scores or with a scale of another are not."""
    feeds, made, top_k = feeds_of({**CHUNKS, "T": 60, "H": 64, "F": 48}, "bf16", "fp32", form_of(kind, 5))
    bounds = rows_between(feeds, made, top_k, TENSOR_CORE_SUMS)

    def share_outside(**changed: Any) -> float:
        rows = by_oracle({**feeds, **changed}, made, top_k).astype(np.float64)
        return float(((rows < bounds.low) | (rows > bounds.high)).mean())

    assert share_outside() == 0
    assert share_outside(scores=np.ones_like(feeds["scores"])) > 0.1
    assert share_outside(expert_offsets=np.roll(feeds["expert_offsets"], 1) * (np.arange(6) > 0)) > 0.3
    assert share_outside(x=np.roll(feeds["x"], 1, axis=1)) > 0.3
    made.scales[-1][...] *= 1.25  # in some layouts one expert's of five
    assert share_outside() > 0.05
