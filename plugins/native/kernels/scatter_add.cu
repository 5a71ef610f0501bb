// Scatter-add, turned round: instead of rows scattering to tokens (atomics, and an order that varies), each token
// gathers its K rows, in the order of k. That needs the inverse of the permutation, which is one pass over its entries.
#include "kernels/launch.h"
#include "kernels/scalars.h"

namespace shuntyard {
namespace {

// One thread a row.
__global__ void invert(const int32_t* permutation, int32_t* row_of_slot, int64_t all_rows) {
    const int64_t row = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
    if (row >= all_rows) {
        return;
    }
    const int64_t slot = permutation[row];
    if (0 <= slot && slot < all_rows) {
        row_of_slot[slot] = static_cast<int32_t>(row);
    }
}

// One block along x a token, one thread a column.
template <typename X>
__global__ void gather_add(const X* base, const X* rows, const int32_t* permutation, const int32_t* row_of_slot, X* out,
                           int64_t all_rows, int64_t top_k, int64_t hidden) {
    const int64_t token = blockIdx.x;
    const int64_t column = int64_t{blockIdx.y} * blockDim.x + threadIdx.x;
    if (column >= hidden) {
        return;
    }
    float total = to_float(base[token * hidden + column]);
    for (int64_t slot = token * top_k; slot < (token + 1) * top_k; ++slot) {
        // A slot that the permutation does not hold was never written: whatever stands there fails this test.
        const int64_t row = row_of_slot[slot];
        const bool found = 0 <= row && row < all_rows && permutation[row] == slot;
        total += found ? to_float(rows[row * hidden + column]) : float_of(0x7fc00000u);
    }
    out[token * hidden + column] = from_float<X>(total);
}

struct Call {
    const void* base;
    const void* rows;
    const int32_t* permutation;
    void* out;
    int64_t tokens, top_k, hidden;
    void* workspace;
    void* stream;
};

template <typename X>
int run(const Call& call) {
    const int64_t all_rows = call.tokens * call.top_k;
    const dim3 block(kBlock);
    int32_t* row_of_slot = static_cast<int32_t*>(call.workspace);
    SHUNTYARD_TRY(launch(invert, grid_of(ceil_div(all_rows, kBlock)), block, call.stream, call.permutation, row_of_slot,
                         all_rows));
    SHUNTYARD_TRY(launch(gather_add<X>, grid_of(call.tokens, ceil_div(call.hidden, kBlock)), block, call.stream,
                         static_cast<const X*>(call.base), static_cast<const X*>(call.rows), call.permutation,
                         row_of_slot, static_cast<X*>(call.out), all_rows, call.top_k, call.hidden));
    return SHUNTYARD_OK;
}

}  // namespace
}  // namespace shuntyard

using namespace shuntyard;

size_t shuntyard_moe_scatter_add_workspace(int64_t tokens, int64_t top_k) {
    return valid_rows(tokens, top_k) ? aligned(tokens * top_k * sizeof(int32_t)) : 0;
}

int shuntyard_moe_scatter_add(int type, const void* base, const void* rows, const int32_t* permutation, void* out,
                              int64_t tokens, int64_t top_k, int64_t hidden, void* workspace, size_t workspace_size,
                              void* stream) {
    if (!valid_rows(tokens, top_k) || !valid_columns(hidden) || !valid_type(type)) {
        return SHUNTYARD_INVALID_ARGUMENT;
    }
    if (workspace_size < shuntyard_moe_scatter_add_workspace(tokens, top_k)) {
        return SHUNTYARD_WORKSPACE_TOO_SMALL;
    }
    if (tokens == 0) {
        return SHUNTYARD_OK;
    }
    const Call call{base, rows, permutation, out, tokens, top_k, hidden, workspace, stream};
    switch (type) {
        case SHUNTYARD_FP32: return run<float>(call);
        case SHUNTYARD_FP16: return run<Half>(call);
        case SHUNTYARD_BF16: return run<Bfloat>(call);
        default: return SHUNTYARD_INVALID_ARGUMENT;
    }
}
