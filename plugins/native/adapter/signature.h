// An op together with a node's attributes: what each of its tensors is, one by one.
//
// The experts op has as many weights as its attributes say, and either no scales or one for each weight, so what an
// input is depends on how many there are. Static activations bring another scale for each weight.
#pragma once

#include <string>

#include "adapter/op.h"

namespace shuntyard {

// A node's attributes; those that an op does not have stay as they are here.
struct Attributes {
    int32_t top_k = 0;
    int32_t experts = 0;
    const Layout* layout = nullptr;
    int32_t group_size = 0;  // 0: the weights are not INT4
    const Activations* activations = nullptr;
    std::string module;  // whose experts these are, for the builder's log; may be empty

    // Of shuntyard_activations.
    int activations_code() const { return activations == nullptr ? SHUNTYARD_AS_THEY_ARE : activations->code; }
};

class Signature {
  public:
    Signature(const Op& op, const Attributes& attributes);

    const Op& op() const { return op_; }
    const Attributes& attributes() const { return attributes_; }

    // Empty if there may be so many inputs and outputs.
    std::string count_problem(int32_t nb_inputs, int32_t nb_outputs) const;

    // The rest is asked for a number of inputs that is right. Tensors are numbered as in supportsFormatCombination:
    // inputs, then outputs.

    const Tensor& tensor(int32_t index, int32_t nb_inputs) const;
    // Its name, as "gate of expert 3", for messages.
    std::string label(int32_t index, int32_t nb_inputs) const;
    // The first tensor of the same ElementType, of which the others must have the type.
    int32_t first_of_kind(int32_t index, int32_t nb_inputs) const;
    // Empty if tensor `index` may be of this type, where the first of its kind is of type `first`.
    std::string type_problem(int32_t index, int32_t nb_inputs, nvinfer1::DataType type, nvinfer1::DataType first) const;

    // How many inputs there are, by the type of the first weight: enqueue is not told.
    int32_t inputs_with(nvinfer1::DataType weight) const;
    bool is_scaled(int32_t nb_inputs) const { return nb_inputs > first_scale(); }
    int32_t first_weight() const { return static_cast<int32_t>(op_.inputs.size()); }
    int32_t first_scale() const { return first_weight() + weights_; }
    // Where scales end, if there are any, and those of activations begin.
    int32_t first_activation_scale() const { return first_scale() + weights_; }

    // What is known before any tensor is.
    Sizes unbound() const;
    // The number of elements that a scale must have if it is not 1, from settled extents; kUnknown where they are.
    int64_t scale_elements(int32_t index, const Sizes& sizes) const;
    // Empty if the extents are multiples of the group size.
    std::string group_problem(const Sizes& sizes) const;

  private:
    // Which of the layout's parts a weight or a scale belongs to.
    size_t part_of(int32_t index) const;
    // How many inputs there are with scales.
    int32_t inputs_with_scales() const;
    bool has_activation_scales() const { return attributes_.activations_code() == SHUNTYARD_STATIC; }

    const Op& op_;
    const Attributes attributes_;
    const int32_t weights_;  // 0 for the other ops
};

}  // namespace shuntyard
