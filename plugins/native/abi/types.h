// The plain data types that cross the boundary between TensorRT and a V3 plugin library.
//
// TensorRT's own headers come with its SDK only, not with its Python packages, and a library that needs them cannot be
// built from pip alone. What a plugin needs of them is a small, versioned binary interface; these headers declare it,
// in our words, with the vendor's names because the names are part of the interface (RTTI compares them). abi/check/
// holds them to the vendor's headers wherever those can be found. Checked so against the headers of every TensorRT
// release from 10.0.1 to 11.1; TensorRT-RTX 1.7.1 loads and builds plugins made with them.
#pragma once

#include <cstddef>
#include <cstdint>

// CUDA's stream handle, declared as the CUDA runtime declares it, so that both declarations may meet in one file.
struct CUstream_st;
typedef struct CUstream_st* cudaStream_t;

namespace nvinfer1 {

using AsciiChar = char;

// Element type of a tensor. FP4 and E8M0 came after 10.0 and are not listed: no op here can take them.
enum class DataType : int32_t {
    kFLOAT = 0,
    kHALF = 1,
    kINT8 = 2,
    kINT32 = 3,
    kBOOL = 4,
    kUINT8 = 5,
    kFP8 = 6,
    kBF16 = 7,
    kINT64 = 8,
    kINT4 = 9,
};

// Memory layout of a tensor. The vectorised layouts are not listed: our plugins accept row-major memory only.
enum class TensorFormat : int32_t {
    kLINEAR = 0,
};

// A shape; an extent of -1 is one that is not known yet.
class Dims64 {
  public:
    static constexpr int32_t MAX_DIMS{8};
    int32_t nbDims;
    int64_t d[MAX_DIMS];
};
using Dims = Dims64;

// One tensor as it is when a plugin runs.
struct PluginTensorDesc {
    Dims dims;
    DataType type;
    TensorFormat format;
    float scale;
};

// One tensor as it is when an engine is built: `desc` with -1 for what varies, and the profile's extremes.
struct DynamicPluginTensorDesc {
    PluginTensorDesc desc;
    Dims min;
    Dims max;
    Dims opt;
};

// Element type of a plugin field.
enum class PluginFieldType : int32_t {
    kFLOAT16 = 0,
    kFLOAT32 = 1,
    kFLOAT64 = 2,
    kINT8 = 3,
    kINT16 = 4,
    kINT32 = 5,
    kCHAR = 6,
    kDIMS = 7,
    kUNKNOWN = 8,
    kBF16 = 9,
    kINT64 = 10,
};

// A named array: an attribute of an ONNX node, or one thing that a plugin stores in an engine. Owns nothing.
class PluginField {
  public:
    AsciiChar const* name{nullptr};
    void const* data{nullptr};
    PluginFieldType type{PluginFieldType::kUNKNOWN};
    int32_t length{0};
};

struct PluginFieldCollection {
    int32_t nbFields{};
    PluginField const* fields{};
};

// Whether a plugin is created for a network that is to be built, or from an engine that is loaded.
enum class TensorRTPhase : int32_t {
    kBUILD = 0,
    kRUNTIME = 1,
};

// The three interfaces that a V3 plugin hands out.
enum class PluginCapabilityType : int32_t {
    kCORE = 0,
    kBUILD = 1,
    kRUNTIME = 2,
};

enum class APILanguage : int32_t {
    kCPP = 0,
    kPYTHON = 1,
};

// Name and version by which the two sides tell interfaces apart.
class InterfaceInfo {
  public:
    char const* kind;
    int32_t major;
    int32_t minor;
};

}  // namespace nvinfer1
