// Quantised activations: rows as E4M3 numbers (contract.py, ShuntyardQuantize).
#pragma once

#include "kernels/matrices.h"
#include "kernels/rows.h"

namespace shuntyard {

// What rows of X are as a product takes them: X, or E4m3 if they are quantised.
template <typename Rows>
constexpr bool kQuantised = false;
template <>
inline constexpr bool kQuantised<E4m3> = true;

// One thread a row: its factor, by its largest magnitude that is a number.
template <typename X>
__global__ void row_factors(const X* rows, float* factors, int64_t all_rows, int64_t width) {
    const int64_t row = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
    if (row >= all_rows) {
        return;
    }
    float largest = 0x1p-100f;
    for (int64_t k = 0; k < width; ++k) {
        const float magnitude = fabsf(to_float(rows[row * width + k]));
        if (magnitude > largest) {  // never, if it is NaN
            largest = magnitude;
        }
    }
    factors[row] = largest / 448.0f;
}

// One block along x a row. The factor is the row's own, or, if factors is null, that of its expert's matrix.
template <typename X>
__global__ void encode(const X* rows, const float* factors, const int32_t* expert_offsets,
                       SHUNTYARD_TABLE(Matrices) matrices, E4m3* codes, int32_t experts, int64_t width) {
    const int64_t row = blockIdx.x;
    const int64_t column = column_of_thread();
    if (column >= width) {
        return;
    }
    const float factor =
        factors != nullptr ? factors[row] : activation_scale(matrices, expert_of(row, expert_offsets, experts));
    codes[row * width + column] = from_float<E4m3>(to_float(rows[row * width + column]) / factor);
}

}  // namespace shuntyard
