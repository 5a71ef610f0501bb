"""TensorRT-RTX takes the experts' plugin with every form of weights, at their own size, and tells what it refuses; of a
product of quantised rows it makes one of FP8."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from onnx_ir.tape import Tape

from shuntyard.engines.layer_table import Layer, parse_tensorrt_log
from shuntyard.engines.tensorrt_build import _library_search_path
from shuntyard.plugins import contract, functions
from shuntyard.plugins.contract import DOMAIN, ExpertsForm
from shuntyard.plugins.functions import OPSET
from shuntyard.plugins.library import library_path
from tests.plugins.forms import EVERY_KIND, Weights, form_of, fp8, make_weights, to_onnx
from tests.plugins.test_faces import IR

tensorrt_rtx = pytest.importorskip("tensorrt_rtx", reason="needs the package tensorrt-rtx")

HIDDEN, WIDTH, TOP_K = 64, 48, 2
FORMS = [form_of(kind, 3, 16) for kind in EVERY_KIND]
MAVERICK = [form_of(("linear", "channel"), 128), form_of(("linear", "group"), 128, 16)]  # 4 + 2 * 3 * 128 inputs
MAVERICK += [form_of(("linear", "channel", "static"), 128)]  # and 3 * 128
STORED = "bf16"


@dataclass(frozen=True)
class Graph:
    """Routing and experts, and what the builder said of them."""

    made: Weights
    compute: str = "bf16"
    leave_out: int = 0
    spoil: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        form = self.made.form
        kind = f"{form.layout}_{form.experts}_{form.quantization}_{form.activations}"
        return f"{kind}_{self.compute}_{self.leave_out}{''.join(self.spoil)}"

    @property
    def shapes(self) -> dict[str, list[list[int]]]:
        return {"x": [[t, HIDDEN] for t in (1, 4, 16)], "logits": [[t, self.made.form.experts] for t in (1, 4, 16)]}

    def proto(self) -> bytes:
        form, dtype = self.made.form, IR[self.compute]
        x = ir.Value(name="x", type=ir.TensorType(dtype), shape=ir.Shape(["tokens", HIDDEN]))
        logits = ir.Value(
            name="logits", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["tokens", form.experts])
        )
        rows = ir.Value(name="rows", type=ir.TensorType(dtype), shape=ir.Shape(["rows", HIDDEN]))
        plugin = {"plugin_namespace": contract.PLUGIN_NAMESPACE, "plugin_version": contract.PLUGIN_VERSION}
        routing = ir.node(contract.ROUTING.name, [logits], {"top_k": TOP_K, **plugin}, domain=DOMAIN, num_outputs=3)
        constants = [to_onnx(n, a, as_int4=False) for n, a in zip(self.made.names, self.made.arrays, strict=True)]
        constants = constants[: len(constants) - self.leave_out]
        attributes = {"top_k": TOP_K, **self.made.attributes, **plugin}
        experts = ir.Node(
            DOMAIN,
            contract.EXPERTS.name,
            [x, *routing.outputs, *constants],
            [ir.convenience.convert_attribute(n, v) for n, v in attributes.items() if n not in self.spoil],
            overload=form.overload,
            outputs=[rows],
            name=contract.EXPERTS.name,
        )
        imports = {"": OPSET, DOMAIN: contract.DOMAIN_VERSION}
        graph = ir.Graph(
            [x, logits], [rows], nodes=[routing, experts], initializers=constants, opset_imports=imports, name="moe"
        )
        data: bytes = ir.to_proto(ir.Model(graph, ir_version=11)).SerializeToString()
        return data


@dataclass(frozen=True)
class Product:
    """One product of quantised rows, as Linears of a model have it: the scales stand behind the product."""

    form: str
    quantization: str
    compute: str

    @property
    def name(self) -> str:
        return f"product_{self.form}_{self.quantization}_{self.compute}"

    @property
    def shapes(self) -> dict[str, list[list[int]]]:
        return {"x": [[1, 2, HIDDEN], [1, 8, HIDDEN], [2, 16, HIDDEN]]}

    def proto(self) -> bytes:
        rng, tape, dtype = np.random.default_rng(0), Tape(), IR[self.compute]
        x = ir.Value(name="x", type=ir.TensorType(dtype), shape=ir.Shape(["batch", "tokens", HIDDEN]))
        weight = to_onnx("weight", fp8(rng, (WIDTH, HIDDEN)), as_int4=False)
        sizes = {"tensor": (1,), "channel": (1, WIDTH)}[self.quantization]
        scale = to_onnx("scale", rng.uniform(0.5, 2, size=sizes).astype(np.float32), as_int4=False)
        given = [to_onnx("given", np.asarray([0.01], np.float32), as_int4=False)] if self.form == "static" else []
        body = functions.quantize(self.form)
        quantize = ir.Node(DOMAIN, contract.QUANTIZE.name, [x, *given], overload=body.overload, num_outputs=2)
        codes, factor = quantize.outputs
        codes.name, factor.name = "codes", "factor"
        one = tape.op("Constant", [], {"value": ir.tensor(np.asarray(1, np.float32))})
        values = tape.op("Transpose", [tape.op("DequantizeLinear", [weight, one])], {"perm": [1, 0]})
        summed = tape.op("MatMul", [codes, values], name="product")
        scaled = tape.op("Mul", [tape.op("Mul", [summed, factor]), scale])
        y = tape.op("Cast", [scaled], {"to": dtype})
        for i, node in enumerate(tape.nodes):
            node.outputs[0].name = f"v{i}"
        y.name, y.type, y.shape = "y", ir.TensorType(dtype), ir.Shape(["batch", "tokens", WIDTH])
        imports = {"": OPSET, DOMAIN: contract.DOMAIN_VERSION}
        constants = [weight, scale, *given]
        graph = ir.Graph(
            [x], [y], nodes=[quantize, *tape.nodes], initializers=constants, opset_imports=imports, name="product"
        )
        data: bytes = ir.to_proto(ir.Model(graph, ir_version=11, functions=[body])).SerializeToString()
        return data


PRODUCTS = [
    Product(form, quantization, compute)
    for form in contract.QUANTIZE_FORMS
    for quantization in ("tensor", "channel")
    for compute in ("bf16", "fp16")
]


def weights_of(form: ExpertsForm) -> Weights:
    return make_weights(np.random.default_rng(0), form, HIDDEN, WIDTH, STORED)


BUILT = [Graph(weights_of(form), compute) for form in FORMS for compute in ("bf16", "fp32")]
BUILT += [Graph(weights_of(form)) for form in MAVERICK]
SHORT = Graph(weights_of(form_of(("linear", "group"), 3, 16)), leave_out=1)
SILENT = Graph(weights_of(form_of(("linear", "group"), 3, 16)), spoil=("layout",))
UNSCALED = Graph(weights_of(form_of(("split", "tensor", "static"), 3)), leave_out=6)
MUTE = Graph(weights_of(form_of(("split", "tensor", "static"), 3)), spoil=("activations",))
REFUSED = (SHORT, SILENT, UNSCALED, MUTE)


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The builder's log of every graph, by name; all are built in one child process."""
    directory = tmp_path_factory.mktemp("builds")
    every: list[Graph | Product] = [*BUILT, *REFUSED, *PRODUCTS]
    graphs = {str(directory / graph.name): graph for graph in every}
    for path, graph in graphs.items():
        Path(path).write_bytes(graph.proto())
    job = {"library": str(library_path()), "graphs": {path: graph.shapes for path, graph in graphs.items()}}
    (directory / "job.json").write_text(json.dumps(job))
    with _library_search_path("tensorrt_rtx", tensorrt_rtx) as search_path:
        done = subprocess.run(
            [sys.executable, "-m", "tests.plugins.tensorrt_builds", str(directory / "job.json")],
            capture_output=True,
            text=True,
            check=False,
            cwd=Path(__file__).parents[2],
            env={**os.environ, "LD_LIBRARY_PATH": search_path},
        )
    assert done.returncode == 0, done.stdout + done.stderr
    return {graph.name: Path(f"{path}.log").read_text() for path, graph in graphs.items()}


