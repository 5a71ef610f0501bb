// Rows that are sorted by expert: whose a row is, and which rows a block computes.
#pragma once

#include "kernels/launch.h"
#include "kernels/scalars.h"

namespace shuntyard {

constexpr int kTileRows = 8;

// The rows that the thread's block computes: none, unless the block's own row is the first of a tile.
struct Tile {
    int32_t expert;
    int32_t rows;
    bool orphan;  // the offsets give the block's row to no expert, or to a tile that nobody leads
};

// The expert that owns `row`, by bisection: the last whose offset is not above it.
__device__ inline int32_t expert_of(int64_t row, const int32_t* expert_offsets, int32_t experts) {
    int32_t low = 0;
    int32_t high = experts - 1;
    while (low < high) {
        const int32_t middle = low + (high - low + 1) / 2;
        if (expert_offsets[middle] <= row) {
            low = middle;
        } else {
            high = middle - 1;
        }
    }
    return low;
}

// Tiles start at every kTileRows-th row of an expert. The device alone knows how many there are, so the host starts a
// block for every row, and those that do not lead a tile return at once.
__device__ inline Tile tile_of(int64_t row, const int32_t* expert_offsets, int32_t experts, int64_t all_rows) {
    const int32_t expert = expert_of(row, expert_offsets, experts);
    const int64_t first = expert_offsets[expert] > 0 ? expert_offsets[expert] : 0;
    const int64_t end = expert_offsets[expert + 1] < all_rows ? expert_offsets[expert + 1] : all_rows;
    if (row < first || row >= end) {
        return {0, 0, true};
    }
    const int64_t leader = row - (row - first) % kTileRows;
    if (leader != row) {
        // Where broken offsets do not rise, the leader may find another expert and leave this row out of its tile.
        return {expert, 0, expert_of(leader, expert_offsets, experts) != expert};
    }
    return {expert, static_cast<int32_t>(end - row < kTileRows ? end - row : kTileRows), false};
}

__device__ inline int64_t column_of_thread() { return int64_t{blockIdx.y} * blockDim.x + threadIdx.x; }

__device__ inline float not_a_number() { return float_of(0x7fc00000u); }

}  // namespace shuntyard
