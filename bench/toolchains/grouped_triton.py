"""A grouped FP8 product with SwiGLU in Triton: compiled ahead of time for a GPU that is not there, and run on the CPU.

``compile 90 OUT.cubin`` needs triton alone; ``run``, with TRITON_INTERPRET=1 in the environment, numpy and torch too.
docs/toolchains.md says what came out.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


def _gate_up(
    x: tl.tensor,  # e4m3 [rows, depth], sorted by expert
    x_scale: tl.tensor,  # f32 [rows]
    weights: tl.tensor,  # i64 [2, E]: addresses of each expert's gate and up, e4m3 [columns, depth]
    scales: tl.tensor,  # i64 [2, E]: addresses of their scales, f32 [columns]
    ends: tl.tensor,  # i32 [E]: where an expert's rows end
    tiles: tl.tensor,  # i32 [2, n]: expert and first row of each tile
    out: tl.tensor,  # bf16 [rows, columns]
    experts: tl.tensor,
    depth: tl.tensor,
    columns: tl.tensor,
    rows_of_tile: tl.constexpr,
    columns_of_tile: tl.constexpr,
    depth_of_tile: tl.constexpr,
) -> None:
    expert = tl.load(tiles + tl.program_id(1))
    row = tl.load(tiles + tl.num_programs(1) + tl.program_id(1))
    column = tl.program_id(0) * columns_of_tile
    end = tl.load(ends + expert)
    gate = tl.load(weights + expert).to(tl.pointer_type(tl.float8e4nv))
    up = tl.load(weights + experts + expert).to(tl.pointer_type(tl.float8e4nv))
    gate_scale = tl.load(scales + expert).to(tl.pointer_type(tl.float32))
    up_scale = tl.load(scales + experts + expert).to(tl.pointer_type(tl.float32))
    x_map = tl.make_tensor_descriptor(x, [end, depth], [depth, 1], [rows_of_tile, depth_of_tile])
    gate_map = tl.make_tensor_descriptor(gate, [columns, depth], [depth, 1], [columns_of_tile, depth_of_tile])
    up_map = tl.make_tensor_descriptor(up, [columns, depth], [depth, 1], [columns_of_tile, depth_of_tile])
    gate_sum = tl.zeros((rows_of_tile, columns_of_tile), tl.float32)
    up_sum = tl.zeros((rows_of_tile, columns_of_tile), tl.float32)
    for k in range(0, depth, depth_of_tile):
        a = x_map.load([row, k])
        gate_sum = tl.dot(a, gate_map.load([column, k]).T, gate_sum, max_num_imprecise_acc=128)
        up_sum = tl.dot(a, up_map.load([column, k]).T, up_sum, max_num_imprecise_acc=128)
    own_rows = row + tl.arange(0, rows_of_tile)
    own_columns = column + tl.arange(0, columns_of_tile)
    exists = own_rows < end
    factor = tl.load(x_scale + own_rows, mask=exists, other=0.0)[:, None]
    g = (gate_sum * factor * tl.load(gate_scale + own_columns)[None, :]).to(tl.bfloat16).to(tl.float32)
    u = (up_sum * factor * tl.load(up_scale + own_columns)[None, :]).to(tl.bfloat16).to(tl.float32)
    hidden = g / (1.0 + tl.exp(-g)) * u
    place = own_rows[:, None].to(tl.int64) * columns + own_columns[None, :]
    tl.store(out + place, hidden.to(tl.bfloat16), mask=exists[:, None])


gate_up = triton.jit(_gate_up)


def compile_for(architecture: int, out: Path) -> None:
    """Writes machine code for compute capability ``architecture`` and prints what it took."""
    names = ["x", "x_scale", "weights", "scales", "ends", "tiles", "out", "experts", "depth", "columns"]
    types = ["*fp8e4nv", "*fp32", "*i64", "*i64", "*i32", "*i32", "*bf16", "i32", "i32", "i32"]
    tile = (128, 128, 128) if architecture == 90 else (64, 64, 128)
    sizes = dict(zip(("rows_of_tile", "columns_of_tile", "depth_of_tile"), tile, strict=True))
    source = ASTSource(
        fn=gate_up,
        signature={**dict(zip(names, types, strict=True)), **dict.fromkeys(sizes, "constexpr")},
        constexprs=sizes,
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in ("x", "out", "depth", "columns")},
    )
    start = time.perf_counter()
    options = {"num_warps": 8, "num_stages": 3 if architecture == 90 else 2}
    made = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    out.write_bytes(made.asm["cubin"])
    print(f"{time.perf_counter() - start:.1f} s, shared {made.metadata.shared}, {made.metadata.global_scratch_size=}")


def run_here() -> None:
    """Runs the kernel in Triton's interpreter and prints where it differs from numpy."""
    import numpy as np
    import torch

    experts, depth, columns, rows_of_tile = 3, 256, 128, 16
    random = torch.Generator().manual_seed(0)
    ends = [5, 5, 22]
    x, *weights = (
        torch.randn(rows, depth, generator=random).to(torch.float8_e4m3fn)
        for rows in (ends[-1], *[columns] * 2 * experts)
    )
    x_scale, *scales = (0.1 + 0.1 * torch.rand(n, generator=random) for n in (ends[-1], *[columns] * 2 * experts))
    want = torch.empty(ends[-1], columns)
    tiles = []
    for expert, (begin, end) in enumerate(zip([0, *ends], ends, strict=False)):
        tiles += [(expert, row) for row in range(begin, end, rows_of_tile)]
        g, u = (
            (x[begin:end].float() @ weights[i].float().T * x_scale[begin:end, None] * scales[i]).bfloat16().float()
            for i in (expert, experts + expert)
        )
        want[begin:end] = (g / (1 + torch.exp(-g)) * u).bfloat16()
    out = torch.full((ends[-1], columns), torch.nan, dtype=torch.bfloat16)
    addresses = [torch.tensor([t.data_ptr() for t in tensors]) for tensors in (weights, scales)]
    places = torch.tensor(tiles, dtype=torch.int32).T.contiguous()
    gate_up[columns // 64, len(tiles)](
        x, x_scale, *addresses, torch.tensor(ends, dtype=torch.int32), places, out, experts, depth, columns,
        rows_of_tile, 64, 128,
    )  # fmt: skip
    off = np.abs(out.float().numpy() - want.numpy())
    print(f"{(off != 0).sum()} of {off.size} differ, at most {off.max():.3g} of {np.abs(want.numpy()).max():.3g}")


if __name__ == "__main__":
    if sys.argv[1] == "compile":
        compile_for(int(sys.argv[2]), Path(sys.argv[3]))
    else:
        run_here()
