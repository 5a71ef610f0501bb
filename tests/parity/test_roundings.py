"""What ``docs/semantics.md`` says of roundings and of single experts: each is seen alone, mostly in bf16.

Elements are compared for being equal; a few may differ where a last bit of fp32, which is the machine's, tips a
rounding to bf16. What must not be equal differs in one element of twenty or more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import Llama4TextConfig
from transformers.models.llama4 import modeling_llama4 as theirs

from shuntyard.exporter import model
from shuntyard.exporter.model import Llama4, Weights
from tests.checkpoints import parsed, random_weights, raw_config
from tests.parity import meta_reference
from tests.tolerances import MISTAKE_MIN_ABS, ONE_OP

FEW, MANY = 0.002, 0.05
"""Shares of elements."""


def bf16(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def differing(a: Tensor, b: Tensor) -> float:
    """Share of elements that are not equal."""
    assert a.dtype == b.dtype == torch.bfloat16
    return float((a != b).float().mean())


def test_norms_round_before_the_weight_is_multiplied() -> None:
    x, weight = bf16(64, 128), 1 + bf16(128, seed=1) / 4
    norm = theirs.Llama4TextRMSNorm(128, eps=1e-5).bfloat16()
    norm.weight.data = weight
    got = model.rms_norm(x, 1e-5) * weight
    for expected in (norm(x), meta_reference.rms_norm(x, 1e-5) * weight):
        assert differing(got, expected) <= FEW
    assert differing(got, (model.rms_norm(x.float(), 1e-5) * weight.float()).bfloat16()) > MANY


def test_queries_round_between_rotation_and_norm() -> None:
    x = bf16(1, 24, 4, 16)
    angles = torch.outer(torch.arange(24.0), meta_reference.inverse_frequencies(16, 1e4, scaled=False))
    rotation = torch.polar(torch.ones_like(angles), angles)
    cos, sin = angles.cos()[None], angles.sin()[None]
    got = model.rms_norm(model.rotate(x, cos, sin), 1e-5)
    other = theirs.Llama4TextL2Norm(1e-5)(theirs.apply_rotary_emb(x, x, rotation[None])[0])
    for expected in (other, meta_reference.rms_norm(meta_reference.rotate(x, rotation), 1e-5)):
        assert differing(got, expected) <= FEW
    assert differing(got, model.rms_norm(model.rotate(x.float(), cos, sin), 1e-5).bfloat16()) > MANY


def test_dense_layers_round_after_silu() -> None:
    raw = raw_config(hidden_size=64, intermediate_size_mlp=96)
    mlp = theirs.Llama4TextMLP(Llama4TextConfig(**raw), 96).bfloat16()
    weights = {f"m.{name}": weight.detach() for name, weight in mlp.named_parameters()}
    for i, (name, weight) in enumerate(weights.items()):
        weight.copy_(bf16(*weight.shape, seed=i) / 8)
        assert name.endswith(("gate_proj.weight", "up_proj.weight", "down_proj.weight"))
    x = bf16(32, 64, seed=9)
    got = model.swiglu(x, weights, "m")
    with torch.no_grad():
        assert differing(got, mlp(x)) <= FEW
    gate, up, down = (weights[f"m.{name}_proj.weight"] for name in ("gate", "up", "down"))
    late = (functional.silu((x @ gate.T).float()) * (x @ up.T).float()).bfloat16() @ down.T
    assert differing(got, late) > MANY


def test_logits_are_the_compute_type_s_in_fp32() -> None:
    """As Meta's; transformers gives the same values in bf16."""
    raw = raw_config()
    net = Llama4(parsed(raw), random_weights(parsed(raw)), torch.bfloat16)
    logits, _ = net(torch.zeros(1, 1, dtype=torch.long), torch.zeros(1, 1, dtype=torch.long), net.empty_cache(1, 8))
    assert logits.dtype == torch.float32
    assert torch.equal(logits, logits.bfloat16().float())


