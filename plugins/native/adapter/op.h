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
};
constexpr int kExtents = 7;

enum class ElementType {
    kFloat32,
    kInt32,
    kActivation,  // fp32, fp16 or bf16; one type for all such tensors of an op
    kWeight,      // fp32, fp16 or bf16; one type for all such tensors of an op
};

struct Tensor {
    const char* name;
    ElementType type;
    std::vector<Extent> shape;
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
    std::vector<Tensor> inputs;
    std::vector<Tensor> outputs;
    size_t (*workspace)(const Sizes& sizes, const nvinfer1::DataType* types);
    int (*launch)(const Sizes& sizes, const nvinfer1::DataType* types, const void* const* inputs, void* const* outputs,
                  void* workspace, size_t workspace_size, void* stream);

    int32_t tensors() const { return static_cast<int32_t>(inputs.size() + outputs.size()); }
    // Inputs first, then outputs: the order of supportsFormatCombination.
    const Tensor& tensor(int32_t index) const;
};

extern const Op kRouting;
extern const Op kExperts;
extern const Op kScatterAdd;

// The C interface's number of a tensor type; one that no kernel takes where there is none.
int type_code(nvinfer1::DataType type);

// Takes over the extents of `dims`; where that cannot be, returns what is wrong, else an empty string.
std::string bind(const Tensor& tensor, const nvinfer1::Dims& dims, Sizes& sizes);

// Derives extents from one another and checks them; returns what is wrong, or an empty string.
std::string settle(Sizes& sizes);

}  // namespace shuntyard
