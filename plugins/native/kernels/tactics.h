// Which kernels compute a call of the experts op, and how tall their tiles are.
#pragma once

#include "kernels/experts.h"

namespace shuntyard {

// Whether a tactic (of shuntyard_tactic, not BY_SHAPE) computes such a call on its device. What is not known of the
// call, its pointers, is taken to be right.
bool takes(const Experts& call, int tactic);

// The tactic that the table has for a call: one that takes it.
int by_shape(const Experts& call);

// By a tactic that takes the call.
int run(const Experts& call, int tactic);

}  // namespace shuntyard
