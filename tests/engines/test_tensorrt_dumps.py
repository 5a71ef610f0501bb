"""What TensorRT-RTX says of a plan, edited: a log that tells of something else, or of less, is refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from shuntyard.engines import layer_table, lower, proof
from shuntyard.engines.build import Opened, Request, build, open_model
from shuntyard.errors import EngineError
from shuntyard.exporter.export import export
from shuntyard.exporter.recipe import parse_recipe

pytest.importorskip("tensorrt_rtx", reason="needs the package tensorrt-rtx")

MINIATURE = Path(__file__).parents[2] / "examples" / "miniature"
RECIPE = b"""
[[rule]]
modules = ["*.o_proj", "*.1.feed_forward.experts"]
weights = "fp16"
[[rule]]
modules = ["*.q_proj", "*.k_proj", "*.v_proj", "*.feed_forward.experts"]
weights = "fp8"
activations = "fp8-dynamic"
[[rule]]
modules = "*.up_proj"
weights = "int4"
group_size = 32
[[rule]]
modules = "*"
weights = "bf16"
"""


class Built(NamedTuple):
    """A model, what it asks for, and the builder's log."""

    opened: Opened
    asked: dict[str, proof.Asked]
    log: str

    def hold(self, log: str) -> list[layer_table.Layer]:
        """As a build does."""
        graph = self.opened.model.graph
        names = ([str(value.name) for value in own] for own in (graph.inputs, graph.outputs))
        layers = layer_table.parse_tensorrt_log(log, *names)
        proof.check_plugins(layers, proof.expected_plugins(self.opened.model))
        proof.check_precision(layers, self.asked, "bf16")
        return layers


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    folder = tmp_path_factory.mktemp("dumps")
    export(MINIATURE, folder / "model", recipe=parse_recipe(RECIPE, "own", "own.toml"))
    build(
        folder / "model", folder / "engine", Request(backend="tensorrt-rtx", gpu="sm89", dtype="bf16", max_context=256)
    )
    opened = open_model(folder / "model")
    lower.for_tensorrt(opened.model, "bf16", context=256, chunk=opened.config.attention_chunk_size)
    asked = proof.expected_precision(opened.model, "bf16", opened.manifest.precision)
    return Built(opened, asked, (folder / "engine" / "build.log").read_text())


def is_layer(line: str) -> bool:
    return line.startswith("Name: ") and ", LayerType: " in line


def edited(log: str, where: str, edit: Callable[[str], list[str]]) -> str:
    """The first line of a layer that ``where`` is found in, replaced; the layers numbered anew."""
    lines, done, number = [], False, 0
    for line in log.splitlines():
        new = [line]
        if is_layer(line) and not done and re.search(where, line):
            done, new = True, edit(line)
        for own in new:
            if is_layer(own):
                own = re.sub(r"_myl0_\d+, LayerType", f"_myl0_{number}, LayerType", own, count=1)
                number += 1
            lines.append(own)
    assert done, where
    return "\n".join(lines)


def types(part: str, old: str, new: str) -> Callable[[str], list[str]]:
    """The first ``old`` among the Inputs, Constants or Outputs becomes ``new``."""

    def edit(line: str) -> list[str]:
        start = line.index(f"{part}: [")
        changed = line[start:].replace(f"Datatype: {old}", f"Datatype: {new}", 1)
        assert changed != line[start:]
        return [line[:start] + changed]

    return edit


def kind(old: str, new: str) -> Callable[[str], list[str]]:
    return lambda line: [line.replace(f"LayerType: {old}", f"LayerType: {new}")]


def second(**changes: str) -> Callable[[str], list[str]]:
    """The layer, and it once more with words replaced."""

    def edit(line: str) -> list[str]:
        other = line
        for old, new in changes.items():
            other = other.replace(old, new)
        return [line, other]

    return edit


