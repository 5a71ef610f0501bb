// FOR TESTS ONLY: launches, and the scheduler that draws which thread runs next. See emulator.h.
#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <numeric>
#include <string>

#include "host/machine.h"

namespace shuntyard {
namespace emulated {

Machine machine;
Launch the_launch;

namespace {

uint64_t given_seed = 1;
Device given_device{90, 4};
unsigned largest_cluster = 16;

std::string named(const Fiber& fiber) {
    char text[128];
    const dim3& index = fiber.block->index;
    snprintf(text, sizeof(text), "block %u,%u,%u thread %u", index.x, index.y, index.z, fiber.thread);
    return text;
}

[[noreturn]] void report_deadlock() {
    fprintf(stderr, "emulator, seed %llu: deadlock: no thread can go on\n",
            static_cast<unsigned long long>(given_seed));
    for (const auto& block : machine.blocks) {
        for (uint32_t i = 0; i < block->threads;) {
            const Fiber& first = *block->fibers[i];
            uint32_t end = i;
            const auto same = [&](const Fiber& other) {
                return other.state == first.state && other.waits_for == first.waits_for && other.which == first.which &&
                       other.detail == first.detail;
            };
            while (end < block->threads && same(*block->fibers[end])) {
                ++end;
            }
            fprintf(stderr, "  %s .. %u: ", named(first).c_str(), end - 1);
            if (first.state == State::kDone) {
                fprintf(stderr, "exited\n");
            } else {
                fprintf(stderr, first.waits_for, static_cast<long long>(first.which),
                        static_cast<long long>(first.detail));
                fprintf(stderr, "\n");
            }
            i = end;
        }
        for (const auto& [offset, barrier] : block->mbarriers) {
            fprintf(stderr, "  block %u mbarrier %u: phase %llu, %u of %u arrivals pending, %lld bytes awaited\n",
                    block->index.x, offset, static_cast<unsigned long long>(barrier.phase), barrier.pending,
                    barrier.count, static_cast<long long>(barrier.bytes));
        }
    }
    abort();
}

Fiber* next_fiber() {
    std::deque<Fiber*>& ready = machine.ready;
    size_t which = 0;
    switch (machine.policy.order) {
        case Policy::Order::kFirst: break;
        case Policy::Order::kRandom: which = random_below(ready.size()); break;
        case Policy::Order::kLast: {
            Fiber* newest = ready.back();
            ready.pop_back();
            return newest;
        }
        case Policy::Order::kPriority: {
            which = random_below(ready.size());
            const size_t looks = std::min<size_t>(ready.size(), 64);
            const size_t from = random_below(ready.size());
            for (size_t i = 0; i < looks; ++i) {
                const size_t other = (from + i) % ready.size();
                if (ready[other]->warp->priority > ready[which]->warp->priority) {
                    which = other;
                }
            }
            if (chance(1)) {
                ready[which]->warp->priority = random_below(1u << 30);
            }
            break;
        }
    }
    Fiber* chosen = ready[which];
    ready[which] = ready.front();
    ready.pop_front();
    return chosen;
}

void make_block(Block& block, dim3 index, uint32_t rank, const Shape& shape, size_t first_fiber) {
    block.index = index;
    block.rank = rank;
    block.threads = shape.block.x;
    give_shared(block, shape.shared);
    block.warps.resize(block.threads / 32);
    block.groups.resize(block.threads / 128);
    for (uint32_t i = 0; i < block.warps.size(); ++i) {
        block.warps[i].block = &block;
        block.warps[i].number = i;
        block.warps[i].priority = random_below(1u << 30);
    }
    for (uint32_t i = 0; i < block.threads; ++i) {
        Fiber& fiber = fresh_fiber(first_fiber + i);
        fiber.block = &block;
        fiber.warp = &block.warps[i / 32];
        fiber.warp->fibers[i % 32] = &fiber;
        fiber.thread = i;
        block.fibers.push_back(&fiber);
        machine.ready.push_back(&fiber);
    }
}

void run_cluster(const Shape& shape, dim3 first) {
    machine.blocks.clear();
    machine.copies.clear();
    machine.at_cluster_barrier.clear();
    machine.unexecuted = 0;
    machine.exited = 0;
    machine.threads = shape.cluster * shape.block.x;
    for (uint32_t rank = 0; rank < shape.cluster; ++rank) {
        machine.blocks.push_back(std::make_unique<Block>());
        make_block(*machine.blocks.back(), dim3(first.x + rank, first.y, first.z), rank, shape, rank * shape.block.x);
    }
    while (machine.exited < machine.threads) {
        if (!machine.copies.empty() && chance(machine.policy.copies)) {
            bring_some_copy();
        }
        if (machine.unexecuted > 0 && chance(machine.policy.products)) {
            compute_some_product();
        }
        if (machine.ready.empty()) {
            if (!bring_some_copy()) {
                report_deadlock();
            }
            continue;
        }
        Fiber& fiber = *next_fiber();
        threadIdx = dim3(fiber.thread, 0, 0);
        blockIdx = fiber.block->index;
        run_fiber(fiber);
    }
}

// Of dynamic shared memory of a block (CUDA programming guide, "Compute Capabilities").
size_t shared_limit() {
    switch (given_device.capability) {
        case 90:
        case 100: return kMostShared;
        case 80: return 163 * 1024;
        default: return 99 * 1024;
    }
}

Policy draw_policy() {
    if (given_seed == 0) {
        return {Policy::Order::kFirst, 0, 0, 0};
    }
    constexpr uint32_t kChances[] = {0, 1, 8, 64};
    return {static_cast<Policy::Order>(random_below(4)), kChances[random_below(4)], kChances[random_below(4)],
            kChances[random_below(3)]};
}

bool possible(const Shape& shape) {
    const dim3 &grid = shape.grid, &block = shape.block;
    if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) {
        return false;
    }
    // Blocks of one dimension and whole warps: what kernels here use, and more than CUDA asks.
    if (block.x == 0 || block.x > 1024 || block.x % 32 != 0 || block.y != 1 || block.z != 1) {
        return false;
    }
    if (shape.cluster == 0 || shape.cluster > largest_cluster || grid.x % shape.cluster != 0) {
        return false;
    }
    return shape.cluster == 1 || given_device.capability >= 90;
}

}  // namespace

void fail(const char* format, ...) {
    fprintf(stderr, "emulator, seed %llu: ", static_cast<unsigned long long>(given_seed));
    if (machine.running != nullptr) {
        fprintf(stderr, "%s: ", named(*machine.running).c_str());
    }
    va_list values;
    va_start(values, format);
    vfprintf(stderr, format, values);
    va_end(values);
    fprintf(stderr, "\n");
    abort();
}

uint32_t random_below(uint32_t bound) {
    // Steele, Lea, Flood: Fast splittable pseudorandom number generators, OOPSLA 2014.
    uint64_t z = machine.random_state += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    z ^= z >> 31;
    return static_cast<uint32_t>((z >> 32) * bound >> 32);
}

Fiber& self(const char* operation, int capability) {
    if (given_device.capability < capability || (capability == kHopper && given_device.capability != kHopper)) {
        fail("%s on a device of compute capability %d", operation, given_device.capability);
    }
    if (machine.running == nullptr) {
        fail("%s in a kernel that was launched without a Shape", operation);
    }
    return *machine.running;
}

void wait_as(const char* waits_for, int64_t which, int64_t detail) {
    Fiber& fiber = *machine.running;
    fiber.state = State::kWaiting;
    fiber.waits_for = waits_for;
    fiber.which = which;
    fiber.detail = detail;
    back_to_scheduler();
}

void make_ready(Fiber& fiber) {
    fiber.state = State::kReady;
    machine.ready.push_back(&fiber);
}

void maybe_yield() {
    if (chance(machine.policy.yields)) {
        Fiber& fiber = *machine.running;
        fiber.state = State::kReady;
        if (machine.policy.order == Policy::Order::kLast) {
            machine.ready.push_front(&fiber);
        } else {
            machine.ready.push_back(&fiber);
        }
        back_to_scheduler();
    }
}

}  // namespace emulated

