// The experts by mma.sync, weights going from memory straight into registers, by form. The kernels are in
// direct_launch.h.
#pragma once

#include "kernels/experts.h"

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

// The launches of one form: gate and up, from x or codes, gathered, scaled by the scores, multiplied, SwiGLU; or down,
// from hidden rows or codes. `tokens` is how many rows of an expert a block takes at once: 8 or 16, and but for along N
// 32 or 64. Blocks of up to 32 split K over their warps, those of more the channels.
//
// Each is one launch for every 128 experts. Rows that the offsets give to no expert become NaN. A row's bits depend on
// nothing but its own inputs, its expert's weights and how the tile's size splits K: not on the rows beside it, nor on
// its place among them. Sizes that split K over warps all give the same bits.
int launch_direct_along_k(const Experts& call, bool down, int tokens);
int launch_direct_along_n(const Experts& call, bool down, int tokens);
int launch_direct_e4m3(const Experts& call, bool down, int tokens);
int launch_direct_int4(const Experts& call, bool down, int tokens);
int launch_direct_codes(const Experts& call, bool down, int tokens);

}  // namespace shuntyard
