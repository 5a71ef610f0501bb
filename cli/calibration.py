"""``shuntyard calibrate``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, cast

import click

from shuntyard.cli.console import PATH, say, warn

if TYPE_CHECKING:
    from shuntyard.validate.calibrate_ranges import MethodName

# Rooms are imported inside the commands: `shuntyard --help` need not wait for torch.


@click.command()
@click.argument("ckpt", type=PATH)
@click.argument("out", type=PATH)
@click.option("--text", type=PATH, required=True, help="UTF-8 text to run over, like what the engine is to read.")
@click.option(
    "--method",
    type=click.Choice(["amax", "percentile", "mse"]),
    default="amax",
    show_default=True,
    help="Largest magnitude, percentile of it, or least squared error in FP8.",
)
@click.option(
    "--percentile", type=click.FloatRange(0, 100, min_open=True), help="Of --method percentile.  [default: 99.9]"
)
@click.option("--windows", type=click.IntRange(1), default=32, show_default=True, help="Windows of the text.")
@click.option("--length", type=click.IntRange(4), help="Tokens a window.  [default: 3.5 chunks, at most 512]")
def calibrate(
    ckpt: Path, out: Path, text: Path, method: str, percentile: float | None, windows: int, length: int | None
) -> None:
    """Write the ranges of the checkpoint CKPT's activations to the new file OUT, for recipes with static scales.

    transformers runs over the text in fp32, layer by layer from disk: memory is one layer's. The same command writes
    the same bytes.
    """
    from shuntyard.validate.calibrate import calibrate as run
    from shuntyard.validate.calibrate_ranges import Method

    if percentile is not None and method != "percentile":
        raise click.UsageError("--percentile goes with --method percentile")
    how = Method(cast("MethodName", method), 99.9 if percentile is None else percentile)
    result = run(ckpt, out, text, how, windows=windows, length=length, say=say, warn=warn)
    click.echo(
        f"{out}: inputs of {len(result.inputs)} matrices and {len(result.keys)} KV caches, by {result.method} over "
        f"{result.tokens} tokens"
    )