using namespace emulated;

bool has_clusters_of(unsigned blocks) { return blocks <= emulated::largest_cluster; }

int current_device(Device& device) {
    device = given_device;
    return 0;
}

int run_fibers(const Shape& shape, void (*thread)(void* arguments), void* arguments) {
    static std::mutex one_at_a_time;
    const std::lock_guard<std::mutex> lock(one_at_a_time);
    if (!possible(shape)) {
        return 9;  // cudaErrorInvalidConfiguration
    }
    if (shape.shared > shared_limit()) {
        return 1;  // cudaErrorInvalidValue, of cudaFuncSetAttribute
    }
    machine.random_state = given_seed;
    machine.policy = draw_policy();
    machine.ready.clear();
    the_launch = {thread, arguments};
    gridDim = shape.grid;
    blockDim = shape.block;
    const uint64_t along_x = shape.grid.x / shape.cluster;
    std::vector<uint64_t> order(along_x * shape.grid.y * shape.grid.z);
    std::iota(order.begin(), order.end(), uint64_t{0});
    if (given_seed != 0) {
        for (size_t i = order.size(); i > 1; --i) {
            std::swap(order[i - 1], order[random_below(static_cast<uint32_t>(i))]);
        }
    }
    for (const uint64_t number : order) {
        const uint64_t line = number / along_x;
        run_cluster(shape,
                    dim3(static_cast<unsigned>(number % along_x) * shape.cluster,
                         static_cast<unsigned>(line % shape.grid.y), static_cast<unsigned>(line / shape.grid.y)));
    }
    return 0;
}

}  // namespace shuntyard

// -- for tests

extern "C" {

// Draws orders anew; 0: one thread after the other, and everything as late as it may be.
SHUNTYARD_API void test_seed(uint64_t seed) { shuntyard::emulated::given_seed = seed; }

// CUDA promises 8 blocks; devices differ in whether they have room for more.
SHUNTYARD_API void test_largest_cluster(unsigned blocks) { shuntyard::emulated::largest_cluster = blocks; }

SHUNTYARD_API void test_device(int capability, int multiprocessors) {
    shuntyard::emulated::given_device = {capability, multiprocessors};
}
}
