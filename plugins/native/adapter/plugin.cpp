#include "adapter/plugin.h"

#include <algorithm>
#include <cstring>
#include <exception>

#include "adapter/log.h"
#include "shuntyard_plugins.h"

namespace shuntyard {
namespace {

using namespace nvinfer1;

const Dims& dims_of(const PluginTensorDesc& tensor) { return tensor.dims; }
const Dims& dims_of(const DynamicPluginTensorDesc& tensor) { return tensor.desc.dims; }

Dims dims_of(const DimsExprs& expressions) {
    Dims known{expressions.nbDims, {}};
    for (int32_t d = 0; d < known.nbDims; ++d) {
        known.d[d] = expressions.d[d]->isConstant() ? expressions.d[d]->getConstantValue() : kUnknown;
    }
    return known;
}

int64_t elements_of(const Dims& dims) {
    int64_t elements = 1;
    for (int32_t d = 0; d < dims.nbDims; ++d) {
        if (dims.d[d] < 0) {
            return kUnknown;
        }
        elements *= dims.d[d];
    }
    return elements;
}

// What the tensors agree on; `wrong` is what they do not agree on, or stays empty.
struct Agreed {
    Sizes sizes;
    int scaling;
    std::string wrong;
};

// What a scale belongs to, told by how many elements it has; sizes are settled, but may be unknown while building.
template <typename Desc>
void agree_on_scales(const Signature& signature, const Desc* in, int32_t nb_inputs, Agreed& agreed) {
    agreed.wrong = signature.group_problem(agreed.sizes);
    if (!signature.is_scaled(nb_inputs) || !agreed.wrong.empty()) {
        return;
    }
    const bool grouped = signature.attributes().group_size > 0;
    agreed.scaling = grouped ? SHUNTYARD_PER_GROUP : SHUNTYARD_PER_TENSOR;
    const int32_t end = signature.first_activation_scale();
    for (int32_t i = signature.first_scale(); !grouped && i < end; ++i) {
        if (elements_of(dims_of(in[i])) != 1) {
            agreed.scaling = SHUNTYARD_PER_CHANNEL;
        }
    }
    for (int32_t i = signature.first_scale(); i < end; ++i) {
        const int64_t has = elements_of(dims_of(in[i]));
        const int64_t many = signature.scale_elements(i, agreed.sizes);
        const int64_t must_have = agreed.scaling == SHUNTYARD_PER_TENSOR ? 1 : many;
        if (has != kUnknown && must_have != kUnknown && has != must_have) {
            agreed.wrong = signature.label(i, nb_inputs) + " has " + std::to_string(has) + " elements, must have " +
                           (grouped ? "" : "1 or ") + std::to_string(many) + (grouped ? "" : ", and all scales alike");
            return;
        }
    }
    for (int32_t i = end; i < nb_inputs; ++i) {
        const int64_t has = elements_of(dims_of(in[i]));
        if (has != kUnknown && has != 1) {
            agreed.wrong = signature.label(i, nb_inputs) + " has " + std::to_string(has) + " elements, must have 1";
            return;
        }
    }
}

template <typename Desc>
Agreed agree(const Signature& signature, const Desc* in, int32_t nb_inputs, const Desc* out) {
    Agreed agreed{signature.unbound(), SHUNTYARD_UNSCALED, {}};
    const int32_t outputs = out == nullptr ? 0 : static_cast<int32_t>(signature.op().outputs.size());
    for (int32_t i = 0; i < nb_inputs + outputs; ++i) {
        const Tensor& tensor = signature.tensor(i, nb_inputs);
        if (tensor.type == ElementType::kScale || tensor.type == ElementType::kActivationScale) {
            continue;
        }
        agreed.wrong = bind(tensor, dims_of(i < nb_inputs ? in[i] : out[i - nb_inputs]), agreed.sizes);
        if (!agreed.wrong.empty()) {
            agreed.wrong = signature.label(i, nb_inputs) + " " + agreed.wrong;
            return agreed;
        }
    }
    agreed.wrong = settle(agreed.sizes);
    if (agreed.wrong.empty()) {
        agree_on_scales(signature, in, nb_inputs, agreed);
    }
    return agreed;
}

// The expression of an output's extent: an input's, if one has it, or made from one that it follows from.
const IDimensionExpr* expression_of(Extent extent, const Op& op, int32_t top_k, const DimsExprs* inputs,
                                    IExprBuilder& builder) {
    for (size_t i = 0; i < op.inputs.size(); ++i) {
        for (size_t d = 0; d < op.inputs[i].shape.size(); ++d) {
            if (op.inputs[i].shape[d] == extent) {
                return inputs[i].d[d];
            }
        }
    }
    if (extent == Extent::kRows) {
        const IDimensionExpr* tokens = expression_of(Extent::kTokens, op, top_k, inputs, builder);
        return builder.operation(DimensionOperation::kPROD, *tokens, *builder.constant(top_k));
    }
    const IDimensionExpr* experts = expression_of(Extent::kExperts, op, top_k, inputs, builder);
    return builder.operation(DimensionOperation::kSUM, *experts, *builder.constant(1));
}

// What a plugin's time depends on, but for its tensors: which code it is, and its attributes.
std::string cache_id(const Op& op, const Attributes& attributes) {
    std::string id = std::string(op.name) + " " + shuntyard_build_info() + " top_k " + std::to_string(attributes.top_k);
    if (op.has_weights) {
        id += " experts " + std::to_string(attributes.experts) + " " + attributes.layout->name + " group_size " +
              std::to_string(attributes.group_size) + " activations " + attributes.activations->name;
    }
    return id;
}

}  // namespace

PluginField field_of(const char* name, const Attributes* attributes) {
    const bool is_layout = std::strcmp(name, "layout") == 0;
    const bool is_module = std::strcmp(name, "module") == 0;
    if (is_layout || is_module || std::strcmp(name, "activations") == 0) {
        const char* text = attributes == nullptr ? nullptr
                           : is_layout           ? attributes->layout->name
                           : is_module           ? attributes->module.c_str()
                                                 : attributes->activations->name;
        return {name, text, PluginFieldType::kCHAR, text == nullptr ? 1 : static_cast<int32_t>(std::strlen(text) + 1)};
    }
    const int32_t* value = nullptr;
    if (attributes != nullptr) {
        value = std::strcmp(name, "top_k") == 0     ? &attributes->top_k
                : std::strcmp(name, "experts") == 0 ? &attributes->experts
                                                    : &attributes->group_size;
    }
    return {name, value, PluginFieldType::kINT32, 1};
}

Plugin::Plugin(const Op& op, const Attributes& attributes)
    : signature_(op, attributes),
      timing_cache_id_(cache_id(op, attributes)),
      stored_fields_{{"format_version", &format_version_, PluginFieldType::kINT32, 1}},
      stored_{static_cast<int32_t>(1 + op.attributes.size()), stored_fields_} {
    for (size_t i = 0; i < op.attributes.size(); ++i) {
        stored_fields_[1 + i] = field_of(op.attributes[i], &signature_.attributes());
    }
}

int32_t Plugin::refuse(const std::string& what) const noexcept {
    log_error(std::string(signature_.op().name) + ": " + what);
    return -1;
}

IPluginCapability* Plugin::getCapabilityInterface(PluginCapabilityType type) noexcept {
    switch (type) {
        case PluginCapabilityType::kCORE: return static_cast<IPluginV3OneCore*>(this);
        case PluginCapabilityType::kBUILD: return static_cast<IPluginV3OneBuild*>(this);
        case PluginCapabilityType::kRUNTIME: return static_cast<IPluginV3OneRuntime*>(this);
    }
    refuse("asked for a capability that version 1 of the plugin interface does not have");
    return nullptr;
}

PluginFieldCollection const* Plugin::getFieldsToSerialize() noexcept {
    // Called for each layer of a plan, as it is written: the builder's log then says what becomes of whose rows.
    const Attributes& attributes = signature_.attributes();
    if (attributes.activations != nullptr && !attributes.module.empty()) {
        log(Severity::kInfo, std::string(signature_.op().name) + " in the plan: " + attributes.module +
                                 " with activations " + attributes.activations->name);
    }
    return &stored_;
}

IPluginV3* Plugin::clone() noexcept {
    try {
        Plugin* copy = new Plugin(signature_.op(), signature_.attributes());
        copy->tactic_ = tactic_;
        return copy;
    } catch (const std::exception& error) {
        refuse(std::string("cannot be cloned: ") + error.what());
        return nullptr;
    }
}

IPluginV3* Plugin::attachToContext(IPluginResourceContext*) noexcept { return clone(); }

int32_t Plugin::configurePlugin(DynamicPluginTensorDesc const* in, int32_t nb_inputs,
                                DynamicPluginTensorDesc const* out, int32_t nb_outputs) noexcept {
    std::string wrong = signature_.count_problem(nb_inputs, nb_outputs);
    if (wrong.empty()) {
        wrong = agree(signature_, in, nb_inputs, out).wrong;
    }
    return wrong.empty() ? 0 : refuse(wrong);
}

int32_t Plugin::getOutputDataTypes(DataType* output_types, int32_t nb_outputs, DataType const* input_types,
                                   int32_t nb_inputs) const noexcept {
    const std::string wrong_count = signature_.count_problem(nb_inputs, nb_outputs);
    if (!wrong_count.empty()) {
        return refuse(wrong_count);
    }
    for (int32_t i = 0; i < nb_inputs; ++i) {
        const DataType first = input_types[signature_.first_of_kind(i, nb_inputs)];
        const std::string wrong = signature_.type_problem(i, nb_inputs, input_types[i], first);
        if (!wrong.empty()) {
            return refuse(wrong);
        }
    }
    for (int32_t i = 0; i < nb_outputs; ++i) {
        switch (signature_.op().outputs[i].type) {
            case ElementType::kFloat32: output_types[i] = DataType::kFLOAT; break;
            case ElementType::kInt32: output_types[i] = DataType::kINT32; break;
            case ElementType::kActivation:
            case ElementType::kWeight:
            case ElementType::kScale:
            case ElementType::kActivationScale: output_types[i] = input_types[0]; break;  // activations stand first
        }
    }
    return 0;
}

int32_t Plugin::getOutputShapes(DimsExprs const* inputs, int32_t nb_inputs, DimsExprs const*, int32_t,
                                DimsExprs* outputs, int32_t nb_outputs, IExprBuilder& builder) noexcept {
    std::string wrong = signature_.count_problem(nb_inputs, nb_outputs);
    if (wrong.empty()) {
        wrong = agree<DimsExprs>(signature_, inputs, nb_inputs, nullptr).wrong;
    }
    if (!wrong.empty()) {
        return refuse(wrong);
    }
    const Op& op = signature_.op();
    for (int32_t i = 0; i < nb_outputs; ++i) {
        const std::vector<Extent>& shape = op.outputs[i].shape;
        outputs[i].nbDims = static_cast<int32_t>(shape.size());
        for (size_t d = 0; d < shape.size(); ++d) {
            outputs[i].d[d] = expression_of(shape[d], op, signature_.attributes().top_k, inputs, builder);
        }
    }
    return 0;
}

bool Plugin::supportsFormatCombination(int32_t position, DynamicPluginTensorDesc const* in_out, int32_t nb_inputs,
                                       int32_t nb_outputs) noexcept {
    const std::string wrong = signature_.count_problem(nb_inputs, nb_outputs);
    if (!wrong.empty()) {
        refuse(wrong);
        return false;
    }
    const PluginTensorDesc& tensor = in_out[position].desc;
    const DataType first = in_out[signature_.first_of_kind(position, nb_inputs)].desc.type;
    return tensor.format == TensorFormat::kLINEAR &&
           signature_.type_problem(position, nb_inputs, tensor.type, first).empty();
}

size_t Plugin::getWorkspaceSize(DynamicPluginTensorDesc const* in, int32_t nb_inputs,
                                DynamicPluginTensorDesc const* out, int32_t nb_outputs) const noexcept {
    // The largest of each extent alone: the tensors' maxima need not belong to one call.
    Sizes largest = signature_.unbound();
    for (int32_t i = 0; i < nb_inputs + nb_outputs; ++i) {
        const Dims& most = (i < nb_inputs ? in[i] : out[i - nb_inputs]).max;
        const std::vector<Extent>& shape = signature_.tensor(i, nb_inputs).shape;
        for (size_t d = 0; d < shape.size(); ++d) {
            largest[shape[d]] = std::max(largest[shape[d]], most.d[d]);
        }
    }
    return signature_.op().workspace(largest, in[0].desc.type, signature_.attributes().activations_code());
}

int32_t Plugin::setTactic(int32_t tactic) noexcept {
    if (tactic < SHUNTYARD_BY_SHAPE || tactic > SHUNTYARD_LAST_TACTIC) {
        return refuse("there is no tactic " + std::to_string(tactic));
    }
    tactic_ = tactic;
    return 0;
}

int32_t Plugin::onShapeChange(PluginTensorDesc const* in, int32_t nb_inputs, PluginTensorDesc const* out,
                              int32_t nb_outputs) noexcept {
    std::string wrong = signature_.count_problem(nb_inputs, nb_outputs);
    if (wrong.empty()) {
        wrong = agree(signature_, in, nb_inputs, out).wrong;
    }
    return wrong.empty() ? 0 : refuse(wrong);
}

int32_t Plugin::enqueue(PluginTensorDesc const* input_desc, PluginTensorDesc const* output_desc,
                        void const* const* inputs, void* const* outputs, void* workspace,
                        cudaStream_t stream) noexcept {
    const Op& op = signature_.op();
    const int32_t weight = signature_.first_weight(), scale = signature_.first_scale();
    const int32_t activation_scale = signature_.first_activation_scale();
    const int activations = signature_.attributes().activations_code();
    const int32_t nb_inputs = op.has_weights ? signature_.inputs_with(input_desc[weight].type) : weight;
    const Agreed agreed = agree(signature_, input_desc, nb_inputs, output_desc);
    if (!agreed.wrong.empty()) {
        return refuse(agreed.wrong);
    }
    shuntyard_expert_weights weights{};
    if (op.has_weights) {
        const bool scaled = signature_.is_scaled(nb_inputs);
        weights = {signature_.attributes().layout->code,
                   weight_code(input_desc[weight].type),
                   agreed.scaling,
                   scaled ? type_code(input_desc[scale].type) : 0,
                   signature_.attributes().group_size,
                   inputs + weight,
                   scaled ? inputs + scale : nullptr,
                   activations,
                   activation_scale < nb_inputs ? type_code(input_desc[activation_scale].type) : 0,
                   activation_scale < nb_inputs ? inputs + activation_scale : nullptr};
    }
    const DataType x_type = input_desc[0].type;
    const int status = op.launch(agreed.sizes, x_type, weights, tactic_, inputs, outputs, workspace,
                                 op.workspace(agreed.sizes, x_type, activations), static_cast<void*>(stream));
    return status == SHUNTYARD_OK ? 0 : refuse(std::string("does not run: ") + shuntyard_status_text(status));
}

}  // namespace shuntyard
