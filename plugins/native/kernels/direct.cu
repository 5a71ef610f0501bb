// What the direct family takes, and which of its files a call goes to.
#include "kernels/direct.h"

#include <initializer_list>

namespace shuntyard {
namespace {

// Numbers of K and channels, and their products, that 32 bits on the device hold: more than any model has.
constexpr int64_t kMostExtent = (1 << 20) - 128;

bool on_16_bytes(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

bool all_on_16_bytes(const Matrices& matrices, int64_t experts) {
    for (int64_t e = 0; e < experts; ++e) {
        if (!on_16_bytes(matrices.data[e])) {
            return false;
        }
    }
    return true;
}

// By types and layout alone.
DirectForm form_of_types(const DirectCall& call) {
    const bool along_k = call.matrices->gate.stride_in == 1;
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
        case SHUNTYARD_E4M3: return call.activations == SHUNTYARD_AS_THEY_ARE ? DirectForm::kE4m3 : DirectForm::kCodes;
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

using Launch = int (*)(const DirectCall&, bool, int);

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

int launch_product(const DirectCall& call, bool down, int tokens) {
    const DirectForm form = direct_form(call);
    if (!direct_has_tile(form, tokens)) {
        return SHUNTYARD_INVALID_ARGUMENT;
    }
    return call.all_rows == 0 ? SHUNTYARD_OK : launch_of(form)(call, down, tokens);
}

}  // namespace

DirectForm direct_form(const DirectCall& call) {
    const DirectForm form = form_of_types(call);
    const int64_t unit = unit_of(form);
    if (call.hidden % unit != 0 || call.intermediate % unit != 0 || call.hidden > kMostExtent ||
        call.intermediate > kMostExtent) {
        return DirectForm::kNone;
    }
    const ExpertMatrices& matrices = *call.matrices;
    if (form == DirectForm::kInt4) {
        for (const Matrices* each : {&matrices.gate, &matrices.up, &matrices.down}) {
            // The number of a scale fits 32 bits.
            if (each->group % 32 != 0 || each->scale_stride * kMostExtent > UINT32_MAX) {
                return DirectForm::kNone;
            }
        }
    }
    for (const void* pointer : {call.x, static_cast<const void*>(call.hidden_rows), static_cast<const void*>(call.rows),
                                static_cast<const void*>(call.gate_codes), static_cast<const void*>(call.up_codes),
                                static_cast<const void*>(call.hidden_codes)}) {
        if (!on_16_bytes(pointer)) {
            return DirectForm::kNone;
        }
    }
    const bool aligned = all_on_16_bytes(matrices.gate, call.experts) && all_on_16_bytes(matrices.up, call.experts) &&
                         all_on_16_bytes(matrices.down, call.experts);
    return aligned ? form : DirectForm::kNone;
}

bool direct_has_tile(DirectForm form, int tokens) {
    switch (tokens) {
        case 8:
        case 16: return form != DirectForm::kNone;
        case 32:
        case 64: return form != DirectForm::kNone && form != DirectForm::kAlongN;
        default: return false;
    }
}

int direct_gate_up(const DirectCall& call, int tokens) { return launch_product(call, false, tokens); }
int direct_down(const DirectCall& call, int tokens) { return launch_product(call, true, tokens); }

}  // namespace shuntyard
