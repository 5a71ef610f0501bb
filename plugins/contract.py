"""The contracts of shuntyard's private ops: what every face of an op must agree on.

Dimension legend, used throughout the project::

    B = batch          S = tokens of a sequence in this call      T = B * S
    H = hidden size    E = experts    K = experts per token       F = expert intermediate size
    N = query heads    G = key/value heads    D = head_dim        L = cache rows

The mixture-of-experts layer is three ops, as a shunting yard works: sort the wagons, run them over
their tracks, couple them again in order.

``ShuntyardMoeRouting`` (split)
    ``logits f32 [T, E]`` -> ``scores f32 [T*K]``, ``expert_offsets i32 [E+1]``, ``permutation i32 [T*K]``.
    A *slot* ``t * K + k`` is the k-th best expert of token ``t`` (ties: the lower expert first). Row ``i`` of
    the permuted order holds slot ``permutation[i]``; rows are sorted by expert, within an expert by slot
    (stable). Expert ``e`` owns rows ``expert_offsets[e] .. expert_offsets[e+1]``. ``scores[i]`` is
    ``sigmoid(logit)`` of row ``i``'s slot, in permuted order. Logits must not be NaN.

``ShuntyardMoeExperts`` (run)
    ``x [T, H]``, ``scores f32 [T*K]``, ``expert_offsets i32 [E+1]``, ``permutation i32 [T*K]``, then three lists,
    ``weights``, ``scales`` and ``activation_scales`` -> ``rows [T*K, H]`` of x's type.
    Row ``i`` is ``SwiGLU_e(scores[i] * x[permutation[i] // K])``: the score scales the *input*
    (transformers ``modeling_llama4.py``, ``Llama4TextMoe``). Weights of another type are rounded to x's. Products
    accumulate in fp32; values are rounded to x's type after scaling, after gate and up, after ``silu(gate) * up``
    and after down.

    The lists hold what checkpoints hold, without a copy. ``layout`` says how it is cut:

    ========== ==================================================================================== ==============
    layout     weights                                                                              applied as
    ========== ==================================================================================== ==============
    ``fused``  ``gate_up [E, H, 2F]`` (gate first), ``down [E, F, H]``                              ``x @ W[e]``
    ``split``  E times ``gate_up [H, 2F]``, E times ``down [F, H]``: fused, cut between experts     ``x @ W``
    ``linear`` E times ``gate [F, H]``, E times ``up [F, H]``, E times ``down [H, F]``: [out, in]   ``x @ W.T``
    ========== ==================================================================================== ==============

    ``scales`` is empty, or has one scale (fp32, fp16 or bf16, widened to fp32 exactly) for each weight; weights are of
    one type, and so are scales. A quantised weight is ``value * scale`` in fp32, then rounded to x's type:

    * FP8 (e4m3fn): a scale has 1 element, or one for each out channel (and expert, if fused), told by their number.
    * INT4, ``linear`` only, ``group_size`` > 0: int32 ``[out, in/8]``, each holding 8 values, lowest nibble first,
      stored as ``value + 8`` (compressed-tensors' ``pack-quantized``); scales ``[out, in/group_size]``. The ONNX
      function takes the same bytes as UINT4 ``[out, in]``. ``in`` is a multiple of 8 and of ``group_size``.

    ``activations`` is ``none``, or with FP8 weights ``static`` or ``dynamic``: the rows of each product are then
    quantised as ``ShuntyardQuantize`` does it, the scaled inputs before gate and up, the hidden rows before down. The
    product is ``(sum of codes * weight values in fp32) * factor * weight scale``, left to right in fp32, rounded to x's
    type as ever: weight values are exact, and not scaled before. ``static`` takes as factor the weight's entry in
    ``activation_scales``, which then has one of 1 element for each weight (fp32, fp16 or bf16, all of one type); in
    layouts where gate and up are one weight they share it. Otherwise ``activation_scales`` is empty. ``dynamic`` has a
    factor for each row.

``ShuntyardMoeScatterAdd`` (couple)
    ``base [T, H]``, ``rows [T*K, H]``, ``permutation i32 [T*K]`` -> ``out [T, H]``.
    ``out[t] = base[t] + sum over k of the row that holds slot t * K + k``, summed in fp32 in the order of
    k, rounded once. No atomics are needed: every slot has one row, so the result is deterministic.

Attention over a static cache is a fourth private op. It has no plugin: each runtime takes its standard body.

``ShuntyardCachedAttention``
    ``query [B, N, S, D]``, ``key, value [B, G, S, D]``, ``past_key, past_value [B, G, L, D]``,
    ``slots i64 [B, S]`` -> ``out [B, N, S, D]``, ``present_key, present_value [B, G, L, D]``.
    Writes key and value to the cache rows ``slots[b, 0] ..+ S`` (slots of a call are consecutive, and
    ``slots[b, 0] + S <= L``), then lets the query at slot ``s`` attend to rows ``0 .. s``. A layer with
    global attention uses positions as slots, a chunked layer ``position mod chunk``.

``ShuntyardDequantize``, without a plugin too, is a quantised weight of one Linear.
    ``weight [out, in]``, ``scale`` -> ``value f32 [out, in]``, by the rules for weights of the experts in layout
    ``linear``: FP8 with ``group_size`` 0, INT4 with ``group_size`` > 0.

``ShuntyardQuantize``, without a plugin too, makes e4m3 numbers of the rows that a product takes.
    ``x [..., in]`` of fp32, fp16 or bf16, and in form ``static`` a ``scale`` of 1 element, of any of these types ->
    ``codes f32 [..., in]``, ``factor f32 [1]`` (``static``) or ``[..., 1]`` (``dynamic``).
    ``codes = e4m3(float32(x) / factor)``: a true division in fp32, then to the nearest e4m3 number, ties to even, held
    to -448 .. 448, NaN staying NaN; codes are given as fp32. ``static``: ``factor = float32(scale)``. ``dynamic``:
    ``factor = max(m, 2**-100) / 448`` in fp32, m the largest ``|float32(x)|`` of the row that is not NaN (else 0).
    A product of the codes, times ``factor``, stands for a product of x.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

DOMAIN = "shuntyard"
"""ONNX domain of the private ops and of the layer functions."""

DOMAIN_VERSION = 1

PLUGIN_NAMESPACE = "shuntyard"
"""TensorRT plugin namespace. A node that carries it is built as the plugin though a function body exists."""

PLUGIN_VERSION = "1"


LAYOUTS = ("fused", "split", "linear")
"""How the weights of the experts are cut, see ``ShuntyardMoeExperts``."""

QUANTIZATIONS = ("none", "tensor", "channel", "group")
"""Weights as they are; FP8 with a scale for each tensor; FP8 with one for each out channel; INT4 with one a group."""

ACTIVATIONS = ("none", "static", "dynamic")
"""The rows of products as they are; FP8 with a scale that is given; FP8 with one for each row, made of the row."""

QUANTIZE_FORMS = ACTIVATIONS[1:]
"""The forms of ``ShuntyardQuantize``."""

LARGEST_CODE = 448.0
"""The largest e4m3 number."""

SMALLEST_AMAX = 2.0**-100
"""What a row's largest magnitude is at least taken for: a row of zeros needs a factor, too."""


