// Scatter-add, turned round: instead of rows scattering to tokens (atomics, and an order that varies), each token
// gathers its K rows, in the order of k. That needs the inverse of the permutation.
//
// Up to 65,536 rows in one launch: a block has a range of tokens and looks through the whole permutation for their
// rows, which costs less than a launch and a trip through memory. More rows: one launch inverts, another adds.
#include "kernels/primitives.h"

namespace shuntyard {
namespace {

constexpr int64_t kMostSearched = 65536;
constexpr unsigned kMostThreads = 256;
constexpr int64_t kBlocksOfMultiprocessor = 4;
constexpr int kTogether = 2;  // pieces of a thread: with theirs, enough bytes of a multiprocessor are on their way
constexpr int64_t kFewestPieces = 64;  // of a row, that a block of its own is worth
constexpr size_t kSharedSpace = 48 * 1024;

struct Addition {
    const void* base;
    const void* rows;
    const int32_t* permutation;
    int32_t* row_of_slot;  // [T*K], of two launches
    void* out;
    int64_t tokens, top_k, all_rows, hidden;
};

// Columns that a thread reads and writes at once.
template <typename X, bool kWide>
struct Piece {
    static constexpr int kColumns = kWide ? 16 / sizeof(X) : 1;
    float values[kColumns];

    __device__ void read(const X* from) {
        if constexpr (!kWide) {
            values[0] = to_float(*from);
        } else {
            const Quad q = load_once(from);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                if constexpr (sizeof(X) == 4) {
                    values[i] = float_of(q.words[i]);
                } else {
                    values[2 * i] = to_float(X{static_cast<uint16_t>(q.words[i])});
                    values[2 * i + 1] = to_float(X{static_cast<uint16_t>(q.words[i] >> 16)});
                }
            }
        }
    }

    __device__ void fill(float value) {
#pragma unroll
        for (float& each : values) {
            each = value;
        }
    }

    __device__ void write(X* to) const {
        if constexpr (!kWide) {
            *to = from_float<X>(values[0]);
        } else {
            Quad q;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                if constexpr (sizeof(X) == 4) {
                    q.words[i] = bits_of(values[i]);
                } else {
                    q.words[i] = pack<X>(values[2 * i], values[2 * i + 1]);
                }
            }
            store(to, q);
        }
    }
};

// Where the range of part `part` of `parts` begins: all are of one size, or one less.
__device__ inline int64_t part_of(int64_t size, int64_t part, int64_t parts) { return part * size / parts; }

// A block's tokens are a part of them by its x, and its columns by its y.
__device__ inline int64_t first_token(const Addition& task, int64_t block) {
    return part_of(task.tokens, block, gridDim.x);
}

// Adds up the block's tokens, whose rows `find` knows by their slots; negative: there is none.
template <typename X, bool kWide, typename Find>
__device__ inline void add_rows(const Addition& task, const Find& find) {
    using Part = Piece<X, kWide>;
    const int64_t row_pieces = task.hidden / Part::kColumns;
    const int64_t first_piece = part_of(row_pieces, blockIdx.y, gridDim.y);
    const int64_t next_piece = part_of(row_pieces, int64_t{blockIdx.y} + 1, gridDim.y);
    const uint32_t pieces = static_cast<uint32_t>(next_piece - first_piece);
    const X* const base = static_cast<const X*>(task.base) + first_piece * Part::kColumns;
    const X* const rows = static_cast<const X*>(task.rows) + first_piece * Part::kColumns;
    X* const out = static_cast<X*>(task.out) + first_piece * Part::kColumns;
    const uint32_t step_tokens = blockDim.x / pieces, step_pieces = blockDim.x % pieces;
    // Numbers of tokens and of slots fit 31 bits, a row's columns too.
    const uint32_t end = static_cast<uint32_t>(first_token(task, int64_t{blockIdx.x} + 1));
    const uint32_t top_k = static_cast<uint32_t>(task.top_k);
    uint32_t token = static_cast<uint32_t>(first_token(task, blockIdx.x)) + threadIdx.x / pieces;
    uint32_t piece = threadIdx.x % pieces;
    while (token < end) {
        Part totals[kTogether];
        uint32_t tokens[kTogether], columns[kTogether];
#pragma unroll
        for (int i = 0; i < kTogether; ++i) {
            tokens[i] = token;
            columns[i] = piece * Part::kColumns;
            if (token < end) {
                totals[i].read(base + token * task.hidden + columns[i]);
            }
            token += step_tokens;
            piece += step_pieces;
            if (piece >= pieces) {
                piece -= pieces;
                ++token;
            }
        }
        for (uint32_t k = 0; k < top_k; ++k) {
            Part others[kTogether];
#pragma unroll
            for (int i = 0; i < kTogether; ++i) {
                const int32_t row = tokens[i] < end ? find(tokens[i] * top_k + k) : -1;
                if (row >= 0) {
                    others[i].read(rows + row * task.hidden + columns[i]);
                } else {
                    others[i].fill(float_of(0x7fc00000u));
                }
            }
#pragma unroll
            for (int i = 0; i < kTogether; ++i) {
#pragma unroll
                for (int j = 0; j < Part::kColumns; ++j) {
                    totals[i].values[j] += others[i].values[j];
                }
            }
        }
#pragma unroll
        for (int i = 0; i < kTogether; ++i) {
            if (tokens[i] < end) {
                totals[i].write(out + tokens[i] * task.hidden + columns[i]);
            }
        }
    }
}

