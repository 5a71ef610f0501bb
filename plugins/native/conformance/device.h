// Memory and a stream to run on: CUDA's (device_cuda.cpp), or the host's own (device_host.cpp), where a kernel has run
// when its launch returns. Which of the two a program has is chosen when it is built.
//
// Functions that can fail return what went wrong, or an empty string.
#pragma once

#include <cstddef>
#include <functional>
#include <string>

namespace conformance {

// Finds the device. `named` is what it is.
std::string open_device(std::string& named);

// Whether calls can be captured and timed.
bool has_graphs();

// Bytes of the second-level cache; 0 where nobody knows.
size_t cache_bytes();

void* allocate(size_t bytes);  // null where there is no more
void release(void* memory);
std::string upload(void* to, const void* from, size_t bytes);
std::string download(void* to, const void* from, size_t bytes);
std::string copy_on_device(void* to, const void* from, size_t bytes);

// What is passed to enqueue.
void* stream();

// Waits for all that was enqueued, and says what has failed of it.
std::string wait();

// Some calls, recorded once. Recording shows that they neither allocate nor wait: CUDA refuses to record that, or it
// would be a node of another kind than kernels, copies and fills.
class Graph {
  public:
    Graph() = default;
    ~Graph();
    Graph(const Graph&) = delete;
    Graph& operator=(const Graph&) = delete;

    // `calls` enqueues on stream() and returns whether it could.
    std::string record(const std::function<bool()>& calls);
    // Enqueues them all again.
    std::string replay();
    // Enqueues them and waits; the device's own clock tells how long they took.
    std::string replay_timed(double& microseconds);

    // How many kernels, copies and fills there are.
    size_t nodes() const { return nodes_; }

  private:
    void* recorded_ = nullptr;
    size_t nodes_ = 0;
};

}  // namespace conformance
