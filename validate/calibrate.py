"""``calibrate``: which range of values each module's inputs take when the reference runs over a text.

The reference is transformers' own, a layer at a time (``reference.py``), so memory is one layer's weights, the hidden
states of all windows (4 bytes a value), and what ``calibrate_ranges.py`` keeps of the layer's modules.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import shuntyard
from shuntyard.errors import EngineError, NotFiniteError
from shuntyard.exporter.calibration import Calibration
from shuntyard.exporter.checkpoint import open_checkpoint
from shuntyard.exporter.config import Llama4Config
from shuntyard.exporter.modules import Module, attentions, modules
from shuntyard.validate.calibrate_ranges import HINT_VALUES, Method, Range
from shuntyard.validate.inputs import windows_of
from shuntyard.validate.outputs import check_place, write_new
from shuntyard.validate.reference import UNKNOWN_TRANSFORMERS, LayeredReference
from shuntyard.validate.values import Array, Sequence

WINDOWS = 32
"""By default."""

LARGEST_DIFFERENCE = 1e-3
"""Between an expert's output as transformers gives it and from the hidden rows that are recorded, over the largest."""

Line = Callable[[str], None]


def _quiet(_line: str) -> None:
    return None


def calibrate(
    checkpoint: Path,
    out: Path,
    text: Path,
    method: Method | None = None,
    *,
    windows: int = WINDOWS,
    length: int | None = None,
    say: Line = _quiet,
    warn: Line = _quiet,
) -> Calibration:
    """Runs the reference over windows of a text and writes the clip of each module's inputs to the new file ``out``.

    Args:
        checkpoint: its directory; where weights are quantised, they are dequantised.
        out: a new file; it appears whole.
        text: UTF-8.
        method: how a clip is chosen; the largest magnitude by default.
        windows: of the text, at most.
        length: tokens a window; by default 3.5 chunks, at most 512 and the model's context.
        say: gets lines of progress.
        warn: gets what a reader of the file should know.

    Raises:
        OutputError: ``out`` exists, or cannot be written to.
        CheckpointError: the checkpoint, its tokenizer or the text is broken or missing.
        EngineError: the text is too short, or transformers is missing or not understood.
        NotFiniteError: the reference computes NaN or infinity; names the module.
    """
    method = method or Method()
    check_place(out)
    opened = open_checkpoint(checkpoint)
    sequences = windows_of(text, checkpoint, opened.config, windows, length, warn)
    found = Ranges(opened.config, method)
    reference = run_watched(checkpoint, sequences, found, say)
    calibration = Calibration(
        shuntyard=shuntyard.__version__,
        checkpoint_fingerprint=opened.fingerprint,
        small_tensors_sha256=opened.small_tensors_sha256(),
        text=text.name,
        text_sha256=hashlib.sha256(text.read_bytes()).hexdigest(),
        tokens=sum(len(sequence.tokens) for sequence in sequences),
        windows=len(sequences),
        length=len(sequences[0].tokens),
        method=str(method),
        reference=reference,
        inputs=found.inputs,
        keys=found.keys,
        values=found.values,
        unreached=found.unreached,
        zero=found.zero,
    )
    _warn_of(calibration, opened.config, warn)
    write_new(out, calibration.model_dump_json(indent=1) + "\n")
    return calibration


def _warn_of(calibration: Calibration, config: Llama4Config, warn: Line) -> None:
    if calibration.unreached:
        total = len(config.moe_layers) * config.num_local_experts
        warn(
            f"{len(calibration.unreached)} of {total} experts were reached by no token, as "
            f"{calibration.unreached[0]}: they have the largest clip of their layer's; give more --windows or another "
            "--text"
        )
    if calibration.zero:
        warn(f"{len(calibration.zero)} modules got nothing but zero, as {calibration.zero[0]}: their clip is 1")


