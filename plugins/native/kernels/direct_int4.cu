// Rows of X, weights of INT4 as [out, in].
#include "kernels/direct_launch.h"

int shuntyard::launch_direct_int4(const Experts& call, bool down, int tokens) {
    return launch_form<DirectForm::kInt4>(call, down, tokens);
}
