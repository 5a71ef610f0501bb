// Routing: the best K experts of each token, then a stable counting sort of the slots by expert.
//
// Up to 512 experts in one launch (kernels/route.h), more of them in five, whose boundaries are the only barriers.
//
// There, the sort works on chunks of consecutive slots. Every (chunk, expert) pair counts its own slots, a scan over
// experts and chunks turns counts into first rows, and a slot finds its row from its chunk's first row and the number
// of equal experts before it in the chunk. Nothing depends on the order of threads.
#include "kernels/route.h"

namespace shuntyard {
namespace {

constexpr int64_t kChunk = 64;  // slots of a chunk: the longest walk of a thread in count and place

struct RoutingWorkspace {
    int32_t* expert_of_slot;  // [T*K]
    int32_t* first_row;       // [chunks, E]: counts, then the first row of the chunk's slots of that expert
    int32_t* totals;          // [E]
};

__device__ inline int64_t thread_number() { return int64_t{blockIdx.x} * blockDim.x + threadIdx.x; }

__device__ inline bool ranks_before(float a, float b) { return a > b || (b != b && a == a); }

// One thread a token: keeps the K best so far in order, in the token's own slots. An equal logit does not overtake, so
// of equals the lower expert stands first.
__global__ void choose(const float* logits, int32_t* expert_of_slot, int64_t tokens, int32_t experts, int32_t top_k) {
    const int64_t token = thread_number();
    if (token >= tokens) {
        return;
    }
    const float* own = logits + token * experts;
    int32_t* best = expert_of_slot + token * top_k;
    for (int32_t e = 0; e < experts; ++e) {
        const float candidate = own[e];
        const int32_t kept = e < top_k ? e : top_k;
        if (kept == top_k && !ranks_before(candidate, own[best[top_k - 1]])) {
            continue;
        }
        int32_t place = kept < top_k ? kept : top_k - 1;
        for (; place > 0 && ranks_before(candidate, own[best[place - 1]]); --place) {
            best[place] = best[place - 1];
        }
        best[place] = e;
    }
}

// One thread a (chunk, expert) pair.
__global__ void count(const int32_t* expert_of_slot, int32_t* counts, int64_t slots, int32_t experts, int64_t pairs) {
    const int64_t pair = thread_number();
    if (pair >= pairs) {
        return;
    }
    const int64_t chunk = pair / experts;
    const int32_t expert = static_cast<int32_t>(pair % experts);
    const int64_t end = (chunk + 1) * kChunk < slots ? (chunk + 1) * kChunk : slots;
    int32_t found = 0;
    for (int64_t slot = chunk * kChunk; slot < end; ++slot) {
        found += expert_of_slot[slot] == expert;
    }
    counts[pair] = found;
}

// One thread an expert: its slots over all chunks.
__global__ void add_up(const int32_t* counts, int32_t* totals, int64_t chunks, int32_t experts) {
    const int64_t expert = thread_number();
    if (expert >= experts) {
        return;
    }
    int32_t total = 0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        total += counts[chunk * experts + expert];
    }
    totals[expert] = total;
}

// One thread an expert, and one for the end: its offset, and the first row of each of its chunks in place of the count.
__global__ void start(const int32_t* totals, int32_t* counts, int32_t* expert_offsets, int64_t chunks,
                      int32_t experts) {
    const int64_t expert = thread_number();
    if (expert > experts) {
        return;
    }
    int32_t row = 0;
    for (int64_t lower = 0; lower < expert; ++lower) {
        row += totals[lower];
    }
    expert_offsets[expert] = row;
    if (expert == experts) {
        return;
    }
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        const int32_t own = counts[chunk * experts + expert];
        counts[chunk * experts + expert] = row;
        row += own;
    }
}

