"""Names, registrations and bodies of the private ops."""

from __future__ import annotations

from typing import Any

import onnx
import onnx_ir as ir
import pytest
import torch

from shuntyard.plugins import contract, functions, torch_ops

BODIES = {function.name: function for function in functions.all_functions(3)}


def torch_op(op: contract.Op) -> Any:
    namespace, name = op.torch_name.split("::")
    return getattr(getattr(torch.ops, namespace), name).default


def samples(op: contract.Op) -> tuple[Any, ...]:
    logits = torch.randn(6, 4)
    scores, offsets, permutation = torch_ops.moe_routing(logits, 2)
    cache, new = torch.zeros(2, 2, 8, 4), torch.randn(2, 2, 3, 4)
    return {
        contract.ROUTING.name: (logits, 2),
        contract.EXPERTS.name: (
            torch.randn(6, 8), scores, offsets, permutation, torch.randn(4, 8, 6), torch.randn(4, 3, 8), 2,
        ),
        contract.SCATTER_ADD.name: (torch.randn(6, 8), torch.randn(12, 8), permutation, 2),
        contract.CACHED_ATTENTION.name: (
            torch.randn(2, 4, 3, 4), new, new.clone(), cache, cache.clone(), torch.tensor([[0, 1, 2], [5, 6, 7]]), 0.5,
        ),
    }[op.name]  # fmt: skip


@pytest.mark.parametrize("op", contract.OPS, ids=lambda op: op.name)
def test_torch_op_has_the_contracts_signature(op: contract.Op) -> None:
    schema = torch_op(op)._schema
    assert [argument.name for argument in schema.arguments] == [*op.inputs, *op.attributes]
    assert len(schema.returns) == len(op.outputs)
    assert not schema.is_mutable


@pytest.mark.parametrize("op", contract.OPS, ids=lambda op: op.name)
def test_torch_op_passes_opcheck(op: contract.Op) -> None:
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch_op(op), samples(op), test_utils=tests)


@pytest.mark.parametrize("op", contract.OPS, ids=lambda op: op.name)
def test_body_has_the_contracts_signature(op: contract.Op) -> None:
    body = BODIES[op.name]
    assert body.domain == contract.DOMAIN
    assert tuple(value.name for value in body.inputs) == op.inputs
    assert tuple(value.name for value in body.outputs) == op.outputs
    assert tuple(body.attributes) == op.attributes


@pytest.mark.parametrize("op", contract.OPS, ids=lambda op: op.name)
def test_body_is_of_standard_ops_only(op: contract.Op) -> None:
    proto = ir.to_proto(BODIES[op.name])
    assert {node.domain for node in proto.node} == {""}
    for node in proto.node:
        assert onnx.defs.get_schema(node.op_type, functions.OPSET).since_version <= functions.OPSET
    assert [(o.domain, o.version) for o in proto.opset_import] == [("", functions.OPSET)]
    context = onnx.checker.C.CheckerContext()
    context.ir_version = 11
    context.opset_imports = {"": functions.OPSET}
    onnx.checker.check_function(proto, context)


def test_every_op_has_a_body_and_a_name_of_its_own() -> None:
    assert set(BODIES) == {op.name for op in contract.OPS}
    assert len({op.torch_name for op in contract.OPS}) == len(contract.OPS)
    assert contract.ROUTING.torch_name == "shuntyard::moe_routing"
    assert contract.OPS[:3] == contract.PLUGINS
