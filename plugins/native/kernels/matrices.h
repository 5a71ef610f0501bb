// The weights of all experts as one kind of thing, whatever layout and format they come in: a table of matrices
// [in, out], of which a kernel reads columns.
#pragma once

#include "kernels/launch.h"
#include "kernels/scalars.h"

namespace shuntyard {

// One matrix of every expert. Element (k, n) of expert e's lies `k * stride_in + n * stride_out` elements behind
// data[e]; its scale, if there are any, `n * scale_stride + k / group` behind scales[e]; the scale of the rows that it
// is multiplied with, if it is given, at activation_scales[e]. The table is a parameter of kernels, of which compute
// capability 7.0 takes 32,764 bytes: enough for two tables.
struct Matrices {
    const void* data[SHUNTYARD_MAX_EXPERTS];
    const void* scales[SHUNTYARD_MAX_EXPERTS];
    const void* activation_scales[SHUNTYARD_MAX_EXPERTS];  // null, or one element each
    int64_t stride_in, stride_out;
    int64_t scale_stride;
    int64_t group;  // how many k share a scale, one after the other; all of them, unless scales are per group
    int scale_type, activation_scale_type;
};
static_assert(2 * sizeof(Matrices) <= 32000, "two tables and the other parameters must fit a launch");

// Whether weights of this type have scales.
template <typename W>
constexpr bool kScaled = false;
template <>
inline constexpr bool kScaled<E4m3> = true;
template <>
inline constexpr bool kScaled<Int4Word> = true;

template <typename W>
__device__ inline float element(const void* data, int64_t index) {
    return to_float(static_cast<const W*>(data)[index]);
}
template <>
__device__ inline float element<Int4Word>(const void* data, int64_t index) {
    return to_float(static_cast<const Int4Word*>(data)[index / kInt4Values], index % kInt4Values);
}

// A scale of FP32, FP16 or BF16, in fp32.
__device__ inline float scale_at(const void* scales, int type, int64_t index) {
    switch (type) {
        case SHUNTYARD_FP16: return element<Half>(scales, index);
        case SHUNTYARD_BF16: return element<Bfloat>(scales, index);
        default: return element<float>(scales, index);
    }
}

// The given scale of the rows that an expert's matrix is multiplied with.
__device__ inline float activation_scale(const Matrices& matrices, int32_t expert) {
    return scale_at(matrices.activation_scales[expert], matrices.activation_scale_type, 0);
}

// One column of one expert's matrix: what a thread multiplies its rows with.
template <typename X, typename W>
struct Column {
    const void* data;
    const void* scales;
    int64_t first, stride;
    int64_t first_scale;
    int scale_type;

    __device__ Column(const Matrices& matrices, int32_t expert, int64_t column)
        : data(matrices.data[expert]),
          scales(matrices.scales[expert]),
          first(column * matrices.stride_out),
          stride(matrices.stride_in),
          first_scale(column * matrices.scale_stride),
          scale_type(matrices.scale_type) {}

    // The scale of the group-th group of weights, in fp32; not looked at where weights have none.
    __device__ float scale(int64_t group) const {
        if constexpr (!kScaled<W>) {
            return 1.0f;
        } else {
            return scale_at(scales, scale_type, first_scale + group);
        }
    }

    // The k-th weight as it is stored.
    __device__ float value(int64_t k) const { return element<W>(data, first + k * stride); }

    // The k-th weight as products with rows of X take it: scaled in fp32, rounded to X.
    __device__ float weight(int64_t k, float scale) const {
        const float value = this->value(k);
        return rounded_to<X>(kScaled<W> ? value * scale : value);
    }
};

// The three matrices of the experts: gate and up [H, F], down [F, H].
struct ExpertMatrices {
    Matrices gate, up, down;
};

// Whether every expert's matrices begin at multiples of 16 bytes.
bool weights_on_16_bytes(const ExpertMatrices& matrices, int64_t experts);

// Whether there are weights of such a form; and whether their lists are there.
bool valid_form(const shuntyard_expert_weights& weights, int64_t hidden, int64_t intermediate);
bool valid_weights(const shuntyard_expert_weights& weights, int64_t hidden, int64_t intermediate);

// Fills the tables from a valid form, but for addresses; and from valid weights.
void fill_strides(ExpertMatrices& matrices, const shuntyard_expert_weights& weights, int64_t hidden,
                  int64_t intermediate);
void fill(ExpertMatrices& matrices, const shuntyard_expert_weights& weights, int64_t experts, int64_t hidden,
          int64_t intermediate);

}  // namespace shuntyard
