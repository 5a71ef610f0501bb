// The experts' plugin in full, where kernels run on the host.
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <map>

#include "forms.h"

using namespace nvinfer1;

namespace {

// Weights that every format holds exactly: half of a small integer.
int integer(int part, int e, int in, int out) { return (part * 5 + e * 3 + in * 7 + out * 11) % 15 - 7; }

// The bits of a small integer in E4M3: 4 exponent bits with bias 7, 3 mantissa bits.
uint8_t e4m3(int value) {
    int exponent;
    const float mantissa = std::frexp(static_cast<float>(std::abs(value)), &exponent);  // 0.5 <= mantissa < 1
    const int code = value == 0 ? 0 : (exponent - 1 + 7) << 3 | static_cast<int>(mantissa * 16 - 8);
    return static_cast<uint8_t>(code | (value < 0 ? 0x80 : 0));
}

// The bytes of one weight: a matrix [in, out] of an expert, or several side by side or stacked.
std::string weight_bytes(const Form& form, const Extents& extents, int part, int e) {
    const bool linear = std::strcmp(form.layout, "linear") == 0, stacked = extents.size() == 3;
    const int64_t rows = extents[extents.size() - 2];
    const int64_t columns = extents.back() * (form.type == kI32 ? 8 : 1);
    std::string bytes;
    uint32_t word = 0;
    for (int64_t i = 0; i < (stacked ? extents[0] : 1) * rows * columns; ++i) {
        const int64_t row = i / columns % rows, column = i % columns;
        int own_part = part;
        int64_t in = linear ? column : row, out = linear ? row : column;
        if (!linear && part == 0 && out >= columns / 2) {  // up stands behind gate
            own_part = 1;
            out -= columns / 2;
        }
        const int value = integer(own_part, stacked ? static_cast<int>(i / columns / rows) : e, static_cast<int>(in),
                                  static_cast<int>(out));
        const float real = static_cast<float>(value) * 0.5f;
        if (form.type == kFp8) {
            bytes += static_cast<char>(e4m3(value));
        } else if (form.type == kF32) {
            bytes.append(reinterpret_cast<const char*>(&real), sizeof(real));
        } else {
            word |= static_cast<uint32_t>(value + 8) << 4 * (i % 8);
            if (i % 8 == 7) {
                bytes.append(reinterpret_cast<const char*>(&word), sizeof(word));
                word = 0;
            }
        }
    }
    return bytes;
}

std::vector<float> rows_of(const Form& form) {
    IPluginV3* plugin = create(form, 2);
    Tensors tensors(form);
    std::vector<float> x(3 * 16), scores = {0.5f, 0.25f, 1, 1, 0.75f, 0.125f}, rows(6 * 16);
    for (size_t i = 0; i < x.size(); ++i) {
        x[i] = static_cast<float>(i % 13) * 0.125f - 0.75f;
    }
    const std::vector<int32_t> offsets = {0, 2, 6}, permutation = {1, 4, 0, 2, 3, 5};
    std::vector<std::string> kept;
    const bool linear = std::strcmp(form.layout, "linear") == 0;
    const size_t each = std::strcmp(form.layout, "fused") == 0 ? 1 : 2;
    for (size_t i = 0; i < form.weights.size(); ++i) {
        const int part = static_cast<int>(i / each);
        kept.push_back(weight_bytes(form, form.weights[i], linear || part == 0 ? part : 2, static_cast<int>(i % each)));
    }
    for (const Extents& extents : form.scales) {
        int64_t count = 1;
        for (int64_t extent : extents) {
            count *= extent;
        }
        const std::vector<float> scale(count, 0.5f);
        kept.emplace_back(reinterpret_cast<const char*>(scale.data()), count * sizeof(float));
    }
    for (size_t i = 0; i < form.activation_scales.size(); ++i) {
        const bool of_inputs = i / each + 1 < form.weights.size() / each;  // else of hidden rows, which are larger
        const float scale = of_inputs ? 1.0f / 64 : 2.0f;
        kept.emplace_back(reinterpret_cast<const char*>(&scale), sizeof(scale));
    }
    std::vector<const void*> inputs = {x.data(), scores.data(), offsets.data(), permutation.data()};
    std::vector<PluginTensorDesc> descs;
    std::vector<DynamicPluginTensorDesc> dynamic;
    for (const std::string& bytes : kept) {
        inputs.push_back(bytes.data());
    }
    for (size_t i = 0; i < tensors.types.size(); ++i) {
        descs.push_back(tensor_of(tensors.types[i], tensors.extents[i]));
        dynamic.push_back(dynamic_of(tensors.types[i], tensors.extents[i], tensors.extents[i]));
    }
    const int32_t n = tensors.inputs;
    std::vector<char> workspace(build_of(plugin)->getWorkspaceSize(dynamic.data(), n, dynamic.data() + n, 1));
    void* outputs[] = {rows.data()};
    CHECK(runtime_of(plugin)->onShapeChange(descs.data(), n, descs.data() + n, 1) == 0);
    CHECK(runtime_of(plugin)->enqueue(descs.data(), descs.data() + n, inputs.data(), outputs, workspace.data(),
                                      nullptr) == 0);
    delete plugin;
    return rows;
}

}  // namespace

// The same numbers in every form of weights give the same rows, and those are right.
void experts_run_on_host() {
    const std::vector<float> expected = rows_of(forms()[0]);
    std::map<std::string, std::vector<float>> first = {{"none", expected}};
    float largest = 0;
    for (float value : expected) {
        largest = std::fmax(largest, std::fabs(value));
    }
    for (const Form& form : forms()) {
        const std::vector<float> rows = rows_of(form);
        CHECK(rows == first.emplace(form.activations, rows).first->second);
        for (size_t i = 0; i < rows.size(); ++i) {  // quantised rows are near, but not the same
            CHECK(std::fabs(rows[i] - expected[i]) < 0.05f * largest);
        }
    }
    CHECK(first.size() == 3 && first["static"] != expected && first["dynamic"] != expected);
    // Row 3 holds slot 2, which is token 1, of expert 1; its score is 1.
    for (int column = 0; column < 16; ++column) {
        double sum = 0;
        for (int f = 0; f < 24; ++f) {
            double gate = 0, up = 0;
            for (int h = 0; h < 16; ++h) {
                const double value = (16 + h) % 13 * 0.125 - 0.75;
                gate += value * integer(0, 1, h, f) * 0.5;
                up += value * integer(1, 1, h, f) * 0.5;
            }
            sum += gate / (1 + std::exp(-gate)) * up * integer(2, 1, f, column) * 0.5;
        }
        CHECK(std::fabs(expected[3 * 16 + column] - sum) < 1e-4 * (1 + std::fabs(sum)));
    }
}
