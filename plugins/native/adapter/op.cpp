#include "adapter/op.h"

#include <climits>

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
        case Extent::kHiddenWords: return "H/8";
        case Extent::kIntermediateWords: return "F/8";
    }
    return "?";
}

size_t routing_workspace(const Sizes& s, DataType, int) {
    return shuntyard_moe_routing_workspace(s[Extent::kTokens], s[Extent::kExperts], s.top_k);
}

int launch_routing(const Sizes& s, DataType, const shuntyard_expert_weights&, int, const void* const* in,
                   void* const* out, void* workspace, size_t workspace_size, void* stream) {
    return shuntyard_moe_routing(static_cast<const float*>(in[0]), static_cast<float*>(out[0]),
                                 static_cast<int32_t*>(out[1]), static_cast<int32_t*>(out[2]), s[Extent::kTokens],
                                 s[Extent::kExperts], s.top_k, workspace, workspace_size, stream);
}

size_t experts_workspace(const Sizes& s, DataType x_type, int activations) {
    return shuntyard_moe_experts_workspace(type_code(x_type), activations, s[Extent::kTokens], s.top_k,
                                           s[Extent::kHidden], s[Extent::kIntermediate]);
}

int launch_experts(const Sizes& s, DataType x_type, const shuntyard_expert_weights& weights, int tactic,
                   const void* const* in, void* const* out, void* workspace, size_t workspace_size, void* stream) {
    return shuntyard_moe_experts(type_code(x_type), &weights, in[0], static_cast<const float*>(in[1]),
                                 static_cast<const int32_t*>(in[2]), static_cast<const int32_t*>(in[3]), out[0],
                                 s[Extent::kTokens], s[Extent::kExperts], s.top_k, s[Extent::kHidden],
                                 s[Extent::kIntermediate], tactic, workspace, workspace_size, stream);
}

size_t scatter_add_workspace(const Sizes& s, DataType, int) {
    return shuntyard_moe_scatter_add_workspace(s[Extent::kTokens], s.top_k);
}

int launch_scatter_add(const Sizes& s, DataType x_type, const shuntyard_expert_weights&, int, const void* const* in,
                       void* const* out, void* workspace, size_t workspace_size, void* stream) {
    return shuntyard_moe_scatter_add(type_code(x_type), in[0], in[1], static_cast<const int32_t*>(in[2]), out[0],
                                     s[Extent::kTokens], s.top_k, s[Extent::kHidden], workspace, workspace_size,
                                     stream);
}

std::string relation(const Sizes& s, Extent derived) {
    return std::string("an extent that must be ") + describe(derived) + " (K is " + std::to_string(s.top_k) + ") is " +
           std::to_string(s[derived]);
}

