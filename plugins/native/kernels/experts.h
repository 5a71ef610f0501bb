// One call of the experts op, as its families of kernels share it.
#pragma once

#include "kernels/hopper.h"
#include "kernels/matrices.h"
#include "kernels/prepare.h"

namespace shuntyard {

struct Experts {
    const void* x;
    const float* scores;
    const int32_t* expert_offsets;
    const int32_t* permutation;
    void* rows;
    int x_type, weight_type, layout, activations;
    int64_t all_rows, experts, top_k, width, intermediate;  // width is H
    void* stream;
    Device device;

    // Within the workspace; null where the form does not have it.
    void* scaled;        // X [T*K, H]: inputs, gathered and scaled
    void* hidden;        // X [T*K, F]
    E4m3* gate_codes;    // [T*K, H]: of the inputs
    E4m3* up_codes;      // the same array as gate_codes, unless scales are given
    E4m3* hidden_codes;  // [T*K, F]
    float* factors;      // f32 [T*K]: of the inputs, later of hidden rows
    TensorMap* maps;     // [3E]

    ExpertMatrices matrices;

    // Rows are multiplied as codes.
    bool quantised() const { return activations != SHUNTYARD_AS_THEY_ARE; }
};

// One launch: the inputs, gathered and scaled, or that as codes; rows of no expert are NaN in the result. With maps,
// descriptors of all weights, too. Chunk: of Preparation.
int prepare_inputs(const Experts& call, const WeightMaps* maps = nullptr, int chunk = 0);

// One launch: hidden rows as codes.
int prepare_hidden(const Experts& call);

// The families. `takes` says whether there are kernels for the form and the extents on this device.
int run_plain(const Experts& call);

bool direct_takes(const Experts& call, int tokens_of_tile);
int run_direct(const Experts& call, int tokens_of_tile);

bool hopper_takes(const Experts& call, HopperTile tile);
int run_hopper(const Experts& call, HopperTile tile);

}  // namespace shuntyard
