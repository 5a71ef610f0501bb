#include "kernels/hopper_mixed.h"

int shuntyard::launch_hopper_mixed_bfloat(HopperTile tile, bool int4, bool pair, const HopperProduct& product,
                                          const MixedScales& scales, int multiprocessors, void* stream) {
    return int4 ? run_hopper_mixed<Bfloat, true>(tile, pair, product, scales, multiprocessors, stream)
                : run_hopper_mixed<Bfloat, false>(tile, pair, product, scales, multiprocessors, stream);
}
