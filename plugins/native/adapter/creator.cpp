// From a plugin's fields, an ONNX node's attributes or an engine's stored ones, to the plugin.
#include <climits>
#include <cstring>
#include <exception>
#include <optional>

#include "adapter/log.h"
#include "adapter/plugin.h"

namespace shuntyard {
namespace {

using namespace nvinfer1;

// The one integer of a field, whichever width it came in: an ONNX INT is 64 bits, and the parser may narrow it.
std::optional<int64_t> integer_of(const PluginField& field) {
    if (field.data == nullptr || field.length != 1) {
        return std::nullopt;
    }
    if (field.type == PluginFieldType::kINT32) {
        int32_t value;
        std::memcpy(&value, field.data, sizeof(value));
        return value;
    }
    if (field.type == PluginFieldType::kINT64) {
        int64_t value;
        std::memcpy(&value, field.data, sizeof(value));
        return value;
    }
    return std::nullopt;
}

// Takes the integer `name` from the fields; returns what is wrong, or an empty string.
std::string take_integer(const PluginFieldCollection* fields, const char* name, std::optional<int64_t>& value) {
    for (int32_t i = 0; fields != nullptr && i < fields->nbFields; ++i) {
        const PluginField& field = fields->fields[i];
        if (field.name == nullptr || std::strcmp(field.name, name) != 0) {
            continue;
        }
        value = integer_of(field);
        return value ? "" : std::string("attribute ") + name + " must be one integer";
    }
    return std::string("attribute ") + name + " is missing";
}

std::string fields_problem(const PluginFieldCollection* fields, TensorRTPhase phase, std::optional<int64_t>& top_k) {
    if (phase == TensorRTPhase::kRUNTIME) {
        std::optional<int64_t> version;
        const std::string wrong = take_integer(fields, "format_version", version);
        if (!wrong.empty()) {
            return wrong + "; the engine was not built with this plugin library";
        }
        if (*version != kFormatVersion) {
            return "the engine holds format " + std::to_string(*version) +
                   " of this plugin, this library reads format " + std::to_string(kFormatVersion) +
                   ": rebuild the engine, or use the shuntyard it was built with";
        }
    }
    const std::string wrong = take_integer(fields, "top_k", top_k);
    if (!wrong.empty()) {
        return wrong;
    }
    if (*top_k < 1 || *top_k > INT_MAX) {
        return "attribute top_k is " + std::to_string(*top_k) + ", must be at least 1";
    }
    return {};
}

}  // namespace

Creator::Creator(const Op& op) : op_(op), field_{"top_k", nullptr, PluginFieldType::kINT32, 1}, fields_{1, &field_} {}

IPluginV3* Creator::createPlugin(const char* name, PluginFieldCollection const* fields, TensorRTPhase phase) noexcept {
    try {
        std::optional<int64_t> top_k;
        const std::string wrong = fields_problem(fields, phase, top_k);
        if (wrong.empty()) {
            return new Plugin(op_, static_cast<int32_t>(*top_k));
        }
        log_error(std::string(op_.name) + " '" + (name == nullptr ? "" : name) + "': " + wrong);
    } catch (const std::exception& error) {
        log_error(std::string(op_.name) + ": cannot be created: " + error.what());
    }
    return nullptr;
}

}  // namespace shuntyard
