"""Runs parts of a graph alone in ONNX Runtime: one call of the graph, and what it needs, is a session of its own.

The part is cut out of the very graph that an engine runs, and reads the same weights. Memory is one part's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import onnxruntime
from numpy.typing import NDArray
from onnx_ir.passes.common import RemoveUnusedFunctionsPass, RemoveUnusedNodesPass

from shuntyard.engines.onnxruntime_runner import WEIGHTS_FOLDER, release_freed_memory
from shuntyard.errors import EngineError, UnsupportedError

HIDDEN = "hidden"
"""The input of a part that comes from the part before it."""


class Part:
    """A session of one call of the graph."""

    def __init__(self, session: onnxruntime.InferenceSession, outputs: list[str]) -> None:
        self._session = session
        self.inputs = [value.name for value in session.get_inputs()]
        self.outputs = outputs  # the graph's names, in the order of the function's outputs

    def run(self, feeds: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """All outputs by name; ``feeds`` may hold more than this part takes.

        Raises:
            EngineError: ONNX Runtime fails.
        """
        missing = next((name for name in self.inputs if name not in feeds), None)
        if missing is not None:
            raise EngineError(
                f"the part that gives {self.outputs[0]} also takes {missing}", hint="build the engine again"
            )
        try:
            values = self._session.run(self.outputs, {name: feeds[name] for name in self.inputs})
        except Exception as error:  # its exceptions have no common base below Exception
            raise EngineError(f"ONNX Runtime failed: {error}", hint="build the engine again") from error
        return dict(zip(self.outputs, values, strict=True))


class CutGraph:
    """A graph of the exporter's, in parts: ``model.embed_tokens``, ``model.layers.N``, ``lm_head``."""

    def __init__(self, graph: Path, *, optimise: bool = True) -> None:
        self._path, self._optimise = graph, optimise
        try:
            self._bytes = graph.read_bytes()
        except OSError as error:
            raise UnsupportedError(
                f"{graph}: cannot be read: {error}", hint="only a graph can be cut into layers, not a TensorRT plan"
            ) from error

    def wiring(self, layers: int) -> list[tuple[str, str]]:
        """What is not connected as a model is, where parts run alone would not show it: part and what is wrong.

        Each part must read the part before it, its own cache, and give its own outputs to the graph.
        """
        graph = ir.from_proto(onnx.load_model_from_string(self._bytes)).graph
        calls = {str(node.name): node for node in graph}
        outputs = {str(value.name): value for value in graph.outputs}
        wrong = []
        before: str | None = None
        for name in ("model.embed_tokens", *(f"model.layers.{i}" for i in range(layers)), "lm_head"):
            call = calls.get(name)
            if call is None:
                return [(name, "is not in the graph")]
            first = call.inputs[0]
            if before is not None and (first is None or first is not calls[before].outputs[0]):
                wrong.append((name, f"reads {first and first.name}, not {before}"))
            if name.startswith("model.layers."):
                own = name.removeprefix("model.layers.")
                past = {
                    str(v.name) for v in call.inputs if v is not None and str(v.name).startswith("past_key_values.")
                }
                if past != {f"past_key_values.{own}.{part}" for part in ("key", "value")}:
                    wrong.append((name, f"reads the cache {', '.join(sorted(past)) or 'of none'}"))
                for place, part in ((1, "key"), (2, "value")):
                    if outputs.get(f"present.{own}.{part}") is not call.outputs[place]:
                        wrong.append((name, f"does not give present.{own}.{part}"))
            before = name
        if outputs.get("logits") is not calls["lm_head"].outputs[0]:
            wrong.append(("lm_head", "does not give the logits"))
        return wrong

    def part(self, name: str) -> Part:
        """The session of the call ``name``.

        Raises:
            EngineError: the graph has no such call, or ONNX Runtime refuses the part.
        """
        model = ir.from_proto(onnx.load_model_from_string(self._bytes))
        outputs = isolate(model, name, self._path)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.enable_cpu_mem_arena = options.enable_mem_pattern = False  # a part runs a few times, then goes
        options.add_session_config_entry(WEIGHTS_FOLDER, str(self._path.parent.resolve()))
        if not self._optimise:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        data = ir.to_proto(model).SerializeToString()
        try:
            session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise EngineError(
                f"{self._path}: ONNX Runtime refuses its part {name}: {error}", hint="build again"
            ) from error
        release_freed_memory()
        return Part(session, outputs)


def isolate(model: ir.Model, name: str, path: Path) -> list[str]:
    """Leaves one call of the graph and what it needs, in place; returns its outputs' names."""
    graph = model.graph
    call = next((node for node in graph if node.name == name), None)
    if call is None:
        raise EngineError(f"{path}: has no call '{name}'", hint="export and build again with this version of shuntyard")
    before = call.inputs[0]
    if before is not None and before.producer() is not None:  # all but the embedding's
        hidden = ir.Value(name=HIDDEN, type=before.type, shape=before.shape)
        call.replace_input_with(0, hidden)
        graph.inputs.append(hidden)
    graph.outputs[:] = call.outputs
    RemoveUnusedNodesPass()(model)
    RemoveUnusedFunctionsPass()(model)  # type: ignore[no-untyped-call]
    graph.inputs[:] = [value for value in graph.inputs if value.uses()]
    return [str(value.name) for value in call.outputs]
