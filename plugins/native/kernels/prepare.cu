// One block a row. The row is read once or twice: a second time, from cache, where its own largest magnitude has to be
// known before the first code can be made.
#include "kernels/prepare.h"

#include "kernels/hopper.h"

namespace shuntyard {
namespace {

constexpr unsigned kFewThreads = 128, kMostThreads = 512;
constexpr int64_t kFewRows = 512;
constexpr int kAhead = 2;                        // loads of a thread on their way
constexpr size_t kMapSpace = sizeof(TensorMap);  // a multiple of 128, as tensormap.replace wants its place
static_assert(2 * sizeof(float) * kMostThreads / 32 <= kFewThreads / 32 * kMapSpace, "two reductions have room");

// Values of a row as they are multiplied, in fp32: what X holds.
template <typename X>
struct Row {
    const X* values;
    float score;
    bool scaled, exists;

    __device__ float made(X value) const { return scaled ? rounded_to<X>(to_float(value) * score) : to_float(value); }
};

template <typename X>
constexpr int64_t kVector = 16 / sizeof(X);

// Calls take(column, values) for the thread's pieces of the row: 16 bytes at a time if `wide`, else one value.
template <typename X, typename Take>
__device__ inline void walk(const Row<X>& row, int64_t width, bool wide, const Take& take) {
    if (!wide || !row.exists) {
        for (int64_t column = threadIdx.x; column < width; column += blockDim.x) {
            const float value[1] = {row.exists ? row.made(row.values[column]) : not_a_number()};
            take(column, value);
        }
        return;
    }
    const int64_t step = blockDim.x * kVector<X>;
    for (int64_t first = threadIdx.x * kVector<X>; first < width; first += kAhead * step) {
        Quad raw[kAhead];
#pragma unroll
        for (int ahead = 0; ahead < kAhead; ++ahead) {
            const int64_t column = first + ahead * step;
            if (column < width) {
                raw[ahead] = load(row.values + column);
            }
        }
#pragma unroll
        for (int ahead = 0; ahead < kAhead; ++ahead) {
            const int64_t column = first + ahead * step;
            if (column < width) {
                X piece[kVector<X>];
                memcpy(piece, &raw[ahead], sizeof(piece));
                float values[kVector<X>];
                for (int i = 0; i < kVector<X>; ++i) {
                    values[i] = row.made(piece[i]);
                }
                take(column, values);
            }
        }
    }
}

// As one access, if there are several.
template <typename T, int kCount>
__device__ inline void put(T* to, const float (&values)[kCount]) {
    alignas(kCount * sizeof(T)) T made[kCount];
    for (int i = 0; i < kCount; ++i) {
        made[i] = from_float<T>(values[i]);
    }
    memcpy(__builtin_assume_aligned(static_cast<void*>(to), sizeof(made)), made, sizeof(made));
}

// In the order that products with weights in registers take them: two by two.
template <typename X, int kCount>
__device__ inline void put_mixed(X* row, const float (&values)[kCount], int64_t column, int chunk) {
    if constexpr (sizeof(X) == 2 && kCount % 2 == 0) {
        for (int i = 0; i < kCount; i += 2) {
            reinterpret_cast<uint32_t*>(row)[mixed_place(column + i, chunk) / 2] = pack<X>(values[i], values[i + 1]);
        }
    } else {
        for (int i = 0; i < kCount; ++i) {
            row[mixed_place(column + i, chunk)] = from_float<X>(values[i]);
        }
    }
}

template <int kCount>
__device__ inline void put_quotients(E4m3* to, const float (&values)[kCount], float divisor) {
    float quotients[kCount];
    for (int i = 0; i < kCount; ++i) {
        quotients[i] = values[i] / divisor;
    }
    put(to, quotients);
}

// What the block's warps have each found, put together: `better` says whether the first is.
template <typename T, typename Better>
__device__ inline T of_block(T value, T* partial, const Better& better) {
    for (int mask = 16; mask > 0; mask /= 2) {
        const T other = shuffle_xor(value, mask);
        value = better(other, value) ? other : value;
    }
    if (threadIdx.x % 32 == 0) {
        partial[threadIdx.x / 32] = value;
    }
    sync_block();
    for (unsigned warp = 0; warp < blockDim.x / 32; ++warp) {
        value = better(partial[warp], value) ? partial[warp] : value;
    }
    return value;
}

// owner_of(row).expert, by all threads of the block: the expert before the first offset that is beyond the row.
__device__ inline int32_t expert_of_block(int32_t row, const int32_t* expert_offsets, int32_t experts,
                                          int32_t all_rows) {
    int32_t beyond = experts + 1;
    for (int32_t e = 1 + static_cast<int32_t>(threadIdx.x); e <= experts; e += static_cast<int32_t>(blockDim.x)) {
        if (clamped(expert_offsets[e], all_rows) > row) {
            beyond = e;
            break;
        }
    }
    int32_t* const partial = reinterpret_cast<int32_t*>(shared_memory());
    beyond = of_block(beyond, partial, [](int32_t one, int32_t other) { return one < other; });
    return beyond > experts || clamped(expert_offsets[0], all_rows) > row ? -1 : beyond - 1;
}

template <typename X>
__device__ void prepare_row(const Preparation& task, const GivenScales& first, const GivenScales& second, bool wide) {
    const int64_t row = blockIdx.x;
    const bool given = task.codes != nullptr && task.factors == nullptr;
    int32_t expert = 0;
    if (given || task.orphans != nullptr) {
        expert = expert_of_block(static_cast<int32_t>(row), task.expert_offsets, task.experts,
                                 static_cast<int32_t>(task.all_rows));
    }
    if (expert < 0) {
        if (task.orphans != nullptr) {
            X* const out = static_cast<X*>(task.orphans) + row * task.width;
            for (int64_t column = threadIdx.x; column < task.width; column += blockDim.x) {
                out[column] = from_float<X>(not_a_number());
            }
        }
        return;  // nobody multiplies it
    }
    const int64_t slot = task.permutation == nullptr ? row : task.permutation[row];
    const bool exists = 0 <= slot && slot < task.all_rows;
    const int64_t source = task.permutation == nullptr ? row : slot / task.top_k;
    const Row<X> values{static_cast<const X*>(task.rows) + (exists ? source * task.width : 0),
                        task.scores == nullptr ? 1.0f : task.scores[row], task.scores != nullptr, exists};
    float factor = 0, second_factor = 0;
    if (task.factors != nullptr) {
        float largest = 0x1p-100f;
        walk(values, task.width, wide, [&](int64_t, const auto& piece) {
            for (const float value : piece) {
                const float magnitude = fabsf(value);
                largest = magnitude > largest ? magnitude : largest;  // never, if it is NaN
            }
        });
        float* const partial = reinterpret_cast<float*>(shared_memory()) + kMostThreads / 32;
        factor = of_block(largest, partial, [](float one, float other) { return one > other; }) / 448.0f;
        if (threadIdx.x == 0) {
            task.factors[row] = factor;
        }
    }
    if (given) {
        factor = scale_at(first.scales[expert], first.type, 0);
        second_factor = task.more_codes == nullptr ? 0 : scale_at(second.scales[expert], second.type, 0);
    }
    walk(values, task.width, wide, [&](int64_t column, const auto& piece) {
        const int64_t place = row * task.width + column;
        if (task.scaled != nullptr) {
            X* const to = static_cast<X*>(task.scaled) + row * task.width;
            if (task.chunk == 0) {
                put(to + column, piece);
            } else {
                put_mixed(to, piece, column, task.chunk);
            }
        }
        if (task.codes != nullptr) {
            put_quotients(task.codes + place, piece, factor);
        }
        if (task.more_codes != nullptr) {
            put_quotients(task.more_codes + place, piece, second_factor);
        }
    });
}

// One descriptor, a warp each.
__device__ inline void make_map([[maybe_unused]] const WeightMaps& maps, [[maybe_unused]] int64_t number,
                                [[maybe_unused]] int32_t experts) {
#if SHUNTYARD_ON_HOPPER
    TensorMap* const own = reinterpret_cast<TensorMap*>(shared_memory() + threadIdx.x / 32 * kMapSpace);
    if (threadIdx.x % 32 == 0) {
        *own = number < 2 * experts ? maps.into : maps.down;
        tensor_map_point(own, maps.weights[number / experts][number % experts]);
    }
    sync_warp();
    tensor_map_publish(maps.maps + number, own);
#endif
}

template <typename X>
__global__ void __launch_bounds__(kMostThreads)
    prepare_rows(SHUNTYARD_TABLE(Preparation) task, SHUNTYARD_TABLE(GivenScales) first,
                 SHUNTYARD_TABLE(GivenScales) second, SHUNTYARD_TABLE(WeightMaps) maps, bool wide) {
    const int64_t behind = int64_t{blockIdx.x} - task.all_rows;
    if (behind < 0) {
        prepare_row<X>(task, first, second, wide);
        return;
    }
    const int64_t number = behind * (blockDim.x / 32) + threadIdx.x / 32;
    if (number < 3 * task.experts) {
        make_map(maps, number, task.experts);
    }
}

template <typename X>
int run(const Preparation& task, const GivenScales& first, const GivenScales& second, const WeightMaps& maps,
        void* stream) {
    const bool wide = task.width % 16 == 0 && on_16_bytes(task.rows) && on_16_bytes(task.scaled);
    // Few rows: a row is soon read by many threads. Many rows keep the device busy by themselves.
    const int64_t pieces = ceil_div(wide ? task.width / kVector<X> : task.width, 32) * 32;
    const int64_t most = task.all_rows <= kFewRows ? kMostThreads : kFewThreads;
    const int64_t threads = pieces < kFewThreads ? kFewThreads : pieces < most ? pieces : most;
    const int64_t map_blocks = maps.maps == nullptr ? 0 : ceil_div(3 * task.experts, threads / 32);
    Shape shape{grid_of(task.all_rows + map_blocks), dim3(static_cast<unsigned>(threads))};
    shape.shared = threads / 32 * kMapSpace;
    return launch(prepare_rows<X>, shape, stream, task, first, second, maps, wide);
}

}  // namespace

GivenScales given_scales(const Matrices& matrices) {
    GivenScales given;
    given.type = matrices.activation_scale_type;
    memcpy(given.scales, matrices.activation_scales, sizeof(given.scales));
    return given;
}

int prepare(int x_type, const Preparation& task, const GivenScales& first, const GivenScales& second,
            const WeightMaps* maps, void* stream) {
    static const WeightMaps none{};
    const WeightMaps& made = maps == nullptr ? none : *maps;
    switch (x_type) {
        case SHUNTYARD_FP32: return run<float>(task, first, second, made, stream);
        case SHUNTYARD_FP16: return run<Half>(task, first, second, made, stream);
        case SHUNTYARD_BF16: return run<Bfloat>(task, first, second, made, stream);
        default: return SHUNTYARD_INVALID_ARGUMENT;
    }
}

}  // namespace shuntyard
