// One block a row. The row is read once or twice: a second time, from cache, where its own largest magnitude has to be
// known before the first code can be made.
#include "kernels/prepare.h"

#include "kernels/hopper.h"

namespace shuntyard {
namespace {

constexpr unsigned kThreads = 128;
constexpr unsigned kWarps = kThreads / 32;
constexpr size_t kMapSpace = sizeof(TensorMap);  // a multiple of 128, as tensormap.replace wants its place

// Values of a row as they are multiplied, in fp32: what X holds.
template <typename X>
struct Row {
    const X* values;
    float score;
    bool scaled, exists;

    __device__ float at(int64_t column) const {
        if (!exists) {
            return not_a_number();
        }
        const float value = to_float(values[column]);
        return scaled ? rounded_to<X>(value * score) : value;
    }
};

template <typename X>
constexpr int64_t kVector = 16 / sizeof(X);

// Calls take(column, values) for the thread's pieces of the row: 16 bytes at a time if `wide`, else one value.
template <typename X, typename Take>
__device__ inline void walk(const Row<X>& row, int64_t width, bool wide, const Take& take) {
    if (!wide || !row.exists) {
        for (int64_t column = threadIdx.x; column < width; column += kThreads) {
            const float value[1] = {row.at(column)};
            take(column, value);
        }
        return;
    }
    for (int64_t column = threadIdx.x * kVector<X>; column < width; column += kThreads * kVector<X>) {
        const Quad raw = load(row.values + column);
        X piece[kVector<X>];
        memcpy(piece, &raw, sizeof(raw));
        float values[kVector<X>];
        for (int i = 0; i < kVector<X>; ++i) {
            const float value = to_float(piece[i]);
            values[i] = row.scaled ? rounded_to<X>(value * row.score) : value;
        }
        take(column, values);
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

// The largest of all threads' magnitudes; in any order the same.
__device__ inline float block_max(float value) {
    float* const partial = reinterpret_cast<float*>(shared_memory());
    for (int mask = 16; mask > 0; mask /= 2) {
        const float other = shuffle_xor(value, mask);
        value = other > value ? other : value;
    }
    if (threadIdx.x % 32 == 0) {
        partial[threadIdx.x / 32] = value;
    }
    sync_block();
    for (unsigned warp = 0; warp < kWarps; ++warp) {
        value = partial[warp] > value ? partial[warp] : value;
    }
    return value;
}

template <typename X>
__device__ void prepare_row(const Preparation& task, const GivenScales& first, const GivenScales& second, bool wide) {
    const int64_t row = blockIdx.x;
    const Tile tile = tile_of(row, task.expert_offsets, task.experts, task.all_rows);
    if (tile.orphan && task.orphans != nullptr) {
        X* const out = static_cast<X*>(task.orphans) + row * task.orphan_width;
        for (int64_t column = threadIdx.x; column < task.orphan_width; column += kThreads) {
            out[column] = from_float<X>(not_a_number());
        }
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
        factor = block_max(largest) / 448.0f;
        if (threadIdx.x == 0) {
            task.factors[row] = factor;
        }
    } else if (task.codes != nullptr) {
        const int32_t expert = expert_of(row, task.expert_offsets, task.experts);
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
__global__ void __launch_bounds__(kThreads)
    prepare_rows(SHUNTYARD_TABLE(Preparation) task, SHUNTYARD_TABLE(GivenScales) first,
                 SHUNTYARD_TABLE(GivenScales) second, SHUNTYARD_TABLE(WeightMaps) maps, bool wide) {
    const int64_t behind = int64_t{blockIdx.x} - task.all_rows;
    if (behind < 0) {
        prepare_row<X>(task, first, second, wide);
        return;
    }
    const int64_t number = behind * kWarps + threadIdx.x / 32;
    if (number < 3 * task.experts) {
        make_map(maps, number, task.experts);
    }
}

bool on_16_bytes(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

template <typename X>
int run(const Preparation& task, const GivenScales& first, const GivenScales& second, const WeightMaps& maps,
        void* stream) {
    const bool wide = task.width % 16 == 0 && on_16_bytes(task.rows) && on_16_bytes(task.scaled);
    Shape shape{grid_of(task.all_rows + (maps.maps == nullptr ? 0 : ceil_div(3 * task.experts, kWarps))),
                dim3(kThreads)};
    shape.shared = kWarps * kMapSpace;
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
