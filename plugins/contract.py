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
    ``x [T, H]``, ``scores f32 [T*K]``, ``expert_offsets i32 [E+1]``, ``permutation i32 [T*K]``,
    ``gate_up [E, H, 2F]`` (gate first), ``down [E, F, H]`` -> ``rows [T*K, H]`` of x's type.
    Row ``i`` is ``SwiGLU_e(scores[i] * x[permutation[i] // K])``: the score scales the *input*
    (transformers ``modeling_llama4.py``, ``Llama4TextMoe``). Weights of another type are rounded to x's. Products
    accumulate in fp32; values are rounded to x's type after scaling, after gate and up, after ``silu(gate) * up``
    and after down.

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
"""

from __future__ import annotations

from dataclasses import dataclass

DOMAIN = "shuntyard"
"""ONNX domain of the private ops and of the layer functions."""

DOMAIN_VERSION = 1

PLUGIN_NAMESPACE = "shuntyard"
"""TensorRT plugin namespace. A node that carries it is built as the plugin though a function body exists."""

PLUGIN_VERSION = "1"


@dataclass(frozen=True)
class Op:
    """What an op is called and takes, in the order of its inputs and outputs."""

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: tuple[str, ...]
    has_plugin: bool

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
    inputs=("x", "scores", "expert_offsets", "permutation", "gate_up", "down"),
    outputs=("rows",),
    attributes=("top_k",),
    has_plugin=True,
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

OPS = (ROUTING, EXPERTS, SCATTER_ADD, CACHED_ATTENTION)
PLUGINS = tuple(op for op in OPS if op.has_plugin)
