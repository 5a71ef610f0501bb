// Products of 16-bit rows with weights of E4M3 or INT4 on Hopper: weights are made 16-bit on their way from shared
// memory to the tensor cores. See hopper_product.h for tiles, rings and how blocks work.
//
// wgmma takes its left operand from registers, so here weights stand on the left, 64 channels for each warp group, and
// rows of a tile on the right: d [channels, rows]. A warp group has two such products: gate and up, or two times 64
// channels of down. A stage holds 128 bytes of every channel's weights, and the numbers of rows that go with them.
//
// A thread takes 16 bytes of a channel's weights at a time, and of each product the four numbers that come next in
// them. So the rows' numbers lie in an order of their own (mixed_place), which prepare and the first product write.
#pragma once

#include "kernels/direct_form.h"
#include "kernels/hopper_product.h"

namespace shuntyard {

template <typename X_, bool kInt4_, int kRows_, bool kPair_>
struct MixedConfig {
    using X = X_;
    static constexpr bool kInt4 = kInt4_, kPair = kPair_, kMoreRows = false;
    static constexpr Operand kOperand = kOperandOf<X>;
    static constexpr Major kMajor = Major::kK;
    static constexpr int kRows = kRows_, kColumns = 256;

    static constexpr int kBlock = kInt4 ? 256 : 128;  // of K
    static constexpr int kOfByte = kInt4 ? 2 : 1;     // numbers in a byte of weights
    static constexpr int kRowBoxes = kRows / kBoxRows;
    static constexpr int kRowBlocks = kBlock / 64;  // boxes of rows lie 64 numbers of K after one another
    static constexpr int kColumnBoxes = kColumns / kBoxRows;
    static constexpr uint32_t kStageBytes = (kRowBoxes * kRowBlocks + kColumnBoxes) * kBoxBytes;
    static constexpr uint32_t kStages = kStageSpace / kStageBytes;
    static constexpr size_t kShared = kStages * (kStageBytes + 2 * sizeof(uint64_t));

    static constexpr int kSums = kRows / 2;  // of a thread, for each of its two products
    static constexpr int kOutColumns = kPair ? kColumns / 2 : kColumns;
};

#if SHUNTYARD_ON_HOPPER

// The thread's scales of one stage: of INT4, of its two channels of both products and their two chunks.
template <class C>
struct MixedFactors {
    float scales[2][2][C::kInt4 ? 2 : 1];
};

// The thread's weights for half of a stage, as they came: one chunk of its two channels of both products.
struct MixedWeights {
    Quad chunks[2][2];  // by product, channel (the fragment's row g, or g + 8)
};

// Row g of a fragment is channel 0, 4, 1, 5, 2, 6, 3, 7 of eight: channels whose lines eight threads read at once are
// four apart then, and their chunks in different banks.
template <class C>
struct MixedThread {
    int group, lane, first;  // first: the channel of the fragment's row g, of the warp group's 64

    __device__ MixedThread()
        : group(static_cast<int>(threadIdx.x / kGroupThreads) - 1),
          lane(static_cast<int>(threadIdx.x % 32)),
          first(static_cast<int>(threadIdx.x % kGroupThreads) / 32 * 16 + lane / 8 + lane / 4 % 2 * 4) {}

