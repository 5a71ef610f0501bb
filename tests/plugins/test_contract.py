"""Names, registrations and bodies of the private ops."""

from __future__ import annotations

from typing import Any

import onnx
import onnx_ir as ir
import pytest
import torch

from shuntyard.plugins import contract, functions, torch_ops
from shuntyard.plugins.contract import ExpertsForm
from tests.plugins.forms import EVERY_KIND, form_of

FORMS = [form_of(kind, 3) for kind in EVERY_KIND]
BODIES = functions.all_functions(FORMS, functions.DEQUANTIZE_FORMS, contract.QUANTIZE_FORMS)
OPS = {op.name: op for op in contract.OPS}


def torch_op(op: contract.Op) -> Any:
    namespace, name = op.torch_name.split("::")
    return getattr(getattr(torch.ops, namespace), name).default


def samples(op: contract.Op) -> list[tuple[Any, ...]]:
    logits = torch.randn(6, 4)
    scores, offsets, permutation = torch_ops.moe_routing(logits, 2)
    routed = (torch.randn(6, 8), scores, offsets, permutation)
    cache, new = torch.zeros(2, 2, 8, 4), torch.randn(2, 2, 3, 4)
    packed, one_a_group = (torch.randint(-(2**31), 2**31, (8, 1), dtype=torch.int32), torch.rand(8, 2))
    every: dict[str, list[tuple[Any, ...]]] = {
        contract.ROUTING.name: [(logits, 2)],
        contract.EXPERTS.name: [
            (*routed, [torch.randn(4, 8, 6), torch.randn(4, 3, 8)], [], [], 2, 4, "fused", 0, "none"),
            (
                *routed,
                [packed.clone() for _ in range(12)],
                [one_a_group.clone() for _ in range(12)],
                *([], 2, 4, "linear", 4, "none"),
            ),
        ],
        contract.SCATTER_ADD.name: [(torch.randn(6, 8), torch.randn(12, 8), permutation, 2)],
        contract.CACHED_ATTENTION.name: [
            (torch.randn(2, 4, 3, 4), new, new.clone(), cache, cache.clone(), torch.tensor([[0, 1, 2], [5, 6, 7]]), 0.5)
        ],
        # opcheck cannot compare FP8 tensors, so INT4.
        contract.DEQUANTIZE.name: [(packed, one_a_group, 4)],
        contract.QUANTIZE.name: [(torch.randn(6, 8), None), (torch.randn(2, 3, 8).bfloat16(), torch.rand(1))],
    }
    return every[op.name]


@pytest.mark.parametrize("op", contract.OPS, ids=lambda op: op.name)
def test_torch_op_has_the_contracts_signature(op: contract.Op) -> None:
    schema = torch_op(op)._schema
    assert [argument.name for argument in schema.arguments] == [*op.inputs, *op.optional, *op.variadic, *op.attributes]
    assert len(schema.returns) == len(op.outputs)
    assert not schema.is_mutable


@pytest.mark.parametrize("op", contract.OPS, ids=lambda op: op.name)
def test_torch_op_passes_opcheck(op: contract.Op) -> None:
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    for sample in samples(op):
        torch.library.opcheck(torch_op(op), sample, test_utils=tests)


def body_id(body: ir.Function) -> str:
    return f"{body.name}:{body.overload}"


@pytest.mark.parametrize("body", BODIES, ids=body_id)
def test_body_has_the_contracts_signature(body: ir.Function) -> None:
    op = OPS[body.name]
    assert body.domain == contract.DOMAIN
    names = tuple(str(value.name) for value in body.inputs)
    assert names[: len(op.inputs)] == op.inputs
    if op.variadic:
        assert len(names) > len(op.inputs)
    else:
        assert names[len(op.inputs) :] in ((), op.optional)
    assert len(set(names)) == len(names)
    assert tuple(value.name for value in body.outputs) == op.outputs
    assert tuple(body.attributes) == op.attributes
    kinds = {int: ir.AttributeType.INT, float: ir.AttributeType.FLOAT, str: ir.AttributeType.STRING}
    for name, attribute in body.attributes.items():
        assert attribute.type == kinds[contract.ATTRIBUTE_KINDS.get(name, int)]


