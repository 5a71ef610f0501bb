// What kernels use of a GPU beyond arithmetic: barriers, warps, clusters, tensor cores, asynchronous copies.
//
// One line of PTX each (PTX ISA 9.0, "Instruction Set"), and in the tests' host build a twin in host/emulator.h that
// does the same to fibers, as late and in as awkward an order as the architecture allows. Kernels that need more than
// the oldest architecture are compiled to nothing elsewhere: their callers ask for the device's compute capability.
#pragma once

#include "kernels/launch.h"
#include "kernels/scalars.h"

namespace shuntyard {

// A TMA descriptor: opaque, 128 bytes, as CUtensorMap.
struct alignas(64) TensorMap {
    uint64_t words[16];
};

// 16 bytes, as one load.
struct alignas(16) Quad {
    uint32_t words[4];
};

// What tensor cores multiply.
enum class Operand {
    kHalf,
    kBfloat,
    kE4m3
};

// How a 16-bit matrix of weights lies in memory: along K as [out, in], or along N as [in, out].
enum class Major {
    kK,
    kN
};

}  // namespace shuntyard

#ifdef __CUDACC__

// wgmma, setmaxnreg and tensormap.replace belong to sm_90a alone.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define SHUNTYARD_ON_HOPPER 1
#else
#define SHUNTYARD_ON_HOPPER 0
#endif
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define SHUNTYARD_HAS_CLUSTERS 1
#else
#define SHUNTYARD_HAS_CLUSTERS 0
#endif

namespace shuntyard {

// -- blocks, warps and shared memory

// The dynamic shared memory of the block, aligned to 1024 bytes.
__device__ inline char* shared_memory() {
    extern __shared__ __align__(1024) char shuntyard_shared[];
    return shuntyard_shared;
}

// The 32-bit address that instructions on shared memory take.
__device__ inline uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ inline void sync_block() { __syncthreads(); }
__device__ inline void sync_warp() { __syncwarp(); }

// Barrier `number` (1 .. 15) for `threads` of the block's threads, a multiple of 32.
__device__ inline void sync_some(int number, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

// All 32 lanes take part.
__device__ inline uint32_t shuffle(uint32_t value, int lane) { return __shfl_sync(0xffffffffu, value, lane); }
__device__ inline int32_t shuffle(int32_t value, int lane) { return __shfl_sync(0xffffffffu, value, lane); }
__device__ inline float shuffle(float value, int lane) { return __shfl_sync(0xffffffffu, value, lane); }
__device__ inline uint32_t shuffle_xor(uint32_t value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }
__device__ inline int32_t shuffle_xor(int32_t value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }
__device__ inline float shuffle_xor(float value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }
// The value of `delta` lanes below; a lane's own where there is none.
__device__ inline int32_t shuffle_up(int32_t value, int delta) { return __shfl_up_sync(0xffffffffu, value, delta); }
__device__ inline uint32_t ballot(bool value) { return __ballot_sync(0xffffffffu, value); }
// The lanes that hold the same value.
__device__ inline uint32_t match_any(uint32_t value) { return __match_any_sync(0xffffffffu, value); }

// The largest and the smallest of all lanes' values.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
__device__ inline uint32_t reduce_max(uint32_t value) {
    for (int mask = 16; mask > 0; mask /= 2) {
        value = max(value, shuffle_xor(value, mask));
    }
    return value;
}
__device__ inline uint32_t reduce_min(uint32_t value) { return ~reduce_max(~value); }
#else
__device__ inline uint32_t reduce_max(uint32_t value) { return __reduce_max_sync(0xffffffffu, value); }
__device__ inline uint32_t reduce_min(uint32_t value) { return __reduce_min_sync(0xffffffffu, value); }
#endif

__device__ inline int count_bits(uint32_t value) { return __popc(value); }

// On a 32-bit integer in shared memory; what stood there before is not given, as its order is open.
__device__ inline void shared_max(int32_t* place, int32_t value) { atomicMax(place, value); }

// -- memory

// 16 bytes that are read once, or written once: no line of L1 is kept for them.
__device__ inline Quad load_once(const void* address) {
    Quad q;
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(q.words[0]), "=r"(q.words[1]), "=r"(q.words[2]), "=r"(q.words[3])
                 : "l"(address));
    return q;
}
__device__ inline Quad load(const void* address) {
    const uint4 q = *static_cast<const uint4*>(address);
    return {{q.x, q.y, q.z, q.w}};
}
__device__ inline void store(void* address, const Quad& q) {
    *static_cast<uint4*>(address) = make_uint4(q.words[0], q.words[1], q.words[2], q.words[3]);
}

// The bytes of a:b (a the lower four) that a selector names, lowest first, as PRMT does it.
__device__ inline uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
    return __byte_perm(a, b, selector);
}

