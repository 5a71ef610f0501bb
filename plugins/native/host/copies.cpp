// FOR TESTS ONLY: mbarriers, TMA, and what blocks of a cluster read of each other. See emulator.h.
//
// A copy arrives whole, at some moment between its issue and that when no thread can go on without it. Until then its
// destination holds poison. Maps are kept in a form of our own, with the fields that encode_tensor_map was given.
#include <pthread.h>

#include <algorithm>

#include "host/machine.h"
#include "kernels/tensor_maps.h"

namespace shuntyard {
namespace emulated {
namespace {

constexpr uint64_t kBarrierMark = 0x5bad0000ba441e40u;
constexpr uint64_t kMapMark = 0x7e2502ca9b0c5e11u;
constexpr int64_t kMostBytes = (1 << 20) - 1;

const Operation kPublish{"tensor_map_publish"};

// A map's words.
struct Map {
    uint64_t mark;
    const char* matrix;
    int64_t columns, rows, pitch;
    int32_t element_bytes, box_columns, box_rows, reserved;
    uint64_t unused[9];
};
static_assert(sizeof(Map) == sizeof(TensorMap), "a map's size is given");

struct Published {
    uint64_t when;
    TensorMap content;
};
std::map<const TensorMap*, Published> published;  // of this launch and all before

Map map_of(const TensorMap& words, const char* operation) {
    Map map;
    memcpy(&map, &words, sizeof(map));
    if (map.mark != kMapMark) {
        fail("%s: %p holds no tensor map", operation, static_cast<const void*>(&words));
    }
    return map;
}

Mbarrier& barrier_at(Block& block, const uint64_t* place, const char* operation) {
    if (reinterpret_cast<uintptr_t>(place) % 8 != 0) {
        fail("%s: the barrier is not aligned to 8 bytes", operation);
    }
    const uint32_t offset = offset_in_shared(block, place, 8, operation);
    const auto found = block.mbarriers.find(offset);
    if (found == block.mbarriers.end()) {
        fail("%s: there is no initialised barrier at %u", operation, offset);
    }
    if (*place != (kBarrierMark ^ offset)) {
        fail("%s: the barrier at %u was overwritten", operation, offset);
    }
    return found->second;
}

void end_phase_if_complete(uint32_t offset, Mbarrier& barrier) {
    if (barrier.pending > 0) {
        return;
    }
    if (barrier.bytes < 0) {
        fail("barrier at %u: %lld bytes came that nobody had announced", offset,
             static_cast<long long>(-barrier.bytes));
    }
    if (barrier.bytes > 0) {
        return;
    }
    ++barrier.phase;
    barrier.pending = barrier.count;
    for (Fiber* fiber : barrier.waiting) {
        make_ready(*fiber);
    }
    barrier.waiting.clear();
}

void arrive(uint64_t* place, uint32_t bytes, const char* operation) {
    Fiber& fiber = self(operation, kHopper);
    maybe_yield();
    Mbarrier& barrier = barrier_at(*fiber.block, place, operation);
    const uint32_t offset = offset_in_shared(*fiber.block, place, 8, operation);
    if (barrier.pending == 0) {
        fail("%s: barrier at %u has had all of its %u arrivals", operation, offset, barrier.count);
    }
    barrier.bytes += bytes;
    if (barrier.bytes > kMostBytes) {
        fail("%s: barrier at %u awaits more bytes than it can count", operation, offset);
    }
    --barrier.pending;
    end_phase_if_complete(offset, barrier);
    maybe_yield();
}

bool on_launching_stack(const void* pointer) {
    static thread_local char* low = nullptr;
    static thread_local size_t size = 0;
    if (low == nullptr) {
        pthread_attr_t attributes;
        void* start = nullptr;
        pthread_getattr_np(pthread_self(), &attributes);
        pthread_attr_getstack(&attributes, &start, &size);
        pthread_attr_destroy(&attributes);
        low = static_cast<char*>(start);
    }
    const char* place = static_cast<const char*>(pointer);
    return low <= place && place < low + size;
}

// Fails unless the thread may copy by this map.
void check_usable(const Fiber& fiber, const TensorMap* map) {
    if (on_launching_stack(map)) {
        return;  // a parameter: SHUNTYARD_TABLE
    }
    if (on_a_fiber_stack(map)) {
        fail("tma_load by a map on a thread's stack: a parameter must be a SHUNTYARD_TABLE");
    }
    const auto of_map = published.find(map);
    if (of_map == published.end()) {
        fail("tma_load by a map in global memory that was not published");
    }
    if (memcmp(map, &of_map->second.content, sizeof(*map)) != 0) {
        fail("tma_load by a map in global memory that was written since it was published");
    }
    const auto acquired = fiber.acquired.find(map);
    if (acquired == fiber.acquired.end() || acquired->second < of_map->second.when) {
        fail("tma_load by a map that its thread has not acquired since it was published");
    }
}

void arrive_copy(const Copy& copy) {
    const Map map = map_of(copy.map, "a copy");
    char* to = copy.block->shared + copy.offset;
    for (int64_t i = 0; i < map.box_rows; ++i) {
        const int64_t row = copy.row + i;
        const bool row_inside = 0 <= row && row < map.rows;
        for (int64_t chunk = 0; chunk < kLine / 16; ++chunk) {
            char sixteen[16] = {};
            const int64_t first = copy.column + chunk * 16 / map.element_bytes;
            for (int64_t j = 0; row_inside && j < 16 / map.element_bytes; ++j) {
                if (0 <= first + j && first + j < map.columns) {
                    memcpy(sixteen + j * map.element_bytes,
                           map.matrix + row * map.pitch + (first + j) * map.element_bytes, map.element_bytes);
                }
            }
            memcpy(to + i * kLine + (chunk ^ (i & 7)) * 16, sixteen, 16);
        }
        copy.block->brought[copy.offset / kLine + i] = true;
    }
    Mbarrier& barrier =
        barrier_at(*copy.block, reinterpret_cast<uint64_t*>(copy.block->shared + copy.barrier), "a copy");
    barrier.bytes -= map.box_rows * kLine;
    if (barrier.bytes < -kMostBytes) {
        fail("barrier at %u: more bytes came than it can count", copy.barrier);
    }
    end_phase_if_complete(copy.barrier, barrier);
}

}  // namespace

bool bring_some_copy() {
    if (machine.copies.empty()) {
        return false;
    }
    const uint32_t which = random_below(static_cast<uint32_t>(machine.copies.size()));
    const Copy copy = machine.copies[which];
    machine.copies.erase(machine.copies.begin() + which);
    arrive_copy(copy);
    return true;
}

void check_finished(Block& block) {
    for (const Copy& copy : machine.copies) {
        if (copy.block == &block) {
            fail("its block ends while a copy to %u is under way", copy.offset);
        }
    }
    for (const WarpGroup& group : block.groups) {
        if (!group.pending.empty()) {
            fail("its block ends with products that were not waited for");
        }
    }
}

}  // namespace emulated

using namespace emulated;

void barrier_init(uint64_t* place, uint32_t count) {
    Fiber& fiber = self("barrier_init", kHopper);
    Block& block = *fiber.block;
    if (reinterpret_cast<uintptr_t>(place) % 8 != 0) {
        fail("barrier_init: the barrier is not aligned to 8 bytes");
    }
    const uint32_t offset = offset_in_shared(block, place, 8, "barrier_init");
    if (count == 0 || count > kMostBytes) {
        fail("barrier_init: %u arrivals", count);
    }
    if (!block.mbarriers.insert({offset, Mbarrier{place, count, count, 0, 0, &fiber, {}}}).second) {
        fail("barrier_init: the barrier at %u was initialised before", offset);
    }
    fiber.copies_unfenced = true;
    *place = kBarrierMark ^ offset;
}

void barrier_init_fence() {
    Fiber& fiber = self("barrier_init_fence", kHopper);
    fiber.copies_unfenced = false;
    for (auto& [offset, barrier] : fiber.block->mbarriers) {
        if (barrier.unfenced == &fiber) {
            barrier.unfenced = nullptr;
        }
    }
}

void barrier_arrive(uint64_t* barrier) { arrive(barrier, 0, "barrier_arrive"); }

void barrier_arrive_expecting(uint64_t* barrier, uint32_t bytes) { arrive(barrier, bytes, "barrier_arrive_expecting"); }

void barrier_wait(uint64_t* place, uint32_t parity) {
    Fiber& fiber = self("barrier_wait", kHopper);
    if (parity > 1) {
        fail("barrier_wait: a parity of %u", parity);
    }
    // Again, too, after it was woken: by the time that this thread runs, one more phase may have ended.
    while (true) {
        Mbarrier& barrier = barrier_at(*fiber.block, place, "barrier_wait");
        if ((barrier.phase & 1) != parity) {
            maybe_yield();
            return;
        }
        barrier.waiting.push_back(&fiber);
        wait_as("barrier_wait at %lld, parity %lld", offset_in_shared(*fiber.block, place, 8, "barrier_wait"), parity);
    }
}

void tma_load(void* to, const TensorMap* words, uint64_t* place, int32_t column, int32_t row) {
    Fiber& fiber = self("tma_load", kHopper);
    Block& block = *fiber.block;
    if (reinterpret_cast<uintptr_t>(words) % 64 != 0) {
        fail("tma_load: the map is not aligned to 64 bytes");
    }
    check_usable(fiber, words);
    const Map map = map_of(*words, "tma_load");
    const size_t bytes = map.box_rows * kLine;
    const uint32_t offset = offset_in_shared(block, to, bytes, "tma_load");
    if (offset % 1024 != 0) {
        fail("tma_load: a box at %u, must be at a multiple of 1024", offset);
    }
    const Mbarrier& barrier = barrier_at(block, place, "tma_load");
    if (barrier.unfenced != nullptr) {
        fail("tma_load: no barrier_init_fence has followed the barrier's initialisation");
    }
    for (const Copy& other : machine.copies) {
        const Map others = map_of(other.map, "a copy");
        if (other.block == &block && offset < other.offset + others.box_rows * kLine && other.offset < offset + bytes) {
            fail("tma_load: to %u, where another copy is under way", offset);
        }
    }
    memset(to, kPoison, bytes);
    std::fill_n(block.brought.begin() + offset / kLine, map.box_rows, false);
    machine.copies.push_back({&block, offset, offset_in_shared(block, place, 8, "tma_load"), *words, column, row});
    if (chance(machine.policy.copies)) {
        bring_some_copy();
    }
    maybe_yield();
}

void tensor_map_point(TensorMap* words, const void* matrix) {
    Fiber& fiber = self("tensor_map_point", kHopper);
    if (offset_in_shared(*fiber.block, words, sizeof(*words), "tensor_map_point") % 128 != 0) {
        fail("tensor_map_point: the map is not aligned to 128 bytes");
    }
    Map map = map_of(*words, "tensor_map_point");
    if (reinterpret_cast<uintptr_t>(matrix) % 16 != 0) {
        fail("tensor_map_point: the matrix is not aligned to 16 bytes");
    }
    map.matrix = static_cast<const char*>(matrix);
    memcpy(words, &map, sizeof(map));
}

void tensor_map_publish(TensorMap* to, const TensorMap* from) {
    struct Publication {
        TensorMap* to;
        const TensorMap* from;
    } own{to, from};
    with_warp(kPublish, &own, [](Warp& warp) {
        const Publication first = *static_cast<Publication*>(warp.arguments[0]);
        for (void* argument : warp.arguments) {
            const Publication& other = *static_cast<Publication*>(argument);
            if (other.to != first.to || other.from != first.from) {
                fail("tensor_map_publish: the lanes of the warp name different maps");
            }
        }
        const uint32_t offset = offset_in_shared(*warp.block, first.from, sizeof(TensorMap), "tensor_map_publish");
        if (offset % 128 != 0 || reinterpret_cast<uintptr_t>(first.to) % 128 != 0) {
            fail("tensor_map_publish: a map is not aligned to 128 bytes");
        }
        map_of(*first.from, "tensor_map_publish");
        memcpy(first.to, first.from, sizeof(TensorMap));
        published[first.to] = {++machine.clock, *first.from};
    });
}

void tensor_map_acquire(const TensorMap* map) { self("tensor_map_acquire", kHopper).acquired[map] = ++machine.clock; }

uint32_t cluster_rank() { return self("cluster_rank").block->rank; }
uint32_t cluster_size() { return static_cast<uint32_t>((self("cluster_size"), machine.blocks.size())); }

int32_t load_from_block(const int32_t* place, uint32_t rank) {
    Fiber& fiber = self("load_from_block");
    maybe_yield();  // so that the other block may have gone
    const uint32_t offset = offset_in_shared(*fiber.block, place, sizeof(*place), "load_from_block");
    if (rank >= machine.blocks.size()) {
        fail("load_from_block: rank %u of %zu", rank, machine.blocks.size());
    }
    const Block& other = *machine.blocks[rank];
    if (other.exited == other.threads) {
        fail("load_from_block: block %u of the cluster has exited", rank);
    }
    int32_t value;
    memcpy(&value, other.shared + offset, sizeof(value));
    return value;
}

int encode_tensor_map(TensorMap& words, int element_bytes, const void* matrix, int64_t columns, int64_t rows,
                      int64_t pitch_bytes, int box_columns, int box_rows) {
    // What cuTensorMapEncodeTiled refuses.
    if ((element_bytes != 1 && element_bytes != 2) || box_columns * element_bytes != kLine || box_rows < 1 ||
        box_rows > 256 || reinterpret_cast<uintptr_t>(matrix) % 16 != 0 || reinterpret_cast<uintptr_t>(&words) % 64 ||
        matrix == nullptr || columns < 1 || rows < 1 || columns > int64_t{1} << 32 || rows > int64_t{1} << 32 ||
        pitch_bytes % 16 != 0 || pitch_bytes < columns * element_bytes || pitch_bytes >= int64_t{1} << 40) {
        return 1;  // cudaErrorInvalidValue
    }
    const Map map{
        kMapMark, static_cast<const char*>(matrix), columns, rows, pitch_bytes, element_bytes, box_columns, box_rows, 0,
        {}};
    memcpy(&words, &map, sizeof(map));
    return 0;
}

}  // namespace shuntyard
