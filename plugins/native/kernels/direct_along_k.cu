// Rows of X, weights of X as [out, in].
#include "kernels/direct_launch.h"

int shuntyard::launch_direct_along_k(const Experts& call, bool down, int tokens) {
    return launch_form<DirectForm::kAlongK>(call, down, tokens);
}
