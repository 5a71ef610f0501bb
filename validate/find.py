"""A search from its text to its files: ``shuntyard precision CKPT --within BOUND --text FILE --out RECIPE.toml``."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shuntyard.engines.text import Tokenizer
from shuntyard.errors import OutputError
from shuntyard.exporter.config_file import load_config_file
from shuntyard.exporter.output import refuse_existing
from shuntyard.exporter.recipe import read_recipe, resolve
from shuntyard.validate import prompts
from shuntyard.validate.emulate import Numbers
from shuntyard.validate.inputs import LONGEST_WINDOW
from shuntyard.validate.precision_plot import render_search
from shuntyard.validate.search import MOST_MOVES, Found, parse_bound, search
from shuntyard.validate.search_recipe import Source, found_recipe, write_new
from shuntyard.validate.values import Tokens
from shuntyard.validate.worth import Worth, recipe_bytes, worth_of

WINDOWS = 16


@dataclass(frozen=True)
class Text:
    """Windows of a text, and which text it was."""

    name: str  # the file's, without directories
    sha256: str
    windows: list[Tokens]
    notes: list[str]


def text_windows(checkpoint: Path, text: Path, windows: int = WINDOWS, length: int | None = None) -> Text:
    """Windows of a text file by the checkpoint's tokenizer.

    Args:
        checkpoint: where the tokenizer is.
        text: the file, UTF-8.
        windows: at most so many.
        length: tokens of a window; default: three and a half chunks, at most ``LONGEST_WINDOW``.

    Raises:
        EngineError: the windows are too short, or the text is.
        CheckpointError: there is no tokenizer, or the text is not UTF-8.
        OSError: the file cannot be read.
    """
    config = load_config_file(checkpoint / "config.json").text
    chunk = config.attention_chunk_size
    fitting = min(LONGEST_WINDOW, config.max_position_embeddings, chunk * 7 // 2 if chunk else LONGEST_WINDOW)
    data = text.read_bytes()
    found = prompts.from_text(
        data.decode("utf-8", errors="surrogateescape"),
        Tokenizer.from_directory(checkpoint),
        windows=windows,
        length=length or fitting,
        vocab_size=config.vocab_size,
    )
    notes = [f"the text holds {len(found)} such windows, not {windows}"] if len(found) < windows else []
    notes += prompts.not_exercised(config, found)
    return Text(text.name, hashlib.sha256(data).hexdigest(), [sequence.tokens for sequence in found], notes)


@dataclass(frozen=True)
class FoundRecipe:
    """What was written, and what it is worth; ``shipped`` begins with bf16."""

    recipe: Path
    page: Path
    worth: Worth
    shipped: list[Worth]
    found: Found

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "within": self.found.bound.text,
            "recipe": str(self.recipe),
            "page": str(self.page),
            "found": self.worth.as_dict(),
            "shipped": [worth.as_dict() for worth in self.shipped],
            "sensitivities": [
                {
                    "module": s.module,
                    "precision": s.precision._asdict(),
                    "saved_bytes": s.saved,
                    "kl": s.kl,
                    "perplexity_change": s.perplexity_change,
                    "top1": s.top1,
                }
                for s in self.found.sensitivities
            ],
            "measured": len(self.found.trials),
            "forward_passes": self.found.passes,
            "notes": self.found.notes,
        }


def find_recipe(
    checkpoint: Path,
    within: str,
    text: Text,
    out: Path,
    *,
    moves: int = MOST_MOVES,
    report: Callable[[str], None] = lambda line: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> FoundRecipe:
    """Searches, and writes the recipe to ``out`` and a page of what was seen beside it, as ``.html``.

    Args:
        checkpoint: the checkpoint's directory.
        within: the bound, see :func:`~shuntyard.validate.search.parse_bound`.
        text: what it is measured on.
        out: the recipe, a ``.toml`` that must not exist.
        moves: recipes that are measured as moves, at most.
        report: hears what it will cost, before it begins, and what was found.
        progress: hears how many layers of how many were run.

    Raises:
        UnsupportedError: the bound is not understood, or nothing that was measured is within it.
        OutputError: ``out`` or the page exists, cannot be written, or is no ``.toml``.
        EngineError: the windows are too short, or something computes NaN or infinity.
        CheckpointError: the checkpoint is broken.
    """
    bound = parse_bound(within)
    if out.suffix != ".toml":
        raise OutputError(f"{out}: a recipe is a .toml file", hint=f"as {out.name}.toml")
    page = out.with_suffix(".html")
    for path in (out, page):
        refuse_existing(path)
    numbers = Numbers(checkpoint)
    found = search(numbers, bound, text.windows, moves=moves, report=report, progress=progress)
    source = Source(checkpoint.resolve().name, numbers.checkpoint.fingerprint, text.name, text.sha256)
    toml, resolved = found_recipe(found, source, numbers.config, out)
    drawn = render_search(found, source, out.stem)
    base = found.baseline.outcome
    shipped = [
        worth_of(own, recipe_bytes(numbers, own), trial.outcome, base)
        for trial in [found.baseline, *(t for t in found.shipped() if t is not found.baseline)]
        for own in [resolve(read_recipe(trial.name), numbers.config)]
    ]
    worth = worth_of(resolved, recipe_bytes(numbers, resolved), found.best.outcome, base)
    write_new(page, drawn)
    write_new(out, toml)
    return FoundRecipe(out, page, worth, shipped, found)
