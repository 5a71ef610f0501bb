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

// How wide tiles are: 128 rows, or 64 and twice the weights.
enum class HopperTile { k128, k64 };

// How rows of codes come and go.
struct HopperCodes {
    bool pair;     // gate and up, else down
    bool given;    // scales are given: gate and up have rows of their own, and what comes out is encoded
};

int launch_hopper_codes(int x_type, HopperTile tile, HopperCodes codes, const HopperProduct& product,
                        const CodeScales& scales, int multiprocessors, void* stream);

// Rows and weights of X.
int launch_hopper_half(HopperTile tile, Major major, bool pair, const HopperProduct& product, int multiprocessors,
                       void* stream);
int launch_hopper_bfloat(HopperTile tile, Major major, bool pair, const HopperProduct& product, int multiprocessors,
                         void* stream);

}  // namespace shuntyard