def test_softmax_is_in_fp32() -> None:
    """transformers' eager attention rounds scores and probabilities to bf16; SDPA, which Meta calls, and we do not."""
    query, key, value = (bf16(1, 4, 64, 16, seed=i) for i in range(3))
    query = query * 4
    places = torch.arange(64)
    hidden = torch.full((64, 64), -torch.inf).triu(1)
    scores = query.double() @ key.double().transpose(2, 3) / 4 + hidden
    exact = scores.softmax(-1) @ value.double()
    empty = torch.zeros_like(key)
    out, _, _ = torch.ops.shuntyard.cached_attention(query, key, value, empty, empty, places[None], 0.25)
    module = torch.nn.Module()
    module.num_key_value_groups, module.training = 1, False  # type: ignore[assignment]
    eager, _ = theirs.eager_attention_forward(module, query, key, value, hidden.bfloat16()[None, None], 0.25)
    errors = [float((got.double() - exact).square().mean().sqrt()) for got in (out, eager.transpose(1, 2))]
    assert errors[0] < errors[1] / 2


# -- the mixture of experts


def moe_parts(experts: int, top_k: int, seed: int) -> tuple[dict[str, Any], Weights, theirs.Llama4TextMoe]:
    """Configuration, weights and transformers' layer, in bf16."""
    raw = raw_config(
        hidden_size=64, head_dim=16, intermediate_size=32, num_local_experts=experts, num_experts_per_tok=top_k
    )
    prefix = "model.layers.1."
    every = random_weights(parsed(raw), seed, torch.bfloat16)
    own = {name.removeprefix(prefix): w for name, w in every.items() if name.startswith(prefix + "feed_forward")}
    layer = theirs.Llama4TextMoe(Llama4TextConfig(**raw)).bfloat16()
    layer.load_state_dict({name.removeprefix("feed_forward."): w for name, w in own.items()})
    return raw, own, layer


def test_the_router_is_in_fp32() -> None:
    """bf16, in which both references route, cannot tell some tokens' experts apart; the choice is then the sort's."""
    raw, w, layer = moe_parts(16, 1, seed=0)
    x = bf16(2048, 64)
    with torch.no_grad():
        _, logits, _ = model.moe(parsed(raw), w, x)
        _, rounded = layer.router(x)
    best = (x.double() @ w["feed_forward.router.weight"].double().T).topk(2)
    clear = best.values[:, 0] - best.values[:, 1] > 1e-4
    assert logits.dtype == torch.float32
    assert rounded.dtype == (x @ w["feed_forward.router.weight"].T).dtype == torch.bfloat16  # Meta's as well
    assert (logits.argmax(1) == best.indices[:, 0])[clear].all()
    ties = rounded.topk(2).values
    assert (ties[:, 0] == ties[:, 1])[clear].sum() > 4


def test_roundings_of_the_routed_experts() -> None:
    """References round the score, the input, silu and the product; we the input and the product.

    One expert, all of whose weights are 1, so that nothing is summed and every rounding is seen.
    """
    raw = raw_config(hidden_size=1, intermediate_size=1, num_local_experts=1, num_experts_per_tok=1)
    own = {
        "router.weight": torch.ones(1, 1),
        "experts.gate_up_proj": torch.ones(1, 1, 2),
        "experts.down_proj": torch.ones(1, 1, 1),
        **{f"shared_expert.{name}_proj.weight": torch.zeros(1, 1) for name in ("gate", "up", "down")},
    }
    own = {name: weight.bfloat16() for name, weight in own.items()}
    layer = theirs.Llama4TextMoe(Llama4TextConfig(**raw)).bfloat16()
    layer.load_state_dict(own)
    x = bf16(4096, 1)
    with torch.no_grad():
        got, *_ = model.moe(parsed(raw), {f"feed_forward.{name}": weight for name, weight in own.items()}, x)
        other, _ = layer(x)
        args = meta_reference.MetaArgs(dim=1, n_layers=1, n_heads=1, n_kv_heads=1, num_experts=1)
        meta = meta_reference.moe(args, meta_reference.stored_moe(own), x)
    scaled = (x.float() * x.float().sigmoid()).bfloat16().float()
    assert differing(got, (functional.silu(scaled) * scaled).bfloat16()) <= FEW
    scaled = x * x.sigmoid()
    for reference in (other, meta):
        assert differing(reference, functional.silu(scaled) * scaled) <= FEW
    assert differing(got, other) > MANY


