// The host in the place of a device, for libraries whose kernels were compiled for it.
#include <cstdlib>
#include <cstring>

#include "conformance/device.h"

namespace conformance {

std::string open_device(std::string& named) {
    named = "the host";
    return {};
}

bool has_graphs() { return false; }

size_t cache_bytes() { return 0; }

void* allocate(size_t bytes) { return std::aligned_alloc(256, (bytes + 255) / 256 * 256); }

void release(void* memory) { std::free(memory); }

std::string upload(void* to, const void* from, size_t bytes) {
    std::memcpy(to, from, bytes);
    return {};
}

std::string download(void* to, const void* from, size_t bytes) { return upload(to, from, bytes); }

std::string copy_on_device(void* to, const void* from, size_t bytes) { return upload(to, from, bytes); }

void* stream() { return nullptr; }

std::string wait() { return {}; }

Graph::~Graph() = default;

std::string Graph::record(const std::function<bool()>&) { return "the host has no graphs"; }

std::string Graph::replay() { return "the host has no graphs"; }

std::string Graph::replay_timed(double&) { return "the host has no graphs"; }

}  // namespace conformance
