// How a plugin library finds TensorRT's logger.
//
// This is the one part of the interface that changed between major versions: TensorRT 11 (and TensorRT-RTX 1.7) made
// both classes versioned interfaces in v_1_0, which moved their methods to other vtable slots. Both forms are declared
// here under the names that they have in their versions. Which one an object is can be told from its RTTI alone:
// finder_kind() in adapter/log.cpp.
#pragma once

#include "abi/plugin.h"

namespace nvinfer1 {

// TensorRT 10.
class ILogger {
  public:
    enum class Severity : int32_t {
        kINTERNAL_ERROR = 0,
        kERROR = 1,
        kWARNING = 2,
        kINFO = 3,
        kVERBOSE = 4,
    };
    virtual void log(Severity severity, AsciiChar const* msg) noexcept = 0;
    virtual ~ILogger() = default;
};

// TensorRT 10.
class ILoggerFinder {
  public:
    virtual ILogger* findLogger() = 0;

  protected:
    virtual ~ILoggerFinder() = default;
};

namespace v_1_0 {

// TensorRT 11, TensorRT-RTX 1.7.
class ILogger : public IVersionedInterface {
  public:
    enum class Severity : int32_t {
        kINTERNAL_ERROR = 0,
        kERROR = 1,
        kWARNING = 2,
        kINFO = 3,
        kVERBOSE = 4,
    };
    InterfaceInfo getInterfaceInfo() const noexcept override { return {"ILogger", 1, 0}; }
    virtual void log(Severity severity, AsciiChar const* msg) noexcept = 0;
};

// TensorRT 11, TensorRT-RTX 1.7.
class ILoggerFinder : public IVersionedInterface {
  public:
    InterfaceInfo getInterfaceInfo() const noexcept override { return {"ILoggerFinder", 1, 0}; }
    virtual ILogger* findLogger() = 0;
};

}  // namespace v_1_0
}  // namespace nvinfer1
