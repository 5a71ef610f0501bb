// Experts: a grouped SwiGLU over rows that are sorted by expert.
//
//   scaled = round(scores * x), gathered                              [T*K, H]
//   hidden = round(silu(round(scaled @ gate)) * round(scaled @ up))   [T*K, F]
//   rows   = round(hidden @ down)                                     [T*K, H]
//
// With quantised activations, scaled and hidden become E4M3 codes before they are multiplied (kernels/prepare.h), and a
// product is (codes @ weight values) * the rows' factor * the weight's scale.
//
// Three families of kernels do it: `plain` whatever the form, `direct` on tensor cores, `hopper` with TMA and wgmma.
// Which, is a tactic (kernels/tactics.h).
#include "kernels/experts.h"

#include "kernels/tactics.h"

namespace shuntyard {
namespace {

size_t size_of(int type) { return type == SHUNTYARD_FP32 ? 4 : 2; }

// Where each array lies in the workspace, in bytes from its start; shuntyard_plugins.h says which there are.
struct Places {
    size_t scaled, hidden, gate_codes, up_codes, hidden_codes, factors, maps, end;

    Places(int x_type, int activations, int64_t all_rows, int64_t width, int64_t intermediate) {
        const bool quantised = activations != SHUNTYARD_AS_THEY_ARE;
        scaled = 0;
        hidden = scaled + aligned(quantised ? 0 : all_rows * width * size_of(x_type));
        gate_codes = hidden + aligned(all_rows * intermediate * size_of(x_type));
        hidden_codes = gate_codes + (quantised ? aligned(all_rows * width) : 0);
        up_codes = hidden_codes + (quantised ? aligned(all_rows * intermediate) : 0);
        factors = up_codes + (activations == SHUNTYARD_STATIC ? aligned(all_rows * width) : 0);
        maps = factors + (activations == SHUNTYARD_DYNAMIC ? aligned(all_rows * sizeof(float)) : 0);
        end = maps + (x_type == SHUNTYARD_FP32 ? 0 : 3 * SHUNTYARD_MAX_EXPERTS * sizeof(TensorMap));
    }
};

bool valid(int64_t tokens, int64_t top_k, int64_t hidden, int64_t intermediate) {
    return valid_rows(tokens, top_k) && valid_columns(hidden) && valid_columns(intermediate);
}

void place(Experts& call, void* workspace) {
    const Places places(call.x_type, call.activations, call.all_rows, call.width, call.intermediate);
    char* const start = static_cast<char*>(workspace);
    const bool quantised = call.quantised();
    call.scaled = quantised ? nullptr : start + places.scaled;
    call.hidden = start + places.hidden;
    call.gate_codes = quantised ? reinterpret_cast<E4m3*>(start + places.gate_codes) : nullptr;
    call.up_codes =
        call.activations == SHUNTYARD_STATIC ? reinterpret_cast<E4m3*>(start + places.up_codes) : call.gate_codes;
    call.hidden_codes = quantised ? reinterpret_cast<E4m3*>(start + places.hidden_codes) : nullptr;
    call.factors = call.activations == SHUNTYARD_DYNAMIC ? reinterpret_cast<float*>(start + places.factors) : nullptr;
    call.maps = call.x_type == SHUNTYARD_FP32 ? nullptr : reinterpret_cast<TensorMap*>(start + places.maps);
}

}  // namespace

int prepare_inputs(const Experts& call, const WeightMaps* maps, int chunk) {
    Preparation task{};
    task.rows = call.x;
    task.scores = call.scores;
    task.permutation = call.permutation;
    task.expert_offsets = call.expert_offsets;
    task.scaled = call.scaled;
    task.codes = call.gate_codes;
    task.more_codes = call.up_codes != call.gate_codes ? call.up_codes : nullptr;
    task.factors = call.factors;
    task.orphans = call.rows;
    task.all_rows = call.all_rows;
    task.top_k = call.top_k;
    task.width = call.width;
    task.experts = static_cast<int32_t>(call.experts);
    task.chunk = chunk;
    return prepare(call.x_type, task, given_scales(call.matrices.gate), given_scales(call.matrices.up), maps,
                   call.stream);
}

int prepare_hidden(const Experts& call) {
    Preparation task{};
    task.rows = call.hidden;
    task.expert_offsets = call.expert_offsets;
    task.codes = call.hidden_codes;
    task.factors = call.factors;
    task.all_rows = call.all_rows;
    task.top_k = call.top_k;
    task.width = call.intermediate;
    task.experts = static_cast<int32_t>(call.experts);
    const GivenScales scales = given_scales(call.matrices.down);
    return prepare(call.x_type, task, scales, scales, nullptr, call.stream);
}

}  // namespace shuntyard

