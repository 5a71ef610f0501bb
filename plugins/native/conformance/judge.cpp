#include "conformance/judge.h"

#include <cmath>
#include <cstdio>
#include <cstring>

#include "conformance/numbers.h"

namespace conformance {
namespace {

constexpr int kShown = 3;

// Collects what is wrong: the first few in words, the others by number.
class Wrong {
  public:
    explicit Wrong(const Output& output) : output_(output) {}

    void element(uint64_t index, double got, const std::string& must) {
        char number[64];
        std::snprintf(number, sizeof(number), " is %.9g, must be ", got);
        add("element " + place(index) + number + must);
    }
    void add(const std::string& what) {
        if (++count_ <= kShown) {
            text_ += (text_.empty() ? "" : "; ") + what;
        }
    }
    std::string text() const {
        return count_ <= kShown ? text_ : text_ + "; and " + std::to_string(count_ - kShown) + " more";
    }

  private:
    std::string place(uint64_t index) const {
        std::string text = "]";
        for (size_t d = output_.extents.size(); d-- > 0;) {
            const uint64_t extent = static_cast<uint64_t>(output_.extents[d]);
            text = (d > 0 ? ", " : "[") + std::to_string(index % extent) + text;
            index /= extent;
        }
        return text;
    }

    const Output& output_;
    uint64_t count_ = 0;
    std::string text_;
};

std::string words(const char* form, double a, double b = 0) {
    char text[128];
    std::snprintf(text, sizeof(text), form, a, b);
    return text;
}

bool within(double got, double low, double high) {
    return std::isnan(low) ? std::isnan(got) : low <= got && got <= high;
}

void judge_elements(const Output& output, const Bytes& got, Wrong& wrong) {
    const size_t item = output.item();
    for (uint64_t i = 0; i * item < output.low.size(); ++i) {
        const uint64_t index = i * output.stride;
        const unsigned char* at = got.data() + index * item;
        const double number = number_of(output.type, at);
        const double low = number_of(output.type, output.low.data() + i * item);
        if (std::isnan(low)) {
            if (!std::isnan(number)) {
                wrong.element(index, number, "NaN");
            }
        } else if (output.judgement == JudgementKind::kExact) {
            if (std::memcmp(at, output.low.data() + i * item, item) != 0) {
                wrong.element(index, number, words("%.9g", low));
            }
        } else if (output.judgement == JudgementKind::kNear) {
            if (number != low && !(std::fabs(number - low) <= output.tolerance)) {
                wrong.element(index, number, words("%.9g +- %.3g", low, output.tolerance));
            }
        } else {
            const double high = number_of(output.type, output.high.data() + i * item);
            if (!within(number, low, high)) {
                wrong.element(index, number, words("between %.9g and %.9g", low, high));
            }
        }
    }
}

void judge_rows(const Output& output, const Bytes& got, Wrong& wrong) {
    const size_t item = output.item();
    for (size_t row = 0; row < output.rows.size(); ++row) {
        const size_t bytes = got.size() / output.rows.size(), count = bytes / item;
        const unsigned char* at = got.data() + row * bytes;
        const Candidates& candidates = output.rows[row];
        bool held = candidates.may_be_nan;
        for (size_t i = 0; held && i < count; ++i) {
            held = std::isnan(number_of(output.type, at + i * item));
        }
        for (size_t c = 0; !held && c < candidates.low.size(); ++c) {
            held = true;
            for (size_t i = 0; held && i < count; ++i) {
                held = within(number_of(output.type, at + i * item),
                              number_of(output.type, candidates.low[c].data() + i * item),
                              number_of(output.type, candidates.high[c].data() + i * item));
            }
        }
        if (!held) {
            wrong.add("row " + std::to_string(row) + ", which begins with " +
                      words("%.9g", number_of(output.type, at)) + ", is " +
                      (candidates.may_be_nan ? "neither NaN nor " : "not ") + "one of the " +
                      std::to_string(candidates.low.size()) + " that it may be");
        }
    }
}

}  // namespace

std::string judge(const Output& output, const Bytes& got) {
    Wrong wrong(output);
    if (output.judgement == JudgementKind::kOneOf) {
        judge_rows(output, got, wrong);
    } else if (output.judgement != JudgementKind::kNone) {
        judge_elements(output, got, wrong);
    }
    return wrong.text();
}

}  // namespace conformance
