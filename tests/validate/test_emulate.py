"""A recipe that is emulated in memory is the recipe that export writes, to the bit; and the graph computes the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shuntyard.errors import CheckpointError, UnsupportedError
from shuntyard.exporter.export import export
from shuntyard.exporter.modules import Module, modules
from shuntyard.exporter.quantise import quantise_matrix
from shuntyard.exporter.recipe import Precision, Resolved, parse_recipe, read_recipe, resolve
from shuntyard.exporter.rewrite_request import Quantize
from shuntyard.validate import emulate
from shuntyard.validate.dequantise import dequantised_state
from shuntyard.validate.eager import EagerStack
from shuntyard.validate.emulate import DECLARED, EmulatedStack, Emulation, Preparer
from shuntyard.validate.graph import GraphStack
from shuntyard.validate.matrices import Matrix, Numbers, quantised
from shuntyard.validate.stack import Stack
from shuntyard.validate.values import Array, Tokens
from tests.checkpoints import parsed, random_weights, raw_config, write_checkpoint
from tests.exporter.handmade import CHANNEL, PLAIN, TENSOR, Way, declare_compressed_tensors, handmade

RAW = raw_config(hidden_size=32, intermediate_size=64, intermediate_size_mlp=96, head_dim=16)
CONFIG = parsed(RAW)
TOKENS: list[Tokens] = [np.random.default_rng(1).integers(0, RAW["vocab_size"], n) for n in (19, 7)]

RULES = {
    "int4": '[[rule]]\nmodules = "*"\nweights = "int4"\ngroup_size = 16',
    "tensor": '[[rule]]\nmodules = "*"\nweights = "fp8"\ngranularity = "tensor"',
    "channel": '[[rule]]\nmodules = "*"\nweights = "fp8"',
    "dynamic": '[[rule]]\nmodules = "*"\nweights = "fp8"\nactivations = "fp8-dynamic"',
    "mixed": """
[[rule]]
modules = "model.layers.first.*"
weights = "fp32"
[[rule]]
modules = "*.experts"
weights = "int4"
group_size = 32
[[rule]]
modules = "*.self_attn.*"
weights = "fp8"
activations = "fp8-dynamic"
granularity = "tensor"
[[rule]]
modules = "*.shared_expert.*"
weights = "fp16"
[[rule]]
modules = "*"
weights = "bf16"
""",
}


class Halves:
    """Scales that a calibration could have given; each module's is its own."""

    def scale(self, module: str) -> float:
        return (1 + len(module) % 7) / 128

    def cache_scale(self, attention: str, part: str) -> float:
        return 1 / 64 if part == "keys" else 1 / 128


def recipe(text: str) -> Resolved:
    return resolve(parse_recipe(text.encode(), "r", "r.toml"), CONFIG)


def logits(stack: Stack) -> list[Array]:
    hidden = list(stack.embed(TOKENS))
    for i in range(stack.config.num_hidden_layers):
        hidden = [values.hidden for values in stack.layer(i, hidden)]
    return list(stack.head(hidden))


def relative(ours: list[Array], theirs: list[Array]) -> float:
    pairs = zip(ours, theirs, strict=True)
    return max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in pairs)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    weights = random_weights(CONFIG, seed=3, dtype=torch.bfloat16)
    return write_checkpoint(tmp_path_factory.mktemp("plain") / "checkpoint", RAW, weights, shards=2)


@settings(max_examples=60)
@given(
    st.integers(1, 6),
    st.sampled_from([8, 16, 32, 48]),
    st.sampled_from(["tensor", "channel", "group"]),
    st.sampled_from([1e-30, 1e-3, 1.0, 1e30]),
    st.integers(0, 2**32 - 1),
)
def test_numbers_are_those_of_the_definition(rows: int, columns: int, form: str, size: float, seed: int) -> None:
    w = (np.random.default_rng(seed).standard_normal((rows, columns)) * size).astype(np.float32)
    w[0] *= seed % 2  # a row of zeros
    group = 8 if form == "group" else 0
    codes, scale = quantise_matrix(w, Quantize(form, group, ""))  # type: ignore[arg-type]
    ours = quantised(torch.from_numpy(w), Precision("int4" if group else "fp8", form, "none", group))
    assert ours.scale is not None
    assert ours.numbers.view(torch.uint8).numpy().tobytes() == codes.tobytes()
    assert ours.scale.view(torch.uint8).numpy().tobytes() == scale.tobytes()
    largest = np.abs(w).max(axis=None if form == "tensor" else 1, keepdims=True)
    # Half a step of three bits, or of the smallest numbers; INT4 may cut its largest values off, from 7 / 10 on.
    bound = 0.31 * largest if group else np.maximum(np.abs(w) / 16, largest / 448 / 2**10) * 1.001
    assert (np.abs(ours.value().numpy() - w) <= bound).all()


