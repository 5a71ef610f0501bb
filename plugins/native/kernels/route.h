// Routing in one launch of one cluster of blocks, for up to 512 experts.
//
// Every warp has a range of tokens: it chooses their experts, and counts its slots of each. The counts of a block's
// warps, the totals of the cluster's blocks and those of the experts, added up, make the first row of a warp's slots of
// an expert; a slot then finds its row by the lanes before it that hold the same expert. Nothing depends on the order
// of threads.
#pragma once

#include "kernels/primitives.h"

namespace shuntyard {

constexpr int64_t kMostExperts = 512;
constexpr uint32_t kMostThreads = 1024;
constexpr size_t kSharedSpace = 96 * 1024;  // every device that has clusters or FP8 gives a block that much
constexpr int64_t kLogitsOfBlock = 8192;    // for fewer, one more block is not worth its part in barriers

// What a token chose.
struct alignas(8) Slot {
    uint32_t expert;
    uint32_t key;  // its logit's
};

struct Routing {
    const float* logits;
    float* scores;
    int32_t* expert_offsets;
    int32_t* permutation;
    Slot* slots;  // [T*K], or null if each block's fit its shared memory
    int64_t tokens;
    int64_t block_tokens, warp_tokens;
    int32_t experts, top_k;
    bool whole_quads;  // logits can be read 16 bytes at a time
};

// Logits as integers in the order of their ranks: 0 is none at all, 1 is NaN, which stands behind every number.
__device__ inline uint32_t key_of(float logit) {
    const uint32_t bits = bits_of(logit + 0.0f);  // of the two zeros, one
    return logit != logit ? 1 : bits >> 31 ? ~bits : bits | 0x80000000u;
}

__device__ inline float logit_of(uint32_t key) {
    return key == 1 ? float_of(0x7fc00000u) : float_of(key >> 31 ? key & 0x7fffffffu : ~key);
}

// How the logits of a token lie in kLanes lanes: 4 experts in a row, then 4 of the next lane, kQuads times.
template <int kLanes, int kQuads>
struct Chooser {
    static constexpr int kTokens = 32 / kLanes;  // that a warp looks at together
    const Routing& call;
    const uint32_t lane;
    uint32_t keys[4 * kQuads];

    __device__ explicit Chooser(const Routing& call_) : call(call_), lane(threadIdx.x % kLanes) {}

    __device__ uint32_t expert_at(int i) const { return (i / 4 * kLanes + lane) * 4 + i % 4; }

    __device__ void read(int64_t token, bool active) {
        const uint32_t experts = static_cast<uint32_t>(call.experts);
        const float* own = call.logits + token * call.experts;
#pragma unroll
        for (int quad = 0; quad < kQuads; ++quad) {
            const uint32_t first = expert_at(4 * quad);
            if (call.whole_quads) {
                const bool there = active && first < experts;
                const Quad logits = there ? load_once(own + first) : Quad{};
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    keys[4 * quad + i] = there ? key_of(float_of(logits.words[i])) : 0;
                }
            } else {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    keys[4 * quad + i] = active && first + i < experts ? key_of(own[first + i]) : 0;
                }
            }
        }
    }

    // The best that is left, and takes it away. All lanes of the warp come here.
    __device__ Slot take() {
        Slot best{expert_at(0), keys[0]};
#pragma unroll
        for (int i = 1; i < 4 * kQuads; ++i) {
            if (keys[i] > best.key) {
                best = {expert_at(i), keys[i]};
            }
        }
        if (kLanes == 32) {
            const uint32_t key = reduce_max(best.key);
            best = {reduce_min(best.key == key ? best.expert : ~0u), key};
        } else {
#pragma unroll
            for (int mask = 1; mask < kLanes; mask *= 2) {
                const Slot other{shuffle_xor(best.expert, mask), shuffle_xor(best.key, mask)};
                if (other.key > best.key || (other.key == best.key && other.expert < best.expert)) {
                    best = other;
                }
            }
        }
#pragma unroll
        for (int i = 0; i < 4 * kQuads; ++i) {
            keys[i] = expert_at(i) == best.expert ? 0 : keys[i];
        }
        return best;
    }
};

