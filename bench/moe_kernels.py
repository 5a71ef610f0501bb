"""The routed experts of one Llama 4 layer on a GPU: ours, PyTorch, vLLM and
FBGEMM, and the floors of the machine.

All get the same router logits, inputs, weights and shared expert's output, and
return the sum; results are compared before they are timed. Floors are what a
copy on the device and torch's best product reach in the same run. Peers that
are not installed are named with the reason.

    python bench/moe_kernels.py --library libshuntyard_plugins.so \\
        --json run.json --plot run.svg
    python bench/moe_kernels.py --from run.json --plot run.svg   # without a GPU
    python bench/moe_kernels.py --arithmetic    # the floors, from shapes alone
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.kernels import arithmetic, plot, results
from bench.kernels.arithmetic import MODELS, TOKENS, WEIGHT_BYTES, Model

SKEWS = ("uniform", "zipf", "one-expert")

MOST_DIFFERENT = {"fp8": 0.05, "bf16": 0.01}
"""Norm of the difference by the norm of ours: of bf16 a few roundings of 2**-9; peers make FP8 numbers by another
rounding of the scale, and a number that lands on the other side of a tie moves by a sixteenth."""

H200 = {"gigabytes": 4300.0, "fp8": 1979.0, "bf16": 989.0}
"""For --arithmetic: a copy as measured, and the datasheet's arithmetic."""

COPIES = 3


def fail(message: str, hint: str) -> int:
    """One line and a hint, and the exit status."""
    print(f"error: {message}\nhint: {hint}", file=sys.stderr)
    return 2


def default_library() -> Path | None:
    """The installed package's, if there is one."""
    try:
        from shuntyard.plugins.library import library_path

        return library_path()
    except Exception:  # noqa: BLE001 (not installed, or without the library: --library says where it is)
        return None


def machine(library: Any) -> dict[str, Any]:
    """What the figures depend on beside the code."""
    import torch

    facts: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "gpu": torch.cuda.get_device_name(),
        "capability": ".".join(map(str, torch.cuda.get_device_capability())),
        "cache_bytes": torch.cuda.get_device_properties(0).L2_cache_size,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "library": library.info,
    }
    return facts


def free_memory() -> int:
    """Bytes of the device that nothing holds."""
    import torch

    torch.cuda.empty_cache()
    return int(torch.cuda.mem_get_info()[0])


def compare(run: Callable[[], Any], expected: Any) -> float:
    """The norm of the difference, by the norm of what is expected."""
    got, wide = run().float(), expected.float()
    return float((got - wide).norm() / wide.norm())


def measure_point(
    library: Any, model: Model, precision: str, tokens: int, skew: str, copies: list[Any], run: results.Run, args: Any
) -> results.Point:
    """All contenders on one shape."""
    import torch

    from bench.kernels import clock, contenders
    from bench.kernels.ours import expert_weights

    layers = [
        contenders.make_layer(model, tokens, skew, weights, weights.w2.device.type, seed=1 + number)
        for number, weights in enumerate(copies)
    ]
    counts = [len(torch.unique(layer.logits.argmax(1))) for layer in layers]
    touched = round(sum(counts) / len(counts))
    work = arithmetic.work_of(model, tokens, precision, touched)
    memory, math = work.floors(run.copy_gigabytes, run.teraflops[precision])
    makers: dict[str, Callable[[Any], Any]] = {"ours": partial(contenders.ours, library)}
    if args.tactics:
        weights = expert_weights(copies[0].w13, copies[0].w2, copies[0].scales)
        extents = (tokens, model.experts, 1, model.hidden, model.width)
        for number, name in library.tactics(weights, extents).items():
            makers[f"ours, {name}"] = partial(contenders.ours, library, tactic=number)
    makers |= contenders.available()[0]
    expected = contenders.ours(library, layers[0])().clone()
    entries = []
    for name, make in makers.items():
        try:
            difference = compare(make(layers[0]), expected)
            if not difference <= MOST_DIFFERENT[precision]:  # NaN, too
                entries.append(results.Entry(name, None, difference, problem="another result: not timed"))
                continue
            times, captured = clock.measure([make(layer) for layer in layers], args.rounds)
            entries.append(results.Entry(name, times, difference, captured))
        except Exception as error:  # noqa: BLE001 (a peer may fail in any way: said, and the next one's turn)
            entries.append(results.Entry(name, problem=f"{type(error).__name__}: {error}".splitlines()[0]))
    return results.Point(
        *(model.name, precision, skew, tokens, touched, work.bytes, work.flops, memory, math), entries=entries
    )


def shown(point: results.Point) -> str:
    """A point's line on stdout."""
    parts = [f"{point.model} {point.precision} {point.skew} T={point.tokens:,}: floor {point.floor:,.1f} us"]
    for entry in point.entries:
        if entry.times is None:
            parts.append(f"{entry.name}: {entry.problem}")
        else:
            share = point.floor / entry.times.median
            loose = "" if entry.captured else ", no graph"
            parts.append(f"{entry.name} {entry.times.median:,.1f} us ({share:.0%} of the floor's rate{loose})")
    return "; ".join(parts)


