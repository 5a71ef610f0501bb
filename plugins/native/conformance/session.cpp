#include "conformance/session.h"

#include <dlfcn.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "shuntyard_plugins.h"

namespace conformance {
namespace {

using namespace nvinfer1;

// An extent whose value is known: what TensorRT hands to getOutputShapes where no input varies.
struct Dimension : IDimensionExpr {
    struct Implementation : apiv::VDimensionExpr {
        int64_t value = 0;
        bool isConstant() const override { return true; }
        int64_t getConstantValue() const override { return value; }
        bool isSizeTensor() const override { return false; }
    } implementation;

    explicit Dimension(int64_t value) {
        mImpl = &implementation;
        implementation.value = value;
    }
    ~Dimension() override = default;
};

int64_t result_of(DimensionOperation operation, int64_t a, int64_t b) {
    switch (operation) {
        case DimensionOperation::kSUM: return a + b;
        case DimensionOperation::kPROD: return a * b;
        case DimensionOperation::kMAX: return std::max(a, b);
        case DimensionOperation::kMIN: return std::min(a, b);
        case DimensionOperation::kSUB: return a - b;
        case DimensionOperation::kEQUAL: return a == b;
        case DimensionOperation::kLESS: return a < b;
        case DimensionOperation::kFLOOR_DIV: return a / b;
        case DimensionOperation::kCEIL_DIV: return (a + b - 1) / b;
    }
    return -1;
}

struct Builder : IExprBuilder {
    struct Implementation : apiv::VExprBuilder {
        std::vector<std::unique_ptr<Dimension>> made;

        const IDimensionExpr* constant(int64_t value) override {
            made.push_back(std::make_unique<Dimension>(value));
            return made.back().get();
        }
        const IDimensionExpr* operation(DimensionOperation op, const IDimensionExpr& a,
                                        const IDimensionExpr& b) override {
            return constant(result_of(op, a.getConstantValue(), b.getConstantValue()));
        }
        const IDimensionExpr* declareSizeTensor(int32_t, const IDimensionExpr&, const IDimensionExpr&) override {
            return nullptr;
        }
    } implementation;

    Builder() { mImpl = &implementation; }
    ~Builder() override = default;
};

// What a plan holds of a plugin: fields whose names and data are gone when the plugin is.
class Stored {
  public:
    explicit Stored(const PluginFieldCollection& fields) {
        names_.reserve(static_cast<size_t>(fields.nbFields));
        data_.reserve(static_cast<size_t>(fields.nbFields));
        for (int32_t i = 0; i < fields.nbFields; ++i) {
            const PluginField& field = fields.fields[i];
            const size_t item = field.type == PluginFieldType::kINT64  ? 8
                                : field.type == PluginFieldType::kCHAR ? 1
                                                                       : 4;
            const char* from = static_cast<const char*>(field.data);
            names_.emplace_back(field.name);
            data_.emplace_back(from, from + item * static_cast<size_t>(field.length));
            fields_.push_back({names_.back().c_str(), data_.back().data(), field.type, field.length});
        }
    }
    PluginFieldCollection collection() const { return {static_cast<int32_t>(fields_.size()), fields_.data()}; }

