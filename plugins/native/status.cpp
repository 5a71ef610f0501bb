// What the library says of itself and of its status codes.
#include "build_info.h"
#include "shuntyard_plugins.h"

#ifdef SHUNTYARD_WITH_CUDA
const char* shuntyard_cuda_error_text(int status);
#else
static const char* shuntyard_cuda_error_text(int) { return "a CUDA error"; }
#endif

const char* shuntyard_build_info(void) { return SHUNTYARD_BUILD_INFO; }

const char* shuntyard_status_text(int status) {
    switch (status) {
        case SHUNTYARD_OK: return "success";
        case SHUNTYARD_INVALID_ARGUMENT:
            return "an argument cannot be: an extent, a type, the form or the lists of the weights, top_k or the "
                   "tactic";
        case SHUNTYARD_WORKSPACE_TOO_SMALL: return "the workspace is too small";
        case SHUNTYARD_NO_KERNELS:
            return "this library was built without CUDA kernels: reinstall shuntyard where pip may fetch "
                   "nvidia-cuda-nvcc, or with nvcc on PATH, and without SHUNTYARD_CUDA=off";
        case SHUNTYARD_UNSUPPORTED_TACTIC: return "the tactic has no kernels for these weights, extents or this device";
        default: return status > 0 ? shuntyard_cuda_error_text(status) : "an unknown status";
    }
}
