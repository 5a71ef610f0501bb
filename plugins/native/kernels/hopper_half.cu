#include "kernels/hopper_plain.h"

int shuntyard::launch_hopper_half(HopperTile tile, Major major, bool pair, const HopperProduct& product,
                                  int multiprocessors, void* stream) {
    return run_hopper_plain<Half, Operand::kHalf>(tile, major, pair, product, multiprocessors, stream);
}