// Sets `derived` from `base`, or `base` from `derived`, or checks one by the other. Makes no string while all is well:
// it runs in enqueue, which must not allocate.
std::string relate(Sizes& s, Extent base, Extent derived, int64_t factor, int64_t plus) {
    if (s[base] != kUnknown) {
        const int64_t value = s[base] * factor + plus;
        if (s[derived] != kUnknown && s[derived] != value) {
            return relation(s, derived) + ", but " + describe(base) + " is " + std::to_string(s[base]);
        }
        s[derived] = value;
    } else if (s[derived] != kUnknown) {
        if (s[derived] < plus || (s[derived] - plus) % factor != 0) {
            return relation(s, derived);
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
    {"top_k"},
    false,
    routing_workspace,
    launch_routing,
};

const Op kExperts{
    "ShuntyardMoeExperts",
    {{"x", ElementType::kActivation, {Extent::kTokens, Extent::kHidden}},
     {"scores", ElementType::kFloat32, {Extent::kRows}},
     {"expert_offsets", ElementType::kInt32, {Extent::kOffsets}},
     {"permutation", ElementType::kInt32, {Extent::kRows}}},
    {{"rows", ElementType::kActivation, {Extent::kRows, Extent::kHidden}}},
    {"top_k", "experts", "layout", "group_size", "activations", "module"},
    true,
    experts_workspace,
    launch_experts,
};

const Op kScatterAdd{
    "ShuntyardMoeScatterAdd",
    {{"base", ElementType::kActivation, {Extent::kTokens, Extent::kHidden}},
     {"rows", ElementType::kActivation, {Extent::kRows, Extent::kHidden}},
     {"permutation", ElementType::kInt32, {Extent::kRows}}},
    {{"out", ElementType::kActivation, {Extent::kTokens, Extent::kHidden}}},
    {"top_k"},
    false,
    scatter_add_workspace,
    launch_scatter_add,
};

const Layout* find_layout(const std::string& name) {
    static const Layout layouts[] = {
        {"fused",
         SHUNTYARD_FUSED,
         false,
         {{"gate_up", ElementType::kWeight, {Extent::kExperts, Extent::kHidden, Extent::kTwiceIntermediate}},
          {"down", ElementType::kWeight, {Extent::kExperts, Extent::kIntermediate, Extent::kHidden}}},
         {}},
        {"split",
         SHUNTYARD_SPLIT,
         true,
         {{"gate_up", ElementType::kWeight, {Extent::kHidden, Extent::kTwiceIntermediate}},
          {"down", ElementType::kWeight, {Extent::kIntermediate, Extent::kHidden}}},
         {}},
        {"linear",
         SHUNTYARD_LINEAR,
         true,
         {{"gate", ElementType::kWeight, {Extent::kIntermediate, Extent::kHidden}},
          {"up", ElementType::kWeight, {Extent::kIntermediate, Extent::kHidden}},
          {"down", ElementType::kWeight, {Extent::kHidden, Extent::kIntermediate}}},
         {{"gate", ElementType::kWeight, {Extent::kIntermediate, Extent::kHiddenWords}},
          {"up", ElementType::kWeight, {Extent::kIntermediate, Extent::kHiddenWords}},
          {"down", ElementType::kWeight, {Extent::kHidden, Extent::kIntermediateWords}}}},
    };
    for (const Layout& layout : layouts) {
        if (name == layout.name) {
            return &layout;
        }
    }
    return nullptr;
}

const Activations* find_activations(const std::string& name) {
    static const Activations all[] = {
        {"none", SHUNTYARD_AS_THEY_ARE},
        {"static", SHUNTYARD_STATIC},
        {"dynamic", SHUNTYARD_DYNAMIC},
    };
    for (const Activations& activations : all) {
        if (name == activations.name) {
            return &activations;
        }
    }
    return nullptr;
}

Sizes::Sizes(int64_t top_k_) : top_k(top_k_) {
    for (int64_t& value : values) {
        value = kUnknown;
    }
}

int type_code(DataType type) {
    switch (type) {
        case DataType::kFLOAT: return SHUNTYARD_FP32;
        case DataType::kHALF: return SHUNTYARD_FP16;
        case DataType::kBF16: return SHUNTYARD_BF16;
        default: return -1;
    }
}

int weight_code(DataType type) {
    switch (type) {
        case DataType::kFP8: return SHUNTYARD_E4M3;
        case DataType::kINT32: return SHUNTYARD_INT4;
        default: return type_code(type);
    }
}

std::string bind(const Tensor& tensor, const nvinfer1::Dims& dims, Sizes& sizes) {
    if (dims.nbDims != static_cast<int32_t>(tensor.shape.size())) {
        return "has rank " + std::to_string(dims.nbDims) + ", must have rank " + std::to_string(tensor.shape.size());
    }
    for (int32_t i = 0; i < dims.nbDims; ++i) {
        if (dims.d[i] < 0) {
            continue;
        }
        const Extent extent = tensor.shape[i];
        if (sizes[extent] != kUnknown && sizes[extent] != dims.d[i]) {
            return "has extent " + std::to_string(dims.d[i]) + " in dimension " + std::to_string(i) +
                   ", but another tensor or an attribute says that " + describe(extent) + " is " +
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
    if (wrong.empty() && s[Extent::kHiddenWords] != kUnknown) {
        wrong = relate(s, Extent::kHiddenWords, Extent::kHidden, 8, 0);
    }
    if (wrong.empty() && s[Extent::kIntermediateWords] != kUnknown) {
        wrong = relate(s, Extent::kIntermediateWords, Extent::kIntermediate, 8, 0);
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
