// What driver.cpp asks of the experts' plugin: attributes, counts, types and shapes of every form of weights.
#include <cstring>

#include "forms.h"

using namespace nvinfer1;

namespace {

// Asks all of the plugin's checks of shapes; returns whether they accept.
bool accepts_shapes(IPluginV3* plugin, const Tensors& tensors) {
    std::vector<PluginTensorDesc> given;
    std::vector<DynamicPluginTensorDesc> dynamic;
    for (size_t i = 0; i < tensors.types.size(); ++i) {
        given.push_back(tensor_of(tensors.types[i], tensors.extents[i]));
        dynamic.push_back(dynamic_of(tensors.types[i], tensors.extents[i], tensors.extents[i]));
    }
    const int32_t n = tensors.inputs;
    const int32_t shape = runtime_of(plugin)->onShapeChange(given.data(), n, given.data() + n, 1);
    const int32_t configured = build_of(plugin)->configurePlugin(dynamic.data(), n, dynamic.data() + n, 1);
    CHECK((shape == 0) == (configured == 0));
    return shape == 0;
}

}  // namespace

void experts_attributes() {
    const PluginFieldCollection* names = creator_of("ShuntyardMoeExperts")->getFieldNames();
    CHECK(names->nbFields == 6);
    CHECK(std::strcmp(names->fields[5].name, "module") == 0 && names->fields[5].type == PluginFieldType::kCHAR);
    CHECK(std::strcmp(names->fields[4].name, "activations") == 0 && names->fields[4].type == PluginFieldType::kCHAR);
    CHECK(std::strcmp(names->fields[2].name, "layout") == 0 && names->fields[2].type == PluginFieldType::kCHAR);
    CHECK(create_experts(1, 0, "fused", 0) == nullptr);
    CHECK(says("attribute experts is 0, must be at least 1, and at most 512"));
    CHECK(create_experts(1, 513, "fused", 0) == nullptr);
    CHECK(says("attribute experts is 513, must be at least 1, and at most 512"));
    CHECK(create_experts(1, 2, "stacked", 0) == nullptr);
    CHECK(says("attribute layout is 'stacked', must be fused, split or linear"));
    CHECK(create_experts(1, 2, "linear", -8) == nullptr);
    CHECK(says("attribute group_size is -8, must be at least 0"));
    CHECK(create_experts(1, 2, "split", 8) == nullptr);
    CHECK(says("there is a group_size, but INT4 weights cannot come in layout split"));
    CHECK(create_experts(1, 2, "linear", 0, "each") == nullptr);
    CHECK(says("attribute activations is 'each', must be none, static or dynamic"));
    CHECK(create_experts(1, 2, "linear", 8, "dynamic") == nullptr);
    CHECK(says("there is a group_size, but only FP8 weights take activations that are dynamic"));
    const int64_t one = 1;
    const auto field = [&](const char* name) { return PluginField{name, &one, PluginFieldType::kINT64, 1}; };
    const PluginField with_end{"layout", "linear\0and more", PluginFieldType::kCHAR, 7};
    const PluginField plain{"activations", "none", PluginFieldType::kCHAR, 5};
    IPluginV3* plugin =
        create("ShuntyardMoeExperts", {field("top_k"), field("experts"), with_end, field("group_size"), plain});
    CHECK(plugin != nullptr);
    delete plugin;
    CHECK(create("ShuntyardMoeExperts", {field("top_k")}) == nullptr);
    CHECK(says("attribute experts is missing"));
    CHECK(create("ShuntyardMoeExperts", {field("top_k"), field("experts")}) == nullptr);
    CHECK(says("attribute layout is missing"));
    CHECK(create("ShuntyardMoeExperts", {field("top_k"), field("experts"), field("layout")}) == nullptr);
    CHECK(says("attribute layout must be a string"));
    CHECK(create("ShuntyardMoeExperts", {field("top_k"), field("experts"), with_end}) == nullptr);
    CHECK(says("attribute group_size is missing"));
    const PluginField single{"layout", "split", PluginFieldType::kCHAR, 5};
    const int64_t none = 0;
    const PluginField ungrouped{"group_size", &none, PluginFieldType::kINT64, 1};
    CHECK(create("ShuntyardMoeExperts", {field("top_k"), field("experts"), single, ungrouped}) == nullptr);
    CHECK(says("attribute activations is missing"));
    CHECK(create("ShuntyardMoeExperts", {field("top_k"), field("experts"), single, ungrouped, field("activations")}) ==
          nullptr);
    CHECK(says("attribute activations must be a string"));
}

