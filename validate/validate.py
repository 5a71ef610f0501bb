"""``validate``: holds one model to another on the same tokens, and says where they part. See ARCHITECTURE.md.

1. The reference is run layer by layer, free-running, and what it computes is kept on disk.
2. The engine runs as it is: prefill, decoding over a chunk's edge, greedy continuation, KV cache.
3. Its layers, cut out, are fed the reference's inputs (teacher-forced).
4. The engine, marked, gives out the values in between; the reference's layers are fed its inputs (inverse).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np

from shuntyard.engines.tensorrt_runner import check_gpu
from shuntyard.errors import EngineError, NotFiniteError, ShuntyardError, UnsupportedError
from shuntyard.exporter.config import Llama4Config
from shuntyard.exporter.output import output_directory, refuse_existing
from shuntyard.validate import greedy, polygraphy_json
from shuntyard.validate.activations import described
from shuntyard.validate.bisect import first_diverging
from shuntyard.validate.bounds import WHOLE, Bounds, Override
from shuntyard.validate.files import check_files
from shuntyard.validate.inputs import Inputs as Inputs
from shuntyard.validate.inputs import make_sequences
from shuntyard.validate.judge import judge_cache, judge_logits, judge_modules
from shuntyard.validate.layers import Masks, Walk, before_ties, walk_inverse, walk_stack, walk_whole
from shuntyard.validate.logits import LogitStatistics
from shuntyard.validate.metrics import kl
from shuntyard.validate.record import Recording, cached_recording
from shuntyard.validate.report import Check, Report
from shuntyard.validate.subjects import Subject, open_subject
from shuntyard.validate.tolerances import CODES, ORDER
from shuntyard.validate.values import PARTS, Array, Sequence, module_name
from shuntyard.validate.views import fill_in
from shuntyard.validate.whole import WholeRun, decode_split, run_whole


@dataclass(frozen=True)
class Plan:
    """What to run, on what."""

    inputs: Inputs = field(default_factory=Inputs)
    decode: int = 96  # tokens fed and generated one at a time, or more if a chunk's edge lies further back
    allow_other_files: bool = False  # the reference's may be other files than those that the engine was built from
    shipped_only: bool = False  # the engine as it is and nothing else: no layer alone, no output marked
    by_layers: bool = False  # never the whole engine: memory is one layer's
    cache: Path | None = None  # directory of reference activations that later runs take up
    overrides: tuple[Override, ...] = ()
    polygraphy_save: Path | None = None  # new directory: inputs.json and outputs.json for ``polygraphy run``
    polygraphy_load: Path | None = None  # outputs that ``polygraphy run`` saved: judged in place of the engine's own


def validate(
    engine: str, reference: str, plan: Plan | None = None, say: Callable[[str], None] = lambda line: None
) -> Report:
    """Compares and judges. The verdict is in the report; a failed comparison is no exception.

    Args:
        engine: an engine directory, or another model by its prefix (``subjects.py``).
        reference: the same; a directory without a prefix that is no engine is run by transformers.
        plan: how much is compared.
        say: gets lines of progress.

    Raises:
        EngineError: one of the two cannot be opened or run, or there is nothing to compare on.
        CheckpointError: a checkpoint is broken, or a weight is not finite.
        UnsupportedError: the two cannot be compared in the way that is asked for.
    """
    plan = plan or Plan()
    subject = open_subject(engine, default="engine")
    other = open_subject(reference, default="transformers")
    _check_alike(subject, other)
    _check_possible(subject, other, plan)
    _check_overrides(subject.config, plan)
    context = min(
        (s.manifest.limits.max_context for s in (subject, other) if s.manifest),
        default=subject.config.max_position_embeddings,
    )
    sequences, notes = make_sequences(plan.inputs, subject, other, context)
    report = Report(engine, reference, subject.backend, subject.dtype, sum(len(s.tokens) for s in sequences))
    report.layers, report.notes, report.facts = subject.config.num_hidden_layers, notes, subject.facts
    before = len(report.notes)
    is_source = check_files(report, subject, other, allow_other=plan.allow_other_files)
    if not report.failures:
        return _compared(report, subject, other, plan, sequences, say, before=before, is_source=is_source)
    try:
        return _compared(report, subject, other, plan, sequences, say, before=before, is_source=is_source)
    except ShuntyardError as error:  # it may well follow from the files, which are what is to be seen first
        report.checks.append(Check("run: to its end", "no", "yes", False, error.message))
        return report


def _compared(
    report: Report,
    subject: Subject,
    other: Subject,
    plan: Plan,
    sequences: list[Sequence],
    say: Callable[[str], None],
    *,
    before: int,
    is_source: bool,
) -> Report:
    """Runs both, and judges; remarks go to place ``before`` of the notes."""
    formats = subject.dtype, other.dtype
    if not is_source:
        _check_caches(subject, other)
        noise = CODES[max(formats, key=ORDER.index)].noise
        subject, other = subject.rounding(other, noise), other.rounding(subject, noise)
    bounds = Bounds(formats, list(plan.overrides), fp8=bool(subject.activations), alike=not is_source)
    report.notes[before:before] = _remarks(subject, other, bounds, plan, len(sequences))
    say(f"{len(sequences)} sequences, {report.tokens} tokens")
    if plan.polygraphy_save is not None:
        report.notes += _save_for_polygraphy(subject, sequences, plan.polygraphy_save)
    with _record(other, sequences, plan, say) as recording:
        look = _Look(report, bounds, subject, other, recording, plan, say)
        look.run()
        fill_in(report, subject, other, recording, look.prefill, look.walks)
    report.notes += bounds.notes()
    if not bounds.judges:
        report.unjudged = NOT_JUDGED
    return report


NOT_JUDGED = (
    "what the recipe costs was measured, and held to nothing: give --tolerances or --baseline, or hold the engine to "
    "the model directory"
)


def _remarks(subject: Subject, other: Subject, bounds: Bounds, plan: Plan, sequences: int) -> list[str]:
    """What a reader of the verdict should know of what was compared."""
    said = []
    if not bounds.alike:
        said.append(
            "the reference is the checkpoint that the engine was quantised from: what differs is what the recipe "
            "costs, and is not judged, but for the bounds that you give; hold the engine to the model directory to "
            "judge the engine itself"
        )
        if subject.activations:
            where = described(subject.activations)
            said.append(f"the reference does not round activations to FP8 numbers, as the engine does in {where}")
    elif other.activations:
        said.append(f"the reference rounds activations to FP8 numbers, too: in {described(other.activations)}")
    if bounds.format != subject.dtype:
        said.append(f"bounds are those of {bounds.format}, the reference's format")
    if subject.spec == other.spec:
        said.append("the engine was compared with itself")
    manifest = subject.manifest
    if manifest is not None and manifest.marked:
        said.append("this is a marked engine, to look into: the one that is used is another, and was not looked at")
    if plan.shipped_only:
        said.append("no layer was looked at (--shipped-only): faults that logits do not show are not seen")
    if manifest is not None and not plan.by_layers and sequences < manifest.limits.max_batch:
        said.append(f"not exercised: batches of more than {sequences} of {manifest.limits.max_batch} sequences")
    return said


def _check_overrides(config: Llama4Config, plan: Plan) -> None:
    """Before anything is run: an entry that meets no module is a mistake."""
    known = [WHOLE, "model.embed_tokens", "lm_head"]
    known += [module_name(layer, part) for layer in range(config.num_hidden_layers) for part in PARTS]
    for override in plan.overrides:
        if not any(fnmatchcase(name, override.module) for name in known):
            raise EngineError(
                f"tolerance for '{override.module}': there is no such module here",
                hint="modules are called as in the report",
            )


def _check_alike(a: Subject, b: Subject) -> None:
    """Whether the two are of one shape: the rest is for the comparison to find."""
    for key in (
        "vocab_size",
        "num_hidden_layers",
        "hidden_size",
        "num_local_experts",
        "num_key_value_heads",
        "head_dim",
    ):
        mine, theirs = getattr(a.config, key), getattr(b.config, key)
        if mine != theirs:
            raise EngineError(
                f"{a.path}: has {key} {mine}, {b.path} has {theirs}",
                hint="give the checkpoint that the engine was built from",
            )
    if list(a.config.moe_layers) != list(b.config.moe_layers):
        raise EngineError(
            f"{a.path} and {b.path} have experts in other layers",
            hint="give the checkpoint that the engine was built from",
        )


def _check_caches(subject: Subject, other: Subject) -> None:
    """Refuses FP8 KV caches, which no reference rounds: a right engine would be told to be wrong."""
    for side in (subject, other):
        if side.fp8_kv_cache:
            raise UnsupportedError(
                f"{side.path}: caches FP8 numbers in {len(side.fp8_kv_cache)} layers, and the reference does not round "
                "what it caches: the two differ by that",
                hint="give the checkpoint that it was quantised from to see what the recipe costs; or a recipe without "
                "kv_cache",
            )


def _check_possible(subject: Subject, other: Subject, plan: Plan) -> None:
    if other.make_stack is None:
        raise UnsupportedError(
            f"{other.spec}: a TensorRT plan cannot be run layer by layer, as a reference must be",
            hint="hold both engines to the checkpoint, or this one as ENGINE to the other",
        )
    if subject.manifest is not None and subject.manifest.backend != "onnxruntime":
        check_gpu(subject.path, subject.manifest)  # now, and not after the reference has run
    if (plan.polygraphy_save or plan.polygraphy_load) and subject.kind not in ("engine", "graph"):
        raise UnsupportedError(f"{subject.spec}: Polygraphy runs engines and graphs", hint="give ENGINE or graph:MODEL")
    if plan.polygraphy_load and subject.manifest is None:
        raise UnsupportedError(f"{subject.spec}: is no engine", hint="build an engine and give that")
    if plan.by_layers and plan.shipped_only:
        raise UnsupportedError("the engine is to be run whole and never whole", hint="ask for one of the two")
    if plan.by_layers and subject.make_stack is None:
        raise UnsupportedError(
            f"{subject.spec}: a TensorRT plan cannot be run layer by layer", hint="leave out --by-layers"
        )
    if plan.shipped_only and subject.manifest is None:
        raise UnsupportedError(f"{subject.spec}: is no engine that is shipped", hint="leave out --shipped-only")


def _record(other: Subject, sequences: list[Sequence], plan: Plan, say: Callable[[str], None]) -> Recording:
    assert other.make_stack is not None
    if other.kind in ("graph", "engine"):
        for name, what in other.make_stack().wiring():
            raise EngineError(f"{other.path}: {name} {what}", hint="a graph that is wired so is no reference")
    return cached_recording(other.make_stack, other.key, sequences, plan.cache, say)


def _save_for_polygraphy(subject: Subject, sequences: list[Sequence], path: Path) -> list[str]:
    """``inputs.json``, and of an engine ``outputs.json``, in a new directory that appears whole."""
    refuse_existing(path)
    interface = polygraphy_json.Interface.of(subject.path)
    with output_directory(path) as directory:
        notes = polygraphy_json.save_inputs(directory / "inputs.json", sequences, interface)
        if subject.manifest is not None:
            outputs = polygraphy_json.first_calls(subject.open(), sequences, interface)
            runner = f"shuntyard-{subject.backend}-{subject.dtype}"
            polygraphy_json.save_outputs(directory / "outputs.json", outputs, runner)
    return notes


class _Look:
    """The looks at one engine, one after the other."""

    def __init__(
        self,
        report: Report,
        bounds: Bounds,
        subject: Subject,
        other: Subject,
        recording: Recording,
        plan: Plan,
        say: Callable[[str], None],
    ) -> None:
        self.report, self.bounds, self.subject, self.other = report, bounds, subject, other
        self.recording, self.plan, self.say = recording, plan, say
        self.sequences = list(recording.sequences)
        self.prefill = LogitStatistics()
        self.walks: list[Walk] = []
        self.decoded: dict[int, Array] = {}  # logits of the shipped engine, by row
        everything: Masks = [np.ones(len(s.tokens), bool) for s in self.sequences]
        self.masks = [everything] * (subject.config.num_hidden_layers + 1)
        if bounds.format == "fp32" and not bounds.fp8 and bounds.alike:
            self.masks = before_ties(recording, subject.config, bounds)

    @property
    def _looks_at_layers(self) -> bool:
        plan, subject = self.plan, self.subject
        if plan.shipped_only or plan.polygraphy_load is not None:
            return False
        return subject.make_stack is not None or subject.can_be_marked

    def run(self) -> None:
        """All looks that the plan and the two models allow; fills the report's checks."""
        if self.plan.polygraphy_load is not None:
            self._loaded(self.plan.polygraphy_load)
            return
        whole = self.subject.manifest is not None and not self.plan.by_layers
        if whole:
            self._shipped()
        if not self.plan.shipped_only:
            if self.subject.make_stack is not None:
                self._forced(free=not whole)
            if whole and self.subject.can_be_marked:
                self._marked()
            elif whole:
                self.report.notes.append(
                    "no layer was looked at: a TensorRT plan shows its inside only if it was built with --mark"
                )
        self.report.culprit, self.report.culprit_mode = first_diverging(self.walks)
        judge_modules(self.report, self.walks, self.bounds)
        if not self.report.culprit:  # what is wired wrongly can be right by itself, and in all that is run
            wired = [check.module for check in self.report.checks if check.name.startswith("wiring: ")]
            self.report.culprit, self.report.culprit_mode = (wired[0], "free") if wired else ("", "")

    def _shipped(self) -> None:
        """The engine as it is: nothing marked."""
        engine = self.subject.open()
        rows = list(range(len(self.sequences)))
        self.say("the engine as it is: prefill")
        self._logits_and_cache("prefill", self.prefill, lambda: run_whole(engine, self.sequences, rows), 0)
        decoded, split = self._decoded_rows()
        if not decoded:
            self.report.notes.append("not exercised: decoding; give a longer sequence")
            return
        self.say(f"the engine as it is: decoding from token {split} on")
        statistics = LogitStatistics()
        self._logits_and_cache("decode", statistics, lambda: run_whole(engine, self.sequences, decoded, split), split)
        self.say("the engine as it is: greedy continuation")
        try:
            greedy.compare(
                self.report,
                self.bounds,
                engine,
                self.other,
                self.sequences,
                decoded,
                split,
                self.plan.decode,
                self.plan.cache,
            )
        except NotFiniteError as error:
            self.report.checks.append(Check("greedy: logits finite", "no", "all", False, error.hint))

    def _decoded_rows(self) -> tuple[list[int], int]:
        """The longest sequences, two at least, be it one twice: a batch; and from where on they are decoded."""
        assert self.subject.manifest is not None
        size = self.subject.manifest.limits.max_batch
        order = sorted(range(len(self.sequences)), key=lambda row: -len(self.sequences[row].tokens))
        longest = len(self.sequences[order[0]].tokens)
        split = decode_split(self.subject.config, longest, self.plan.decode)
        rows = [row for row in order[: max(1, size)] if len(self.sequences[row].tokens) > split]
        return (rows * 2 if len(rows) == 1 and size > 1 else rows), split

    def _logits_and_cache(
        self, part: str, statistics: LogitStatistics, run: Callable[[], Iterable[WholeRun]], first: int
    ) -> None:
        logits = self.recording.logits()
        runs: list[WholeRun] = []
        try:
            for found in run():
                statistics.add(found.sequence, logits[found.row][: found.length], found.logits, first)
                if first:
                    self.decoded[found.row] = found.logits
                found.logits = found.logits[:0]  # the largest values of all, and not needed any more
                runs.append(found)
        except NotFiniteError as error:
            self.report.checks.append(Check(f"{part}: logits finite", "no", "all", False, error.hint))
            return
        keep = [self.masks[-1][found.row] for found in runs]
        judge_logits(self.report, part, statistics, self.bounds, keep, layers=self._looks_at_layers)
        judge_cache(self.report, part, self.recording, runs, self.bounds, self.masks)

    def _loaded(self, path: Path) -> None:
        """Outputs of the engine that Polygraphy ran: the first call of each sequence."""
        interface = polygraphy_json.Interface.of(self.subject.path)

        def read() -> list[WholeRun]:
            found = polygraphy_json.load_outputs(path, self.sequences, interface)
            rows = zip(found, self.sequences, strict=True)
            return [WholeRun(i, s, f.logits, list(f.keys), list(f.values), {}) for i, (f, s) in enumerate(rows)]

        self.report.notes.append(f"the outputs are from {path}: the engine was not run")
        self._logits_and_cache("polygraphy", self.prefill, read, 0)

    def _forced(self, *, free: bool) -> None:
        """Layers alone; with ``free`` they also run on their own, and give the logits of the whole."""
        assert self.subject.make_stack is not None
        self.say("layers alone, fed the reference's inputs")
        stack = self.subject.make_stack()
        for name, what in stack.wiring():
            self.report.checks.append(Check(f"wiring: {name}", what, "as the model is", False, "in the graph", name))
        count = self.subject.config.num_hidden_layers
        reference = self.recording.logits()

        def on_logits(row: int, logits: Array) -> None:
            self.prefill.add(self.sequences[row], reference[row], logits)

        self.walks += walk_stack(
            stack,
            self.recording,
            self.bounds,
            free=free,
            masks=self.masks,
            on_logits=on_logits,
            progress=lambda layer: self.say(f"layer {layer + 1} of {count}") if count > 8 else None,
        )
        if free and self.prefill.sequences:
            judge_logits(self.report, "logits", self.prefill, self.bounds, self.masks[-1], layers=True)
        elif free:
            self.report.checks.append(Check("logits: finite", "no", "all", False, "a layer's output is not finite"))

    def _marked(self) -> None:
        """The whole engine with its values in between, decoding included."""
        assert self.other.make_stack is not None
        self.say("the engine marked, and the reference's layers fed its inputs")
        decoded, split = self._decoded_rows()
        rows = list(dict.fromkeys(decoded)) or list(range(len(self.sequences)))
        try:
            runs = list(run_whole(self.subject.open(marked=True), self.sequences, rows, split if decoded else None))
        except NotFiniteError as error:
            self.report.checks.append(Check("inverse: logits finite", "no", "all", False, error.hint))
            return
        # What is found in the marked engine is said of the one that is shipped: they must be the same.
        same = [kl(self.decoded[run.row], run.logits) for run in runs if run.row in self.decoded]
        if same:
            mean = max(0.0, float(np.concatenate(same).mean()))
            self.report.at_most("marked: mean KL from the engine as it is", mean, self.bounds.itself.mean_kl)
        self.walks.append(walk_whole(runs, self.recording, self.bounds, self.subject.config, self.masks))
        self.walks.append(walk_inverse(runs, self.other.make_stack(), self.bounds))
