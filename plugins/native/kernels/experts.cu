// Experts: a grouped SwiGLU over rows that are sorted by expert.
//
//   scaled = round(scores * x), gathered                        [T*K, H]
//   hidden = round(silu(round(scaled @ gate)) * round(scaled @ up))   [T*K, F]
//   rows   = round(hidden @ down)                               [T*K, H]
//
// A thread owns one output column for a tile of up to kTileRows consecutive rows of one expert: a weight is read and
// scaled once for the whole tile, and the row values are the same for the whole warp. Neighbouring threads read
// neighbouring weights, but those of layout LINEAR. Sums run over the inner extent in order, so the result does not
// depend on how rows fall into tiles, nor on the layout.
#include "kernels/matrices.h"

namespace shuntyard {
namespace {

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

// One thread's part of the first product: one column of hidden, for rows of one expert.
template <typename X, typename W>
struct GateAndUp {
    const X* scaled;  // the tile's first row
    Column<X, W> gate, up;
    X* out;  // the tile's first row
    int64_t hidden, intermediate, column, group;

    template <int Rows>
    __device__ void compute(int first) const {
        float gate_sum[Rows] = {};
        float up_sum[Rows] = {};
        const X* values = scaled + first * hidden;
        for (int64_t begin = 0; begin < hidden; begin += group) {
            const float gate_scale = gate.scale(begin / group);
            const float up_scale = up.scale(begin / group);
            for (int64_t h = begin; h < begin + group; ++h) {
                const float gate_weight = gate.weight(h, gate_scale);
                const float up_weight = up.weight(h, up_scale);
                for (int r = 0; r < Rows; ++r) {
                    const float value = to_float(values[r * hidden + h]);
                    gate_sum[r] += value * gate_weight;
                    up_sum[r] += value * up_weight;
                }
            }
        }
        for (int r = 0; r < Rows; ++r) {
            const float rounded_gate = rounded_to<X>(gate_sum[r]);
            const float activated = rounded_gate * sigmoid(rounded_gate);
            out[(first + r) * intermediate + column] = from_float<X>(activated * rounded_to<X>(up_sum[r]));
        }
    }
};

// One thread's part of the second product: one column of the output, for rows of one expert.
template <typename X, typename W>
struct Down {
    const X* activated;  // the tile's first row
    Column<X, W> down;
    X* out;  // the tile's first row
    int64_t hidden, intermediate, column, group;

