"""Tables of what recipes are worth, for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from shuntyard.validate.charts import percent, three
from shuntyard.validate.worth import Worth


def worth_table(worths: Sequence[Worth]) -> Table:
    """For a terminal of 80 columns; the first is the baseline."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("recipe", overflow="fold", no_wrap=all(len(worth.recipe) < 20 for worth in worths))
    for name in ("MB", "of bf16", "KL", "ppl", "change", "top-1", "experts", "worst layer"):
        table.add_column(name, justify="right", no_wrap=True)
    for worth in worths:
        router = ("-", "-")
        if worth.router is not None and worth.router_worst is not None:
            router = (_share(worth.router), f"{_share(worth.router_worst)} ({worth.router_worst_layer})")
        table.add_row(
            worth.recipe,
            f"{worth.bytes / 1e6:,.2f}" if worth.bytes < 1e9 else f"{worth.bytes / 1e6:,.0f}",
            f"{100 * worth.bytes / worths[0].bytes:.1f}%",
            three(worth.kl),
            f"{worth.perplexity:.5g}",
            f"{100 * worth.perplexity_change:+.2f}%",
            _share(worth.top1),
            *router,
        )
    return table


def _share(value: float) -> str:
    return percent(value).replace(" %", "%")
