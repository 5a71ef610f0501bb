"""``plan`` against engines that TensorRT-RTX has built: the size of plans, and the tensors of their layer dumps."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

import pytest

from shuntyard.engines import lower
from shuntyard.engines.build import Request, build
from shuntyard.engines.plan.activations import Call, live_sets, workspace
from shuntyard.engines.plan.answer import PLAN_BYTES, PLAN_BYTES_PER_LAYER
from shuntyard.engines.plan.budget import Model, read_model
from shuntyard.exporter.export import export

pytest.importorskip("tensorrt_rtx", reason="needs the package tensorrt-rtx")

ITEM = {"BFloat16": 2, "Float": 4, "Int32": 4, "Int64": 8, "Bool": 1, "UInt8": 1}
_TENSOR = re.compile(r"Name: ([^,]*), Dimensions: \[([^\]]*)\].*?Datatype: (\w+)")

BOUND = ("present.", "input_ids", "position_ids", "logits_indices", "logits")
"""Inputs and outputs: the caller holds them."""

MINIATURE = Path(__file__).parents[2] / "examples" / "miniature"

BATCH, TOKENS, CONTEXT = 2, 64, 128


@dataclass(frozen=True)
class Built:
    """An engine of the miniature for fixed shapes: its layer dump says how large each tensor is."""

    model: Model
    plan_bytes: int
    log: str


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    folder = tmp_path_factory.mktemp("plan")
    export(MINIATURE, folder / "model")
    real = lower.fix_dimensions
    fixed = {"batch": BATCH, "sequence": TOKENS, "outputs": TOKENS}
    request = Request("tensorrt-rtx", "bf16", "sm89", max_batch=BATCH, max_context=CONTEXT, max_tokens=TOKENS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lower, "fix_dimensions", lambda model, sizes: real(model, sizes | fixed))
        build(folder / "model", folder / "engine", request)
    log = (folder / "engine" / "build.log").read_text()
    return Built(read_model(MINIATURE), (folder / "engine" / "engine.plan").stat().st_size, log)


def test_a_plan_is_its_weights_and_kernels(built: Built) -> None:
    """6.96 MB of weights and 7.3 MB of kernels."""
    kernels = built.plan_bytes - built.model.held("stored").total
    assert kernels == pytest.approx(PLAN_BYTES + 8 * PLAN_BYTES_PER_LAYER, rel=0.2)


def live_sizes(log: str) -> list[tuple[str, int]]:
    """Each layer of a dump with fixed shapes, and the bytes alive there: from a tensor's first layer to its last."""
    size: dict[str, int] = {}
    span: dict[str, tuple[int, int]] = {}
    lines = [line for line in log.splitlines() if line.startswith("Name: ") and ", LayerType: " in line]
    for i, line in enumerate(lines):
        inputs = line[line.index("Inputs: [") : line.index(", Constants: [")]
        outputs = line[line.index(", Outputs: [") : line.index(", TacticName: ")]
        for name, dims, dtype in _TENSOR.findall(inputs + outputs):
            if not name.startswith(BOUND):
                nbytes = math.prod(int(n) for n in dims.split(",")) * ITEM[dtype]
                size[name] = max(size.get(name, 0), nbytes)
                span[name] = (span.get(name, (i, i))[0], i)
    alive = (sum(size[name] for name, (first, last) in span.items() if first <= i <= last) for i in range(len(lines)))
    return [(line, nbytes) for line, nbytes in zip(lines, alive, strict=True)]


STAGES = {
    "attention of a RoPE layer": r"Name: (_gemm_mha|__myl_(?!.*Silu)).*\(Llama4Rope",
    "attention of a NoPE layer": r"Name: (_gemm_mha|__myl_(?!.*Silu)).*\(Llama4Nope",
    "dense FFN": r"Name: (feed_forward\.up_proj|__myl_ReshReshSiluMul)",
    "routing": r"Name: feed_forward\.router",
    "routed experts": r"Name: ShuntyardMoeExperts",
    "shared expert": r"Name: (feed_forward\.shared_expert\.up_proj|__myl_SiluMul)",
    "coupling": r"Name: ShuntyardMoeScatterAdd",
    "head": r"Name: (lm_head|__myl_Cast_)",
}
"""Layers of the dump that belong to a stage."""


def test_activations_are_those_of_the_layer_dump(built: Built) -> None:
    """The estimate of each stage covers what the plan has alive there, and not by much."""
    config = built.model.config
    alive = live_sizes(built.log)
    for live in live_sets(config, Call(BATCH, TOKENS, CONTEXT)):
        ours = live.nbytes - next(term.nbytes for term in live.terms if term.name == "logits")
        theirs = max(nbytes for line, nbytes in alive if re.search(STAGES[live.stage], line))
        assert theirs <= ours <= 1.2 * theirs, live.stage


def test_the_experts_workspace_is_the_plugins(built: Built) -> None:
    found = re.findall(r"ShuntyardMoeExperts\w*_wksp[^,]*, Dimensions: \[(\d+)\][^}]*Datatype: UInt8", built.log)
    config = built.model.config
    rows = workspace(BATCH * TOKENS, config.num_experts_per_tok, config.hidden_size, config.intermediate_size)
    assert {int(n) for n in found} == {rows}
