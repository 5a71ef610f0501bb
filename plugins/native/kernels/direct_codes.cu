// Rows of E4M3 codes, weights of E4M3 as [out, in].
#include "kernels/direct_launch.h"

int shuntyard::launch_direct_codes(const Experts& call, bool down, int tokens) {
    return launch_form<DirectForm::kCodes>(call, down, tokens);
}