  private:
    std::vector<std::string> names_;
    std::vector<std::vector<char>> data_;
    std::vector<PluginField> fields_;
};

Dims dims_of(const std::vector<int64_t>& extents) {
    Dims dims{static_cast<int32_t>(extents.size()), {}};
    std::copy(extents.begin(), extents.end(), dims.d);
    return dims;
}

PluginTensorDesc desc_of(const Tensor& tensor) {
    return {dims_of(tensor.extents), tensor.type, TensorFormat::kLINEAR, 1.0f};
}

// The first extent of these tensors follows from the number of tokens, which varies as an engine runs.
bool follows_tokens(int op, size_t position, size_t inputs) {
    if (op == 1) {
        return (position < 4 && position != 2) || position == inputs;
    }
    return !(op == 0 && position == inputs + 1);
}

std::string text_of(const Dims& dims) {
    std::string text = "[";
    for (int32_t d = 0; d < dims.nbDims; ++d) {
        text += (d == 0 ? "" : ", ") + std::to_string(dims.d[d]);
    }
    return text + "]";
}

// The C interface's number of a type.
int type_code(DataType type) {
    switch (type) {
        case DataType::kFLOAT: return SHUNTYARD_FP32;
        case DataType::kHALF: return SHUNTYARD_FP16;
        case DataType::kBF16: return SHUNTYARD_BF16;
        case DataType::kFP8: return SHUNTYARD_E4M3;
        default: return SHUNTYARD_INT4;
    }
}

template <typename Capability>
Capability* capability(IPluginV3& plugin, PluginCapabilityType type) {
    return static_cast<Capability*>(plugin.getCapabilityInterface(type));
}

}  // namespace

Library::Library(const std::string& path) : handle_(dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL)) {
    if (handle_ == nullptr) {
        throw std::runtime_error(dlerror());
    }
    auto* get_creators = reinterpret_cast<IPluginCreatorInterface* const* (*)(int32_t&)>(dlsym(handle_, "getCreators"));
    if (get_creators == nullptr) {
        throw std::runtime_error(path + " has no getCreators: it is no plugin library");
    }
    int32_t count = 0;
    IPluginCreatorInterface* const* found = get_creators(count);
    for (int32_t i = 0; i < count; ++i) {
        if (std::strcmp(found[i]->getInterfaceInfo().kind, "PLUGIN CREATOR_V3ONE") == 0) {
            creators_.push_back(static_cast<IPluginCreatorV3One*>(found[i]));
        }
    }
}

IPluginCreatorV3One* Library::creator_of(const std::string& name) const {
    for (IPluginCreatorV3One* creator : creators_) {
        if (name == creator->getPluginName()) {
            return creator;
        }
    }
    return nullptr;
}

std::string Library::build_info() const {
    auto* info = reinterpret_cast<const char* (*)()>(dlsym(handle_, "shuntyard_build_info"));
    return info == nullptr ? "" : info();
}

std::vector<int32_t> Library::tactics_of(const Case& made) const {
    auto* ask =
        reinterpret_cast<decltype(&shuntyard_moe_experts_tactics)>(dlsym(handle_, "shuntyard_moe_experts_tactics"));
    if (made.op != 1 || ask == nullptr) {
        return {};
    }
    constexpr size_t kFirstWeight = 4;  // behind x, scores, expert_offsets and permutation
    const bool fused = made.layout == "fused", linear = made.layout == "linear";
    const size_t count = (linear ? 3 : 2) * (fused ? 1 : static_cast<size_t>(made.experts));
    const bool scaled = made.inputs.size() > kFirstWeight + count, is_static = made.activations == "static";
    bool each_one = true;
    for (size_t i = kFirstWeight + count; i < std::min(made.inputs.size(), kFirstWeight + 2 * count); ++i) {
        each_one = each_one && made.inputs[i].elements() == 1;
    }
    const Tensor &x = made.inputs[0], &down = made.inputs[kFirstWeight + count - 1];
    int64_t intermediate = down.extents.at(fused || linear ? 1 : 0);
    intermediate *= made.group_size > 0 ? 8 : 1;
    const std::vector<const void*> somewhere(count, &made);
    const shuntyard_expert_weights weights = {fused    ? SHUNTYARD_FUSED
                                              : linear ? SHUNTYARD_LINEAR
                                                       : SHUNTYARD_SPLIT,
                                              type_code(down.type),
                                              !scaled               ? SHUNTYARD_UNSCALED
                                              : made.group_size > 0 ? SHUNTYARD_PER_GROUP
                                              : each_one            ? SHUNTYARD_PER_TENSOR
                                                                    : SHUNTYARD_PER_CHANNEL,
                                              scaled ? type_code(made.inputs[kFirstWeight + count].type) : 0,
                                              made.group_size,
                                              somewhere.data(),
                                              scaled ? somewhere.data() : nullptr,
                                              is_static                       ? SHUNTYARD_STATIC
                                              : made.activations == "dynamic" ? SHUNTYARD_DYNAMIC
                                                                              : SHUNTYARD_AS_THEY_ARE,
                                              is_static ? type_code(made.inputs.back().type) : 0,
                                              is_static ? somewhere.data() : nullptr};
    std::vector<int32_t> found(SHUNTYARD_LAST_TACTIC);
    const int has = ask(type_code(x.type), &weights, x.extents.at(0), made.experts, made.top_k, x.extents.at(1),
                        intermediate, found.data());
    found.resize(static_cast<size_t>(std::max(0, has)));
    return found;
}

