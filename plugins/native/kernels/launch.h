// Launching kernels: on the device through the CUDA runtime, or, in the tests' host build, as loops (host/on_host.h).
#pragma once

#include <climits>
#include <cstddef>
#include <cstdint>

#include "shuntyard_plugins.h"

#ifdef __CUDACC__
#include <cuda_runtime.h>

#include <tuple>
#include <utility>

// A kernel's parameter that is a large struct. Threads read it where the launch has put it, in constant memory, and
// need no copies of their own. (The host build passes a reference: its threads are calls, and each would make a copy.)
#define SHUNTYARD_TABLE(Type) const __grid_constant__ Type

namespace shuntyard {

// How a kernel is launched.
struct Shape {
    dim3 grid, block;
    unsigned cluster = 1;  // blocks of a cluster, along x
    size_t shared = 0;     // bytes of dynamic shared memory
    // If launches of a kernel differ in it: the most that any has. What a kernel may have is told to the runtime, and
    // another thread may launch the same kernel between the telling and the launch.
    size_t most_shared = 0;
};

// A shape as the runtime takes it; the kernel is told what it will get.
class Configuration {
  public:
    Configuration(const void* function, const Shape& shape, void* stream) {
        const size_t most = shape.most_shared > shape.shared ? shape.most_shared : shape.shared;
        if (most > 48 * 1024) {
            status_ =
                cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(most));
        }
        if (status_ == cudaSuccess && shape.cluster > 8) {
            status_ = cudaFuncSetAttribute(function, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
        }
        cluster_.id = cudaLaunchAttributeClusterDimension;
        cluster_.val.clusterDim.x = shape.cluster;
        cluster_.val.clusterDim.y = cluster_.val.clusterDim.z = 1;
        config_.gridDim = shape.grid;
        config_.blockDim = shape.block;
        config_.dynamicSmemBytes = shape.shared;
        config_.stream = static_cast<cudaStream_t>(stream);
        config_.attrs = &cluster_;
        config_.numAttrs = shape.cluster > 1 ? 1 : 0;
    }
    Configuration(const Configuration&) = delete;
    Configuration& operator=(const Configuration&) = delete;

    int status() const { return status_; }
    const cudaLaunchConfig_t* get() const { return &config_; }

  private:
    int status_ = cudaSuccess;
    cudaLaunchAttribute cluster_{};
    cudaLaunchConfig_t config_{};
};

template <typename Kernel, typename Arguments, size_t... Index>
int launch_shaped(Kernel* kernel, const Shape& shape, void* stream, Arguments& arguments,
                  std::index_sequence<Index...>) {
    const void* function = reinterpret_cast<const void*>(kernel);
    const Configuration configuration(function, shape, stream);
    if (configuration.status() != cudaSuccess) {
        return configuration.status();
    }
    void* addresses[] = {&std::get<Index>(arguments)...};
    return cudaLaunchKernelExC(configuration.get(), function, addresses);
}

// Enqueues kernel(arguments...) and returns the error of this very launch (kernel<<<...>>> would leave it to
// cudaGetLastError, which may return somebody else's).
template <typename... Parameters, typename... Arguments>
int launch(void (*kernel)(Parameters...), const Shape& shape, void* stream, const Arguments&... arguments) {
    std::tuple<Parameters...> packed{static_cast<Parameters>(arguments)...};
    return launch_shaped(kernel, shape, stream, packed, std::index_sequence_for<Parameters...>{});
}

// Of threads that need nothing of each other: the host build runs them one after another.
template <typename... Parameters, typename... Arguments>
int launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, void* stream, const Arguments&... arguments) {
    return launch(kernel, Shape{grid, block}, stream, arguments...);
}

// Whether the current device has room for a cluster of this shape. Asks without a launch, so a graph that is being
// captured stays as it is; leaves no error behind.
template <typename... Parameters>
bool cluster_fits(void (*kernel)(Parameters...), const Shape& shape, void* stream) {
    const void* function = reinterpret_cast<const void*>(kernel);
    const Configuration configuration(function, shape, stream);
    int clusters = 0;
    if (configuration.status() == cudaSuccess &&
        cudaOccupancyMaxActiveClusters(&clusters, function, configuration.get()) == cudaSuccess) {
        return clusters > 0;
    }
    cudaGetLastError();
    return false;
}

// What kernels are chosen by.
struct Device {
    int capability;  // 10 * major + minor
    int multiprocessors;
    int code;     // the architecture that this library's code was compiled for: a driver may have compiled it again
    bool hopper;  // that architecture is 9.0a, which has wgmma
};

// Of the device that is current. Waits for nothing, and may be asked while a graph is captured.
int current_device(Device& device);

}  // namespace shuntyard
#else
#include "host/on_host.h"
#endif

// Returns from the calling function if `expression` is a status other than success.
#define SHUNTYARD_TRY(expression)                   \
    do {                                            \
        const int shuntyard_status_ = (expression); \
        if (shuntyard_status_ != SHUNTYARD_OK) {    \
            return shuntyard_status_;               \
        }                                           \
    } while (false)

namespace shuntyard {

constexpr unsigned kBlock = 128;  // threads of a block, in every launch

__host__ __device__ constexpr int64_t ceil_div(int64_t value, int64_t divisor) {
    return (value + divisor - 1) / divisor;
}

constexpr size_t aligned(size_t bytes) { return (bytes + 255) / 256 * 256; }

// Limits of a grid: 2^31-1 blocks along x, 65535 along y. Row counts go to x, columns to y.
constexpr int64_t kMaxBlocksX = INT_MAX;
constexpr int64_t kMaxBlocksY = 65535;

inline dim3 grid_of(int64_t along_x, int64_t along_y = 1) {
    return dim3(static_cast<unsigned>(along_x), static_cast<unsigned>(along_y));
}

// The extents that all three ops share: at least one expert a token, and T * K and its row numbers fit an i32.
inline bool valid_rows(int64_t tokens, int64_t top_k) {
    return tokens >= 0 && top_k >= 1 && (tokens == 0 || top_k <= INT_MAX / tokens);
}

inline bool valid_columns(int64_t columns) { return columns >= 1 && ceil_div(columns, kBlock) <= kMaxBlocksY; }

// Whether 16 bytes can be loaded at once from there.
inline bool on_16_bytes(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// One of the types that a kernel computes in, and that scales are of.
inline bool valid_type(int type) { return type == SHUNTYARD_FP32 || type == SHUNTYARD_FP16 || type == SHUNTYARD_BF16; }

}  // namespace shuntyard
