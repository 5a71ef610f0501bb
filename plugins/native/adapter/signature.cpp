#include "adapter/signature.h"

namespace shuntyard {
namespace {

using nvinfer1::DataType;

int32_t count_weights(const Op& op, const Attributes& attributes) {
    if (!op.has_weights) {
        return 0;
    }
    const int32_t parts = static_cast<int32_t>(attributes.layout->parts.size());
    return attributes.layout->each_expert ? parts * attributes.experts : parts;
}

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

const Tensor kScale{"scale", ElementType::kScale, {}};
const Tensor kActivationScale{"activation scale", ElementType::kActivationScale, {}};

}  // namespace

Signature::Signature(const Op& op, const Attributes& attributes)
    : op_(op), attributes_(attributes), weights_(count_weights(op, attributes)) {}

std::string Signature::count_problem(int32_t nb_inputs, int32_t nb_outputs) const {
    const int32_t out = static_cast<int32_t>(op_.outputs.size());
    const bool may_be_unscaled = attributes_.group_size == 0 && attributes_.activations_code() == SHUNTYARD_AS_THEY_ARE;
    const bool may_be_scaled = weights_ > 0;
    if (nb_outputs == out &&
        ((may_be_unscaled && nb_inputs == first_scale()) || (may_be_scaled && nb_inputs == inputs_with_scales()))) {
        return {};
    }
    std::string in = may_be_unscaled ? std::to_string(first_scale()) : "";
    if (may_be_scaled) {
        in += (may_be_unscaled ? ", or with scales " : "") + std::to_string(inputs_with_scales());
    }
    return "takes " + in + " inputs and gives " + std::to_string(out) + ", not " + std::to_string(nb_inputs) + " and " +
           std::to_string(nb_outputs);
}

int32_t Signature::inputs_with(DataType weight) const {
    return is_float(weight) ? first_scale() : inputs_with_scales();
}

int32_t Signature::inputs_with_scales() const {
    return first_activation_scale() + (has_activation_scales() ? weights_ : 0);
}

size_t Signature::part_of(int32_t index) const {
    const int32_t place = (index - first_weight()) % weights_;
    return attributes_.layout->each_expert ? place / attributes_.experts : place;
}

const Tensor& Signature::tensor(int32_t index, int32_t nb_inputs) const {
    if (index >= nb_inputs) {
        return op_.outputs[index - nb_inputs];
    }
    if (index < first_weight()) {
        return op_.inputs[index];
    }
    if (index < first_scale()) {
        return attributes_.layout->parts_of(attributes_.group_size)[part_of(index)];
    }
    return index < first_activation_scale() ? kScale : kActivationScale;
}

std::string Signature::label(int32_t index, int32_t nb_inputs) const {
    if (index < first_weight() || index >= nb_inputs) {
        return tensor(index, nb_inputs).name;
    }
    std::string text = index < first_scale() ? "" : std::string(tensor(index, nb_inputs).name) + " of ";
    text += attributes_.layout->parts[part_of(index)].name;
    if (attributes_.layout->each_expert) {
        text += " of expert " + std::to_string((index - first_weight()) % attributes_.experts);
    }
    return text;
}

int32_t Signature::first_of_kind(int32_t index, int32_t nb_inputs) const {
    switch (tensor(index, nb_inputs).type) {
        case ElementType::kActivation: return 0;  // activations stand first
        case ElementType::kWeight: return first_weight();
        case ElementType::kScale: return first_scale();
        case ElementType::kActivationScale: return first_activation_scale();
        case ElementType::kFloat32:
        case ElementType::kInt32: break;
    }
    return index;
}

std::string Signature::type_problem(int32_t index, int32_t nb_inputs, DataType type, DataType first) const {
    const char* must_be = nullptr;
    switch (tensor(index, nb_inputs).type) {
        case ElementType::kFloat32: must_be = type == DataType::kFLOAT ? nullptr : "fp32"; break;
        case ElementType::kInt32: must_be = type == DataType::kINT32 ? nullptr : "int32"; break;
        case ElementType::kWeight:
            if (attributes_.group_size > 0) {
                must_be = type == DataType::kINT32 ? nullptr : "int32, since there is a group_size";
                break;
            }
            if (is_scaled(nb_inputs)) {
                must_be = type == DataType::kFP8 ? nullptr : "fp8, since there are scales";
                break;
            }
            [[fallthrough]];
        case ElementType::kActivation:
        case ElementType::kScale:
        case ElementType::kActivationScale: must_be = is_float(type) ? nullptr : "fp32, fp16 or bf16"; break;
    }
    if (must_be != nullptr) {
        return label(index, nb_inputs) + " is " + name_of(type) + ", must be " + must_be;
    }
    const int32_t earlier = first_of_kind(index, nb_inputs);
    if (earlier != index && type != first) {
        return label(index, nb_inputs) + " is " + name_of(type) + ", must be " + name_of(first) + ", as " +
               label(earlier, nb_inputs) + " is";
    }
    return {};
}

Sizes Signature::unbound() const {
    Sizes sizes(attributes_.top_k);
    if (op_.has_weights) {
        sizes[Extent::kExperts] = attributes_.experts;
    }
    return sizes;
}

int64_t Signature::scale_elements(int32_t index, const Sizes& sizes) const {
    const Layout& layout = *attributes_.layout;
    const std::vector<Extent>& shape = layout.parts[part_of(index)].shape;
    const bool linear = layout.code == SHUNTYARD_LINEAR;
    const int64_t out = sizes[linear ? shape[0] : shape.back()], in = sizes[linear ? shape[1] : shape[0]];
    const int64_t experts = layout.each_expert ? 1 : sizes[Extent::kExperts];
    if (out == kUnknown || in == kUnknown) {
        return kUnknown;
    }
    return out * experts * (attributes_.group_size > 0 ? in / attributes_.group_size : 1);
}

std::string Signature::group_problem(const Sizes& sizes) const {
    for (const Extent extent : {Extent::kHidden, Extent::kIntermediate}) {
        if (attributes_.group_size > 0 && sizes[extent] != kUnknown && sizes[extent] % attributes_.group_size != 0) {
            return std::string(extent == Extent::kHidden ? "H" : "F") + " is " + std::to_string(sizes[extent]) +
                   ", must be a multiple of group_size, which is " + std::to_string(attributes_.group_size);
        }
    }
    return {};
}

}  // namespace shuntyard
