// Quantises rows of a matrix in memory: the numbers that exporter/quantise.py defines, bit for bit.
//
// The loops are plain, for the compiler to vectorise; they are compiled for several instruction sets, of which the
// processor's best is taken, or the best that the caller allows. All make the same bytes: there are only operations
// that IEEE 754 rounds, in an order that is written down, and none may be contracted or reordered.

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include <unistd.h>

#define SHUNTYARD_EXPORT extern "C" __attribute__((visibility("default")))
#define SHUNTYARD_INLINE static inline __attribute__((always_inline))
#define SHUNTYARD_MEMBER inline __attribute__((always_inline))

namespace {

constexpr float kLeastScale = 0x1p-126f;
constexpr float kLargestFp8 = 448.0f;
constexpr std::size_t kLanes = 16;  // quantise.LANES

SHUNTYARD_INLINE std::uint32_t bits_of(float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

SHUNTYARD_INLINE float float_of(std::uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// A stored value in fp32: bf16, or fp32 itself.
SHUNTYARD_INLINE float widened(std::uint16_t value) { return float_of(static_cast<std::uint32_t>(value) << 16); }
SHUNTYARD_INLINE float widened(float value) { return value; }

// The bits of its magnitude: of finite numbers, the larger one has the larger bits.
SHUNTYARD_INLINE std::uint16_t magnitude_of(std::uint16_t value) { return value & 0x7FFFu; }
SHUNTYARD_INLINE std::uint32_t magnitude_of(float value) { return bits_of(value) & 0x7FFFFFFFu; }

SHUNTYARD_INLINE float of_magnitude(std::uint16_t magnitude) { return widened(magnitude); }
SHUNTYARD_INLINE float of_magnitude(std::uint32_t magnitude) { return float_of(magnitude); }

template <typename T>
using Magnitude = decltype(magnitude_of(T()));

template <typename T>
SHUNTYARD_INLINE float largest_of(const T* values, std::size_t count) {
    Magnitude<T> largest = 0;
    for (std::size_t i = 0; i < count; ++i) {
        const Magnitude<T> own = magnitude_of(values[i]);
        largest = own > largest ? own : largest;
    }
    return of_magnitude(largest);
}

SHUNTYARD_INLINE float at_least(float value, float least) { return value < least ? least : value; }

// To the nearest e4m3fn, half to even. The magnitude is 448 at most.
SHUNTYARD_INLINE std::uint8_t fp8_of(float value) {
    const std::uint32_t bits = bits_of(value), magnitude = bits & 0x7FFFFFFFu;
    // Three bits of mantissa stay; the exponent's bias goes from 127 to 7.
    const std::uint32_t normal = (magnitude + 0x7FFFFu + ((magnitude >> 20) & 1u) - (120u << 23)) >> 20;
    // Below 2**-6 the step is 2**-9, which is that of fp32 at 2**14: an addition rounds.
    const std::uint32_t subnormal = bits_of(float_of(magnitude) + 0x1p14f) - bits_of(0x1p14f);
    return static_cast<std::uint8_t>((magnitude < 0x3C800000u ? subnormal : normal) | ((bits >> 24) & 0x80u));
}

// bf16, half to even, as fp32. Values are finite and stay so.
SHUNTYARD_INLINE float to_bf16(float value) {
    const std::uint32_t bits = bits_of(value);
    return float_of((bits + 0x7FFFu + ((bits >> 16) & 1u)) & 0xFFFF0000u);
}

// To the nearest integer, half to even, of magnitudes below 2**22.
SHUNTYARD_INLINE float to_integer(float value) { return (value + 0x1.8p23f) - 0x1.8p23f; }

SHUNTYARD_INLINE float clipped(float value, float low, float high) {
    value = value < low ? low : value;
    return value > high ? high : value;
}

// The squared error of a group with this scale, in units of the scale; values stand in whole sets of lanes.
SHUNTYARD_INLINE float error_of(const float* values, std::size_t padded, float scale) {
    const float reciprocal = 1.0f / scale;
    float sums[kLanes] = {};
    for (std::size_t i = 0; i < padded; i += kLanes) {
        for (std::size_t k = 0; k < kLanes; ++k) {
            const float exact = values[i + k] * reciprocal;
            const float off = exact - clipped(to_integer(exact), -8.0f, 7.0f);
            sums[k] += off * off;
        }
    }
    for (std::size_t half = kLanes / 2; half > 0; half /= 2) {
        for (std::size_t k = 0; k < half; ++k) sums[k] += sums[k + half];
    }
    return sums[0];
}

SHUNTYARD_INLINE float fp8_scale(float largest) {
    return largest == 0 ? 1.0f : at_least(largest / kLargestFp8, kLeastScale);
}

template <typename T>
SHUNTYARD_INLINE void fp8_row(const T* values, std::size_t columns, float scale, std::uint8_t* __restrict__ codes) {
    for (std::size_t i = 0; i < columns; ++i) {
        codes[i] = fp8_of(clipped(widened(values[i]) / scale, -kLargestFp8, kLargestFp8));
    }
}

template <typename T>
SHUNTYARD_INLINE void fp8_lying(const T* values, std::size_t stride, std::size_t rows, std::size_t columns,
                                bool by_channel, float* scales, std::uint8_t* codes) {
    for (std::size_t row = 0; row < rows; ++row) {
        const T* own = values + row * stride;
        if (by_channel) scales[row] = fp8_scale(largest_of(own, columns));
        fp8_row(own, columns, by_channel ? scales[row] : scales[0], codes + row * columns);
    }
}

// Swaps rows and columns of 8 x 8 bytes, a row in each word, the first column in the lowest byte.
SHUNTYARD_INLINE void turn_8_by_8(std::uint64_t* words) {
    constexpr std::uint64_t masks[] = {0x00FF00FF00FF00FFu, 0x0000FFFF0000FFFFu, 0x00000000FFFFFFFFu};
    for (int step = 0; step < 3; ++step) {
        const int apart = 1 << step, shift = 8 << step;
        for (int i = 0; i < 8; ++i) {
            if (i & apart) continue;
            const std::uint64_t swapped = ((words[i] >> shift) ^ words[i + apart]) & masks[step];
            words[i + apart] ^= swapped;
            words[i] ^= swapped << shift;
        }
    }
}

// values [columns, rows], ``stride`` apart -> codes [rows, columns]. A square of codes is made as it lies,
// and turned in the cache.
template <typename T>
SHUNTYARD_INLINE void fp8_turned(const T* values, std::size_t stride, std::size_t rows, std::size_t columns,
                                 bool by_channel, float* scales, std::uint8_t* codes) {
    constexpr std::size_t most_rows = 256, side = 64;  // 16 KiB of codes
    std::vector<float> own(rows, scales[0]);
    if (by_channel) {
        std::vector<Magnitude<T>> largest(rows, 0);
        Magnitude<T>* __restrict__ found = largest.data();
        for (std::size_t column = 0; column < columns; ++column) {
            const T* line = values + column * stride;
            for (std::size_t row = 0; row < rows; ++row) {
                const Magnitude<T> magnitude = magnitude_of(line[row]);
                found[row] = magnitude > found[row] ? magnitude : found[row];
            }
        }
        for (std::size_t row = 0; row < rows; ++row) own[row] = scales[row] = fp8_scale(of_magnitude(largest[row]));
    }
    alignas(64) std::uint8_t square[side][most_rows] = {};
    for (std::size_t row = 0; row < rows; row += most_rows) {
        const std::size_t high = rows - row < most_rows ? rows - row : most_rows;
        const float* scale = own.data() + row;
        for (std::size_t column = 0; column < columns; column += side) {
            const std::size_t wide = columns - column < side ? columns - column : side;
            for (std::size_t k = 0; k < wide; ++k) {
                const T* line = values + (column + k) * stride + row;
                std::uint8_t* __restrict__ into = square[k];
                for (std::size_t i = 0; i < high; ++i) {
                    into[i] = fp8_of(clipped(widened(line[i]) / scale[i], -kLargestFp8, kLargestFp8));
                }
            }
            for (std::size_t i = 0; i < high; i += 8) {
                // What is going to be written lies too far apart for the processor to foresee it.
                for (std::size_t j = i + 16; j < i + 24 && j < high; ++j) {
                    __builtin_prefetch(codes + (row + j) * columns + column, 1);
                }
                for (std::size_t k = 0; k < wide; k += 8) {
                    std::uint64_t words[8];
                    for (int j = 0; j < 8; ++j) std::memcpy(&words[j], &square[k + j][i], 8);
                    turn_8_by_8(words);
                    const std::size_t count = wide - k < 8 ? wide - k : 8;
                    std::uint8_t* into = codes + (row + i) * columns + column + k;
                    for (std::size_t j = 0; j < 8 && i + j < high; ++j) {
                        if (count == 8)
                            std::memcpy(into + j * columns, &words[j], 8);
                        else
                            std::memcpy(into + j * columns, &words[j], count);
                    }
                }
            }
        }
    }
}

// A row of INT4. ``one`` holds a group in whole sets of lanes, the rest zeros; ``nibbles`` a row.
struct Int4 {
    std::size_t columns, group, padded;
    const float* denominators;
    std::size_t count;
    std::vector<float> one;
    std::vector<std::uint32_t> nibbles;

    SHUNTYARD_MEMBER void row(const float* wide, std::uint16_t* scales, std::uint32_t* __restrict__ codes) {
        float* __restrict__ own = one.data();
        for (std::size_t begin = 0; begin < columns; begin += group) {
            std::memcpy(own, wide + begin, group * sizeof(float));
            const float largest = largest_of(own, group);
            float scale = 1.0f, best = std::numeric_limits<float>::infinity();
            for (std::size_t i = 0; i < count && largest != 0; ++i) {
                const float tried = to_bf16(at_least(largest / denominators[i], kLeastScale));
                const float ratio = tried / largest;
                const float error = error_of(own, padded, tried) * (ratio * ratio);
                if (error < best) {
                    best = error;
                    scale = tried;
                }
            }
            *scales++ = static_cast<std::uint16_t>(bits_of(scale) >> 16);
            std::uint32_t* __restrict__ into = nibbles.data() + begin;
            for (std::size_t i = 0; i < group; ++i) {
                const float code = clipped(to_integer(own[i] / scale), -8.0f, 7.0f);
                into[i] = static_cast<std::uint32_t>(static_cast<std::int32_t>(code) + 8);
            }
        }
        for (std::size_t i = 0; i < columns / 8; ++i) {
            std::uint32_t word = 0;
            for (std::size_t k = 0; k < 8; ++k) word |= nibbles[8 * i + k] << (4 * k);
            codes[i] = word;
        }
    }
};

// values [rows, columns], or turned [columns, rows].
template <typename T>
SHUNTYARD_INLINE void int4(const T* values, std::size_t stride, std::size_t rows, Int4& made, bool turned,
                           std::uint16_t* scales, std::uint32_t* codes) {
    const std::size_t columns = made.columns, most = turned ? 32 : 1;  // a cache line of bf16, two of fp32
    // An odd number of cache lines apart: at a power of two, a column's values would share one set of the cache.
    const std::size_t apart = (columns / 16 | 1) * 16 + (columns % 16 != 0 ? 32 : 0);
    std::vector<float> buffer(most * apart);
    float* __restrict__ wide = buffer.data();
    for (std::size_t row = 0; row < rows; row += most) {
        const std::size_t high = rows - row < most ? rows - row : most;
        if (turned) {
            for (std::size_t column = 0; column < columns; ++column) {
                const T* line = values + column * stride + row;
                for (std::size_t i = 0; i < high; ++i) wide[i * apart + column] = widened(line[i]);
            }
        } else {
            for (std::size_t i = 0; i < columns; ++i) wide[i] = widened(values[row * stride + i]);
        }
        for (std::size_t i = 0; i < high; ++i) {
            made.row(wide + i * apart, scales + (row + i) * (columns / made.group), codes + (row + i) * (columns / 8));
        }
    }
}

struct Fp8Call {
    const void* values;
    bool is_bf16, turned;
    std::size_t stride, rows, columns;
    bool by_channel;
    float* scales;
    std::uint8_t* codes;

    SHUNTYARD_MEMBER void run() const {
        if (is_bf16)
            of(static_cast<const std::uint16_t*>(values));
        else
            of(static_cast<const float*>(values));
    }
    template <typename T>
    SHUNTYARD_MEMBER void of(const T* typed) const {
        if (turned)
            fp8_turned(typed, stride, rows, columns, by_channel, scales, codes);
        else
            fp8_lying(typed, stride, rows, columns, by_channel, scales, codes);
    }
};

struct Int4Call {
    const void* values;
    bool is_bf16, turned;
    std::size_t stride, rows;
    Int4& made;
    std::uint16_t* scales;
    std::uint32_t* codes;

    SHUNTYARD_MEMBER void run() const {
        if (is_bf16)
            int4(static_cast<const std::uint16_t*>(values), stride, rows, made, turned, scales, codes);
        else
            int4(static_cast<const float*>(values), stride, rows, made, turned, scales, codes);
    }
};

#if defined(__x86_64__) && defined(__GNUC__)
template <typename Call>
__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq"))) void run_avx512(const Call& call) {
    call.run();
}

template <typename Call>
__attribute__((target("avx2"))) void run_avx2(const Call& call) {
    call.run();
}

template <typename Call>
void run(const Call& call, int best) {
    const bool avx512 =
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (best >= 2 && avx512)
        run_avx512(call);
    else if (best >= 1 && __builtin_cpu_supports("avx2"))
        run_avx2(call);
    else
        call.run();
}
#else
template <typename Call>
void run(const Call& call, int) {
    call.run();
}
#endif

}  // namespace

// values [rows, columns], turned [columns, rows], bf16 or fp32, finite, ``stride`` values from one line to the next ->
// codes [rows, columns]. By channel, scales [rows] are written; else all rows take scales[0]. best: 2 allows
// AVX-512, 1 AVX2, 0 neither.
SHUNTYARD_EXPORT void shuntyard_quantise_fp8(int best, const void* values, int is_bf16, int turned, std::size_t stride,
                                             std::size_t rows, std::size_t columns, int by_channel, float* scales,
                                             std::uint8_t* codes) {
    run(Fp8Call{values, is_bf16 != 0, turned != 0, stride, rows, columns, by_channel != 0, scales, codes}, best);
}

// values as above -> codes [rows, columns / 8], eight values each, and the bf16 scales [rows, columns / group], each
// the best of its group's largest magnitude over a denominator.
SHUNTYARD_EXPORT void shuntyard_quantise_int4(int best, const void* values, int is_bf16, int turned, std::size_t stride,
                                              std::size_t rows, std::size_t columns, std::size_t group,
                                              const float* denominators, std::size_t count, std::uint16_t* scales,
                                              std::uint32_t* codes) {
    const std::size_t padded = (group + kLanes - 1) / kLanes * kLanes;
    Int4 made{columns, group, padded, denominators, count, {}, {}};
    made.one.resize(padded);
    made.nibbles.resize(columns);
    run(Int4Call{values, is_bf16 != 0, turned != 0, stride, rows, made, scales, codes}, best);
}

// Reads ``rows`` rows of ``width`` bytes, ``stride`` apart in the file from ``offset`` on and ``apart`` in memory.
// Gives the number of rows that came whole in one read each; the caller sees to the next one.
SHUNTYARD_EXPORT std::size_t shuntyard_read_rows(int file, std::uint64_t offset, std::size_t rows, std::size_t width,
                                                 std::size_t stride, std::uint8_t* into, std::size_t apart) {
    for (std::size_t row = 0; row < rows; ++row) {
        const ssize_t got = pread(file, into + row * apart, width, static_cast<off_t>(offset + row * stride));
        if (got < 0 || static_cast<std::size_t>(got) != width) return row;
    }
    return rows;
}