class Ranges:
    """What was found of each module: clips of the layers that are done, and of one layer what comes in."""

    def __init__(self, config: Llama4Config, method: Method) -> None:
        self.config, self.method = config, method
        self.inputs: dict[str, float] = {}
        self.keys: dict[str, float] = {}
        self.values: dict[str, float] = {}
        self.unreached: list[str] = []
        self.zero: list[str] = []
        self.open: dict[str, Range] = {}

    def add(self, name: str, values: Tensor | Array) -> None:
        """More values, by a name of the caller's."""
        array = values.detach().numpy() if isinstance(values, Tensor) else values
        if name not in self.open:
            self.open[name] = Range(name, self.method)
        self.open[name].add(array)

    def close_linear(self, module: Module, tokens: int) -> None:
        """The clip of a Linear, each of whose inputs was to come once."""
        own = self._taken(module.name)
        if own.count != tokens * module.shapes[0][1]:
            raise EngineError(
                f"transformers' layer gives '{module.name}' {own.count} values for {tokens} tokens",
                hint=UNKNOWN_TRANSFORMERS,
            )
        self.inputs[module.name] = self._clip(own)

    def close_cache(self, attention: str) -> None:
        """The clips of an attention's keys and values."""
        self.keys[attention] = self._clip(self._taken(f"{attention}.key"))
        self.values[attention] = self._clip(self._taken(f"{attention}.value"))

    def close_experts(self, module: Module) -> None:
        """The clips of a layer's experts; gate and up have the same input."""
        into = [self._taken(f"{module.name}.{e}.gate_proj") for e in range(module.copies)]
        hidden = [self._taken(f"{module.name}.{e}.down_proj") for e in range(module.copies)]
        clips = []
        for ranges in (into, hidden):
            own = [each.clip() for each in ranges]
            largest = max((clip for clip, each in zip(own, ranges, strict=True) if not each.is_zero), default=1.0)
            clips.append([clip if each.count else largest for clip, each in zip(own, ranges, strict=True)])
        for e in range(module.copies):
            for part, ranges, own in (("gate", into, clips[0]), ("up", into, clips[0]), ("down", hidden, clips[1])):
                name = f"{module.name}.{e}.{part}_proj"
                self.inputs[name] = own[e]
                if ranges[e].is_zero and (ranges[e].count or all(each.is_zero for each in ranges)):
                    self.zero.append(name)
            if not into[e].count:
                self.unreached.append(f"{module.name}.{e}")

    def _taken(self, name: str) -> Range:
        """What came by this name; its counts are needed no longer."""
        return self.open.pop(name, None) or Range(name, self.method)

    def _clip(self, own: Range) -> float:
        if own.is_zero:
            self.zero.append(own.name)
        return own.clip()


def run_watched(checkpoint: Path, sequences: list[Sequence], found: Ranges, say: Line = _quiet) -> str:
    """Runs the reference over all sequences, layer by layer; fills ``found``, and says what the reference is."""
    stack = WatchedReference(checkpoint, found)
    config, tokens = stack.config, sum(len(sequence.tokens) for sequence in sequences)
    by_layer: dict[int | None, list[Module]] = {}
    for module in modules(config):
        if module.can_be_quantised:
            by_layer.setdefault(module.layer, []).append(module)
    hidden = list(stack.embed([sequence.tokens for sequence in sequences]))
    for i, attention in enumerate(attentions(config)):
        say(f"{stack.label}: layer {i + 1} of {config.num_hidden_layers}, {tokens} tokens")
        for row, own in enumerate(stack.layer(i, hidden)):
            hidden[row] = own.hidden  # in place: what the layer has read it reads no more
            found.add(f"{attention}.key", own.key)
            found.add(f"{attention}.value", own.value)
        for module in by_layer[i]:
            if module.kind == "experts":
                found.close_experts(module)
            else:
                found.close_linear(module, tokens)
        found.close_cache(attention)
    for module in by_layer.get(None, []):
        say(f"{stack.label}: {module.name}")
        stack.run_head(hidden)
        found.close_linear(module, tokens)
    return stack.label


