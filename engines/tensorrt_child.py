"""The child process of a TensorRT build: ``python -m shuntyard.engines.tensorrt_child job.json``.

Writes the plan and the log; its stdout carries progress, one JSON object a line. Anything that goes wrong is an
error in the log and a non-zero status; a crash of the compiler is the parent's to explain.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any


def _make_logger(trt: Any, path: str) -> Any:
    class FileLogger(trt.ILogger):  # type: ignore[misc]
        """Everything into a file: the layer dump comes as VERBOSE."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.stream = Path(path).open("w", encoding="utf-8", buffering=1)  # noqa: SIM115  as long as the process

        def log(self, severity: Any, message: str) -> None:
            level = str(severity).rsplit(".", 1)[-1]
            # The dump's lines stand for themselves, each at the start of a line.
            self.stream.write(f"{message}\n" if message.startswith("Name: ") else f"{level} {message}\n")

    return FileLogger()


def _make_monitor(trt: Any) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """Phases are nested; each reports its own steps."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.totals: dict[str, int] = {}

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            self.totals[phase] = steps
            self._tell(phase, 0)

        def phase_finish(self, phase: str) -> None:
            self._tell(phase, self.totals.get(phase, 0))

        def step_complete(self, phase: str, step: int) -> bool:
            self._tell(phase, step + 1)
            return True

        def _tell(self, phase: str, done: int) -> None:
            print(json.dumps({"phase": phase, "done": done, "total": self.totals.get(phase, 0)}), flush=True)

    return Monitor()


OWN = "shuntyard: "
"""Opens our own words in the log, which say more than the library's."""


def _fail(logger: Any, trt: Any, message: str) -> None:
    logger.log(trt.ILogger.Severity.ERROR, f"{OWN}{message}")
    sys.exit(1)


def _parse(trt: Any, builder: Any, job: dict[str, Any], logger: Any) -> Any:
    flags = 0
    if hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED"):  # TensorRT 10; later, the only way
        flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(flags)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(job["onnx"]):
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        said = dict.fromkeys(f"{e.node_operator()} '{e.node_name()}': {e.desc()}" for e in errors)
        _fail(logger, trt, f"the ONNX parser refuses the graph: {'; '.join(said) or 'no reason given'}")
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            layer.__class__ = trt.IAttentionInputLayer  # the bindings' own way to get at a layer's kind
            # One fused kernel where there is one; else (fp32, odd head sizes) several, where the default is to fail.
            layer.attention.decomposable = True
    return network


def _configure(trt: Any, builder: Any, network: Any, job: dict[str, Any], logger: Any) -> Any:
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.clear_flag(trt.BuilderFlag.TF32)  # fp32, the router's above all, is fp32 and not 10 bits of mantissa
    config.progress_monitor = _make_monitor(trt)
    profile = builder.create_optimization_profile()
    for i in range(network.num_inputs):
        name = network.get_input(i).name
        profile.set_shape(name, *[tuple(shape) for shape in job["profile"][name]])
    if config.add_optimization_profile(profile) < 0:
        _fail(logger, trt, "the optimization profile is refused")
    if job["ahead_of_time"]:
        config.num_compute_capabilities = 1
        capability = getattr(trt.ComputeCapability, job["target"].upper())
        if not config.set_compute_capability(capability, 0):
            _fail(logger, trt, f"cannot build for {job['target']}")
    return config


def main(job_path: str) -> None:
    """Builds what the job file describes."""
    job = json.loads(Path(job_path).read_text(encoding="utf-8"))
    trt = importlib.import_module(job["module"])
    logger = _make_logger(trt, job["log"])
    builder = trt.Builder(logger)
    if job["library"] is not None and builder.get_plugin_registry().load_library(job["library"]) is None:
        _fail(logger, trt, f"the plugin library {job['library']} cannot be loaded")
    network = _parse(trt, builder, job, logger)
    config = _configure(trt, builder, network, job, logger)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        sys.exit(1)  # the library has said why
    partial = Path(job["plan"] + ".partial")
    partial.write_bytes(plan)
    partial.rename(job["plan"])
    sys.stdout.flush()
    os._exit(0)  # the libraries' own teardown order is not ours to trust


if __name__ == "__main__":
    main(sys.argv[1])
