// The kernels of the direct family, and their launches.
//
// A block takes one tile of tokens and some channels. Its warps share the channels and split K, taking slots in turn,
// where there are few tokens: then every warp's partial sums are added in the order of warps, through shared memory.
// Or each warp has channels of its own, and all read the same tokens, from L1.
//
// The host knows neither how many rows an expert has nor how many tiles there are. It launches as many blocks as there
// may be tiles, those without one leave, and one more that fills rows of no expert.
#pragma once

#include "kernels/direct_product.h"

namespace shuntyard {

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
            return from_float<X>(swiglu_of<X>(first, scaled(sum[1], 1, row, own)));
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
int launch_plan(const Experts& call, const DirectPart (&parts)[P::F::kMatrices]) {
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
    task.out = down ? call.rows : call.hidden;
    task.all_rows = static_cast<int32_t>(call.all_rows);
    task.top_k = static_cast<int32_t>(call.top_k);
    task.experts = static_cast<int32_t>(call.experts);
    task.depth = static_cast<int32_t>(down ? call.intermediate : call.width);
    task.channels = static_cast<int32_t>(down ? call.width : call.intermediate);
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
int launch_tile(const Experts& call, const DirectPart (&parts)[F::kMatrices], int tokens) {
    switch (tokens) {
        case 8: return launch_plan<DirectPlan<F, 8>>(call, parts);
        case 16: return launch_plan<DirectPlan<F, 16>>(call, parts);
        default: break;
    }
    if constexpr (!F::kAlongN) {  // where there are no registers for more
        switch (tokens) {
            case 32: return launch_plan<DirectPlan<F, 32>>(call, parts);
            case 64: return launch_plan<DirectPlan<F, 64>>(call, parts);
            default: break;
        }
    }
    return SHUNTYARD_INVALID_ARGUMENT;
}

template <typename X, DirectForm kForm>
int launch_form(const Experts& call, bool down, int tokens) {
    constexpr bool kCodes = kForm == DirectForm::kCodes;
    const ExpertMatrices& matrices = call.matrices;
    if (down) {
        const void* const rows = kCodes ? static_cast<const void*>(call.hidden_codes) : call.hidden;
        const DirectPart parts[1] = {{&matrices.down, rows}};
        return launch_tile<DirectFormat<X, kForm, 1>>(call, parts, tokens);
    }
    const DirectPart parts[2] = {{&matrices.gate, kCodes ? static_cast<const void*>(call.gate_codes) : call.x},
                                 {&matrices.up, kCodes ? static_cast<const void*>(call.up_codes) : call.x}};
    return launch_tile<DirectFormat<X, kForm, 2>>(call, parts, tokens);
}

template <DirectForm kForm>
int launch_form(const Experts& call, bool down, int tokens) {
    switch (call.x_type) {
        case SHUNTYARD_FP16: return launch_form<Half, kForm>(call, down, tokens);
        case SHUNTYARD_BF16: return launch_form<Bfloat, kForm>(call, down, tokens);
        default: return SHUNTYARD_INVALID_ARGUMENT;
    }
}

}  // namespace shuntyard