std::string Library::name_of(int32_t tactic) const {
    auto* ask = reinterpret_cast<decltype(&shuntyard_tactic_name)>(dlsym(handle_, "shuntyard_tactic_name"));
    return ask == nullptr || tactic > SHUNTYARD_LAST_TACTIC ? std::to_string(tactic) : ask(tactic);
}

std::string Session::open(const Library& library, const Case& made) {
    IPluginCreatorV3One* creator = library.creator_of(kOpNames[made.op]);
    if (creator == nullptr) {
        return std::string("the library has no plugin ") + kOpNames[made.op];
    }
    const int64_t top_k = made.top_k, experts = made.experts, group_size = made.group_size;
    const auto integer = [](const char* name, const int64_t& value) {
        return PluginField{name, &value, PluginFieldType::kINT64, 1};
    };
    const auto text = [](const char* name, const std::string& value) {
        return PluginField{name, value.c_str(), PluginFieldType::kCHAR, static_cast<int32_t>(value.size())};
    };
    std::vector<PluginField> fields = {integer("top_k", top_k)};
    if (made.op == 1) {
        fields.insert(fields.end(), {integer("experts", experts), text("layout", made.layout),
                                     integer("group_size", group_size), text("activations", made.activations)});
    }
    const PluginFieldCollection collection{static_cast<int32_t>(fields.size()), fields.data()};
    std::unique_ptr<IPluginV3> plugin(creator->createPlugin("conformance", &collection, TensorRTPhase::kBUILD));
    if (plugin == nullptr) {
        return "createPlugin gives nothing while building";
    }
    std::string wrong = build(*plugin, made);
    for (const int32_t tactic : library.tactics_of(made)) {
        if (std::count(tactics_.begin(), tactics_.end(), tactic) == 0) {
            tactics_.push_back(tactic);
        }
    }
    if (wrong.empty()) {
        wrong = load(*creator, *plugin);
    }
    if (wrong.empty() && runtime_->onShapeChange(descs_.data(), inputs_, descs_.data() + inputs_, outputs_) != 0) {
        wrong = "onShapeChange fails";
    }
    return wrong;
}

