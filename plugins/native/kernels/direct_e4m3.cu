// Rows of X, weights of E4M3 as [out, in].
#include "kernels/direct_launch.h"

int shuntyard::launch_direct_e4m3(const Experts& call, bool down, int tokens) {
    return launch_form<DirectForm::kE4m3>(call, down, tokens);
}
