// The experts by mma.sync: what they take, and from a call to its launches, in the file of its form.
#include "kernels/direct.h"

#include <initializer_list>

namespace shuntyard {
namespace {

// Numbers of K and channels, and their products, that 32 bits on the device hold: more than any model has.
constexpr int64_t kMostExtent = (1 << 20) - 128;

// By types and layout alone.
DirectForm form_of_types(const Experts& call) {
    const bool along_k = call.matrices.gate.stride_in == 1;
    if (call.x_type != SHUNTYARD_FP16 && call.x_type != SHUNTYARD_BF16) {
        return DirectForm::kNone;
    }
    if (call.weight_type == call.x_type) {
        return along_k ? DirectForm::kAlongK : DirectForm::kAlongN;
    }
    if (!along_k) {
        return DirectForm::kNone;
    }
    switch (call.weight_type) {
        case SHUNTYARD_E4M3: return call.quantised() ? DirectForm::kCodes : DirectForm::kE4m3;
        case SHUNTYARD_INT4: return DirectForm::kInt4;
        default: return DirectForm::kNone;
    }
}

// What both extents must be multiples of.
int64_t unit_of(DirectForm form) {
    switch (form) {
        case DirectForm::kInt4: return 32;
        case DirectForm::kE4m3:
        case DirectForm::kCodes: return 16;
        default: return 8;
    }
}

using Launch = int (*)(const Experts&, bool, int);

Launch launch_of(DirectForm form) {
    switch (form) {
        case DirectForm::kAlongK: return launch_direct_along_k;
        case DirectForm::kAlongN: return launch_direct_along_n;
        case DirectForm::kE4m3: return launch_direct_e4m3;
        case DirectForm::kInt4: return launch_direct_int4;
        case DirectForm::kCodes: return launch_direct_codes;
        default: return nullptr;
    }
}

// The form of the call's products: kNone if there are no kernels, be it for its types, its extents, or an address that
// 16 bytes cannot be loaded from.
//
// K, of both products, must be a multiple of what 16 bytes of weights hold; a group of INT4, of 32; along N, both
// extents of 8.
DirectForm form_of(const Experts& call) {
    const DirectForm form = form_of_types(call);
    const int64_t unit = unit_of(form);
    if (call.width % unit != 0 || call.intermediate % unit != 0 || call.width > kMostExtent ||
        call.intermediate > kMostExtent) {
        return DirectForm::kNone;
    }
    const ExpertMatrices& matrices = call.matrices;
    if (form == DirectForm::kInt4) {
        for (const Matrices* each : {&matrices.gate, &matrices.up, &matrices.down}) {
            // The number of a scale fits 32 bits.
            if (each->group % 32 != 0 || each->scale_stride * kMostExtent > UINT32_MAX) {
                return DirectForm::kNone;
            }
        }
    }
    for (const void* pointer : {call.x, static_cast<const void*>(call.hidden), static_cast<const void*>(call.rows),
                                static_cast<const void*>(call.gate_codes), static_cast<const void*>(call.up_codes),
                                static_cast<const void*>(call.hidden_codes)}) {
        if (!on_16_bytes(pointer)) {
            return DirectForm::kNone;
        }
    }
    return weights_on_16_bytes(matrices, call.experts) ? form : DirectForm::kNone;
}

}  // namespace

bool direct_takes(const Experts& call, int tokens_of_tile) {
    if (call.device.capability < 89 || call.device.code < 89) {
        return false;
    }
    const DirectForm form = form_of(call);
    return form != DirectForm::kNone && (tokens_of_tile <= 16 || form != DirectForm::kAlongN);
}

int run_direct(const Experts& call, int tokens_of_tile) {
    const Launch launch_products = launch_of(form_of_types(call));
    if (call.quantised()) {
        SHUNTYARD_TRY(prepare_inputs(call));
    }
    SHUNTYARD_TRY(launch_products(call, false, tokens_of_tile));
    if (call.quantised()) {
        SHUNTYARD_TRY(prepare_hidden(call));
    }
    return launch_products(call, true, tokens_of_tile);
}

}  // namespace shuntyard
