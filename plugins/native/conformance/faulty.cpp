// FOR TESTS ONLY: the plugin library of the host, but for one fault. Which one says the name that it is loaded by:
// a link called faulty-outside.so has the fault "outside".
#include <dlfcn.h>

#include <climits>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "abi/plugin.h"
#include "shuntyard_plugins.h"

namespace {

using namespace nvinfer1;

std::string fault;

size_t bytes_of(const PluginTensorDesc& tensor) {
    size_t bytes = tensor.type == DataType::kFLOAT || tensor.type == DataType::kINT32 ? 4 : 2;
    for (int32_t d = 0; d < tensor.dims.nbDims; ++d) {
        bytes *= static_cast<size_t>(tensor.dims.d[d]);
    }
    return bytes;
}

class FaultyPlugin final : public IPluginV3, public IPluginV3OneBuild, public IPluginV3OneRuntime {
  public:
    explicit FaultyPlugin(IPluginV3* inner)
        : inner_(inner),
          build_(static_cast<IPluginV3OneBuild*>(inner->getCapabilityInterface(PluginCapabilityType::kBUILD))),
          runtime_(static_cast<IPluginV3OneRuntime*>(inner->getCapabilityInterface(PluginCapabilityType::kRUNTIME))) {}

    IPluginCapability* getCapabilityInterface(PluginCapabilityType type) noexcept override {
        switch (type) {
            case PluginCapabilityType::kBUILD: return static_cast<IPluginV3OneBuild*>(this);
            case PluginCapabilityType::kRUNTIME: return static_cast<IPluginV3OneRuntime*>(this);
            case PluginCapabilityType::kCORE: break;
        }
        return inner_->getCapabilityInterface(type);
    }
    IPluginV3* clone() noexcept override { return new FaultyPlugin(inner_->clone()); }

    int32_t configurePlugin(DynamicPluginTensorDesc const* in, int32_t inputs, DynamicPluginTensorDesc const* out,
                            int32_t outputs) noexcept override {
        return build_->configurePlugin(in, inputs, out, outputs);
    }
    int32_t getOutputDataTypes(DataType* types, int32_t outputs, DataType const* input_types,
                               int32_t inputs) const noexcept override {
        const int32_t status = build_->getOutputDataTypes(types, outputs, input_types, inputs);
        types[0] = fault == "type" ? DataType::kINT8 : types[0];
        return status;
    }
    int32_t getOutputShapes(DimsExprs const* in, int32_t inputs, DimsExprs const* shape_inputs, int32_t shapes,
                            DimsExprs* out, int32_t outputs, IExprBuilder& builder) noexcept override {
        const int32_t status = build_->getOutputShapes(in, inputs, shape_inputs, shapes, out, outputs, builder);
        out[0].d[0] = fault == "shape" ? builder.constant(977) : out[0].d[0];
        return status;
    }
    bool supportsFormatCombination(int32_t position, DynamicPluginTensorDesc const* in_out, int32_t inputs,
                                   int32_t outputs) noexcept override {
        return fault != "formats" && build_->supportsFormatCombination(position, in_out, inputs, outputs);
    }
    int32_t getNbOutputs() const noexcept override { return build_->getNbOutputs(); }
    size_t getWorkspaceSize(DynamicPluginTensorDesc const* in, int32_t inputs, DynamicPluginTensorDesc const* out,
                            int32_t outputs) const noexcept override {
        return build_->getWorkspaceSize(in, inputs, out, outputs);
    }
    int32_t getNbTactics() noexcept override { return fault == "tactic" ? 1 : build_->getNbTactics(); }
    int32_t getValidTactics(int32_t* tactics, int32_t count) noexcept override {
        if (fault == "tactic") {
            tactics[0] = 977;
            return 0;
        }
        return build_->getValidTactics(tactics, count);
    }

