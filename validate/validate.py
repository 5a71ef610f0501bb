"""``validate``: holds an engine to the PyTorch reference on a text.

Three comparisons, all on the same tokens and from an empty cache:

1. Prefill: windows of the text, all logits, perplexity of both.
2. Decode: the same logits when the last tokens of a window are fed one at a time, over a chunk's edge.
3. Greedy: both generate from the same prompts, the engine from a ragged batch of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from shuntyard.engines.engine import Engine, open_engine
from shuntyard.engines.manifest import sha256_of
from shuntyard.engines.text import Tokenizer
from shuntyard.errors import EngineError, NotFiniteError
from shuntyard.exporter.checkpoint import Checkpoint, open_checkpoint
from shuntyard.exporter.values import check_finite
from shuntyard.exporter.weights import match_weights
from shuntyard.validate import metrics
from shuntyard.validate.dequantise import dequantised_state
from shuntyard.validate.reference import Reference
from shuntyard.validate.report import Check, Report
from shuntyard.validate.tolerances import TOLERANCES, Tolerance

Tokens = NDArray[np.int64]

LONGEST_WINDOW = 512
"""Default bound on a window: the reference runs every expert on every token."""


@dataclass(frozen=True)
class Plan:
    """How much to compare."""

    windows: int = 8
    length: int | None = None  # tokens of a window; default 3.5 chunks, at most LONGEST_WINDOW and the context
    decode: int = 96  # tokens fed and generated one at a time, or more if a chunk's edge lies further back
    allow_other_files: bool = False  # the reference's may be other files than those that the engine was built from


def validate(
    engine_path: Path,
    checkpoint_path: Path,
    text: str,
    plan: Plan | None = None,
    report_line: Callable[[str], None] = lambda line: None,
) -> Report:
    """Compares and judges. The verdict is in the report; a failed comparison is no exception.

    Raises:
        EngineError: the engine cannot be opened, or the text is too short.
        CheckpointError: the reference cannot be loaded, or a weight is not finite.
    """
    plan = plan or Plan()
    engine = open_engine(engine_path, verify=True)
    checkpoint = open_checkpoint(checkpoint_path)
    check_finite(match_weights(checkpoint))
    tolerance = TOLERANCES[engine.manifest.dtype]
    if engine.manifest.vocab_size != checkpoint.config.vocab_size:
        raise EngineError(
            f"{engine_path}: has a vocabulary of {engine.manifest.vocab_size}, {checkpoint_path} one of "
            f"{checkpoint.config.vocab_size}",
            hint="give the checkpoint that the engine was built from",
        )
    tokenizer = Tokenizer.from_directory(checkpoint_path)
    windows, split = _windows(tokenizer.encode(text), engine, checkpoint, plan)
    report = Report(
        str(engine_path), str(checkpoint_path), engine.manifest.backend, engine.manifest.dtype, int(windows.size)
    )
    _check_files(report, engine, checkpoint, plan)
    _note_what_is_not_exercised(report, engine, checkpoint, windows.shape[1])
    if plan.length is not None and windows.shape[1] < plan.length:
        report.notes.append(f"windows are {windows.shape[1]} tokens, the engine's context, not {plan.length}")
    if len(windows) < plan.windows:
        report.notes.append(f"the text holds {len(windows)} such windows, not {plan.windows}")
    reference = Reference(checkpoint_path)
    report_line(f"{len(windows)} windows of {windows.shape[1]} tokens")
    expected = np.concatenate([reference.logits(window[None]) for window in windows])
    size = engine.manifest.limits.max_batch
    batches = [windows[i : i + size] for i in range(0, len(windows), size)]
    report_line("prefill")
    prefilled = _logits(report, "prefill", lambda: np.concatenate([engine.logits(batch) for batch in batches]))
    if prefilled is not None:
        _compare("prefill", report, tolerance, expected, prefilled, windows)
    report_line(f"decoding {windows.shape[1] - split} tokens")
    rows = np.arange(min(size, max(2, len(windows)))) % len(windows)  # a batch, be it of one window twice
    decoded = _logits(report, "decode", lambda: engine.logits(windows[rows], decode_from=split)[:, split:])
    if decoded is not None:
        _compare("decode", report, tolerance, expected[rows, split:], decoded, windows[rows, split:], first=split)
        _compare_greedy(report, tolerance, engine, reference, windows[rows[:GREEDY], :split], plan.decode)
    return report


GREEDY = 3
"""Sequences that are generated, of three lengths."""


def _logits(report: Report, part: str, run: Callable[[], NDArray[np.float32]]) -> NDArray[np.float32] | None:
    """What the engine computes; None, and a failed check, where that is not finite."""
    try:
        return run()
    except NotFiniteError as error:
        report.checks.append(Check(f"{part}: logits finite", "no", "all", False, error.hint))
        return None


def _windows(tokens: list[int], engine: Engine, checkpoint: Checkpoint, plan: Plan) -> tuple[Tokens, int]:
    """``[windows, length]`` of consecutive text, each opened by the text's first token, and the decode length."""
    context, chunk = engine.manifest.limits.max_context, checkpoint.config.attention_chunk_size
    wanted = plan.length or min(LONGEST_WINDOW, chunk * 7 // 2 if chunk else LONGEST_WINDOW)
    length = min(wanted, context)
    if length < 4:
        raise EngineError(f"windows of {length} tokens are too short to compare", hint="give a larger --length")
    count = min(plan.windows, (len(tokens) - 1) // (length - 1))
    if count < 1:
        raise EngineError(
            f"the text has {len(tokens)} tokens, a window takes {length}", hint="give a longer --text or a --length"
        )
    first, body = tokens[0], tokens[1:]
    rows = [[first, *body[i * (length - 1) : (i + 1) * (length - 1)]] for i in range(count)]
    largest = max(max(row) for row in rows)
    if largest >= checkpoint.config.vocab_size:
        raise EngineError(
            f"{checkpoint.path / 'tokenizer.json'}: gives token {largest}, the model's vocabulary ends before it",
            hint="config.json and tokenizer.json must be of the same checkpoint",
        )
    split = max(2, length - plan.decode)
    edge = 0 if chunk is None else (length - 1) // chunk * chunk
    return np.array(rows, np.int64), split if edge > split or edge == 0 else max(2, edge - 16)


def _check_files(report: Report, engine: Engine, checkpoint: Checkpoint, plan: Plan) -> None:
    """The reference must read what the engine was built from, or the comparison is of two models."""
    manifest = engine.manifest
    if manifest.rewritten_from is not None and manifest.rewritten_from == checkpoint.fingerprint:
        _check_rewritten(report, engine, checkpoint)
        return
    shards = {header.file.name: sha256_of(header.file) for header in checkpoint.headers}
    same = manifest.checkpoint_fingerprint == checkpoint.fingerprint and manifest.checkpoint_sha256 == shards
    if same:
        return
    detail = "the engine was built from other files than the reference reads"
    if plan.allow_other_files:
        report.notes.append(detail)
    else:
        report.checks.append(Check("files: the same", "no", "yes", False, detail))


def _check_rewritten(report: Report, engine: Engine, checkpoint: Checkpoint) -> None:
    """Holds an engine's own weights, written anew in another type or layout, to the reference's, value by value."""
    if not any(name.endswith(".safetensors") for name in engine.manifest.files):
        report.notes.append(
            "the engine's weights were rewritten from a checkpoint of the same names, types and shapes; whether from "
            "these values cannot be seen, for the plan has them in a form of its own"
        )
        return
    theirs, ours = dequantised_state(checkpoint.path), dequantised_state(engine.path)
    types = {stored.entry.dtype for _, stored in match_weights(open_checkpoint(engine.path)).stored()}
    narrow = {"BF16": torch.bfloat16, "F16": torch.float16}
    narrowed = narrow.get(types.pop()) if len(types) == 1 else None
    exact = True
    for name, value in theirs.items():
        rounded = value if narrowed is None else value.to(narrowed).float()
        exact = exact and torch.equal(rounded, value)
        if name not in ours or not torch.equal(ours[name], rounded):
            detail = f"'{name}' of the engine is not what a rewrite of the reference's gives"
            report.checks.append(Check("files: the same values", "no", "yes", False, detail))
            return
    report.checks.append(Check("files: the same values", "yes", "yes", True, "rewritten from the reference"))
    if not exact:
        report.notes.append(
            "the rewrite rounded the weights, and the reference has them as they were: hold the engine to the model "
            "directory to judge the engine alone"
        )


def _note_what_is_not_exercised(report: Report, engine: Engine, checkpoint: Checkpoint, length: int) -> None:
    config = checkpoint.config
    if config.attention_chunk_size is not None and length <= config.attention_chunk_size:
        report.notes.append(
            f"not exercised: the edge of a chunk ({config.attention_chunk_size} tokens); give a longer --length"
        )
    has_nope = 0 in config.no_rope_layers
    if config.attn_temperature_tuning and has_nope and length < config.floor_scale:
        report.notes.append(
            f"not exercised: temperature tuning (from {config.floor_scale:g} tokens on); give a longer --length"
        )


def _compare(
    part: str,
    report: Report,
    tolerance: Tolerance,
    expected: NDArray[np.float32],
    actual: NDArray[np.float32],
    tokens: Tokens,
    first: int = 0,
) -> None:
    """Adds the checks of one part; its tokens are those of the windows from ``first`` on."""
    if not np.isfinite(actual).all():
        place = [int(i) for i in np.argwhere(~np.isfinite(actual))[0]]
        report.checks.append(Check(f"{part}: logits finite", "no", "all", False, f"first at {place}"))
        return
    error, place = metrics.worst(expected, actual)
    where = f"window {place[0]}, token {first + place[1]}, logit {place[2]}"
    report.at_most(f"{part}: max abs error", error, tolerance.max_abs, where)
    report.at_most(f"{part}: mean KL", float(np.maximum(0.0, metrics.kl(expected, actual).mean())), tolerance.mean_kl)
    report.at_least(f"{part}: top-1 agreement", metrics.top1_agreement(expected, actual), tolerance.top1)
    perplexities = []
    for logits in (expected, actual):
        losses = [metrics.negative_log_likelihood(logits[i, :-1], tokens[i, 1:]) for i in range(len(tokens))]
        perplexities.append(float(np.exp(np.mean(losses))))
    theirs, ours = perplexities
    report.at_most(
        f"{part}: perplexity, relative",
        abs(ours / theirs - 1),
        tolerance.perplexity,
        f"engine {ours:.4f}, reference {theirs:.4f}",
    )


def _compare_greedy(
    report: Report, tolerance: Tolerance, engine: Engine, reference: Reference, prompts: Tokens, count: int
) -> None:
    """Same tokens, or a first difference at a near tie of the reference's best two; prompts of several lengths."""
    count = min(count, engine.manifest.limits.max_context - prompts.shape[1] + 1)
    lengths = [max(1, prompts.shape[1] * (GREEDY - i) // GREEDY) for i in range(len(prompts))]
    batch = engine.generate(prompts, count, lengths, stop=[])
    for prompt, length, ours in zip(prompts, lengths, batch.tolist(), strict=True):
        name = f"greedy: {count} tokens after {length}"
        theirs = reference.generate(prompt[:length].tolist(), count)
        if ours == theirs:
            report.checks.append(Check(name, "equal", "equal", True))
            continue
        place = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
        context = np.concatenate([prompt[:length], np.array(theirs[:place], np.int64)])
        last = np.sort(reference.logits(context[None])[0, -1])
        margin = float(last[-1] - last[-2])
        detail = f"engine {ours[place]}, reference {theirs[place]}, margin {margin:.3g}"
        bound = f"equal, or a margin < {tolerance.tie:g}"
        report.checks.append(Check(name, f"differ at {place}", bound, margin < tolerance.tie, detail))
