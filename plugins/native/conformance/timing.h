// How long calls take, by the device's clock.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "conformance/cases.h"
#include "conformance/session.h"

namespace conformance {

struct Times {
    double median = 0, least = 0;  // microseconds a call
    size_t calls = 0, copies = 0;
    double launches = 0;  // a call
};

// Keeps inputs on the device from one case to the next, since the same weights serve many.
class Stopwatch {
  public:
    ~Stopwatch();

    // Bytes read and written a second by a copy on the device that is far larger than its cache.
    std::string copy_rate(double& bytes_a_second);

    // Readies the tensors of a case: several copies of them, so that no call finds its inputs in the cache.
    std::string prepare(const Case& made, size_t workspace_size);
    std::string measure(Session& session, Times& times);

  private:
    struct Held {
        std::vector<void*> copies;
        bool used = true;
    };

    std::string hold(const Input& input, std::vector<const void*>& pointers);
    void forget_unused();
    void release_outputs();

    std::map<std::string, Held> inputs_;
    std::vector<std::vector<const void*>> input_pointers_;  // by copy
    std::vector<std::vector<void*>> outputs_;               // by copy; the workspace last
    size_t copies_ = 0;
};

}  // namespace conformance