def test_tied_experts() -> None:
    """We take the lower one. Both references take what ``torch.topk`` likes, which is right as well, if not ours."""
    raw, w, layer = moe_parts(8, 2, seed=2)
    w = {name: weight.float() for name, weight in w.items()}
    w["feed_forward.router.weight"] = torch.zeros(8, 64)
    layer.float().router.weight.data.zero_()
    x = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))

    def by_hand(chosen: Tensor) -> Tensor:
        out = model.swiglu(x, w, "feed_forward.shared_expert")
        for t, experts in enumerate(chosen.tolist()):
            for e in experts:
                gate, up = (0.5 * x[t] @ w["feed_forward.experts.gate_up_proj"][e]).chunk(2)
                out[t] += functional.silu(gate) * up @ w["feed_forward.experts.down_proj"][e]
        return out

    with torch.no_grad():
        got, *_ = model.moe(parsed(raw), w, x)
        other, _ = layer(x[None])
        scores, _ = layer.router(x)
    lowest = torch.tensor([[0, 1]]).expand(16, 2)
    assert (got - by_hand(lowest)).abs().max() < 1e-5
    liked = scores.topk(2).indices
    assert (scores.gather(1, liked) == 0.5).all()
    assert (other - by_hand(liked)).abs().max() < 1e-5
    assert (got - by_hand(lowest + 1)).abs().max() > MISTAKE_MIN_ABS  # so it matters who is chosen


def test_activations_are_not_quantised() -> None:
    """FP8 experts as Meta runs them round activations to e4m3, a scale a token; we compute with what they were."""
    generator = torch.Generator().manual_seed(0)
    tokens, hidden, inner, experts = 64, 32, 16, 2
    x = torch.randn(tokens, hidden, generator=generator)
    shapes = [(experts, hidden, 2 * inner), (experts, inner, hidden)]
    weights = [torch.randn(shape, generator=generator).to(torch.float8_e4m3fn) for shape in shapes]
    scales = [torch.rand(experts, 1, shape[2], generator=generator) / shape[1] ** 0.5 for shape in shapes]
    scores, offsets, permutation = torch.ops.shuntyard.moe_routing(torch.randn(tokens, experts, generator=generator), 1)
    got = torch.ops.shuntyard.moe_experts(
        x, scores, offsets, permutation, weights, scales, [], 1, experts, "fused", 0, "none"
    )

    def quantised(rows: Tensor) -> Tensor:
        scale = rows.abs().amax(-1, keepdim=True) / 448
        return (rows / scale).float().to(torch.float8_e4m3fn).double() * scale

    def exactly(activation: Callable[[Tensor], Tensor]) -> Tensor:
        gate_up, down = (q.double() * scale.double() for q, scale in zip(weights, scales, strict=True))
        rows = x[permutation].double() * scores[:, None].double()
        expert = torch.arange(experts).repeat_interleave(offsets.diff())
        gate, up = torch.einsum("th,thf->tf", activation(rows), gate_up[expert]).chunk(2, dim=1)
        return torch.einsum("tf,tfh->th", activation(functional.silu(gate) * up), down[expert])

    ONE_OP["fp32"].check(got.numpy(), exactly(lambda rows: rows).float().numpy())
    assert float((got - exactly(quantised)).abs().max()) > 1000 * ONE_OP["fp32"].relative
