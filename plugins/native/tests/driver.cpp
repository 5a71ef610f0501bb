// Plays TensorRT's part against a plugin library, through the interface as abi/ declares it:
//
//   driver <library> host     the kernels run on the host: a whole call is made and its result checked
//   driver <library> absent   there are no kernels: all but enqueue works, and enqueue says why
#include <dlfcn.h>

#include <cmath>
#include <cstring>

#include "check.h"

using namespace nvinfer1;

namespace {

constexpr DataType kF32 = DataType::kFLOAT;
constexpr DataType kI32 = DataType::kINT32;

std::vector<IPluginCreatorV3One*> creators;
void (*set_logger_finder)(void*);

IPluginCreatorV3One* creator_of(const std::string& name) {
    for (IPluginCreatorV3One* creator : creators) {
        if (name == creator->getPluginName()) {
            return creator;
        }
    }
    std::printf("no creator of %s\n", name.c_str());
    std::exit(1);
}

IPluginV3* create(const std::string& name, const std::vector<PluginField>& fields,
                  TensorRTPhase phase = TensorRTPhase::kBUILD) {
    const PluginFieldCollection collection{static_cast<int32_t>(fields.size()), fields.data()};
    return creator_of(name)->createPlugin("a node", &collection, phase);
}

IPluginV3* create(const std::string& name, int64_t top_k) {
    return create(name, {{"top_k", &top_k, PluginFieldType::kINT64, 1}});
}

IPluginV3OneCore* core_of(IPluginV3* plugin) {
    return static_cast<IPluginV3OneCore*>(plugin->getCapabilityInterface(PluginCapabilityType::kCORE));
}
IPluginV3OneBuild* build_of(IPluginV3* plugin) {
    return static_cast<IPluginV3OneBuild*>(plugin->getCapabilityInterface(PluginCapabilityType::kBUILD));
}
IPluginV3OneRuntime* runtime_of(IPluginV3* plugin) {
    return static_cast<IPluginV3OneRuntime*>(plugin->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
}

void logger() {
    Finder10 ten;
    set_logger_finder(&ten);
    CHECK(create("ShuntyardMoeRouting", 0) == nullptr);
    CHECK(says("10 error [shuntyard] ShuntyardMoeRouting 'a node': attribute top_k is 0, must be at least 1"));
    static Finder11 eleven;
    set_logger_finder(&eleven);
    CHECK(create("ShuntyardMoeRouting", 0) == nullptr);
    CHECK(says("11 error [shuntyard] ShuntyardMoeRouting 'a node': attribute top_k is 0, must be at least 1"));
}

void identity() {
    CHECK(creators.size() == 3);
    for (IPluginCreatorV3One* creator : creators) {
        CHECK(std::strcmp(creator->getInterfaceInfo().kind, "PLUGIN CREATOR_V3ONE") == 0);
        CHECK(std::strcmp(creator->getPluginNamespace(), "shuntyard") == 0);
        CHECK(std::strcmp(creator->getPluginVersion(), "1") == 0);
        CHECK(creator->getFieldNames()->nbFields == 1);
        CHECK(std::strcmp(creator->getFieldNames()->fields[0].name, "top_k") == 0);
        IPluginV3* plugin = create(creator->getPluginName(), 1);
        IPluginV3* copy = plugin->clone();
        delete plugin;
        CHECK(std::strcmp(core_of(copy)->getPluginName(), creator->getPluginName()) == 0);
        delete copy;
    }
}

void attributes() {
    const int32_t narrow = 2;
    const int64_t wide = 2, huge = int64_t{1} << 40;
    const float real = 2;
    IPluginV3* plugin = create("ShuntyardMoeRouting", {{"top_k", &narrow, PluginFieldType::kINT32, 1}});
    CHECK(plugin != nullptr);
    delete plugin;
    CHECK(create("ShuntyardMoeRouting", std::vector<PluginField>{}) == nullptr);
    CHECK(says("top_k is missing"));
    CHECK(create("ShuntyardMoeRouting", {{"top_k", &real, PluginFieldType::kFLOAT32, 1}}) == nullptr);
    CHECK(says("top_k must be one integer"));
    CHECK(create("ShuntyardMoeRouting", {{"top_k", &wide, PluginFieldType::kINT64, 2}}) == nullptr);
    CHECK(says("top_k must be one integer"));
    CHECK(create("ShuntyardMoeRouting", {{"top_k", nullptr, PluginFieldType::kINT64, 1}}) == nullptr);
    CHECK(says("top_k must be one integer"));
    CHECK(create("ShuntyardMoeRouting", huge) == nullptr);
    CHECK(says("top_k is 1099511627776"));
    CHECK(creator_of("ShuntyardMoeRouting")->createPlugin("a node", nullptr, TensorRTPhase::kBUILD) == nullptr);
    CHECK(says("top_k is missing"));
}

void storage() {
    IPluginV3* plugin = create("ShuntyardMoeExperts", 3);
    const PluginFieldCollection* stored = runtime_of(plugin)->getFieldsToSerialize();
    CHECK(stored->nbFields == 2);
    std::vector<PluginField> fields(stored->fields, stored->fields + stored->nbFields);
    IPluginV3* again = create("ShuntyardMoeExperts", fields, TensorRTPhase::kRUNTIME);
    CHECK(again != nullptr);
    IPluginV3* attached = runtime_of(again)->attachToContext(nullptr);
    const PluginFieldCollection* kept = runtime_of(attached)->getFieldsToSerialize();
    CHECK(std::strcmp(kept->fields[1].name, "top_k") == 0);
    CHECK(*static_cast<const int32_t*>(kept->fields[1].data) == 3);
    const int32_t future = 2;
    fields[0].data = &future;
    CHECK(create("ShuntyardMoeExperts", fields, TensorRTPhase::kRUNTIME) == nullptr);
    CHECK(says("the engine holds format 2 of this plugin, this library reads format 1"));
    CHECK(create("ShuntyardMoeExperts", {fields[1]}, TensorRTPhase::kRUNTIME) == nullptr);
    CHECK(says("format_version is missing"));
    delete attached;
    delete again;
    delete plugin;
}

void shapes_and_types() {
    IPluginV3* plugin = create("ShuntyardMoeRouting", 2);
    IPluginV3OneBuild* build = build_of(plugin);
    Dimension tokens("T"), experts(16), one(1);
    const DimsExprs logits{2, {&tokens, &experts}}, narrow{2, {&tokens, &one}}, flat{1, {&tokens}};
    DimsExprs outputs[3];
    Builder builder;
    CHECK(build->getOutputShapes(&logits, 1, nullptr, 0, outputs, 3, builder) == 0);
    CHECK(text_of(outputs[0]) == "T*2");
    CHECK(text_of(outputs[1]) == "16+1");
    CHECK(text_of(outputs[2]) == "T*2");
    CHECK(build->getOutputShapes(&narrow, 1, nullptr, 0, outputs, 3, builder) != 0);
    CHECK(says("top_k is 2, but there are only 1 experts"));
    CHECK(build->getOutputShapes(&flat, 1, nullptr, 0, outputs, 3, builder) != 0);
    CHECK(says("logits has rank 1, must have rank 2"));
    CHECK(build->getOutputShapes(&flat, 1, nullptr, 0, outputs, 2, builder) != 0);
    CHECK(says("takes 1 inputs and gives 3, not 1 and 2"));
    DataType types[3];
    CHECK(build->getOutputDataTypes(types, 3, &kF32, 1) == 0);
    CHECK(types[0] == kF32 && types[1] == kI32 && types[2] == kI32);
    const DataType half = DataType::kHALF;
    CHECK(build->getOutputDataTypes(types, 3, &half, 1) != 0);
    CHECK(says("logits is fp16, must be fp32"));
    delete plugin;
}

// Every combination of types is asked for, position by position, as the builder does.
void formats() {
    IPluginV3* plugin = create("ShuntyardMoeExperts", 1);
    const DataType floats[] = {DataType::kFLOAT, DataType::kHALF, DataType::kBF16};
    const auto accepted = [&](std::vector<DataType> types, TensorFormat format) {
        std::vector<DynamicPluginTensorDesc> tensors;
        for (DataType type : types) {
            tensors.push_back(dynamic_of(type, {}, {}));
            tensors.back().desc.format = format;
        }
        bool all = true;
        for (int32_t position = 0; position < 7; ++position) {
            all = all && build_of(plugin)->supportsFormatCombination(position, tensors.data(), 6, 1);
        }
        return all;
    };
    for (DataType x : floats) {
        for (DataType w : floats) {
            CHECK(accepted({x, kF32, kI32, kI32, w, w, x}, TensorFormat::kLINEAR));
            CHECK(!accepted({x, kF32, kI32, kI32, w, w, x}, static_cast<TensorFormat>(1)));
            CHECK(!accepted({x, kF32, DataType::kINT64, kI32, w, w, x}, TensorFormat::kLINEAR));
            CHECK(!accepted({x, DataType::kHALF, kI32, kI32, w, w, x}, TensorFormat::kLINEAR));
            for (DataType other : floats) {
                CHECK(accepted({x, kF32, kI32, kI32, w, w, other}, TensorFormat::kLINEAR) == (other == x));
                CHECK(accepted({x, kF32, kI32, kI32, w, other, x}, TensorFormat::kLINEAR) == (other == w));
            }
        }
    }
    CHECK(!accepted({kF32, kF32, kI32, kI32, DataType::kINT8, DataType::kINT8, kF32}, TensorFormat::kLINEAR));
    delete plugin;
}

void inconsistent_shapes() {
    IPluginV3* plugin = create("ShuntyardMoeExperts", 2);
    // T 3, K 2, H 4, E 5, F 6
    std::vector<std::vector<int64_t>> extents = {{3, 4}, {6}, {6}, {6}, {5, 4, 12}, {5, 6, 4}, {6, 4}};
    const DataType types[] = {kF32, kF32, kI32, kI32, kF32, kF32, kF32};
    const auto change = [&](size_t tensor, size_t d, int64_t value) {
        std::vector<PluginTensorDesc> tensors;
        std::vector<DynamicPluginTensorDesc> dynamic;
        for (size_t i = 0; i < extents.size(); ++i) {
            std::vector<int64_t> changed = extents[i];
            if (i == tensor) {
                changed[d] = value;
            }
            tensors.push_back(tensor_of(types[i], changed));
            dynamic.push_back(dynamic_of(types[i], changed, changed));
        }
        const int32_t shape = runtime_of(plugin)->onShapeChange(tensors.data(), 6, tensors.data() + 6, 1);
        const int32_t configured = build_of(plugin)->configurePlugin(dynamic.data(), 6, dynamic.data() + 6, 1);
        CHECK((shape == 0) == (configured == 0));
        return shape;
    };
    CHECK(change(0, 0, 3) == 0);
    CHECK(logged.empty());
    CHECK(change(1, 0, 7) != 0);
    CHECK(says("ShuntyardMoeExperts: permutation has extent 6 in dimension 0, but another tensor says that T*K is 7"));
    CHECK(change(2, 0, 7) != 0);
    CHECK(says("an extent that must be E+1 (K is 2) is 7, but E is 5"));
    CHECK(change(0, 0, 4) != 0);
    CHECK(says("an extent that must be T*K (K is 2) is 6, but T is 4"));
    CHECK(change(4, 2, 13) != 0);
    CHECK(says("an extent that must be 2F (K is 2) is 13, but F is 6"));
    for (size_t tensor = 0; tensor < extents.size(); ++tensor) {
        for (size_t d = 0; d < extents[tensor].size(); ++d) {
            CHECK(change(tensor, d, 17) != 0);
            CHECK(says("ShuntyardMoeExperts: "));
        }
    }
    delete plugin;
}

// Returns enqueue's result; out is what scatter-add made of routing's permutation.
int32_t call(std::vector<float>& out) {
    IPluginV3* plugin = create("ShuntyardMoeRouting", 1);
    const std::vector<float> logits = {0, 3, 1, 5, 2, 5, -1, -2, 0};  // experts 1, 0, 2
    const PluginTensorDesc in = tensor_of(kF32, {3, 3});
    const PluginTensorDesc made[] = {tensor_of(kF32, {3}), tensor_of(kI32, {4}), tensor_of(kI32, {3})};
    std::vector<float> scores(3);
    std::vector<int32_t> offsets(4), permutation(3);
    const DynamicPluginTensorDesc largest = dynamic_of(kF32, {-1, 3}, {3, 3});
    const DynamicPluginTensorDesc largest_made[] = {dynamic_of(kF32, {-1}, {3}), dynamic_of(kI32, {4}, {4}),
                                                    dynamic_of(kI32, {-1}, {3})};
    std::vector<char> workspace(build_of(plugin)->getWorkspaceSize(&largest, 1, largest_made, 3));
    const void* inputs[] = {logits.data()};
    void* outputs[] = {scores.data(), offsets.data(), permutation.data()};
    CHECK(runtime_of(plugin)->onShapeChange(&in, 1, made, 3) == 0);
    const int32_t status = runtime_of(plugin)->enqueue(&in, made, inputs, outputs, workspace.data(), nullptr);
    delete plugin;
    out = scores;
    out.insert(out.end(), offsets.begin(), offsets.end());
    out.insert(out.end(), permutation.begin(), permutation.end());
    return status;
}

void runs_on_host() {
    std::vector<float> out;
    CHECK(call(out) == 0);
    CHECK(std::fabs(out[0] - 1 / (1 + std::exp(-5.0f))) < 1e-6f);
    CHECK(std::vector<float>(out.begin() + 3, out.end()) == std::vector<float>({0, 1, 2, 3, 1, 0, 2}));
}

void says_why_it_does_not_run() {
    std::vector<float> out;
    CHECK(call(out) != 0);
    CHECK(says("11 error [shuntyard] ShuntyardMoeRouting: does not run: this library was built without CUDA kernels"));
}

}  // namespace

int main(int, char** arguments) {
    void* library = dlopen(arguments[1], RTLD_NOW);
    if (library == nullptr) {
        std::printf("%s\n", dlerror());
        return 1;
    }
    set_logger_finder = reinterpret_cast<void (*)(void*)>(dlsym(library, "setLoggerFinder"));
    const auto get_creators =
        reinterpret_cast<IPluginCreatorInterface* const* (*)(int32_t&)>(dlsym(library, "getCreators"));
    int32_t count = 0;
    IPluginCreatorInterface* const* list = get_creators(count);
    for (int32_t i = 0; i < count; ++i) {
        creators.push_back(static_cast<IPluginCreatorV3One*>(list[i]));
    }
    logger();
    identity();
    attributes();
    storage();
    shapes_and_types();
    formats();
    inconsistent_shapes();
    if (std::strcmp(arguments[2], "host") == 0) {
        runs_on_host();
    } else {
        says_why_it_does_not_run();
    }
    std::printf("all is well\n");
    return 0;
}
