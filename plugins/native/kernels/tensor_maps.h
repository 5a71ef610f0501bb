// Maps of matrices, for TMA.
#pragma once

#include "kernels/primitives.h"

namespace shuntyard {

// A map of a matrix [rows, columns] whose rows begin `pitch_bytes` apart, for tma_load in boxes of [box_rows,
// box_columns]: box_columns numbers are 128 bytes, and boxes are written in 128-byte swizzle. Numbers are of 1 or 2
// bytes. The matrix begins at, and its pitch is, a multiple of 16 bytes. 0, or a CUDA error.
//
// Needs a driver, but no stream and no device memory: it may be called while a graph is captured.
int encode_tensor_map(TensorMap& map, int element_bytes, const void* matrix, int64_t columns, int64_t rows,
                      int64_t pitch_bytes, int box_columns, int box_rows);

}  // namespace shuntyard
