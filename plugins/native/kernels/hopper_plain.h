// Products of 16-bit rows and weights on Hopper, for one type of both.
#pragma once

#include "kernels/hopper_product.h"

namespace shuntyard {

template <typename X, Operand kOperand, Major kMajor, bool kPair>
int run_hopper_plain(HopperTile tile, const HopperProduct& product, int multiprocessors, void* stream) {
    if (tile == HopperTile::k128) {
        return launch_hopper<HopperConfig<X, kOperand, kMajor, 128, 256, kPair>>(product, {}, multiprocessors, stream);
    }
    return launch_hopper<HopperConfig<X, kOperand, kMajor, 64, 256, kPair>>(product, {}, multiprocessors, stream);
}

template <typename X, Operand kOperand>
int run_hopper_plain(HopperTile tile, Major major, bool pair, const HopperProduct& product, int multiprocessors,
                     void* stream) {
    if (major == Major::kK) {
        return pair ? run_hopper_plain<X, kOperand, Major::kK, true>(tile, product, multiprocessors, stream)
                    : run_hopper_plain<X, kOperand, Major::kK, false>(tile, product, multiprocessors, stream);
    }
    return pair ? run_hopper_plain<X, kOperand, Major::kN, true>(tile, product, multiprocessors, stream)
                : run_hopper_plain<X, kOperand, Major::kN, false>(tile, product, multiprocessors, stream);
}

}  // namespace shuntyard
