"""bench/moe_kernels.py as far as it goes without a GPU: arithmetic, results, plot, and that contenders agree."""

from __future__ import annotations

import subprocess
import sys
import types
import xml.etree.ElementTree as ET
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import moe_kernels
from bench.kernels import arithmetic, clock, contenders, plot, results
from bench.kernels import ours as ours_module
from bench.kernels.arithmetic import MODELS, Model, touched, work_of
from bench.kernels.contenders import Layer, by_fbgemm, by_torch, by_vllm, make_layer, make_weights, ours, quantised
from bench.kernels.ours import Library, expert_weights
from tests.plugins.native_build import CMakeBuild

SMALL = Model("small", 16, 64, 96)

# -- arithmetic


@pytest.mark.parametrize(
    ("model", "tokens", "experts", "megabytes"),
    [("scout", 1, 1.0, 252), ("scout", 8, 6.5, 938), ("scout", 64, 15.7, 2108), ("maverick", 8, 7.8, 1106)],
)
def test_bytes_of_a_layer(model: str, tokens: int, experts: float, megabytes: float) -> None:
    """Worked out by hand: so many experts and the shared one, of 3 * 5120 * 8192 bytes each, and little else."""
    found = touched(MODELS[model].experts, tokens)
    assert round(found, 1) == experts
    assert work_of(MODELS[model], tokens, "fp8", found, shared=True).bytes / 1e6 == pytest.approx(megabytes, rel=3e-3)


def test_work_of_many_tokens() -> None:
    work = work_of(MODELS["scout"], 4096, "bf16", 16)
    assert work.flops == 2 * 4096 * 3 * 5120 * 8192
    assert work.bytes == 16 * 3 * 5120 * 8192 * 2 + 3 * 4096 * 5120 * 2 + 4096 * 16 * 4
    memory, math = work.floors(4000, 500)
    assert memory == pytest.approx(work.bytes / 4e12 * 1e6) and math == pytest.approx(work.flops / 5e14 * 1e6)


def test_the_table_needs_no_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--arithmetic", "--models", "scout", "--tokens", "1", "4096", "--bandwidth", "4300", "--fp8", "1979"]
    assert moe_kernels.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 + 4 and "4,300 GB/s" in lines[0]
    assert lines[3].split() == ["scout", "fp8", "1", "1.0", "126", "0.3", "29.3", "0.1"]
    assert moe_kernels.main([*arguments, "--shared"]) == 0
    both = capsys.readouterr().out.splitlines()
    assert both[3].split() == ["scout", "fp8", "1", "2.0", "252", "0.5", "58.6", "0.3"]
    assert moe_kernels.main(["--arithmetic", "--tokens", "1", "16384", "1000000"]) == 0
    assert all(len(line) <= 80 for line in capsys.readouterr().out.splitlines())


def test_help_fits_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        moe_kernels.main(["--help"])
    assert all(len(line) <= 80 for line in capsys.readouterr().out.splitlines())


