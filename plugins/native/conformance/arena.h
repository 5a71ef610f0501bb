// The memory of one call: its tensors and workspace, each between guards.
//
// Everything lies in one allocation, as an image that is made on the host, goes to the device whole, and comes back
// whole: what differs then must be outputs and workspace alone.
#pragma once

#include <string>
#include <vector>

#include "conformance/cases.h"

namespace conformance {

class Arena {
  public:
    ~Arena();
    Arena() = default;
    Arena(const Arena&) = delete;
    Arena& operator=(const Arena&) = delete;

    // Places the tensors, `shift` bytes behind multiples of 256, and makes the inputs' content. The workspace stays on
    // such a multiple. Returns what went wrong.
    std::string lay_out(const Case& made, size_t workspace_size, size_t shift);

    // Puts everything as it is before a call: guards and what is to be written hold these bytes.
    std::string prepare(unsigned char guard, unsigned char fill);

    // After a call: takes the outputs out, and says what was written that must not be.
    std::string collect(std::vector<Bytes>& outputs);

    const void* const* inputs() const { return inputs_.data(); }
    void* const* outputs() const { return outputs_.data(); }
    void* workspace() const { return workspace_; }

  private:
    struct Region {
        std::string name;
        size_t begin, bytes;
        bool written;
    };

    std::vector<Region> regions_;
    Bytes image_, after_;
    unsigned char* memory_ = nullptr;
    size_t allocated_ = 0;
    std::vector<const void*> inputs_;
    std::vector<void*> outputs_;
    void* workspace_ = nullptr;
};

}  // namespace conformance
