// Every form of the experts' weights, as the tensors of a call.
#pragma once

#include <string>
#include <vector>

#include "calls.h"

using nvinfer1::DataType;

constexpr DataType kFp8 = DataType::kFP8;
inline const DataType kFloats[] = {DataType::kFLOAT, DataType::kHALF, DataType::kBF16};

using Extents = std::vector<int64_t>;

// A form of weights of E = 2 experts, H = 16, F = 24; INT4 in groups of 8.
struct Form {
    const char* layout;
    int64_t group_size;
    DataType type;  // of the weights
    std::vector<Extents> weights, scales;
    const char* activations = "none";
    std::vector<Extents> activation_scales = {};
};

inline std::vector<Extents> twice(std::initializer_list<Extents> parts) {
    std::vector<Extents> all;
    for (const Extents& part : parts) {
        all.insert(all.end(), {part, part});
    }
    return all;
}

inline const std::vector<Form>& forms() {
    static const std::vector<Extents> fused = {{2, 16, 48}, {2, 24, 16}};
    static const std::vector<Extents> split = twice({{16, 48}, {24, 16}});
    static const std::vector<Extents> linear = twice({{24, 16}, {24, 16}, {16, 24}});
    static const std::vector<Extents> packed = twice({{24, 2}, {24, 2}, {16, 3}});
    static const std::vector<Form> all = {
        {"fused", 0, kF32, fused, {}},
        {"split", 0, kF32, split, {}},
        {"linear", 0, kF32, linear, {}},
        {"fused", 0, kFp8, fused, {{}, {}}},
        {"fused", 0, kFp8, fused, {{2, 1, 48}, {2, 1, 16}}},
        {"split", 0, kFp8, split, {{1}, {1}, {}, {1, 1}}},
        {"split", 0, kFp8, split, {{48}, {1, 48}, {16}, {1, 16}}},
        {"linear", 0, kFp8, linear, twice({{1}, {1}, {1}})},
        {"linear", 0, kFp8, linear, twice({{24, 1}, {24}, {16, 1}})},
        {"linear", 8, kI32, packed, twice({{24, 2}, {24, 2}, {16, 3}})},
        {"fused", 0, kFp8, fused, {{}, {}}, "static", {{1}, {}}},
        {"fused", 0, kFp8, fused, {{2, 1, 48}, {2, 1, 16}}, "dynamic"},
        {"split", 0, kFp8, split, {{48}, {1, 48}, {16}, {1, 16}}, "static", {{1}, {1, 1}, {}, {1}}},
        {"split", 0, kFp8, split, {{1}, {1}, {}, {1, 1}}, "dynamic"},
        {"linear", 0, kFp8, linear, twice({{24, 1}, {24}, {16, 1}}), "static", twice({{1}, {}, {1, 1}})},
        {"linear", 0, kFp8, linear, twice({{1}, {1}, {1}}), "dynamic"},
    };
    return all;
}

inline nvinfer1::IPluginV3* create(const Form& form, int64_t top_k) {
    return create_experts(top_k, 2, form.layout, form.group_size, form.activations);
}

// Types and extents of all tensors of a call with T = 3, K = 2.
struct Tensors {
    std::vector<DataType> types;
    std::vector<Extents> extents;
    int32_t inputs;

    explicit Tensors(const Form& form, DataType scale = kF32)
        : types{kF32, kF32, kI32, kI32}, extents{{3, 16}, {6}, {3}, {6}} {
        for (const auto* list : {&form.weights, &form.scales, &form.activation_scales}) {
            types.insert(types.end(), list->size(), list == &form.weights ? form.type : scale);
            extents.insert(extents.end(), list->begin(), list->end());
        }
        inputs = static_cast<int32_t>(types.size());
        types.push_back(kF32);
        extents.push_back({6, 16});
    }
};
