#include "conformance/arena.h"

#include <algorithm>
#include <cstring>

#include "conformance/device.h"

namespace conformance {
namespace {

constexpr size_t kGuard = 512;    // at least so many bytes before and behind
constexpr size_t kAligned = 256;  // as TensorRT's own allocations

std::string numbered(const char* what, size_t i) { return std::string(what) + " " + std::to_string(i); }

// The first byte in which they differ, from `begin` on; `end` if they do not.
size_t first_difference(const Bytes& a, const Bytes& b, size_t begin, size_t end) {
    if (std::memcmp(a.data() + begin, b.data() + begin, end - begin) == 0) {
        return end;
    }
    return static_cast<size_t>(std::mismatch(a.begin() + static_cast<ptrdiff_t>(begin),
                                             a.begin() + static_cast<ptrdiff_t>(end),
                                             b.begin() + static_cast<ptrdiff_t>(begin))
                                   .first -
                               a.begin());
}

}  // namespace

Arena::~Arena() {
    if (memory_ != nullptr) {
        release(memory_);
    }
}

std::string Arena::lay_out(const Case& made, size_t workspace_size, size_t shift) {
    regions_.clear();
    size_t end = kGuard;
    const auto place = [&](std::string name, size_t bytes, bool written) {
        regions_.push_back({std::move(name), end + shift, bytes, written});
        end += (shift + bytes + kGuard + kAligned - 1) / kAligned * kAligned;
    };
    for (size_t i = 0; i < made.inputs.size(); ++i) {
        place(numbered("input", i), made.inputs[i].bytes(), false);
    }
    for (size_t i = 0; i < made.outputs.size(); ++i) {
        place(numbered("output", i), made.outputs[i].bytes(), true);
    }
    shift = 0;
    place("the workspace", workspace_size, true);
    image_.assign(end, 0);
    for (size_t i = 0; i < made.inputs.size(); ++i) {
        made.inputs[i].make(image_.data() + regions_[i].begin);
    }
    if (end > allocated_) {
        if (memory_ != nullptr) {
            release(memory_);
        }
        allocated_ = std::max(end, 2 * allocated_);
        memory_ = static_cast<unsigned char*>(allocate(allocated_));
        if (memory_ == nullptr) {
            allocated_ = 0;
            return "there is no memory for " + std::to_string(end) + " bytes";
        }
    }
    inputs_.clear();
    outputs_.clear();
    for (const Region& region : regions_) {
        unsigned char* at = memory_ + region.begin;
        if (!region.written) {
            inputs_.push_back(at);
        } else {
            outputs_.push_back(at);
        }
    }
    workspace_ = outputs_.back();
    outputs_.pop_back();
    return {};
}

std::string Arena::prepare(unsigned char guard, unsigned char fill) {
    size_t end = 0;
    for (const Region& region : regions_) {
        std::memset(image_.data() + end, guard, region.begin - end);
        end = region.begin + region.bytes;
        if (region.written) {
            std::memset(image_.data() + region.begin, fill, region.bytes);
        }
    }
    std::memset(image_.data() + end, guard, image_.size() - end);
    return upload(memory_, image_.data(), image_.size());
}

std::string Arena::collect(std::vector<Bytes>& outputs) {
    after_.resize(image_.size());
    if (const std::string wrong = download(after_.data(), memory_, image_.size()); !wrong.empty()) {
        return wrong;
    }
    outputs.clear();
    size_t end = 0;
    std::string before = "the first tensor";
    for (const Region& region : regions_) {
        if (const size_t at = first_difference(image_, after_, end, region.begin); at != region.begin) {
            return end == 0 || at - end >= region.begin - at
                       ? "wrote outside: " + std::to_string(region.begin - at) + " bytes before " + region.name
                       : "wrote outside: at byte " + std::to_string(at - end) + " behind the end of " + before;
        }
        end = region.begin + region.bytes;
        before = region.name;
        if (region.written) {
            outputs.emplace_back(after_.begin() + static_cast<ptrdiff_t>(region.begin),
                                 after_.begin() + static_cast<ptrdiff_t>(end));
        } else if (const size_t at = first_difference(image_, after_, region.begin, end); at != end) {
            return "changed " + region.name + " at byte " + std::to_string(at - region.begin);
        }
    }
    if (const size_t at = first_difference(image_, after_, end, image_.size()); at != image_.size()) {
        return "wrote outside: at byte " + std::to_string(at - end) + " behind the end of " + before;
    }
    outputs.pop_back();  // the workspace
    return {};
}

}  // namespace conformance
