// How a kernel of the direct family goes about its tile, and what it is launched with.
#pragma once

#include "kernels/direct_form.h"
#include "kernels/direct_tile.h"

namespace shuntyard {

constexpr int kDirectWarps = 8;
constexpr int kDirectThreads = 32 * kDirectWarps;
constexpr int kDirectExperts = 128;  // of one launch: tables are parameters, and what a launch costs grows with them

// One launch. K is `depth`, N is `channels`.
template <class F>
struct DirectTask {
    const void* data[F::kMatrices][kDirectExperts];  // from expert `first` on
    const void* scales[F::kMatrices][F::kTables >= 2 ? kDirectExperts : 1];
    const void* activation_scales[F::kMatrices][F::kTables >= 3 ? kDirectExperts : 1];
    const void* tokens[F::kSets];
    const float* scores;
    const float* factors;
    const int32_t* expert_offsets;
    const int32_t* permutation;
    void* out;
    int32_t all_rows, top_k, experts, first, last, tiles;
    int32_t depth, channels;
    uint32_t pitch;             // bytes from one channel's weights to the next one's, or, along N, from one k's
    uint32_t scale_stride;      // scales from one channel's to the next one's
    uint64_t group_reciprocal;  // of a group in lane's loads, times 2^32
    int32_t scale_type, activation_scale_type;
    bool tokens_differ;  // the two sets
};

// How a kernel goes about it.
template <class F_, int kTokens_>
struct DirectPlan {
    using F = F_;
    static constexpr int kTokens = kTokens_;
    static constexpr int kTiles = kTokens / 8;
    static constexpr bool kSplitK = kTokens <= 32;
    static constexpr int kBlockChannels = F::kChannels * (kSplitK ? 1 : kDirectWarps);
    static constexpr int kStep = kSplitK ? kDirectWarps : 1;  // slots from one of a warp's to the next

    // In registers: how much of a slot is loaded ahead, and how many slots.
    static constexpr int kTokenRegisters = F::kSets * kTiles * F::kLoads * F::kWords;
    static constexpr bool kTokensAhead = kTokenRegisters <= (F::kInt4 ? 16 : 8);
    static constexpr int kSlotRegisters = F::kMatrices * 4 * F::kQuads + (kTokensAhead ? kTokenRegisters : 0);
    static constexpr int kDepth = kTiles > 1 || kSlotRegisters > 24 ? 2 : F::kAlongN ? 5 : 3;

    static constexpr int kSums = F::kMatrices * F::kFragments * kTiles * 4;  // of a thread
    static constexpr size_t kShared = kSplitK ? size_t{kSums} * kDirectThreads * sizeof(float) : 0;
    // Of a multiprocessor, which has registers enough for two where tiles are small.
    static constexpr int kBlocks = kTiles <= 2 && !(F::kAlongN && kSums > 32) ? 2 : 1;
};

// A lane's tokens.
template <class P>
struct DirectTokens {
    using F = typename P::F;
    const char* rows[F::kSets];  // of row 0, in the next slot
    uint32_t row[P::kTiles];
    float score[F::kScaleTokens ? P::kTiles : 1];
    uint32_t pitch;

    __device__ void find(const DirectTask<F>& task, const TokenTile& tile, int first_slot) {
        const int lane = lane_of_thread();
        for (int set = 0; set < F::kSets; ++set) {
            rows[set] = static_cast<const char*>(task.tokens[set]) + lane % 4 * F::kLane * F::kTokenBytes;
            rows[set] += int64_t{first_slot} * (F::kSlot * F::kTokenBytes);
        }
        pitch = static_cast<uint32_t>(task.depth) * F::kTokenBytes;
        for (int n = 0; n < P::kTiles; ++n) {
            // Columns that are none of the tile's repeat its last one: what comes out of them is not stored.
            const int32_t column = 8 * n + lane / 4;
            const int32_t own = tile.first + (column < tile.rows ? column : tile.rows - 1);
            row[n] = static_cast<uint32_t>(own);
            if constexpr (F::kScaleTokens) {
                const int32_t slot = task.permutation[own];
                const bool exists = 0 <= slot && slot < task.all_rows;
                row[n] = exists ? static_cast<uint32_t>(slot / task.top_k) : 0;
                score[n] = exists ? task.scores[own] : float_of(0x7fc00000u);
            }
        }
    }

    // Of the slot that `rows` has come to.
    __device__ Words<F::kWords> load(int set, int n, int part, bool inside) const {
        Words<F::kWords> result{};
        if (inside) {
            result = load_words<F::kWords>(rows[set], row[n], pitch, part * (4 * F::kWords));
        }
        return result;
    }

    __device__ void advance() {
        for (const char*& own : rows) {
            own += P::kStep * F::kSlot * F::kTokenBytes;
        }
    }

    // As products take them: scaled, and in the order of the weights.
    __device__ void arrange(Words<F::kWords>& values, [[maybe_unused]] int n) const {
        using X = typename F::X;
        for (int i = 0; i < F::kWords; i += 2) {
            uint32_t &one = values.words[i], &next = values.words[i + 1];
            if constexpr (F::kInt4) {
                const uint32_t even = permute_bytes(one, next, 0x5410), odd = permute_bytes(one, next, 0x7632);
                one = even;
                next = odd;
            }
            if constexpr (F::kScaleTokens) {
                one = scaled_pair<X>(one, score[n], score[n]);
                next = scaled_pair<X>(next, score[n], score[n]);
            }
        }
    }
};

template <class P>
struct DirectQueue {
    using F = typename P::F;
    DirectSlot<F> weights[P::kDepth];
    Words<F::kWords> tokens[P::kDepth][P::kTokensAhead ? F::kLoads : 1][P::kTokensAhead ? P::kTiles : 1][F::kSets];
};

}  // namespace shuntyard
