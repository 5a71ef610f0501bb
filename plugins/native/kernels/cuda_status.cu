// What the CUDA runtime says: of its own error codes, of the device, and of this library's code.
#include "kernels/launch.h"

const char* shuntyard_cuda_error_text(int status) { return cudaGetErrorString(static_cast<cudaError_t>(status)); }

namespace shuntyard {
namespace {

// Compiled with the same options as all other kernels.
__global__ void any_kernel() {}

}  // namespace

int current_device(Device& device) {
    int number = 0, major = 0, minor = 0;
    SHUNTYARD_TRY(cudaGetDevice(&number));
    SHUNTYARD_TRY(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, number));
    SHUNTYARD_TRY(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, number));
    SHUNTYARD_TRY(cudaDeviceGetAttribute(&device.multiprocessors, cudaDevAttrMultiProcessorCount, number));
    // Code for an older architecture may run on this device, compiled by the driver: it has no clusters then, say.
    cudaFuncAttributes attributes;
    SHUNTYARD_TRY(cudaFuncGetAttributes(&attributes, any_kernel));
    device.capability = 10 * major + minor;
    device.code = attributes.ptxVersion;
    return SHUNTYARD_OK;
}

}  // namespace shuntyard
