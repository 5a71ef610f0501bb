// The experts on Hopper, from a call to its launches: rows and descriptors; gate and up; hidden rows as codes, if each
// makes its own scale; down.
#include "kernels/hopper.h"

#include "kernels/experts.h"
#include "kernels/tensor_maps.h"

namespace shuntyard {
namespace {

constexpr int64_t kPitch = 16;  // bytes: TMA's pitches are multiples of it, and its addresses (on_16_bytes)

// How rows and weights meet in a product.
enum class Form {
    kNone,   // there are no kernels
    kSame,   // both of X
    kCodes,  // both of E4M3
    kMixed,  // rows of X, weights of E4M3 or INT4
};

Form form_of(const Experts& call) {
    if (call.x_type == SHUNTYARD_FP32) {
        return Form::kNone;
    }
    if (call.weight_type == call.x_type) {
        return Form::kSame;
    }
    // FP8 operands lie along K (PTX ISA, wgmma: no transposition), and so do weights that become 16-bit on their way.
    if (call.layout != SHUNTYARD_LINEAR) {
        return Form::kNone;
    }
    if (call.quantised()) {
        return Form::kCodes;
    }
    const bool whole_groups = call.weight_type == SHUNTYARD_INT4 && call.matrices.gate.group % 32 == 0;
    return call.weight_type == SHUNTYARD_E4M3 || whole_groups ? Form::kMixed : Form::kNone;
}

bool is_int4(const Experts& call) { return call.weight_type == SHUNTYARD_INT4; }

// How many numbers 16 bytes of weights hold, where they become 16-bit on their way.
int chunk_of(const Experts& call) { return is_int4(call) ? 32 : 16; }

int row_bytes(Form form) { return form == Form::kCodes ? 1 : 2; }

Major major_of(const Experts& call) { return call.layout == SHUNTYARD_LINEAR ? Major::kK : Major::kN; }

// A map of rows [all_rows, width], in boxes of 64 rows by 128 bytes.
int map_rows(TensorMap& map, const Experts& call, const void* rows, int64_t width) {
    const int size = row_bytes(form_of(call));
    return encode_tensor_map(map, size, rows, width, call.all_rows, width * size, 128 / size, 64);
}

// A map of one expert's matrix [in, out], in boxes of 64 channels by 128 bytes of in, or, N-major, of 64 channels by 64
// of in.
int map_weights(TensorMap& map, const Experts& call, const Matrices& matrices, int64_t in, int64_t out) {
    const Form form = form_of(call);
    if (form == Form::kSame && major_of(call) == Major::kN) {
        return encode_tensor_map(map, 2, matrices.data[0], out, in, matrices.stride_in * 2, 64, 64);
    }
    const int size = form == Form::kSame ? 2 : 1;
    const int64_t columns = is_int4(call) ? in / 2 : in;  // INT4: bytes of two
    return encode_tensor_map(map, size, matrices.data[0], columns, out, columns * size, 128 / size, 64);
}

void copy(const void* (&to)[SHUNTYARD_MAX_EXPERTS], const void* const (&from)[SHUNTYARD_MAX_EXPERTS]) {
    memcpy(to, from, sizeof(to));
}

CodeScales scales_of(const Matrices& first, const Matrices& second, const Matrices& next) {
    CodeScales scales;
    copy(scales.weights[0], first.scales);
    copy(scales.weights[1], second.scales);
    copy(scales.rows[0], first.activation_scales);
    copy(scales.rows[1], second.activation_scales);
    copy(scales.next, next.activation_scales);
    scales.stride = first.scale_stride;
    scales.weight_type = first.scale_type;
    scales.row_type = first.activation_scale_type;
    return scales;
}

MixedScales mixed_scales_of(const Matrices& first, const Matrices& second) {
    MixedScales scales;
    copy(scales.scales[0], first.scales);
    copy(scales.scales[1], second.scales);
    scales.stride = first.scale_stride;
    scales.group = static_cast<int32_t>(first.group < INT_MAX ? first.group : INT_MAX);
    scales.type = first.scale_type;
    return scales;
}

int multiply(const Experts& call, HopperTile tile, bool pair, const HopperProduct& product) {
    const int blocks = call.device.multiprocessors;
    const ExpertMatrices& m = call.matrices;
    const bool half = call.x_type == SHUNTYARD_FP16;
    switch (form_of(call)) {
        case Form::kCodes: {
            const CodeScales scales = pair ? scales_of(m.gate, m.up, m.down) : scales_of(m.down, m.down, m.down);
            const HopperCodes codes{pair, call.activations == SHUNTYARD_STATIC};
            return launch_hopper_codes(call.x_type, tile, codes, product, scales, blocks, call.stream);
        }
        case Form::kMixed: {
            const MixedScales scales = pair ? mixed_scales_of(m.gate, m.up) : mixed_scales_of(m.down, m.down);
            const auto run = half ? launch_hopper_mixed_half : launch_hopper_mixed_bfloat;
            return run(tile, is_int4(call), pair, product, scales, blocks, call.stream);
        }
        case Form::kSame: {
            const auto run = half ? launch_hopper_half : launch_hopper_bfloat;
            return run(tile, major_of(call), pair, product, blocks, call.stream);
        }
        default: return SHUNTYARD_UNSUPPORTED_TACTIC;
    }
}

}  // namespace

bool hopper_takes(const Experts& call, HopperTile tile) {
    const Form form = form_of(call);
    if (call.device.capability != 90 || !call.device.hopper || form == Form::kNone ||
        (tile == HopperTile::kWide && form != Form::kCodes)) {
        return false;
    }
    // Whole pitches, and of rows in an order of their own, whole blocks of it.
    const int64_t unit = form == Form::kMixed ? 4 * chunk_of(call) : kPitch / row_bytes(form);
    if (call.width % unit != 0 || call.intermediate % unit != 0 || call.width > INT_MAX / 4 ||
        call.intermediate > INT_MAX / 4) {
        return false;
    }
    const bool outputs = reinterpret_cast<uintptr_t>(call.rows) % 4 == 0;
    return outputs && on_16_bytes(call.hidden) && on_16_bytes(call.maps) &&
           weights_on_16_bytes(call.matrices, call.experts);
}

int run_hopper(const Experts& call, HopperTile tile) {
    const Form form = form_of(call);
    const bool codes = form == Form::kCodes, given = call.activations == SHUNTYARD_STATIC;
    WeightMaps maps{};
    maps.maps = call.maps;
    SHUNTYARD_TRY(map_weights(maps.into, call, call.matrices.gate, call.width, call.intermediate));
    SHUNTYARD_TRY(map_weights(maps.down, call, call.matrices.down, call.intermediate, call.width));
    copy(maps.weights[0], call.matrices.gate.data);
    copy(maps.weights[1], call.matrices.up.data);
    copy(maps.weights[2], call.matrices.down.data);
    SHUNTYARD_TRY(prepare_inputs(call, &maps, form == Form::kMixed ? chunk_of(call) : 0));

    HopperProduct pair{};
    const void* const inputs = codes ? call.gate_codes : call.scaled;
    SHUNTYARD_TRY(map_rows(pair.rows, call, inputs, call.width));
    SHUNTYARD_TRY(map_rows(pair.more_rows, call, given ? call.up_codes : inputs, call.width));
    pair.maps = call.maps;
    pair.expert_offsets = call.expert_offsets;
    pair.factors = call.factors;
    pair.out = given ? call.hidden_codes : call.hidden;
    pair.all_rows = call.all_rows;
    pair.inner = call.width;
    pair.columns = call.intermediate;
    pair.experts = static_cast<int32_t>(call.experts);
    SHUNTYARD_TRY(multiply(call, tile, true, pair));

    if (call.activations == SHUNTYARD_DYNAMIC) {
        SHUNTYARD_TRY(prepare_hidden(call));
    }
    HopperProduct down = pair;
    SHUNTYARD_TRY(map_rows(down.rows, call, codes ? call.hidden_codes : call.hidden, call.intermediate));
    down.maps = call.maps + 2 * call.experts;
    down.out = call.rows;
    down.inner = call.intermediate;
    down.columns = call.width;
    return multiply(call, tile, false, down);
}

}  // namespace shuntyard
