// The experts on Hopper, for the dispatcher (experts.cu). The kernels are in hopper_product.h.
#pragma once

#include "kernels/matrices.h"
#include "kernels/primitives.h"

namespace shuntyard {

// One product over all experts: gate and up together, or down.
struct HopperProduct {
    TensorMap rows;         // of X or E4M3 [T*K, inner]
    TensorMap more_rows;    // those that up is multiplied with, if they are not the same
    const TensorMap* maps;  // of weights: all experts' gate, then up; or down
    const int32_t* expert_offsets;
    const float* factors;  // f32 [T*K], if every row has its own; else null
    void* out;             // X [T*K, columns], or E4M3 if it is encoded
    int64_t all_rows, inner, columns;
    int32_t experts;
};

// What products of E4M3 numbers are scaled with. Of the two parts, gate and up, down is the first.
struct CodeScales {
    const void* weights[2][SHUNTYARD_MAX_EXPERTS];
    const void* rows[2][SHUNTYARD_MAX_EXPERTS];  // null if factors are given
    const void* next[SHUNTYARD_MAX_EXPERTS];     // of the rows that come out, if they are encoded
    int64_t stride;                              // from one column's scale to the next column's
    int weight_type, row_type;
};

struct NoScales {};

// Tiles of 64 or 128 rows; of 128 and twice the columns, where that is not what 128 stands for anyhow.
enum class HopperTile {
    k64,
    k128,
    kWide
};

// How rows of codes come and go.
struct HopperCodes {
    bool pair;   // gate and up, else down
    bool given;  // scales are given: gate and up have rows of their own, and what comes out is encoded
};

int launch_hopper_codes(int x_type, HopperTile tile, HopperCodes codes, const HopperProduct& product,
                        const CodeScales& scales, int multiprocessors, void* stream);

// Rows and weights of X.
int launch_hopper_half(HopperTile tile, Major major, bool pair, const HopperProduct& product, int multiprocessors,
                       void* stream);
int launch_hopper_bfloat(HopperTile tile, Major major, bool pair, const HopperProduct& product, int multiprocessors,
                         void* stream);

// What weights are scaled with before they are rounded to X. Of the two parts, gate and up, down is the first.
struct MixedScales {
    const void* scales[2][SHUNTYARD_MAX_EXPERTS];
    int64_t stride;  // from one channel's scale to the next channel's
    int32_t group;   // of INT4: how many of K share one
    int type;
};

// Rows of X, in the order of mixed_place, and weights of E4M3 or INT4. What comes out of gate and up is in that order,
// too.
int launch_hopper_mixed_half(HopperTile tile, bool int4, bool pair, const HopperProduct& product,
                             const MixedScales& scales, int multiprocessors, void* stream);
int launch_hopper_mixed_bfloat(HopperTile tile, bool int4, bool pair, const HopperProduct& product,
                               const MixedScales& scales, int multiprocessors, void* stream);

// Where number k of such a row lies, for weights of which 16 bytes hold `chunk` numbers. Four such chunks of a channel,
// one for each of four threads, make a block of 4 * chunk numbers. Product s of a block takes of chunk t its numbers
// 4s .. 4s + 3: as numbers 2t, 2t + 1, 2t + 8 and 2t + 9 of the product's 16.
__host__ __device__ inline int64_t mixed_place(int64_t k, int chunk) {
    const int64_t block = k / (4 * chunk) * (4 * chunk);
    const int within = static_cast<int>(k % (4 * chunk));
    const int t = within / chunk, s = within % chunk / 4, i = within % 4;
    return block + 16 * s + 8 * (i / 2) + 2 * t + i % 2;
}

}  // namespace shuntyard
