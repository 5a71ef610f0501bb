// The experts in any form: any layout, type and extent, on any device. A thread owns one output column for a tile of up
// to kTileRows consecutive rows of one expert: a weight is read and scaled once for the whole tile, and the row values
// are the same for the whole warp. Neighbouring threads read neighbouring weights, but those of layout LINEAR. Sums run
// over the inner extent in order, so the result does not depend on how rows fall into tiles, nor on the layout.
#include "kernels/experts.h"
#include "kernels/rows.h"

namespace shuntyard {
namespace {

// What rows of X are as a product takes them: X, or E4m3 if they are quantised.
template <typename Rows>
constexpr bool kQuantised = false;
template <>
inline constexpr bool kQuantised<E4m3> = true;

// What the sums over quantised rows are multiplied with: the factor of each of a tile's rows, and a column's scale.
struct Factors {
    const float* of_rows;  // of the tile's first row; null if the matrix has one for all
    float of_matrix;

    __device__ Factors(const float* factors, int64_t row, const Matrices& matrices, int32_t expert)
        : of_rows(factors == nullptr ? nullptr : factors + row),
          of_matrix(matrices.activation_scales[expert] == nullptr ? 1.0f : activation_scale(matrices, expert)) {}

    __device__ float scaled(float sum, int row, float scale) const {
        return sum * (of_rows == nullptr ? of_matrix : of_rows[row]) * scale;
    }
};

// One thread's part of the first product: one column of hidden, for rows of one expert. `Rows` is X or E4m3.
template <typename X, typename W, typename Rows>
struct GateAndUp {
    const Rows* gate_rows;  // the tile's first row
    const Rows* up_rows;    // the same, unless they are quantised
    Column<X, W> gate, up;
    Factors gate_factors, up_factors;
    X* out;  // the tile's first row
    int64_t hidden, intermediate, column, group;

    template <int Count>
    __device__ void compute(int first) const {
        float gate_sum[Count] = {};
        float up_sum[Count] = {};
        const Rows* values = gate_rows + first * hidden;
        const Rows* up_values = up_rows + first * hidden;
        for (int64_t begin = 0; begin < hidden; begin += group) {
            [[maybe_unused]] const float gate_scale = gate.scale(begin / group);
            [[maybe_unused]] const float up_scale = up.scale(begin / group);
            for (int64_t h = begin; h < begin + group; ++h) {
                if constexpr (kQuantised<Rows>) {
                    const float gate_weight = gate.value(h);
                    const float up_weight = up.value(h);
                    for (int r = 0; r < Count; ++r) {
                        gate_sum[r] += to_float(values[r * hidden + h]) * gate_weight;
                        up_sum[r] += to_float(up_values[r * hidden + h]) * up_weight;
                    }
                } else {
                    const float gate_weight = gate.weight(h, gate_scale);
                    const float up_weight = up.weight(h, up_scale);
                    for (int r = 0; r < Count; ++r) {
                        const float value = to_float(values[r * hidden + h]);
                        gate_sum[r] += value * gate_weight;
                        up_sum[r] += value * up_weight;
                    }
                }
            }
        }
        for (int r = 0; r < Count; ++r) {
            if constexpr (kQuantised<Rows>) {
                gate_sum[r] = gate_factors.scaled(gate_sum[r], first + r, gate.scale(0));
                up_sum[r] = up_factors.scaled(up_sum[r], first + r, up.scale(0));
            }
            out[(first + r) * intermediate + column] = from_float<X>(swiglu_of<X>(gate_sum[r], up_sum[r]));
        }
    }
};

// One thread's part of the second product: one column of the output, for rows of one expert.
template <typename X, typename W, typename Rows>
struct Down {
    const Rows* activated;  // the tile's first row
    Column<X, W> down;
    Factors factors;
    X* out;  // the tile's first row
    int64_t hidden, intermediate, column, group;