void experts_storage() {
    IPluginV3* plugin = create_experts(3, 200, "linear", 0, "static", "model.layers.1");
    const PluginFieldCollection* stored = runtime_of(plugin)->getFieldsToSerialize();
    CHECK(stored->nbFields == 7);
    // As an engine does it: the bytes outlive the plugin.
    std::vector<std::string> bytes;
    std::vector<PluginField> fields(stored->fields, stored->fields + stored->nbFields);
    for (PluginField& field : fields) {
        const size_t size = field.type == PluginFieldType::kCHAR ? 1 : sizeof(int32_t);
        bytes.emplace_back(static_cast<const char*>(field.data), size * field.length);
    }
    for (size_t i = 0; i < fields.size(); ++i) {
        fields[i].data = bytes[i].data();
    }
    IPluginV3* again = create("ShuntyardMoeExperts", fields, TensorRTPhase::kRUNTIME);
    CHECK(again != nullptr);
    IPluginV3* attached = runtime_of(again)->attachToContext(nullptr);
    delete plugin;
    delete again;
    const PluginFieldCollection* kept = runtime_of(attached)->getFieldsToSerialize();
    const char* const names[] = {"format_version", "top_k", "experts", "layout", "group_size", "activations", "module"};
    const char* const texts[] = {nullptr, nullptr, nullptr, "linear", nullptr, "static", "model.layers.1"};
    const int32_t values[] = {4, 3, 200, 0, 0, 0, 0};
    for (int32_t i = 0; i < 7; ++i) {
        CHECK(std::strcmp(kept->fields[i].name, names[i]) == 0);
        CHECK(texts[i] != nullptr ? std::strcmp(static_cast<const char*>(kept->fields[i].data), texts[i]) == 0
                                  : *static_cast<const int32_t*>(kept->fields[i].data) == values[i]);
    }
    CHECK(says("ShuntyardMoeExperts in the plan: model.layers.1 with activations static"));
    delete attached;
    IPluginV3* grouped = create_experts(1, 4, "linear", 128);
    CHECK(*static_cast<const int32_t*>(runtime_of(grouped)->getFieldsToSerialize()->fields[4].data) == 128);
    delete grouped;
}

void experts_counts() {
    const auto refused = [](const char* layout, int64_t group_size, int32_t inputs, const char* activations = "none") {
        IPluginV3* plugin = create_experts(1, 2, layout, group_size, activations);
        std::vector<DataType> types(inputs, kF32);
        DataType out;
        CHECK(build_of(plugin)->getOutputDataTypes(&out, 1, types.data(), inputs) != 0);
        delete plugin;
    };
    refused("fused", 0, 7);
    CHECK(says("takes 6, or with scales 8 inputs and gives 1, not 7 and 1"));
    refused("split", 0, 6);
    CHECK(says("takes 8, or with scales 12 inputs and gives 1, not 6 and 1"));
    refused("linear", 0, 17);
    CHECK(says("takes 10, or with scales 16 inputs and gives 1, not 17 and 1"));
    refused("linear", 8, 10);
    CHECK(says("takes 16 inputs and gives 1, not 10 and 1"));
    refused("fused", 0, 8, "static");
    CHECK(says("takes 10 inputs and gives 1, not 8 and 1"));
    refused("linear", 0, 16, "static");
    CHECK(says("takes 22 inputs and gives 1, not 16 and 1"));
    refused("split", 0, 8, "dynamic");
    CHECK(says("takes 12 inputs and gives 1, not 8 and 1"));
    refused("split", 0, 16, "dynamic");
    CHECK(says("takes 12 inputs and gives 1, not 16 and 1"));
}

