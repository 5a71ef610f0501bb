// The TensorRT plugin of an op, and its creator.
#pragma once

#include <string>

#include "abi/plugin.h"
#include "adapter/signature.h"

namespace shuntyard {

constexpr const char* kNamespace = "shuntyard";
constexpr const char* kPluginVersion = "1";

// Version of what a plugin stores in an engine. Raise it when the stored fields, or what they mean, change.
constexpr int32_t kFormatVersion = 4;

// More attributes than any op has.
constexpr int32_t kMaxAttributes = 6;

class Plugin final : public nvinfer1::IPluginV3,
                     public nvinfer1::IPluginV3OneCore,
                     public nvinfer1::IPluginV3OneBuild,
                     public nvinfer1::IPluginV3OneRuntime {
  public:
    Plugin(const Op& op, const Attributes& attributes);

    nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override;
    nvinfer1::IPluginV3* clone() noexcept override;

    const char* getPluginName() const noexcept override { return signature_.op().name; }
    const char* getPluginVersion() const noexcept override { return kPluginVersion; }
    const char* getPluginNamespace() const noexcept override { return kNamespace; }

    int32_t configurePlugin(nvinfer1::DynamicPluginTensorDesc const* in, int32_t nb_inputs,
                            nvinfer1::DynamicPluginTensorDesc const* out, int32_t nb_outputs) noexcept override;
    int32_t getOutputDataTypes(nvinfer1::DataType* output_types, int32_t nb_outputs,
                               nvinfer1::DataType const* input_types, int32_t nb_inputs) const noexcept override;
    int32_t getOutputShapes(nvinfer1::DimsExprs const* inputs, int32_t nb_inputs,
                            nvinfer1::DimsExprs const* shape_inputs, int32_t nb_shape_inputs,
                            nvinfer1::DimsExprs* outputs, int32_t nb_outputs,
                            nvinfer1::IExprBuilder& builder) noexcept override;
    bool supportsFormatCombination(int32_t position, nvinfer1::DynamicPluginTensorDesc const* in_out, int32_t nb_inputs,
                                   int32_t nb_outputs) noexcept override;
    int32_t getNbOutputs() const noexcept override { return static_cast<int32_t>(signature_.op().outputs.size()); }
    size_t getWorkspaceSize(nvinfer1::DynamicPluginTensorDesc const* in, int32_t nb_inputs,
                            nvinfer1::DynamicPluginTensorDesc const* out, int32_t nb_outputs) const noexcept override;

    // No tactics are offered (getNbTactics() is 0): the builder would time them on offsets of arbitrary content, that
    // is, on a routing that does not exist. Kernels are chosen at every call, by its shape.
    char const* getTimingCacheID() noexcept override { return timing_cache_id_.c_str(); }

    // Of shuntyard_tactic; for whoever knows better than the table, and for tests.
    int32_t setTactic(int32_t tactic) noexcept override;
    int32_t onShapeChange(nvinfer1::PluginTensorDesc const* in, int32_t nb_inputs,
                          nvinfer1::PluginTensorDesc const* out, int32_t nb_outputs) noexcept override;
    int32_t enqueue(nvinfer1::PluginTensorDesc const* input_desc, nvinfer1::PluginTensorDesc const* output_desc,
                    void const* const* inputs, void* const* outputs, void* workspace,
                    cudaStream_t stream) noexcept override;
    nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext* context) noexcept override;
    nvinfer1::PluginFieldCollection const* getFieldsToSerialize() noexcept override;

  private:
    // Logs "<plugin>: <what>" as an error and returns a status that TensorRT takes as failure.
    int32_t refuse(const std::string& what) const noexcept;

    const Signature signature_;
    const std::string timing_cache_id_;
    int32_t tactic_ = SHUNTYARD_BY_SHAPE;
    const int32_t format_version_ = kFormatVersion;
    nvinfer1::PluginField stored_fields_[1 + kMaxAttributes];
    nvinfer1::PluginFieldCollection stored_;
};

class Creator final : public nvinfer1::IPluginCreatorV3One {
  public:
    explicit Creator(const Op& op);

    nvinfer1::IPluginV3* createPlugin(const char* name, nvinfer1::PluginFieldCollection const* fields,
                                      nvinfer1::TensorRTPhase phase) noexcept override;
    nvinfer1::PluginFieldCollection const* getFieldNames() noexcept override { return &fields_; }
    const char* getPluginName() const noexcept override { return op_.name; }
    const char* getPluginVersion() const noexcept override { return kPluginVersion; }
    const char* getPluginNamespace() const noexcept override { return kNamespace; }

  private:
    const Op& op_;
    nvinfer1::PluginField fields_named_[kMaxAttributes];
    nvinfer1::PluginFieldCollection fields_;
};

// The field of an attribute: its name and type, and, where attributes are given, its value.
nvinfer1::PluginField field_of(const char* name, const Attributes* attributes);

}  // namespace shuntyard
