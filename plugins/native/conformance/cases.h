// Cases: calls of an op, with what must come out. tests/plugins/conformance writes them.
//
// A file of cases, little-endian and without padding; `text` is a u16 and so many bytes:
//
//   file       "SHYCASES", u32 version = 1, cases up to the end
//   case       u64 bytes that follow; text name; u8 op (0 routing, 1 experts, 2 scatter-add); u8 flags;
//              i32 top_k, i32 experts; text layout; i32 group_size; text activations (of experts alone);
//              u16 tables; u32 inputs; u32 outputs (each count followed by so many)
//   table      u8 bytes of an item; u32 items; the items
//   input      u8 nvinfer1::DataType; u8 rank; i64 extents; a source; u32 patches, each u64 element and an item
//   source     u8 0  literal   the items
//              u8 1  uniform   u64 seed, u8 bits, i32 e:   (u >> (64 - bits)) - 2^(bits - 1), times 2^e
//              u8 2  table     u64 seed, u16 table:        item (u >> 32) * items >> 32
//              u8 3  bits      u64 seed:                   the lowest bits of u
//              u8 4  biased    u64 seed, u8 bits, i32 e, u16 table: uniform, plus item i % items of a table, in fp32
//   output     u8 nvinfer1::DataType; u8 rank; i64 extents; a judgement
//   judgement  u8 0  none
//              u8 1  exact     u64 stride, u64 n; n items: elements 0, stride, 2 * stride, ...; any NaN is one
//              u8 2  near      f64 tolerance, u64 stride, u64 n; n items; no number where the item is none
//              u8 3  between   u64 stride, u64 n; n lower bounds, n upper bounds, in the output's type; NaN as above
//              u8 4  one of    for each row: u8 whether it may be NaN, u16 candidates; each with the row's lower bounds
//                              and its upper bounds
//
// u is the number of a seed and an element: splitmix64, whose state at element i is seed + (i + 1) * its constant,
// 0x9e3779b97f4a7c15.
// flags: 1: runs may differ, since broken indices leave two right answers.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "abi/types.h"

namespace conformance {

using Bytes = std::vector<unsigned char>;

enum class SourceKind : uint8_t {
    kLiteral = 0,
    kUniform = 1,
    kTable = 2,
    kBits = 3,
    kBiased = 4
};

struct Table {
    size_t item = 0;
    Bytes items;
    size_t size() const { return items.size() / item; }
};

struct Source {
    SourceKind kind = SourceKind::kLiteral;
    uint64_t seed = 0;
    int bits = 0, exponent = 0;
    const Table* table = nullptr;
    Bytes literal;
};

struct Tensor {
    nvinfer1::DataType type = nvinfer1::DataType::kFLOAT;
    std::vector<int64_t> extents;

    int64_t elements() const;
    size_t item() const;
    size_t bytes() const { return static_cast<size_t>(elements()) * item(); }
};

struct Input : Tensor {
    Source source;
    std::vector<std::pair<uint64_t, Bytes>> patches;

    // Its content, into bytes() bytes.
    void make(unsigned char* to) const;
};

enum class JudgementKind : uint8_t {
    kNone = 0,
    kExact = 1,
    kNear = 2,
    kBetween = 3,
    kOneOf = 4
};

struct Candidates {
    bool may_be_nan = false;
    std::vector<Bytes> low, high;
};

struct Output : Tensor {
    JudgementKind judgement = JudgementKind::kNone;
    double tolerance = 0;
    uint64_t stride = 1;
    Bytes low, high;  // `low` holds the one number where there are no two
    std::vector<Candidates> rows;
};

struct Case {
    std::string name, layout, activations;
    int op = 0;
    bool runs_may_differ = false;
    int32_t top_k = 0, experts = 0, group_size = 0;
    std::vector<Table> tables;
    std::vector<Input> inputs;
    std::vector<Output> outputs;
};

extern const char* const kOpNames[3];

// Reads one case after the other, so that a file of any size may come through a pipe.
class Reader {
  public:
    // Of a path, or stdin if it is "-". Throws std::runtime_error, as next() does.
    explicit Reader(const std::string& path);
    ~Reader();
    Reader(const Reader&) = delete;
    Reader& operator=(const Reader&) = delete;

    bool next(Case& made);

  private:
    bool read(void* to, size_t bytes);
    std::FILE* file_;
};

}  // namespace conformance
