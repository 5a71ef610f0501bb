"""Who is timed on the routed experts of one layer: from router logits to the sum with the shared expert's output.

Each is given the same tensors and returns ``[T, H]``. Peers are imported from their packages, never copied.
"""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.kernels.arithmetic import Model
from bench.kernels.ours import AS_THEY_ARE, BF16, DYNAMIC, Library, expert_weights

Run = Callable[[], Tensor]

ALIGNED = 256
"""What a workspace's address is a multiple of."""


@dataclass
class Weights:
    """``w13 [E, 2F, H]``, gate first, and ``w2 [E, H, F]``; FP8 with fp32 scales ``[E, 2F]`` and ``[E, H]``."""

    w13: Tensor
    w2: Tensor
    scales: tuple[Tensor, Tensor] | None

    def copy(self) -> Weights:
        """Another, elsewhere in memory."""
        scales = None if self.scales is None else (self.scales[0].clone(), self.scales[1].clone())
        return Weights(self.w13.clone(), self.w2.clone(), scales)


@dataclass
class Layer:
    """One call's tensors: ``logits [T, E]`` in fp32; ``x``, ``base`` and ``out [T, H]`` in bf16."""

    logits: Tensor
    x: Tensor
    base: Tensor
    out: Tensor
    weights: Weights


def make_weights(model: Model, precision: str, device: str, seed: int = 0) -> Weights:
    """Random weights of about ``1 / sqrt(H)``, expert by expert."""
    generator = torch.Generator(device).manual_seed(seed)
    dtype = torch.float8_e4m3fn if precision == "fp8" else torch.bfloat16
    spread = 50.0 if precision == "fp8" else model.hidden**-0.5
    made = []
    for out, into in ((2 * model.width, model.hidden), (model.hidden, model.width)):
        weight = torch.empty(model.experts, out, into, dtype=dtype, device=device)
        for expert in weight:
            expert.copy_((torch.randn(out, into, generator=generator, device=device) * spread).clamp(-448, 448))
        made.append(weight)
    scales = None
    if precision == "fp8":
        first, second = (
            (0.5 + 1.5 * torch.rand(weight.shape[:2], generator=generator, device=device)) / 50 * model.hidden**-0.5
            for weight in made
        )
        scales = (first, second)
    return Weights(made[0], made[1], scales)