// Every combination of types is asked for, position by position, as the builder does.
void experts_formats() {
    for (const Form& form : forms()) {
        IPluginV3* plugin = create(form, 1);
        const bool scaled = !form.scales.empty();
        const auto accepted = [&](const Tensors& tensors, int32_t spoiled = -1, DataType spoil = kF32, int layout = 0) {
            std::vector<DynamicPluginTensorDesc> all;
            std::vector<DataType> types = tensors.types;
            if (spoiled >= 0) {
                types[spoiled] = spoil;
            }
            for (DataType type : types) {
                all.push_back(dynamic_of(type, {}, {}));
                all.back().desc.format = static_cast<TensorFormat>(layout);
            }
            bool fine = true;
            for (int32_t position = 0; position <= tensors.inputs; ++position) {
                fine = fine && build_of(plugin)->supportsFormatCombination(position, all.data(), tensors.inputs, 1);
            }
            DataType out = kI32;
            const bool typed = build_of(plugin)->getOutputDataTypes(&out, 1, types.data(), tensors.inputs) == 0;
            CHECK(!typed || out == types[0]);
            CHECK(typed || says("ShuntyardMoeExperts: "));
            return fine;
        };
        const int32_t first = 4, last = first + static_cast<int32_t>(form.weights.size()) - 1;
        for (DataType x : kFloats) {
            for (DataType w : kFloats) {  // the type of plain weights, or of scales
                Tensors tensors(form, w);
                tensors.types[0] = tensors.types.back() = x;
                for (int32_t i = first; i <= last && !scaled; ++i) {
                    tensors.types[i] = w;
                }
                CHECK(accepted(tensors));
                CHECK(!accepted(tensors, -1, kF32, 1));
                CHECK(!accepted(tensors, 2, DataType::kINT64));
                CHECK(!accepted(tensors, 1, DataType::kHALF));
                const int32_t output = tensors.inputs;
                for (DataType other : kFloats) {
                    CHECK(accepted(tensors, output, other) == (other == x));
                    CHECK(accepted(tensors, output - 1, other) == (other == w));
                    CHECK(accepted(tensors, last, other) == (!scaled && other == w));
                }
                CHECK(!accepted(tensors, last, DataType::kINT8));
                CHECK(accepted(tensors, first, kFp8) == (form.type == kFp8));
                CHECK(accepted(tensors, last, kI32) == (form.type == kI32));
            }
        }
        delete plugin;
    }
    logged.clear();
    IPluginV3* plugin = create(forms()[8], 1);
    DataType out;
    Tensors tensors(forms()[8]);
    const auto refused = [&](int32_t index, DataType type) {
        std::vector<DataType> types = tensors.types;
        types[index] = type;
        CHECK(build_of(plugin)->getOutputDataTypes(&out, 1, types.data(), tensors.inputs) != 0);
    };
    refused(7, DataType::kBF16);
    CHECK(says("up of expert 1 is bf16, must be fp8, since there are scales"));
    refused(15, DataType::kBF16);
    CHECK(says("scale of down of expert 1 is bf16, must be fp32, as scale of gate of expert 0 is"));
    delete plugin;
    // Scales of activations are of one type, which need not be that of the weights' scales.
    plugin = create(forms()[14], 1);
    tensors = Tensors(forms()[14]);
    refused(21, DataType::kBF16);
    CHECK(
        says("activation scale of down of expert 1 is bf16, must be fp32, as activation scale of gate of expert 0 is"));
    refused(16, DataType::kINT8);
    CHECK(says("activation scale of gate of expert 0 is int8, must be fp32, fp16 or bf16"));
    refused(4, DataType::kBF16);
    CHECK(says("gate of expert 0 is bf16, must be fp8, since there are scales"));
    for (int32_t i = 16; i < 22; ++i) {
        tensors.types[i] = DataType::kBF16;
    }
    CHECK(build_of(plugin)->getOutputDataTypes(&out, 1, tensors.types.data(), tensors.inputs) == 0);
    delete plugin;
}

