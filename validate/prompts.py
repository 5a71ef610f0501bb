"""The sequences that a validation runs: from a text, from a file of token ids, and sets that look for trouble.

Everything is deterministic: draws come from generators with fixed seeds, and a set's sequences do not depend on which
other sets are asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from shuntyard.engines.text import Tokenizer
from shuntyard.errors import EngineError
from shuntyard.exporter.config import Llama4Config, brief
from shuntyard.exporter.strict_json import parse_json
from shuntyard.validate.one_way import OneWay
from shuntyard.validate.values import Sequence

BUILT_IN = ("short", "chunk", "long", "adversarial")
"""Names of the sets of :func:`built_in`."""

SHORT = (1, 2, 3, 5, 8, 13, 16)
"""Tokens of the sequences of ``short``."""

LONGEST = 2048
"""No built-in sequence is longer, unless it is asked for: a reference's attention takes ``S**2`` of memory a head."""

BEYOND_EDGE = 8
"""Tokens behind a chunk's edge, or behind a step of the temperature, that show what comes of it."""

ONE_WAY = 96
"""Tokens of the sequence that goes to one expert, at most."""

SEED = 20250405
"""Of all draws in this module."""


def _labelled(name: str, tokens: Iterable[int]) -> Sequence:
    array = np.array(list(tokens), np.int64)
    return Sequence(f"{name} ({len(array)} token{'s' * (len(array) != 1)})", array)