// Chooses for tokens [first, end), a warp's; `slots` are the first one's.
template <int kLanes, int kQuads>
__device__ inline void choose_experts(const Routing& call, int64_t first, int64_t end, Slot* slots) {
    using Choice = Chooser<kLanes, kQuads>;
    const int64_t own = threadIdx.x % 32 / kLanes;
    // The next tokens' logits are on their way while these are compared, where registers allow it.
    constexpr bool kAhead = kQuads == 1;
    Choice next(call);
    next.read(first + own, first + own < end);
    for (int64_t token = first + own; token - own < end; token += Choice::kTokens) {
        Choice choice = next;
        if (kAhead) {
            next.read(token + Choice::kTokens, token + Choice::kTokens < end);
        }
        for (int32_t k = 0; k < call.top_k; ++k) {
            const Slot best = choice.take();
            if (choice.lane == 0 && token < end) {
                slots[(token - first) * call.top_k + k] = best;
            }
        }
        if (!kAhead) {
            next.read(token + Choice::kTokens, token + Choice::kTokens < end);
        }
    }
}

// 32 slots of a warp, one a lane.
struct SlotGroup {
    bool active;
    Slot slot;
    int same, before;  // lanes that hold the same expert, and how many of them are lower ones

    __device__ SlotGroup(const Slot* slots, int64_t number, int64_t end)
        : active(number < end), slot(active ? slots[number] : Slot{~0u, 0}) {
        const uint32_t lanes = match_any(slot.expert);
        same = count_bits(lanes);
        before = count_bits(lanes & ((1u << threadIdx.x % 32) - 1));
    }
};

template <int kLanes, int kQuads>
__global__ void __launch_bounds__(kMostThreads) route(SHUNTYARD_TABLE(Routing) call) {
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const uint32_t rank = cluster_rank(), blocks = cluster_size();
    const uint32_t experts = static_cast<uint32_t>(call.experts);
    const int64_t top_k = call.top_k;
    const auto smaller = [](int64_t a, int64_t b) { return a < b ? a : b; };

    Slot* const shared_slots = reinterpret_cast<Slot*>(shared_memory());  // [block_tokens * K], if they fit
    const int64_t shared_count = call.slots == nullptr ? call.block_tokens * top_k : 0;
    int32_t* const counts = reinterpret_cast<int32_t*>(shared_slots + shared_count);  // [warps, E], then of lower warps
    int32_t* const totals = counts + warps * experts;                                 // [E], of this block
    int32_t* const sums = totals + experts;                                           // [E], of all
    int32_t* const starts = sums + experts;                                           // [E], the block's first rows
    int32_t* const own_counts = counts + warp * experts;

    const int64_t block_first = smaller(rank * call.block_tokens, call.tokens);
    const int64_t block_end = smaller(block_first + call.block_tokens, call.tokens);
    const int64_t first = smaller(block_first + warp * call.warp_tokens, block_end);
    const int64_t end = smaller(first + call.warp_tokens, block_end);
    Slot* const slots =
        call.slots != nullptr ? call.slots + first * top_k : shared_slots + (first - block_first) * top_k;
    const int64_t own_slots = (end - first) * top_k;

    choose_experts<kLanes, kQuads>(call, first, end, slots);
    for (uint32_t e = lane; e < experts; e += 32) {
        own_counts[e] = 0;
    }
    sync_warp();
    for (int64_t slot = lane; slot - lane < own_slots; slot += 32) {
        const SlotGroup group(slots, slot, own_slots);
        if (group.active && group.before == 0) {
            own_counts[group.slot.expert] += group.same;
        }
        sync_warp();
    }
    sync_block();
    for (uint32_t e = threadIdx.x; e < experts; e += blockDim.x) {
        int32_t total = 0;
        for (uint32_t w = 0; w < warps; ++w) {
            const int32_t count = counts[w * experts + e];
            counts[w * experts + e] = total;
            total += count;
        }
        totals[e] = total;
    }
    sync_cluster();
    for (uint32_t e = threadIdx.x; e < experts; e += blockDim.x) {
        int32_t all = 0, before = 0;
        for (uint32_t other = 0; other < blocks; ++other) {
            const int32_t total = load_from_block(totals + e, other);
            all += total;
            before += other < rank ? total : 0;
        }
        sums[e] = all;
        starts[e] = before;
    }
    sync_block();
    if (warp == 0) {
        // A lane adds up experts in a row, then the lanes do their sums.
        const uint32_t each = (experts + 31) / 32, from = lane * each;
        const uint32_t to = from + each < experts ? from + each : experts;
        int32_t own = 0;
        for (uint32_t e = from; e < to; ++e) {
            own += sums[e];
        }
        int32_t row = own;
        for (int delta = 1; delta < 32; delta *= 2) {
            const int32_t lower = shuffle_up(row, delta);
            row += static_cast<int>(lane) >= delta ? lower : 0;
        }
        if (rank == 0 && lane == 31) {
            call.expert_offsets[experts] = row;
        }
        row -= own;
        for (uint32_t e = from; e < to; ++e) {
            if (rank == 0) {
                call.expert_offsets[e] = row;
            }
            starts[e] += row;
            row += sums[e];
        }
    }
    sync_block();
    for (int64_t slot = lane; slot - lane < own_slots; slot += 32) {
        const SlotGroup group(slots, slot, own_slots);
        if (group.active) {
            const int32_t row = starts[group.slot.expert] + own_counts[group.slot.expert] + group.before;
            call.permutation[row] = static_cast<int32_t>(first * top_k + slot);
            call.scores[row] = sigmoid(logit_of(group.slot.key));
        }
        sync_warp();
        if (group.active && group.before == 0) {
            own_counts[group.slot.expert] += group.same;
        }
        sync_warp();
    }
    sync_cluster();  // nobody leaves whose totals are still read
}

