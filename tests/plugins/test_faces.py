"""The faces of each private op agree: numpy oracle, torch op, ONNX function body in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from shuntyard.plugins import contract, functions, torch_ops
from shuntyard.plugins import oracle as typed_oracle
from tests.driver import open_session
from tests.plugins.forms import FORMATS, Array, to_numpy, to_torch
from tests.tolerances import ONE_OP

oracle: Any = typed_oracle  # its arguments come in one dictionary here
IR = {"fp32": ir.DataType.FLOAT, "fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
ONNX_FORMATS = ("fp32", "fp16")  # ONNX Runtime's CPU provider does not compute in bf16

sizes = st.fixed_dictionaries(
    {
        "T": st.sampled_from([1, 2, 3, 7, 16, 33]),
        "E": st.integers(1, 17),
        "K": st.integers(1, 4),
        "H": st.sampled_from([1, 3, 8, 32]),
        "F": st.sampled_from([1, 2, 5, 24]),
        "skew": st.sampled_from(["even", "one expert", "few experts", "ties", "all equal", "extreme"]),
        "seed": st.integers(0, 2**16),
    }
)
ONE_EXPERT: dict[str, Any] = {"T": 16, "E": 8, "K": 1, "H": 8, "F": 5, "skew": "one expert", "seed": 1}


def logits_of(case: dict[str, Any]) -> tuple[Array, int]:
    """Router logits ``[T, E]`` of the wanted skew, and K."""
    rng = np.random.default_rng(case["seed"])
    tokens, experts = case["T"], case["E"]
    logits = rng.normal(size=(tokens, experts))
    if case["skew"] == "one expert":
        logits[:, experts // 2] += 50
    elif case["skew"] == "few experts":
        logits[:, experts // 2 :] -= 50
    elif case["skew"] == "ties":
        logits = np.round(logits)
        logits[logits == 0] *= rng.choice([-1.0, 1.0])  # both zeros
    elif case["skew"] == "all equal":
        logits[:] = -0.25
    elif case["skew"] == "extreme":
        logits = rng.choice([-np.inf, -1e30, -100.0, 0.0, 1e-40, 90.0, 1e30, np.inf], size=logits.shape)
    return logits.astype(np.float32), min(case["K"], experts)


def graph_of_one(
    op: contract.Op,
    body: ir.Function,
    feeds: dict[str, Array],
    attributes: dict[str, Any],
    types: list[ir.DataType],
    constants: Sequence[ir.Value] = (),
) -> bytes:
    """A model of one node that calls the function, on inputs like ``feeds`` and then on initializers."""
    inputs = [
        ir.Value(name=n, type=ir.TensorType(ir.DataType.from_numpy(a.dtype)), shape=ir.Shape([None] * a.ndim))
        for n, a in feeds.items()
    ]
    outputs = [ir.Value(name=n, type=ir.TensorType(t)) for n, t in zip(op.outputs, types, strict=True)]
    given = [
        ir.Attr(n, {int: ir.AttributeType.INT, float: ir.AttributeType.FLOAT, str: ir.AttributeType.STRING}[type(v)], v)
        for n, v in attributes.items()
    ]
    node = ir.Node(contract.DOMAIN, op.name, [*inputs, *constants], given, overload=body.overload, outputs=outputs)
    imports = {"": functions.OPSET, contract.DOMAIN: contract.DOMAIN_VERSION}
    graph = ir.Graph(inputs, outputs, nodes=[node], initializers=constants, opset_imports=imports, name="one")
    data: bytes = ir.to_proto(ir.Model(graph, ir_version=11, functions=[body])).SerializeToString()
    return data


def in_onnxruntime(
    op: contract.Op,
    body: ir.Function,
    feeds: dict[str, Array],
    attributes: dict[str, Any],
    types: list[ir.DataType],
    constants: Sequence[ir.Value] = (),
) -> list[Array]:
    """Runs such a model."""
    model = graph_of_one(op, body, feeds, attributes, types, constants)
    results: list[Array] = open_session(model).run(None, feeds)
    return results


def same_routing(got: list[Array] | tuple[Array, ...], expected: tuple[Array, ...]) -> None:
    ONE_OP["fp32"].check(got[0], expected[0])
    for name, a, b in zip(("expert_offsets", "permutation"), got[1:], expected[1:], strict=True):
        assert a.dtype == b.dtype == np.int32, name
        np.testing.assert_array_equal(a, b, err_msg=name)


@settings(max_examples=60)
@given(sizes)
@example(ONE_EXPERT)
def test_routing(case: dict[str, Any]) -> None:
    logits, top_k = logits_of(case)
    expected = oracle.moe_routing(logits, top_k)
    in_torch = torch.ops.shuntyard.moe_routing(to_torch(logits), top_k)
    same_routing([to_numpy(t) for t in in_torch], expected)
    types = [ir.DataType.FLOAT, ir.DataType.INT32, ir.DataType.INT32]
    body = functions.moe_routing()
    same_routing(in_onnxruntime(contract.ROUTING, body, {"logits": logits}, {"top_k": top_k}, types), expected)


@settings(max_examples=60)
@given(sizes)
def test_routing_is_what_the_contract_says(case: dict[str, Any]) -> None:
    """By brute force, slot by slot."""
    logits, top_k = logits_of(case)
    scores, offsets, permutation = oracle.moe_routing(logits, top_k)
    slots = []  # (expert, slot)
    for t, row in enumerate(logits):
        best = sorted(range(len(row)), key=lambda e: (-row[e], e))[:top_k]
        slots += [(e, t * top_k + k) for k, e in enumerate(best)]
    slots.sort()
    assert [slot for _, slot in slots] == permutation.tolist()
    assert [sum(e < bound for e, _ in slots) for bound in range(logits.shape[1] + 1)] == offsets.tolist()
    chosen = np.asarray([logits[slot // top_k, e] for e, slot in slots], np.float64)
    with np.errstate(over="ignore"):
        np.testing.assert_allclose(scores, 1 / (1 + np.exp(-chosen)), rtol=1e-6, atol=1e-38)


@settings(max_examples=40)
@given(sizes, st.sampled_from(list(FORMATS)))
def test_scatter_add(case: dict[str, Any], compute: str) -> None:
    logits, top_k = logits_of(case)
    _, _, permutation = oracle.moe_routing(logits, top_k)
    rng = np.random.default_rng(case["seed"])
    tokens, hidden = case["T"], case["H"]
    feeds = {
        "base": rng.normal(size=(tokens, hidden)).astype(FORMATS[compute]),
        "rows": rng.normal(size=(tokens * top_k, hidden)).astype(FORMATS[compute]),
        "permutation": permutation,
    }
    expected = oracle.moe_scatter_add(*feeds.values(), top_k=top_k)
    in_torch = to_numpy(torch.ops.shuntyard.moe_scatter_add(*(to_torch(a) for a in feeds.values()), top_k))
    np.testing.assert_array_equal(in_torch, expected)  # the same sums in the same order
    if compute in ONNX_FORMATS:
        body = functions.moe_scatter_add()
        (out,) = in_onnxruntime(contract.SCATTER_ADD, body, feeds, {"top_k": top_k}, [IR[compute]])
        ONE_OP[compute].check(out, expected)


attention_sizes = st.fixed_dictionaries(
    {
        "B": st.integers(1, 3),
        "G": st.integers(1, 3),
        "queries_per_group": st.integers(1, 3),
        "S": st.sampled_from([1, 2, 5]),
        "D": st.sampled_from([2, 8, 10]),
        "L": st.sampled_from([5, 8, 13]),
        "seed": st.integers(0, 2**16),
    }
)


@settings(max_examples=40)
@given(attention_sizes, st.sampled_from(list(FORMATS)))
def test_cached_attention(case: dict[str, int], compute: str) -> None:
    rng = np.random.default_rng(case["seed"])
    batch, groups, length, head_dim, rows = (case[n] for n in "BGSDL")
    heads = groups * case["queries_per_group"]
    first = rng.integers(0, rows - length + 1, size=batch)
    first[0] = rows - length  # one ends at the cache's last row
    shapes = {
        "query": (heads, length),
        "key": (groups, length),
        "value": (groups, length),
        "past_key": (groups, rows),
        "past_value": (groups, rows),
    }
    feeds: dict[str, Array] = {
        name: rng.normal(size=(batch, *shape, head_dim)).astype(FORMATS[compute]) for name, shape in shapes.items()
    }
    feeds["slots"] = first[:, None] + np.arange(length)
    expected = oracle.cached_attention(*feeds.values(), scale=0.3)
    faces = [[to_numpy(t) for t in torch.ops.shuntyard.cached_attention(*(to_torch(a) for a in feeds.values()), 0.3)]]
    if compute in ONNX_FORMATS:
        body = functions.cached_attention()
        faces.append(in_onnxruntime(contract.CACHED_ATTENTION, body, feeds, {"scale": 0.3}, [IR[compute]] * 3))
    for out, present_key, present_value in faces:
        ONE_OP[compute].check(out, expected[0])
        np.testing.assert_array_equal(present_key, expected[1])
        np.testing.assert_array_equal(present_value, expected[2])


@pytest.mark.parametrize("spoiled", ["past the end", "not consecutive", "negative"])
def test_attention_refuses_wrong_slots(spoiled: str) -> None:
    slots = {"past the end": [[7, 8]], "not consecutive": [[2, 4]], "negative": [[-1, 0]]}[spoiled]
    q, cache = np.ones((1, 1, 2, 4), np.float32), np.zeros((1, 1, 8, 4), np.float32)
    arguments = (q, q, q, cache, cache, np.asarray(slots))
    with pytest.raises(ValueError, match="fit a cache|consecutive"):
        oracle.cached_attention(*arguments, 1.0)
    with pytest.raises(ValueError, match="fit a cache|consecutive"):
        torch.ops.shuntyard.cached_attention(*(to_torch(a) for a in arguments), 1.0)


def test_attention_body_refuses_writes_past_the_cache() -> None:
    q, cache = np.ones((1, 1, 2, 4), np.float32), np.zeros((1, 1, 8, 4), np.float32)
    names = contract.CACHED_ATTENTION.inputs
    feeds = dict(zip(names, (q, q, q, cache, cache, np.asarray([[7, 8]])), strict=True))
    with pytest.raises(Exception, match="(?i)tensorscatter|write"):
        in_onnxruntime(
            contract.CACHED_ATTENTION, functions.cached_attention(), feeds, {"scale": 1.0}, [ir.DataType.FLOAT] * 3
        )


@pytest.mark.parametrize("size", [1e3, 3e4, 1e7])
def test_hidden_rows_stay_hidden_whatever_they_hold(size: float) -> None:
    """Rows behind the query must not leak through an additive mask, however large their scores are."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(1, 1, 2, 4)).astype(np.float32) for _ in range(3))
    past_key, past_value = (np.zeros((1, 1, 8, 4), np.float32) for _ in range(2))
    q[:] = abs(q)
    past_key[:, :, 2:], past_value[:, :, 2:] = size, 100.0  # what padding left there
    feeds = dict(
        zip(contract.CACHED_ATTENTION.inputs, (q, k, v, past_key, past_value, np.asarray([[0, 1]])), strict=True)
    )
    expected = oracle.cached_attention(*feeds.values(), scale=1.0)[0]
    in_torch = torch.ops.shuntyard.cached_attention(*(to_torch(a) for a in feeds.values()), 1.0)[0]
    ONE_OP["fp32"].check(to_numpy(in_torch), expected)
    types = [ir.DataType.FLOAT] * 3
    body = functions.cached_attention()
    ONE_OP["fp32"].check(in_onnxruntime(contract.CACHED_ATTENTION, body, feeds, {"scale": 1.0}, types)[0], expected)