def from_text(text: str, tokenizer: Tokenizer, *, windows: int, length: int, vocab_size: int) -> list[Sequence]:
    """At most ``windows`` windows of ``length`` tokens of consecutive text, each opened by the text's first token.

    Raises:
        EngineError: the windows are too short to compare, the text too short for one, or a token not the model's.
        CheckpointError: the text holds something that is no character.
    """
    if length < 4:
        raise EngineError(f"windows of {length} tokens are too short to compare", hint="give a larger --length")
    tokens = tokenizer.encode(text)
    count = min(windows, (len(tokens) - 1) // (length - 1))
    if count < 1:
        raise EngineError(
            f"the text has {len(tokens)} tokens, a window takes {length}", hint="give a longer --text or a --length"
        )
    first, body = tokens[0], tokens[1 : 1 + count * (length - 1)]
    _check_text([first, *body], vocab_size)
    step = length - 1
    return [_labelled(f"text {i + 1}", [first, *body[i * step : (i + 1) * step]]) for i in range(count)]


def _check_text(tokens: list[int], vocab_size: int) -> None:
    if max(tokens) >= vocab_size:
        raise EngineError(
            f"tokenizer.json gives token {max(tokens)}, the model's vocabulary has {vocab_size}",
            hint="config.json and tokenizer.json must be of the same checkpoint",
        )


def from_jsonl(path: Path, vocab_size: int, longest: int) -> list[Sequence]:
    """A sequence a line: a JSON list of token ids, or ``{"tokens": [...], "label": "..."}``; blank lines are skipped.

    Args:
        path: the file, UTF-8.
        vocab_size: of the model.
        longest: the engine's context.

    Raises:
        EngineError: the file cannot be read, or a line is anything else; line and reason are named.
    """
    found: list[Sequence] = []
    taken: set[str] = set()
    try:
        with path.open("rb") as stream:
            for number, line in enumerate(stream, 1):
                if line.strip():
                    where = f"{path}, line {number}"
                    label, tokens = _parse_line(line, where)
                    _check_ids(tokens, where, vocab_size, longest)
                    made = _labelled(f"line {number}", tokens)
                    if label is not None:
                        made = Sequence(label if label not in taken else f"{label} (line {number})", made.tokens)
                    taken.add(made.label)
                    found.append(made)
    except OSError as error:
        raise EngineError(
            f"{path}: cannot be read: {error.strerror}", hint="give a file with a JSON list of token ids a line"
        ) from error
    if not found:
        raise EngineError(f"{path}: has no lines", hint="give a file with a JSON list of token ids a line")
    return found


def _parse_line(line: bytes, where: str) -> tuple[str | None, list[Any]]:
    """Label and tokens, not yet checked."""
    try:
        raw = parse_json(line)
    except ValueError as error:
        raise EngineError(
            f"{where}: is no valid JSON: {error}", hint='a line is a list as [1, 2, 3], or {"tokens": [1, 2, 3]}'
        ) from error
    label = None
    if isinstance(raw, dict):
        unknown = sorted(set(raw) - {"tokens", "label"})
        if unknown:
            raise EngineError(f"{where}: key '{unknown[0]:.80}' is not understood", hint="give 'tokens' and 'label'")
        if "tokens" not in raw:
            raise EngineError(f"{where}: has no 'tokens'", hint='a line is {"tokens": [1, 2, 3], "label": "..."}')
        label = raw.get("label")
        if "label" in raw and not (
            isinstance(label, str) and label.strip() and label.isprintable() and len(label) <= 200
        ):
            raise EngineError(
                f"{where}: label is {brief(label)}, must be a short line of text", hint="name it, or leave it out"
            )
        raw = raw["tokens"]
    if not isinstance(raw, list):
        raise EngineError(f"{where}: tokens are {brief(raw)}, must be a list", hint="give token ids as [1, 2, 3]")
    return label, raw


def _check_ids(tokens: list[Any], where: str, vocab_size: int, longest: int) -> None:
    if not tokens:
        raise EngineError(f"{where}: has no tokens", hint="remove the line, or give at least one token id")
    if set(map(type, tokens)) != {int}:  # bool is a type of its own here
        place = next(i for i, token in enumerate(tokens) if type(token) is not int)
        raise EngineError(
            f"{where}: token {place} is {brief(tokens[place])}, must be an integer", hint="give ids, not text or floats"
        )
    if len(tokens) > longest:
        raise EngineError(
            f"{where}: has {len(tokens)} tokens, the engine's context is {longest}",
            hint="cut the line, or build with a larger --max-context",
        )
    if min(tokens) < 0 or max(tokens) >= vocab_size:
        place = next(i for i, token in enumerate(tokens) if not 0 <= token < vocab_size)
        raise EngineError(
            f"{where}: token {place} is {brief(tokens[place])}, the vocabulary is 0..{vocab_size - 1}",
            hint="are the ids of another tokenizer?",
        )


def built_in(
    names: Iterable[str],
    config: Llama4Config,
    *,
    longest: int,
    text_tokens: list[int] | None = None,
    pick_one_way: Callable[[int], OneWay | None] | None = None,
    cap: int = LONGEST,
) -> tuple[list[Sequence], list[str]]:
    """The sequences of the named sets, and notes on what they cannot do here.

    ``short``: a few tokens. ``chunk``: up to, at and over a chunk's edge, and over two. ``long``: as far as context and
    ``cap`` allow, three edges and two steps of the temperature. ``adversarial``: repetition, the vocabulary's ends, and
    tokens that all go to one expert.

    Args:
        names: of ``BUILT_IN``.
        config: the model's.
        longest: the engine's context.
        text_tokens: where tokens come from, opened by the first; default: drawn from the whole vocabulary.
        pick_one_way: makes a sequence of about so many tokens that go to one expert (:func:`one_way.one_way`).
        cap: no sequence is longer.

    Raises:
        EngineError: there is no such set, or the text is empty or of another tokenizer.
    """
    names = list(names)
    for name in names:
        if name not in BUILT_IN:
            raise EngineError(f"there is no set of prompts '{name:.80}'", hint=f"there are {', '.join(BUILT_IN)}")
    if text_tokens is not None:
        if not text_tokens:
            raise EngineError("the text has no tokens", hint="give a longer --text")
        _check_text(text_tokens, config.vocab_size)
    reach = min(longest, cap)
    sequences: list[Sequence] = []
    notes: list[str] = []
    for name in dict.fromkeys(names):
        words = _Words(BUILT_IN.index(name), config.vocab_size, text_tokens)
        if name == "short":
            lengths = dict.fromkeys(min(n, reach) for n in SHORT)
            sequences += [_labelled("short", words.take(n)) for n in lengths]
        elif name == "chunk":
            made = [_labelled(label, words.take(n)) for label, n in _edges(config.attention_chunk_size, reach)]
            sequences += made
            if not made:
                notes.append(f"set 'chunk': {_no_chunk(config.attention_chunk_size, reach)}")
        elif name == "long":
            sequences.append(_labelled("long", words.take(min(reach, _long(config)))))
        else:
            made, found = _adversarial(config, reach, pick_one_way)
            sequences += made
            notes += found
        if words.repeated:
            notes.append(f"set '{name}': the text has {len(text_tokens or [])} tokens, too few for it: it is repeated")
    return sequences, notes


class _Words:
    """A set's source of tokens: each :meth:`take` begins where the last one ended."""

    def __init__(self, number: int, vocab_size: int, text: list[int] | None) -> None:
        self._random = np.random.default_rng((SEED, number))
        self._vocab_size = vocab_size
        self._text = text
        self.repeated = False  # whether a sequence has the text more than once
        self._next = 0 if text is None else number * len(text) // len(BUILT_IN)  # another part of it for each set

    def take(self, count: int) -> list[int]:
        """So many tokens: the text's first and a stretch of it, which begins anew where the text is at its end."""
        if self._text is None:
            return [int(token) for token in self._random.integers(0, self._vocab_size, count)]
        first, body = self._text[0], self._text[1:] or self._text
        self.repeated = self.repeated or count - 1 > len(body)
        begin, self._next = self._next, self._next + count - 1
        return [first, *(body[i % len(body)] for i in range(begin, begin + count - 1))]


def _edges(chunk: int | None, reach: int) -> Iterator[tuple[str, int]]:
    """Label and length of the sequences around a chunk's edge that fit; none if the first does not."""
    if chunk is None:
        return
    for label, wanted in (
        ("chunk edge -1", chunk - 1),
        ("chunk edge", chunk),
        ("chunk edge +1", chunk + 1),
        ("past two chunk edges", 2 * chunk + max(1, min(BEYOND_EDGE, chunk // 2))),
    ):
        if 1 <= wanted <= reach:
            yield label, wanted
        elif chunk + 1 < reach < wanted:
            count = (reach - 1) // chunk
            yield f"past {'one chunk edge' if count == 1 else 'two chunk edges'}, cut to what fits", reach


def _no_chunk(chunk: int | None, reach: int) -> str:
    if chunk is None:
        return "the model has no chunks"
    return f"a chunk is {chunk} tokens, {reach} fit; its edge is not exercised"


def _long(config: Llama4Config) -> int:
    """Tokens that go over three chunk edges and two steps of the temperature; without either, all that fit.

    The temperature's step at position ``p`` is ``floor((p + 1) / floor_scale)``, as in transformers'
    ``Llama4TextAttention``.
    """
    wanted = [] if config.attention_chunk_size is None else [config.attention_chunk_size * 7 // 2]
    if _is_tuned(config):
        wanted.append(math.ceil(2 * config.floor_scale) + BEYOND_EDGE)
    return max(wanted, default=LONGEST)


def _is_tuned(config: Llama4Config) -> bool:
    return config.attn_temperature_tuning and 0 in config.no_rope_layers


def _adversarial(
    config: Llama4Config, reach: int, pick_one_way: Callable[[int], OneWay | None] | None
) -> tuple[list[Sequence], list[str]]:
    random = np.random.default_rng((SEED, BUILT_IN.index("adversarial")))
    vocabulary, chunk = config.vocab_size, config.attention_chunk_size
    a, b = (int(token) for token in random.permutation(min(vocabulary, 2**20))[[0, -1]])
    crosses = chunk is not None and chunk < reach
    length = min(reach, (chunk if chunk is not None and crosses else BEYOND_EDGE) + BEYOND_EDGE)
    over = ", over a chunk's edge" if crosses else ""
    sequences = [
        _labelled(f"token {a} alone", [a]),
        _labelled(f"token {a} again and again{over}", [a] * length),
        _labelled(f"last and first token id, {vocabulary - 1} and 0", [vocabulary - 1, 0] * 4)
        if reach >= 8
        else _labelled(f"last token id, {vocabulary - 1}", [vocabulary - 1]),
        _labelled(f"tokens {a} and {b} in turn{over}", ([a, b] * length)[:length]),
    ]
    if pick_one_way is None:
        return sequences, ["set 'adversarial': no sequence that all goes to one expert was looked for"]
    found = pick_one_way(min(reach, ONE_WAY, ONE_WAY if chunk is None else chunk + BEYOND_EDGE))
    if found is None:
        return sequences, ["set 'adversarial': the model has no experts, so none that all tokens could go to"]
    sequences.append(_labelled(f"{found.share:.0%} to expert {found.expert} of {found.module}", found.tokens))
    return sequences, [found.note]


def not_exercised(config: Llama4Config, sequences: Iterable[Sequence]) -> list[str]:
    """Notes on what of the model no sequence is long enough for."""
    length = max((len(sequence.tokens) for sequence in sequences), default=0)
    notes = []
    if config.attention_chunk_size is not None and length <= config.attention_chunk_size:
        notes.append(
            f"not exercised: the edge of a chunk ({config.attention_chunk_size} tokens); give a longer --length"
        )
    if _is_tuned(config) and length < config.floor_scale:
        notes.append(
            f"not exercised: temperature tuning (from {config.floor_scale:g} tokens on); give a longer --length"
        )
    return notes