// How a call is launched in so many blocks, and what it then is.
template <int kLanes, int kQuads>
Shape routing_shape(Routing& call, int64_t blocks, void* workspace) {
    constexpr int64_t kTokens = Chooser<kLanes, kQuads>::kTokens;
    call.block_tokens = ceil_div(call.tokens, blocks);
    int64_t warps = ceil_div(call.block_tokens, kTokens);
    warps = warps < 1 ? 1 : warps < kMostThreads / 32 ? warps : kMostThreads / 32;
    call.warp_tokens = ceil_div(ceil_div(call.block_tokens, warps), kTokens) * kTokens;
    Shape shape{grid_of(blocks), dim3(static_cast<unsigned>(32 * warps))};
    shape.cluster = static_cast<unsigned>(blocks);
    shape.shared = (warps + 3) * call.experts * sizeof(int32_t);
    const size_t slots = call.block_tokens * call.top_k * sizeof(Slot);
    shape.most_shared = kSharedSpace;
    call.slots = nullptr;
    if (shape.shared + slots <= kSharedSpace) {
        shape.shared += slots;
    } else {
        call.slots = static_cast<Slot*>(workspace);
    }
    return shape;
}

template <int kLanes, int kQuads>
int route_with(Routing call, void* workspace, void* stream) {
    Device device;
    SHUNTYARD_TRY(current_device(device));
    // Code that was compiled for an older architecture knows no clusters, whatever runs it. 16 blocks are more than
    // CUDA promises; Hopper may have room for them.
    const int knows = device.capability < device.code ? device.capability : device.code;
    const int64_t most_blocks = knows < 90 ? 1 : device.capability == 90 ? 16 : 8;
    int64_t blocks = 1;
    while (blocks < most_blocks && 2 * blocks * kLogitsOfBlock <= call.tokens * call.experts) {
        blocks *= 2;
    }
    Shape shape = routing_shape<kLanes, kQuads>(call, blocks, workspace);
    // A whole GPU has room for eight; a part of one may not.
    const bool certain = blocks <= 8 && device.multiprocessors >= 32;
    while (blocks > 1 && !certain && !cluster_fits(route<kLanes, kQuads>, shape, stream)) {
        blocks /= 2;
        shape = routing_shape<kLanes, kQuads>(call, blocks, workspace);
    }
    return launch(route<kLanes, kQuads>, shape, stream, call);
}

inline int route_at_once(const Routing& call, void* workspace, void* stream) {
    return call.experts <= 4     ? route_with<1, 1>(call, workspace, stream)
           : call.experts <= 8   ? route_with<2, 1>(call, workspace, stream)
           : call.experts <= 16  ? route_with<4, 1>(call, workspace, stream)
           : call.experts <= 32  ? route_with<8, 1>(call, workspace, stream)
           : call.experts <= 64  ? route_with<16, 1>(call, workspace, stream)
           : call.experts <= 128 ? route_with<32, 1>(call, workspace, stream)
           : call.experts <= 256 ? route_with<32, 2>(call, workspace, stream)
                                 : route_with<32, 4>(call, workspace, stream);
}

}  // namespace shuntyard
