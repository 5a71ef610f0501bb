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

// The field called so, or null.
const PluginField* find_field(const PluginFieldCollection* fields, const char* name) {
    for (int32_t i = 0; fields != nullptr && i < fields->nbFields; ++i) {
        const PluginField& field = fields->fields[i];
        if (field.name != nullptr && std::strcmp(field.name, name) == 0) {
            return &field;
        }
    }
    return nullptr;
}

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

// The text of a field, up to its end or its first NUL: TensorRT's ONNX parser counts one in.
std::optional<std::string> text_of(const PluginField& field) {
    if (field.data == nullptr || field.length < 0 || field.type != PluginFieldType::kCHAR) {
        return std::nullopt;
    }
    const char* text = static_cast<const char*>(field.data);
    return std::string(text, strnlen(text, static_cast<size_t>(field.length)));
}

struct Range {
    int64_t least, most;
};

// Takes the integer `name` from the fields; returns what is wrong, or an empty string.
std::string take_integer(const PluginFieldCollection* fields, const char* name, Range range, int32_t& value) {
    const std::string attribute = std::string("attribute ") + name;
    const PluginField* field = find_field(fields, name);
    if (field == nullptr) {
        return attribute + " is missing";
    }
    const std::optional<int64_t> found = integer_of(*field);
    if (!found) {
        return attribute + " must be one integer";
    }
    if (*found < range.least || *found > range.most) {
        const std::string most = range.most == INT_MAX ? "" : ", and at most " + std::to_string(range.most);
        return attribute + " is " + std::to_string(*found) + ", must be at least " + std::to_string(range.least) + most;
    }
    value = static_cast<int32_t>(*found);
    return {};
}

// Takes what the text `name` stands for from the fields; returns what is wrong, or an empty string.
template <typename Named>
std::string take_named(const PluginFieldCollection* fields, const char* name, const Named* (*find)(const std::string&),
                       const char* choices, const Named*& found) {
    const std::string attribute = std::string("attribute ") + name;
    const PluginField* field = find_field(fields, name);
    if (field == nullptr) {
        return attribute + " is missing";
    }
    const std::optional<std::string> text = text_of(*field);
    if (!text) {
        return attribute + " must be a string";
    }
    found = find(*text);
    return found != nullptr ? "" : attribute + " is '" + *text + "', must be " + choices;
}

std::string take_attributes(const Op& op, const PluginFieldCollection* fields, Attributes& attributes) {
    std::string wrong = take_integer(fields, "top_k", {1, INT_MAX}, attributes.top_k);
    if (!op.has_weights) {
        return wrong;
    }
    if (wrong.empty()) {
        wrong = take_integer(fields, "experts", {1, SHUNTYARD_MAX_EXPERTS}, attributes.experts);
    }
    if (wrong.empty()) {
        wrong = take_named(fields, "layout", find_layout, "fused, split or linear", attributes.layout);
    }
    if (wrong.empty()) {
        wrong = take_integer(fields, "group_size", {0, INT_MAX}, attributes.group_size);
    }
    if (wrong.empty() && attributes.group_size > 0 && attributes.layout->packed.empty()) {
        wrong = std::string("there is a group_size, but INT4 weights cannot come in layout ") + attributes.layout->name;
    }
    if (wrong.empty()) {
        wrong = take_named(fields, "activations", find_activations, "none, static or dynamic", attributes.activations);
    }
    if (const PluginField* module = find_field(fields, "module"); wrong.empty() && module != nullptr) {
        const std::optional<std::string> text = text_of(*module);
        attributes.module = text.value_or("");
        wrong = text ? "" : "attribute module must be a string";
    }
    if (wrong.empty() && attributes.group_size > 0 && attributes.activations->code != SHUNTYARD_AS_THEY_ARE) {
        wrong = std::string("there is a group_size, but only FP8 weights take activations that are ") +
                attributes.activations->name;
    }
    return wrong;
}

std::string format_problem(const PluginFieldCollection* fields) {
    int32_t version = 0;
    const std::string wrong = take_integer(fields, "format_version", {0, INT_MAX}, version);
    if (!wrong.empty()) {
        return wrong + "; the engine was not built with this plugin library";
    }
    if (version != kFormatVersion) {
        return "the engine holds format " + std::to_string(version) + " of this plugin, this library reads format " +
               std::to_string(kFormatVersion) + ": rebuild the engine, or use the shuntyard it was built with";
    }
    return {};
}

}  // namespace

Creator::Creator(const Op& op) : op_(op), fields_{static_cast<int32_t>(op.attributes.size()), fields_named_} {
    for (size_t i = 0; i < op.attributes.size(); ++i) {
        fields_named_[i] = field_of(op.attributes[i], nullptr);
    }
}

IPluginV3* Creator::createPlugin(const char* name, PluginFieldCollection const* fields, TensorRTPhase phase) noexcept {
    try {
        Attributes attributes;
        std::string wrong = phase == TensorRTPhase::kRUNTIME ? format_problem(fields) : "";
        if (wrong.empty()) {
            wrong = take_attributes(op_, fields, attributes);
        }
        if (wrong.empty()) {
            return new Plugin(op_, attributes);
        }
        log_error(std::string(op_.name) + " '" + (name == nullptr ? "" : name) + "': " + wrong);
    } catch (const std::exception& error) {
        log_error(std::string(op_.name) + ": cannot be created: " + error.what());
    }
    return nullptr;
}

}  // namespace shuntyard
