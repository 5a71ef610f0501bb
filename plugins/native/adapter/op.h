// What a plugin needs to know of an op: its tensors, their extents in symbols, and how to launch it.
//
// Everything that TensorRT asks a plugin follows from this table: output types and shapes, which formats it takes, and
// whether given shapes fit together.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "abi/types.h"
#include "shuntyard_plugins.h"

namespace shuntyard {

constexpr int64_t kUnknown = -1;  // an extent that is not known yet, as in nvinfer1::Dims

// The extents of contract.py's legend, and those that follow from them.
enum class Extent : int {
    kTokens,             // T
    kExperts,            // E
    kHidden,             // H
    kIntermediate,       // F
    kRows,               // T * K
    kOffsets,            // E + 1
    kTwiceIntermediate,  // 2F
    kHiddenWords,        // H / 8, of INT4 weights
    kIntermediateWords,  // F / 8
};
constexpr int kExtents = 9;

enum class ElementType {
    kFloat32,
    kInt32,
    kActivation,       // fp32, fp16 or bf16; one type for all such tensors of an op
    kWeight,           // one type for all such tensors of an op; which, follows from scales and attributes
    kScale,            // fp32, fp16 or bf16; one type for all such tensors of an op
    kActivationScale,  // as kScale, and of 1 element
};

struct Tensor {
    const char* name;
    ElementType type;
    std::vector<Extent> shape;  // of a scale: empty, since it is known by its number of elements
};

// The value of every extent, as far as it is known.
struct Sizes {
    int64_t top_k;
    int64_t values[kExtents];

    explicit Sizes(int64_t top_k_);
    int64_t& operator[](Extent extent) { return values[static_cast<int>(extent)]; }
    int64_t operator[](Extent extent) const { return values[static_cast<int>(extent)]; }
};

struct Op {
    const char* name;
    std::vector<Tensor> inputs;  // the fixed ones, before the experts' weights, scales and scales of activations
    std::vector<Tensor> outputs;
    std::vector<const char*> attributes;
    bool has_weights;
    size_t (*workspace)(const Sizes& sizes, nvinfer1::DataType x_type, int activations);
    int (*launch)(const Sizes& sizes, nvinfer1::DataType x_type, const shuntyard_expert_weights& weights, int tactic,
                  const void* const* inputs, void* const* outputs, void* workspace, size_t workspace_size,
                  void* stream);
};

extern const Op kRouting;
extern const Op kExperts;
extern const Op kScatterAdd;

// How the weights of the experts are cut.
struct Layout {
    const char* name;
    int code;          // of shuntyard_layout
    bool each_expert;  // every part is as many tensors as there are experts
    std::vector<Tensor> parts;
    std::vector<Tensor> packed;  // the same as INT4, if there is such a form

    const std::vector<Tensor>& parts_of(int64_t group_size) const { return group_size > 0 ? packed : parts; }
};

// The layout called so, or null.
const Layout* find_layout(const std::string& name);

// What becomes of the rows before a product.
struct Activations {
    const char* name;
    int code;  // of shuntyard_activations
};

// What is called so, or null.
const Activations* find_activations(const std::string& name);

// The C interface's number of a type that kernels compute in; one that no kernel takes where there is none.
int type_code(nvinfer1::DataType type);

// The C interface's number of a type of weights; INT4 comes as int32 words.
int weight_code(nvinfer1::DataType type);

// Takes over the extents of `dims`; where that cannot be, returns what is wrong with the tensor, else an empty string.
std::string bind(const Tensor& tensor, const nvinfer1::Dims& dims, Sizes& sizes);

// Derives extents from one another and checks them; returns what is wrong, or an empty string.
std::string settle(Sizes& sizes);

}  // namespace shuntyard
