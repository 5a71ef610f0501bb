#include "conformance/cases.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <thread>

#include "conformance/numbers.h"

namespace conformance {
namespace {

constexpr uint64_t kGolden = 0x9e3779b97f4a7c15;

uint64_t number_at(uint64_t seed, uint64_t element) {
    uint64_t z = seed + (element + 1) * kGolden;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    return z ^ z >> 31;
}

// Calls make(first, last) for parts of a range, at the same time if it is long.
template <typename Make>
void in_parts(uint64_t count, Make make) {
    const uint64_t parts = count < (1u << 22) ? 1 : std::max(1u, std::thread::hardware_concurrency());
    std::vector<std::thread> threads;
    for (uint64_t part = 1; part < parts; ++part) {
        threads.emplace_back(make, count * part / parts, count * (part + 1) / parts);
    }
    make(0, count / parts);
    for (std::thread& thread : threads) {
        thread.join();
    }
}

// The body of one case, read front to back.
class Body {
  public:
    explicit Body(const Bytes& bytes) : at_(bytes.data()), end_(bytes.data() + bytes.size()) {}

    const unsigned char* take(size_t bytes) {
        if (bytes > static_cast<size_t>(end_ - at_)) {
            throw std::runtime_error("a case ends before it is complete");
        }
        const unsigned char* taken = at_;
        at_ += bytes;
        return taken;
    }
    template <typename T>
    T number() {
        T value;
        std::memcpy(&value, take(sizeof(T)), sizeof(T));
        return value;
    }
    Bytes bytes(size_t count) {
        const unsigned char* taken = take(count);
        return Bytes(taken, taken + count);
    }
    std::string text() {
        const size_t length = number<uint16_t>();
        return std::string(reinterpret_cast<const char*>(take(length)), length);
    }
    void tensor(Tensor& to) {
        to.type = static_cast<nvinfer1::DataType>(number<uint8_t>());
        to.extents.resize(number<uint8_t>());
        if (to.item() == 0 || to.extents.size() > nvinfer1::Dims::MAX_DIMS) {
            throw std::runtime_error("a tensor of an unknown type, or of too many dimensions");
        }
        for (int64_t& extent : to.extents) {
            extent = number<int64_t>();
            if (extent < 0) {
                throw std::runtime_error("a negative extent");
            }
        }
    }
    bool at_end() const { return at_ == end_; }

