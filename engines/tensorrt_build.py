"""Builds a TensorRT plan, in a child process: a compiler error there aborts the child and not its caller.

One code path for TensorRT and TensorRT-RTX. The child's log is kept, and what it says of the plan's layers is
held to what was asked: the plugins are there, each module computes in its type.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from shuntyard.engines import layer_table, proof
from shuntyard.engines.lower import signed_nibbles
from shuntyard.engines.manifest import LOG_NAME, Limits
from shuntyard.engines.tensorrt_child import OWN
from shuntyard.engines.tensorrt_runner import MODULES, import_tensorrt
from shuntyard.errors import EngineError, UnsupportedError
from shuntyard.exporter.export import check_graph
from shuntyard.plugins.library import LIBRARY_NAME, build_info, library_path

if TYPE_CHECKING:
    from shuntyard.engines.build import BuildFacts, Opened, Reporter, Request

PLAN_NAME = "engine.plan"

RTX_TARGETS = ("sm75", "sm80", "sm86", "sm89", "sm120", "sm121")
"""What TensorRT-RTX compiles for ahead of time, without a GPU."""


def target_of(backend: str, gpu: str | None) -> str:
    """The compute capability to build for, as ``sm89``.

    Raises:
        UnsupportedError: the backend cannot build for it on this machine.
    """
    if backend == "tensorrt-rtx":
        if gpu is None:
            raise UnsupportedError(
                "backend tensorrt-rtx compiles ahead of time and needs to know for which GPU",
                hint=f"--gpu, one of {', '.join(RTX_TARGETS)}",
            )
        if gpu not in RTX_TARGETS:
            hint = "H100 is --backend tensorrt" if gpu in ("sm90", "h100") else f"one of {', '.join(RTX_TARGETS)}"
            raise UnsupportedError(f"backend tensorrt-rtx cannot build for '{gpu}'", hint=hint)
        return gpu
    import torch

    if not torch.cuda.is_available():
        raise UnsupportedError(
            "backend tensorrt builds for the GPU at hand, and torch sees none",
            hint="run it on the GPU machine, or build ahead of time with --backend tensorrt-rtx --gpu sm89",
        )
    major, minor = torch.cuda.get_device_capability()
    here = f"sm{major}{minor}"
    if gpu not in (None, here):
        raise UnsupportedError(
            f"backend tensorrt builds for the GPU at hand, {here}, not for '{gpu}'", hint="leave --gpu out"
        )
    return here


def check_backend(request: Request) -> tuple[Any, str]:
    """The backend's module and the GPU to build for.

    Raises:
        UnsupportedError: the backend cannot build for it on this machine.
        EngineError: the backend is not installed.
    """
    target = target_of(request.backend, request.gpu)
    return import_tensorrt(request.backend), target


def build_plan(
    opened: Opened,
    nibbles: list[ir.Value],
    directory: Path,
    request: Request,
    dtype: str,
    limits: Limits,
    report: Reporter,
) -> BuildFacts:
    """Builds ``engine.plan`` from the lowered model in ``opened``; see ``build`` for what it raises.

    ``nibbles`` are the INT4 initializers whose bytes TensorRT wants in another form.
    """
    from shuntyard.engines.build import BuildFacts

    trt, target = check_backend(request)
    # Before the function bodies are gone, expected_plugins would count the same: calls, not bodies.
    expected = proof.expected_plugins(opened.model)
    precision = proof.expected_precision(opened.model, dtype, opened.manifest.precision)
    library = shutil.copyfile(library_path(), directory / LIBRARY_NAME) if expected else None
    about = None if library is None else build_info(library)
    if about is not None and not about.runs_on(target):
        report.warning(
            f"the plugin library has {about.kernels}: the engine will be built for {target}, but will not run there; "
            + about.remedy(target)
        )
    with tempfile.TemporaryDirectory(prefix=".work-", dir=directory) as scratch:
        work = Path(scratch)
        if nibbles:
            signed_nibbles(nibbles, work / "int4.bin")
        proto = ir.to_proto(opened.model)
        for header in opened.checkpoint.headers:
            # The builder maps the weights from the graph's own directory.
            place = work / header.file.name
            try:
                os.link(header.file.resolve(), place)
            except OSError:
                shutil.copyfile(header.file, place)
        check_graph(proto, work)
        (work / "lowered.onnx").write_bytes(proto.SerializeToString(deterministic=True))
        job = {
            "module": MODULES[request.backend],
            "onnx": str(work / "lowered.onnx"),
            "plan": str(directory / PLAN_NAME),
            "log": str(directory / LOG_NAME),
            "library": None if library is None else str(library),
            "target": target,
            "ahead_of_time": request.backend == "tensorrt-rtx",
            "profile": profile(opened.model, limits),
        }
        (work / "job.json").write_text(json.dumps(job), encoding="utf-8")
        _run_child(work, job, trt, report)
    log = (directory / LOG_NAME).read_text(encoding="utf-8", errors="replace")
    try:
        layers = layer_table.parse_tensorrt_log(log)
        plugins = proof.check_plugins(layers, expected)
        proof.check_precision(layers, precision, dtype)
        proof.check_experts(layer_table.experts_activations(log), opened.manifest.precision)
    except EngineError as error:
        raise EngineError(error.message, hint=f"{error.hint}; {_keep(log)}") from error
    found = ", ".join(f"{count} {name}" for name, count in plugins.items())
    report.line(f"{len(layers)} layers in the plan, plugins: {found or 'none'}")
    return BuildFacts(
        backend_version=str(trt.__version__),
        target=target,
        engine_file=PLAN_NAME,
        layers=layers,
        plugins=plugins,
        precision=proof.compute_types(precision),
        plugin_library=None if library is None else LIBRARY_NAME,
        plugin_build=about,
    )


def profile(model: ir.Model, limits: Limits) -> dict[str, list[list[int]]]:
    """``[min, opt, max]`` shapes of every input; the optimum is decoding with half the batch."""
    ranges = {
        "batch": (1, max(1, limits.max_batch // 2), limits.max_batch),
        "sequence": (1, 1, limits.max_tokens),
        "outputs": (1, 1, limits.max_tokens),
    }
    shapes = {}
    for value in model.graph.inputs:
        assert value.shape is not None
        dims = [(d, d, d) if isinstance(d, int) else ranges[str(d.value)] for d in value.shape]
        shapes[str(value.name)] = [list(shape) for shape in zip(*dims, strict=True)]
    return shapes


@contextlib.contextmanager
def _library_search_path(module: str, trt: Any) -> Iterator[str]:
    """``LD_LIBRARY_PATH`` for the child.

    The RTX parser opens ``libtensorrt_rtx.so`` when a graph has a plugin, but the wheel ships only
    ``libtensorrt_rtx.so.1``, and the process aborts. A link of that name, in a folder of our own, mends it.
    """
    old = os.environ.get("LD_LIBRARY_PATH", "")
    if module != "tensorrt_rtx":
        yield old
        return
    libraries = Path(trt.tensorrt_rtx_libs.__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        for versioned in libraries.glob("*.so.*"):
            (Path(folder) / re.sub(r"\.so\..*", ".so", versioned.name)).symlink_to(versioned)
        yield f"{folder}:{old}" if old else folder


def _run_child(work: Path, job: dict[str, Any], trt: Any, report: Reporter) -> None:
    """Runs the child, passes its progress on, and explains its failure from its log.

    Raises:
        EngineError: the build failed; the log's first error is in the message.
    """
    with _library_search_path(job["module"], trt) as search_path, (work / "stderr").open("wb+") as errors:
        child = subprocess.Popen(
            [sys.executable, "-m", "shuntyard.engines.tensorrt_child", str(work / "job.json")],
            stdout=subprocess.PIPE,
            stderr=errors,
            env={**os.environ, "LD_LIBRARY_PATH": search_path},
            text=True,
        )
        assert child.stdout is not None
        try:
            for line in child.stdout:
                with contextlib.suppress(ValueError):  # compilers print past the logger
                    event = json.loads(line)
                    if isinstance(event, dict) and event.keys() == {"phase", "done", "total"}:
                        report.progress(event["phase"], event["done"], event["total"])
            status = child.wait()
        finally:
            child.kill()
            child.wait()
        if status == 0 and Path(job["plan"]).is_file():
            return
        errors.seek(0)
        said = errors.read().decode(errors="replace")
    raise EngineError(*_explain(status, Path(job["log"]), said))


def _explain(status: int, log: Path, stderr: str) -> tuple[str, str]:
    """The message and the hint for a failed build."""
    text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    found = [line.split(" ", 1)[1] for line in text.splitlines() if line.startswith(("ERROR ", "INTERNAL_ERROR "))]
    own = [line.removeprefix(OWN) for line in found if line.startswith(OWN)]
    reason = [*own, *found, *stderr.strip().splitlines()[-1:], "no error in its log"][0]
    ended = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
    return f"the builder {ended}: {reason[:400]}", _keep(text + "\n" + stderr)


def _keep(log: str) -> str:
    """Writes a log to where it outlives the partial engine directory, and says where."""
    with tempfile.NamedTemporaryFile("w", prefix="shuntyard-build-", suffix=".log", delete=False) as kept:
        kept.write(log)
    return f"the builder's log is kept in {kept.name}"
