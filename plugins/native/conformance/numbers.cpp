#include "conformance/numbers.h"

#include <cmath>
#include <cstring>

namespace conformance {
namespace {

using nvinfer1::DataType;

uint16_t half_of(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    const uint32_t sign = bits >> 16 & 0x8000;
    const int exponent = static_cast<int>(bits >> 23 & 255) - 127;
    const uint32_t fraction = bits & 0x7fffff;
    if (value == 0) {
        return static_cast<uint16_t>(sign);
    }
    if (exponent < -14) {  // a subnormal number counts units of 2^-24
        return static_cast<uint16_t>(sign | static_cast<uint32_t>(std::ldexp(std::fabs(value), 24)));
    }
    return static_cast<uint16_t>(sign | static_cast<uint32_t>(exponent + 15) << 10 | fraction >> 13);
}

double float_of(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return static_cast<double>(value);
}

// Of sign, `exponents` bits and `fractions` bits, with infinities and NaN.
double small_float(uint32_t bits, int exponents, int fractions) {
    const int bias = (1 << (exponents - 1)) - 1;
    const int exponent = static_cast<int>(bits >> fractions & ((1u << exponents) - 1));
    const uint32_t fraction = bits & ((1u << fractions) - 1);
    const double sign = bits >> (exponents + fractions) & 1 ? -1 : 1;
    if (exponent == (1 << exponents) - 1) {
        return fraction != 0 ? NAN : sign * INFINITY;
    }
    const uint32_t whole = exponent == 0 ? fraction : fraction | 1u << fractions;
    return sign * std::ldexp(static_cast<double>(whole), (exponent == 0 ? 1 : exponent) - bias - fractions);
}

}  // namespace

void write_exactly(float value, DataType type, unsigned char* to) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    uint16_t narrow = static_cast<uint16_t>(bits >> 16);
    switch (type) {
        case DataType::kHALF: narrow = half_of(value); [[fallthrough]];
        case DataType::kBF16: std::memcpy(to, &narrow, sizeof(narrow)); return;
        case DataType::kINT32: bits = static_cast<uint32_t>(static_cast<int32_t>(value)); [[fallthrough]];
        default: std::memcpy(to, &bits, sizeof(bits));
    }
}

double number_of(DataType type, const unsigned char* from) {
    uint16_t narrow;
    uint32_t wide;
    switch (type) {
        case DataType::kHALF: std::memcpy(&narrow, from, sizeof(narrow)); return small_float(narrow, 5, 10);
        case DataType::kBF16: std::memcpy(&narrow, from, sizeof(narrow)); return float_of(uint32_t{narrow} << 16);
        case DataType::kINT32: std::memcpy(&wide, from, sizeof(wide)); return static_cast<int32_t>(wide);
        default: std::memcpy(&wide, from, sizeof(wide)); return float_of(wide);
    }
}

}  // namespace conformance
