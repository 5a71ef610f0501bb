// Whether what came out is what had to.
#pragma once

#include <string>

#include "conformance/cases.h"

namespace conformance {

// What is wrong with an output's bytes: elements, numbers and bounds of the first few; empty if nothing is.
std::string judge(const Output& output, const Bytes& got);

}  // namespace conformance