@pytest.mark.parametrize(
    "arguments",
    [
        *(["--bandwidth", text] for text in ("0", "-1", "nan", "inf", "fast")),
        *(["--tokens", text] for text in ("0", "-1", "1.5", "")),
        *[["--rounds", "0"], ["--fp8", "0"], ["--bf16", "-0.0"]],
    ],
)
def test_rates_and_counts_are_positive(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        moe_kernels.main(["--arithmetic", *arguments])
    assert f"argument {arguments[0]}: {arguments[1]} is no " in capsys.readouterr().err


def test_a_reader_may_have_enough() -> None:
    command = [sys.executable, moe_kernels.__file__, "--arithmetic", "--tokens", *map(str, range(1, 5001))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline().startswith(b"floors at")
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert moe_kernels.main([]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "error: there is no CUDA device",
        "hint: --arithmetic and --from need none",
    ]


# -- results and plot


def made_up() -> results.Run:
    run = results.Run({"gpu": "a <GPU>"}, 4300.0, {"fp8": 1400.0, "bf16": 790.0}, {"vLLM": "not there"})
    for precision in ("fp8", "bf16"):
        for tokens in (4096, 1, 64):
            work = work_of(MODELS["scout"], tokens, precision, 16)
            floors = work.floors(4300, run.teraflops[precision])
            times = [
                results.Times(factor * max(floors), factor * 0.9, factor * 1.1, factor * 0.8, 15) for factor in (1.2, 3)
            ]
            entries = [
                results.Entry("ours", times[0], 0.0),
                results.Entry("torch", times[1], 0.01, captured=False),
                results.Entry("FBGEMM", problem="RuntimeError: no"),
            ]
            run.points.append(results.Point("scout", precision, "uniform", tokens, 16, *work, *floors, entries=entries))
    return run


def test_results_are_read_as_they_were_written(tmp_path: Path) -> None:
    run, path = made_up(), tmp_path / "run.json"
    results.write(run, path)
    assert results.read(path) == run
    path.write_text(path.read_text().replace('"tokens": 64', '"tokens": "many"'))
    with pytest.raises(ValueError, match="tokens"):
        results.read(path)


def test_plot_has_every_line() -> None:
    text = plot.svg(made_up())
    root = ET.fromstring(text)
    space = "{http://www.w3.org/2000/svg}"
    words = [element.text or "" for element in root.iter(f"{space}text")]
    assert sum(word == "ours" for word in words) == sum(word == "floor" for word in words) == 2
    assert not any(word == "FBGEMM" for word in words)  # which was never timed
    assert {"1", "64", "4,096"} <= set(words)
    assert any("4,300 GB/s" in word and "790 TFLOP/s in bf16" in word for word in words)
    assert len(list(root.iter(f"{space}circle"))) == 2 * 2 * 3
    assert "a &lt;GPU&gt;" in text
    heights = [float(circle.attrib["cy"]) for circle in root.iter(f"{space}circle")]
    assert all(0 < y < float(root.attrib["viewBox"].split()[3]) for y in heights)


def test_slower_is_higher() -> None:
    lines = plot.lines_of([p for p in made_up().points if p.precision == "fp8"])
    assert list(lines) == ["floor", "ours", "torch"]
    assert all(ours < peer for (_, ours), (_, peer) in zip(lines["ours"], lines["torch"], strict=True))


def test_plotting_earlier_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, drawing = tmp_path / "run.json", tmp_path / "run.svg"
    results.write(made_up(), path)
    assert moe_kernels.main(["--from", str(path), "--plot", str(drawing)]) == 0
    assert drawing.read_text().startswith("<svg")
    assert moe_kernels.main(["--from", str(path), "--plot", str(drawing), "--skew", "zipf"]) == 2
    assert "nothing was measured with zipf routing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "it is not JSON"),
        (b"\x7fELF\xff", "it is not JSON"),
        (b"{}", "it has no machine"),
        (b"[]", "it holds no run's figures"),
        (b'{"machine": {}, "copy_gigabytes": "x", "teraflops": {}}', "copy_gigabytes: input should be a valid number"),
        (None, "No such file or directory"),
    ],
)
def test_other_files_are_refused_in_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes | None, reason: str
) -> None:
    path = tmp_path / "run.json"
    if content is not None:
        path.write_bytes(content)
    assert moe_kernels.main(["--from", str(path)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith(f"error: {path}: {reason}")
    assert lines[1:] == ["hint: give a file that --json has written"]


def test_what_cannot_be_written_is_known_before_measuring(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for option, place in (("--json", tmp_path), ("--plot", tmp_path / "none" / "run.svg")):
        assert moe_kernels.main(["--from", "none.json", option, str(place)]) == 2
        assert capsys.readouterr().err.startswith(f"error: {place} cannot be written\nhint: ")


def test_a_contender_that_differs_fails_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, path = made_up(), tmp_path / "run.json"
    run.points[0].entries[1] = results.Entry("torch", None, 0.5, problem="another result: not timed")
    results.write(run, path)
    assert moe_kernels.main(["--from", str(path)]) == 1
    assert "FAIL scout fp8 uniform T=4096: torch: another result" in capsys.readouterr().out


# -- contenders, on the processor


def grouped_by_loop(rows: Tensor, weight: Tensor, scale: Tensor | None, ends: Tensor) -> Tensor:
    """What torch's grouped products do."""
    result = torch.zeros(len(rows), weight.shape[1])
    begin = 0
    for e, end in enumerate(ends.tolist()):
        own = slice(begin, end)
        begin = end
        if scale is None:
            result[own] = rows[own].float() @ weight[e].float().T
        else:
            numbers, factor = quantised(rows[own])
            result[own] = (numbers.float() @ weight[e].float().T) * factor[:, None] * scale[e]
    return result.to(torch.bfloat16)


@pytest.fixture(scope="module")
def library(built: CMakeBuild) -> Library:
    return Library(built.directory / "plugins/native/tests/libshuntyard_on_host.so", on_host=True)


def layer_of(precision: str, skew: str, tokens: int = 40) -> Layer:
    return make_layer(SMALL, tokens, skew, make_weights(SMALL, precision, "cpu"), "cpu", seed=3)


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's and FBGEMM's functions as their documentation has them, in plain torch."""

    def module(name: str, **members: Any) -> None:
        made = types.ModuleType(name)
        made.__dict__.update(members)
        monkeypatch.setitem(sys.modules, name, made)

    def ends_of(counts: Tensor) -> Tensor:
        return torch.cumsum(counts, 0)

    def index_shuffling(scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        expert, order = torch.sort(scores.argmax(1), stable=True)
        counts = torch.bincount(expert, minlength=scores.shape[1])
        return torch.cat([counts, counts.sum(0, keepdim=True)]), expert, order

    def gather(x: Tensor, tokens: Tensor, experts: Tensor, scores: Tensor) -> Tensor:
        return (x[tokens].float() * scores[tokens, experts].float()[:, None]).to(torch.bfloat16)

    def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
        return (torch.nn.functional.silu(gate.float()) * up.float()).to(torch.bfloat16)

    def grouped(rows: Tensor, w: Tensor, counts: Tensor) -> Tensor:
        return grouped_by_loop(rows, w.view(len(counts), -1, w.shape[1]), None, ends_of(counts))

    def grouped_fp8(rows: Tensor, w: Tensor, counts: Tensor, x_scale: Tensor, w_scale: Tensor) -> Tensor:
        out, begin = torch.zeros(len(rows), len(w) // len(counts)), 0
        for e, end in enumerate(ends_of(counts).tolist()):
            own = slice(begin, end)
            weight, scale = w.view(len(counts), -1, w.shape[1])[e], w_scale.view(len(counts), -1)[e]
            out[own] = rows[own].float() @ weight.float().T * x_scale[own, None] * scale
            begin = end
        return out.to(torch.bfloat16)

    module("fbgemm_gpu")
    module("fbgemm_gpu.experimental")
    module("fbgemm_gpu.experimental.gen_ai")
    module("fbgemm_gpu.experimental.gemm")
    module("fbgemm_gpu.experimental.gemm.triton_gemm")
    module(
        "fbgemm_gpu.experimental.gen_ai.moe",
        index_shuffling=index_shuffling,
        gather_scale_dense_tokens=gather,
        gather_scale_quant_dense_tokens=lambda *args: quantised(gather(*args)),
        silu_mul=silu_mul,
        silu_mul_quant=lambda gate, up: quantised(silu_mul(gate, up)),
        scatter_add_dense_tokens=lambda out, rows, tokens: out.index_add_(0, tokens, rows),
    )
    module(
        "fbgemm_gpu.experimental.gemm.triton_gemm.grouped_gemm",
        grouped_gemm=grouped,
        grouped_gemm_fp8_rowwise=grouped_fp8,
    )

    def fused_experts(
        hidden_states: Tensor,
        w1: Tensor,
        w2: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        apply_router_weight_on_input: bool,
        quant_config: Any,
    ) -> Tensor:
        assert apply_router_weight_on_input and topk_ids.dtype == torch.int32
        out = torch.zeros_like(hidden_states)
        scaled = (hidden_states.float() * topk_weights).to(torch.bfloat16)
        for t, expert in enumerate(topk_ids.flatten().tolist()):
            scales = [None, None]
            if quant_config is not None:
                assert quant_config["per_act_token_quant"] and quant_config["per_out_ch_quant"]
                scales = [quant_config[name][expert : expert + 1, :, 0] for name in ("w1_scale", "w2_scale")]
            one = torch.ones(1, dtype=torch.int32)
            both = grouped_by_loop(scaled[t : t + 1], w1[expert : expert + 1], scales[0], one)
            gate, up = both.chunk(2, 1)
            out[t] = grouped_by_loop(silu_mul(gate, up), w2[expert : expert + 1], scales[1], one)[0]
        return out

    for name in ("vllm", "vllm.model_executor", "vllm.model_executor.layers", "vllm.model_executor.layers.fused_moe"):
        module(name)
    module("vllm.model_executor.layers.fused_moe.fused_moe", fused_experts=fused_experts)
    module("vllm.model_executor.layers.fused_moe.config", fp8_w8a8_moe_quant_config=lambda **given: given)


@pytest.mark.parametrize("skew", moe_kernels.SKEWS)
@pytest.mark.parametrize("precision", arithmetic.WEIGHT_BYTES)
@pytest.mark.parametrize(
    "make", [lambda layer: by_torch(layer, grouped_by_loop), by_vllm, by_fbgemm], ids=["torch", "vllm", "fbgemm"]
)
def test_contenders_compute_the_same(
    library: Library, packages: None, make: Callable[[Layer], contenders.Run], precision: str, skew: str
) -> None:
    layer = layer_of(precision, skew)
    expected = ours(library, layer)().clone()
    assert torch.isfinite(expected.float()).all()
    difference = moe_kernels.compare(make(layer), expected)
    assert difference <= moe_kernels.MOST_DIFFERENT[precision]
    layer.weights.w13[:] = layer.weights.w13.flip(1)  # gate and up exchanged
    assert moe_kernels.compare(make(layer), expected) > 3 * moe_kernels.MOST_DIFFERENT[precision]


def test_grouped_mm_of_torch_takes_what_it_is_given() -> None:
    """In bf16, which torch has on the processor, too."""
    layer = layer_of("bf16", "zipf")
    expected = by_torch(layer, grouped_by_loop)().clone()
    assert moe_kernels.compare(by_torch(layer), expected) < 1e-2


@pytest.mark.parametrize("precision", arithmetic.WEIGHT_BYTES)
def test_every_tactic_gives_the_same(library: Library, precision: str) -> None:
    layer = layer_of(precision, "uniform")
    weights = expert_weights(layer.weights.w13, layer.weights.w2, layer.weights.scales)
    tactics = library.tactics(weights, (40, SMALL.experts, 1, SMALL.hidden, SMALL.width))
    assert len(tactics) > 3 and "plain" in tactics.values()
    expected = ours(library, layer)().clone()
    for tactic in tactics:
        assert moe_kernels.compare(ours(library, layer, tactic), expected) <= moe_kernels.MOST_DIFFERENT[precision]


def test_a_whole_run(
    library: Library,
    packages: None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """On the processor, where everything is but the clock and torch's grouped products in FP8."""

    def timed(calls: list[Callable[[], Tensor]], rounds: int) -> tuple[results.Times, bool]:
        assert len(calls) == 2 and len({call().data_ptr() for call in calls}) == 2
        return results.Times(2.0, 1.0, 3.0, 0.5, rounds), True

    monkeypatch.setitem(MODELS, "scout", SMALL)
    monkeypatch.setattr(moe_kernels, "machine", lambda _: {"gpu": "none"})
    monkeypatch.setattr(moe_kernels, "free_memory", lambda: int(2.5 * SMALL.experts * SMALL.expert_weights / 0.8))
    for name, value in (("copy_gigabytes", 4300.0), ("gemm_teraflops", 1400.0)):
        monkeypatch.setattr(clock, name, lambda *_, value=value: value)
    monkeypatch.setattr(clock, "measure", timed)
    monkeypatch.setitem(contenders.PEERS, "absent", ("no_such_package", by_torch))
    parsed = ["--models", "scout", "--precisions", "fp8", "--tokens", "24", "--skews", "zipf", "--rounds", "3"]
    monkeypatch.setattr(moe_kernels, "measure", partial(moe_kernels.measure, device="cpu"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(ours_module, "Library", lambda path: library)
    json = tmp_path / "run.json"
    assert moe_kernels.main([*parsed, "--tactics", "--json", str(json)]) == 0, capsys.readouterr().out
    run = results.read(json)
    assert run.absent.keys() == {"absent"} and "no_such_package" in run.absent["absent"]
    (point,) = run.points
    assert (point.model, point.tokens, point.skew) == ("small", 24, "zipf")
    assert 1 < point.experts_touched <= 16
    by_name = {entry.name: entry for entry in point.entries}
    for name in ("ours", "ours, plain", "vLLM", "FBGEMM"):
        assert by_name[name].times == results.Times(2.0, 1.0, 3.0, 0.5, 3), by_name[name]
    assert by_name["torch"].times is not None or by_name["torch"].problem
    text = capsys.readouterr().out
    assert "absent: absent: ModuleNotFoundError" in text and "small fp8 zipf T=24: floor" in text


def test_skews() -> None:
    def counts(skew: str) -> Tensor:
        return torch.bincount(layer_of("bf16", skew, 4000).logits.argmax(1), minlength=16)

    assert (counts("one-expert") > 0).sum() == 1
    assert counts("uniform").max() < 400
    ranks = counts("zipf").float()
    assert ranks[0] / ranks[7] == pytest.approx(8, rel=0.4)


def test_copies_are_elsewhere() -> None:
    weights = make_weights(SMALL, "fp8", "cpu")
    copy = weights.copy()
    assert copy.scales is not None and weights.scales is not None
    for own, other in ((weights.w13, copy.w13), (weights.w2, copy.w2), (weights.scales[0], copy.scales[0])):
        assert own.data_ptr() != other.data_ptr() and torch.equal(own.view(torch.uint8), other.view(torch.uint8))


def test_absent_peers_are_named() -> None:
    there, absent = contenders.available()
    assert "torch" in there
    assert set(there) | set(absent) == set(contenders.PEERS)
    assert all(reason for reason in absent.values())


def test_a_library_without_kernels_is_refused(built: CMakeBuild) -> None:
    with pytest.raises(ValueError, match="built without nvcc"):
        Library(built.directory / "plugins/native/libshuntyard_plugins.so")


def test_what_is_refused_says_why(library: Library) -> None:
    layer = layer_of("bf16", "uniform")
    with pytest.raises(RuntimeError, match="shuntyard_moe_experts: "):
        ours(library, layer, tactic=-5)()
