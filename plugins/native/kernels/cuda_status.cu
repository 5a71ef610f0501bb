// What the CUDA runtime says: of its own error codes, of the device, and of this library's code.
#include <atomic>

#include "kernels/primitives.h"

const char* shuntyard_cuda_error_text(int status) { return cudaGetErrorString(static_cast<cudaError_t>(status)); }

namespace shuntyard {
namespace {

// Bytes of shared memory that tell code for 9.0a from any other. (An architecture's number does not: what a driver
// makes of PTX for 9.0 is code for 9.0, too.)
constexpr size_t kOfHopper = 512, kOfOthers = 256;

// Compiled with the same options as all other kernels; asked, not launched.
__global__ void any_kernel(char* out) {
    __shared__ char told[SHUNTYARD_ON_HOPPER ? kOfHopper : kOfOthers];
    told[threadIdx.x] = out[0];
    __syncthreads();
    out[threadIdx.x] = told[threadIdx.x ^ 1];
}

int ask(int number, Device& device) {
    int major = 0, minor = 0;
    SHUNTYARD_TRY(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, number));
    SHUNTYARD_TRY(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, number));
    SHUNTYARD_TRY(cudaDeviceGetAttribute(&device.multiprocessors, cudaDevAttrMultiProcessorCount, number));
    // Code for an older architecture may run on this device, compiled by the driver: it has no clusters then, say.
    cudaFuncAttributes attributes;
    SHUNTYARD_TRY(cudaFuncGetAttributes(&attributes, any_kernel));
    device.capability = 10 * major + minor;
    device.code = attributes.ptxVersion;
    device.hopper = attributes.sharedSizeBytes == kOfHopper;
    return SHUNTYARD_OK;
}

}  // namespace

int current_device(Device& device) {
    // A device stays what it is: it is asked once, and the answer kept in one word. 0: not asked yet.
    constexpr int kKept = 64;
    static std::atomic<uint64_t> kept[kKept];
    int number = 0;
    SHUNTYARD_TRY(cudaGetDevice(&number));
    const uint64_t word = number < kKept ? kept[number].load(std::memory_order_relaxed) : 0;
    if (word != 0) {
        device.capability = static_cast<int>(word & 0xffff);
        device.code = static_cast<int>(word >> 16 & 0xffff);
        device.multiprocessors = static_cast<int>(word >> 32 & 0xffff);
        device.hopper = word >> 48 != 0;
        return SHUNTYARD_OK;
    }
    SHUNTYARD_TRY(ask(number, device));
    if (number < kKept) {
        kept[number].store(static_cast<uint64_t>(device.capability) | static_cast<uint64_t>(device.code) << 16 |
                               static_cast<uint64_t>(device.multiprocessors) << 32 |
                               static_cast<uint64_t>(device.hopper) << 48,
                           std::memory_order_relaxed);
    }
    return SHUNTYARD_OK;
}

}  // namespace shuntyard