HEAD, Q_PROJ, O_PROJ = "^Name: lm_head", "gemm.*self_attn.q_proj", "runtime_fusion.*self_attn.o_proj"
FIRST_EXPERTS, OTHER_EXPERTS = (rf"^Name: ShuntyardMoeExperts.*model\.layers\.{i} " for i in (1, 3))
NORM = r"LayerType: kgen.*Constants: \[ \{[^]]*\].*BFloat16.*ONNX Layer: node_mean \|"
EDITS: dict[str, tuple[str, Callable[[str], list[str]], str]] = {
    "weights int8": (HEAD, types("Constants", "BFloat16", "Int8"), "a type that is not known: Int8"),
    "weights fp4": (HEAD, types("Constants", "BFloat16", "FP4"), "a type that is not known: FP4"),
    "weights uint8": (HEAD, types("Constants", "BFloat16", "UInt8"), "lm_head was to compute in bf16"),
    "x uint8": (HEAD, types("Inputs", "BFloat16", "UInt8"), "lm_head was to compute in bf16"),
    "fused weights bf16": (O_PROJ, types("Constants", "Half", "BFloat16"), "o_proj was to compute in fp16"),
    "fused weights uint8": (O_PROJ, types("Constants", "Half", "UInt8"), "o_proj was to compute in fp16"),
    "fused x bf16": (O_PROJ, types("Inputs", "Half", "BFloat16"), "shows that it computes .*o_proj in fp16"),
    "unknown kind": (HEAD, kind("gemm", "conv"), "a kind of layer that is not known: conv, of 'lm_head"),
    "twice": (Q_PROJ, second(), "2 layers of the plan compute .*_proj"),
    "twice, fused": (Q_PROJ, second(gemm="kgen"), "2 layers of the plan compute .*_proj"),
    "twice, in bf16": (Q_PROJ, second(gemm="kgen", FP8="BFloat16"), "_proj was to compute in fp8"),
    "head twice": (HEAD, second(gemm="runtime_fusion"), "2 layers of the plan compute lm_head"),
    "experts' rows": (FIRST_EXPERTS, types("Outputs", "Half", "BFloat16"), "1.ShuntyardMoeExperts was to"),
    "experts' weights": (FIRST_EXPERTS, types("Constants", "Half", "UInt8"), "1.ShuntyardMoeExperts was to"),
    "experts' fp8 weights": (OTHER_EXPERTS, types("Constants", "FP8", "BFloat16"), "3.ShuntyardMoeExperts was to"),
    "experts' scales": (OTHER_EXPERTS, types("Constants", "Float", "UInt8"), "3.ShuntyardMoeExperts was to"),
    "norm's weights": (NORM, types("Constants", "BFloat16", "UInt8"), "computes in uint8, which nobody asked for"),
    "norm's numbers": (NORM, types("Inputs", "BFloat16", "UInt8"), "uint8"),
    "no dimensions": (HEAD, lambda line: [re.sub(r"Dimensions: \S+ ", "", line, count=1)], "a tensor in an unknown"),
    "scaling lost": (r"kgen.*q_proj\.scale", lambda line: [], "lines missing: no layer writes"),
}


def test_the_log_itself_passes(built: Built) -> None:
    layers = built.hold(built.log)
    assert len(layers) == sum(map(is_layer, built.log.splitlines()))
    assert {layer.kind for layer in layers} >= {"gemm", "kgen", "runtime_fusion", "custom_layer"}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_log_is_refused(edit: str, built: Built) -> None:
    where, change, said = EDITS[edit]
    with pytest.raises(EngineError, match=said):
        built.hold(edited(built.log, where, change))


def test_no_line_can_be_missing(built: Built) -> None:
    """Each by its number; and the last, which leaves no gap, by what it writes."""
    lines = [line for line in built.log.splitlines() if is_layer(line)]
    for line in lines:
        with pytest.raises(EngineError, match="layer dump has lines missing"):
            built.hold(built.log.replace(f"{line}\n", "", 1))
    with pytest.raises(EngineError, match="no layer writes the network's 'logits'"):
        built.hold(built.log.replace(f"{lines[-1]}\n", "", 1))


def test_weights_may_be_prepared_by_another_layer(built: Built) -> None:
    """TensorRT-RTX 1.7 dequantises INT4 ahead of the product: what it is given then is no constant, but as good."""
    layers = built.hold(built.log)
    products = [layer for layer in layers if any(origin.endswith(".up_proj") for origin in layer.origins)]
    prepared = [layer for layer in products if layer.inputs and "int4" not in layer.constants]
    assert prepared and all("bf16" in layer.matrices and "bf16" not in layer.constants for layer in prepared)
