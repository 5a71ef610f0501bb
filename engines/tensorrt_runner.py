"""Runs a TensorRT (or TensorRT-RTX) engine on a GPU; torch holds the device memory."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch

from shuntyard.engines.engine import Floats, Runner, Tokens
from shuntyard.engines.manifest import EngineManifest
from shuntyard.errors import EngineError

_TORCH = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
"""Backend -> Python module; both speak the same API."""


def import_tensorrt(backend: str) -> Any:
    """The backend's Python module.

    Raises:
        EngineError: it is not installed.
    """
    try:
        return importlib.import_module(MODULES[backend])
    except ImportError as error:
        raise EngineError(
            f"backend {backend}: the Python package '{MODULES[backend]}' cannot be imported: {error}",
            hint=f"pip install 'shuntyard[{backend}]'",
        ) from error


def check_gpu(directory: Path, manifest: EngineManifest) -> None:
    """Whether the GPU at hand, if there is one, is one that the engine at ``directory`` was built for.

    Raises:
        EngineError: it is not.
    """
    if not torch.cuda.is_available():
        raise EngineError(
            f"{directory}: a {manifest.backend} engine for {manifest.target} needs a GPU, and torch sees none",
            hint="copy the engine directory to the GPU machine; --backend onnxruntime builds one for the CPU",
        )
    major, minor = torch.cuda.get_device_capability()
    if f"sm{major}{minor}" != manifest.target:
        raise EngineError(
            f"{directory}: was built for {manifest.target}, this GPU is sm{major}{minor}",
            hint=f"build with --gpu sm{major}{minor}",
        )
    about = manifest.plugin_build
    if about is not None and not about.runs_on(manifest.target):
        raise EngineError(
            f"{directory}: its plugin library has {about.kernels}, none that runs on {manifest.target}",
            hint=about.remedy(manifest.target),
        )


class TensorRTRunner(Runner):
    """The KV cache is updated in place: past and present of a layer are the same device memory."""

    def __init__(self, directory: Path, manifest: EngineManifest) -> None:
        check_gpu(directory, manifest)
        trt = import_tensorrt(manifest.backend)
        self._trt, self._manifest = trt, manifest
        self._logger = trt.Logger(trt.Logger.WARNING)
        runtime = trt.Runtime(self._logger)
        if manifest.plugin_library is not None:
            registry = runtime.get_plugin_registry()
            if registry.load_library(str(directory / manifest.plugin_library)) is None:
                raise EngineError(
                    f"{directory / manifest.plugin_library}: the plugin library cannot be loaded",
                    hint="build the engine again",
                )
        self._runtime = runtime
        self._engine = runtime.deserialize_cuda_engine((directory / manifest.engine_file).read_bytes())
        if self._engine is None:
            raise EngineError(
                f"{directory / manifest.engine_file}: {manifest.backend} {trt.__version__} cannot load it",
                hint=f"it was built with {manifest.backend_version}; build it again",
            )
        self._context = self._engine.create_execution_context()
        self._stream = torch.cuda.Stream()
        self._caches: dict[str, torch.Tensor] = {}
        self._marked: dict[str, Floats] = {}

    def start(self, batch: int, context: int) -> None:
        """See :class:`Runner`. Cache rows are static in the engine: ``context`` does not shrink them."""
        dtype = _TORCH[self._manifest.dtype]
        with torch.cuda.stream(self._stream):
            self._caches = {
                f"{shape.layer}.{part}": torch.zeros(
                    (batch, shape.heads, shape.rows, shape.head_dim), dtype=dtype, device="cuda"
                )
                for shape in self._manifest.cache
                for part in ("key", "value")
            }

    def step(self, input_ids: Tokens, position_ids: Tokens, logits_indices: Tokens) -> Floats:
        """See :class:`Runner`."""
        active, outputs = logits_indices.shape
        with torch.cuda.stream(self._stream):
            tensors = {
                "input_ids": torch.from_numpy(input_ids).contiguous().cuda(),
                "position_ids": torch.from_numpy(position_ids).contiguous().cuda(),
                "logits_indices": torch.from_numpy(logits_indices).contiguous().cuda(),
            }
            logits = torch.empty((active, outputs, self._manifest.vocab_size), dtype=torch.float32, device="cuda")
            for name, cache in self._caches.items():
                tensors[f"past_key_values.{name}"] = cache[:active]
            for name, tensor in tensors.items():
                if not self._context.set_input_shape(name, tuple(tensor.shape)):
                    raise EngineError(
                        f"the engine does not take {name} of shape {list(tensor.shape)}", hint="build the engine again"
                    )
                self._context.set_tensor_address(name, tensor.data_ptr())
            for name, cache in self._caches.items():
                self._context.set_tensor_address(f"present.{name}", cache.data_ptr())
            self._context.set_tensor_address("logits", logits.data_ptr())
            inside = {}
            for name in self._manifest.marked:
                shape, dtype = tuple(self._context.get_tensor_shape(name)), self._engine.get_tensor_dtype(name)
                kind = torch.float32 if dtype == self._trt.float32 else _TORCH[self._manifest.dtype]
                inside[name] = torch.empty(shape, dtype=kind, device="cuda")
                self._context.set_tensor_address(name, inside[name].data_ptr())
            if not self._context.execute_async_v3(self._stream.cuda_stream):
                raise EngineError("the engine failed to run", hint="TensorRT has said why, above")
            result: Floats = logits.cpu().numpy()  # waits for the stream
            self._marked = {name: value.float().cpu().numpy() for name, value in inside.items()}
        return result

    @property
    def marked(self) -> dict[str, Floats]:
        """See :class:`Runner`."""
        return self._marked

    def cache_rows(self, layer: int, active: int, rows: Tokens) -> tuple[Floats, Floats]:
        """See :class:`Runner`."""
        places = torch.from_numpy(rows).cuda()
        with torch.cuda.stream(self._stream):
            key, value = (
                self._caches[f"{layer}.{part}"][:active, :, places].transpose(1, 2).float().cpu().numpy()
                for part in ("key", "value")
            )
        return key, value