def make_layer(model: Model, tokens: int, skew: str, weights: Weights, device: str, seed: int) -> Layer:
    """Random inputs of a skew: ``uniform``, ``zipf`` or ``one-expert``."""
    generator = torch.Generator(device).manual_seed(seed)
    logits = torch.randn(tokens, model.experts, generator=generator, device=device)
    if skew == "zipf":
        # The largest of Gumbel variables of these means is the r-th as often as 1 / r.
        logits = -torch.log(-torch.log(torch.rand(logits.shape, generator=generator, device=device)))
        logits -= torch.log(torch.arange(1, model.experts + 1, device=device))
    elif skew == "one-expert":
        logits[:, model.experts // 2] += 100
    x, base = (
        torch.randn(tokens, model.hidden, generator=generator, device=device).to(torch.bfloat16) for _ in range(2)
    )
    return Layer(logits.float(), x, base, torch.empty_like(x), weights)


# -- ours


def ours(library: Library, layer: Layer, tactic: int = 0) -> Run:
    """The three ops through the C interface."""
    tokens, experts = layer.logits.shape
    hidden, width = layer.x.shape[1], layer.weights.w2.shape[2]
    device = layer.x.device
    scores = torch.empty(tokens, device=device)
    offsets = torch.empty(experts + 1, dtype=torch.int32, device=device)
    permutation = torch.empty(tokens, dtype=torch.int32, device=device)
    rows = torch.empty_like(layer.x)
    weights = expert_weights(layer.weights.w13, layer.weights.w2, layer.weights.scales)
    activations = AS_THEY_ARE if layer.weights.scales is None else DYNAMIC

    def workspace(name: str, *arguments: int) -> Tensor:
        size = library.workspace_size(name, *arguments)
        space = torch.empty(size + ALIGNED, dtype=torch.uint8, device=device)
        begin = -space.data_ptr() % ALIGNED
        return space[begin : begin + size]

    spaces = [
        workspace("moe_routing", tokens, experts, 1),
        workspace("moe_experts", BF16, activations, tokens, 1, hidden, width),
        workspace("moe_scatter_add", tokens, 1),
    ]

    def sizes(*extents: int) -> tuple[Any, ...]:
        return tuple(map(ctypes.c_int64, extents))

    def end(space: Tensor) -> tuple[Any, ...]:
        stream = torch.cuda.current_stream().cuda_stream if device.type == "cuda" else None
        return space, ctypes.c_size_t(space.numel()), ctypes.c_void_p(stream)

    def run() -> Tensor:
        library.call(
            "moe_routing", layer.logits, scores, offsets, permutation, *sizes(tokens, experts, 1), *end(spaces[0])
        )
        library.call(
            "moe_experts",
            *(ctypes.c_int(BF16), ctypes.byref(weights), layer.x, scores, offsets, permutation, rows),
            *(*sizes(tokens, experts, 1, hidden, width), ctypes.c_int(tactic), *end(spaces[1])),
        )
        library.call(
            "moe_scatter_add",
            *(ctypes.c_int(BF16), layer.base, rows, permutation, layer.out),
            *(*sizes(tokens, 1, hidden), *end(spaces[2])),
        )
        return layer.out

    return run


# -- torch

Grouped = Callable[[Tensor, Tensor, Tensor | None, Tensor], Tensor]
"""Rows, weights ``[E, out, in]``, scales ``[E, out]`` and where each expert's rows end -> rows, all in bf16."""


def quantised(rows: Tensor) -> tuple[Tensor, Tensor]:
    """e4m3 numbers of rows, and a factor for each."""
    wide = rows.float()
    factor = wide.abs().amax(1, keepdim=True).clamp(min=2.0**-100) / 448
    return (wide / factor).clamp(-448, 448).to(torch.float8_e4m3fn), factor.squeeze(1)


def grouped_by_torch(rows: Tensor, weight: Tensor, scale: Tensor | None, ends: Tensor) -> Tensor:
    """``torch._grouped_mm``, or ``torch._scaled_grouped_mm``."""
    turned = weight.transpose(1, 2)
    if scale is None:
        return torch._grouped_mm(rows, turned, offs=ends)
    numbers, factor = quantised(rows)
    result: Tensor = torch._scaled_grouped_mm(numbers, turned, factor, scale, offs=ends, out_dtype=torch.bfloat16)
    return result


def by_torch(layer: Layer, grouped: Grouped = grouped_by_torch) -> Run:
    """top-k, a stable sort, grouped products, index_add."""
    experts, weights = layer.logits.shape[1], layer.weights
    scales = weights.scales or (None, None)

    def run() -> Tensor:
        values, chosen = torch.topk(layer.logits, 1)
        expert, order = torch.sort(chosen.flatten(), stable=True)
        counts = torch.zeros(experts, dtype=torch.int32, device=expert.device)
        counts.scatter_add_(0, expert, torch.ones_like(expert, dtype=torch.int32))
        ends = torch.cumsum(counts, 0, dtype=torch.int32)
        rows = (layer.x[order].float() * torch.sigmoid(values)[order]).to(torch.bfloat16)
        gate, up = grouped(rows, weights.w13, scales[0], ends).chunk(2, 1)
        rows = grouped(torch.nn.functional.silu(gate) * up, weights.w2, scales[1], ends)
        layer.out.copy_(layer.base)
        return layer.out.index_add_(0, order, rows)

    return run


# -- peers


def by_vllm(layer: Layer) -> Run:
    """The fused Triton kernels of vLLM; top-1 alone lets it scale inputs instead of outputs."""
    fused_moe: Any = importlib.import_module("vllm.model_executor.layers.fused_moe.fused_moe")
    config: Any = importlib.import_module("vllm.model_executor.layers.fused_moe.config")
    weights, quantisation = layer.weights, None
    if weights.scales is not None:
        first, second = (scale.unsqueeze(2) for scale in weights.scales)
        quantisation = config.fp8_w8a8_moe_quant_config(
            w1_scale=first, w2_scale=second, per_act_token_quant=True, per_out_ch_quant=True
        )

    def run() -> Tensor:
        values, chosen = torch.topk(layer.logits, 1)
        rows = fused_moe.fused_experts(
            hidden_states=layer.x,
            w1=weights.w13,
            w2=weights.w2,
            topk_weights=torch.sigmoid(values),
            topk_ids=chosen.to(torch.int32),
            apply_router_weight_on_input=True,
            quant_config=quantisation,
        )
        return torch.add(layer.base, rows, out=layer.out)

    return run


def by_fbgemm(layer: Layer) -> Run:
    """FBGEMM's gen_ai, wired as in its own layer: shuffling, gather, two grouped GEMMs, scatter-add."""
    moe: Any = importlib.import_module("fbgemm_gpu.experimental.gen_ai.moe")
    gemm: Any = importlib.import_module("fbgemm_gpu.experimental.gemm.triton_gemm.grouped_gemm")
    weights, experts = layer.weights, layer.logits.shape[1]
    w13, w2 = (weight.flatten(0, 1) for weight in (weights.w13, weights.w2))
    width = weights.w2.shape[2]

    def run() -> Tensor:
        scores = torch.sigmoid(layer.logits)  # bf16 scores would tie, and choose other experts
        counts, chosen, tokens = moe.index_shuffling(scores)
        counts = counts[:experts]
        if weights.scales is None:
            rows = moe.gather_scale_dense_tokens(layer.x, tokens, chosen, scores)
            both = gemm.grouped_gemm(rows, w13, counts)
            rows = gemm.grouped_gemm(moe.silu_mul(both[:, :width], both[:, width:]), w2, counts)
        else:
            first, second = (scale.flatten() for scale in weights.scales)
            codes, factors = moe.gather_scale_quant_dense_tokens(layer.x, tokens, chosen, scores)
            both = gemm.grouped_gemm_fp8_rowwise(codes, w13, counts, factors, first)
            codes, factors = moe.silu_mul_quant(both[:, :width], both[:, width:])
            rows = gemm.grouped_gemm_fp8_rowwise(codes, w2, counts, factors, second)
        layer.out.copy_(layer.base)
        moe.scatter_add_dense_tokens(layer.out, rows, tokens)
        return layer.out

    return run


PEERS: dict[str, tuple[str, Callable[[Layer], Run]]] = {
    "torch": ("torch", by_torch),
    "vLLM": ("vllm", by_vllm),
    "FBGEMM": ("fbgemm_gpu.experimental.gen_ai.moe", by_fbgemm),
}
"""The module that must be there, and what makes a call of a layer."""


def available() -> tuple[dict[str, Callable[[Layer], Run]], dict[str, str]]:
    """The peers that can be imported, and of the others why not."""
    there, absent = {}, {}
    for name, (module, make) in PEERS.items():
        try:
            importlib.import_module(module)
            there[name] = make
        except Exception as error:  # noqa: BLE001 (a package may fail in any way where it is imported)
            absent[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    return there, absent
