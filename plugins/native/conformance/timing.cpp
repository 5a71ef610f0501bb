#include "conformance/timing.h"

#include <algorithm>

#include "conformance/device.h"

namespace conformance {
namespace {

constexpr size_t kFewestCopies = 3, kMostCopies = 64;
constexpr size_t kCachesFull = 4;      // what is touched before the same copy is again
constexpr double kLongCall = 500;      // microseconds; shorter calls are made more often
constexpr double kOnceWillDo = 20000;  // microseconds
constexpr size_t kRounds = 15, kRoundsOfLong = 7;

double median_of(std::vector<double> values) {
    std::sort(values.begin(), values.end());
    return values[values.size() / 2];
}

// What tells inputs apart.
std::string key_of(const Input& input) {
    std::string key = std::to_string(static_cast<int>(input.type)) + ":";
    for (const int64_t extent : input.extents) {
        key += std::to_string(extent) + ",";
    }
    const Source& source = input.source;
    key += std::to_string(static_cast<int>(source.kind)) + ":" + std::to_string(source.seed) + ":" +
           std::to_string(source.bits) + ":" + std::to_string(source.exponent) + ":";
    const Bytes& bytes = source.table != nullptr ? source.table->items : source.literal;
    key.append(reinterpret_cast<const char*>(bytes.data()), bytes.size());
    for (const auto& [element, patch] : input.patches) {
        key += ";" + std::to_string(element) + "=" + std::string(patch.begin(), patch.end());
    }
    return key;
}

}  // namespace

Stopwatch::~Stopwatch() {
    release_outputs();
    for (auto& [key, held] : inputs_) {
        held.used = false;
    }
    forget_unused();
}

void Stopwatch::release_outputs() {
    for (std::vector<void*>& copy : outputs_) {
        for (void* memory : copy) {
            release(memory);
        }
    }
    outputs_.clear();
}

void Stopwatch::forget_unused() {
    for (auto it = inputs_.begin(); it != inputs_.end();) {
        if (it->second.used) {
            ++it;
            continue;
        }
        for (void* memory : it->second.copies) {
            release(memory);
        }
        it = inputs_.erase(it);
    }
}

std::string Stopwatch::copy_rate(double& bytes_a_second) {
    const size_t bytes = std::max<size_t>(size_t{1} << 30, 16 * cache_bytes());
    void *from = allocate(bytes), *to = allocate(bytes);
    std::string wrong = from == nullptr || to == nullptr ? "there is no memory to copy" : "";
    Graph graph;
    if (wrong.empty()) {
        wrong = graph.record([&] { return copy_on_device(to, from, bytes).empty(); });
    }
    std::vector<double> times(kRounds);
    for (size_t i = 0; wrong.empty() && i < times.size(); ++i) {
        wrong = graph.replay_timed(times[i]);
    }
    bytes_a_second = 2e6 * static_cast<double>(bytes) / median_of(times);
    for (void* memory : {from, to}) {
        if (memory != nullptr) {
            release(memory);
        }
    }
    return wrong;
}

std::string Stopwatch::hold(const Input& input, std::vector<const void*>& pointers) {
    const size_t bytes = std::max<size_t>(1, input.bytes());
    Held& held = inputs_[key_of(input)];
    held.used = true;
    if (held.copies.size() < copies_) {
        const bool first = held.copies.empty();
        while (held.copies.size() < copies_) {
            held.copies.push_back(allocate(bytes));
            if (held.copies.back() == nullptr) {
                held.copies.pop_back();
                return "there is no memory for copy " + std::to_string(held.copies.size()) + " of the inputs";
            }
        }
        if (first) {
            Bytes content(bytes);
            input.make(content.data());
            if (const std::string wrong = upload(held.copies[0], content.data(), bytes); !wrong.empty()) {
                return wrong;
            }
        }
        for (size_t i = 1; i < held.copies.size(); ++i) {
            if (const std::string wrong = copy_on_device(held.copies[i], held.copies[0], bytes); !wrong.empty()) {
                return wrong;
            }
        }
    }
    pointers.assign(held.copies.begin(), held.copies.begin() + static_cast<ptrdiff_t>(copies_));
    return wait();
}

std::string Stopwatch::prepare(const Case& made, size_t workspace_size) {
    release_outputs();
    size_t bytes = workspace_size;
    for (const Input& input : made.inputs) {
        bytes += input.bytes();
    }
    for (const Output& output : made.outputs) {
        bytes += output.bytes();
    }
    copies_ = std::min(kMostCopies, std::max(kFewestCopies, kCachesFull * cache_bytes() / std::max<size_t>(1, bytes)));
    for (auto& [key, held] : inputs_) {
        held.used = false;
    }
    for (const Input& input : made.inputs) {
        inputs_[key_of(input)].used = true;
    }
    forget_unused();
    input_pointers_.assign(copies_, {});
    for (const Input& input : made.inputs) {
        std::vector<const void*> pointers;
        if (const std::string wrong = hold(input, pointers); !wrong.empty()) {
            return wrong;
        }
        for (size_t copy = 0; copy < copies_; ++copy) {
            input_pointers_[copy].push_back(pointers[copy]);
        }
    }
    outputs_.assign(copies_, {});
    for (std::vector<void*>& copy : outputs_) {
        for (const Output& output : made.outputs) {
            copy.push_back(allocate(std::max<size_t>(1, output.bytes())));
        }
        copy.push_back(allocate(std::max<size_t>(1, workspace_size)));
        if (std::count(copy.begin(), copy.end(), nullptr) != 0) {
            return "there is no memory for the outputs";
        }
    }
    return {};
}

std::string Stopwatch::measure(Session& session, Times& times) {
    const auto enqueue_all = [&] {
        for (size_t copy = 0; copy < copies_; ++copy) {
            const std::vector<void*>& outputs = outputs_[copy];
            if (!session.enqueue(input_pointers_[copy].data(), outputs.data(), outputs.back(), stream())) {
                return false;
            }
        }
        return true;
    };
    // Once without a graph: kernels are loaded where they are first used, which capturing may not allow.
    if (const std::string wrong = enqueue_all() ? wait() : "enqueue fails"; !wrong.empty()) {
        return wrong;
    }
    size_t turns = 1;
    for (int attempt = 0; attempt < 2; ++attempt) {
        Graph graph;
        std::string wrong = graph.record([&] {
            for (size_t turn = 0; turn < turns; ++turn) {
                if (!enqueue_all()) {
                    return false;
                }
            }
            return true;
        });
        const double calls = static_cast<double>(turns * copies_);
        const double launches = static_cast<double>(graph.nodes()) / calls;
        double once = 0;
        for (int warm = 0; wrong.empty() && warm < 2; ++warm) {
            wrong = graph.replay_timed(once);
            if (wrong.empty() && once / calls > kOnceWillDo) {
                times = {once / calls, once / calls, turns * copies_, copies_, launches};
                return {};
            }
        }
        if (!wrong.empty()) {
            return wrong;
        }
        const bool is_long = once / calls > kLongCall;
        if (attempt == 0 && !is_long && calls < 60) {
            turns = 60 / copies_ + 1;
            continue;
        }
        std::vector<double> took(is_long ? kRoundsOfLong : kRounds);
        for (double& each : took) {
            if (wrong = graph.replay_timed(each); !wrong.empty()) {
                return wrong;
            }
        }
        const double least = *std::min_element(took.begin(), took.end());
        times = {median_of(took) / calls, least / calls, turns * copies_, copies_, launches};
        return {};
    }
    return "unreachable";
}

}  // namespace conformance
