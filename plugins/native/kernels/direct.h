// The experts by mma.sync, weights going from memory straight into registers, for the dispatcher (experts.cu). The
// kernels are in direct_launch.h.
#pragma once

#include "kernels/matrices.h"

namespace shuntyard {

// How weights come, and what they are multiplied with.
enum class DirectForm {
    kNone,    // not served here
    kAlongK,  // rows of X, weights of X as [out, in]
    kAlongN,  // rows of X, weights of X as [in, out]
    kE4m3,    // rows of X, weights of E4M3 as [out, in]
    kInt4,    // rows of X, weights of INT4 as [out, in]
    kCodes,   // rows of E4M3 codes, weights of E4M3 as [out, in]
};

// One call of the experts. What a form does not use is null.
struct DirectCall {
    int x_type, weight_type, activations;
    const void* x;  // X [T, H]
    const float* scores;
    const int32_t* expert_offsets;
    const int32_t* permutation;
    void* hidden_rows;         // X [T*K, F]: what gate and up make, and down takes unless rows are codes
    void* rows;                // X [T*K, H]
    const E4m3* gate_codes;    // [T*K, H], of the scaled inputs
    const E4m3* up_codes;      // the same array as gate_codes, or one by scales of its own
    const E4m3* hidden_codes;  // [T*K, F]
    const float* factors;      // f32 [T*K], of the codes that the product at hand takes; null if scales are given
    int64_t all_rows, experts, top_k, hidden, intermediate;
    const ExpertMatrices* matrices;
    void* stream;
};

// The form that the call's products have here: kNone if these kernels cannot take it, be it for its types, its extents,
// or an address that 16 bytes cannot be loaded from. They need compute capability 8.9.
//
// K, of both products, must be a multiple of what 16 bytes of weights hold; a group of INT4, of 32; along N, both
// extents of 8.
DirectForm direct_form(const DirectCall& call);
inline bool direct_takes(const DirectCall& call) { return direct_form(call) != DirectForm::kNone; }

// How many rows of an expert a block takes at once: 8 or 16, and but for along N 32 or 64. Blocks of up to 32 split K
// over their warps, those of more the channels.
bool direct_has_tile(DirectForm form, int tokens);

// hidden_rows from x or codes: gathered, scaled by the scores, multiplied, SwiGLU. Then rows from hidden_rows or codes.
// Each is one launch for every 128 experts. Rows that the offsets give to no expert become NaN.
//
// A row's bits depend on nothing but its own inputs, its expert's weights and how the tile's size splits K: not on the
// rows beside it, nor on its place among them. Sizes that split K over warps all give the same bits.
int direct_gate_up(const DirectCall& call, int tokens);
int direct_down(const DirectCall& call, int tokens);

// The same, of one form each: for direct_gate_up and direct_down.
int launch_direct_along_k(const DirectCall& call, bool down, int tokens);
int launch_direct_along_n(const DirectCall& call, bool down, int tokens);
int launch_direct_e4m3(const DirectCall& call, bool down, int tokens);
int launch_direct_int4(const DirectCall& call, bool down, int tokens);
int launch_direct_codes(const DirectCall& call, bool down, int tokens);

}  // namespace shuntyard
