// The experts by mma.sync, from a call to its launches: rows as codes, if they are to be; gate and up; hidden rows as
// codes; down.
#include "kernels/direct.h"
#include "kernels/experts.h"

namespace shuntyard {
namespace {

DirectCall direct_call(const Experts& call) {
    DirectCall direct{};
    direct.x_type = call.x_type;
    direct.weight_type = call.weight_type;
    direct.activations = call.activations;
    direct.x = call.x;
    direct.scores = call.scores;
    direct.expert_offsets = call.expert_offsets;
    direct.permutation = call.permutation;
    direct.hidden_rows = call.hidden;
    direct.rows = call.rows;
    direct.gate_codes = call.gate_codes;
    direct.up_codes = call.up_codes;
    direct.hidden_codes = call.hidden_codes;
    direct.factors = call.factors;
    direct.all_rows = call.all_rows;
    direct.experts = call.experts;
    direct.top_k = call.top_k;
    direct.hidden = call.width;
    direct.intermediate = call.intermediate;
    direct.matrices = &call.matrices;
    direct.stream = call.stream;
    return direct;
}

}  // namespace

bool direct_takes(const Experts& call, int tokens_of_tile) {
    return call.device.capability >= 89 && call.device.code >= 89 &&
           direct_has_tile(direct_form(direct_call(call)), tokens_of_tile);
}

int run_direct(const Experts& call, int tokens_of_tile) {
    const DirectCall direct = direct_call(call);
    const bool codes = call.activations != SHUNTYARD_AS_THEY_ARE;
    if (codes) {
        SHUNTYARD_TRY(prepare_inputs(call, Inputs::kCodes));
    }
    SHUNTYARD_TRY(direct_gate_up(direct, tokens_of_tile));
    if (codes) {
        SHUNTYARD_TRY(prepare_hidden(call));
    }
    return direct_down(direct, tokens_of_tile);
}

}  // namespace shuntyard
