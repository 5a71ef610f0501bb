// A test's one macro, and stand-ins for what TensorRT hands to plugins.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "abi/logging.h"
#include "abi/plugin.h"

#define CHECK(condition)                                                       \
    do {                                                                       \
        if (!(condition)) {                                                    \
            std::printf("FAILED %s:%d: %s\n", __FILE__, __LINE__, #condition); \
            std::exit(1);                                                      \
        }                                                                      \
    } while (false)

inline std::string logged;  // all that the plugins have said so far

inline bool says(const std::string& part) {
    const bool found = logged.find(part) != std::string::npos;
    if (!found) {
        std::printf("the log lacks '%s'; it is: %s\n", part.c_str(), logged.c_str());
    }
    logged.clear();
    return found;
}

struct Logger10 : nvinfer1::ILogger {
    void log(Severity severity, const char* message) noexcept override {
        logged += (severity == Severity::kERROR ? "10 error " : "10 ") + std::string(message) + "\n";
    }
};

struct Finder10 : nvinfer1::ILoggerFinder {
    Logger10 logger;
    nvinfer1::ILogger* findLogger() override { return &logger; }
    virtual ~Finder10() = default;
};

struct Logger11 : nvinfer1::v_1_0::ILogger {
    void log(Severity severity, const char* message) noexcept override {
        logged += (severity == Severity::kERROR ? "11 error " : "11 ") + std::string(message) + "\n";
    }
};

struct Finder11 : nvinfer1::v_1_0::ILoggerFinder {
    Logger11 logger;
    nvinfer1::v_1_0::ILogger* findLogger() override { return &logger; }
};

// A dimension whose value is known, or not yet, but is printed.
struct Dimension : nvinfer1::IDimensionExpr {
    struct Implementation : nvinfer1::apiv::VDimensionExpr {
        bool constant = false;
        int64_t value = 0;
        bool isConstant() const override { return constant; }
        int64_t getConstantValue() const override { return value; }
        bool isSizeTensor() const override { return false; }
    } implementation;
    std::string text;

    explicit Dimension(std::string text_) : text(std::move(text_)) { mImpl = &implementation; }
    explicit Dimension(int64_t value) : Dimension(std::to_string(value)) {
        implementation.constant = true;
        implementation.value = value;
    }
    ~Dimension() override = default;
};

struct Builder : nvinfer1::IExprBuilder {
    struct Implementation : nvinfer1::apiv::VExprBuilder {
        std::vector<std::unique_ptr<Dimension>> made;

        const nvinfer1::IDimensionExpr* constant(int64_t value) override {
            made.push_back(std::make_unique<Dimension>(value));
            return made.back().get();
        }
        const nvinfer1::IDimensionExpr* operation(nvinfer1::DimensionOperation op, const nvinfer1::IDimensionExpr& a,
                                                  const nvinfer1::IDimensionExpr& b) override {
            const char* sign = op == nvinfer1::DimensionOperation::kPROD  ? "*"
                               : op == nvinfer1::DimensionOperation::kSUM ? "+"
                                                                          : "?";
            made.push_back(std::make_unique<Dimension>(static_cast<const Dimension&>(a).text + sign +
                                                       static_cast<const Dimension&>(b).text));
            return made.back().get();
        }
        const nvinfer1::IDimensionExpr* declareSizeTensor(int32_t, const nvinfer1::IDimensionExpr&,
                                                          const nvinfer1::IDimensionExpr&) override {
            return nullptr;
        }
    } implementation;

    Builder() { mImpl = &implementation; }
    ~Builder() override = default;
};

inline std::string text_of(const nvinfer1::DimsExprs& dims) {
    std::string text;
    for (int32_t d = 0; d < dims.nbDims; ++d) {
        text += (d == 0 ? "" : ", ") + static_cast<const Dimension*>(dims.d[d])->text;
    }
    return text;
}

inline nvinfer1::Dims dims_of(const std::vector<int64_t>& extents) {
    nvinfer1::Dims dims{static_cast<int32_t>(extents.size()), {}};
    for (size_t d = 0; d < extents.size(); ++d) {
        dims.d[d] = extents[d];
    }
    return dims;
}

inline nvinfer1::PluginTensorDesc tensor_of(nvinfer1::DataType type, const std::vector<int64_t>& extents) {
    return {dims_of(extents), type, nvinfer1::TensorFormat::kLINEAR, 1.0f};
}

inline nvinfer1::DynamicPluginTensorDesc dynamic_of(nvinfer1::DataType type, const std::vector<int64_t>& extents,
                                                    const std::vector<int64_t>& largest) {
    return {tensor_of(type, extents), dims_of(largest), dims_of(largest), dims_of(largest)};
}