def measure(args: argparse.Namespace, library: Any, device: str = "cuda") -> results.Run:
    """The whole run."""
    from bench.kernels import clock, contenders

    absent = contenders.available()[1]
    for name, reason in absent.items():
        print(f"absent: {name}: {reason}")
    rates = {precision: clock.gemm_teraflops(precision, args.rounds) for precision in args.precisions}
    run = results.Run(machine(library), clock.copy_gigabytes(args.rounds), rates, absent)
    print(f"copy {run.copy_gigabytes:,.0f} GB/s; " + ", ".join(f"{p} {t:,.0f} TFLOP/s" for p, t in rates.items()))
    if args.floors_only:
        return run
    for name in args.models:
        model = MODELS[name]
        for precision in args.precisions:
            need = model.experts * model.expert_weights * WEIGHT_BYTES[precision]
            fit = int(free_memory() * 0.8 // need)
            if fit == 0:
                print(f"{name} {precision}: {need / 1e9:.0f} GB of weights do not fit")
                continue
            first = contenders.make_weights(model, precision, device)
            copies = [first, *(first.copy() for _ in range(min(COPIES, fit) - 1))]
            for skew in args.skews:
                for tokens in args.tokens:
                    run.points.append(measure_point(library, model, precision, tokens, skew, copies, run, args))
                    print(shown(run.points[-1]), flush=True)
            del first, copies
    return run


def positive(text: str) -> float:
    """A finite number above zero, of an option."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is no number above 0")
    return number


def whole(text: str) -> int:
    """A whole number above zero, of an option."""
    if not (text.isascii() and text.isdigit() and int(text)):
        raise argparse.ArgumentTypeError(f"{text} is no whole number above 0")
    return int(text)


def options() -> argparse.ArgumentParser:
    """Of the command line."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--library", type=Path, metavar="FILE", help="libshuntyard_plugins.so; else the installed package's")
    add("--models", nargs="+", choices=list(MODELS), default=list(MODELS), help="whose layers (all)")
    add("--precisions", nargs="+", choices=list(WEIGHT_BYTES), default=list(WEIGHT_BYTES), help="of weights (all)")
    counts = " ".join(map(str, TOKENS))
    add("--tokens", nargs="+", type=whole, default=list(TOKENS), metavar="N", help=f"of a call ({counts})")
    add("--skews", nargs="+", choices=SKEWS, default=list(SKEWS), metavar="SKEW", help=f"{', '.join(SKEWS)} (all)")
    add("--rounds", type=whole, default=15, metavar="N", help="of each contender (%(default)s)")
    add("--tactics", action="store_true", help="also each of ours alone")
    add("--json", type=Path, metavar="FILE", help="where the figures go")
    add("--from", dest="earlier", type=Path, metavar="JSON", help="measure nothing, take these figures")
    add("--plot", type=Path, metavar="SVG", help="where the plot goes")
    add("--skew", choices=SKEWS, default="uniform", help="of the plot (%(default)s)")
    add("--floors-only", action="store_true", help="measure the machine's floors alone")
    add("--arithmetic", action="store_true", help="print the floors at given rates; needs no GPU")
    add("--shared", action="store_true", help="count the shared expert in; with --arithmetic")
    add("--bandwidth", type=positive, default=H200["gigabytes"], metavar="N", help="GB/s (%(default)g)")
    add("--fp8", type=positive, default=H200["fp8"], metavar="N", help="TFLOP/s (%(default)g)")
    add("--bf16", type=positive, default=H200["bf16"], metavar="N", help="TFLOP/s (%(default)g)")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """The command line. Exit status 1: ours fails somewhere, or a peer's result differs; 2: it cannot run."""
    parser = options()
    args = parser.parse_args(arguments)
    if args.arithmetic:
        rates = {precision: getattr(args, precision) for precision in args.precisions}
        models = [MODELS[name] for name in args.models]
        print("\n".join(arithmetic.table(models, args.tokens, args.bandwidth, rates, args.shared)))
        return 0
    if args.shared:
        parser.error("--shared is for --arithmetic")
    if args.floors_only and args.plot is not None:
        parser.error("--floors-only measures nothing to plot")
    for path in (args.json, args.plot):  # before minutes of measuring
        if path is not None and (path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK)):
            return fail(f"{path} cannot be written", "give a file in a directory that is there")
    if args.earlier is not None:
        try:
            run = results.read(args.earlier)
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            return fail(f"{args.earlier}: {reason}", "give a file that --json has written")
    else:
        import torch

        from bench.kernels.ours import Library

        if not torch.cuda.is_available():
            return fail("there is no CUDA device", "--arithmetic and --from need none")
        path = args.library or default_library()
        try:
            library = Library(path if path is not None else Path("libshuntyard_plugins.so"))
        except (OSError, ValueError, AttributeError) as error:
            return fail(str(error), "--library says where libshuntyard_plugins.so is, built with nvcc")
        run = measure(args, library)
    if args.json is not None:
        results.write(run, args.json)
    if args.plot is not None:
        try:
            args.plot.write_text(plot.svg(run, args.skew), encoding="utf-8")
        except ValueError as error:
            return fail(str(error), "--skew says of which routing")
    wrong = [
        f"{point.model} {point.precision} {point.skew} T={point.tokens}: {entry.name}: {entry.problem}"
        for point in run.points
        for entry in point.entries
        if entry.times is None and (entry.name.startswith("ours") or entry.difference is not None)
    ]
    print("\n".join(f"FAIL {line}" for line in wrong), end="\n" if wrong else "")
    return 1 if wrong else 0


if __name__ == "__main__":
    try:
        status = main()
        sys.stdout.flush()
    except BrokenPipeError:  # whoever reads, as head, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 141  # as of a program that SIGPIPE has ended
    sys.exit(status)
