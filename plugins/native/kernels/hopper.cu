// The experts on Hopper, from a call to its launches: rows and descriptors; gate and up; hidden rows as codes, if each
// makes its own scale; down.
#include "kernels/hopper.h"

#include <initializer_list>

#include "kernels/experts.h"
#include "kernels/tensor_maps.h"

namespace shuntyard {
namespace {

constexpr int64_t kPitch = 16;  // bytes: TMA's addresses and pitches are multiples of it

bool is_codes(const Experts& call) { return call.activations != SHUNTYARD_AS_THEY_ARE; }

int element_bytes(const Experts& call) { return is_codes(call) ? 1 : 2; }

Major major_of(const Experts& call) { return call.layout == SHUNTYARD_LINEAR ? Major::kK : Major::kN; }

bool aligned_for_tma(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % kPitch == 0; }

// A map of rows [all_rows, width], in boxes of 64 rows.
int map_rows(TensorMap& map, const Experts& call, const void* rows, int64_t width) {
    const int size = element_bytes(call);
    return encode_tensor_map(map, size, rows, width, call.all_rows, width * size, 128 / size, 64);
}

// A map of one expert's matrix [in, out], in boxes of 64 columns out by 128 bytes of in, or the other way round.
int map_weights(TensorMap& map, const Experts& call, const Matrices& matrices, int64_t in, int64_t out) {
    const int size = element_bytes(call);
    if (major_of(call) == Major::kK) {
        return encode_tensor_map(map, size, matrices.data[0], in, out, matrices.stride_out * size, 128 / size, 64);
    }
    return encode_tensor_map(map, size, matrices.data[0], out, in, matrices.stride_in * size, 128 / size, 64);
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

int multiply(const Experts& call, HopperTile tile, bool pair, const HopperProduct& product) {
    const int blocks = call.device.multiprocessors;
    if (is_codes(call)) {
        const ExpertMatrices& m = call.matrices;
        const CodeScales scales = pair ? scales_of(m.gate, m.up, m.down) : scales_of(m.down, m.down, m.down);
        const HopperCodes codes{pair, call.activations == SHUNTYARD_STATIC};
        return launch_hopper_codes(call.x_type, tile, codes, product, scales, blocks, call.stream);
    }
    return call.x_type == SHUNTYARD_FP16
               ? launch_hopper_half(tile, major_of(call), pair, product, blocks, call.stream)
               : launch_hopper_bfloat(tile, major_of(call), pair, product, blocks, call.stream);
}

}  // namespace

bool hopper_takes(const Experts& call) {
    if (call.device.capability != 90 || call.device.code != 90 || call.x_type == SHUNTYARD_FP32) {
        return false;
    }
    // Rows of codes, or weights that need no conversion. FP8 operands lie along K (PTX ISA, wgmma: no transposition).
    const bool form = is_codes(call) ? call.layout == SHUNTYARD_LINEAR : call.weight_type == call.x_type;
    const int64_t unit = kPitch / element_bytes(call);
    if (!form || call.width % unit != 0 || call.intermediate % unit != 0 || call.width > INT_MAX / 4 ||
        call.intermediate > INT_MAX / 4) {
        return false;
    }
    for (const Matrices* matrices : {&call.matrices.gate, &call.matrices.up, &call.matrices.down}) {
        for (int64_t e = 0; e < call.experts; ++e) {
            if (!aligned_for_tma(matrices->data[e])) {
                return false;
            }
        }
    }
    const bool outputs = reinterpret_cast<uintptr_t>(call.rows) % 4 == 0;
    return outputs && aligned_for_tma(call.scaled) && aligned_for_tma(call.maps);
}

int run_hopper(const Experts& call, int rows_of_tile) {
    const HopperTile tile = rows_of_tile == 64 ? HopperTile::k64 : HopperTile::k128;
    const bool given = call.activations == SHUNTYARD_STATIC;
    WeightMaps maps{};
    maps.maps = call.maps;
    SHUNTYARD_TRY(map_weights(maps.into, call, call.matrices.gate, call.width, call.intermediate));
    SHUNTYARD_TRY(map_weights(maps.down, call, call.matrices.down, call.intermediate, call.width));
    copy(maps.weights[0], call.matrices.gate.data);
    copy(maps.weights[1], call.matrices.up.data);
    copy(maps.weights[2], call.matrices.down.data);
    SHUNTYARD_TRY(prepare_inputs(call, is_codes(call) ? Inputs::kCodes : Inputs::kScaled, &maps));

    HopperProduct pair{};
    const void* const inputs = is_codes(call) ? call.gate_codes : call.scaled;
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
    SHUNTYARD_TRY(map_rows(down.rows, call, is_codes(call) ? call.hidden_codes : call.hidden, call.intermediate));
    down.maps = call.maps + 2 * call.experts;
    down.out = call.rows;
    down.inner = call.intermediate;
    down.columns = call.width;
    return multiply(call, tile, false, down);
}

}  // namespace shuntyard