// -- two floats as one register of operands, rounded to nearest, ties to even; `low` stands in the lower half

template <typename X>
__device__ uint32_t pack(float low, float high);
template <>
__device__ inline uint32_t pack<Half>(float low, float high) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
    return from_float<Half>(low).bits | uint32_t{from_float<Half>(high).bits} << 16;
#else
    uint32_t both;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
#endif
}
template <>
__device__ inline uint32_t pack<Bfloat>(float low, float high) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
    return from_float<Bfloat>(low).bits | uint32_t{from_float<Bfloat>(high).bits} << 16;
#else
    uint32_t both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
#endif
}

// Two E4M3 numbers in 16 bits, exactly.
__device__ inline void unpack_e4m3(uint32_t both, float& low, float& high) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 890
    low = to_float(E4m3{static_cast<uint8_t>(both)});
    high = to_float(E4m3{static_cast<uint8_t>(both >> 8)});
#else
    uint32_t halves;
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(static_cast<uint16_t>(both)));
    low = to_float(Half{static_cast<uint16_t>(halves)});
    high = to_float(Half{static_cast<uint16_t>(halves >> 16)});
#endif
}

// -- tensor cores, a warp at a time: d += a [16, k] * b [k, 8]
//
// Lane l = 4g + t. 16-bit operands, k = 16: a[0] holds row g, columns 2t and 2t + 1 (the lower half first); a[1] row
// g + 8; a[2] and a[3] the same at columns 2t + 8; b[0] holds rows 2t and 2t + 1 of column g, b[1] rows 2t + 8.
// E4M3, k = 32: the same with 4 numbers a register: 4t .. 4t + 3, and 16 further. d[0], d[1]: row g, columns 2t and
// 2t + 1; d[2], d[3]: row g + 8.

template <Operand kOperand>
__device__ void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 890
#define SHUNTYARD_MMA(kind, shape, types)                                                                             \
    template <>                                                                                                       \
    __device__ inline void multiply<Operand::kind>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { \
        asm volatile("mma.sync.aligned." shape ".row.col.f32." types                                                  \
                     ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                           \
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                 \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                                 \
    }
#else  // older than all of them: never launched there
#define SHUNTYARD_MMA(kind, shape, types)                                                                     \
    template <>                                                                                               \
    __device__ inline void multiply<Operand::kind>(float (&)[4], const uint32_t (&)[4], uint32_t, uint32_t) { \
        __trap();                                                                                             \
    }
#endif
SHUNTYARD_MMA(kHalf, "m16n8k16", "f16.f16")
SHUNTYARD_MMA(kBfloat, "m16n8k16", "bf16.bf16")
SHUNTYARD_MMA(kE4m3, "m16n8k32", "e4m3.e4m3")
#undef SHUNTYARD_MMA

// -- clusters: blocks that run together and see each other's shared memory

#if SHUNTYARD_HAS_CLUSTERS
__device__ inline uint32_t cluster_rank() {
    uint32_t rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}
__device__ inline uint32_t cluster_size() {
    uint32_t size;
    asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
    return size;
}
__device__ inline void sync_cluster() {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// The integer at the same place in the shared memory of another block of the cluster.
__device__ inline int32_t load_from_block(const int32_t* place, uint32_t rank) {
    uint32_t address;
    int32_t value;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(place)), "r"(rank));
    asm volatile("ld.shared::cluster.s32 %0, [%1];" : "=r"(value) : "r"(address) : "memory");
    return value;
}
#else
__device__ inline uint32_t cluster_rank() { return 0; }
__device__ inline uint32_t cluster_size() { return 1; }
__device__ inline void sync_cluster() { __syncthreads(); }
__device__ inline int32_t load_from_block(const int32_t* place, uint32_t) { return *place; }
#endif

#if SHUNTYARD_ON_HOPPER

