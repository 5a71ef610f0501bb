#include "adapter/plugin.h"

#include <exception>

#include "adapter/log.h"
#include "shuntyard_plugins.h"

namespace shuntyard {
namespace {

using namespace nvinfer1;

constexpr int32_t kMaxTensors = 7;

bool is_float(DataType type) { return type_code(type) >= 0; }

const char* name_of(DataType type) {
    switch (type) {
        case DataType::kFLOAT: return "fp32";
        case DataType::kHALF: return "fp16";
        case DataType::kINT8: return "int8";
        case DataType::kINT32: return "int32";
        case DataType::kBOOL: return "bool";
        case DataType::kUINT8: return "uint8";
        case DataType::kFP8: return "fp8";
        case DataType::kBF16: return "bf16";
        case DataType::kINT64: return "int64";
        case DataType::kINT4: return "int4";
    }
    return "a type unknown to this library";
}

const Dims& dims_of(const PluginTensorDesc& tensor) { return tensor.dims; }
const Dims& dims_of(const DynamicPluginTensorDesc& tensor) { return tensor.desc.dims; }

// The extents that the tensors agree on; `wrong` is what they do not agree on, or stays empty.
template <typename Desc>
Sizes sizes_of(const Op& op, int32_t top_k, const Desc* in, const Desc* out, std::string& wrong) {
    Sizes sizes(top_k);
    for (size_t i = 0; wrong.empty() && i < op.inputs.size(); ++i) {
        wrong = bind(op.inputs[i], dims_of(in[i]), sizes);
    }
    for (size_t i = 0; wrong.empty() && i < op.outputs.size(); ++i) {
        wrong = bind(op.outputs[i], dims_of(out[i]), sizes);
    }
    if (wrong.empty()) {
        wrong = settle(sizes);
    }
    return sizes;
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

}  // namespace

Plugin::Plugin(const Op& op, int32_t top_k)
    : op_(op),
      top_k_(top_k),
      stored_fields_{{"format_version", &format_version_, PluginFieldType::kINT32, 1},
                     {"top_k", &top_k_, PluginFieldType::kINT32, 1}},
      stored_{2, stored_fields_} {}

int32_t Plugin::refuse(const std::string& what) const noexcept {
    log_error(std::string(op_.name) + ": " + what);
    return -1;
}

std::string Plugin::count_problem(int32_t nb_inputs, int32_t nb_outputs) const {
    const int32_t in = static_cast<int32_t>(op_.inputs.size());
    const int32_t out = static_cast<int32_t>(op_.outputs.size());
    if (nb_inputs == in && nb_outputs == out) {
        return {};
    }
    return "takes " + std::to_string(in) + " inputs and gives " + std::to_string(out) + ", not " +
           std::to_string(nb_inputs) + " and " + std::to_string(nb_outputs);
}

std::string Plugin::type_problem(int32_t index, const DataType* types) const {
    const Tensor& tensor = op_.tensor(index);
    const std::string has = std::string(tensor.name) + " is " + name_of(types[index]) + ", must be ";
    switch (tensor.type) {
        case ElementType::kFloat32: return types[index] == DataType::kFLOAT ? "" : has + "fp32";
        case ElementType::kInt32: return types[index] == DataType::kINT32 ? "" : has + "int32";
        case ElementType::kActivation:
        case ElementType::kWeight: break;
    }
    for (int32_t earlier = 0; earlier < index; ++earlier) {
        if (op_.tensor(earlier).type == tensor.type) {
            return types[index] == types[earlier]
                       ? ""
                       : has + name_of(types[earlier]) + ", as " + op_.tensor(earlier).name + " is";
        }
    }
    return is_float(types[index]) ? "" : has + "fp32, fp16 or bf16";
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

IPluginV3* Plugin::clone() noexcept {
    try {
        return new Plugin(op_, top_k_);
    } catch (const std::exception& error) {
        refuse(std::string("cannot be cloned: ") + error.what());
        return nullptr;
    }
}

IPluginV3* Plugin::attachToContext(IPluginResourceContext*) noexcept { return clone(); }

int32_t Plugin::configurePlugin(DynamicPluginTensorDesc const* in, int32_t nb_inputs,
                                DynamicPluginTensorDesc const* out, int32_t nb_outputs) noexcept {
    std::string wrong = count_problem(nb_inputs, nb_outputs);
    if (wrong.empty()) {
        sizes_of(op_, top_k_, in, out, wrong);
    }
    return wrong.empty() ? 0 : refuse(wrong);
}

int32_t Plugin::getOutputDataTypes(DataType* output_types, int32_t nb_outputs, DataType const* input_types,
                                   int32_t nb_inputs) const noexcept {
    const std::string wrong_count = count_problem(nb_inputs, nb_outputs);
    if (!wrong_count.empty()) {
        return refuse(wrong_count);
    }
    for (int32_t i = 0; i < nb_inputs; ++i) {
        const std::string wrong = type_problem(i, input_types);
        if (!wrong.empty()) {
            return refuse(wrong);
        }
    }
    for (int32_t i = 0; i < nb_outputs; ++i) {
        switch (op_.outputs[i].type) {
            case ElementType::kFloat32: output_types[i] = DataType::kFLOAT; break;
            case ElementType::kInt32: output_types[i] = DataType::kINT32; break;
            case ElementType::kActivation:
            case ElementType::kWeight: output_types[i] = input_types[0]; break;  // activations stand first
        }
    }
    return 0;
}

int32_t Plugin::getOutputShapes(DimsExprs const* inputs, int32_t nb_inputs, DimsExprs const*, int32_t,
                                DimsExprs* outputs, int32_t nb_outputs, IExprBuilder& builder) noexcept {
    std::string wrong = count_problem(nb_inputs, nb_outputs);
    Sizes sizes(top_k_);
    for (int32_t i = 0; wrong.empty() && i < nb_inputs; ++i) {
        Dims known{inputs[i].nbDims, {}};
        for (int32_t d = 0; d < known.nbDims; ++d) {
            known.d[d] = inputs[i].d[d]->isConstant() ? inputs[i].d[d]->getConstantValue() : kUnknown;
        }
        wrong = bind(op_.inputs[i], known, sizes);
    }
    if (wrong.empty()) {
        wrong = settle(sizes);
    }
    if (!wrong.empty()) {
        return refuse(wrong);
    }
    for (int32_t i = 0; i < nb_outputs; ++i) {
        const std::vector<Extent>& shape = op_.outputs[i].shape;
        outputs[i].nbDims = static_cast<int32_t>(shape.size());
        for (size_t d = 0; d < shape.size(); ++d) {
            outputs[i].d[d] = expression_of(shape[d], op_, top_k_, inputs, builder);
        }
    }
    return 0;
}

bool Plugin::supportsFormatCombination(int32_t position, DynamicPluginTensorDesc const* in_out, int32_t nb_inputs,
                                       int32_t nb_outputs) noexcept {
    const std::string wrong = count_problem(nb_inputs, nb_outputs);
    if (!wrong.empty()) {
        refuse(wrong);
        return false;
    }
    DataType types[kMaxTensors];
    for (int32_t i = 0; i <= position; ++i) {
        types[i] = in_out[i].desc.type;
    }
    return in_out[position].desc.format == TensorFormat::kLINEAR && type_problem(position, types).empty();
}

size_t Plugin::getWorkspaceSize(DynamicPluginTensorDesc const* in, int32_t nb_inputs,
                                DynamicPluginTensorDesc const* out, int32_t nb_outputs) const noexcept {
    // The largest of each extent alone: the tensors' maxima need not belong to one call.
    Sizes largest(top_k_);
    DataType types[kMaxTensors];
    for (int32_t i = 0; i < nb_inputs + nb_outputs; ++i) {
        const DynamicPluginTensorDesc& tensor = i < nb_inputs ? in[i] : out[i - nb_inputs];
        types[i] = tensor.desc.type;
        const std::vector<Extent>& shape = op_.tensor(i).shape;
        for (size_t d = 0; d < shape.size(); ++d) {
            largest[shape[d]] = tensor.max.d[d] > largest[shape[d]] ? tensor.max.d[d] : largest[shape[d]];
        }
    }
    return op_.workspace(largest, types);
}

int32_t Plugin::onShapeChange(PluginTensorDesc const* in, int32_t nb_inputs, PluginTensorDesc const* out,
                              int32_t nb_outputs) noexcept {
    std::string wrong = count_problem(nb_inputs, nb_outputs);
    if (wrong.empty()) {
        sizes_of(op_, top_k_, in, out, wrong);
    }
    return wrong.empty() ? 0 : refuse(wrong);
}

int32_t Plugin::enqueue(PluginTensorDesc const* input_desc, PluginTensorDesc const* output_desc,
                        void const* const* inputs, void* const* outputs, void* workspace,
                        cudaStream_t stream) noexcept {
    std::string wrong;
    const Sizes sizes = sizes_of(op_, top_k_, input_desc, output_desc, wrong);
    if (!wrong.empty()) {
        return refuse(wrong);
    }
    DataType types[kMaxTensors];
    for (size_t i = 0; i < op_.inputs.size(); ++i) {
        types[i] = input_desc[i].type;
    }
    const int status =
        op_.launch(sizes, types, inputs, outputs, workspace, op_.workspace(sizes, types), static_cast<void*>(stream));
    return status == SHUNTYARD_OK ? 0 : refuse(std::string("does not run: ") + shuntyard_status_text(status));
}

}  // namespace shuntyard