def test_routing_is_deterministic_and_stable() -> None:
    logits = np.round(np.random.default_rng(3).normal(size=(200, 16))).astype(np.float32)  # full of ties
    runs = [torch.ops.shuntyard.moe_routing(to_torch(logits), 3) for _ in range(3)]
    for run in runs[1:]:
        for a, b in zip(run, runs[0], strict=True):
            assert torch.equal(a, b)
    _, offsets, permutation = oracle.moe_routing(logits, 3)
    for begin, end in pairwise(offsets):
        assert (np.diff(permutation[begin:end]) > 0).all()  # within an expert by slot


@pytest.mark.parametrize("top_k", [0, 5, -1])
def test_routing_refuses_a_top_k_out_of_range(top_k: int) -> None:
    for face in (oracle.moe_routing, lambda x, k: torch_ops.moe_routing(torch.from_numpy(x), k)):
        with pytest.raises(ValueError, match=f"top_k is {top_k}, must be in 1..4"):
            face(np.zeros((2, 4), np.float32), top_k)


def test_routing_refuses_nan() -> None:
    logits = np.asarray([[0.0, np.nan]], np.float32)
    with pytest.raises(ValueError, match="router logit is NaN"):
        oracle.moe_routing(logits, 1)
    with pytest.raises(ValueError, match="router logit is NaN"):
        torch_ops.moe_routing(torch.from_numpy(logits), 1)