    // The channel of the result that row `row` (0: g, 1: g + 8) of product p belongs to.
    __device__ int32_t channel(const HopperTilePlace& place, int p, int row) const {
        const int box = C::kPair ? group : 2 * group + p;
        return place.column + box * kBoxRows + first + 8 * row;
    }
};

template <class C>
__device__ inline void mixed_factors(MixedFactors<C>& factors, const HopperProduct& product, const MixedScales& scales,
                                     const HopperTilePlace& place, const MixedThread<C>& thread, int32_t k) {
#pragma unroll
    for (int p = 0; p < 2; ++p) {
        const void* const own = scales.scales[C::kPair ? p : 0][place.expert];
#pragma unroll
        for (int row = 0; row < 2; ++row) {
            const int32_t channel = thread.channel(place, p, row);
#pragma unroll
            for (int chunk = 0; chunk < (C::kInt4 ? 2 : 1); ++chunk) {
                const int32_t of_k = C::kInt4 ? k + 128 * chunk + thread.lane % 4 * 32 : 0;
                const bool exists = channel < product.columns && of_k < product.inner;
                const int64_t place_of_scale = channel * scales.stride + (C::kInt4 ? of_k / scales.group : 0);
                factors.scales[p][row][chunk] = exists ? scale_at(own, scales.type, place_of_scale) : 0.0f;
            }
        }
    }
}

// From a stage to registers: chunk t, or t + 4, of the thread's channels.
template <class C>
__device__ inline void mixed_load(MixedWeights& weights, const char* stage, const MixedThread<C>& thread, int chunk) {
    const char* const columns = stage + C::kStageBytes - C::kColumnBoxes * kBoxBytes + 2 * thread.group * kBoxBytes;
#pragma unroll
    for (int p = 0; p < 2; ++p) {
#pragma unroll
        for (int row = 0; row < 2; ++row) {
            const int channel = thread.first + 8 * row;
            const int place = (thread.lane % 4 + 4 * chunk) ^ channel % 8;  // the swizzle of 128 bytes
            weights.chunks[p][row] = load(columns + p * kBoxBytes + channel * 128 + place * 16);
        }
    }
}

// The left operand of product `step` of a chunk: rows g and g + 8, four numbers of each.
template <class C, bool kExact>
__device__ inline void mixed_operand(uint32_t (&a)[4], const MixedWeights& weights, const MixedFactors<C>& factors,
                                     int p, int chunk, int step) {
    using X = typename C::X;
#pragma unroll
    for (int row = 0; row < 2; ++row) {
        const Quad& q = weights.chunks[p][row];
        const float scale = factors.scales[p][row][C::kInt4 ? chunk : 0];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            if constexpr (C::kInt4) {
                const uint32_t word = q.words[step / 2];
                const uint32_t values = int4_pair<X>(word, word >> 4, step % 2 * 2 + half);
                a[2 * half + row] = scaled_int4<X, kExact>(values, scale, pack<X>(scale, scale));
            } else {
                float low, high;
                unpack_e4m3(q.words[step] >> 16 * half & 0xffffu, low, high);
                a[2 * half + row] = pack<X>(low * scale, high * scale);
            }
        }
    }
}

// The products of one stage. While one runs, the next one's operands are made.
template <class C, bool kExact>
__device__ inline void mixed_multiply(const char* stage, const MixedThread<C>& thread, const MixedFactors<C>& factors,
                                      float (&sums)[2][C::kSums], bool accumulate) {
    constexpr int kOfChunk = C::kBlock / 32;  // products that a chunk is for
    MixedWeights weights;
    uint32_t a[2][2][4];
#pragma unroll
    for (int i = 0; i < 2 * kOfChunk; ++i) {
        if (i % kOfChunk == 0) {
            mixed_load<C>(weights, stage, thread, i / kOfChunk);
        }
        uint32_t (&own)[2][4] = a[i % 2];
#pragma unroll
        for (int p = 0; p < 2; ++p) {
            mixed_operand<C, kExact>(own[p], weights, factors, p, i / kOfChunk, i % kOfChunk);
        }
        const char* const rows = stage + i / 4 * C::kRowBoxes * kBoxBytes + i % 4 * 32;
        products_begin();
#pragma unroll
        for (int p = 0; p < 2; ++p) {
            RegisterProduct<C::kOperand, C::kRows>::multiply(sums[p], own[p], descriptor(rows, 16, 1024),
                                                             accumulate || i > 0);
        }
        products_commit();
        products_wait<1>();
        if (i > 0) {
            keep_operands(a[(i - 1) % 2]);  // registers that a product reads must outlast it
        }
    }
    products_wait<0>();
    keep_operands(a[1]);
}

template <class C>
__device__ inline void mixed_sum(const HopperProduct& product, const MixedScales& scales, const HopperTilePlace& place,
                                 HopperRing<C>& ring, const MixedThread<C>& thread, float (&sums)[2][C::kSums]) {
    const int32_t inner = static_cast<int32_t>(product.inner);
    const bool exact = scales.type == (kOperandOf<typename C::X> == Operand::kHalf ? SHUNTYARD_FP16 : SHUNTYARD_BF16);
    MixedFactors<C> factors;
    mixed_factors<C>(factors, product, scales, place, thread, 0);
    for (int32_t k = 0; k < inner; k += C::kBlock) {
        barrier_wait(&ring.full[ring.stage], ring.parity);
        if (C::kInt4 && exact) {
            mixed_multiply<C, true>(ring.current(), thread, factors, sums, k > 0);
        } else {
            mixed_multiply<C, false>(ring.current(), thread, factors, sums, k > 0);
        }
        sync_warp();
        if (thread.lane == 0) {
            barrier_arrive(&ring.empty[ring.stage]);
        }
        if (C::kInt4) {
            mixed_factors<C>(factors, product, scales, place, thread, k + C::kBlock);
        }
        ring.next();
    }
#pragma unroll
    for (int p = 0; p < 2; ++p) {
        for (float& sum : sums[p]) {
            keep(sum);
        }
    }
}

