"""Which sequences a validation runs: windows of a text, built-in sets, and token ids from a file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from shuntyard.engines.text import Tokenizer
from shuntyard.errors import CheckpointError, EngineError
from shuntyard.exporter.config import Llama4Config
from shuntyard.validate import prompts
from shuntyard.validate.one_way import one_way
from shuntyard.validate.subjects import Subject
from shuntyard.validate.values import Sequence

LONGEST_WINDOW = 512
"""Default bound on a window: the reference runs every expert on every token."""


@dataclass(frozen=True)
class Inputs:
    """What the user asked for. A text is used when it is given, or when nothing else is."""

    text: str | None = None
    windows: int = 8
    length: int | None = None  # tokens of a window; default 3.5 chunks, at most LONGEST_WINDOW and the context
    sets: tuple[str, ...] = ()  # of prompts.BUILT_IN
    tokens: Path | None = None  # JSONL


def make_sequences(
    asked: Inputs, subject: Subject, reference: Subject, context: int
) -> tuple[list[Sequence], list[str]]:
    """The sequences and what there is to say about them.

    Raises:
        EngineError: there are none, or they do not fit the engine.
        CheckpointError: a text is to be read and there is no tokenizer.
    """
    config = subject.config
    found: list[Sequence] = []
    notes: list[str] = []
    words: list[int] | None = None
    if asked.text is not None:
        length = min(asked.length or _default_length(config), context)
        if asked.length is not None and length < asked.length:
            notes.append(f"windows are {length} tokens, the engine's context, not {asked.length}")
        tokenizer = Tokenizer.from_directory(reference.path)
        windows = prompts.from_text(
            asked.text, tokenizer, windows=asked.windows, length=length, vocab_size=config.vocab_size
        )
        if len(windows) < asked.windows:
            notes.append(f"the text holds {len(windows)} such windows, not {asked.windows}")
        found += windows
        words = tokenizer.encode(asked.text) if asked.sets else None
    if asked.sets:
        stack = reference.make_stack() if reference.make_stack and "adversarial" in asked.sets else None
        made, said = prompts.built_in(
            asked.sets,
            config,
            longest=context,
            text_tokens=words,
            pick_one_way=None if stack is None else lambda length: one_way(stack, length),
        )
        found += made
        notes += said
    if asked.tokens is not None:
        found += prompts.from_jsonl(asked.tokens, config.vocab_size, context)
    if not found:
        raise EngineError("there is nothing to compare on", hint="give --text, --prompts or --tokens")
    notes += prompts.not_exercised(config, found)
    return _told_apart(found), notes


def _told_apart(sequences: list[Sequence]) -> list[Sequence]:
    """The same, of labels that differ: reports tell sequences by them."""
    seen: dict[str, int] = {}
    out = []
    for sequence in sequences:
        label = sequence.label
        while label in seen:
            seen[sequence.label] += 1
            label = f"{sequence.label} #{seen[sequence.label]}"
        seen.setdefault(label, 1)
        out.append(sequence if label == sequence.label else Sequence(label, sequence.tokens))
    return out


def _default_length(config: Llama4Config) -> int:
    chunk = config.attention_chunk_size
    return min(LONGEST_WINDOW, chunk * 7 // 2 if chunk else LONGEST_WINDOW)


def windows_of(
    text: Path,
    checkpoint: Path,
    config: Llama4Config,
    windows: int,
    length: int | None,
    warn: Callable[[str], None],
) -> list[Sequence]:
    """Windows of a text file, for what runs the reference or the eager model alone; ``warn`` hears what they are not.

    Raises:
        EngineError: the text is missing or too short.
        CheckpointError: there is no tokenizer.
    """
    context = config.max_position_embeddings
    if length is not None and length > context:
        warn(f"windows are {context} tokens, the model's context, not {length}")
    found = prompts.from_text(
        read_text(text),
        Tokenizer.from_directory(checkpoint),
        windows=windows,
        length=min(length or _default_length(config), context),
        vocab_size=config.vocab_size,
    )
    if len(found) < windows:
        warn(f"the text holds {len(found)} windows of {len(found[0].tokens)} tokens, not {windows}")
    return found


def read_text(path: Path) -> str:
    """A UTF-8 text file.

    Raises:
        CheckpointError: it cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file", hint="give a UTF-8 text file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: cannot be read as UTF-8 text: {error}", hint="convert it to UTF-8") from error
