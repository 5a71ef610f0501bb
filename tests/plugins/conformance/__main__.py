"""Makes cases for the conformance runner, and judges what it makes of them.

With --write the cases go to a file, gzipped if it ends in .gz: the runner
judges by what the file says, on a machine that needs no Python. With --runner
and --library they run here, and numpy judges, too.

    python -m tests.plugins.conformance --cases 2000 --sums tensor --large \\
        --write cases.bin.gz
    python -m tests.plugins.conformance --timing --write timing.bin.gz
    python -m tests.plugins.conformance --cases 200 \\
        --runner shuntyard_conformance --library libshuntyard_plugins.so
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import math
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from functools import partial
from pathlib import Path

from tests.plugins.conformance.files import MAGIC, Case, read_results
from tests.plugins.conformance.judge import judge
from tests.plugins.conformance.make import make_cases
from tests.plugins.conformance.timing import large_cases, timed_cases
from tests.tolerances import FP32_SUMS, TENSOR_CORE_SUMS

COULD_NOT_RUN = 2
"""The runner's exit status, and this program's."""


def write(path: Path, cases: Iterable[Case]) -> int:
    """Writes cases, each as it is made; returns their number. A file appears when it is complete."""
    count = 0
    direct = path.exists() and not path.is_file()  # a device; or a directory, which cannot be opened
    to = path if direct else path.with_name(path.name + ".partial")
    try:
        with gzip.open(to, "wb", 6) if path.suffix == ".gz" else to.open("wb") as file:
            file.write(MAGIC)
            for count, case in enumerate(cases, 1):  # noqa: B007
                file.write(case.pack())
        if not direct:
            to.replace(path)
    finally:
        if not direct:
            to.unlink(missing_ok=True)
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


def fail(message: str, hint: str) -> int:
    """One line and a hint, and the exit status."""
    print(f"error: {message}\nhint: {hint}", file=sys.stderr)
    return COULD_NOT_RUN


def at_least(least: float, text: str) -> int:
    """A whole number, or one like 3e7, of an option."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not (number.is_integer() and number >= least):
        raise argparse.ArgumentTypeError(f"{text} is no whole number from {least:g}")
    return int(number)


def options() -> argparse.ArgumentParser:
    """Of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.plugins.conformance",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    one, zero = partial(at_least, 1), partial(at_least, 0)
    parser.add_argument("--cases", type=one, default=200, metavar="N", help="so many of each op (%(default)s)")
    parser.add_argument("--seed", type=zero, default=0, metavar="N", help="other cases for each (%(default)s)")
    parser.add_argument("--sums", choices=("fp32", "tensor"), default="fp32", help="how the library sums (%(default)s)")
    parser.add_argument(
        "--most-work", type=one, default=30_000_000, metavar="N", help="multiplications of a case (%(default)s)"
    )
    parser.add_argument("--large", action="store_true", help="some large calls, too")
    parser.add_argument("--timing", action="store_true", help="the calls that are to be timed instead; with --write")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the cases there, and run none")
    parser.add_argument("--runner", type=Path, metavar="FILE", help="run them with this shuntyard_conformance")
    parser.add_argument("--library", type=Path, metavar="FILE", help="through this libshuntyard_plugins.so")
    parser.add_argument("--every-tactic", action="store_true", help="with each that there is; needs --runner")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """The command line. Exit status 0: all is well; 1: something is wrong; 2: it could not be written, or not run."""
    parser = options()
    args = parser.parse_args(arguments)
    if (args.write is None) == (args.library is None) or (args.runner is None) != (args.library is None):
        parser.error("give --write, or --runner and --library")
    if args.every_tactic and args.write is not None:
        parser.error("--every-tactic is for --runner; a file of cases has no tactics")
    if args.timing and args.write is None:
        parser.error("--timing makes cases without judgement: --write them, and run them with the runner's --time")
    sums = TENSOR_CORE_SUMS if args.sums == "tensor" else FP32_SUMS
    cases = timed_cases() if args.timing else make_cases(args.cases, sums, args.most_work, args.seed)
    if args.large:
        cases = itertools.chain(cases, large_cases(sums))
    if args.write is not None:
        try:
            count = write(args.write, cases)
        except OSError as error:
            return fail(f"{args.write} cannot be written: {error.strerror}", "--write takes a file in a directory")
        print(f"{count} cases, {args.write.stat().st_size:,} bytes")
        return 0
    for path, option in ((args.runner, "--runner"), (args.library, "--library")):
        if not path.is_file():
            return fail(f"there is no file {path}", f"cmake -DSHUNTYARD_CONFORMANCE=ON builds what {option} takes")
    try:
        # Paths without a directory are files here, as everything else says, and nothing to search for.
        runner, library = args.runner.absolute(), args.library.absolute()
        status, text, wrong = run(runner, library, list(cases), ["--every-tactic"] * args.every_tactic)
    except OSError as error:
        return fail(f"{args.runner} cannot be run: {error.strerror}", "--runner takes a built shuntyard_conformance")
    print(text, end="")
    if status not in (0, 1):
        ended = f"ended with status {status}" if status >= 0 else f"was ended by signal {-status}"
        what = "nothing has run" if status == COULD_NOT_RUN else "not all has run"
        return fail(f"{what}: {args.runner} {ended}", "its own words stand above")
    print("\n".join([*wrong[:20], f"numpy finds {len(wrong)} wrong"]))
    return 1 if status or wrong else 0


if __name__ == "__main__":
    sys.exit(main())