// -- mbarriers in shared memory: a phase ends when `count` arrivals and all announced bytes are there

__device__ inline void barrier_init(uint64_t* barrier, uint32_t count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
}
// Makes initialised barriers known to asynchronous copies; a sync_block() follows.
__device__ inline void barrier_init_fence() {
    asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;" ::: "memory");
}
__device__ inline void barrier_arrive(uint64_t* barrier) {
    asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
// Arrives, and announces bytes that copies will bring.
__device__ inline void barrier_arrive_expecting(uint64_t* barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
                 "r"(bytes)
                 : "memory");
}
// Until the phase of this parity (0 for the first) has ended.
__device__ inline void barrier_wait(uint64_t* barrier, uint32_t parity) {
    asm volatile(
        "{\n.reg .pred done;\nagain:\n"
        "mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n}" ::"r"(shared_address(barrier)),
        "r"(parity)
        : "memory");
}

// -- TMA: a box of a matrix to shared memory, in the swizzle of its map; what lies outside of the matrix becomes zero

__device__ inline void tma_load(void* to, const TensorMap* map, uint64_t* barrier, int32_t column, int32_t row) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], "
        "[%2];" ::"r"(shared_address(to)),
        "l"(map), "r"(shared_address(barrier)), "r"(column), "r"(row)
        : "memory");
}
// One thread: the address in a map that lies in shared memory.
__device__ inline void tensor_map_point(TensorMap* map, const void* matrix) {
    asm volatile("tensormap.replace.tile.global_address.shared::cta.b1024.b64 [%0], %1;" ::"r"(shared_address(map)),
                 "l"(matrix)
                 : "memory");
}
// A whole warp: a map from shared to global memory, so that a later kernel may copy by it once it has acquired it.
__device__ inline void tensor_map_publish(TensorMap* to, const TensorMap* from) {
    asm volatile(
        "tensormap.cp_fenceproxy.global.shared::cta.tensormap::generic.release.gpu.sync.aligned [%0], [%1], 128;" ::"l"(
            to),
        "r"(shared_address(from))
        : "memory");
}
__device__ inline void tensor_map_acquire(const TensorMap* map) {
    asm volatile("fence.proxy.tensormap::generic.acquire.gpu [%0], 128;" ::"l"(map) : "memory");
}

// -- tensor cores, four warps at a time: d [64, N] += A [64, k] * B [k, N], both in shared memory
//
// A descriptor says where a matrix lies, in the 128-byte swizzle that TMA wrote it in (PTX ISA, "Matrix Descriptor
// Format"; checked against CUTLASS 4.2, cute/arch/mma_sm90_desc.hpp). K-major: rows of 128 bytes, one after the other;
// `stride` bytes from 8 rows to the next 8. N-major: columns of 64 numbers; `stride` bytes from 8 values of k to the
// next 8, `leading` bytes from 64 values of n to the next 64.
//
// Thread i of the four warps holds d[4 * j + 2 * h + l] = row 16 * (i / 32) + i % 32 / 4 + 8 * h, column
// 8 * j + 2 * (i % 4) + l.

__device__ inline uint64_t descriptor(const void* start, uint32_t leading, uint32_t stride) {
    return (uint64_t{shared_address(start) & 0x3ffffu} >> 4) | uint64_t{leading >> 4} << 16 |
           uint64_t{stride >> 4} << 32 | uint64_t{1} << 62;
}

// Before the first product that reads or writes registers which other instructions have written.
__device__ inline void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until at most kPending groups are unfinished.
template <int kPending>
__device__ inline void products_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// Keeps the compiler from moving accesses to a register that a product is working on.
__device__ inline void keep(float& value) { asm volatile("" : "+f"(value)::"memory"); }

__device__ inline void keep_operands(const uint32_t (&a)[2][4]) {
    for (const uint32_t (&own)[4] : a) {
        asm volatile("" ::"r"(own[0]), "r"(own[1]), "r"(own[2]), "r"(own[3]) : "memory");
    }
}

__device__ inline void more_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 232;"); }
__device__ inline void fewer_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 40;"); }

#include "kernels/wgmma.h"

#endif  // SHUNTYARD_ON_HOPPER

}  // namespace shuntyard

#else
#define SHUNTYARD_ON_HOPPER 1
#define SHUNTYARD_HAS_CLUSTERS 1
#include "host/emulator.h"
#endif
