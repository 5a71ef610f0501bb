"""A child process of test_tensorrt: builds graphs of one MoE with TensorRT-RTX, ``python -m … job.json``."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any


def main(job_path: str) -> None:
    """Builds each graph for SM89 and writes its log beside it; a crash is the parent's to notice."""
    import tensorrt_rtx as trt

    job = json.loads(Path(job_path).read_text(encoding="utf-8"))
    log: list[str] = []

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            log.append(message if message.startswith("Name: ") else f"{severity} {message}")

    logger = Logger()
    builder = trt.Builder(logger)
    if builder.get_plugin_registry().load_library(job["library"]) is None:
        sys.exit("the plugin library cannot be loaded")
    for path, shapes in job["graphs"].items():
        log.clear()
        network = builder.create_network(0)
        parser = trt.OnnxParser(network, logger)
        size = -1
        if parser.parse_from_file(path):
            config = builder.create_builder_config()
            config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
            profile = builder.create_optimization_profile()
            for name, shape in shapes.items():
                profile.set_shape(name, *[tuple(extents) for extents in shape])
            config.add_optimization_profile(profile)
            config.num_compute_capabilities = 1
            config.set_compute_capability(trt.ComputeCapability.SM89, 0)
            plan = builder.build_serialized_network(network, config)
            size = -1 if plan is None else plan.nbytes
        Path(f"{path}.log").write_text("\n".join([*log, f"PLAN {size}"]), encoding="utf-8")
    sys.stdout.flush()
    os._exit(0)  # the libraries' own teardown order is not ours to trust


if __name__ == "__main__":
    main(sys.argv[1])