  private:
    const unsigned char *at_, *end_;
};

const Table* table_of(const Case& own, uint16_t index) {
    if (index >= own.tables.size() || own.tables[index].items.empty()) {
        throw std::runtime_error("a table that is not there, or empty");
    }
    return &own.tables[index];
}

void read_source(Body& body, const Case& own, Input& input) {
    Source& source = input.source;
    source.kind = static_cast<SourceKind>(body.number<uint8_t>());
    if (source.kind == SourceKind::kLiteral) {
        source.literal = body.bytes(input.bytes());
        return;
    }
    source.seed = body.number<uint64_t>();
    switch (source.kind) {
        case SourceKind::kTable:
            source.table = table_of(own, body.number<uint16_t>());
            if (source.table->item != input.item()) {
                throw std::runtime_error("a table of items of another size");
            }
            return;
        case SourceKind::kBits: return;
        case SourceKind::kUniform:
        case SourceKind::kBiased:
            source.bits = body.number<uint8_t>();
            source.exponent = body.number<int32_t>();
            if (source.kind == SourceKind::kBiased) {
                source.table = table_of(own, body.number<uint16_t>());
            }
            if (source.bits < 1 || source.bits > 24 || (source.table != nullptr && source.table->item != 4)) {
                throw std::runtime_error("a uniform source of more than 24 bits, or whose bias is not fp32");
            }
            return;
        default: throw std::runtime_error("an unknown source of a tensor");
    }
}

void read_judgement(Body& body, Output& output) {
    output.judgement = static_cast<JudgementKind>(body.number<uint8_t>());
    if (output.judgement == JudgementKind::kNone) {
        return;
    }
    if (output.judgement == JudgementKind::kOneOf) {
        const size_t rows = static_cast<size_t>(output.extents.at(0));
        const size_t row_bytes = rows == 0 ? 0 : output.bytes() / rows;
        output.rows.resize(rows);
        for (Candidates& row : output.rows) {
            row.may_be_nan = body.number<uint8_t>() != 0;
            const int count = body.number<uint16_t>();
            for (int i = 0; i < count; ++i) {
                row.low.push_back(body.bytes(row_bytes));
                row.high.push_back(body.bytes(row_bytes));
            }
        }
        return;
    }
    if (output.judgement > JudgementKind::kOneOf) {
        throw std::runtime_error("an unknown kind of judgement");
    }
    output.tolerance = output.judgement == JudgementKind::kNear ? body.number<double>() : 0;
    output.stride = body.number<uint64_t>();
    const uint64_t count = body.number<uint64_t>();
    const uint64_t elements = static_cast<uint64_t>(output.elements());
    if (output.stride == 0 || count != (elements + output.stride - 1) / output.stride) {
        throw std::runtime_error("an output whose judged elements are not the stride's");
    }
    output.low = body.bytes(count * output.item());
    if (output.judgement == JudgementKind::kBetween) {
        output.high = body.bytes(count * output.item());
    }
}

}  // namespace

const char* const kOpNames[3] = {"ShuntyardMoeRouting", "ShuntyardMoeExperts", "ShuntyardMoeScatterAdd"};

int64_t Tensor::elements() const {
    int64_t count = 1;
    for (const int64_t extent : extents) {
        count *= extent;
    }
    return count;
}

size_t Tensor::item() const {
    switch (type) {
        case nvinfer1::DataType::kFLOAT:
        case nvinfer1::DataType::kINT32: return 4;
        case nvinfer1::DataType::kHALF:
        case nvinfer1::DataType::kBF16: return 2;
        case nvinfer1::DataType::kFP8: return 1;
        default: return 0;
    }
}

void Input::make(unsigned char* to) const {
    const uint64_t count = static_cast<uint64_t>(elements());
    const size_t width = item();
    if (source.kind == SourceKind::kLiteral) {
        std::copy(source.literal.begin(), source.literal.end(), to);
    }
    in_parts(count, [&](uint64_t first, uint64_t last) {
        const uint64_t items = source.table == nullptr ? 1 : source.table->size();
        const float unit = std::ldexp(1.0f, source.exponent);
        for (uint64_t i = first; i < last && source.kind != SourceKind::kLiteral; ++i) {
            const uint64_t u = number_at(source.seed, i);
            if (source.kind == SourceKind::kBits) {
                std::memcpy(to + i * width, &u, width);
            } else if (source.kind == SourceKind::kTable) {
                std::memcpy(to + i * width, source.table->items.data() + ((u >> 32) * items >> 32) * width, width);
            } else {
                const int64_t whole = static_cast<int64_t>(u >> (64 - source.bits)) - (int64_t{1} << (source.bits - 1));
                float value = static_cast<float>(whole) * unit;
                if (source.kind == SourceKind::kBiased) {
                    float bias;
                    std::memcpy(&bias, source.table->items.data() + i % items * sizeof(bias), sizeof(bias));
                    value += bias;
                }
                write_exactly(value, type, to + i * width);
            }
        }
    });
    for (const auto& [element, bytes] : patches) {
        std::memcpy(to + element * width, bytes.data(), width);
    }
}

Reader::Reader(const std::string& path) : file_(path == "-" ? stdin : std::fopen(path.c_str(), "rb")) {
    if (file_ == nullptr) {
        throw std::runtime_error(path + " cannot be opened");
    }
    char magic[8];
    uint32_t version = 0;
    if (!read(magic, sizeof(magic)) || std::memcmp(magic, "SHYCASES", 8) != 0 || !read(&version, sizeof(version))) {
        throw std::runtime_error(path + " is no file of cases (compressed ones come through gzip -dc and a pipe)");
    }
    if (version != 1) {
        throw std::runtime_error(path + " is of version " + std::to_string(version) + ", this program reads version 1");
    }
}

Reader::~Reader() {
    if (file_ != stdin) {
        std::fclose(file_);
    }
}

bool Reader::read(void* to, size_t bytes) { return std::fread(to, 1, bytes, file_) == bytes; }

bool Reader::next(Case& made) {
    uint64_t size = 0;
    if (const size_t found = std::fread(&size, 1, sizeof(size), file_); found != sizeof(size)) {
        if (found != 0 || std::ferror(file_) != 0) {
            throw std::runtime_error("the file of cases ends within a case");
        }
        return false;
    }
    Bytes bytes(size);
    if (!read(bytes.data(), size)) {
        throw std::runtime_error("the file of cases ends within a case");
    }
    Body body(bytes);
    made = Case();
    made.name = body.text();
    made.op = body.number<uint8_t>();
    made.runs_may_differ = (body.number<uint8_t>() & 1) != 0;
    made.top_k = body.number<int32_t>();
    made.experts = body.number<int32_t>();
    made.layout = body.text();
    made.group_size = body.number<int32_t>();
    made.activations = body.text();
    made.tables.resize(body.number<uint16_t>());
    for (Table& table : made.tables) {
        table.item = body.number<uint8_t>();
        table.items = body.bytes(table.item * body.number<uint32_t>());
    }
    made.inputs.resize(body.number<uint32_t>());
    for (Input& input : made.inputs) {
        body.tensor(input);
        read_source(body, made, input);
        const uint32_t patches = body.number<uint32_t>();
        for (uint32_t i = 0; i < patches; ++i) {
            const uint64_t element = body.number<uint64_t>();
            if (element >= static_cast<uint64_t>(input.elements())) {
                throw std::runtime_error(made.name + ": a patch beyond its tensor");
            }
            input.patches.emplace_back(element, body.bytes(input.item()));
        }
    }
    made.outputs.resize(body.number<uint32_t>());
    for (Output& output : made.outputs) {
        body.tensor(output);
        read_judgement(body, output);
    }
    if (made.op > 2 || !body.at_end()) {
        throw std::runtime_error(made.name + ": an unknown op, or more bytes than the case needs");
    }
    return true;
}

}  // namespace conformance
