// FOR TESTS ONLY: just enough of CUDA to compile the kernels as plain C++ and run them where there is no GPU.
//
// Kernels that use neither shared memory nor barriers nor atomics are launched by two dim3s, and run one thread after
// another: any order of threads gives the same result, this one included. Those that a Shape launches run as fibers.
#pragma once

#include <cmath>
#include <cstring>
#include <tuple>

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define SHUNTYARD_TABLE(Type) const Type&

struct dim3 {
    unsigned x, y, z;
    explicit constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

inline thread_local dim3 blockIdx, blockDim, threadIdx, gridDim;

namespace shuntyard {

template <typename... Parameters, typename... Arguments>
int launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, void*, Arguments... arguments) {
    // CUDA's own limits, so that a launch that a device would refuse does not pass here (9: invalid configuration).
    if (grid.x == 0 || grid.y == 0 || grid.x > 0x7fffffffu || grid.y > 65535 || block.x == 0 || block.x > 1024) {
        return 9;
    }
    gridDim = grid;
    blockDim = block;
    for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y) {
        for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) {
            for (threadIdx.x = 0; threadIdx.x < block.x; ++threadIdx.x) {
                kernel(static_cast<Parameters>(arguments)...);
            }
        }
    }
    return 0;
}

}  // namespace shuntyard

// Kernels that need more than threads one after another: host/emulator.h runs them, as fibers.
namespace shuntyard {

struct Shape {
    dim3 grid, block;
    unsigned cluster = 1;
    size_t shared = 0;
    size_t most_shared = 0;
};

struct Device {
    int capability;
    int multiprocessors;
    int code = 90;
    bool hopper = true;
};

// The device that is emulated; tests set it (emulator.cpp, test_device).
int current_device(Device& device);

// Whether the emulated device has clusters so large.
bool has_clusters_of(unsigned blocks);

template <typename... Parameters>
bool cluster_fits(void (*)(Parameters...), const Shape& shape, void*) {
    return has_clusters_of(shape.cluster);
}

// Runs `thread` for every thread of the launch, each as a fiber with threadIdx and blockIdx of its own. 0, or the
// error number that CUDA gives a launch that cannot be. Aborts, and says why, where the threads wait for each other
// for ever, or break a rule of what they use.
int run_fibers(const Shape& shape, void (*thread)(void* arguments), void* arguments);

template <typename... Parameters, typename... Arguments>
int launch(void (*kernel)(Parameters...), const Shape& shape, void*, Arguments... arguments) {
    std::tuple<void (*)(Parameters...), std::tuple<Parameters...>> call{
        kernel, std::tuple<Parameters...>{static_cast<Parameters>(arguments)...}};
    return run_fibers(
        shape,
        [](void* raw) {
            auto& [kernel, packed] = *static_cast<decltype(call)*>(raw);
            std::apply(kernel, packed);
        },
        &call);
}

}  // namespace shuntyard