void experts_shapes() {
    for (const Form& form : forms()) {
        IPluginV3* plugin = create(form, 2);
        const Tensors right(form);
        CHECK(accepts_shapes(plugin, right));
        CHECK(logged.empty());
        for (size_t tensor = 0; tensor < right.extents.size(); ++tensor) {
            Tensors wrong = right;
            wrong.extents[tensor].push_back(3);
            CHECK(!accepts_shapes(plugin, wrong));
            CHECK(says("ShuntyardMoeExperts: "));
            for (size_t d = 0; d < right.extents[tensor].size(); ++d) {
                wrong = right;
                wrong.extents[tensor][d] = 17;
                CHECK(!accepts_shapes(plugin, wrong));
                CHECK(says("ShuntyardMoeExperts: "));
            }
        }
        // The builder may ask before the number of tokens is known.
        Dimension tokens("T"), sixteen(16), three(3), rows("R");
        std::vector<std::unique_ptr<Dimension>> constants;
        std::vector<DimsExprs> inputs = {{2, {&tokens, &sixteen}}, {1, {&rows}}, {1, {&three}}, {1, {&rows}}};
        for (int32_t i = 4; i < right.inputs; ++i) {
            DimsExprs dims{static_cast<int32_t>(right.extents[i].size()), {}};
            for (int32_t d = 0; d < dims.nbDims; ++d) {
                constants.push_back(std::make_unique<Dimension>(right.extents[i][d]));
                dims.d[d] = constants.back().get();
            }
            inputs.push_back(dims);
        }
        DimsExprs out;
        Builder builder;
        CHECK(build_of(plugin)->getOutputShapes(inputs.data(), right.inputs, nullptr, 0, &out, 1, builder) == 0);
        CHECK(text_of(out) == "R, 16");
        delete plugin;
    }
    const auto refused = [](const Form& form, size_t tensor, size_t d, int64_t extent) {
        IPluginV3* plugin = create(form, 2);
        Tensors wrong(form);
        wrong.extents[tensor][d] = extent;
        CHECK(!accepts_shapes(plugin, wrong));
        delete plugin;
    };
    refused(forms()[0], 1, 0, 7);
    CHECK(
        says("ShuntyardMoeExperts: permutation has extent 6 in dimension 0, but another tensor or an attribute says "
             "that T*K is 7"));
    refused(forms()[0], 2, 0, 7);
    CHECK(says("an extent that must be E+1 (K is 2) is 7, but E is 2"));
    refused(forms()[0], 0, 0, 4);
    CHECK(says("an extent that must be T*K (K is 2) is 6, but T is 4"));
    refused(forms()[0], 4, 2, 49);
    CHECK(says("an extent that must be 2F (K is 2) is 49, but F is 24"));
    refused(forms()[0], 5, 0, 3);
    CHECK(says("down has extent 3 in dimension 0, but another tensor or an attribute says that E is 2"));
    refused(forms()[2], 5, 1, 15);
    CHECK(says("gate of expert 1 has extent 15 in dimension 1"));
    refused(forms()[8], 11, 0, 23);
    CHECK(says("scale of gate of expert 1 has 23 elements, must have 1 or 24, and all scales alike"));
    refused(forms()[8], 11, 0, 1);
    CHECK(says("scale of gate of expert 1 has 1 elements, must have 1 or 24, and all scales alike"));
    refused(forms()[14], 16, 0, 2);
    CHECK(says("activation scale of gate of expert 0 has 2 elements, must have 1"));
    refused(forms()[9], 10, 1, 1);
    CHECK(says("scale of gate of expert 0 has 24 elements, must have 48"));
    refused(forms()[9], 4, 1, 3);
    CHECK(says("gate of expert 1 has extent 2 in dimension 1, but another tensor or an attribute says that H/8 is 3"));
    Form coarse = forms()[9];
    coarse.group_size = 16;
    IPluginV3* plugin = create(coarse, 2);
    CHECK(!accepts_shapes(plugin, Tensors(coarse)));
    CHECK(says("F is 24, must be a multiple of group_size, which is 16"));
    delete plugin;
}