// One thread a slot: its row is its chunk's first, plus the slots of the same expert before it in the chunk.
__global__ void place(const float* logits, const int32_t* expert_of_slot, const int32_t* first_row, float* scores,
                      int32_t* permutation, int64_t slots, int32_t experts, int32_t top_k) {
    const int64_t slot = thread_number();
    if (slot >= slots) {
        return;
    }
    const int64_t chunk = slot / kChunk;
    const int32_t expert = expert_of_slot[slot];
    int32_t row = first_row[chunk * experts + expert];
    for (int64_t earlier = chunk * kChunk; earlier < slot; ++earlier) {
        row += expert_of_slot[earlier] == expert;
    }
    permutation[row] = static_cast<int32_t>(slot);
    scores[row] = sigmoid(logits[slot / top_k * experts + expert]);
}

bool valid(int64_t tokens, int64_t experts, int64_t top_k) {
    return valid_rows(tokens, top_k) && experts < INT_MAX && top_k <= experts &&
           (experts <= kMostExperts || ceil_div(ceil_div(tokens * top_k, kChunk) * experts, kBlock) <= kMaxBlocksX);
}

}  // namespace
}  // namespace shuntyard

using namespace shuntyard;

size_t shuntyard_moe_routing_workspace(int64_t tokens, int64_t experts, int64_t top_k) {
    if (!valid(tokens, experts, top_k)) {
        return 0;
    }
    const int64_t slots = tokens * top_k;
    if (experts <= kMostExperts) {
        return aligned(slots * sizeof(Slot));
    }
    return aligned(slots * sizeof(int32_t)) + aligned(ceil_div(slots, kChunk) * experts * sizeof(int32_t)) +
           aligned(experts * sizeof(int32_t));
}

int shuntyard_moe_routing(const float* logits, float* scores, int32_t* expert_offsets, int32_t* permutation,
                          int64_t tokens, int64_t experts, int64_t top_k, void* workspace, size_t workspace_size,
                          void* stream) {
    if (!valid(tokens, experts, top_k)) {
        return SHUNTYARD_INVALID_ARGUMENT;
    }
    if (workspace_size < shuntyard_moe_routing_workspace(tokens, experts, top_k)) {
        return SHUNTYARD_WORKSPACE_TOO_SMALL;
    }
    if (experts <= kMostExperts) {
        Routing call{};
        call.logits = logits;
        call.scores = scores;
        call.expert_offsets = expert_offsets;
        call.permutation = permutation;
        call.tokens = tokens;
        call.experts = static_cast<int32_t>(experts);
        call.top_k = static_cast<int32_t>(top_k);
        call.whole_quads = experts % 4 == 0 && on_16_bytes(logits);
        return route_at_once(call, workspace, stream);
    }
    const int64_t slots = tokens * top_k;
    const int64_t chunks = ceil_div(slots, kChunk);
    const int64_t pairs = chunks * experts;
    RoutingWorkspace work;
    work.expert_of_slot = static_cast<int32_t*>(workspace);
    work.first_row = work.expert_of_slot + aligned(slots * sizeof(int32_t)) / sizeof(int32_t);
    work.totals = work.first_row + aligned(pairs * sizeof(int32_t)) / sizeof(int32_t);

    const dim3 block(kBlock);
    if (slots > 0) {
        SHUNTYARD_TRY(launch(choose, grid_of(ceil_div(tokens, kBlock)), block, stream, logits, work.expert_of_slot,
                             tokens, experts, top_k));
        SHUNTYARD_TRY(launch(count, grid_of(ceil_div(pairs, kBlock)), block, stream, work.expert_of_slot,
                             work.first_row, slots, experts, pairs));
    }
    SHUNTYARD_TRY(launch(add_up, grid_of(ceil_div(experts, kBlock)), block, stream, work.first_row, work.totals, chunks,
                         experts));
    SHUNTYARD_TRY(launch(start, grid_of(ceil_div(experts + 1, kBlock)), block, stream, work.totals, work.first_row,
                         expert_offsets, chunks, experts));
    if (slots > 0) {
        SHUNTYARD_TRY(launch(place, grid_of(ceil_div(slots, kBlock)), block, stream, logits, work.expert_of_slot,
                             work.first_row, scores, permutation, slots, experts, top_k));
    }
    return SHUNTYARD_OK;
}
