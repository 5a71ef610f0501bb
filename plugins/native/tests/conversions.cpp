// The conversions of kernels/scalars.h, as arrays, for the tests.
#include "kernels/scalars.h"

using namespace shuntyard;

namespace {

template <typename X>
void widen(const X* from, float* to, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
        to[i] = to_float(from[i]);
    }
}

template <typename X>
void narrow(const float* from, X* to, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
        to[i] = from_float<X>(from[i]);
    }
}

}  // namespace

extern "C" {

SHUNTYARD_API void test_fp16_to_fp32(const Half* from, float* to, int64_t count) { widen(from, to, count); }
SHUNTYARD_API void test_bf16_to_fp32(const Bfloat* from, float* to, int64_t count) { widen(from, to, count); }
SHUNTYARD_API void test_e4m3_to_fp32(const E4m3* from, float* to, int64_t count) { widen(from, to, count); }
SHUNTYARD_API void test_int4_to_fp32(const Int4Word* from, float* to, int64_t count) {
    for (int64_t i = 0; i < count * kInt4Values; ++i) {
        to[i] = to_float(from[i / kInt4Values], i % kInt4Values);
    }
}
SHUNTYARD_API void test_fp32_to_fp16(const float* from, Half* to, int64_t count) { narrow(from, to, count); }
SHUNTYARD_API void test_fp32_to_bf16(const float* from, Bfloat* to, int64_t count) { narrow(from, to, count); }
SHUNTYARD_API void test_fp32_to_e4m3(const float* from, E4m3* to, int64_t count) { narrow(from, to, count); }
}
