// Quantises rows of a matrix in memory: the numbers that exporter/quantise.py defines, bit for bit.
//
// The loops are plain, for the compiler to vectorise; each function is compiled for several instruction sets, of which
// the loader takes the processor's best. All of them make the same bytes: there are only operations that IEEE 754
// rounds, in an order that is written down, and none may be contracted or reordered.

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__)
#define SHUNTYARD_CLONES __attribute__((target_clones("default", "avx2", "avx512f")))
#else
#define SHUNTYARD_CLONES
#endif
#define SHUNTYARD_EXPORT extern "C" __attribute__((visibility("default")))
#define SHUNTYARD_INLINE static inline __attribute__((always_inline))

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

// A row in fp32, of bf16 or fp32.
SHUNTYARD_INLINE void widen(const void* values, bool is_bf16, std::size_t row, std::size_t columns, float* into) {
  if (is_bf16) {
    const std::uint16_t* from = static_cast<const std::uint16_t*>(values) + row * columns;
    for (std::size_t i = 0; i < columns; ++i) into[i] = float_of(static_cast<std::uint32_t>(from[i]) << 16);
  } else {
    std::memcpy(into, static_cast<const float*>(values) + row * columns, columns * sizeof(float));
  }
}

// Of finite numbers, the larger magnitude has the larger bits.
SHUNTYARD_INLINE float largest_of(const float* values, std::size_t count) {
  std::uint32_t largest = 0;
  for (std::size_t i = 0; i < count; ++i) {
    const std::uint32_t bits = bits_of(values[i]) & 0x7FFFFFFFu;
    largest = bits > largest ? bits : largest;
  }
  return float_of(largest);
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
  float sums[kLanes] = {};
  for (std::size_t i = 0; i < padded; i += kLanes) {
    for (std::size_t k = 0; k < kLanes; ++k) {
      const float exact = values[i + k] / scale;
      const float off = exact - clipped(to_integer(exact), -8.0f, 7.0f);
      sums[k] += off * off;
    }
  }
  for (std::size_t half = kLanes / 2; half > 0; half /= 2) {
    for (std::size_t k = 0; k < half; ++k) sums[k] += sums[k + half];
  }
  return sums[0];
}

}  // namespace

// values [rows, columns], bf16 or fp32, finite -> codes [rows, columns]. By channel, scales [rows] are written; else all
// rows take scales[0].
SHUNTYARD_EXPORT SHUNTYARD_CLONES void shuntyard_quantise_fp8(
    const void* values, int is_bf16, std::size_t rows, std::size_t columns, int by_channel, float* scales,
    std::uint8_t* codes) {
  std::vector<float> buffer(columns);
  float* __restrict__ wide = buffer.data();
  for (std::size_t row = 0; row < rows; ++row) {
    widen(values, is_bf16 != 0, row, columns, wide);
    if (by_channel) {
      const float largest = largest_of(wide, columns);
      scales[row] = largest == 0 ? 1.0f : at_least(largest / kLargestFp8, kLeastScale);
    }
    const float scale = by_channel ? scales[row] : scales[0];
    std::uint8_t* __restrict__ own = codes + row * columns;
    for (std::size_t i = 0; i < columns; ++i) own[i] = fp8_of(clipped(wide[i] / scale, -kLargestFp8, kLargestFp8));
  }
}

// values [rows, columns], bf16 or fp32, finite -> codes [rows, columns / 8], eight values each, and the bf16 scales
// [rows, columns / group], each the best of its group's largest magnitude over a denominator.
SHUNTYARD_EXPORT SHUNTYARD_CLONES void shuntyard_quantise_int4(
    const void* values, int is_bf16, std::size_t rows, std::size_t columns, std::size_t group,
    const float* denominators, std::size_t count, std::uint16_t* scales, std::uint32_t* codes) {
  const std::size_t padded = (group + kLanes - 1) / kLanes * kLanes;
  std::vector<float> buffer(columns), one(padded);
  std::vector<std::uint32_t> nibbles(columns);
  float* __restrict__ wide = buffer.data();
  for (std::size_t row = 0; row < rows; ++row) {
    widen(values, is_bf16 != 0, row, columns, wide);
    for (std::size_t begin = 0; begin < columns; begin += group) {
      std::memcpy(one.data(), wide + begin, group * sizeof(float));
      const float largest = largest_of(one.data(), group);
      float scale = 1.0f, best = std::numeric_limits<float>::infinity();
      for (std::size_t i = 0; i < count && largest != 0; ++i) {
        const float tried = to_bf16(at_least(largest / denominators[i], kLeastScale));
        const float ratio = tried / largest;
        const float error = error_of(one.data(), padded, tried) * (ratio * ratio);
        if (error < best) {
          best = error;
          scale = tried;
        }
      }
      *scales++ = static_cast<std::uint16_t>(bits_of(scale) >> 16);
      for (std::size_t i = 0; i < group; ++i) {
        const float code = clipped(to_integer(one[i] / scale), -8.0f, 7.0f);
        nibbles[begin + i] = static_cast<std::uint32_t>(static_cast<std::int32_t>(code) + 8);
      }
    }
    for (std::size_t i = 0; i < columns / 8; ++i) {
      std::uint32_t word = 0;
      for (std::size_t k = 0; k < 8; ++k) word |= nibbles[8 * i + k] << (4 * k);
      *codes++ = word;
    }
  }
}
