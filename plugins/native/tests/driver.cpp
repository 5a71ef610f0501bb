// Plays TensorRT's part against a plugin library, through the interface as abi/ declares it:
//
//   driver <library> host     the kernels run on the host: a whole call is made and its result checked
//   driver <library> absent   there are no kernels: all but enqueue works, and enqueue says why
#include <dlfcn.h>

#include <cmath>
#include <cstring>

#include "calls.h"
#include "check.h"

using namespace nvinfer1;

namespace {

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
        IPluginV3* plugin = std::string(creator->getPluginName()) == "ShuntyardMoeExperts"
                                ? create_experts(1, 2, "fused", 0)
                                : create(creator->getPluginName(), 1);
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
    IPluginV3* plugin = create("ShuntyardMoeScatterAdd", 3);
    const PluginFieldCollection* stored = runtime_of(plugin)->getFieldsToSerialize();
    CHECK(stored->nbFields == 2);
    std::vector<PluginField> fields(stored->fields, stored->fields + stored->nbFields);
    IPluginV3* again = create("ShuntyardMoeScatterAdd", fields, TensorRTPhase::kRUNTIME);
    CHECK(again != nullptr);
    IPluginV3* attached = runtime_of(again)->attachToContext(nullptr);
    const PluginFieldCollection* kept = runtime_of(attached)->getFieldsToSerialize();
    CHECK(std::strcmp(kept->fields[1].name, "top_k") == 0);
    CHECK(*static_cast<const int32_t*>(kept->fields[1].data) == 3);
    const int32_t future = 5;
    fields[0].data = &future;
    CHECK(create("ShuntyardMoeScatterAdd", fields, TensorRTPhase::kRUNTIME) == nullptr);
    CHECK(says("the engine holds format 5 of this plugin, this library reads format 4"));
    CHECK(create("ShuntyardMoeScatterAdd", {fields[1]}, TensorRTPhase::kRUNTIME) == nullptr);
    CHECK(says("format_version is missing"));
    delete attached;
    delete again;
    delete plugin;
}

void tactics() {
    for (IPluginCreatorV3One* creator : creators) {
        IPluginV3* plugin = std::string(creator->getPluginName()) == "ShuntyardMoeExperts"
                                ? create_experts(1, 2, "fused", 0)
                                : create(creator->getPluginName(), 1);
        // None are offered: the builder would time them on a routing of arbitrary content.
        CHECK(build_of(plugin)->getNbTactics() == 0);
        for (int32_t tactic : {0, 1, 8}) {
            CHECK(runtime_of(plugin)->setTactic(tactic) == 0);
        }
        CHECK(runtime_of(plugin)->setTactic(9) != 0);
        CHECK(says("there is no tactic 9"));
        CHECK(runtime_of(plugin)->setTactic(-1) != 0);
        CHECK(says("there is no tactic -1"));
        delete plugin;
    }
}

// Timings are kept for what they were taken of.
void timing_cache_ids() {
    std::vector<IPluginV3*> plugins = {
        create("ShuntyardMoeRouting", 1),
        create("ShuntyardMoeRouting", 2),
        create("ShuntyardMoeScatterAdd", 1),
        create_experts(1, 2, "fused", 0),
        create_experts(2, 2, "fused", 0),
        create_experts(1, 3, "fused", 0),
        create_experts(1, 2, "split", 0),
        create_experts(1, 2, "linear", 0),
        create_experts(1, 2, "linear", 8),
        create_experts(1, 2, "linear", 0, "static"),
        create_experts(1, 2, "linear", 0, "dynamic"),
    };
    std::vector<std::string> ids;
    for (IPluginV3* plugin : plugins) {
        const std::string id = build_of(plugin)->getTimingCacheID();
        CHECK(id.find("\"abi_version\": 4") != std::string::npos);
        for (const std::string& other : ids) {
            CHECK(id != other);
        }
        ids.push_back(id);
        IPluginV3* copy = plugin->clone();
        CHECK(id == build_of(copy)->getTimingCacheID());
        delete copy;
        delete plugin;
    }
    // A layer's name does not change its time.
    IPluginV3* named = create_experts(1, 2, "linear", 0, "dynamic", "model.layers.0.feed_forward.experts");
    CHECK(ids.back() == build_of(named)->getTimingCacheID());
    delete named;
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

// In experts.cpp.
void experts_attributes();
void experts_storage();
void experts_counts();
void experts_formats();
void experts_shapes();

// In experts_run.cpp.
void experts_run_on_host();

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
    tactics();
    timing_cache_ids();
    shapes_and_types();
    experts_attributes();
    experts_storage();
    experts_counts();
    experts_formats();
    experts_shapes();
    if (std::strcmp(arguments[2], "host") == 0) {
        runs_on_host();
        experts_run_on_host();
    } else {
        says_why_it_does_not_run();
    }
    std::printf("all is well\n");
    return 0;
}
