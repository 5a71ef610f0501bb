"""Makes cases for the conformance runner, and judges what it makes of them.

With ``--write`` the cases go to a file, gzipped if it ends in .gz: the runner judges by what the file says, on a
machine that needs no Python. With ``--library`` and ``--runner`` they run here, and numpy judges, too.

    python -m tests.plugins.conformance --cases 2000 --sums tensor --large --write cases.bin.gz
    python -m tests.plugins.conformance --timing --write timing.bin.gz
    python -m tests.plugins.conformance --cases 200 --runner shuntyard_conformance --library libshuntyard_plugins.so
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from tests.plugins.conformance.files import MAGIC, Case, read_results
from tests.plugins.conformance.judge import judge
from tests.plugins.conformance.make import make_cases
from tests.plugins.conformance.timing import large_cases, timed_cases
from tests.tolerances import FP32_SUMS, TENSOR_CORE_SUMS


def write(path: Path, cases: Iterable[Case]) -> int:
    """Writes cases, each as it is made; returns their number."""
    count = 0
    with gzip.open(path, "wb", 6) if path.suffix == ".gz" else path.open("wb") as file:
        file.write(MAGIC)
        for count, case in enumerate(cases, 1):  # noqa: B007
            file.write(case.pack())
    return count


def run(runner: Path, library: Path, cases: list[Case], options: list[str]) -> tuple[int, str, list[str]]:
    """The runner's status and words, and what numpy finds wrong."""
    with tempfile.TemporaryDirectory() as directory:
        file, results = Path(directory) / "cases.bin", Path(directory) / "results.bin"
        write(file, cases)
        command = [str(runner), str(library), str(file), "--outputs", str(results), *options]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        by_name = {case.name: case for case in cases}
        found = [
            f"{wrong} (tactic {result.tactic})"
            for result in (read_results(results) if results.is_file() else ())
            for wrong in judge(by_name[result.name], result.outputs)
        ]
    return done.returncode, done.stdout + done.stderr, found


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        prog="python -m tests.plugins.conformance",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--cases", type=int, default=200, help="so many of each op (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sums", choices=("fp32", "tensor"), default="fp32", help="how the library sums (%(default)s)")
    parser.add_argument("--most-work", type=float, default=3e7, help="multiplications of a case (%(default)g)")
    parser.add_argument("--large", action="store_true", help="some large calls, too")
    parser.add_argument("--timing", action="store_true", help="the calls that are to be timed instead")
    parser.add_argument("--write", type=Path, metavar="FILE")
    parser.add_argument("--runner", type=Path)
    parser.add_argument("--library", type=Path)
    parser.add_argument("--every-tactic", action="store_true", help="with --library")
    args = parser.parse_args(arguments)
    if (args.write is None) == (args.library is None) or (args.runner is None) != (args.library is None):
        parser.error("give --write, or --runner and --library")
    sums = TENSOR_CORE_SUMS if args.sums == "tensor" else FP32_SUMS
    cases = timed_cases() if args.timing else make_cases(args.cases, sums, int(args.most_work), args.seed)
    if args.large:
        cases = itertools.chain(cases, large_cases(sums))
    if args.write is not None:
        count = write(args.write, cases)
        print(f"{count} cases, {args.write.stat().st_size:,} bytes")
        return 0
    status, text, wrong = run(args.runner, args.library, list(cases), ["--every-tactic"] * args.every_tactic)
    print(text, end="")
    print("\n".join([*wrong[:20], f"numpy finds {len(wrong)} wrong"]))
    return 1 if status or wrong else 0


if __name__ == "__main__":
    sys.exit(main())
