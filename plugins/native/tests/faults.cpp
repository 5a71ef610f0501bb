// Small kernels with a fault each, which the emulator must find; and the same without it, which must pass.
//
// Called by tests/plugins/test_emulator.py.
#include <vector>

#include "kernels/primitives.h"
#include "kernels/tensor_maps.h"

using namespace shuntyard;

namespace {

enum Fault {
    kNone,
    // of threads
    kNoSyncBlock,
    kNoSyncBlockBeforeReuse,
    kNoSyncWarp,
    kLaneLeaves,
    kLanesPart,
    kPartOfAWarp,
    kCountsDiffer,
    kBarriersCross,
    kOutsideShared,
    kUnaligned,
    kUnalignedPair,
    // of clusters
    kBlockLeaves,
    kNoSyncCluster,
    // of mbarriers
    kNeverInitialised,
    kOverwritten,
    kOneArrivalMore,
    kOneArrivalLess,
    // of TMA and products
    kNoFence,
    kFewerBytes,
    kMoreBytes,
    kBoxOffset,
    kEarlyRead,
    kEarlyRefill,
    kReleasedEarly,
    kNotWaited,
    kNotCommitted,
    kCommittedTwice,
    kNotBegun,
    kTouched,
    kPartlyShared,
    kRegistersGone,
    kNotBrought,
    kOperandsWritten,
    kOperandsNotBegun,
    kCopyLeft,
    // of maps
    kNoAcquire,
    kAcquiredByAnother,
    kNotPublished,
    kMapOnStack,
    // of registers
    kNoneGiven,
    kFaults
};

const char* const kNames[] = {"none",
                              "no sync_block",
                              "no sync_block before reuse",
                              "no sync_warp",
                              "lane leaves",
                              "lanes part",
                              "part of a warp",
                              "counts differ",
                              "barriers cross",
                              "outside shared",
                              "unaligned",
                              "unaligned pair",
                              "block leaves",
                              "no sync_cluster",
                              "never initialised",
                              "overwritten",
                              "one arrival more",
                              "one arrival less",
                              "no fence",
                              "fewer bytes",
                              "more bytes",
                              "box offset",
                              "early read",
                              "early refill",
                              "released early",
                              "not waited",
                              "not committed",
                              "committed twice",
                              "not begun",
                              "touched",
                              "partly shared",
                              "registers gone",
                              "not brought",
                              "operands written",
                              "operands not begun",
                              "copy left",
                              "no acquire",
                              "acquired by another",
                              "not published",
                              "map on stack",
                              "none given"};
static_assert(sizeof(kNames) / sizeof(*kNames) == kFaults, "a name for each");

// Two warps exchange numbers, twice over the same place.
__global__ void exchange(int fault, float* out) {
    float* const places = reinterpret_cast<float*>(shared_memory());
    const int thread = static_cast<int>(threadIdx.x);
    float sum = 0;
    for (int round = 0; round < 2; ++round) {
        places[thread] = static_cast<float>(thread + 1000 * round);
        if (fault != kNoSyncBlock) {
            sync_block();
        }
        sum += places[63 - thread];
        if (fault != kNoSyncBlockBeforeReuse) {
            sync_block();
        }
    }
    if (fault == kOutsideShared && thread == 0) {
        places[64] = 1;
    }
    if (fault == kUnaligned) {
        load(reinterpret_cast<char*>(places) + 4);
    }
    if (fault == kUnalignedPair) {
        sum += static_cast<float>(*reinterpret_cast<uint64_t*>(places + 1));
    }
    out[thread] = sum;
}

__global__ void exchange_in_warp(int fault, float* out) {
    float* const places = reinterpret_cast<float*>(shared_memory());
    const int thread = static_cast<int>(threadIdx.x);
    places[thread] = static_cast<float>(thread);
    if (fault == kLaneLeaves && thread == 5) {
        return;
    }
    if (fault == kLanesPart && thread == 5) {
        ballot(true);
    }
    if (fault != kNoSyncWarp) {
        sync_warp();
    }
    out[thread] = shuffle_xor(places[thread ^ 3], 1);
}

__global__ void meet(int fault, float* out) {
    const int thread = static_cast<int>(threadIdx.x), warp = thread / 32;
    const bool crossed = fault == kBarriersCross && warp == 1;
    if (fault != kPartOfAWarp || thread % 2 == 0) {
        sync_some(crossed ? 2 : 1, fault == kPartOfAWarp ? 32 : fault == kCountsDiffer && warp == 1 ? 32 : 64);
    }
    sync_some(crossed ? 1 : 2, 64);
    out[thread] = 1;
}

__global__ void read_others(int fault, float* out) {
    int32_t* const places = reinterpret_cast<int32_t*>(shared_memory());
    const uint32_t thread = threadIdx.x, rank = cluster_rank();
    places[thread] = static_cast<int32_t>(100 * rank + thread);
    if (fault != kNoSyncCluster) {
        sync_cluster();
    }
    int32_t sum = 0;
    for (uint32_t other = 0; other < cluster_size(); ++other) {
        sum = 3 * sum + load_from_block(places + thread, other);
    }
    if (fault != kBlockLeaves) {
        sync_cluster();
    }
    out[rank * blockDim.x + thread] = static_cast<float>(sum);
}

// One warp hands a number to another, again and again.
__global__ void hand_over(int fault, float* out) {
    uint64_t* const full = reinterpret_cast<uint64_t*>(shared_memory());
    uint64_t* const empty = full + 1;
    float* const place = reinterpret_cast<float*>(full + 2);
    const int thread = static_cast<int>(threadIdx.x);
    if (thread == 0 && fault != kNeverInitialised) {
        barrier_init(full, 1);
        barrier_init(empty, fault == kOneArrivalMore ? 31 : fault == kOneArrivalLess ? 33 : 32);
        barrier_init_fence();
    }
    sync_block();
    if (fault == kOverwritten && thread == 3) {
        *full = 0;
    }
    float sum = 0;
    for (uint32_t round = 0; round < 3; ++round) {
        if (thread >= 32) {
            barrier_wait(full, round & 1);
            sum = 2 * sum + *place;
            barrier_arrive(empty);
        } else if (thread == 0) {
            barrier_wait(empty, (round & 1) ^ 1);
            *place = static_cast<float>(round + 1);
            barrier_arrive(full);
        }
    }
    out[thread] = sum;
}

using Multiply = GroupProduct<Operand::kE4m3, Major::kK, 64>;

// A product on registers that nobody keeps.
__attribute__((noinline)) void multiply_and_leave(const char* place) {
    float sums[32];
    Multiply::multiply(sums, descriptor(place, 16, 1024), descriptor(place, 16, 1024), false);
}

// d [64, 64] = a [64, K] * b [64, K], E4M3, through a ring of two stages.
__global__ void ring(int fault, SHUNTYARD_TABLE(TensorMap) a, SHUNTYARD_TABLE(TensorMap) b, float* out) {
    constexpr uint32_t kBox = 64 * 128, kStage = 2 * kBox, kBlocks = 6;
    char* const stages = shared_memory();
    uint64_t* const full = reinterpret_cast<uint64_t*>(stages + 2 * kStage);
    uint64_t* const empty = full + 2;
    const int thread = static_cast<int>(threadIdx.x);
    if (thread == 0) {
        for (int stage = 0; stage < 2; ++stage) {
            barrier_init(&full[stage], 1);
            barrier_init(&empty[stage], 4);
        }
        if (fault != kNoFence) {
            barrier_init_fence();
        }
    }
    sync_block();
    if (thread >= 128) {
        const uint32_t blocks = fault == kCopyLeft ? kBlocks + 1 : kBlocks;
        for (uint32_t block = 0; thread == 128 && block < blocks; ++block) {
            const uint32_t stage = block % 2;
            char* const place = stages + stage * kStage + (fault == kBoxOffset ? 128 : 0);
            barrier_wait(&empty[stage], (block / 2 & 1) ^ (fault == kEarlyRefill ? 0 : 1));
            barrier_arrive_expecting(&full[stage], fault == kFewerBytes || fault == kNotBrought ? kBox
                                                   : fault == kMoreBytes                        ? kStage + 1
                                                                                                : kStage);
            tma_load(place, &a, &full[stage], static_cast<int32_t>(128 * block), 0);
            if (fault != kNotBrought) {
                tma_load(place + kBox, &b, &full[stage], static_cast<int32_t>(128 * block), 0);
            }
        }
        return;
    }
    float sums[32];
    for (uint32_t block = 0; block < kBlocks; ++block) {
        const uint32_t stage = block % 2;
        const char* const place = stages + stage * kStage;
        barrier_wait(&full[stage], (block / 2 & 1) ^ (fault == kEarlyRead ? 1 : 0));
        if (fault != kNotBegun) {
            products_begin();
        }
        for (uint32_t step = 0; step < 4; ++step) {
            const uint32_t other = fault == kPartlyShared && thread / 32 == 2 ? 64 : 32;
            Multiply::multiply(sums, descriptor(place + 32 * step, 16, 1024),
                               descriptor(place + kBox + other * step, 16, 1024), block > 0 || step > 0);
        }
        if (fault == kRegistersGone) {
            multiply_and_leave(place);
        }
        if (fault == kTouched && thread == 7) {
            sums[3] = 0;
        }
        if (fault != kNotCommitted) {
            products_commit();
        }
        if (fault == kCommittedTwice) {
            products_commit();
        }
        if (fault != kReleasedEarly && fault != kNotWaited) {
            products_wait<0>();
        }
        if (thread % 32 == 0) {
            barrier_arrive(&empty[stage]);
        }
    }
    if (fault == kReleasedEarly) {
        products_wait<0>();
    }
    for (int i = 0; i < 32; ++i) {
        out[thread * 32 + i] = sums[i];
    }
}

// d [64, 64] = a * b [64, 64] twice, with the left operand in registers: all ones, then all twos.
__global__ void from_registers(int fault, SHUNTYARD_TABLE(TensorMap) b, float* out) {
    char* const box = shared_memory();
    uint64_t* const full = reinterpret_cast<uint64_t*>(box + 64 * 128);
    if (threadIdx.x == 0) {
        barrier_init(full, 1);
        barrier_init_fence();
        barrier_arrive_expecting(full, 64 * 128);
        tma_load(box, &b, full, 0, 0);
    }
    sync_block();
    barrier_wait(full, 0);
    float sums[32];
    uint32_t a[2][4];
    for (int i = 0; i < 2; ++i) {
        uint32_t (&own)[4] = a[fault == kOperandsWritten ? 0 : i];
        for (uint32_t& word : own) {
            word = i == 0 ? 0x3c003c00u : 0x40004000u;
        }
        if (i == 0 || fault != kOperandsNotBegun) {
            products_begin();
        }
        RegisterProduct<Operand::kHalf, 64>::multiply(sums, own, descriptor(box, 16, 1024), i > 0);
        products_commit();
        products_wait<1>();
    }
    products_wait<0>();
    keep_operands(a);
    for (uint32_t i = 0; i < 32; ++i) {
        out[threadIdx.x * 32 + i] = sums[i];
    }
}

// A box by a map that the kernel makes itself: warp 0 publishes, warp 1 copies.
__global__ void own_map(int fault, SHUNTYARD_TABLE(TensorMap) like, const uint8_t* matrix, TensorMap* place,
                        float* out) {
    char* const box = shared_memory();
    TensorMap* const own = reinterpret_cast<TensorMap*>(box + 64 * 128);
    uint64_t* const full = reinterpret_cast<uint64_t*>(own + 1);
    const int thread = static_cast<int>(threadIdx.x);
    if (thread == 0) {
        barrier_init(full, 1);
        barrier_init_fence();
    }
    if (thread < 32) {
        if (thread == 0) {
            *own = like;
            tensor_map_point(own, matrix);
            if (fault == kNotPublished) {
                *place = *own;
            }
        }
        sync_warp();
        if (fault != kNotPublished) {
            tensor_map_publish(place, own);
        }
    }
    sync_block();
    if (thread == (fault == kAcquiredByAnother ? 33 : 32) && fault != kNoAcquire) {
        tensor_map_acquire(place);
    }
    if (thread == 32) {
        TensorMap copied = like;
        barrier_arrive_expecting(full, 64 * 128);
        tma_load(box, fault == kMapOnStack ? &copied : place, full, 0, 0);
    }
    barrier_wait(full, 0);
    out[thread] = to_float(E4m3{static_cast<uint8_t>(box[thread])});
}

__global__ void trade_registers(int fault, float* out) {
    if (threadIdx.x >= 128) {
        more_registers();
    } else if (fault != kNoneGiven) {
        fewer_registers();
    }
    out[threadIdx.x] = 1;
}

std::vector<uint8_t> some_codes(size_t count) {
    std::vector<uint8_t> codes(count + 15);
    for (size_t i = 0; i < codes.size(); ++i) {
        codes[i] = static_cast<uint8_t>(0x28 + (i * i / 7 + i / 128 * 5) % 32);
    }
    return codes;
}

template <typename T>
T* aligned_to(std::vector<uint8_t>& bytes, uintptr_t alignment) {
    const uintptr_t start = reinterpret_cast<uintptr_t>(bytes.data());
    return reinterpret_cast<T*>((start + alignment - 1) / alignment * alignment);
}

int run(int kind, int fault, float* out) {
    Shape shape{dim3(1), dim3(64)};
    shape.shared = 256;
    if (kind < kNoSyncWarp || (kind >= kOutsideShared && kind <= kUnalignedPair)) {
        return launch(exchange, shape, nullptr, fault, out);
    }
    if (kind < kPartOfAWarp) {
        shape.block = dim3(32);
        return launch(exchange_in_warp, shape, nullptr, fault, out);
    }
    if (kind < kOutsideShared) {
        return launch(meet, shape, nullptr, fault, out);
    }
    if (kind < kNeverInitialised) {
        shape.grid = dim3(4);
        shape.block = dim3(32);
        shape.cluster = 4;
        return launch(read_others, shape, nullptr, fault, out);
    }
    if (kind < kNoFence) {
        return launch(hand_over, shape, nullptr, fault, out);
    }
    if (kind == kNoneGiven) {
        shape.block = dim3(384);
        return launch(trade_registers, shape, nullptr, fault, out);
    }
    constexpr int64_t kDepth = 7 * 128;
    std::vector<uint8_t> codes = some_codes(64 * kDepth);
    const uint8_t* const matrix = aligned_to<uint8_t>(codes, 16);
    TensorMap map;
    SHUNTYARD_TRY(encode_tensor_map(map, 1, matrix, kDepth, 64, kDepth, 128, 64));
    if (kind == kOperandsWritten || kind == kOperandsNotBegun) {
        SHUNTYARD_TRY(encode_tensor_map(map, 2, matrix, 64, 64, 128, 64, 64));
        shape.block = dim3(128);
        shape.shared = 64 * 128 + sizeof(uint64_t);
        return launch(from_registers, shape, nullptr, fault, map, out);
    }
    if (kind < kNoAcquire) {
        shape.block = dim3(160);
        shape.shared = 4 * 64 * 128 + 4 * sizeof(uint64_t);
        return launch(ring, shape, nullptr, fault, map, map, out);
    }
    // Maps that were published stay so: the fault has a place of its own, and always the same.
    static std::vector<uint8_t> spaces[2]{std::vector<uint8_t>(256), std::vector<uint8_t>(256)};
    std::vector<uint8_t>& space = spaces[fault == kNotPublished];
    shape.shared = 64 * 128 + 128 + sizeof(uint64_t);
    return launch(own_map, shape, nullptr, fault, map, matrix, aligned_to<TensorMap>(space, 128), out);
}

}  // namespace

extern "C" {

// The name of a fault by its number, null behind the last.
SHUNTYARD_API const char* test_fault_name(int number) { return number < kFaults ? kNames[number] : nullptr; }

// Runs the kernel that a fault is planted in, with it or without; `out` takes 4096 floats.
SHUNTYARD_API int test_fault(int number, int planted, float* out) {
    return run(number, planted ? number : static_cast<int>(kNone), out);
}
}
