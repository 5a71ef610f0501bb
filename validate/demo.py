"""``demo``: the whole way on the trained miniature that comes with the package."""

from __future__ import annotations

import importlib.resources
import importlib.util
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shuntyard.engines.build import Reporter, Request, build
from shuntyard.engines.manifest import EngineManifest
from shuntyard.engines.tensorrt_runner import MODULES
from shuntyard.errors import CheckpointError
from shuntyard.exporter.export import export
from shuntyard.exporter.output import output_directory, refuse_existing
from shuntyard.validate.inputs import read_text
from shuntyard.validate.report import Report
from shuntyard.validate.validate import Inputs, Plan, validate

HELD_OUT = "held_out.txt"


def miniature() -> Path:
    """The checkpoint that comes with the package.

    Raises:
        CheckpointError: the package was installed without it.
    """
    path = Path(str(importlib.resources.files("shuntyard").joinpath("miniature")))
    spec = importlib.util.find_spec("shuntyard.miniature")  # an editable install maps it elsewhere
    if not path.is_dir() and spec is not None and spec.submodule_search_locations:
        path = Path(next(iter(spec.submodule_search_locations)))
    if not (path / "config.json").is_file():
        raise CheckpointError(f"{path}: the miniature checkpoint is not there", hint="install shuntyard again")
    return path


def held_out_text() -> str:
    """Text that the miniature was not trained on."""
    return read_text(miniature() / HELD_OUT)


@dataclass
class DemoResult:
    """The validator's report, and a row for each engine: name, target, type, plugins."""

    report: Report
    engines: list[tuple[str, str, str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return {"report": self.report.as_dict(), "engines": self.engines, "notes": self.notes}


def run_demo(out: Path, reporter: Reporter) -> DemoResult:
    """Exports the miniature, builds an ONNX Runtime and (where installed) a TensorRT-RTX engine, validates."""
    refuse_existing(out)
    checkpoint = miniature()
    line = reporter.line
    with output_directory(out) as directory:
        line("export")
        export(checkpoint, directory / "model", check_values=True, report=line)
        line("build for ONNX Runtime")
        portable = build(directory / "model", directory / "engine", Request(max_context=1024), reporter)
        rtx: EngineManifest | None = None
        if importlib.util.find_spec(MODULES["tensorrt-rtx"]) is not None:
            line("build for SM89 with TensorRT-RTX, ahead of time")
            request = Request(backend="tensorrt-rtx", gpu="sm89", dtype="bf16", max_context=1024)
            rtx = build(directory / "model", directory / "engine-sm89", request, reporter)
        line("validate against transformers")
        plan = Plan(inputs=Inputs(held_out_text()))
        report = validate(str(directory / "engine"), str(checkpoint), plan, line)
    report.engine, report.reference = str(out / "engine"), "the miniature checkpoint"
    result = DemoResult(report)
    for name, manifest in (("engine", portable), ("engine-sm89", rtx)):
        if manifest is not None:
            plugins = "\n".join(f"{count} {plugin}" for plugin, count in manifest.plugins.items())
            row = (str(out / name), manifest.target, manifest.dtype, plugins or "none: function bodies, routed")
            result.engines.append(row)
    if rtx is None:
        result.notes.append("no TensorRT-RTX engine: pip install 'shuntyard[tensorrt-rtx]' to have one built")
    return result
