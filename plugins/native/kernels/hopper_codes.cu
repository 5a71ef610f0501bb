// Products of E4M3 codes on Hopper.
#include "kernels/hopper_product.h"

namespace shuntyard {
namespace {

template <typename X, int kRows, int kColumns>
int run(HopperCodes codes, const HopperProduct& product, const CodeScales& scales, int multiprocessors, void* stream) {
    constexpr Operand kOperand = Operand::kE4m3;
    if (!codes.pair) {
        return launch_hopper<HopperConfig<X, kOperand, Major::kK, kRows, kColumns, false>>(product, scales,
                                                                                           multiprocessors, stream);
    }
    if (codes.given) {
        return launch_hopper<HopperConfig<X, kOperand, Major::kK, kRows, kColumns, true, true>>(
            product, scales, multiprocessors, stream);
    }
    return launch_hopper<HopperConfig<X, kOperand, Major::kK, kRows, kColumns, true>>(product, scales, multiprocessors,
                                                                                      stream);
}

template <typename X>
int run(HopperTile tile, HopperCodes codes, const HopperProduct& product, const CodeScales& scales, int multiprocessors,
        void* stream) {
    switch (tile) {
        case HopperTile::k64: return run<X, 64, 256>(codes, product, scales, multiprocessors, stream);
        case HopperTile::k128: return run<X, 128, 128>(codes, product, scales, multiprocessors, stream);
        default: return run<X, 128, 256>(codes, product, scales, multiprocessors, stream);
    }
}

}  // namespace

int launch_hopper_codes(int x_type, HopperTile tile, HopperCodes codes, const HopperProduct& product,
                        const CodeScales& scales, int multiprocessors, void* stream) {
    switch (x_type) {
        case SHUNTYARD_FP16: return run<Half>(tile, codes, product, scales, multiprocessors, stream);
        case SHUNTYARD_BF16: return run<Bfloat>(tile, codes, product, scales, multiprocessors, stream);
        default: return SHUNTYARD_INVALID_ARGUMENT;
    }
}

}  // namespace shuntyard