template <typename X, bool kWide>
__global__ void __launch_bounds__(kMostThreads, kBlocksOfMultiprocessor)
    search_and_add(SHUNTYARD_TABLE(Addition) task, bool whole_quads) {
    int32_t* const row_of = reinterpret_cast<int32_t*>(shared_memory());
    const int32_t all_rows = static_cast<int32_t>(task.all_rows), threads = static_cast<int32_t>(blockDim.x);
    const int32_t thread = static_cast<int32_t>(threadIdx.x);
    const int64_t first_slot = first_token(task, blockIdx.x) * task.top_k;
    const uint32_t slots = static_cast<uint32_t>(first_token(task, int64_t{blockIdx.x} + 1) * task.top_k - first_slot);
    for (uint32_t slot = threadIdx.x; slot < slots; slot += blockDim.x) {
        row_of[slot] = -1;
    }
    sync_block();
    // Of two rows for one slot, the later counts.
    const auto look = [&](int32_t row, uint32_t slot) {
        const uint32_t own = slot - static_cast<uint32_t>(first_slot);
        if (own < slots) {
            shared_max(row_of + own, row);
        }
    };
    int32_t searched = 0;
    if (whole_quads) {
        searched = all_rows / 4 * 4;
#pragma unroll 4
        for (int32_t row = 4 * thread; row < searched; row += 4 * threads) {
            const Quad four = load(task.permutation + row);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                look(row + i, four.words[i]);
            }
        }
    }
    for (int32_t row = searched + thread; row < all_rows; row += threads) {
        look(row, static_cast<uint32_t>(task.permutation[row]));
    }
    sync_block();
    add_rows<X, kWide>(task, [&](uint32_t slot) { return row_of[slot - static_cast<uint32_t>(first_slot)]; });
}

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

template <typename X, bool kWide>
__global__ void __launch_bounds__(kMostThreads, kBlocksOfMultiprocessor)
    gather_and_add(SHUNTYARD_TABLE(Addition) task) {
    add_rows<X, kWide>(task, [&](uint32_t slot) {
        // A slot that the permutation does not hold was never written: whatever stands there fails this test.
        const int32_t row = task.row_of_slot[slot];
        const bool found = 0 <= row && row < task.all_rows && task.permutation[row] == static_cast<int32_t>(slot);
        return found ? row : -1;
    });
}

template <typename X, bool kWide>
int run_in(const Addition& task, void* stream) {
    Device device;
    SHUNTYARD_TRY(current_device(device));
    const auto smaller = [](int64_t a, int64_t b) { return a < b ? a : b; };
    const int64_t most_blocks = kBlocksOfMultiprocessor * device.multiprocessors;
    const int64_t blocks = smaller(task.tokens, most_blocks);
    // Few tokens are shared out by columns, too.
    const int64_t row_pieces = task.hidden / Piece<X, kWide>::kColumns;
    const int64_t parts = smaller(most_blocks / blocks, ceil_div(row_pieces, kFewestPieces));
    const int64_t tokens = ceil_div(task.tokens, blocks);
    const int64_t pieces = ceil_div(row_pieces, parts) * tokens;
    Shape shape{grid_of(blocks, parts), dim3(static_cast<unsigned>(smaller(ceil_div(pieces, 32) * 32, kMostThreads)))};
    const size_t searched = tokens * task.top_k * sizeof(int32_t);
    if (task.all_rows <= kMostSearched && searched <= kSharedSpace) {
        shape.shared = searched;
        const bool whole_quads = on_16_bytes(task.permutation);
        return launch(search_and_add<X, kWide>, shape, stream, task, whole_quads);
    }
    SHUNTYARD_TRY(launch(invert, grid_of(ceil_div(task.all_rows, kBlock)), dim3(kBlock), stream, task.permutation,
                         task.row_of_slot, task.all_rows));
    return launch(gather_and_add<X, kWide>, shape, stream, task);
}

template <typename X>
int run(const Addition& task, void* stream) {
    const bool wide =
        on_16_bytes(task.base) && on_16_bytes(task.rows) && on_16_bytes(task.out) && task.hidden * sizeof(X) % 16 == 0;
    return wide ? run_in<X, true>(task, stream) : run_in<X, false>(task, stream);
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
    const Addition task{base,  rows,           permutation, static_cast<int32_t*>(workspace), out, tokens,
                        top_k, tokens * top_k, hidden};
    switch (type) {
        case SHUNTYARD_FP32: return run<float>(task, stream);
        case SHUNTYARD_FP16: return run<Half>(task, stream);
        case SHUNTYARD_BF16: return run<Bfloat>(task, stream);
        default: return SHUNTYARD_INVALID_ARGUMENT;
    }
}
