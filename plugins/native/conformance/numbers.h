// Numbers of the formats that tensors have.
#pragma once

#include "abi/types.h"

namespace conformance {

// Writes a number that the type (fp32, fp16, bf16 or int32) holds exactly.
void write_exactly(float value, nvinfer1::DataType type, unsigned char* to);

// The number that lies there.
double number_of(nvinfer1::DataType type, const unsigned char* from);

}  // namespace conformance