    int32_t setTactic(int32_t tactic) noexcept override {
        tactic_ = tactic;
        return fault == "tactic" ? 0 : runtime_->setTactic(tactic);
    }
    int32_t onShapeChange(PluginTensorDesc const* in, int32_t inputs, PluginTensorDesc const* out,
                          int32_t outputs) noexcept override {
        return runtime_->onShapeChange(in, inputs, out, outputs);
    }
    int32_t enqueue(PluginTensorDesc const* in, PluginTensorDesc const* out, void const* const* inputs,
                    void* const* outputs, void* workspace, cudaStream_t stream) noexcept override {
        auto* first = static_cast<unsigned char*>(outputs[0]);
        const size_t bytes = bytes_of(out[0]);
        const unsigned char stale = bytes > 0 ? first[bytes - 1] : 0;
        const int32_t status = runtime_->enqueue(in, out, inputs, outputs, workspace, stream);
        static int calls = 0;
        ++calls;
        if (bytes == 0) {
            return status;
        }
        if (fault == "behind") {
            first[bytes + 2] = 1;
        } else if (fault == "before") {
            first[-3] = 1;
        } else if (fault == "input") {
            static_cast<unsigned char*>(const_cast<void*>(inputs[0]))[bytes_of(in[0]) - 1] ^= 1;
        } else if (fault == "wrong" || (fault == "tactic" && tactic_ == 977)) {
            const size_t high = bytes / 8 * 4 + 3;  // an exponent's bits, in every format
            first[high < bytes ? high : bytes - 1] ^= 0x40;
        } else if (fault == "unstable") {
            first[0] ^= static_cast<unsigned char>(calls % 2);
        } else if (fault == "stale") {
            first[bytes - 1] = stale;
        }
        return fault == "refusing" ? 1 : status;
    }
    IPluginV3* attachToContext(IPluginResourceContext* context) noexcept override {
        return new FaultyPlugin(runtime_->attachToContext(context));
    }
    PluginFieldCollection const* getFieldsToSerialize() noexcept override {
        stored_ = *runtime_->getFieldsToSerialize();
        stored_.nbFields -= fault == "forgetful" ? 1 : 0;
        return &stored_;
    }

  private:
    std::unique_ptr<IPluginV3> inner_;
    IPluginV3OneBuild* build_;
    IPluginV3OneRuntime* runtime_;
    PluginFieldCollection stored_;
    int32_t tactic_ = 0;
};

class FaultyCreator final : public IPluginCreatorV3One {
  public:
    explicit FaultyCreator(IPluginCreatorV3One* inner) : inner_(inner) {}

    IPluginV3* createPlugin(AsciiChar const* name, PluginFieldCollection const* fields,
                            TensorRTPhase phase) noexcept override {
        IPluginV3* made = inner_->createPlugin(name, fields, phase);
        return made == nullptr ? nullptr : new FaultyPlugin(made);
    }
    PluginFieldCollection const* getFieldNames() noexcept override { return inner_->getFieldNames(); }
    AsciiChar const* getPluginName() const noexcept override { return inner_->getPluginName(); }
    AsciiChar const* getPluginVersion() const noexcept override { return inner_->getPluginVersion(); }
    AsciiChar const* getPluginNamespace() const noexcept override { return inner_->getPluginNamespace(); }

  private:
    IPluginCreatorV3One* inner_;
};

}  // namespace

extern "C" SHUNTYARD_API IPluginCreatorInterface* const* getCreators(int32_t& count) {
    static std::vector<FaultyCreator> creators;
    static std::vector<IPluginCreatorInterface*> pointers;
    Dl_info own;
    char built[PATH_MAX];
    if (dladdr(reinterpret_cast<void*>(&getCreators), &own) == 0 || realpath(own.dli_fname, built) == nullptr) {
        std::abort();
    }
    const std::string name = own.dli_fname, path = built;
    const size_t begin = name.rfind("faulty-");
    fault = begin == std::string::npos ? "" : name.substr(begin + 7, name.rfind(".so") - begin - 7);
    void* host = dlopen((path.substr(0, path.rfind('/')) + "/../tests/libshuntyard_on_host.so").c_str(), RTLD_NOW);
    auto* inner = host == nullptr
                      ? nullptr
                      : reinterpret_cast<IPluginCreatorInterface* const* (*)(int32_t&)>(dlsym(host, "getCreators"));
    if (inner == nullptr) {
        std::abort();
    }
    IPluginCreatorInterface* const* found = inner(count);
    for (int32_t i = 0; i < count; ++i) {
        creators.emplace_back(static_cast<IPluginCreatorV3One*>(found[i]));
    }
    for (FaultyCreator& creator : creators) {
        pointers.push_back(&creator);
    }
    return pointers.data();
}
