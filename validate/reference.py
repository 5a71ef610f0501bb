"""The independent reference: transformers' own Llama 4, in float32, on the checkpoint's files."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from shuntyard.errors import CheckpointError, EngineError
from shuntyard.exporter.config import Llama4Config
from shuntyard.exporter.config_file import ConfigFile, load_config_file
from shuntyard.exporter.quantization import read_quantization
from shuntyard.validate.activations import Activations, RoundedInputs, difference_of, slack_of
from shuntyard.validate.dequantise import (
    IMAGES,
    DequantisedCheckpoint,
    dequantised_state,
    is_taken_apart,
    text_config,
)
from shuntyard.validate.stack import Stack
from shuntyard.validate.values import Array, LayerValues, Tokens

LARGEST_FREQUENCY_ERROR = 2e-6
"""transformers' frequencies are float32: so much may they be off, relatively, and no more."""


def exact_rotation(frequencies: NDArray[np.float64]) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """transformers' ``Llama4TextRotaryEmbedding.forward``, angles in float64: ``[B, S]`` -> complex ``[B, S, D/2]``.

    In float32 an angle is off by up to ``2**-24`` of the position, and the reference drifts away from what it defines:
    by more than the tolerance of fp32 after some hundred tokens, entirely at a context of millions.
    """
    wide = torch.from_numpy(frequencies)

    def forward(_x: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        angles = position_ids[:, :, None].double() * wide
        return torch.polar(torch.ones_like(angles), angles).to(torch.complex64)

    return forward


class Reference:
    """transformers' ``Llama4ForCausalLM``, whole in memory, with eager attention and rotary angles in float64."""

    def __init__(self, checkpoint: Path) -> None:
        transformers = _transformers()
        file, own = _configurations(checkpoint)
        try:
            if read_quantization(checkpoint, file.quantization) is not None or is_taken_apart(checkpoint):
                model: Any = _of_state(transformers.Llama4ForCausalLM, own, dequantised_state(checkpoint))
            else:
                model = _from_files(transformers.Llama4ForCausalLM, own, checkpoint)
        except CheckpointError:
            raise
        except Exception as error:
            raise _cannot_be_loaded(checkpoint, error) from error
        _rotate_exactly(model, file.text, checkpoint)
        model.generation_config = transformers.GenerationConfig()  # greedy is greedy, whatever the checkpoint likes
        self._model: Any = model.eval()

    def logits(self, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        """``[B, S] -> f32 [B, S, V]`` in one forward pass without a cache."""
        with torch.no_grad():
            out: NDArray[np.float32] = self._model(torch.from_numpy(tokens), use_cache=False).logits.numpy()
        return out

    def generate(self, tokens: Sequence[int], max_new_tokens: int) -> list[int]:
        """Greedy continuation of one sequence by transformers' own cache; does not stop at the end token."""
        with torch.no_grad():
            ids = torch.tensor([list(tokens)])
            out = self._model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_new_tokens,
                min_new_tokens=max_new_tokens,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        return [int(token) for token in out[0, len(tokens) :]]


def reference_label(activations: Activations | None = None) -> str:
    """What a ``LayeredReference`` calls itself: ``transformers 5.24.0``."""
    own = f"transformers {_transformers().__version__}"
    return own if activations is None else f"{own}, {activations.label}"


class LayeredReference(Stack):
    """transformers' Llama 4 as ``Reference`` runs it, with one layer's weights in memory at a time.

    The forward passes are transformers' own: of the model, with recorders in its layers' places, for the embedding, the
    head, and the masks, positions and rotation that layers are called with; of each layer, for the rest.

    With ``activations``, the inputs of these modules are rounded to FP8 numbers, and values come with their slack.

    Raises:
        EngineError: transformers is missing, or is none that is understood.
        CheckpointError: a parameter is missing, or of another shape, or a tensor is left over; names it.
    """

    dtype = "fp32"

    def __init__(self, checkpoint: Path, activations: Activations | None = None) -> None:
        transformers = _transformers()
        self.label = reference_label(activations)
        file, self._own = _configurations(checkpoint)
        self.config = file.text
        self._checkpoint, self._weights = checkpoint, DequantisedCheckpoint(checkpoint)
        try:
            with torch.device("meta"):
                model: Any = transformers.Llama4ForCausalLM(self._own)
            model.model.rotary_emb = type(model.model.rotary_emb)(self._own)  # its frequencies are in no file
        except Exception as error:
            raise _cannot_be_loaded(checkpoint, error) from error
        _rotate_exactly(model, self.config, checkpoint)
        self._hold_to_files({name: tuple(tensor.shape) for name, tensor in model.state_dict().items()})
        self._layer_class: Any = type(model.model.layers[0])
        self._cache_argument = _cache_argument(self._layer_class, self.label)
        self._recorders = [_Recorder() for _ in range(self.config.num_hidden_layers)]
        model.model.layers = nn.ModuleList(self._recorders)
        model.model.norm.weight = _parameter(self._weights.outer("model.norm.weight"))
        self._model: Any = model.eval()
        self._rounded = RoundedInputs(activations or Activations({}, 0.0), self._weights)
        self._calls: dict[int, list[dict[str, Any]]] = {}

    def embed(self, sequences: Sequence[Tokens]) -> Iterator[Array]:
        """``i64 [S]`` of each sequence -> hidden ``[S, H]`` of each."""
        with self._filled(self._model.model.embed_tokens, "model.embed_tokens.weight"):
            for tokens in sequences:
                self._forward(input_ids=torch.from_numpy(np.array(tokens, np.int64))[None])
                yield _array(self._recorders[0].hidden[0])

    def layer(self, index: int, hidden: Sequence[Array]) -> Iterator[LayerValues]:
        """Layer ``index`` on the hidden states ``[S, H]`` that go into it, of each sequence."""
        layer = self._load(index)
        for each in hidden:
            yield self._run(layer, index, _tensor(each))

    def head(self, hidden: Sequence[Array]) -> Iterator[Array]:
        """Final norm and ``lm_head``: ``[S, H]`` of each sequence -> logits ``[S, V]`` of each."""
        name = "model.embed_tokens.weight" if self.config.tie_word_embeddings else "lm_head.weight"
        with self._filled(self._model.lm_head, name):
            for each in hidden:
                yield _array(self._logits(_tensor(each))[0])

    def head_slack(self, hidden: Sequence[Array]) -> Iterator[Array] | None:
        """See :class:`Stack`."""
        return self._head_slack(hidden) if "lm_head" in self._rounded else None

    def _head_slack(self, hidden: Sequence[Array]) -> Iterator[Array]:
        with self._filled(self._model.lm_head, "lm_head.weight"):
            for each in hidden:
                yield difference_of(*(_array(logits) for logits in self._logits(_tensor(each))))

    def _logits(self, hidden: Tensor) -> Tensor:
        """``[S, H] -> [1 or 2, S, V]``: two, as they are and as they could be, where the head's input is rounded."""
        # The recorders give on what they get: what remains of the model is its head.
        if "lm_head" not in self._rounded:
            return cast(Tensor, self._forward(inputs_embeds=hidden[None]).logits)
        handle = self._model.lm_head.register_forward_pre_hook(self._rounded.hook("lm_head"))
        try:
            return cast(Tensor, self._forward(inputs_embeds=hidden.expand(2, *hidden.shape)).logits)
        finally:
            handle.remove()

    def _hold_to_files(self, expected: dict[str, tuple[int, ...]]) -> None:
        """Each parameter in the files, each weight of the files a parameter."""
        if self.config.tie_word_embeddings:
            expected = {name: shape for name, shape in expected.items() if name != "lm_head.weight"}
        given = self._weights.shapes
        for what, names in (
            ("missing", expected.keys() - given.keys()),
            ("unexpected", given.keys() - expected.keys()),
        ):
            if names:
                raise CheckpointError(
                    f"{self._checkpoint}: for transformers' model, tensor '{min(names)}' is {what} (of {len(names)})",
                    hint="a reference with uninitialised or ignored weights proves nothing",
                )
        for name, shape in expected.items():
            if given[name] != shape:
                raise CheckpointError(
                    f"{self._checkpoint}: tensor '{name}' has shape {list(given[name])}, in transformers' model "
                    f"{list(shape)}",
                    hint="config.json and the shards must be of the same checkpoint",
                )

    @contextlib.contextmanager
    def _filled(self, module: Any, name: str) -> Iterator[None]:
        """Lends a module its weight; afterwards it has none again."""
        empty = module.weight
        module.weight = _parameter(self._weights.outer(name))
        try:
            yield
        finally:
            module.weight = empty

    def _load(self, index: int) -> Any:
        """transformers' layer, filled."""
        with torch.device("meta"):
            layer = self._layer_class(self._own, index)
        weights = self._weights.layer(index)
        try:
            layer.load_state_dict(weights, strict=True, assign=True)
        except RuntimeError as error:
            raise _cannot_be_loaded(self._checkpoint, error) from error
        self._rounded.apply(layer, index, self.label)
        return layer.requires_grad_(False).eval()

    @torch.no_grad()
    def _forward(self, **inputs: Tensor) -> Any:
        """transformers' own forward pass of the model, no layer in it."""
        return self._model(**inputs, use_cache=False)

    def _call(self, index: int, length: int) -> dict[str, Any]:
        """What a layer is called with, besides hidden states, for a sequence of this length."""
        if length not in self._calls:
            self._forward(inputs_embeds=torch.zeros(1, length, self.config.hidden_size))
            self._calls[length] = [recorder.call for recorder in self._recorders]
        return self._calls[length][index]

    @torch.no_grad()
    def _run(self, layer: Any, index: int, hidden: Tensor) -> LayerValues:
        """One sequence ``[S, H]`` through a layer."""
        moe = self.config.is_moe(index)
        taps = ["input_layernorm", "self_attn", "post_attention_layernorm", "feed_forward"]
        taps += ["feed_forward.router", "feed_forward.shared_expert"] * moe
        seen: dict[str, Tensor] = {}
        cache = _Cache()
        with contextlib.ExitStack() as stack:
            for name in taps:
                stack.enter_context(_tap(layer, name, seen, self.label))
            # Twice side by side where activations are rounded: the second is what noise can make of the first.
            times = 2 if self._rounded.touches(index) else 1
            call = {**self._call(index, len(hidden)), self._cache_argument: cache}
            out = layer(hidden.expand(times, *hidden.shape), **call)
        out = out[0] if isinstance(out, tuple) else out
        if cache.key is None or cache.value is None:
            raise EngineError(
                f"{self.label}: its attention gives keys to no '{self._cache_argument}'", hint=UNKNOWN_TRANSFORMERS
            )
        seen |= {"key": cache.key.transpose(1, 2).flatten(0, 1), "value": cache.value.transpose(1, 2).flatten(0, 1)}
        seen["hidden"] = out.reshape(-1, out.shape[-1])
        found = [self._values(index, seen, slice(i * len(hidden), (i + 1) * len(hidden))) for i in range(times)]
        return found[0] if times == 1 else replace(found[0], slack=slack_of(*found))

    def _values(self, index: int, seen: dict[str, Tensor], rows: slice) -> LayerValues:
        """What a layer gave, of the tokens in ``rows``."""
        own = {name: _array(tensor[rows]) for name, tensor in seen.items()}
        return LayerValues(
            key=self._within_chunk(own["key"]) if self.config.uses_rope(index) else own["key"],
            value=own["value"],
            attention=own["self_attn"],
            feed_forward=own["feed_forward"],
            hidden=own["hidden"],
            attention_input=own["input_layernorm"],
            feed_forward_input=own["post_attention_layernorm"],
            router=own.get("feed_forward.router"),
            shared=own.get("feed_forward.shared_expert"),
        )

    def _within_chunk(self, key: Array) -> Array:
        """Keys ``[S, G, D]`` turned back by the angle of their chunk's start. The QK norm, without weights, stays."""
        chunk = self.config.attention_chunk_size
        if chunk is None or len(key) <= chunk:
            return key
        places = np.arange(len(key))
        angles = (places - places % chunk)[:, None] * self.config.rope.inverse_frequencies(self.config.head_dim)
        pairs = np.ascontiguousarray(key, np.float64).view(np.complex128)  # [S, G, D/2]
        turned = np.where((places < chunk)[:, None, None], pairs, pairs * np.exp(-1j * angles)[:, None])
        return turned.view(np.float64).astype(np.float32)


UNKNOWN_TRANSFORMERS = "this release of transformers is not known; pip install 'shuntyard[validate]' gives one that is"


class _Recorder(nn.Module):
    """Stands in a layer's place: notes what it is called with, and gives the hidden states on as they are."""

    hidden: Tensor
    call: dict[str, Any]

    def forward(self, hidden_states: Tensor, **call: Any) -> Tensor:
        self.hidden, self.call = hidden_states, call
        return hidden_states


class _Cache:
    """Stands in the place of a layer's cache, which is empty: notes what it gets."""

    key: Tensor | None = None
    value: Tensor | None = None

    def update(self, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Gives back ``[1, G, S, D]`` as they come."""
        self.key, self.value = key, value
        return key, value

    def get_seq_length(self, *_: Any) -> int:
        """How many tokens went before: NoPE layers ask, for their temperature."""
        return 0


def _cache_argument(layer_class: Any, label: str) -> str:
    """What transformers calls the cache: ``cache`` from 5.24 on, ``past_key_values`` before."""
    parameters = inspect.signature(layer_class.forward).parameters
    for name in ("cache", "past_key_values"):
        if name in parameters:
            return name
    raise EngineError(f"{label}: its layers take no cache that is known by name", hint=UNKNOWN_TRANSFORMERS)


@contextlib.contextmanager
def _tap(layer: Any, name: str, seen: dict[str, Tensor], label: str) -> Iterator[None]:
    """Notes what a module of the layer gives, ``[S, ...]``, in ``seen``."""

    def note(_module: Any, _inputs: Any, output: Any) -> None:
        if name == "feed_forward.router":  # scores and logits
            output = output[1]
        elif isinstance(output, tuple):
            output = output[0]
        # Llama4TextMoe adds the routed experts to the shared one's output in place.
        seen[name] = output.reshape(-1, output.shape[-1]).clone()

    try:
        handle = layer.get_submodule(name).register_forward_hook(note)
    except AttributeError as error:
        raise EngineError(f"{label}: its layer has no '{name}'", hint=UNKNOWN_TRANSFORMERS) from error
    try:
        yield
    finally:
        handle.remove()


def _parameter(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def _tensor(array: Array) -> Tensor:
    """A copy: what comes may be the read-only map of a file."""
    return torch.from_numpy(np.array(array, np.float32))


def _array(tensor: Tensor) -> Array:
    """Of its own, whatever happens to the tensor."""
    return np.array(tensor.detach().numpy())


def _transformers() -> Any:
    """The library, made quiet."""
    try:
        import transformers
        from transformers import Llama4ForCausalLM, Llama4TextConfig  # noqa: F401  an old one has none
        from transformers.utils import logging
    except ImportError as error:
        raise EngineError(
            f"the reference needs transformers, which cannot be imported: {error}",
            hint="pip install 'shuntyard[validate]'",
        ) from error
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return transformers


def _configurations(checkpoint: Path) -> tuple[ConfigFile, Any]:
    """``config.json`` as shuntyard reads it, and as transformers does, for eager attention."""
    file = load_config_file(checkpoint / "config.json")
    try:
        own = _transformers().Llama4TextConfig(**text_config(checkpoint))
    except Exception as error:
        raise _cannot_be_loaded(checkpoint, error) from error
    # What would change the form of the answer, and nothing that is computed.
    own.return_dict, own.output_attentions, own.output_hidden_states = True, False, False
    own._attn_implementation = "eager"
    return file, own


def _cannot_be_loaded(checkpoint: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{checkpoint}: transformers cannot load it: {' '.join(str(error).split())}",
        hint="the reference reads what transformers reads",
    )


def _rotate_exactly(model: Any, config: Llama4Config, checkpoint: Path) -> None:
    """Gives the model float64 angles, once its own frequencies are seen to be the same."""
    rotary = model.model.rotary_emb
    exact = config.rope.inverse_frequencies(config.head_dim)
    off = np.abs(rotary.inv_freq.double().numpy() / exact - 1).max()
    if off > LARGEST_FREQUENCY_ERROR or rotary.attention_scaling != 1.0:
        raise CheckpointError(
            f"{checkpoint}: transformers' rotary frequencies are not shuntyard's: {off:.2g} apart",
            hint="check rope_parameters / rope_scaling; if they are right, this is a defect of one of the two",
        )
    rotary.forward = exact_rotation(exact)


def _from_files(model_class: Any, config: Any, checkpoint: Path) -> Any:
    """transformers' own loading, which must use every tensor but those of a vision tower, and miss none."""
    model, info = model_class.from_pretrained(
        checkpoint,
        config=config,
        dtype=torch.float32,
        attn_implementation="eager",
        local_files_only=True,
        output_loading_info=True,
    )
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        names = sorted(str(name) for name in info.get(what) or () if not str(name).startswith(IMAGES))
        if names:
            raise CheckpointError(
                f"{checkpoint}: transformers reports {what.replace('_', ' ')}: {names[0]} (of {len(names)})",
                hint="a reference with uninitialised or ignored weights proves nothing",
            )
    return model


def _of_state(model_class: Any, config: Any, state: dict[str, torch.Tensor]) -> Any:
    """A model of these weights; every one must be given and have its place."""
    with torch.device("meta"):
        model = model_class(config)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its frequencies are in no file
    if config.tie_word_embeddings:
        state = {**state, "lm_head.weight": state["model.embed_tokens.weight"]}
    model.load_state_dict(state, strict=True, assign=True)
    return model
