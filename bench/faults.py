"""Does ``validate`` see each planted fault in a real engine, and name the module?

All faults of ``tests/validate/faults.py`` go into ONNX Runtime engines, exported and built under the fault, in fp32 and
in fp16; those that the eager model can have also into that, in bf16. Most are planted in the trained miniature, on
windows of its held-out text; a few need what it has not (two experts a token, biases, FP8), and go into random models.
A table says what was caught, which module was named, and how far beyond its bound the worst value of its layer is.

``--only 9,23`` plants these alone. Exit status 1 if one is missed in fp32, or an engine without a fault fails.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import timing
from shuntyard.errors import ShuntyardError
from shuntyard.validate.demo import held_out_text, miniature
from shuntyard.validate.validate import Inputs, Plan, validate
from tests.traced import traced_once
from tests.validate import faulty
from tests.validate.faults import FAULTS, Fault
from tests.validate.faulty import Base

WINDOWS = 3
FORMATS = ("fp32", "fp16", "bf16")

Found = dict[str, Any]


class Bench:
    """Models, what the reference computed on them, and what was traced."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.known = folder, dict[Any, bytes]()
        self.bases = {name: faulty.write_base(folder, name) for name in faulty.BASES if name != "plain"}
        self.bases["plain"] = Base(miniature(), Inputs(held_out_text(), windows=WINDOWS), 1024)

    def plan(self, base: Base) -> Plan:
        """Decoding crosses an edge in all of them."""
        return Plan(base.inputs, allow_other_files=True, cache=self.folder / "cache")

    def judged(self, fault: Fault, run: Callable[[], Any]) -> Found:
        """The verdict; an error that names what is wrong is one, too, where it is expected."""
        begin = time.perf_counter()
        try:
            found: Found = asdict(faulty.verdict(fault, run()))
            found.pop("failures")
        except ShuntyardError as error:
            named = bool(fault.refused) and fault.refused in str(error)
            found = {"caught": True, "named": named, "culprit": "", "mode": "refused", "error": error.message}
        return found | {"seconds": round(time.perf_counter() - begin, 1)}

    def engines(self, fault: Fault, base: Base, folder: Path) -> Iterator[tuple[str, Found]]:
        """In both formats, from one export."""
        try:
            if fault.code is None:
                with traced_once(self.known):
                    model = faulty.export_faulty(fault, base, folder)
            else:
                model = faulty.export_faulty(fault, base, folder)
        except ShuntyardError as error:
            raise SystemExit(f"{fault.name}: cannot be exported: {error}") from error
        for dtype in FORMATS[:2]:

            def run(dtype: str = dtype) -> Any:
                engine = faulty.build_faulty(fault, base, model, folder / dtype, dtype)
                with faulty.run_planted(fault, base):
                    return validate(str(engine), str(base.checkpoint), self.plan(base))

            if dtype not in fault.unfit:
                yield dtype, self.judged(fault, run)

    def eager(self, fault: Fault, base: Base, folder: Path) -> Found:
        """In bf16."""
        checkpoint = base.checkpoint
        if fault.weights is not None or fault.config is not None:
            checkpoint = folder / "checkpoint"  # the export has made it
        with faulty.code_planted(fault, base, eager=True):
            return self.judged(
                fault, lambda: validate(f"eager-bf16:{checkpoint}", str(base.checkpoint), self.plan(base))
            )

    def plant(self, fault: Fault) -> dict[str, Found]:
        """All formats."""
        base = self.bases[fault.base]
        with tempfile.TemporaryDirectory(dir=self.folder) as name:
            folder = Path(name)
            found = dict(self.engines(fault, base, folder))
            if fault.is_eager:
                found["bf16"] = self.eager(fault, base, folder)
        return found

    def sound(self) -> dict[str, dict[str, bool]]:
        """Whether the same models pass without a fault; where fp16 overflows the model is not sound in it."""
        passed: dict[str, dict[str, bool]] = {}
        for name, base in self.bases.items():
            with tempfile.TemporaryDirectory(dir=self.folder) as folder:
                nothing = Fault("none", (), base=name, unfit={"fp16": "overflows"} if name == "large" else {})
                found = dict(self.engines(nothing, base, Path(folder)))
                found["bf16"] = self.eager(nothing, base, Path(folder))
            passed[name] = {dtype: not one["caught"] for dtype, one in found.items()}
        return passed


def cell(found: Found | None) -> str:
    """``named x 340``, ``named other``, ``not seen``."""
    if found is None:
        return "-"
    if not found["caught"]:
        return "[red]not seen[/red]"
    if found["mode"] == "refused":
        return "refused" if found["named"] else "[red]refused, not named[/red]"
    short = found["culprit"].removeprefix("model.layers.") or "nothing"
    times = f"{found['times']:.3g}" if found["times"] else "?"
    return f"{short}, {found['mode']}, x {times}" if found["named"] else f"[red]{short}, {found['mode']}[/red]"


def summary(rows: list[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """How many were planted, caught and named, by format."""
    out = {}
    for dtype in FORMATS:
        own = [row["formats"][dtype] for row in rows if dtype in row["formats"]]
        out[dtype] = {
            "planted": len(own),
            "caught": sum(one["caught"] for one in own),
            "named": sum(one["named"] for one in own),
        }
    return out


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Plant faults in engines and hold them to the reference.")
    parser.add_argument("--only", default="", help="numbers of faults, as 9,23")
    parser.add_argument("--work", type=Path, help="scratch directory")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    only = {int(number) for number in args.only.split(",") if number}
    console = Console(stderr=True)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        bench = Bench(Path(folder))
        sound = bench.sound()
        console.print(f"without a fault: {sound}")
        for number, fault in enumerate(FAULTS, 1):
            if only and number not in only:
                continue
            found = bench.plant(fault)
            console.print(f"{number} {fault.name}:", *(f"{dtype} {cell(one)};" for dtype, one in found.items()))
            rows.append({"number": number, "name": fault.name, "right": list(fault.right), "base": fault.base})
            rows[-1] |= {"formats": found, "unfit": fault.unfit, "coarse": fault.coarse}
    table = Table(title="named module by layer, mode, and how many times its bound")
    for column in ("", "fault", "fp32", "fp16", "bf16, eager"):
        table.add_column(column)
    for row in rows:
        table.add_row(str(row["number"]), row["name"], *(cell(row["formats"].get(dtype)) for dtype in FORMATS))
    Console(width=200).print(table)
    found = summary(rows)
    Console().print(found)
    timing.write_json(args.json, {**timing.machine(1), "sound": sound, "summary": found, "faults": rows})
    missed = [row["name"] for row in rows if not row["formats"]["fp32"]["named"]]
    unsound = [f"{name} {dtype}" for name, own in sound.items() for dtype, ok in own.items() if not ok]
    for line in (*missed, *unsound):
        console.print(f"[red]{line}[/red]")
    sys.exit(bool(missed or unsound))


if __name__ == "__main__":
    main()
