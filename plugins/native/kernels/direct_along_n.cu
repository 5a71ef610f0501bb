// Rows of X, weights of X as [in, out].
#include "kernels/direct_launch.h"

int shuntyard::launch_direct_along_n(const Experts& call, bool down, int tokens) {
    return launch_form<DirectForm::kAlongN>(call, down, tokens);
}
