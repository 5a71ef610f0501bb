"""Runs an engine in ONNX Runtime on the CPU, the KV cache bound in place."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime

from shuntyard.engines.engine import Floats, Runner, Tokens
from shuntyard.engines.manifest import EngineManifest
from shuntyard.errors import EngineError
from shuntyard.exporter.graph import mark

WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"
"""ONNX Runtime's option that says where the weights of a graph lie that comes as bytes."""

NUMPY_TYPES: dict[str, Any] = {"fp32": np.float32, "fp16": np.float16}
"""What ONNX Runtime computes in on the CPU."""


def open_session(path: Path, threads: int | None = None, *, marked: bool = False) -> onnxruntime.InferenceSession:
    """A session on the CPU, by default with a thread for each core; ``marked``: it gives out the values in between.

    Raises:
        EngineError: ONNX Runtime refuses the graph.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads or 0  # 0: ONNX Runtime counts the cores
    source: str | bytes = str(path)
    if marked:
        model = ir.load(path)
        mark(model)
        source = ir.to_proto(model).SerializeToString()
        options.add_session_config_entry(WEIGHTS_FOLDER, str(path.parent.resolve()))
    try:
        session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions have no common base below Exception
        raise EngineError(f"{path}: ONNX Runtime cannot open it: {error}", hint="build the engine again") from error
    release_freed_memory()
    return session


def release_freed_memory() -> None:
    """Gives freed memory back to the system where the C library can (glibc).

    While it opens a graph, ONNX Runtime casts, splits and transposes the weights once and for all. It frees what was
    between, but glibc keeps it: more than the weights' own size once more, for as long as the process lives.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


class OnnxRuntimeRunner(Runner):
    """Each cache is one buffer, bound as past and present: TensorScatter then writes in place."""

    def __init__(
        self, engine_file: Path, manifest: EngineManifest, threads: int | None = None, *, marked: bool = False
    ) -> None:
        self._manifest = manifest
        self._session = open_session(engine_file, threads, marked=marked and not manifest.marked)
        cached = {f"present.{shape.layer}.{part}" for shape in manifest.cache for part in ("key", "value")}
        names = [value.name for value in self._session.get_outputs()]
        self._inside = [name for name in names if name != "logits" and name not in cached]
        self._marked: dict[str, Floats] = {}
        self._type = NUMPY_TYPES[manifest.dtype]
        self._caches: dict[str, Any] = {}

    def start(self, batch: int, context: int) -> None:
        """See :class:`Runner`. The caches are as large as this batch needs, not as large as the engine allows."""
        self._caches = {}
        for shape in self._manifest.cache:
            rows = min(shape.rows, context)
            for part in ("key", "value"):
                cache = np.zeros((batch, shape.heads, rows, shape.head_dim), self._type)
                self._caches[f"{shape.layer}.{part}"] = cache

    def step(self, input_ids: Tokens, position_ids: Tokens, logits_indices: Tokens) -> Floats:
        """See :class:`Runner`."""
        binding = self._session.io_binding()
        for name, array in (
            ("input_ids", input_ids),
            ("position_ids", position_ids),
            ("logits_indices", logits_indices),
        ):
            binding.bind_cpu_input(name, np.ascontiguousarray(array, np.int64))
        active = len(input_ids)
        for name, cache in self._caches.items():
            prefix = cache[:active]  # contiguous: the batch is the first axis
            for bind, tensor in (
                (binding.bind_input, f"past_key_values.{name}"),
                (binding.bind_output, f"present.{name}"),
            ):
                bind(tensor, "cpu", 0, self._type, prefix.shape, prefix.ctypes.data)
        for name in ("logits", *self._inside):
            binding.bind_output(name, "cpu")
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:
            raise EngineError(f"ONNX Runtime failed: {error}", hint="build the engine again") from error
        logits, *inside = (value.numpy() for value in binding.get_outputs()[-1 - len(self._inside) :])
        self._marked = dict(zip(self._inside, (value.astype(np.float32) for value in inside), strict=True))
        return logits  # type: ignore[no-any-return]

    @property
    def marked(self) -> dict[str, Floats]:
        """See :class:`Runner`."""
        return self._marked

    def cache_rows(self, layer: int, active: int, rows: Tokens) -> tuple[Floats, Floats]:
        """See :class:`Runner`."""
        key, value = (
            self._caches[f"{layer}.{part}"][:active, :, rows].swapaxes(1, 2).astype(np.float32)
            for part in ("key", "value")
        )
        return key, value
