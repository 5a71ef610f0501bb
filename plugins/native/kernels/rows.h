// Rows that are sorted by expert: whose a row is, and which rows a block of the plain kernels computes.
#pragma once

#include "kernels/launch.h"
#include "kernels/scalars.h"

namespace shuntyard {

constexpr int kTileRows = 8;

__device__ inline int32_t clamped(int32_t offset, int32_t all_rows) {
    return offset < 0 ? 0 : offset < all_rows ? offset : all_rows;
}

// An expert and its rows.
struct Owner {
    int32_t expert;  // negative: the row is nobody's
    int32_t first, end;
};

// Whose a row is. Offsets that rise say it themselves. In any others each counts for no less than those before it, in
// all kernels alike: every row has one expert at most, and rows before the first offset and behind the highest have
// none.
__device__ inline Owner owner_of(int32_t row, const int32_t* expert_offsets, int32_t experts, int32_t all_rows) {
    int32_t first = clamped(expert_offsets[0], all_rows);
    for (int32_t e = 0; row >= first && e < experts; ++e) {
        const int32_t offset = clamped(expert_offsets[e + 1], all_rows);
        if (row < offset) {
            return {e, first, offset};
        }
        first = offset > first ? offset : first;
    }
    return {-1, 0, 0};
}

// The rows that the thread's block computes: none, unless the block's own row is the first of a tile.
struct Tile {
    int32_t expert;
    int32_t rows;
    bool orphan;
};

// Tiles start at every kTileRows-th row of an expert. The device alone knows how many there are, so the host starts a
// block for every row, and those that do not lead a tile return at once.
__device__ inline Tile tile_of(int64_t row, const int32_t* expert_offsets, int32_t experts, int64_t all_rows) {
    const int32_t own = static_cast<int32_t>(row);
    const Owner owner = owner_of(own, expert_offsets, experts, static_cast<int32_t>(all_rows));
    if (owner.expert < 0) {
        return {0, 0, true};
    }
    const int32_t left = owner.end - own;
    const bool leads = (own - owner.first) % kTileRows == 0;
    return {owner.expert, leads ? (left < kTileRows ? left : kTileRows) : 0, false};
}

__device__ inline int64_t column_of_thread() { return int64_t{blockIdx.y} * blockDim.x + threadIdx.x; }

__device__ inline float not_a_number() { return float_of(0x7fc00000u); }

}  // namespace shuntyard