std::string Session::build(IPluginV3& plugin, const Case& made) {
    auto* build = capability<IPluginV3OneBuild>(plugin, PluginCapabilityType::kBUILD);
    if (build == nullptr) {
        return "there is no build capability";
    }
    descs_.clear();
    std::vector<DynamicPluginTensorDesc> dynamic;
    std::vector<DataType> types;
    std::vector<std::unique_ptr<Dimension>> extents;
    std::vector<DimsExprs> shapes;
    inputs_ = static_cast<int32_t>(made.inputs.size());
    outputs_ = static_cast<int32_t>(made.outputs.size());
    for (int32_t i = 0; i < inputs_ + outputs_; ++i) {
        const size_t position = static_cast<size_t>(i);
        const Tensor& tensor = i < inputs_ ? static_cast<const Tensor&>(made.inputs[position])
                                           : made.outputs[position - made.inputs.size()];
        descs_.push_back(desc_of(tensor));
        DynamicPluginTensorDesc desc{descs_.back(), descs_.back().dims, descs_.back().dims, descs_.back().dims};
        if (follows_tokens(made.op, position, made.inputs.size()) && desc.desc.dims.nbDims > 0) {
            desc.desc.dims.d[0] = -1;
            desc.min.d[0] = 0;
        }
        dynamic.push_back(desc);
        if (i < inputs_) {
            types.push_back(tensor.type);
            DimsExprs shape{desc.desc.dims.nbDims, {}};
            for (int32_t d = 0; d < shape.nbDims; ++d) {
                extents.push_back(std::make_unique<Dimension>(tensor.extents[static_cast<size_t>(d)]));
                shape.d[d] = extents.back().get();
            }
            shapes.push_back(shape);
        }
    }
    if (build->getNbOutputs() != outputs_) {
        return "getNbOutputs is " + std::to_string(build->getNbOutputs()) + ", must be " + std::to_string(outputs_);
    }
    std::vector<DataType> output_types(made.outputs.size());
    if (build->getOutputDataTypes(output_types.data(), outputs_, types.data(), inputs_) != 0) {
        return "getOutputDataTypes fails";
    }
    Builder builder;
    std::vector<DimsExprs> output_shapes(made.outputs.size());
    if (build->getOutputShapes(shapes.data(), inputs_, nullptr, 0, output_shapes.data(), outputs_, builder) != 0) {
        return "getOutputShapes fails";
    }
    for (size_t i = 0; i < made.outputs.size(); ++i) {
        Dims dims{output_shapes[i].nbDims, {}};
        for (int32_t d = 0; d < dims.nbDims; ++d) {
            dims.d[d] = output_shapes[i].d[d]->getConstantValue();
        }
        const Dims& must = descs_[made.inputs.size() + i].dims;
        if (output_types[i] != made.outputs[i].type || text_of(dims) != text_of(must)) {
            return "output " + std::to_string(i) + " is announced as " + text_of(dims) + " of type " +
                   std::to_string(static_cast<int>(output_types[i])) + ", must be " + text_of(must) + " of type " +
                   std::to_string(static_cast<int>(made.outputs[i].type));
        }
    }
    for (int32_t i = 0; i < inputs_ + outputs_; ++i) {
        if (!build->supportsFormatCombination(i, dynamic.data(), inputs_, outputs_)) {
            return "supportsFormatCombination refuses tensor " + std::to_string(i);
        }
    }
    const DynamicPluginTensorDesc *in = dynamic.data(), *out = in + inputs_;
    if (build->configurePlugin(in, inputs_, out, outputs_) != 0) {
        return "configurePlugin fails";
    }
    workspace_size_ = build->getWorkspaceSize(in, inputs_, out, outputs_);
    std::vector<int32_t> offered(static_cast<size_t>(std::max(0, build->getNbTactics())));
    if (!offered.empty() && build->getValidTactics(offered.data(), static_cast<int32_t>(offered.size())) != 0) {
        return "getValidTactics fails";
    }
    tactics_ = {0};
    for (const int32_t tactic : offered) {
        if (tactic <= 0 || std::count(tactics_.begin(), tactics_.end(), tactic) != 0) {
            return "tactic " + std::to_string(tactic) + " is offered, which is not above 0, or twice";
        }
        tactics_.push_back(tactic);
    }
    return {};
}

std::string Session::load(IPluginCreatorV3One& creator, IPluginV3& built) {
    auto* runtime = capability<IPluginV3OneRuntime>(built, PluginCapabilityType::kRUNTIME);
    const PluginFieldCollection* fields = runtime == nullptr ? nullptr : runtime->getFieldsToSerialize();
    if (fields == nullptr) {
        return "there is no runtime capability, or it stores nothing";
    }
    const Stored stored(*fields);
    const PluginFieldCollection collection = stored.collection();
    loaded_.reset(creator.createPlugin("conformance", &collection, TensorRTPhase::kRUNTIME));
    if (loaded_ == nullptr) {
        return "createPlugin gives nothing from what getFieldsToSerialize has stored";
    }
    runtime = capability<IPluginV3OneRuntime>(*loaded_, PluginCapabilityType::kRUNTIME);
    attached_.reset(runtime == nullptr ? nullptr : runtime->attachToContext(nullptr));
    runtime_ =
        attached_ == nullptr ? nullptr : capability<IPluginV3OneRuntime>(*attached_, PluginCapabilityType::kRUNTIME);
    return runtime_ == nullptr ? "attachToContext gives nothing" : "";
}

std::string Session::set_tactic(int32_t tactic) {
    if (runtime_->setTactic(tactic) != 0) {
        return "setTactic fails";
    }
    return runtime_->onShapeChange(descs_.data(), inputs_, descs_.data() + inputs_, outputs_) == 0
               ? ""
               : "onShapeChange fails";
}

bool Session::enqueue(const void* const* inputs, void* const* outputs, void* workspace, void* stream) {
    return runtime_->enqueue(descs_.data(), descs_.data() + inputs_, inputs, outputs, workspace,
                             static_cast<cudaStream_t>(stream)) == 0;
}

}  // namespace conformance