def experts_layer(log: str) -> Layer:
    (layer,) = (layer for layer in parse_tensorrt_log(log) if layer.plugin == contract.EXPERTS.name)
    return layer


@pytest.mark.parametrize("graph", BUILT, ids=lambda graph: graph.name)
def test_builds(logs: dict[str, str], graph: Graph) -> None:
    log, made = logs[graph.name], graph.made
    layer = experts_layer(log)
    assert layer.inputs == [graph.compute, "fp32", "int32", "int32"]
    stored = {"none": STORED, "tensor": "fp8", "channel": "fp8", "group": "int32"}[made.form.quantization]
    assert sorted(layer.constants) == sorted(
        [stored] * len(made.weights) + [STORED] * len(made.names[len(made.weights) :])
    )
    # The plan holds the weights once, as they are: beside them, some kilobytes and the names of the inputs.
    size = int(re.findall(r"^PLAN (-?\d+)$", log, re.M)[-1])
    nbytes = sum(array.nbytes for array in made.arrays)
    assert nbytes < size < nbytes + 30_000 + 500 * len(made.arrays)


@pytest.mark.parametrize("product", PRODUCTS, ids=lambda product: product.name)
def test_products_of_quantised_rows_are_fp8(logs: dict[str, str], product: Product) -> None:
    layers = parse_tensorrt_log(logs[product.name])
    (gemm,) = (layer for layer in layers if layer.kind == "gemm")
    assert gemm.inputs == ["fp8"] and gemm.constants[0] == "fp8" and gemm.outputs == ["fp32"]
    assert "product" in gemm.origins


def test_says_what_it_refuses(logs: dict[str, str]) -> None:
    count = len(SHORT.made.arrays) + 4
    assert f"ShuntyardMoeExperts: takes {count} inputs and gives 1, not {count - 1} and 1" in logs[SHORT.name]
    assert "ShuntyardMoeExperts 'ShuntyardMoeExperts': attribute layout is missing" in logs[SILENT.name]
    assert "ShuntyardMoeExperts: takes 22 inputs and gives 1, not 16 and 1" in logs[UNSCALED.name]
    assert "ShuntyardMoeExperts 'ShuntyardMoeExperts': attribute activations is missing" in logs[MUTE.name]
    assert all(logs[graph.name].endswith("PLAN -1") for graph in REFUSED)