class WatchedReference(LayeredReference):
    """transformers' layers, with hooks that give the inputs of their modules to ``found``."""

    def __init__(self, checkpoint: Path, found: Ranges) -> None:
        super().__init__(checkpoint)
        self._found = found

    def _load(self, index: int) -> Any:
        layer = super()._load(index)
        for module in modules(self.config):
            if module.layer != index or not module.can_be_quantised:
                continue
            own = self._part(layer, module.name.removeprefix(f"model.layers.{index}."))
            if module.kind == "experts":
                watch = _Experts(module.name, self._found)
                self._part(layer, "feed_forward.router").register_forward_hook(watch.route)
                own.register_forward_hook(watch.run)
            else:
                own.register_forward_pre_hook(partial(self._note, module.name))
        return layer

    def run_head(self, hidden: list[Array]) -> None:
        """Final norm and ``lm_head``, for what goes into the latter."""
        handle = self._model.lm_head.register_forward_pre_hook(partial(self._note, "lm_head"))
        try:
            for _logits in self.head(hidden):
                pass
        finally:
            handle.remove()

    def _note(self, name: str, _module: Any, arguments: tuple[Any, ...]) -> None:
        self._found.add(name, arguments[0])

    def _part(self, layer: Any, name: str) -> Any:
        try:
            return layer.get_submodule(name)
        except AttributeError as error:
            raise EngineError(f"{self.label}: its layer has no '{name}'", hint=UNKNOWN_TRANSFORMERS) from error


class _Experts:
    """Hooks of a layer's router and of its experts, which transformers runs densely: on all tokens, ``[E * S, H]``.

    The rows of tokens that are not routed to an expert are zero, and do not count.
    """

    def __init__(self, module: str, found: Ranges) -> None:
        self._module, self._found = module, found
        self._chosen: Tensor | None = None  # bool [S, E]

    def route(self, router: Any, _arguments: Any, output: Any) -> None:
        """Notes which experts each token goes to, as the router itself finds them."""
        scores, logits = output
        if not torch.isfinite(logits).all():
            raise NotFiniteError(f"the reference: {self._module}: the router's logits are not finite", hint=HINT_VALUES)
        chosen = torch.zeros_like(logits, dtype=torch.bool)
        chosen.scatter_(1, torch.topk(logits, router.top_k, dim=1).indices, True)
        if (scores[~chosen] != 0).any():
            raise EngineError(
                f"'{self._module}': the router gives scores to other experts than those of the largest logits",
                hint=UNKNOWN_TRANSFORMERS,
            )
        self._chosen = chosen

    def run(self, experts: Any, arguments: Any, output: Tensor) -> None:
        """Records, of each expert, the rows that go in, and the hidden ones that go into ``down_proj``."""
        assert self._chosen is not None
        count = self._chosen.shape[1]
        inputs, outputs = (each.view(count, -1, each.shape[-1]) for each in (arguments[0], output))
        for e in range(count):
            rows = inputs[e][self._chosen[:, e]]
            if not len(rows):
                continue
            gate, up = (rows @ experts.gate_up_proj[e]).chunk(2, dim=-1)
            hidden = up * experts.act_fn(gate)
            self._found.add(f"{self._module}.{e}.gate_proj", rows)
            self._found.add(f"{self._module}.{e}.down_proj", hidden)
            # The hidden rows are computed a second time here: that they are transformers' own is seen by what follows.
            theirs = outputs[e][self._chosen[:, e]]
            difference = (hidden @ experts.down_proj[e] - theirs).abs().max()
            if difference > LARGEST_DIFFERENCE * theirs.abs().max():
                raise EngineError(
                    f"'{self._module}': expert {e} computes something else than silu(gate) * up",
                    hint=UNKNOWN_TRANSFORMERS,
                )
        self._chosen = None