    template <int Count>
    __device__ void compute(int first) const {
        float sum[Count] = {};
        const Rows* values = activated + first * intermediate;
        for (int64_t begin = 0; begin < intermediate; begin += group) {
            const float scale = down.scale(begin / group);
            for (int64_t f = begin; f < begin + group; ++f) {
                const float weight = kQuantised<Rows> ? down.value(f) : down.weight(f, scale);
                for (int r = 0; r < Count; ++r) {
                    sum[r] += to_float(values[r * intermediate + f]) * weight;
                }
            }
        }
        for (int r = 0; r < Count; ++r) {
            const float made = kQuantised<Rows> ? factors.scaled(sum[r], first + r, down.scale(0)) : sum[r];
            out[(first + r) * hidden + column] = from_float<X>(made);
        }
    }
};

// Sums are kept in registers, so the number of rows must be a constant: a shorter tile goes in pieces of 4, 2 and 1.
template <typename Product>
__device__ inline void compute_tile(const Product& product, int rows) {
    static_assert(kTileRows == 8, "the pieces add up to 8 - 1");
    if (rows == 8) {
        product.template compute<8>(0);
        return;
    }
    if (rows & 4) {
        product.template compute<4>(0);
    }
    if (rows & 2) {
        product.template compute<2>(rows & 4);
    }
    if (rows & 1) {
        product.template compute<1>(rows & 6);
    }
}

template <typename X, typename W, typename Rows>
__global__ void swiglu(const Rows* gate_rows, const Rows* up_rows, const float* factors, const int32_t* expert_offsets,
                       SHUNTYARD_TABLE(Matrices) gate, SHUNTYARD_TABLE(Matrices) up, X* activated, int64_t all_rows,
                       int32_t experts, int64_t hidden, int64_t intermediate) {
    const int64_t row = blockIdx.x;
    const int64_t column = column_of_thread();
    if (column >= intermediate) {
        return;
    }
    const Tile tile = tile_of(row, expert_offsets, experts, all_rows);
    if (tile.orphan) {
        activated[row * intermediate + column] = from_float<X>(not_a_number());
        return;
    }
    const GateAndUp<X, W, Rows> product{gate_rows + row * hidden,
                                        up_rows + row * hidden,
                                        Column<X, W>(gate, tile.expert, column),
                                        Column<X, W>(up, tile.expert, column),
                                        Factors(factors, row, gate, tile.expert),
                                        Factors(factors, row, up, tile.expert),
                                        activated + row * intermediate,
                                        hidden,
                                        intermediate,
                                        column,
                                        gate.group};
    compute_tile(product, tile.rows);
}

template <typename X, typename W, typename Rows>
__global__ void project(const Rows* activated, const float* factors, const int32_t* expert_offsets,
                        SHUNTYARD_TABLE(Matrices) down, X* out, int64_t all_rows, int32_t experts, int64_t hidden,
                        int64_t intermediate) {
    const int64_t row = blockIdx.x;
    const int64_t column = column_of_thread();
    if (column >= hidden) {
        return;
    }
    const Tile tile = tile_of(row, expert_offsets, experts, all_rows);
    if (tile.orphan) {
        out[row * hidden + column] = from_float<X>(not_a_number());
        return;
    }
    const Down<X, W, Rows> product{activated + row * intermediate,
                                   Column<X, W>(down, tile.expert, column),
                                   Factors(factors, row, down, tile.expert),
                                   out + row * hidden,
                                   hidden,
                                   intermediate,
                                   column,
                                   down.group};
    compute_tile(product, tile.rows);
}

dim3 over_rows_of(const Experts& call, int64_t width) { return grid_of(call.all_rows, ceil_div(width, kBlock)); }

template <typename X, typename W, typename Rows>
int launch_swiglu(const Experts& call, const Rows* gate_rows, const Rows* up_rows) {
    return launch(swiglu<X, W, Rows>, over_rows_of(call, call.intermediate), dim3(kBlock), call.stream, gate_rows,
                  up_rows, call.factors, call.expert_offsets, call.matrices.gate, call.matrices.up,
                  static_cast<X*>(call.hidden), call.all_rows, call.experts, call.width, call.intermediate);
}

template <typename X, typename W, typename Rows>
int launch_project(const Experts& call, const Rows* activated) {
    return launch(project<X, W, Rows>, over_rows_of(call, call.width), dim3(kBlock), call.stream, activated,
                  call.factors, call.expert_offsets, call.matrices.down, static_cast<X*>(call.rows), call.all_rows,
                  call.experts, call.width, call.intermediate);
}

template <typename X, typename W>
int run(const Experts& call) {
    const X* const scaled = static_cast<const X*>(call.scaled);
    SHUNTYARD_TRY(prepare_inputs(call));
    SHUNTYARD_TRY((launch_swiglu<X, W, X>(call, scaled, scaled)));
    return launch_project<X, W, X>(call, static_cast<const X*>(call.hidden));
}

// With E4M3 weights and quantised activations.
template <typename X>
int run_quantised(const Experts& call) {
    SHUNTYARD_TRY(prepare_inputs(call));
    SHUNTYARD_TRY((launch_swiglu<X, E4m3, E4m3>(call, call.gate_codes, call.up_codes)));
    SHUNTYARD_TRY(prepare_hidden(call));
    return launch_project<X, E4m3, E4m3>(call, call.hidden_codes);
}

template <typename X>
int run_for_weights(const Experts& call) {
    switch (call.weight_type) {
        case SHUNTYARD_FP32: return run<X, float>(call);
        case SHUNTYARD_FP16: return run<X, Half>(call);
        case SHUNTYARD_BF16: return run<X, Bfloat>(call);
        case SHUNTYARD_E4M3: return call.quantised() ? run_quantised<X>(call) : run<X, E4m3>(call);
        case SHUNTYARD_INT4: return run<X, Int4Word>(call);
        default: return SHUNTYARD_INVALID_ARGUMENT;
    }
}

}  // namespace

int run_plain(const Experts& call) {
    switch (call.x_type) {
        case SHUNTYARD_FP32: return run_for_weights<float>(call);
        case SHUNTYARD_FP16: return run_for_weights<Half>(call);
        case SHUNTYARD_BF16: return run_for_weights<Bfloat>(call);
        default: return SHUNTYARD_INVALID_ARGUMENT;
    }
}

}  // namespace shuntyard
