// A warp's product over a tile of tokens.
//
// Each lane keeps a queue of slots on their way (direct_form.h). Weights are read once by a block, so L1 keeps none of
// them; tokens are loaded along with them while they are few, else when needed.
//
// Products of E4M3 codes are summed in accumulators of their own, which are added to the sums every 128 of K: units of
// Ada and Hopper keep about 14 bits while they add up products of FP8 (DeepSeek-V3, arXiv 2412.19437, section 3.3.2).
// Not so on Hopper, whose mma.sync makes fp16 of E4M3 and adds each product in fp32: FP8 units are wgmma's there.
#pragma once

#include "kernels/direct_plan.h"

namespace shuntyard {

template <class P>
struct DirectProduct {
    using F = typename P::F;
    using X = typename F::X;
    using Sums = float[F::kMatrices][F::kFragments][P::kTiles][4];
    static constexpr int kAdvance = P::kStep * F::kSlot;  // of K, from one slot of the warp's to the next
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
    static constexpr bool kPromotes = false;
#else
    static constexpr bool kPromotes = F::kCodes;
#endif

    const DirectTask<F>& task;
    const TokenTile& tile;
    Sums sums;
    DirectTokens<P> tokens;
    DirectSource<F> source[F::kMatrices];
    int first_slot;
    // Numbers of K from the lane's part of the slot at hand to the end. What lies behind the end counts as zeros, of
    // weights and of tokens.
    int left;

    // The channels of the warp start at `channel`. Lanes beyond the last read the last ones' weights.
    __device__ DirectProduct(const DirectTask<F>& task_, const TokenTile& tile_, int32_t expert, int32_t channel,
                             int first_slot_)
        : task(task_), tile(tile_), sums{}, first_slot(first_slot_) {
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
                    to.weights[m][i] =
                        load_once(F::kAlongN ? from.rows[0] + int64_t{i} * task.pitch : from.rows[F::kAlongN ? 0 : i]);
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
    __device__ void multiply_slot(const DirectQueue<P>& queue, const DirectScales<F>& scales, Sums& to) const {
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
                    if constexpr (P::kTokensAhead) {
                        values[set] = queue.tokens[0][part][n][set];
                    } else {
                        values[set] = next[number % 2][set];
                    }
                }
                if constexpr (!P::kTokensAhead) {
                    if (number + 1 < F::kLoads * P::kTiles) {
                        load_tokens(next[(number + 1) % 2], (n + 1) % P::kTiles, (number + 1) / P::kTiles, inside);
                    }
                }
#pragma unroll
                for (int set = 0; set < F::kSets; ++set) {
                    tokens.arrange(values[set], n);
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

}  // namespace shuntyard
