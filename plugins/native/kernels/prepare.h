// What happens to rows before a product, one launch for all of it: gathered and scaled by the score, or taken as they
// are; then rounded to X, or quantised to E4M3 codes (contract.py, ShuntyardQuantize).
#pragma once

#include "kernels/matrices.h"
#include "kernels/primitives.h"
#include "kernels/rows.h"

namespace shuntyard {

// The scales of activations that are given: one for each expert's matrix.
struct GivenScales {
    const void* scales[SHUNTYARD_MAX_EXPERTS];
    int type;
};

// The descriptors by which TMA copies weights, made in the same launch: of each expert's gate, then up, then down.
struct WeightMaps {
    TensorMap* maps = nullptr;  // null: none are made
    TensorMap into, down;       // of gate and up, and of down, but for their addresses
    const void* weights[3][SHUNTYARD_MAX_EXPERTS];
};

struct Preparation {
    const void* rows;            // X: x [T, width] with a permutation, else [T*K, width]
    const float* scores;         // null without a permutation
    const int32_t* permutation;  // null: row i is row i
    const int32_t* expert_offsets;
    void* scaled;      // X [T*K, width], or null
    E4m3* codes;       // [T*K, width], or null
    E4m3* more_codes;  // [T*K, width], by the second scales, or null
    float* factors;    // f32 [T*K]: every row makes its own; null: scales are given
    void* orphans;     // X [T*K, width]: rows of no expert become NaN there; or null
    int64_t all_rows, top_k, width;
    int32_t experts;
    int chunk;  // scaled rows lie as mixed_place says for such chunks; 0: in order
};

GivenScales given_scales(const Matrices& matrices);

// Of type x_type; maps may be null.
int prepare(int x_type, const Preparation& task, const GivenScales& first, const GivenScales& second,
            const WeightMaps* maps, void* stream);

}  // namespace shuntyard
