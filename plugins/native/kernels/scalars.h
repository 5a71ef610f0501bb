// Number formats as bits. fp16 and bf16, and their conversions to and from fp32: round to nearest, ties to even;
// subnormals, infinities and NaN kept (a NaN stays one, its payload may not). FP8, which has no infinities: what is too
// large becomes its largest number. INT4, which is only read.
//
// Written out rather than taken from CUDA's headers, so that host and device share one definition that needs no CUDA.
// On the device narrowing uses the conversion instructions, which do the same in one step.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels/launch.h"

namespace shuntyard {

struct Half {
    uint16_t bits;
};

struct Bfloat {
    uint16_t bits;
};

// FP8 of 4 exponent bits (bias 7) and 3 mantissa bits, without infinities: all ones is NaN (arXiv 2209.05433, "E4M3").
struct E4m3 {
    uint8_t bits;
};

// Eight integers of -8 .. 7, the first in the lowest nibble, each stored as its value + 8.
struct Int4Word {
    uint32_t bits;
};
constexpr int64_t kInt4Values = 8;

__host__ __device__ inline uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof(bits));
    return bits;
}

__host__ __device__ inline float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof(value));
    return value;
}

__host__ __device__ inline float to_float(float value) { return value; }

__host__ __device__ inline float to_float(Bfloat value) { return float_of(uint32_t{value.bits} << 16); }

__host__ __device__ inline float to_float(Half value) {
#ifdef __CUDA_ARCH__
    float result;
    asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
    return result;
#else
    const uint32_t sign = (value.bits & 0x8000u) << 16;
    const uint32_t magnitude = value.bits & 0x7fffu;
    if (magnitude >= 0x7c00u) {  // infinity or NaN: all exponent bits set in fp32, too
        return float_of(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
    }
    if (magnitude < 0x0400u) {  // zero or subnormal: a multiple of 2^-24
        const float absolute = static_cast<float>(magnitude) * 0x1p-24f;
        return float_of(sign | bits_of(absolute));
    }
    return float_of(sign | ((magnitude << 13) + ((127u - 15u) << 23)));
#endif
}

__host__ __device__ inline float to_float(E4m3 value) {
    const uint32_t sign = (value.bits & 0x80u) << 24;
    const uint32_t magnitude = value.bits & 0x7fu;
    if (magnitude == 0x7fu) {
        return float_of(sign | 0x7fc00000u);
    }
    if (magnitude < 0x08u) {  // zero or subnormal: a multiple of 2^-9
        return float_of(sign | bits_of(static_cast<float>(magnitude) * 0x1p-9f));
    }
    return float_of(sign | ((magnitude << 20) + ((127u - 7u) << 23)));
}

__host__ __device__ inline float to_float(Int4Word word, int64_t which) {
    return static_cast<float>(static_cast<int32_t>(word.bits >> 4 * which & 0xfu) - 8);
}

template <typename X>
__host__ __device__ X from_float(float value);

template <>
__host__ __device__ inline float from_float<float>(float value) {
    return value;
}

template <>
__host__ __device__ inline Bfloat from_float<Bfloat>(float value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    Bfloat result;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
    return result;
#else
    const uint32_t bits = bits_of(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) {  // NaN: set a kept mantissa bit, or truncation could leave infinity
        return {static_cast<uint16_t>(bits >> 16 | 0x40u)};
    }
    // Half of the last kept place, less one if that place is even: a tie then carries only from odd to even.
    return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
#endif
}

template <>
__host__ __device__ inline Half from_float<Half>(float value) {
#ifdef __CUDA_ARCH__
    Half result;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
    return result;
#else
    const uint32_t bits = bits_of(value);
    const uint32_t sign = bits >> 16 & 0x8000u;
    const uint32_t magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) {
        return {static_cast<uint16_t>(sign | 0x7e00u)};
    }
    if (magnitude >= 0x477ff000u) {  // 65520, half-way past the largest fp16, and above: infinity
        return {static_cast<uint16_t>(sign | 0x7c00u)};
    }
    if (magnitude < 0x38800000u) {
        // Below 2^-14: adding 0.5 lines the value up with fp16's subnormal grid of 2^-24, and fp32 addition rounds it
        // there, ties to even. What the addition left in the mantissa is the result.
        const float lined_up = float_of(magnitude) + 0.5f;
        return {static_cast<uint16_t>(sign | (bits_of(lined_up) - bits_of(0.5f)))};
    }
    const uint32_t rebiased = magnitude - ((127u - 15u) << 23);
    return {static_cast<uint16_t>(sign | (rebiased + 0xfffu + (rebiased >> 13 & 1u)) >> 13)};
#endif
}

template <>
__host__ __device__ inline E4m3 from_float<E4m3>(float value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
    uint16_t both;  // the second operand's number stands in the lower half
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(both) : "f"(0.0f), "f"(value));
    return {static_cast<uint8_t>(both)};
#else
    const uint32_t bits = bits_of(value);
    const uint32_t sign = bits >> 24 & 0x80u;
    const uint32_t magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) {
        return {static_cast<uint8_t>(sign | 0x7fu)};
    }
    if (magnitude >= 0x43e00000u) {  // 448, the largest, and above
        return {static_cast<uint8_t>(sign | 0x7eu)};
    }
    if (magnitude < 0x3c800000u) {
        // Below 2^-6, on a grid of 2^-9: as above, 2^14 being the number whose neighbours are 2^-9 apart.
        const float lined_up = float_of(magnitude) + 0x1p14f;
        return {static_cast<uint8_t>(sign | (bits_of(lined_up) - bits_of(0x1p14f)))};
    }
    const uint32_t rebiased = magnitude - ((127u - 7u) << 23);
    return {static_cast<uint8_t>(sign | (rebiased + 0x7ffffu + (rebiased >> 20 & 1u)) >> 20)};
#endif
}

// What a float becomes when it is stored as X.
template <typename X>
__host__ __device__ inline float rounded_to(float value) {
    return to_float(from_float<X>(value));
}

// 1 / (1 + exp(-value)), without overflow for a large -value.
__host__ __device__ inline float sigmoid(float value) {
    const float e = expf(-fabsf(value));
    return (value >= 0.0f ? 1.0f : e) / (1.0f + e);
}

// The same to 4e-7, in a fourth of the instructions: for values that are rounded to 16 bits next.
__host__ __device__ inline float quick_sigmoid(float value) {
#ifdef __CUDA_ARCH__
    const float e = __expf(-fabsf(value));
    const float inverse = __fdividef(1.0f, 1.0f + e);
    return value >= 0.0f ? inverse : e * inverse;
#else
    return sigmoid(value);
#endif
}

// silu(gate) * up, rounded to X where the contract rounds.
template <typename X, bool kQuick = false>
__host__ __device__ inline float swiglu_of(float gate, float up) {
    const float rounded = rounded_to<X>(gate);
    const float slope = kQuick ? quick_sigmoid(rounded) : sigmoid(rounded);
    return rounded_to<X>(rounded * slope * rounded_to<X>(up));
}

}  // namespace shuntyard
