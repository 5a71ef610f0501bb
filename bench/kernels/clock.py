"""Timing on a CUDA device: graphs of calls on several copies of their tensors, by the device's own clock."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch

from bench.kernels.results import Times

FEWEST_CALLS, LONG_CALL = 60, 500.0
"""Calls a graph, unless one takes more microseconds."""


def summary(times: list[float]) -> Times:
    """Of microseconds a call."""
    low, median, high = statistics.quantiles(times, n=4, method="inclusive")
    return Times(median, low, high, min(times), len(times))


def _elapsed(work: Callable[[], Any]) -> float:
    """Microseconds on the device."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    work()
    end.record()
    end.synchronize()
    return 1e3 * float(begin.elapsed_time(end))


def measure(calls: Sequence[Callable[[], Any]], rounds: int) -> tuple[Times, bool]:
    """Microseconds of one of the calls, which do the same on tensors of their own; whether a graph could hold them.

    What cannot be captured is timed as it is called, with the processor's work in it.
    """
    for call in [*calls, *calls]:
        call()
    torch.cuda.synchronize()
    once = _elapsed(lambda: [call() for call in calls]) / len(calls)
    turns = 1 if once > LONG_CALL else -(-FEWEST_CALLS // len(calls))

    def all_calls() -> None:
        for _ in range(turns):
            for call in calls:
                call()

    graph: Any = torch.cuda.CUDAGraph()
    captured = True
    work: Callable[[], Any] = graph.replay
    try:
        with torch.cuda.graph(graph):
            all_calls()
    except RuntimeError:
        torch.cuda.synchronize()
        captured, work = False, all_calls
    for _ in range(2):
        work()
    torch.cuda.synchronize()
    return summary([_elapsed(work) / (turns * len(calls)) for _ in range(rounds)]), captured


def copy_gigabytes(rounds: int) -> float:
    """GB/s, read and written, of a copy that no cache holds."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    times, _ = measure([lambda: target.copy_(source)], rounds)
    return 2 * source.numel() / times.median / 1e3


def gemm_teraflops(precision: str, rounds: int) -> float:
    """The best of torch's products of random square and tall matrices."""
    best = 0.0
    for m, n, k in ((8192, 8192, 8192), (16384, 8192, 5120), (16384, 16384, 8192)):
        a, b = (torch.randn(rows, k, device="cuda", dtype=torch.bfloat16) for rows in (m, n))
        if precision == "fp8":
            a8, b8 = (t.to(torch.float8_e4m3fn) for t in (a, b))
            one = torch.ones((), device="cuda")

            def product(a8: Any = a8, b8: Any = b8, one: Any = one) -> Any:
                return torch._scaled_mm(a8, b8.T, one, one, out_dtype=torch.bfloat16, use_fast_accum=True)

        else:

            def product(a: Any = a, b: Any = b) -> Any:  # type: ignore[misc]
                return a @ b.T

        times, _ = measure([product], rounds)
        best = max(best, 2.0 * m * n * k / times.median / 1e6)
    return best