// Stores a value of the thread's channel for row l = 0, and one for l = 1. Threads of neighbouring channels, two rows
// of the fragment apart, exchange: each then has two neighbouring values of one row.
template <class C>
__device__ inline void mixed_store(const HopperProduct& product, const HopperTilePlace& place,
                                   const MixedThread<C>& thread, int32_t channel, int32_t row, float first,
                                   float second) {
    using X = typename C::X;
    const bool odd = thread.lane / 8 % 2 == 1;
    const float other = shuffle_xor(odd ? first : second, 8);
    const int32_t own_row = row + (odd ? 1 : 0), even = odd ? channel - 1 : channel;
    if (own_row >= place.end || even >= product.columns) {
        return;
    }
    constexpr int kChunk = C::kInt4 ? 32 : 16;
    const int64_t column = C::kPair ? mixed_place(even, kChunk) : even;
    const uint32_t pair = odd ? pack<X>(other, second) : pack<X>(first, other);
    reinterpret_cast<uint32_t*>(product.out)[(own_row * product.columns + column) / 2] = pair;
}

template <class C>
__device__ inline void mixed_finish(const HopperProduct& product, const HopperTilePlace& place,
                                    const MixedThread<C>& thread, const float (&sums)[2][C::kSums]) {
    using X = typename C::X;
#pragma unroll
    for (int j = 0; j < C::kRows / 8; ++j) {
        if (place.row + 8 * j >= place.end) {  // also keeps ptxas from beginning all rows at once, which spills
            break;
        }
        const int32_t row = place.row + 8 * j + thread.lane % 4 * 2;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int i = 4 * j + 2 * h;
            if constexpr (C::kPair) {
                mixed_store<C>(product, place, thread, thread.channel(place, 0, h), row,
                               swiglu_of<X, true>(sums[0][i], sums[1][i]),
                               swiglu_of<X, true>(sums[0][i + 1], sums[1][i + 1]));
            } else {
#pragma unroll
                for (int p = 0; p < 2; ++p) {
                    mixed_store<C>(product, place, thread, thread.channel(place, p, h), row, sums[p][i],
                                   sums[p][i + 1]);
                }
            }
        }
    }
}

#endif  // SHUNTYARD_ON_HOPPER

template <class C>
__global__ void __launch_bounds__(kHopperThreads, 1)
    hopper_mixed([[maybe_unused]] SHUNTYARD_TABLE(HopperProduct) product,
                 [[maybe_unused]] SHUNTYARD_TABLE(MixedScales) scales) {
#if SHUNTYARD_ON_HOPPER
    const MixedThread<C> thread;
    hopper_block<C>(product, [&](HopperRing<C>& ring, const HopperTilePlace& place) {
        float sums[2][C::kSums];
        mixed_sum<C>(product, scales, place, ring, thread, sums);
        mixed_finish<C>(product, place, thread, sums);
    });
#elif defined(__CUDA_ARCH__)
    __trap();  // never launched there
#endif
}

template <typename X, bool kInt4>
int run_hopper_mixed(HopperTile tile, bool pair, const HopperProduct& product, const MixedScales& scales,
                     int multiprocessors, void* stream) {
    const auto run = [&](auto config) {
        using C = decltype(config);
        return launch_hopper_kernel<C>(hopper_mixed<C>, product, scales, multiprocessors, stream);
    };
    if (tile == HopperTile::k128) {
        return pair ? run(MixedConfig<X, kInt4, 128, true>{}) : run(MixedConfig<X, kInt4, 128, false>{});
    }
    return pair ? run(MixedConfig<X, kInt4, 64, true>{}) : run(MixedConfig<X, kInt4, 64, false>{});
}

}  // namespace shuntyard