    template <int Rows>
    __device__ void compute(int first) const {
        float sum[Rows] = {};
        const X* values = activated + first * intermediate;
        for (int64_t begin = 0; begin < intermediate; begin += group) {
            const float scale = down.scale(begin / group);
            for (int64_t f = begin; f < begin + group; ++f) {
                const float weight = down.weight(f, scale);
                for (int r = 0; r < Rows; ++r) {
                    sum[r] += to_float(values[r * intermediate + f]) * weight;
                }
            }
        }
        for (int r = 0; r < Rows; ++r) {
            out[(first + r) * hidden + column] = from_float<X>(sum[r]);
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

template <typename X, typename W>
__global__ void swiglu(const X* scaled, const int32_t* expert_offsets, SHUNTYARD_TABLE(Matrices) gate,
                       SHUNTYARD_TABLE(Matrices) up, X* activated, int64_t all_rows, int32_t experts, int64_t hidden,
                       int64_t intermediate) {
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
    const GateAndUp<X, W> product{scaled + row * hidden,
                                  Column<X, W>(gate, tile.expert, column),
                                  Column<X, W>(up, tile.expert, column),
                                  activated + row * intermediate,
                                  hidden,
                                  intermediate,
                                  column,
                                  gate.group};
    compute_tile(product, tile.rows);
}

template <typename X, typename W>
__global__ void project(const X* activated, const int32_t* expert_offsets, SHUNTYARD_TABLE(Matrices) down, X* out,
                        int64_t all_rows, int32_t experts, int64_t hidden, int64_t intermediate) {
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
    const Down<X, W> product{activated + row * intermediate,
                             Column<X, W>(down, tile.expert, column),
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
    int64_t all_rows, experts, top_k, hidden, intermediate;
    void* workspace;
    void* stream;
    ExpertMatrices matrices;
};

template <typename X, typename W>
int run(const Call& call) {
    const dim3 block(kBlock);
    const dim3 over_hidden = grid_of(call.all_rows, ceil_div(call.hidden, kBlock));
    const dim3 over_intermediate = grid_of(call.all_rows, ceil_div(call.intermediate, kBlock));
    X* scaled = static_cast<X*>(call.workspace);
    X* activated = scaled + aligned(call.all_rows * call.hidden * sizeof(X)) / sizeof(X);
    SHUNTYARD_TRY(launch(scale<X>, over_hidden, block, call.stream, static_cast<const X*>(call.x), call.scores,
                         call.permutation, scaled, call.all_rows, call.top_k, call.hidden));
    SHUNTYARD_TRY(launch(swiglu<X, W>, over_intermediate, block, call.stream, scaled, call.expert_offsets,
                         call.matrices.gate, call.matrices.up, activated, call.all_rows, call.experts, call.hidden,
                         call.intermediate));
    SHUNTYARD_TRY(launch(project<X, W>, over_hidden, block, call.stream, activated, call.expert_offsets,
                         call.matrices.down, static_cast<X*>(call.rows), call.all_rows, call.experts, call.hidden,
                         call.intermediate));
    return SHUNTYARD_OK;
}

template <typename X>
int run_for_weights(int weight_type, const Call& call) {
    switch (weight_type) {
        case SHUNTYARD_FP32: return run<X, float>(call);
        case SHUNTYARD_FP16: return run<X, Half>(call);
        case SHUNTYARD_BF16: return run<X, Bfloat>(call);
        case SHUNTYARD_E4M3: return run<X, E4m3>(call);
        case SHUNTYARD_INT4: return run<X, Int4Word>(call);
        default: return SHUNTYARD_INVALID_ARGUMENT;
    }
}

bool valid(int64_t tokens, int64_t top_k, int64_t hidden, int64_t intermediate) {
    return valid_rows(tokens, top_k) && valid_columns(hidden) && valid_columns(intermediate);
}

size_t size_of(int type) { return type == SHUNTYARD_FP32 ? 4 : 2; }

}  // namespace
}  // namespace shuntyard

using namespace shuntyard;

size_t shuntyard_moe_experts_workspace(int x_type, int64_t tokens, int64_t top_k, int64_t hidden,
                                       int64_t intermediate) {
    if (!valid(tokens, top_k, hidden, intermediate)) {
        return 0;
    }
    const int64_t rows = tokens * top_k;
    return aligned(rows * hidden * size_of(x_type)) + aligned(rows * intermediate * size_of(x_type));
}

int shuntyard_moe_experts(int x_type, const shuntyard_expert_weights* weights, const void* x, const float* scores,
                          const int32_t* expert_offsets, const int32_t* permutation, void* rows, int64_t tokens,
                          int64_t experts, int64_t top_k, int64_t hidden, int64_t intermediate, void* workspace,
                          size_t workspace_size, void* stream) {
    if (!valid(tokens, top_k, hidden, intermediate) || experts < 1 || experts > SHUNTYARD_MAX_EXPERTS ||
        top_k > experts || !valid_type(x_type) || !valid_weights(*weights, hidden, intermediate)) {
        return SHUNTYARD_INVALID_ARGUMENT;
    }
    if (workspace_size < shuntyard_moe_experts_workspace(x_type, tokens, top_k, hidden, intermediate)) {
        return SHUNTYARD_WORKSPACE_TOO_SMALL;
    }
    if (tokens == 0) {
        return SHUNTYARD_OK;
    }
    Call call{x,      scores,       expert_offsets, permutation, rows, tokens * top_k, experts, top_k,
              hidden, intermediate, workspace,      stream,      {}};
    fill(call.matrices, *weights, experts, hidden, intermediate);
    switch (x_type) {
        case SHUNTYARD_FP32: return run_for_weights<float>(weights->type, call);
        case SHUNTYARD_FP16: return run_for_weights<Half>(weights->type, call);
        case SHUNTYARD_BF16: return run_for_weights<Bfloat>(weights->type, call);
        default: return SHUNTYARD_INVALID_ARGUMENT;
    }
}
