// Products over tiles of tokens: the kernels of the direct family. How operands are made is told in direct_form.h.
//
// A block takes one tile of tokens and some channels. Its warps share the channels and split K, taking slots in turn,
// where there are few tokens: then every warp's partial sums are added in the order of warps, through shared memory.
// Or each warp has channels of its own, and all read the same tokens, from L1.
//
// Each lane keeps a queue of slots on their way. Weights are read once by a block, so L1 keeps none of them; tokens are
// loaded along with them while they are few, else when needed.
//
// The host knows neither how many rows an expert has nor how many tiles there are. It launches as many blocks as there
// may be tiles, those without one leave, and one more that fills rows of no expert.
//
// Products of E4M3 codes are summed in accumulators of their own, which are added to the sums every 128 of K: units of
// Ada and Hopper keep about 14 bits while they add up products of FP8 (DeepSeek-V3, arXiv 2412.19437, section 3.3.2).
// Not so on Hopper, whose mma.sync makes fp16 of E4M3 and adds each product in fp32: FP8 units are wgmma's there.
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
    bool tokens_differ;         // the two sets
};

// How a kernel goes about it.
template <class F_, int kTokens_>
struct DirectPlan {
    using F = F_;
    static constexpr int kTokens = kTokens_;
    static constexpr int kTiles = kTokens / 8;
    static constexpr bool kSplitK = kTokens <= (F::kAlongN ? 16 : 32);
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
            result = load_words<F::kWords>(rows[set] + part * (4 * F::kWords), row[n], pitch);
        }
        return result;
    }

    __device__ void advance() {
        for (const char*& own : rows) {
            own += P::kStep * F::kSlot * F::kTokenBytes;
        }
    }

    __device__ void scale(Words<F::kWords>& values, [[maybe_unused]] int n) const {
        if constexpr (F::kScaleTokens) {
            for (uint32_t& pair : values.words) {
                pair = scaled_pair<typename F::X>(pair, score[n], score[n]);
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

// A warp's product.
template <class P>
struct DirectProduct {
    using F = typename P::F;
    using X = typename F::X;
    const DirectTask<F>& task;
    DirectTokens<P> tokens;
    DirectSource<F> source[F::kMatrices];
    static constexpr int kAdvance = P::kStep * F::kSlot;
    using Sums = float[F::kMatrices][F::kFragments][P::kTiles][4];
    Sums sums;
    const TokenTile& tile;
    int first_slot;
    // Numbers of K from the lane's part of the slot at hand to the end. What lies behind the end counts as zeros, of
    // weights and of tokens.
    int left;

    // The channels of the warp start at `channel`. Lanes beyond the last read the last ones' weights.
    __device__ DirectProduct(const DirectTask<F>& task_, const TokenTile& tile_, int32_t expert, int32_t channel,
                             int first_slot_)
        : task(task_), sums{}, tile(tile_), first_slot(first_slot_) {
        const int lane = lane_of_thread();
        left = task.depth - first_slot * F::kSlot - lane % 4 * F::kLane;
        const int32_t own = channel + lane / 4 * F::kOwn;
#pragma unroll
        for (int m = 0; m < F::kMatrices; ++m) {
            DirectSource<F>& from = source[m];
            const char* data = static_cast<const char*>(task.data[m][expert]);
            from.scales = F::kTables >= 2 ? static_cast<const char*>(task.scales[m][expert]) : nullptr;
            if constexpr (F::kAlongN) {
                const int32_t there = own < task.channels ? own : task.channels - F::kOwn;
                const int32_t k = first_slot * F::kSlot + lane % 4 * F::kLane;
                from.rows[0] = data + int64_t{there} * 2 + int64_t{k} * task.pitch;
            } else {
#pragma unroll
                for (int i = 0; i < F::kOwn; ++i) {
                    const int32_t there = own + i < task.channels ? own + i : task.channels - 1;
                    from.rows[i] = data + int64_t{there} * task.pitch + (4 * first_slot + lane % 4) * 16;
                    const uint32_t number = static_cast<uint32_t>(there) * task.scale_stride;
                    if constexpr (F::kInt4) {
                        from.first_scale[i] = number;
                    } else if constexpr (F::kForm == DirectForm::kE4m3) {
                        from.scale[i] = scale_at(from.scales, task.scale_type, number);
                    }
                }
            }
        }
    }

    // Of the slot that has this place in the queue, the one at hand being the first.
    __device__ bool there(int place) const { return left > place * kAdvance; }

    // The slots behind those that were fetched before.
    __device__ void fetch_weights(DirectQueue<P>& queue, int place) {
        DirectSlot<F>& to = queue.weights[place];
        const bool inside = there(place);
#pragma unroll
        for (int m = 0; m < F::kMatrices; ++m) {
            DirectSource<F>& from = source[m];
#pragma unroll
            for (int i = 0; i < F::kQuads; ++i) {
                to.weights[m][i] = Quad{};
                if (inside) {
                    to.weights[m][i] = load_once(F::kAlongN ? from.rows[0] + int64_t{i} * task.pitch
                                                            : from.rows[F::kAlongN ? 0 : i]);
                }
            }
            for (const char*& own : from.rows) {
                own += F::kAlongN ? int64_t{kAdvance} * task.pitch : P::kStep * 64;
            }
        }
        if constexpr (F::kInt4) {
            const uint32_t number = static_cast<uint32_t>(task.depth - left + place * kAdvance) / F::kLane;
            const uint32_t group = static_cast<uint32_t>(number * task.group_reciprocal >> 32);
            if (task.scale_type == SHUNTYARD_FP32) {
                fetch_scales<uint32_t>(to, group, inside);
            } else {
                fetch_scales<uint16_t>(to, group, inside);
            }
        }
    }

    template <typename Bits>
    __device__ void fetch_scales(DirectSlot<F>& to, uint32_t group, bool inside) const {
#pragma unroll
        for (int m = 0; m < F::kMatrices; ++m) {
#pragma unroll
            for (int i = 0; i < F::kOwn; ++i) {
                to.scales[m][i] = 0;
                if (inside) {
                    to.scales[m][i] = reinterpret_cast<const Bits*>(source[m].scales)[source[m].first_scale[i] + group];
                }
            }
        }
    }

    __device__ void fetch_tokens(DirectQueue<P>& queue, int place) {
        if constexpr (P::kTokensAhead) {
            const bool inside = there(place);
#pragma unroll
            for (int part = 0; part < F::kLoads; ++part) {
#pragma unroll
                for (int n = 0; n < P::kTiles; ++n) {
                    load_tokens(queue.tokens[place][part][n], n, part, inside);
                }
            }
            tokens.advance();
        }
    }

    // Of both sets. Where they are one, the second is a copy.
    __device__ void load_tokens(Words<F::kWords> (&to)[F::kSets], int n, int part, bool inside) const {
        to[0] = tokens.load(0, n, part, inside);
        if constexpr (F::kSets == 2) {
            to[1] = to[0];
            if (task.tokens_differ) {
                to[1] = tokens.load(1, n, part, inside);
            }
        }
    }

    template <bool kExact>
    __device__ void multiply_slot(const DirectQueue<P>& queue, const DirectScales<F>& scales,
                                  Sums& to) const {
        [[maybe_unused]] const bool inside = there(0);
        [[maybe_unused]] Words<F::kWords> next[2][F::kSets];  // loaded one tile ahead
        if constexpr (!P::kTokensAhead) {
            load_tokens(next[0], 0, 0, inside);
        }
#pragma unroll
        for (int part = 0; part < F::kLoads; ++part) {
            uint32_t a[F::kSteps][F::kMatrices][F::kFragments][4];
#pragma unroll
            for (int step = 0; step < F::kSteps; ++step) {
#pragma unroll
                for (int m = 0; m < F::kMatrices; ++m) {
#pragma unroll
                    for (int f = 0; f < F::kFragments; ++f) {
                        make_operand<F, kExact>(a[step][m][f], queue.weights[0], source[m], scales, m, f,
                                                part * F::kSteps + step);
                    }
                }
            }
#pragma unroll
            for (int n = 0; n < P::kTiles; ++n) {
                Words<F::kWords> values[F::kSets];
                [[maybe_unused]] const int number = part * P::kTiles + n;
#pragma unroll
                for (int set = 0; set < F::kSets; ++set) {
                    values[set] = P::kTokensAhead ? queue.tokens[0][P::kTokensAhead ? part : 0]
                                                           [P::kTokensAhead ? n : 0][set]
                                                  : next[number % 2][set];
                }
                if constexpr (!P::kTokensAhead) {
                    if (number + 1 < F::kLoads * P::kTiles) {
                        load_tokens(next[(number + 1) % 2], (n + 1) % P::kTiles, (number + 1) / P::kTiles, inside);
                    }
                }
#pragma unroll
                for (int set = 0; set < F::kSets; ++set) {
                    tokens.scale(values[set], n);
                }
#pragma unroll
                for (int step = 0; step < F::kSteps; ++step) {
#pragma unroll
                    for (int m = 0; m < F::kMatrices; ++m) {
                        const Words<F::kWords>& own = values[F::kSets == 2 ? m : 0];
#pragma unroll
                        for (int f = 0; f < F::kFragments; ++f) {
                            multiply<F::kOperand>(to[m][f][n], a[step][m][f], own.words[2 * step],
                                                  own.words[2 * step + 1]);
                        }
                    }
                }
            }
        }
    }

    // The slot that was fetched first, of those at hand.
    __device__ void multiply_slot(const DirectQueue<P>& queue, Sums& to) {
        DirectScales<F> scales{};
        if constexpr (F::kInt4) {
            switch (task.scale_type) {
                case SHUNTYARD_FP16: widen<Half>(scales, queue.weights[0]); break;
                case SHUNTYARD_BF16: widen<Bfloat>(scales, queue.weights[0]); break;
                default: widen<float>(scales, queue.weights[0]); break;
            }
            bool exact = true;
#pragma unroll
            for (int m = 0; m < F::kMatrices; ++m) {
#pragma unroll
                for (int i = 0; i < F::kOwn; ++i) {
                    scales.pair[m][i] = pack<X>(scales.value[m][i], scales.value[m][i]);
                    exact = exact && low_of<X>(scales.pair[m][i]) == scales.value[m][i];
                }
            }
            if (ballot(!exact) != 0) {
                multiply_slot<false>(queue, scales, to);
            } else {
                multiply_slot<true>(queue, scales, to);
            }
        } else {
            multiply_slot<true>(queue, scales, to);
        }
        if constexpr (!P::kTokensAhead) {
            tokens.advance();
        }
        left -= kAdvance;
    }

    template <typename Scale>
    __device__ static void widen(DirectScales<F>& to, const DirectSlot<F>& from) {
#pragma unroll
        for (int m = 0; m < F::kMatrices; ++m) {
#pragma unroll
            for (int i = 0; i < F::kOwn; ++i) {
                to.value[m][i] = scale_of_bits<Scale>(from.scales[m][i]);
            }
        }
    }

    __device__ void run() {
        DirectQueue<P> queue;
        [[maybe_unused]] Sums fresh{};
        [[maybe_unused]] bool odd = false;
        constexpr int kLast = P::kDepth - 1;
        // Weights first: which tokens there are is not known at once.
#pragma unroll
        for (int place = 0; place < kLast; ++place) {
            fetch_weights(queue, place);
        }
        tokens.find(task, tile, first_slot);
#pragma unroll
        for (int place = 0; place < kLast; ++place) {
            fetch_tokens(queue, place);
        }
        // Not unrolled, slots being passed on from register to register: over several slots the compiler would put all
        // loads together, and wait for all of them.
#pragma unroll 1
        for (int k = first_slot * F::kSlot; k < task.depth; k += kAdvance) {
            fetch_weights(queue, kLast);
            fetch_tokens(queue, kLast);
            step(queue, fresh, odd);
#pragma unroll
            for (int place = 0; place < kLast; ++place) {
                queue.weights[place] = queue.weights[place + 1];
                if constexpr (P::kTokensAhead) {
#pragma unroll
                    for (int part = 0; part < F::kLoads; ++part) {
#pragma unroll
                        for (int n = 0; n < P::kTiles; ++n) {
                            for (int set = 0; set < F::kSets; ++set) {
                                queue.tokens[place][part][n][set] = queue.tokens[place + 1][part][n][set];
                            }
                        }
                    }
                }
            }
            odd = !odd;
        }
        if constexpr (kPromotes) {
            promote(fresh);
        }
    }

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
    static constexpr bool kPromotes = false;
#else
    static constexpr bool kPromotes = F::kCodes;
#endif

    // Multiplies a slot. Sums of codes move on with every second, which is 128 of K.
    __device__ void step(const DirectQueue<P>& queue, Sums& fresh, bool odd) {
        if constexpr (kPromotes) {
            multiply_slot(queue, fresh);
            if (odd) {
                promote(fresh);
            }
        } else {
            multiply_slot(queue, sums);
        }
    }

    __device__ void promote(Sums& fresh) {
        for_all_sums([&](int m, int f, int n, int i) {
            sums[m][f][n][i] += fresh[m][f][n][i];
            fresh[m][f][n][i] = 0;
        });
    }

    template <typename Visit>
    __device__ static void for_all_sums(const Visit& visit) {
#pragma unroll
        for (int m = 0; m < F::kMatrices; ++m) {
#pragma unroll
            for (int f = 0; f < F::kFragments; ++f) {
#pragma unroll
                for (int n = 0; n < P::kTiles; ++n) {
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        visit(m, f, n, i);
                    }
                }
            }
        }
    }
};

// From sums to what is stored.
template <class P>
struct DirectResult {
    using F = typename P::F;
    using X = typename F::X;
    const DirectTask<F>& task;
    const TokenTile& tile;
    int32_t expert, channel;  // in the tables; the first of the warp's

    __device__ float scaled(float sum, int m, int32_t row, int32_t own) const {
        if constexpr (F::kCodes) {
            const float factor = task.factors != nullptr
                                     ? task.factors[row]
                                     : scale_at(task.activation_scales[m][expert], task.activation_scale_type, 0);
            const float scale = scale_at(task.scales[m][expert], task.scale_type, int64_t{own} * task.scale_stride);
            return sum * factor * scale;
        } else {
            return sum;
        }
    }

    __device__ X made(const float (&sum)[F::kMatrices], int32_t row, int32_t own) const {
        const float first = scaled(sum[0], 0, row, own);
        if constexpr (F::kMatrices == 2) {
            const float gate = rounded_to<X>(first);
            const float activated = gate * sigmoid(gate);
            return from_float<X>(activated * rounded_to<X>(scaled(sum[1], 1, row, own)));
        } else {
            return from_float<X>(first);
        }
    }

    // The lane's two channels of fragment f, for one of its two tokens of tile n.
    __device__ void put(int f, int n, int token, const float (&low)[F::kMatrices],
                        const float (&high)[F::kMatrices]) const {
        const int lane = lane_of_thread();
        const int32_t column = 8 * n + 2 * (lane % 4) + token;
        const int32_t own = channel + lane / 4 * F::kOwn + 2 * f;
        if (column >= tile.rows || own >= task.channels) {
            return;
        }
        const int32_t row = tile.first + column;
        X* const out = static_cast<X*>(task.out) + int64_t{row} * task.channels + own;
        const X first = made(low, row, own);
        if (own + 1 == task.channels) {
            *out = first;
            return;
        }
        const X second = made(high, row, own + 1);
        if (task.channels % 2 == 0) {
            const uint32_t both = first.bits | uint32_t{second.bits} << 16;
            *reinterpret_cast<uint32_t*>(out) = both;
        } else {
            out[0] = first;
            out[1] = second;
        }
    }
};

template <class P>
__device__ void direct_block(const DirectTask<typename P::F>& task) {
    using F = typename P::F;
    const int warp = warp_of_thread();
    const int32_t first_channel = static_cast<int32_t>(blockIdx.y) * P::kBlockChannels;
    if (static_cast<int32_t>(blockIdx.x) == task.tiles) {
        fill_orphans(static_cast<typename F::X*>(task.out), task.expert_offsets, task.experts, task.all_rows,
                     task.channels, first_channel, first_channel + P::kBlockChannels);
        return;
    }
    const TokenTile tile = find_tile<P::kTokens>(task.expert_offsets, task.experts, task.first, task.last,
                                                 task.all_rows, static_cast<int32_t>(blockIdx.x));
    if (tile.rows == 0) {
        return;
    }
    const int32_t expert = tile.expert - task.first;
    const int32_t channel = first_channel + (P::kSplitK ? 0 : warp * F::kChannels);
    DirectProduct<P> product(task, tile, expert, channel, P::kSplitK ? warp : 0);
    product.run();
    const DirectResult<P> result{task, tile, expert, channel};
    if constexpr (P::kSplitK) {
        constexpr int kUnits = F::kFragments * P::kTiles * 4;
        float* const partial = reinterpret_cast<float*>(shared_memory()) + lane_of_thread();
        DirectProduct<P>::for_all_sums([&](int m, int f, int n, int i) {
            partial[32 * (warp * P::kSums + m * kUnits + (f * P::kTiles + n) * 4 + i)] = product.sums[m][f][n][i];
        });
        sync_block();
        for (int unit = warp; unit < kUnits / 2; unit += kDirectWarps) {
            const int place = unit / 2 * 4 + unit % 2;  // of fragment and tile, and of the lane's token in it
            float low[F::kMatrices] = {}, high[F::kMatrices] = {};
            for (int other = 0; other < kDirectWarps; ++other) {
#pragma unroll
                for (int m = 0; m < F::kMatrices; ++m) {
                    const float* const from = partial + 32 * (other * P::kSums + m * kUnits + place);
                    low[m] += from[0];
                    high[m] += from[2 * 32];
                }
            }
            result.put(unit / 2 / P::kTiles, unit / 2 % P::kTiles, unit % 2, low, high);
        }
    } else {
#pragma unroll
        for (int f = 0; f < F::kFragments; ++f) {
#pragma unroll
            for (int n = 0; n < P::kTiles; ++n) {
#pragma unroll
                for (int token = 0; token < 2; ++token) {
                    float low[F::kMatrices], high[F::kMatrices];
                    for (int m = 0; m < F::kMatrices; ++m) {
                        low[m] = product.sums[m][f][n][token];
                        high[m] = product.sums[m][f][n][token + 2];
                    }
                    result.put(f, n, token, low, high);
                }
            }
        }
    }
}

template <class P>
__global__ void __launch_bounds__(kDirectThreads, P::kBlocks)
    direct_kernel(SHUNTYARD_TABLE(DirectTask<typename P::F>) task) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 890
    direct_block<P>(task);
#else
    __trap();  // never launched there
#endif
}

// -- on the host

// The matrix, and the tokens, of each part of a product.
struct DirectPart {
    const Matrices* matrices;
    const void* tokens;
};

template <class F>
void fill_tables(DirectTask<F>& task, const DirectPart (&parts)[F::kMatrices], int32_t first, int32_t last) {
    for (int m = 0; m < F::kMatrices; ++m) {
        const Matrices& from = *parts[m].matrices;
        for (int32_t e = first; e < last; ++e) {
            task.data[m][e - first] = from.data[e];
            if constexpr (F::kTables >= 2) {
                task.scales[m][e - first] = from.scales[e];
            }
            if constexpr (F::kTables >= 3) {
                task.activation_scales[m][e - first] = from.activation_scales[e];
            }
        }
    }
    task.first = first;
    task.last = last;
}

template <class P>
int launch_plan(const DirectCall& call, const DirectPart (&parts)[P::F::kMatrices]) {
    using F = typename P::F;
    const bool down = F::kMatrices == 1;
    const Matrices& matrix = *parts[0].matrices;
    DirectTask<F> task{};
    for (int set = 0; set < F::kSets; ++set) {
        task.tokens[set] = parts[set].tokens;
        task.tokens_differ = parts[set].tokens != parts[0].tokens;
    }
    task.scores = call.scores;
    task.factors = call.factors;
    task.expert_offsets = call.expert_offsets;
    task.permutation = call.permutation;
    task.out = down ? call.rows : call.hidden_rows;
    task.all_rows = static_cast<int32_t>(call.all_rows);
    task.top_k = static_cast<int32_t>(call.top_k);
    task.experts = static_cast<int32_t>(call.experts);
    task.depth = static_cast<int32_t>(down ? call.intermediate : call.hidden);
    task.channels = static_cast<int32_t>(down ? call.hidden : call.intermediate);
    // In bytes, by the size of an element: 2, 1, or half a byte.
    const int64_t stride = F::kAlongN ? matrix.stride_in : matrix.stride_out;
    task.pitch = static_cast<uint32_t>(F::kInt4 ? stride / 2 : F::kTables >= 2 ? stride : stride * 2);
    task.scale_stride = static_cast<uint32_t>(matrix.scale_stride);
    task.scale_type = matrix.scale_type;
    task.activation_scale_type = matrix.activation_scale_type;
    if constexpr (F::kInt4) {
        const uint64_t loads = static_cast<uint64_t>(matrix.group / F::kLane);
        task.group_reciprocal = ((uint64_t{1} << 32) + loads - 1) / loads;
    }
    const int64_t slabs = ceil_div(task.channels, P::kBlockChannels);
    for (int64_t first = 0; first < call.experts; first += kDirectExperts) {
        const int64_t last = first + kDirectExperts < call.experts ? first + kDirectExperts : call.experts;
        fill_tables(task, parts, static_cast<int32_t>(first), static_cast<int32_t>(last));
        const int64_t busy = last - first < call.all_rows ? last - first : call.all_rows;
        task.tiles = static_cast<int32_t>(busy + call.all_rows / P::kTokens);
        Shape shape{grid_of(task.tiles + (first == 0 ? 1 : 0), slabs), dim3(kDirectThreads)};
        shape.shared = P::kShared;
        SHUNTYARD_TRY(launch(direct_kernel<P>, shape, call.stream, task));
    }
    return SHUNTYARD_OK;
}

template <class F>
int launch_tile(const DirectCall& call, const DirectPart (&parts)[F::kMatrices], int tokens) {
    switch (tokens) {
        case 8: return launch_plan<DirectPlan<F, 8>>(call, parts);
        case 16: return launch_plan<DirectPlan<F, 16>>(call, parts);
        case 32: return launch_plan<DirectPlan<F, 32>>(call, parts);
        case 64:
            if constexpr (!F::kAlongN) {
                return launch_plan<DirectPlan<F, 64>>(call, parts);
            }
            return SHUNTYARD_INVALID_ARGUMENT;
        default: return SHUNTYARD_INVALID_ARGUMENT;
    }
}

template <typename X, DirectForm kForm>
int launch_form(const DirectCall& call, bool down, int tokens) {
    constexpr bool kCodes = kForm == DirectForm::kCodes;
    const ExpertMatrices& matrices = *call.matrices;
    if (down) {
        const void* const rows = kCodes ? static_cast<const void*>(call.hidden_codes) : call.hidden_rows;
        const DirectPart parts[1] = {{&matrices.down, rows}};
        return launch_tile<DirectFormat<X, kForm, 1>>(call, parts, tokens);
    }
    const DirectPart parts[2] = {{&matrices.gate, kCodes ? static_cast<const void*>(call.gate_codes) : call.x},
                                 {&matrices.up, kCodes ? static_cast<const void*>(call.up_codes) : call.x}};
    return launch_tile<DirectFormat<X, kForm, 2>>(call, parts, tokens);
}

template <DirectForm kForm>
int launch_form(const DirectCall& call, bool down, int tokens) {
    switch (call.x_type) {
        case SHUNTYARD_FP16: return launch_form<Half, kForm>(call, down, tokens);
        case SHUNTYARD_BF16: return launch_form<Bfloat, kForm>(call, down, tokens);
        default: return SHUNTYARD_INVALID_ARGUMENT;
    }
}

}  // namespace shuntyard