@pytest.mark.parametrize("body", BODIES, ids=body_id)
def test_body_is_of_standard_ops_only(body: ir.Function) -> None:
    proto = ir.to_proto(body)
    assert {node.domain for node in proto.node} == {""}
    for node in proto.node:
        assert onnx.defs.get_schema(node.op_type, functions.OPSET).since_version <= functions.OPSET
    assert [(o.domain, o.version) for o in proto.opset_import] == [("", functions.OPSET)]
    context = onnx.checker.C.CheckerContext()
    context.ir_version = 11
    context.opset_imports = {"": functions.OPSET}
    onnx.checker.check_function(proto, context)


def test_every_op_has_a_body_and_a_name_of_its_own() -> None:
    assert {body.name for body in BODIES} == OPS.keys()
    assert len({body.identifier() for body in BODIES}) == len(BODIES)
    assert len({op.torch_name for op in contract.OPS}) == len(contract.OPS)
    assert contract.ROUTING.torch_name == "shuntyard::moe_routing"
    assert contract.OPS[:3] == contract.PLUGINS


def test_a_model_has_the_functions_that_it_uses() -> None:
    def names(*arguments: Any) -> list[str]:
        return [body_id(body).removeprefix("Shuntyard") for body in functions.all_functions(*arguments)]

    moe = ["MoeRouting:", "MoeExperts:", "MoeScatterAdd:", "CachedAttention:"]
    assert names([]) == ["CachedAttention:"]
    assert names([ExpertsForm(5)]) == names([ExpertsForm(5)] * 2) == moe
    assert names([], ["tensor", "channel", "tensor"]) == ["CachedAttention:", "Dequantize:channel", "Dequantize:tensor"]
    assert names([], [], ["static", "dynamic", "static"])[1:] == ["Quantize:dynamic", "Quantize:static"]
    assert names([ExpertsForm(5), ExpertsForm(5, "linear", "group", 64)])[1:3] == [
        "MoeExperts:",
        "MoeExperts:linear_5_group64",
    ]


def test_overloads_are_those_of_the_nodes() -> None:
    for form in FORMS:
        (body,) = (b for b in functions.all_functions([form]) if b.name == contract.EXPERTS.name)
        assert body.overload == functions.experts_overload(*form)
        assert (body.overload == "") == (form.layout == "fused" and form.quantization == "none")
    assert functions.experts_overload(128, "split", "none", 0) == "split_128"
    assert functions.experts_overload(16, "fused", "channel", 0) == "fused_16_channel"
    assert functions.experts_overload(16, "fused", "channel", 0, "dynamic") == "fused_16_channel_dynamic"
    assert functions.experts_overload(16, "linear", "tensor", 0, "static") == "linear_16_tensor_static"
    assert len({form.overload for form in FORMS}) == len(FORMS)
    with pytest.raises(ValueError, match="the experts of one model come in the forms ExpertsForm.experts=3"):
        functions.all_functions([ExpertsForm(3), ExpertsForm(4)])


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ((0, "fused", "none", 0), "experts is 0"),
        ((2, "stacked", "none", 0), "layout is 'stacked'"),
        ((2, "linear", "fp4", 0), "quantization is 'fp4'"),
        ((2, "fused", "group", 32), "INT4 weights come in layout 'linear' only"),
        ((2, "linear", "group", 0), "group_size is 0 with quantization 'group'"),
        ((2, "linear", "channel", 32), "group_size is 32 with quantization 'channel'"),
        ((2, "linear", "channel", 0, "each"), "activations is 'each', must be one of none, static, dynamic"),
        ((2, "linear", "none", 0, "static"), "activations is 'static' with quantization 'none': only FP8"),
        ((2, "linear", "group", 8, "dynamic"), "activations is 'dynamic' with quantization 'group': only FP8"),
    ],
)
def test_forms_that_are_not(form: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        functions.moe_experts(*form)
    with pytest.raises(ValueError, match="form is 'row', must be one of tensor, channel, group"):
        functions.dequantize("row")
    with pytest.raises(ValueError, match="form is 'none', must be one of static, dynamic"):
        functions.quantize("none")
