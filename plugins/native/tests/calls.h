// Creating plugins and getting at their interfaces.
#pragma once

#include <cstring>
#include <string>
#include <vector>

#include "check.h"

constexpr nvinfer1::DataType kF32 = nvinfer1::DataType::kFLOAT;
constexpr nvinfer1::DataType kI32 = nvinfer1::DataType::kINT32;

inline std::vector<nvinfer1::IPluginCreatorV3One*> creators;
inline void (*set_logger_finder)(void*);

inline nvinfer1::IPluginCreatorV3One* creator_of(const std::string& name) {
    for (nvinfer1::IPluginCreatorV3One* creator : creators) {
        if (name == creator->getPluginName()) {
            return creator;
        }
    }
    std::printf("no creator of %s\n", name.c_str());
    std::exit(1);
}

inline nvinfer1::IPluginV3* create(const std::string& name, const std::vector<nvinfer1::PluginField>& fields,
                                   nvinfer1::TensorRTPhase phase = nvinfer1::TensorRTPhase::kBUILD) {
    const nvinfer1::PluginFieldCollection collection{static_cast<int32_t>(fields.size()), fields.data()};
    return creator_of(name)->createPlugin("a node", &collection, phase);
}

inline nvinfer1::IPluginV3* create(const std::string& name, int64_t top_k) {
    return create(name, {{"top_k", &top_k, nvinfer1::PluginFieldType::kINT64, 1}});
}

inline nvinfer1::IPluginV3OneCore* core_of(nvinfer1::IPluginV3* plugin) {
    return static_cast<nvinfer1::IPluginV3OneCore*>(
        plugin->getCapabilityInterface(nvinfer1::PluginCapabilityType::kCORE));
}
inline nvinfer1::IPluginV3OneBuild* build_of(nvinfer1::IPluginV3* plugin) {
    return static_cast<nvinfer1::IPluginV3OneBuild*>(
        plugin->getCapabilityInterface(nvinfer1::PluginCapabilityType::kBUILD));
}
inline nvinfer1::IPluginV3OneRuntime* runtime_of(nvinfer1::IPluginV3* plugin) {
    return static_cast<nvinfer1::IPluginV3OneRuntime*>(
        plugin->getCapabilityInterface(nvinfer1::PluginCapabilityType::kRUNTIME));
}

inline nvinfer1::IPluginV3* create_experts(int64_t top_k, int64_t experts, const char* layout, int64_t group_size,
                                           const char* activations = "none", const char* module = "") {
    using Type = nvinfer1::PluginFieldType;
    const auto text = [](const char* name, const char* value) {
        return nvinfer1::PluginField{name, value, Type::kCHAR, static_cast<int32_t>(std::strlen(value))};
    };
    return create("ShuntyardMoeExperts", {{"top_k", &top_k, Type::kINT64, 1},
                                          {"experts", &experts, Type::kINT64, 1},
                                          text("layout", layout),
                                          {"group_size", &group_size, Type::kINT64, 1},
                                          text("activations", activations),
                                          text("module", module)});
}