class ExpertsForm(NamedTuple):
    """How the weights of one call of the experts come: what tells the ONNX functions of one op apart."""

    experts: int
    layout: str = "fused"
    quantization: str = "none"
    group_size: int = 0
    activations: str = "none"

    def check(self) -> ExpertsForm:
        """Itself, if there is such a form.

        Raises:
            ValueError: there is none.
        """
        if self.experts < 1:
            raise ValueError(f"experts is {self.experts}, must be at least 1")
        if self.layout not in LAYOUTS:
            raise ValueError(f"layout is {self.layout!r}, must be one of {', '.join(LAYOUTS)}")
        if self.quantization not in QUANTIZATIONS:
            raise ValueError(f"quantization is {self.quantization!r}, must be one of {', '.join(QUANTIZATIONS)}")
        if self.quantization == "group" and self.layout != "linear":
            raise ValueError(f"layout is {self.layout!r}, but INT4 weights come in layout 'linear' only")
        if (self.group_size > 0) != (self.quantization == "group") or self.group_size < 0:
            raise ValueError(f"group_size is {self.group_size} with quantization {self.quantization!r}")
        if self.activations not in ACTIVATIONS:
            raise ValueError(f"activations is {self.activations!r}, must be one of {', '.join(ACTIVATIONS)}")
        if self.activations != "none" and self.quantization not in ("tensor", "channel"):
            raise ValueError(
                f"activations is {self.activations!r} with quantization {self.quantization!r}: "
                "only FP8 weights take quantised activations"
            )
        return self

    @property
    def overload(self) -> str:
        """The ONNX function's overload: empty for plain fused weights, else as ``linear_16_tensor_static``."""
        if self.layout == "fused" and self.quantization == "none":
            return ""
        group = str(self.group_size) if self.group_size else ""
        quantized = "" if self.quantization == "none" else f"_{self.quantization}{group}"
        activations = "" if self.activations == "none" else f"_{self.activations}"
        return f"{self.layout}_{self.experts}{quantized}{activations}"

    @property
    def parts(self) -> tuple[str, ...]:
        """The kinds of weights, in their order."""
        return ("gate", "up", "down") if self.layout == "linear" else ("gate_up", "down")

    @property
    def weight_names(self) -> tuple[str, ...]:
        """A name for each weight, in the order of the list: ``gate_up``, or ``gate_up.0``, ``gate_up.1``, ..."""
        if self.layout == "fused":
            return self.parts
        return tuple(f"{part}.{e}" for part in self.parts for e in range(self.experts))

    @property
    def scale_names(self) -> tuple[str, ...]:
        """A name for each scale, none if there are none."""
        return () if self.quantization == "none" else tuple(f"scale.{name}" for name in self.weight_names)

    @property
    def activation_scale_names(self) -> tuple[str, ...]:
        """A name for each scale of activations, none if they are not given."""
        if self.activations != "static":
            return ()
        return tuple(f"activation_scale.{name}" for name in self.weight_names)

    def weight_shapes(self, hidden: int, intermediate: int) -> tuple[tuple[int, ...], ...]:
        """The shape of each weight; INT4 as int32 ``[out, in/8]``."""
        if self.layout == "linear":
            values = 8 if self.quantization == "group" else 1
            into, out = (intermediate, hidden // values), (hidden, intermediate // values)
            return (into,) * (2 * self.experts) + (out,) * self.experts
        into, out = (hidden, 2 * intermediate), (intermediate, hidden)
        if self.layout == "fused":
            return (self.experts, *into), (self.experts, *out)
        return (into,) * self.experts + (out,) * self.experts

    def scale_sizes(self, hidden: int, intermediate: int) -> tuple[int, ...]:
        """The number of elements of each scale, none if there are none."""
        if self.quantization == "none":
            return ()
        if self.quantization == "tensor":
            return (1,) * len(self.weight_names)
        shapes = self.weight_shapes(hidden, intermediate)
        if self.quantization == "group":
            return tuple(out * (packed * 8 // self.group_size) for out, packed in shapes)
        if self.layout == "linear":
            return tuple(out for out, _ in shapes)
        return tuple(shape[-1] * (self.experts if self.layout == "fused" else 1) for shape in shapes)


def experts_form(
    experts: int,
    layout: str,
    group_size: int,
    hidden: int,
    weights: Sequence[Sequence[int]],
    scales: Sequence[Sequence[int]],
    activation_scales: Sequence[Sequence[int]],
    activations: str,
) -> ExpertsForm:
    """The form that the shapes of the three lists are in, INT4 as int32 ``[out, in/8]``; x is ``[T, hidden]``.

    Raises:
        ValueError: they are in none.
    """
    sizes = [math.prod(shape) for shape in scales]
    quantization = "none" if not scales else "channel" if any(size != 1 for size in sizes) else "tensor"
    form = ExpertsForm(experts, layout, "group" if group_size else quantization, group_size, activations).check()
    names = form.weight_names
    if len(weights) != len(names) or len(scales) != len(form.scale_names):
        raise ValueError(
            f"layout '{layout}' of {experts} experts takes {len(names)} weights and "
            f"{len(form.scale_names)} scales, not {len(weights)} and {len(scales)}"
        )
    last = tuple(weights[-1])
    axis = {"fused": 1, "split": 0, "linear": 1}[layout]
    if len(last) <= axis:
        raise ValueError(f"weight {names[-1]} is {list(last)}")
    intermediate = last[axis] * (8 if group_size else 1)
    if group_size and (hidden % 8 or hidden % group_size or intermediate % group_size):
        raise ValueError(f"{hidden} or {intermediate} is no multiple of 8 and of the group size {group_size}")
    for name, weight, expected in zip(names, weights, form.weight_shapes(hidden, intermediate), strict=True):
        if tuple(weight) != expected:
            raise ValueError(f"weight {name} is {list(weight)}, must be {list(expected)}")
    for name, size, count in zip(form.scale_names, sizes, form.scale_sizes(hidden, intermediate), strict=True):
        if size != count:
            raise ValueError(f"scale {name} has {size} elements, must have {count}")
    if len(activation_scales) != len(form.activation_scale_names):
        raise ValueError(
            f"activations '{activations}' with {len(names)} weights take {len(form.activation_scale_names)} "
            f"activation scales, not {len(activation_scales)}"
        )
    for name, shape in zip(form.activation_scale_names, activation_scales, strict=True):
        if math.prod(shape) != 1:
            raise ValueError(f"{name} has {math.prod(shape)} elements, must have 1")
    return form


@dataclass(frozen=True)
class Op:
    """What an op is called and takes, in the order of its inputs and outputs.

    ``variadic`` names the lists that follow the inputs: arguments of their own in torch; in ONNX, which knows one
    variadic input at most, their tensors stand one list after the other. ``optional`` names inputs that follow, too,
    and that only some forms have: None in torch, left out in ONNX. ``plugin_attributes`` change nothing of what is
    computed: the plugin alone has them, and they may be left out.
    """

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: tuple[str, ...]
    has_plugin: bool
    variadic: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    plugin_attributes: tuple[str, ...] = ()

    @property
    def torch_name(self) -> str:
        """Name of the ``torch.library`` op, ``shuntyard::moe_routing`` for ``ShuntyardMoeRouting``."""
        words = "".join(f"_{c.lower()}" if c.isupper() else c for c in self.name.removeprefix("Shuntyard"))
        return f"shuntyard::{words.lstrip('_')}"


ROUTING = Op(
    "ShuntyardMoeRouting",
    inputs=("logits",),
    outputs=("scores", "expert_offsets", "permutation"),
    attributes=("top_k",),
    has_plugin=True,
)
EXPERTS = Op(
    "ShuntyardMoeExperts",
    inputs=("x", "scores", "expert_offsets", "permutation"),
    variadic=("weights", "scales", "activation_scales"),
    outputs=("rows",),
    attributes=("top_k", "experts", "layout", "group_size", "activations"),
    has_plugin=True,
    plugin_attributes=("module",),  # whose experts these are: the plugin says it in the builder's log
)
SCATTER_ADD = Op(
    "ShuntyardMoeScatterAdd",
    inputs=("base", "rows", "permutation"),
    outputs=("out",),
    attributes=("top_k",),
    has_plugin=True,
)
CACHED_ATTENTION = Op(
    "ShuntyardCachedAttention",
    inputs=("query", "key", "value", "past_key", "past_value", "slots"),
    outputs=("out", "present_key", "present_value"),
    attributes=("scale",),
    has_plugin=False,
)
DEQUANTIZE = Op(
    "ShuntyardDequantize",
    inputs=("weight", "scale"),
    outputs=("value",),
    attributes=("group_size",),
    has_plugin=False,
)
QUANTIZE = Op(
    "ShuntyardQuantize",
    inputs=("x",),
    optional=("scale",),
    outputs=("codes", "factor"),
    attributes=(),
    has_plugin=False,
)

OPS = (ROUTING, EXPERTS, SCATTER_ADD, CACHED_ATTENTION, DEQUANTIZE, QUANTIZE)
"""All of them."""

ATTRIBUTE_KINDS = {"scale": float, "layout": str, "activations": str}
"""Types of the attributes; all others are int."""

PLUGINS = tuple(op for op in OPS if op.has_plugin)
