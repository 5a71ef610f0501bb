// FOR TESTS ONLY: shared memory, and barriers of blocks and clusters. See emulator.h.
#include "host/machine.h"

namespace shuntyard {
namespace emulated {
namespace {

constexpr size_t kWall = 4096;  // bytes on both sides of shared memory
constexpr unsigned char kBrick = 0xa5;

std::vector<char*> arenas;  // shared memory of each block of a cluster

char* arena(size_t rank) {
    while (arenas.size() <= rank) {
        char* memory = map_memory(kMostShared + 4 * kWall);
        arenas.push_back(memory + kWall);  // a page's start: aligned to 1024
    }
    return arenas[rank];
}

bool wall_stands(const char* shared, size_t size) {
    static const std::vector<unsigned char> wall(kWall, kBrick);
    return memcmp(shared - kWall, wall.data(), kWall) == 0 && memcmp(shared + size, wall.data(), kWall) == 0;
}

bool all_of_block_wait(const Block& block) {
    const size_t waiting = block.barriers[0].waiting.size();
    return waiting > 0 && waiting == block.threads - block.exited;
}

void release(std::vector<Fiber*>& waiting) {
    std::vector<Fiber*> woken;
    woken.swap(waiting);
    for (Fiber* fiber : woken) {
        make_ready(*fiber);
    }
}

}  // namespace

void give_shared(Block& block, size_t size) {
    char* shared = arena(block.rank);
    block.shared = shared;
    block.shared_size = size;
    memset(shared - kWall, kBrick, kWall);
    memset(shared, kPoison, size);
    memset(shared + size, kBrick, kWall);
    block.brought.assign(size / kLine + 1, false);
}

void thread_exits(Fiber& fiber) {
    Block& block = *fiber.block;
    Warp& warp = *fiber.warp;
    if (warp.arrived > 0) {
        fail("it exits while other lanes of its warp wait for it in %s", warp.operation->name);
    }
    if (fiber.copies_unfenced) {
        fail("it has initialised barriers and called no barrier_init_fence");
    }
    fiber.state = State::kDone;
    ++warp.exited;
    ++block.exited;
    ++machine.exited;
    if (all_of_block_wait(block)) {
        release(block.barriers[0].waiting);
    }
    if (!machine.at_cluster_barrier.empty() && machine.at_cluster_barrier.size() == machine.threads - machine.exited) {
        release(machine.at_cluster_barrier);
    }
    if (block.exited == block.threads) {
        check_finished(block);
        if (!wall_stands(block.shared, block.shared_size)) {
            fail("its block has written outside of its shared memory");
        }
    }
}

uint32_t offset_in_shared(const Block& block, const void* pointer, size_t size, const char* operation) {
    const char* place = static_cast<const char*>(pointer);
    const int64_t offset = place - block.shared;
    if (place < block.shared || offset + size > block.shared_size) {
        fail("%s: %lld .. %lld lies outside of the block's shared memory of %zu bytes", operation,
             static_cast<long long>(offset), static_cast<long long>(offset + size), block.shared_size);
    }
    return static_cast<uint32_t>(offset);
}

}  // namespace emulated

using namespace emulated;

// What g++ and clang call where code that is compiled with -fsanitize=alignment finds a pointer that its type cannot
// have: a device would stop there, and most hosts do not mind.
extern "C" void __ubsan_handle_type_mismatch_v1(void* raw, void* pointer) {
    struct Place {
        const char* file;
        uint32_t line, column;
    };
    const Place& place = *static_cast<Place*>(raw);
    fail("%s:%u: an access to %p, which its type is not aligned to", place.file, place.line, pointer);
}

char* shared_memory() { return self("shared_memory").block->shared; }

uint32_t shared_address(const void* pointer) {
    const Block& block = *self("shared_address").block;
    return kWindow + offset_in_shared(block, pointer, 0, "shared_address");
}

void sync_block() {
    Fiber& fiber = self("sync_block");
    Block& block = *fiber.block;
    block.barriers[0].waiting.push_back(&fiber);
    if (all_of_block_wait(block)) {
        release(block.barriers[0].waiting);
        fiber.state = State::kReady;
        back_to_scheduler();
        return;
    }
    wait_as("sync_block");
}

void sync_some(int number, int threads) {
    Fiber& fiber = self("sync_some");
    Block& block = *fiber.block;
    if (number < 1 || number > 15) {
        fail("sync_some: there is no barrier %d", number);
    }
    if (threads <= 0 || threads % 32 != 0 || static_cast<uint32_t>(threads) > block.threads) {
        fail("sync_some: barrier %d for %d threads of %u", number, threads, block.threads);
    }
    NamedBarrier& barrier = block.barriers[number];
    if (!barrier.waiting.empty() && barrier.threads != threads) {
        fail("sync_some: barrier %d for %d threads, while others wait there for %d", number, threads, barrier.threads);
    }
    barrier.threads = threads;
    barrier.waiting.push_back(&fiber);
    if (barrier.waiting.size() < static_cast<size_t>(threads)) {
        wait_as("sync_some of barrier %lld for %lld threads", number, threads);
        return;
    }
    std::vector<int> lanes(block.warps.size());
    for (const Fiber* other : barrier.waiting) {
        ++lanes[other->thread / 32];
    }
    for (size_t warp = 0; warp < lanes.size(); ++warp) {
        if (lanes[warp] != 0 && lanes[warp] != 32) {
            fail("sync_some: barrier %d has %d lanes of warp %zu, must have all", number, lanes[warp], warp);
        }
    }
    release(barrier.waiting);
    back_to_scheduler();
}

void sync_cluster() {
    Fiber& fiber = self("sync_cluster");
    machine.at_cluster_barrier.push_back(&fiber);
    if (machine.at_cluster_barrier.size() == machine.threads - machine.exited) {
        release(machine.at_cluster_barrier);
        back_to_scheduler();
        return;
    }
    wait_as("sync_cluster");
}

}  // namespace shuntyard