using namespace shuntyard;

size_t shuntyard_moe_experts_workspace(int x_type, int activations, int64_t tokens, int64_t top_k, int64_t hidden,
                                       int64_t intermediate) {
    if (!valid(tokens, top_k, hidden, intermediate) || activations < SHUNTYARD_AS_THEY_ARE ||
        activations > SHUNTYARD_DYNAMIC) {
        return 0;
    }
    return Places(x_type, activations, tokens * top_k, hidden, intermediate).end;
}

namespace {

// What a call is, as far as it is known without tensors.
Experts described(int x_type, const shuntyard_expert_weights& weights, int64_t tokens, int64_t experts, int64_t top_k,
                  int64_t hidden, int64_t intermediate) {
    Experts call{};
    call.x_type = x_type;
    call.weight_type = weights.type;
    call.layout = weights.layout;
    call.activations = weights.activations;
    call.all_rows = tokens * top_k;
    call.experts = experts;
    call.top_k = top_k;
    call.width = hidden;
    call.intermediate = intermediate;
    return call;
}

bool valid_call(int x_type, const shuntyard_expert_weights& weights, int64_t tokens, int64_t experts, int64_t top_k,
                int64_t hidden, int64_t intermediate) {
    return valid(tokens, top_k, hidden, intermediate) && experts >= 1 && experts <= SHUNTYARD_MAX_EXPERTS &&
           top_k <= experts && valid_type(x_type) && valid_form(weights, hidden, intermediate);
}

}  // namespace

int shuntyard_moe_experts_tactics(int x_type, const shuntyard_expert_weights* weights, int64_t tokens, int64_t experts,
                                  int64_t top_k, int64_t hidden, int64_t intermediate, int32_t* tactics) {
    if (weights == nullptr || !valid_call(x_type, *weights, tokens, experts, top_k, hidden, intermediate)) {
        return SHUNTYARD_INVALID_ARGUMENT;
    }
    Experts call = described(x_type, *weights, tokens, experts, top_k, hidden, intermediate);
    if (current_device(call.device) != SHUNTYARD_OK) {
        return 0;
    }
    fill_strides(call.matrices, *weights, hidden, intermediate);
    int count = 0;
    for (int32_t tactic = SHUNTYARD_PLAIN; tactic <= SHUNTYARD_LAST_TACTIC; ++tactic) {
        if (takes(call, tactic)) {
            tactics[count++] = tactic;
        }
    }
    return count;
}

int shuntyard_moe_experts(int x_type, const shuntyard_expert_weights* weights, const void* x, const float* scores,
                          const int32_t* expert_offsets, const int32_t* permutation, void* rows, int64_t tokens,
                          int64_t experts, int64_t top_k, int64_t hidden, int64_t intermediate, int tactic,
                          void* workspace, size_t workspace_size, void* stream) {
    if (weights == nullptr || !valid_call(x_type, *weights, tokens, experts, top_k, hidden, intermediate) ||
        !valid_weights(*weights, hidden, intermediate) || tactic < SHUNTYARD_BY_SHAPE ||
        tactic > SHUNTYARD_LAST_TACTIC) {
        return SHUNTYARD_INVALID_ARGUMENT;
    }
    if (workspace_size <
        shuntyard_moe_experts_workspace(x_type, weights->activations, tokens, top_k, hidden, intermediate)) {
        return SHUNTYARD_WORKSPACE_TOO_SMALL;
    }
    if (tokens == 0) {
        return SHUNTYARD_OK;
    }
    Experts call = described(x_type, *weights, tokens, experts, top_k, hidden, intermediate);
    call.x = x;
    call.scores = scores;
    call.expert_offsets = expert_offsets;
    call.permutation = permutation;
    call.rows = rows;
    call.stream = stream;
    place(call, workspace);
    fill(call.matrices, *weights, experts, hidden, intermediate);
    SHUNTYARD_TRY(current_device(call.device));
    if (tactic == SHUNTYARD_BY_SHAPE) {
        return run(call, by_shape(call));
    }
    return takes(call, tactic) ? run(call, tactic) : SHUNTYARD_UNSUPPORTED_TACTIC;
}
