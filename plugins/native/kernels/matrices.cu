// From the lists of a checkpoint's weights to tables of matrices.
#include "kernels/matrices.h"

namespace shuntyard {
namespace {

// Bytes of `count` elements, for INT4 a multiple of 8.
int64_t bytes_of(int type, int64_t count) {
    switch (type) {
        case SHUNTYARD_FP32: return count * 4;
        case SHUNTYARD_E4M3: return count;
        case SHUNTYARD_INT4: return count / 2;
        default: return count * 2;
    }
}

const void* behind(const void* start, int type, int64_t count) {
    return static_cast<const char*>(start) + bytes_of(type, count);
}

// Where a matrix [in, out] of every expert lies within weights of the list.
struct Place {
    int64_t first_weight;  // its number in the list, for expert 0
    int64_t in, out;
    int64_t columns;  // of the weight that holds it: more than `out` for gate and up in one
    int64_t first_column;
};

void fill_one(Matrices& table, const Place& place, const shuntyard_expert_weights& from, int64_t experts) {
    const bool linear = from.layout == SHUNTYARD_LINEAR;
    const bool stacked = from.layout == SHUNTYARD_FUSED;
    table.stride_in = linear ? 1 : place.columns;
    table.stride_out = linear ? place.in : 1;
    table.group = from.scaling == SHUNTYARD_PER_GROUP ? from.group_size : place.in;
    table.scale_type = from.scale_type;
    table.activation_scale_type = from.activation_scale_type;
    table.scale_stride = from.scaling == SHUNTYARD_PER_GROUP     ? place.in / from.group_size
                         : from.scaling == SHUNTYARD_PER_CHANNEL ? 1
                                                                 : 0;
    for (int64_t e = 0; e < experts; ++e) {
        const int64_t weight = place.first_weight + (stacked ? 0 : e);
        const int64_t before = stacked ? e * place.in * place.columns : 0;
        table.data[e] = behind(from.weights[weight], from.type, before + place.first_column * table.stride_out);
        table.scales[e] = nullptr;
        table.activation_scales[e] = from.activations == SHUNTYARD_STATIC ? from.activation_scales[weight] : nullptr;
        if (from.scaling != SHUNTYARD_UNSCALED) {
            const int64_t channel = (stacked ? e * place.columns : 0) + place.first_column;
            table.scales[e] = behind(from.scales[weight], from.scale_type, channel * table.scale_stride);
        }
    }
}

bool valid_activations(const shuntyard_expert_weights& weights) {
    switch (weights.activations) {
        case SHUNTYARD_AS_THEY_ARE: return true;
        case SHUNTYARD_DYNAMIC: return weights.type == SHUNTYARD_E4M3;
        case SHUNTYARD_STATIC: return weights.type == SHUNTYARD_E4M3 && valid_type(weights.activation_scale_type);
        default: return false;
    }
}

}  // namespace

bool weights_on_16_bytes(const ExpertMatrices& matrices, int64_t experts) {
    for (int64_t e = 0; e < experts; ++e) {
        if (!on_16_bytes(matrices.gate.data[e]) || !on_16_bytes(matrices.up.data[e]) ||
            !on_16_bytes(matrices.down.data[e])) {
            return false;
        }
    }
    return true;
}

bool valid_form(const shuntyard_expert_weights& weights, int64_t hidden, int64_t intermediate) {
    if (!valid_activations(weights)) {
        return false;
    }
    if (weights.layout < SHUNTYARD_FUSED || weights.layout > SHUNTYARD_LINEAR) {
        return false;
    }
    if (weights.scaling == SHUNTYARD_UNSCALED) {
        return valid_type(weights.type);
    }
    if (!valid_type(weights.scale_type)) {
        return false;
    }
    if (weights.scaling != SHUNTYARD_PER_GROUP) {
        return weights.type == SHUNTYARD_E4M3 &&
               (weights.scaling == SHUNTYARD_PER_TENSOR || weights.scaling == SHUNTYARD_PER_CHANNEL);
    }
    const int64_t group = weights.group_size;
    return weights.type == SHUNTYARD_INT4 && weights.layout == SHUNTYARD_LINEAR && group >= 1 &&
           hidden % kInt4Values == 0 && hidden % group == 0 && intermediate % kInt4Values == 0 &&
           intermediate % group == 0;
}

bool valid_weights(const shuntyard_expert_weights& weights, int64_t hidden, int64_t intermediate) {
    return valid_form(weights, hidden, intermediate) && weights.weights != nullptr &&
           (weights.scaling == SHUNTYARD_UNSCALED || weights.scales != nullptr) &&
           (weights.activations != SHUNTYARD_STATIC || weights.activation_scales != nullptr);
}

void fill_strides(ExpertMatrices& matrices, const shuntyard_expert_weights& weights, int64_t hidden,
                  int64_t intermediate) {
    fill(matrices, weights, 0, hidden, intermediate);
}

void fill(ExpertMatrices& matrices, const shuntyard_expert_weights& weights, int64_t experts, int64_t hidden,
          int64_t intermediate) {
    const bool linear = weights.layout == SHUNTYARD_LINEAR;
    const int64_t each = weights.layout == SHUNTYARD_FUSED ? 1 : experts;  // entries of the list for one part
    const int64_t both = linear ? intermediate : 2 * intermediate;
    fill_one(matrices.gate, {0, hidden, intermediate, both, 0}, weights, experts);
    fill_one(matrices.up, {linear ? each : 0, hidden, intermediate, both, linear ? 0 : intermediate}, weights, experts);
    fill_one(matrices.down, {linear ? 2 * each : each, intermediate, hidden, hidden, 0}, weights, experts);
}

}  // namespace shuntyard
