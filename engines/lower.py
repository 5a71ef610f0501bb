"""Lowering: what each backend needs of the portable graph, a few lines a backend.

ONNX Runtime takes the graph as it is: it inlines the private ops' functions, whose experts are routed, not dense.
TensorRT builds the plugin where a node carries its namespace; the function bodies of ops with plugins are taken
out, so that a plugin that is not there is an error and never a silent fallback. Its cache sizes are static.
"""

from __future__ import annotations

import onnx_ir as ir

from shuntyard.exporter.graph import retarget
from shuntyard.plugins.contract import PLUGINS


def for_onnxruntime(model: ir.Model, dtype: str) -> None:
    """Sets the compute type, in place."""
    retarget(model, dtype)


def for_tensorrt(model: ir.Model, dtype: str, *, context: int, chunk: int | None) -> None:
    """Sets the compute type, fixes the cache sizes and leaves the plugin ops to their plugins, in place."""
    retarget(model, dtype)
    fix_dimensions(model, {"context": context, **({} if chunk is None else {"chunk": chunk})})
    plugin_names = {op.name for op in PLUGINS}
    for key in [key for key, function in model.functions.items() if function.name in plugin_names]:
        del model.functions[key]


def fix_dimensions(model: ir.Model, sizes: dict[str, int]) -> None:
    """Replaces symbolic dimensions of the graph's inputs and outputs by numbers, in place."""
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.shape is not None:
            value.shape = ir.Shape([_fixed(dim, sizes) for dim in value.shape])


def _fixed(dim: int | ir.SymbolicDim, sizes: dict[str, int]) -> int | ir.SymbolicDim:
    return dim if isinstance(dim, int) else sizes.get(str(dim.value), dim)
