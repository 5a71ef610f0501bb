// Experts: a grouped SwiGLU over rows that are sorted by expert.
//
//   scaled = round(scores * x), gathered                        [T*K, H]
//   hidden = round(silu(round(scaled @ gate)) * round(scaled @ up))   [T*K, F]
//   rows   = round(hidden @ down)                               [T*K, H]
//
// With quantised activations, scaled and hidden become E4M3 codes before they are multiplied (kernels/encode.h), and a
// product is (codes @ weight values) * the rows' factor * the weight's scale.
//
// A thread owns one output column for a tile of up to kTileRows consecutive rows of one expert: a weight is read and
// scaled once for the whole tile, and the row values are the same for the whole warp. Neighbouring threads read
// neighbouring weights, but those of layout LINEAR. Sums run over the inner extent in order, so the result does not
// depend on how rows fall into tiles, nor on the layout.
#include "kernels/encode.h"
#include "kernels/matrices.h"
#include "kernels/rows.h"

namespace shuntyard {
namespace {

// One block along x a row.
template <typename X>
__global__ void scale(const X* x, const float* scores, const int32_t* permutation, X* scaled, int64_t all_rows,
                      int64_t top_k, int64_t hidden) {
    const int64_t row = blockIdx.x;
    const int64_t column = column_of_thread();
    if (column >= hidden) {
        return;
    }
    const int64_t slot = permutation[row];
    const bool exists = 0 <= slot && slot < all_rows;
    const float value = exists ? to_float(x[slot / top_k * hidden + column]) * scores[row] : not_a_number();
    scaled[row * hidden + column] = from_float<X>(value);
}

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
            const float rounded_gate = rounded_to<X>(gate_sum[r]);
            const float activated = rounded_gate * sigmoid(rounded_gate);
            out[(first + r) * intermediate + column] = from_float<X>(activated * rounded_to<X>(up_sum[r]));
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

// The call, with its types erased.
struct Call {
    const void* x;
    const float* scores;
    const int32_t* expert_offsets;
    const int32_t* permutation;
    void* rows;
    int activations;
    int64_t all_rows, experts, top_k, hidden, intermediate;
    void* workspace;
    void* stream;
    ExpertMatrices matrices;
};

size_t size_of(int type) { return type == SHUNTYARD_FP32 ? 4 : 2; }

// Where each array lies in the workspace, in bytes from its start; shuntyard_plugins.h says which there are.
struct Workspace {
    size_t scaled, hidden, gate_codes, up_codes, hidden_codes, factors, end;

