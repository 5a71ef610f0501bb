#include "adapter/op.h"

#include <climits>

#include "shuntyard_plugins.h"

namespace shuntyard {
namespace {

using nvinfer1::DataType;

const char* describe(Extent extent) {
    switch (extent) {
        case Extent::kTokens: return "T";
        case Extent::kExperts: return "E";
        case Extent::kHidden: return "H";
        case Extent::kIntermediate: return "F";
        case Extent::kRows: return "T*K";
        case Extent::kOffsets: return "E+1";
        case Extent::kTwiceIntermediate: return "2F";
    }
    return "?";
}

size_t routing_workspace(const Sizes& s, const DataType*) {
    return shuntyard_moe_routing_workspace(s[Extent::kTokens], s[Extent::kExperts], s.top_k);
}

int launch_routing(const Sizes& s, const DataType*, const void* const* in, void* const* out, void* workspace,
                   size_t workspace_size, void* stream) {
    return shuntyard_moe_routing(static_cast<const float*>(in[0]), static_cast<float*>(out[0]),
                                 static_cast<int32_t*>(out[1]), static_cast<int32_t*>(out[2]), s[Extent::kTokens],
                                 s[Extent::kExperts], s.top_k, workspace, workspace_size, stream);
}

size_t experts_workspace(const Sizes& s, const DataType* types) {
    return shuntyard_moe_experts_workspace(type_code(types[0]), s[Extent::kTokens], s.top_k, s[Extent::kHidden],
                                           s[Extent::kIntermediate]);
}

int launch_experts(const Sizes& s, const DataType* types, const void* const* in, void* const* out, void* workspace,
                   size_t workspace_size, void* stream) {
    return shuntyard_moe_experts(type_code(types[0]), type_code(types[4]), in[0], static_cast<const float*>(in[1]),
                                 static_cast<const int32_t*>(in[2]), static_cast<const int32_t*>(in[3]), in[4], in[5],
                                 out[0], s[Extent::kTokens], s[Extent::kExperts], s.top_k, s[Extent::kHidden],
                                 s[Extent::kIntermediate], workspace, workspace_size, stream);
}

size_t scatter_add_workspace(const Sizes& s, const DataType*) {
    return shuntyard_moe_scatter_add_workspace(s[Extent::kTokens], s.top_k);
}

int launch_scatter_add(const Sizes& s, const DataType* types, const void* const* in, void* const* out, void* workspace,
                       size_t workspace_size, void* stream) {
    return shuntyard_moe_scatter_add(type_code(types[0]), in[0], in[1], static_cast<const int32_t*>(in[2]), out[0],
                                     s[Extent::kTokens], s.top_k, s[Extent::kHidden], workspace, workspace_size,
                                     stream);
}

// Sets `derived` from `base`, or `base` from `derived`, or checks one by the other.
std::string relate(Sizes& s, Extent base, Extent derived, int64_t factor, int64_t plus) {
    const std::string relation = std::string(describe(derived)) + " (K is " + std::to_string(s.top_k) + ")";
    if (s[base] != kUnknown) {
        const int64_t value = s[base] * factor + plus;
        if (s[derived] != kUnknown && s[derived] != value) {
            return "an extent that must be " + relation + " is " + std::to_string(s[derived]) + ", but " +
                   describe(base) + " is " + std::to_string(s[base]);
        }
        s[derived] = value;
    } else if (s[derived] != kUnknown) {
        if (s[derived] < plus || (s[derived] - plus) % factor != 0) {
            return "an extent that must be " + relation + " is " + std::to_string(s[derived]);
        }
        s[base] = (s[derived] - plus) / factor;
    }
    return {};
}

}  // namespace

const Op kRouting{
    "ShuntyardMoeRouting",
    {{"logits", ElementType::kFloat32, {Extent::kTokens, Extent::kExperts}}},
    {{"scores", ElementType::kFloat32, {Extent::kRows}},
     {"expert_offsets", ElementType::kInt32, {Extent::kOffsets}},
     {"permutation", ElementType::kInt32, {Extent::kRows}}},
    routing_workspace,
    launch_routing,
};

const Op kExperts{
    "ShuntyardMoeExperts",
    {{"x", ElementType::kActivation, {Extent::kTokens, Extent::kHidden}},
     {"scores", ElementType::kFloat32, {Extent::kRows}},
     {"expert_offsets", ElementType::kInt32, {Extent::kOffsets}},
     {"permutation", ElementType::kInt32, {Extent::kRows}},
     {"gate_up", ElementType::kWeight, {Extent::kExperts, Extent::kHidden, Extent::kTwiceIntermediate}},
     {"down", ElementType::kWeight, {Extent::kExperts, Extent::kIntermediate, Extent::kHidden}}},
    {{"rows", ElementType::kActivation, {Extent::kRows, Extent::kHidden}}},
    experts_workspace,
    launch_experts,
};

const Op kScatterAdd{
    "ShuntyardMoeScatterAdd",
    {{"base", ElementType::kActivation, {Extent::kTokens, Extent::kHidden}},
     {"rows", ElementType::kActivation, {Extent::kRows, Extent::kHidden}},
     {"permutation", ElementType::kInt32, {Extent::kRows}}},
    {{"out", ElementType::kActivation, {Extent::kTokens, Extent::kHidden}}},
    scatter_add_workspace,
    launch_scatter_add,
};

Sizes::Sizes(int64_t top_k_) : top_k(top_k_) {
    for (int64_t& value : values) {
        value = kUnknown;
    }
}

const Tensor& Op::tensor(int32_t index) const {
    const int32_t in = static_cast<int32_t>(inputs.size());
    return index < in ? inputs[index] : outputs[index - in];
}

int type_code(DataType type) {
    switch (type) {
        case DataType::kFLOAT: return SHUNTYARD_FP32;
        case DataType::kHALF: return SHUNTYARD_FP16;
        case DataType::kBF16: return SHUNTYARD_BF16;
        default: return -1;
    }
}

std::string bind(const Tensor& tensor, const nvinfer1::Dims& dims, Sizes& sizes) {
    if (dims.nbDims != static_cast<int32_t>(tensor.shape.size())) {
        return std::string(tensor.name) + " has rank " + std::to_string(dims.nbDims) + ", must have rank " +
               std::to_string(tensor.shape.size());
    }
    for (int32_t i = 0; i < dims.nbDims; ++i) {
        if (dims.d[i] < 0) {
            continue;
        }
        const Extent extent = tensor.shape[i];
        if (sizes[extent] != kUnknown && sizes[extent] != dims.d[i]) {
            return std::string(tensor.name) + " has extent " + std::to_string(dims.d[i]) + " in dimension " +
                   std::to_string(i) + ", but another tensor says that " + describe(extent) + " is " +
                   std::to_string(sizes[extent]);
        }
        sizes[extent] = dims.d[i];
    }
    return {};
}

std::string settle(Sizes& s) {
    std::string wrong = relate(s, Extent::kTokens, Extent::kRows, s.top_k, 0);
    if (wrong.empty()) {
        wrong = relate(s, Extent::kExperts, Extent::kOffsets, 1, 1);
    }
    if (wrong.empty()) {
        wrong = relate(s, Extent::kIntermediate, Extent::kTwiceIntermediate, 2, 0);
    }
    if (!wrong.empty()) {
        return wrong;
    }
    if (s[Extent::kExperts] != kUnknown && s.top_k > s[Extent::kExperts]) {
        return "top_k is " + std::to_string(s.top_k) + ", but there are only " + std::to_string(s[Extent::kExperts]) +
               " experts";
    }
    if (s[Extent::kRows] > INT_MAX) {
        return std::to_string(s[Extent::kRows]) + " rows (T*K) are more than 32-bit row numbers can count";
    }
    return {};
}

}  // namespace shuntyard
