#include "kernels/hopper_plain.h"

int shuntyard::launch_hopper_bfloat(HopperTile tile, Major major, bool pair, const HopperProduct& product,
                                    int multiprocessors, void* stream) {
    return run_hopper_plain<Bfloat, Operand::kBfloat>(tile, major, pair, product, multiprocessors, stream);
}