    Workspace(size_t x_size, int activations, int64_t all_rows, int64_t width, int64_t intermediate) {
        const bool quantised = activations != SHUNTYARD_AS_THEY_ARE;
        scaled = 0;
        hidden = scaled + aligned(all_rows * width * x_size);
        gate_codes = hidden + aligned(all_rows * intermediate * x_size);
        hidden_codes = gate_codes + (quantised ? aligned(all_rows * width) : 0);
        up_codes = hidden_codes + (quantised ? aligned(all_rows * intermediate) : 0);
        factors = up_codes + (activations == SHUNTYARD_STATIC ? aligned(all_rows * width) : 0);
        end = factors + (activations == SHUNTYARD_DYNAMIC ? aligned(all_rows * sizeof(float)) : 0);
    }
};

template <typename T>
T* at(const Call& call, size_t offset) {
    return reinterpret_cast<T*>(static_cast<char*>(call.workspace) + offset);
}

dim3 over_rows_of(const Call& call, int64_t width) { return grid_of(call.all_rows, ceil_div(width, kBlock)); }

template <typename X, typename W, typename Rows>
int launch_swiglu(const Call& call, const Rows* gate_rows, const Rows* up_rows, const float* factors, X* activated) {
    return launch(swiglu<X, W, Rows>, over_rows_of(call, call.intermediate), dim3(kBlock), call.stream, gate_rows,
                  up_rows, factors, call.expert_offsets, call.matrices.gate, call.matrices.up, activated, call.all_rows,
                  call.experts, call.hidden, call.intermediate);
}

template <typename X, typename W, typename Rows>
int launch_project(const Call& call, const Rows* activated, const float* factors) {
    return launch(project<X, W, Rows>, over_rows_of(call, call.hidden), dim3(kBlock), call.stream, activated, factors,
                  call.expert_offsets, call.matrices.down, static_cast<X*>(call.rows), call.all_rows, call.experts,
                  call.hidden, call.intermediate);
}

template <typename X>
int launch_scale(const Call& call, X* scaled) {
    return launch(scale<X>, over_rows_of(call, call.hidden), dim3(kBlock), call.stream, static_cast<const X*>(call.x),
                  call.scores, call.permutation, scaled, call.all_rows, call.top_k, call.hidden);
}

template <typename X>
int launch_encode(const Call& call, const X* rows, const float* factors, const Matrices& matrices, E4m3* codes,
                  int64_t width) {
    return launch(encode<X>, over_rows_of(call, width), dim3(kBlock), call.stream, rows, factors, call.expert_offsets,
                  matrices, codes, call.experts, width);
}

template <typename X>
int launch_row_factors(const Call& call, const X* rows, float* factors, int64_t width) {
    return launch(row_factors<X>, grid_of(ceil_div(call.all_rows, kBlock)), dim3(kBlock), call.stream, rows, factors,
                  call.all_rows, width);
}

template <typename X, typename W>
int run(const Call& call) {
    const Workspace places(sizeof(X), call.activations, call.all_rows, call.hidden, call.intermediate);
    X* scaled = at<X>(call, places.scaled);
    X* activated = at<X>(call, places.hidden);
    SHUNTYARD_TRY(launch_scale(call, scaled));
    SHUNTYARD_TRY((launch_swiglu<X, W, X>(call, scaled, scaled, nullptr, activated)));
    return launch_project<X, W, X>(call, activated, nullptr);
}

// With E4M3 weights and quantised activations.
template <typename X>
int run_quantised(const Call& call) {
    const Workspace places(sizeof(X), call.activations, call.all_rows, call.hidden, call.intermediate);
    const bool dynamic = call.activations == SHUNTYARD_DYNAMIC;
    X* scaled = at<X>(call, places.scaled);
    X* activated = at<X>(call, places.hidden);
    E4m3* gate_codes = at<E4m3>(call, places.gate_codes);
    E4m3* up_codes = dynamic ? gate_codes : at<E4m3>(call, places.up_codes);
    E4m3* hidden_codes = at<E4m3>(call, places.hidden_codes);
    float* factors = dynamic ? at<float>(call, places.factors) : nullptr;
    SHUNTYARD_TRY(launch_scale(call, scaled));
    if (dynamic) {
        SHUNTYARD_TRY(launch_row_factors(call, scaled, factors, call.hidden));
    } else {
        SHUNTYARD_TRY(launch_encode(call, scaled, factors, call.matrices.up, up_codes, call.hidden));
    }
    SHUNTYARD_TRY(launch_encode(call, scaled, factors, call.matrices.gate, gate_codes, call.hidden));
    SHUNTYARD_TRY((launch_swiglu<X, E4m3, E4m3>(call, gate_codes, up_codes, factors, activated)));
    if (dynamic) {
        SHUNTYARD_TRY(launch_row_factors(call, activated, factors, call.intermediate));
    }
    SHUNTYARD_TRY(launch_encode(call, activated, factors, call.matrices.down, hidden_codes, call.intermediate));
    return launch_project<X, E4m3, E4m3>(call, hidden_codes, factors);
}

template <typename X>
int run_for_weights(int weight_type, const Call& call) {
    switch (weight_type) {
        case SHUNTYARD_FP32: return run<X, float>(call);
        case SHUNTYARD_FP16: return run<X, Half>(call);
        case SHUNTYARD_BF16: return run<X, Bfloat>(call);
        case SHUNTYARD_E4M3:
            return call.activations == SHUNTYARD_AS_THEY_ARE ? run<X, E4m3>(call) : run_quantised<X>(call);
        case SHUNTYARD_INT4: return run<X, Int4Word>(call);
        default: return SHUNTYARD_INVALID_ARGUMENT;
    }
}

bool valid(int64_t tokens, int64_t top_k, int64_t hidden, int64_t intermediate) {
    return valid_rows(tokens, top_k) && valid_columns(hidden) && valid_columns(intermediate);
}

}  // namespace
}  // namespace shuntyard

using namespace shuntyard;

size_t shuntyard_moe_experts_workspace(int x_type, int activations, int64_t tokens, int64_t top_k, int64_t hidden,
                                       int64_t intermediate) {
    if (!valid(tokens, top_k, hidden, intermediate) || activations < SHUNTYARD_AS_THEY_ARE ||
        activations > SHUNTYARD_DYNAMIC) {
        return 0;
    }
    return Workspace(size_of(x_type), activations, tokens * top_k, hidden, intermediate).end;
}

int shuntyard_moe_experts(int x_type, const shuntyard_expert_weights* weights, const void* x, const float* scores,
                          const int32_t* expert_offsets, const int32_t* permutation, void* rows, int64_t tokens,
                          int64_t experts, int64_t top_k, int64_t hidden, int64_t intermediate, void* workspace,
                          size_t workspace_size, void* stream) {
    if (!valid(tokens, top_k, hidden, intermediate) || experts < 1 || experts > SHUNTYARD_MAX_EXPERTS ||
        top_k > experts || !valid_type(x_type) || !valid_weights(*weights, hidden, intermediate)) {
        return SHUNTYARD_INVALID_ARGUMENT;
    }
    if (workspace_size <
        shuntyard_moe_experts_workspace(x_type, weights->activations, tokens, top_k, hidden, intermediate)) {
        return SHUNTYARD_WORKSPACE_TOO_SMALL;
    }
    if (tokens == 0) {
        return SHUNTYARD_OK;
    }
    Call call{
        x,      scores,       expert_offsets, permutation, rows, weights->activations, tokens * top_k, experts, top_k,
        hidden, intermediate, workspace,      stream,      {}};
    fill(call.matrices, *weights, experts, hidden, intermediate);
    switch (x_type) {
        case SHUNTYARD_FP32: return run_for_weights<float>(weights->type, call);
        case SHUNTYARD_FP16: return run_for_weights<Half>(weights->type, call);
        case SHUNTYARD_BF16: return run_for_weights<Bfloat>(weights->type, call);
        default: return SHUNTYARD_INVALID_ARGUMENT;
    }
}
