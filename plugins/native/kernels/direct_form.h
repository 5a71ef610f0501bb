// Operands of tensor cores, made in registers of what lies in memory: how a lane loads weights and the values of tokens
// so that they meet, in 16 bytes at a time.
//
// Weights are the rows of a product and tokens its columns (primitives.h, "tensor cores"), lane l = 4g + t. The order
// of K within a sum is free as long as both sides agree, and so is which channel is which row. A step of a warp, a
// slot, is some numbers of K for 16 channels times kFragments:
//
//   [out, in]  Lane t takes a quarter of the slot's K, which is 16 contiguous bytes of a channel's weights, and the
//              same numbers of K of token g. A product takes the lane's next numbers each, whatever their K.
//              (Those of INT4 in pairs of equal parity: 0 and 2, 1 and 3.)
//   [in, out]  The slot is 16 of K; lane t takes four of them, of each 16 bytes, which are eight neighbouring channels.
//              Numbers of two K are put together.
//
// Lane g owns 2 * kFragments neighbouring channels: of fragment f, number 2f is row g, and 2f + 1 is row g + 8. So it
// ends with neighbouring channels of its tokens.
#pragma once

#include "kernels/direct.h"
#include "kernels/primitives.h"

namespace shuntyard {

template <typename X>
constexpr Operand kOperandOf = Operand::kHalf;
template <>
inline constexpr Operand kOperandOf<Bfloat> = Operand::kBfloat;

// The numbers of a form. kMatrices is 2 for gate and up, 1 for down.
template <typename X_, DirectForm kForm_, int kMatrices_>
struct DirectFormat {
    using X = X_;
    static constexpr DirectForm kForm = kForm_;
    static constexpr int kMatrices = kMatrices_;
    static constexpr bool kAlongN = kForm == DirectForm::kAlongN;
    static constexpr bool kCodes = kForm == DirectForm::kCodes;
    static constexpr bool kInt4 = kForm == DirectForm::kInt4;
    static constexpr Operand kOperand = kCodes ? Operand::kE4m3 : kOperandOf<X>;
    static constexpr int kFragments = kAlongN ? 4 : kMatrices == 2 ? 1 : 2;  // of 16 channels, of each matrix
    static constexpr int kChannels = 16 * kFragments;
    static constexpr int kOwn = 2 * kFragments;  // channels of a lane
    // How many numbers of K a lane takes of a slot, and all four.
    static constexpr int kLane = kAlongN ? 4 : kForm == DirectForm::kAlongK ? 8 : kInt4 ? 32 : 16;
    static constexpr int kSlot = 4 * kLane;
    static constexpr int kTokenBytes = kCodes ? 1 : 2;  // of a number
    // The lane's values of a token, in registers: as many as one load brings, and so many loads.
    static constexpr int kWords = kAlongN ? 2 : 4;
    static constexpr int kLoads = kLane * kTokenBytes / (4 * kWords);
    static constexpr int kSteps = kWords / 2;          // products that one load is for
    static constexpr int kQuads = kAlongN ? 4 : kOwn;  // the lane's loads of weights, of each matrix
    static constexpr int kTables = kCodes ? 3 : kForm == DirectForm::kE4m3 || kInt4 ? 2 : 1;
    // Gate and up may have tokens of their own where these are codes.
    static constexpr int kSets = kCodes ? kMatrices : 1;
    static constexpr bool kScaleTokens = kMatrices == 2 && !kCodes;
};

// A lane's values of one token.
template <int kCount>
struct alignas(4 * kCount) Words {
    uint32_t words[kCount];
};

// As one load, from row * pitch + offset bytes behind `base`. It stays where it stands among products, and its address
// is made there: the compiler would else load all tiles' tokens first, keep all rows' addresses, and run out of
// registers.
template <int kCount>
__device__ Words<kCount> load_words(const char* base, uint32_t row, uint32_t pitch, int64_t offset);
#ifdef __CUDACC__
template <>
__device__ inline Words<4> load_words<4>(const char* base, uint32_t row, uint32_t pitch, int64_t offset) {
    Words<4> w;
    asm volatile(
        "{\n.reg .u64 address;\nmad.wide.u32 address, %5, %6, %4;\nadd.u64 address, address, %7;\n"
        "ld.global.v4.u32 {%0, %1, %2, %3}, [address];\n}"
        : "=r"(w.words[0]), "=r"(w.words[1]), "=r"(w.words[2]), "=r"(w.words[3])
        : "l"(base), "r"(row), "r"(pitch), "l"(offset));
    return w;
}
template <>
__device__ inline Words<2> load_words<2>(const char* base, uint32_t row, uint32_t pitch, int64_t offset) {
    Words<2> w;
    asm volatile(
        "{\n.reg .u64 address;\nmad.wide.u32 address, %3, %4, %2;\nadd.u64 address, address, %5;\n"
        "ld.global.v2.u32 {%0, %1}, [address];\n}"
        : "=r"(w.words[0]), "=r"(w.words[1])
        : "l"(base), "r"(row), "r"(pitch), "l"(offset));
    return w;
}
#else
template <int kCount>
__device__ Words<kCount> load_words(const char* base, uint32_t row, uint32_t pitch, int64_t offset) {
    return *reinterpret_cast<const Words<kCount>*>(base + uint64_t{row} * pitch + offset);
}
#endif

// What a lane holds of the weights of one slot, as loaded.
template <class F>
struct DirectSlot {
    Quad weights[F::kMatrices][F::kQuads];
    uint32_t scales[F::kMatrices][F::kInt4 ? F::kOwn : 1];  // of INT4, the bits of each channel's
};

// Where a lane finds the weights of one matrix.
template <class F>
struct DirectSource {
    const char* rows[F::kAlongN ? 1 : F::kOwn];  // in slot 0
    const char* scales;
    uint32_t first_scale[F::kInt4 ? F::kOwn : 1];
    float scale[F::kForm == DirectForm::kE4m3 ? F::kOwn : 1];
};

// What the bits of a scale say.
template <typename Scale>
__device__ inline float scale_of_bits(uint32_t bits) {
    return to_float(Scale{static_cast<uint16_t>(bits)});
}
template <>
__device__ inline float scale_of_bits<float>(uint32_t bits) {
    return float_of(bits);
}

// -- pairs of X in one register

template <typename X>
__device__ inline float low_of(uint32_t pair) {
    return to_float(X{static_cast<uint16_t>(pair)});
}
template <typename X>
__device__ inline float high_of(uint32_t pair) {
    return to_float(X{static_cast<uint16_t>(pair >> 16)});
}
template <>
__device__ inline float high_of<Bfloat>(uint32_t pair) {
    return float_of(pair & 0xffff0000u);
}

// Both scaled in fp32, then rounded to X.
template <typename X>
__device__ inline uint32_t scaled_pair(uint32_t pair, float low, float high) {
    return pack<X>(low_of<X>(pair) * low, high_of<X>(pair) * high);
}

// a * b + c, of both, rounded once. (The host's twin is for what is exact in fp32.)
template <typename X>
__device__ uint32_t fuse_pair(uint32_t a, uint32_t b, uint32_t c);
#ifdef __CUDACC__
template <>
__device__ inline uint32_t fuse_pair<Half>(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t d;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}
template <>
__device__ inline uint32_t fuse_pair<Bfloat>(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t d = 0;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
#endif
    return d;
}
#else
template <typename X>
__device__ uint32_t fuse_pair(uint32_t a, uint32_t b, uint32_t c) {
    return pack<X>(low_of<X>(a) * low_of<X>(b) + low_of<X>(c), high_of<X>(a) * high_of<X>(b) + high_of<X>(c));
}
#endif

// -- INT4
//
// A nibble n, set into the last places of a number of X whose neighbours are 1 apart, makes that number plus n; less
// that number and 8, it is the weight, exactly.

template <typename X>
struct Int4Constants {  // 1024
    static constexpr uint32_t kNumber = 0x64006400u, kBytes = 0x64646464u, kLess = 0xe408e408u, kOne = 0x3c003c00u;
};
template <>
struct Int4Constants<Bfloat> {  // 128
    static constexpr uint32_t kNumber = 0x43004300u, kBytes = 0x43434343u, kLess = 0xc308c308u, kOne = 0x3f803f80u;
};

// Values 2i and 2i + 1 of a word, in X.
template <typename X>
__device__ inline uint32_t int4_pair(uint32_t word, uint32_t shifted, int i) {
    using Constants = Int4Constants<X>;
    const uint32_t nibbles = permute_bytes(word, shifted, 0x0400u + 0x0101u * static_cast<uint32_t>(i));
    return fuse_pair<X>((nibbles & 0x000f000fu) | Constants::kNumber, Constants::kOne, Constants::kLess);
}

// Of a word's values, those of the same parity are a byte apart, and are made with one instruction less: values
// 4i + parity and 4i + 2 + parity.
template <typename X>
__device__ inline uint32_t int4_pair_apart(uint32_t word, int i, int parity) {
    using Constants = Int4Constants<X>;
    const uint32_t nibbles = word >> 4 * parity & 0x0f0f0f0fu;
    const uint32_t numbers = permute_bytes(nibbles, Constants::kBytes, i == 0 ? 0x4140 : 0x4342);
    return fuse_pair<X>(numbers, Constants::kOne, Constants::kLess);
}

// Values scaled. If the scale is a number of X, the product in fp32 is exact, and X's own multiplication rounds as
// it is rounded from fp32: `pair` is then the scale, twice.
template <typename X, bool kExact>
__device__ inline uint32_t scaled_int4(uint32_t values, float scale, uint32_t pair) {
    return kExact ? fuse_pair<X>(values, pair, 0x80008000u) : scaled_pair<X>(values, scale, scale);
}

// -- operands

// The scales of a slot, ready for use.
template <class F>
struct DirectScales {
    float value[F::kMatrices][F::kInt4 ? F::kOwn : 1];
    uint32_t pair[F::kMatrices][F::kInt4 ? F::kOwn : 1];
};

// What the products of step `step` take of fragment f: two products' worth of K make one load of tokens.
template <class F, bool kExact>
__device__ inline void make_operand(uint32_t (&a)[4], const DirectSlot<F>& slot, const DirectSource<F>& source,
                                    const DirectScales<F>& scales, int m, int f, int step) {
    using X = typename F::X;
    if constexpr (F::kAlongN) {
        const Quad* q = slot.weights[m];
        for (int half = 0; half < 2; ++half) {
            const uint32_t one = q[2 * half].words[f], next = q[2 * half + 1].words[f];
            a[2 * half] = permute_bytes(one, next, 0x5410);
            a[2 * half + 1] = permute_bytes(one, next, 0x7632);
        }
    } else {
        for (int row = 0; row < 2; ++row) {
            const int own = 2 * f + row;
            const Quad& q = slot.weights[m][own];
            if constexpr (F::kForm == DirectForm::kE4m3) {
                const float scale = source.scale[own];
                for (int half = 0; half < 2; ++half) {
                    float low, high;
                    unpack_e4m3(q.words[step] >> 16 * half & 0xffffu, low, high);
                    a[2 * half + row] = pack<X>(low * scale, high * scale);
                }
            } else if constexpr (F::kInt4) {
                for (int half = 0; half < 2; ++half) {
                    const uint32_t values = int4_pair_apart<X>(q.words[step / 2], step % 2, half);
                    a[2 * half + row] = scaled_int4<X, kExact>(values, scales.value[m][own], scales.pair[m][own]);
                }
            } else {
                a[row] = q.words[2 * step];
                a[2 + row] = q.words[2 * step + 1];
            }
        }
    }
}

}  // namespace shuntyard