def test_a_plain_checkpoint_as_it_is_stored_is_the_eager_model(plain: Path) -> None:
    for dtype in ("fp32", "bf16"):
        ours, eager = logits(EmulatedStack.as_declared(plain, dtype)), logits(EagerStack(plain, dtype))
        assert relative(ours, eager) <= (1e-5 if dtype == "fp32" else 0.05)


@pytest.mark.parametrize("name", RULES)
def test_the_same_as_what_export_writes(name: str, plain: Path, tmp_path: Path) -> None:
    """Emulated on the source, and read from the files that carry the recipe out: bit for bit, twice, and as a graph."""
    resolved = recipe(RULES[name])
    export(plain, tmp_path / "model", recipe=resolved.recipe)
    emulated = logits(EmulatedStack.of_recipe(plain, resolved))
    products = {n: p.weights for n, p in resolved.precision.items() if p.weights in ("fp16",)}
    written = logits(EmulatedStack.as_declared(tmp_path / "model", products=products))
    for ours, theirs in zip(emulated, written, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert relative(emulated, logits(EmulatedStack.of_recipe(plain, resolve(read_recipe("bf16"), CONFIG)))) > 1e-3
    graph = GraphStack(tmp_path / "model" / "model.onnx", "fp32", optimise=False)
    assert furthest_layer(EmulatedStack.of_recipe(plain, resolved), graph) <= (1e-3 if "fp16" in RULES[name] else 1e-6)


def furthest_layer(stack: Stack, other: Stack) -> float:
    """The largest relative error of a layer's update, both fed the first one's input."""
    hidden, found = list(stack.embed(TOKENS)), []
    for i in range(stack.config.num_hidden_layers):
        ours = list(stack.layer(i, hidden))
        for before, a, b in zip(hidden, ours, other.layer(i, hidden), strict=True):
            found.append(np.linalg.norm(a.hidden - b.hidden) / np.linalg.norm(b.hidden - before))
        hidden = [values.hidden for values in ours]
    return float(max(found))


def test_weights_alone_are_the_dequantised_model(plain: Path, tmp_path: Path) -> None:
    """Without activations there is nothing to round: the eager model on dequantised values says the same."""
    resolved = recipe(RULES["int4"])
    export(plain, tmp_path / "model", recipe=resolved.recipe)
    assert relative(logits(EmulatedStack.of_recipe(plain, resolved)), logits(EagerStack(tmp_path / "model"))) <= 1e-5


@pytest.mark.parametrize("way", [CHANNEL, TENSOR, Way("group", 16, torch.bfloat16), PLAIN], ids=str)
@pytest.mark.parametrize("layout", ["linear", "fused"])
def test_values_of_quantised_files(way: Way, layout: str, tmp_path: Path) -> None:
    if layout == "fused" and way.form in ("channel", "group"):
        pytest.skip("fused experts come plain or with one scale")
    weights = random_weights(CONFIG, dtype=torch.bfloat16)
    made = handmade(RAW, weights, lambda module: PLAIN if "router" in module else way, lambda layer: layout)
    declared = made if way is PLAIN else declare_compressed_tensors(made)
    numbers = Numbers(declared.write(tmp_path / "checkpoint"))
    state = dequantised_state(tmp_path / "checkpoint")
    for module in modules(CONFIG):
        found = [matrix.value() for matrix in numbers.matrices(module)]
        assert [tuple(value.shape) for value in found] == [s for s in module.shapes for _ in range(module.copies)]
        if module.kind != "experts":
            assert torch.equal(found[0], state[f"{module.name}.weight"])
            continue
        count, both = module.copies, state[f"{module.name}.gate_up_proj"]
        for e in range(count):
            assert torch.equal(torch.cat([found[e], found[count + e]]), both[e].T)
            assert torch.equal(found[2 * count + e], state[f"{module.name}.down_proj"][e].T)


def test_what_is_stored_as_asked_keeps_its_numbers(tmp_path: Path) -> None:
    """A scale is not made anew: the largest code of these is not 448."""
    weights = random_weights(CONFIG, dtype=torch.bfloat16)
    made = handmade(RAW, weights, lambda module: PLAIN if "router" in module else CHANNEL)
    preparer = Preparer(Numbers(declare_compressed_tensors(made).write(tmp_path / "checkpoint")))
    name = "model.layers.0.self_attn.q_proj"
    stored = preparer.product(name, Precision())
    assert torch.equal(preparer.product(name, Precision("fp8", "channel")), stored)
    assert not torch.equal(preparer.product(name, Precision("fp8", "tensor")), stored)


def test_static_scales_come_from_the_file_else_from_the_calibration(plain: Path) -> None:
    rule = '[[rule]]\nmodules = "*"\nweights = "fp8"\nactivations = "fp8-static"\n'
    resolved = recipe(rule)
    with pytest.raises(UnsupportedError, match=r"needs a scale, and there is no calibration"):
        logits(EmulatedStack.of_recipe(plain, resolved))
    coarse = logits(EmulatedStack.of_recipe(plain, resolved, Halves()))
    x = torch.randn(5, 32)
    name = "model.layers.0.self_attn.q_proj"
    numbers = Numbers(plain)
    product = Preparer(numbers, "fp32", Halves()).product(name, resolved.precision[name])
    scale = Halves().scale(name)
    codes = (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).double()
    matrix = quantised(numbers.matrices(numbers_module(name))[0].value(), Precision("fp8", "channel"))
    expected = codes @ matrix.value().double().T * scale
    assert torch.allclose(product(x).double(), expected, rtol=1e-5, atol=1e-5)
    assert all(np.isfinite(one).all() for one in coarse)


def numbers_module(name: str) -> Module:
    return next(module for module in modules(CONFIG) if module.name == name)


def test_an_fp8_cache_rounds_keys_and_values_alone(plain: Path) -> None:
    rule = '[[rule]]\nmodules = "model.layers.*.self_attn"\nkv_cache = "fp8"\n[[rule]]\nmodules = "*"\nweights = "bf16"'
    stack = EmulatedStack.of_recipe(plain, recipe(rule), Halves())
    exact = EmulatedStack.of_recipe(plain, recipe('[[rule]]\nmodules = "*"\nweights = "bf16"'))
    hidden = list(exact.embed(TOKENS))
    for ours, theirs in zip(stack.layer(0, hidden), exact.layer(0, hidden), strict=True):
        for part, scale in (("key", 1 / 64), ("value", 1 / 128)):
            expected = torch.from_numpy(getattr(theirs, part) / np.float32(scale)).clamp(-448, 448)
            assert np.array_equal(getattr(ours, part), expected.to(torch.float8_e4m3fn).float().numpy() * scale)
        np.testing.assert_array_equal(ours.attention_input, theirs.attention_input)
        assert not np.array_equal(ours.attention, theirs.attention)


def test_values_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    weights = random_weights(CONFIG)
    weights["model.layers.1.feed_forward.experts.down_proj"][2, 3, 4] = torch.nan
    numbers = Numbers(write_checkpoint(tmp_path / "checkpoint", RAW, weights))
    experts = next(module for module in modules(CONFIG) if module.name == "model.layers.1.feed_forward.experts")
    with pytest.raises(CheckpointError, match=r"experts.down_proj' holds values that are not finite"):
        numbers.matrices(experts)


def test_keys_tell_layers_apart(plain: Path) -> None:
    preparer = Preparer(Numbers(plain))
    fp8 = Precision("fp8", "channel")
    one = Emulation(preparer, {"model.layers.1.self_attn.q_proj": fp8})
    assert one.key(1) != Emulation(preparer, {}).key(1) and one.key(0) == Emulation(preparer, {}).key(0)
    assert Emulation(preparer, {}, {"model.layers.2.self_attn": "fp8"}).key(2) != one.key(2)
    assert Emulation(preparer, {"lm_head": DECLARED}).key(None) != one.key(None)


def test_as_many_modules_are_kept_as_fit(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"model.layers.{i}.self_attn.{part}_proj" for i in range(4) for part in ("q", "o")]
    preparer = Preparer(Numbers(plain))
    bytes_of = 4 * preparer.modules[names[0]].values
    monkeypatch.setattr(emulate, "KEPT_BYTES", 2 * bytes_of)
    made = [preparer.product(name, Precision()) for name in names]
    assert [preparer.product(name, Precision()) is own for name, own in zip(names[-2:], made[-2:], strict=True)] == [
        True,
        True,
    ]
    again = preparer.product(names[0], Precision())
    assert again is not made[0] and torch.equal(again, made[0])
    monkeypatch.setattr(emulate, "KEPT_BYTES", 0)
    for name, own in zip(names, made, strict=True):
        assert torch.equal(preparer.product(name, Precision()), own)


def test_a_matrix_is_its_numbers_times_its_scale() -> None:
    packed = torch.tensor(
        [[0x76543210], [0x0FEDCBA9 - 2**32 if 0x0FEDCBA9 >= 2**31 else 0x0FEDCBA9]], dtype=torch.int32
    )
    value = Matrix(packed, torch.tensor([[2.0], [1.0]]), 8).value()
    assert value[0].tolist() == [2.0 * (i - 8) for i in range(8)]
    assert value[1].tolist() == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, -8.0]
