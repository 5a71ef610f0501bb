// Which rows a block takes: tiles of consecutive rows of one expert, found by the whole warp.
#pragma once

#include "kernels/primitives.h"
#include "kernels/rows.h"

namespace shuntyard {

// Consecutive rows of one expert; none if the block has nothing to do.
struct TokenTile {
    int32_t expert, first, rows;
};

__device__ inline int32_t lane_of_thread() { return static_cast<int32_t>(threadIdx.x % 32); }
__device__ inline int32_t warp_of_thread() { return static_cast<int32_t>(threadIdx.x / 32); }

// Where the rows of 32 experts end, one a lane, from `base` on: what the offsets say, but never lower than before, so
// that every row has one expert at most whatever they hold. `highest` is where the expert before them ended; beyond the
// last expert it is where that ended.
__device__ inline int32_t ends_of_experts(const int32_t* expert_offsets, int32_t base, int32_t experts,
                                          int32_t all_rows, int32_t highest) {
    const int32_t expert = base + lane_of_thread();
    int32_t end = expert < experts ? clamped(expert_offsets[expert + 1], all_rows) : highest;
    end = end < highest ? highest : end;
    if (ballot(shuffle_up(end, 1) > end) != 0) {  // not so in offsets that rise, but behind the last expert
        for (int delta = 1; delta < 32; delta *= 2) {
            const int32_t below = shuffle_up(end, delta);
            end = below > end ? below : end;
        }
    }
    return end;
}

// The wanted tile of up to kTokens rows, counted over experts first .. last - 1.
template <int kTokens>
__device__ TokenTile find_tile(const int32_t* expert_offsets, int32_t experts, int32_t first, int32_t last,
                               int32_t all_rows, int32_t wanted) {
    const int32_t lane = lane_of_thread();
    int32_t highest = clamped(expert_offsets[0], all_rows);
    int32_t before = 0;  // tiles of the experts below `base`
    for (int32_t base = 0; base < last; base += 32) {
        const int32_t end = ends_of_experts(expert_offsets, base, experts, all_rows, highest);
        const int32_t below = shuffle_up(end, 1);
        const int32_t begin = lane == 0 ? highest : below;
        const bool own = first <= base + lane && base + lane < last;
        const int32_t tiles = own ? (end - begin) / kTokens + ((end - begin) % kTokens != 0 ? 1 : 0) : 0;
        int32_t sum = tiles;
        for (int delta = 1; delta < 32; delta *= 2) {
            const int32_t other = shuffle_up(sum, delta);
            sum += lane >= delta ? other : 0;
        }
        const uint32_t reached = ballot(before + sum > wanted);
        if (reached != 0) {
            const int found = count_bits(~reached & (reached - 1));  // the lowest lane
            const int32_t row = shuffle(begin, found) + (wanted - before - shuffle(sum - tiles, found)) * kTokens;
            const int32_t left = shuffle(end, found) - row;
            return {base + found, row, left < kTokens ? left : kTokens};
        }
        before += shuffle(sum, 31);
        highest = shuffle(end, 31);
    }
    return {0, 0, 0};
}

// Fills the block's columns with NaN in rows of no expert, which broken offsets leave before the first and behind the
// last one.
template <typename X>
__device__ void fill_orphans(X* out, const int32_t* expert_offsets, int32_t experts, int32_t all_rows, int32_t columns,
                             int32_t first_column, int32_t end_column) {
    const int32_t begin = clamped(expert_offsets[0], all_rows);
    int32_t end = begin;
    for (int32_t base = 0; base < experts; base += 32) {
        end = shuffle(ends_of_experts(expert_offsets, base, experts, all_rows, end), 31);
    }
    const X none = from_float<X>(float_of(0x7fc00000u));
    const int32_t orphans = begin + all_rows - end;
    for (int32_t i = 0; i < orphans; ++i) {
        const int64_t row = i < begin ? i : i - begin + end;
        for (int32_t column = first_column + static_cast<int32_t>(threadIdx.x); column < end_column && column < columns;
             column += static_cast<int32_t>(blockDim.x)) {
            out[row * columns + column] = none;
        }
    }
}

}  // namespace shuntyard
