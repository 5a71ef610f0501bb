// The CUDA runtime's words for its own error codes.
#include <cuda_runtime.h>

const char* shuntyard_cuda_error_text(int status) { return cudaGetErrorString(static_cast<cudaError_t>(status)); }
