// FOR TESTS ONLY: the host's twins of what kernels/primitives.h writes as PTX. Included by it alone.
//
// Threads are fibers of one thread of the operating system. The emulator is an adversary: it runs fibers in an order
// drawn from a seed, brings copies and finishes products as late as the rules allow, shows poison until then, and ends
// the process with a message where a kernel breaks a rule of the architecture or waits for ever.
//
// What it cannot find: a race that comes out right for every seed tried; a missing sync_warp where a shuffle stands
// (which orders no memory on a device, and does here), or a missing sync_some where the warps of a group multiply
// together (all four meet there, which on a device they need not); a race between blocks that are in no cluster, which
// run one after the other, in any order; what is merely slow.
//
//   launches.cpp  launches and the scheduler
//   fibers.cpp    fibers and their stacks
//   blocks.cpp    shared memory, and barriers of blocks and clusters
//   warps.cpp     what the lanes of a warp do together, mma.sync among it
//   copies.cpp    mbarriers, TMA and its maps, reading other blocks' memory
//   products.cpp  wgmma
#pragma once

namespace shuntyard {

// -- blocks, warps and shared memory

char* shared_memory();
uint32_t shared_address(const void* pointer);
void sync_block();
void sync_warp();
void sync_some(int number, int threads);

uint32_t shuffle(uint32_t value, int lane);
uint32_t shuffle_xor(uint32_t value, int mask);
int32_t shuffle_up(int32_t value, int delta);
uint32_t ballot(bool value);
uint32_t match_any(uint32_t value);
uint32_t reduce_max(uint32_t value);
inline uint32_t reduce_min(uint32_t value) { return ~reduce_max(~value); }

inline int32_t shuffle(int32_t value, int lane) {
    return static_cast<int32_t>(shuffle(static_cast<uint32_t>(value), lane));
}
inline float shuffle(float value, int lane) { return float_of(shuffle(bits_of(value), lane)); }
inline int32_t shuffle_xor(int32_t value, int mask) {
    return static_cast<int32_t>(shuffle_xor(static_cast<uint32_t>(value), mask));
}
inline float shuffle_xor(float value, int mask) { return float_of(shuffle_xor(bits_of(value), mask)); }

inline int count_bits(uint32_t value) { return __builtin_popcount(value); }

void shared_max(int32_t* place, int32_t value);

// -- memory

Quad load_once(const void* address);
Quad load(const void* address);
void store(void* address, const Quad& q);

inline uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
    const uint64_t both = uint64_t{b} << 32 | a;
    uint32_t result = 0;
    for (int i = 0; i < 4; ++i) {
        const uint32_t which = selector >> 4 * i;
        uint32_t byte = static_cast<uint32_t>(both >> 8 * (which & 7)) & 0xffu;
        if (which & 8) {  // its sign, eight times
            byte = byte & 0x80u ? 0xffu : 0;
        }
        result |= byte << 8 * i;
    }
    return result;
}

template <typename X>
uint32_t pack(float low, float high) {
    return from_float<X>(low).bits | uint32_t{from_float<X>(high).bits} << 16;
}

inline void unpack_e4m3(uint32_t both, float& low, float& high) {
    low = to_float(E4m3{static_cast<uint8_t>(both)});
    high = to_float(E4m3{static_cast<uint8_t>(both >> 8)});
}

// -- tensor cores, a warp at a time

void multiply_fragments(Operand operand, float* d, const uint32_t* a, uint32_t b0, uint32_t b1);

template <Operand kOperand>
void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    multiply_fragments(kOperand, d, a, b0, b1);
}

// -- clusters

uint32_t cluster_rank();
uint32_t cluster_size();
void sync_cluster();
int32_t load_from_block(const int32_t* place, uint32_t rank);

// -- mbarriers

void barrier_init(uint64_t* barrier, uint32_t count);
void barrier_init_fence();
void barrier_arrive(uint64_t* barrier);
void barrier_arrive_expecting(uint64_t* barrier, uint32_t bytes);
void barrier_wait(uint64_t* barrier, uint32_t parity);

// -- TMA

void tma_load(void* to, const TensorMap* map, uint64_t* barrier, int32_t column, int32_t row);
void tensor_map_point(TensorMap* map, const void* matrix);
void tensor_map_publish(TensorMap* to, const TensorMap* from);
void tensor_map_acquire(const TensorMap* map);

// -- tensor cores, four warps at a time

inline uint64_t descriptor(const void* start, uint32_t leading, uint32_t stride) {
    return (uint64_t{shared_address(start) & 0x3ffffu} >> 4) | uint64_t{leading >> 4} << 16 |
           uint64_t{stride >> 4} << 32 | uint64_t{1} << 62;
}

void products_begin();
void products_commit();
void wait_for_products(int pending);
template <int kPending>
void products_wait() {
    wait_for_products(kPending);
}
inline void keep(float& value) { asm volatile("" : "+m"(value)); }
inline void keep_operands(const uint32_t (&a)[2][4]) { asm volatile("" ::"m"(a)); }

void more_registers();
void fewer_registers();

// What a warp group multiplies by one instruction.
struct Product {
    Operand operand;
    Major major;
    int columns;
    uint64_t left, right;
    bool accumulate;
    bool in_registers = false;  // the left operand
};
void multiply_group(float* d, const Product& product, const uint32_t* operands = nullptr);

template <Operand kOperand, Major kMajor, int kColumns>
struct GroupProduct {
    static_assert(kColumns % 8 == 0 && kColumns >= 8 && kColumns <= 256, "wgmma has no such width");
    static_assert(kOperand != Operand::kE4m3 || kMajor == Major::kK, "E4M3 operands lie along K");
    static void multiply(float* d, uint64_t left, uint64_t right, bool accumulate) {
        multiply_group(d, {kOperand, kMajor, kColumns, left, right, accumulate});
    }
};

template <Operand kOperand, int kColumns>
struct RegisterProduct {
    static_assert(kOperand != Operand::kE4m3, "not written: E4M3 in registers");
    static void multiply(float* d, const uint32_t (&left)[4], uint64_t right, bool accumulate) {
        multiply_group(d, {kOperand, Major::kK, kColumns, 0, right, accumulate, true}, left);
    }
};

}  // namespace shuntyard
