// Symbolic shapes: how a plugin says what its outputs' extents are before it knows them.
//
// These classes are not versioned interfaces. TensorRT hands out an object with a pointer to its implementation, and
// the methods that a plugin calls are inlined into the plugin: they call through that pointer. So the layout of the
// object and the vtable of the implementation are both part of the binary interface.
#pragma once

#include "abi/types.h"

namespace nvinfer1 {

enum class DimensionOperation : int32_t {
    kSUM = 0,
    kPROD = 1,
    kMAX = 2,
    kMIN = 3,
    kSUB = 4,
    kEQUAL = 5,
    kLESS = 6,
    kFLOOR_DIV = 7,
    kCEIL_DIV = 8,
};

class IDimensionExpr;

namespace apiv {

class VRoot {
  public:
    virtual ~VRoot() noexcept = default;
};

class VDimensionExpr : public VRoot {
  public:
    virtual bool isConstant() const = 0;
    virtual int64_t getConstantValue() const = 0;
    virtual bool isSizeTensor() const = 0;
};

class VExprBuilder : public VRoot {
  public:
    virtual IDimensionExpr const* constant(int64_t value) = 0;
    virtual IDimensionExpr const* operation(DimensionOperation op, IDimensionExpr const& first,
                                            IDimensionExpr const& second) = 0;
    virtual IDimensionExpr const* declareSizeTensor(int32_t outputIndex, IDimensionExpr const& opt,
                                                    IDimensionExpr const& upper) = 0;
};

}  // namespace apiv

class INoCopy {
  protected:
    INoCopy() = default;
    virtual ~INoCopy() = default;
    INoCopy(INoCopy const&) = delete;
    INoCopy& operator=(INoCopy const&) = delete;
};

// The extent of one dimension: a constant, or an expression in the extents of the inputs.
class IDimensionExpr : public INoCopy {
  public:
    bool isConstant() const noexcept { return mImpl->isConstant(); }
    int64_t getConstantValue() const noexcept { return mImpl->getConstantValue(); }

  protected:
    apiv::VDimensionExpr* mImpl;
    ~IDimensionExpr() noexcept override = default;
};

// Makes such expressions; owns what it returns.
class IExprBuilder : public INoCopy {
  public:
    IDimensionExpr const* constant(int64_t value) noexcept { return mImpl->constant(value); }
    IDimensionExpr const* operation(DimensionOperation op, IDimensionExpr const& first,
                                    IDimensionExpr const& second) noexcept {
        return mImpl->operation(op, first, second);
    }

  protected:
    apiv::VExprBuilder* mImpl;
    ~IExprBuilder() noexcept override = default;
};

class DimsExprs {
  public:
    int32_t nbDims;
    IDimensionExpr const* d[Dims::MAX_DIMS];
};

}  // namespace nvinfer1
