// A CUDA device, through the runtime alone.
#include <cuda_runtime_api.h>

#include <vector>

#include "conformance/device.h"

namespace conformance {
namespace {

cudaStream_t the_stream = nullptr;
cudaEvent_t begin_event = nullptr, end_event = nullptr;
size_t l2_bytes = 0;

std::string said(cudaError_t error, const char* by) {
    if (error == cudaSuccess) {
        return {};
    }
    return std::string(by) + ": " + cudaGetErrorName(error) + ": " + cudaGetErrorString(error);
}

// Counts the nodes; says so if one of them is not what a call may enqueue.
std::string look_through(cudaGraph_t graph, size_t& count) {
    std::string wrong = said(cudaGraphGetNodes(graph, nullptr, &count), "cudaGraphGetNodes");
    std::vector<cudaGraphNode_t> nodes(count);
    if (wrong.empty()) {
        wrong = said(cudaGraphGetNodes(graph, nodes.data(), &count), "cudaGraphGetNodes");
    }
    for (size_t i = 0; wrong.empty() && i < nodes.size(); ++i) {
        cudaGraphNodeType type;
        wrong = said(cudaGraphNodeGetType(nodes[i], &type), "cudaGraphNodeGetType");
        if (wrong.empty() && type != cudaGraphNodeTypeKernel && type != cudaGraphNodeTypeMemcpy &&
            type != cudaGraphNodeTypeMemset) {
            wrong = "it enqueues more than kernels, copies and fills: a node of type " + std::to_string(type);
        }
    }
    return wrong;
}

}  // namespace

std::string open_device(std::string& named) {
    int count = 0;
    std::string wrong = said(cudaGetDeviceCount(&count), "cudaGetDeviceCount");
    if (!wrong.empty() || count == 0) {
        return "there is no CUDA device" + (wrong.empty() ? "" : ": " + wrong);
    }
    cudaDeviceProp properties;
    if (wrong = said(cudaGetDeviceProperties(&properties, 0), "cudaGetDeviceProperties"); !wrong.empty()) {
        return wrong;
    }
    int driver = 0;
    cudaDriverGetVersion(&driver);
    named = std::string(properties.name) + ", compute capability " + std::to_string(properties.major) + "." +
            std::to_string(properties.minor) + ", driver for CUDA " + std::to_string(driver / 1000) + "." +
            std::to_string(driver % 1000 / 10);
    l2_bytes = static_cast<size_t>(properties.l2CacheSize);
    wrong = said(cudaStreamCreateWithFlags(&the_stream, cudaStreamNonBlocking), "cudaStreamCreateWithFlags");
    if (wrong.empty()) {
        wrong = said(cudaEventCreate(&begin_event), "cudaEventCreate");
    }
    return wrong.empty() ? said(cudaEventCreate(&end_event), "cudaEventCreate") : wrong;
}

bool has_graphs() { return true; }

size_t cache_bytes() { return l2_bytes; }

void* allocate(size_t bytes) {
    void* memory = nullptr;
    return cudaMalloc(&memory, bytes) == cudaSuccess ? memory : nullptr;
}

void release(void* memory) { cudaFree(memory); }

// On the stream, and waited for: a plain cudaMemcpy of pageable memory may return before the device has all of it, and
// the stream does not wait for that.
std::string upload(void* to, const void* from, size_t bytes) {
    const std::string wrong =
        said(cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, the_stream), "copying to the device");
    return wrong.empty() ? said(cudaStreamSynchronize(the_stream), "copying to the device") : wrong;
}

std::string download(void* to, const void* from, size_t bytes) {
    const std::string wrong =
        said(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, the_stream), "copying from the device");
    return wrong.empty() ? said(cudaStreamSynchronize(the_stream), "copying from the device") : wrong;
}

std::string copy_on_device(void* to, const void* from, size_t bytes) {
    return said(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, the_stream), "copying on the device");
}

void* stream() { return the_stream; }

std::string wait() {
    const std::string wrong = said(cudaGetLastError(), "a launch");
    return wrong.empty() ? said(cudaStreamSynchronize(the_stream), "running") : wrong;
}

Graph::~Graph() {
    if (recorded_ != nullptr) {
        cudaGraphExecDestroy(static_cast<cudaGraphExec_t>(recorded_));
    }
}

std::string Graph::record(const std::function<bool()>& calls) {
    std::string wrong = said(cudaStreamBeginCapture(the_stream, cudaStreamCaptureModeGlobal), "cudaStreamBeginCapture");
    if (!wrong.empty()) {
        return wrong;
    }
    const bool enqueued = calls();
    cudaGraph_t graph = nullptr;
    wrong = said(cudaStreamEndCapture(the_stream, &graph), "what it does cannot be captured: cudaStreamEndCapture");
    if (wrong.empty() && !enqueued) {
        wrong = "enqueue fails while it is captured";
    }
    if (wrong.empty()) {
        wrong = look_through(graph, nodes_);
    }
    if (wrong.empty()) {
        cudaGraphExec_t executable = nullptr;
        wrong = said(cudaGraphInstantiate(&executable, graph, 0), "cudaGraphInstantiate");
        recorded_ = executable;
    }
    if (graph != nullptr) {
        cudaGraphDestroy(graph);
    }
    if (!wrong.empty()) {
        cudaGetLastError();  // a failed capture is not the next call's error
    }
    return wrong;
}

std::string Graph::replay() {
    return said(cudaGraphLaunch(static_cast<cudaGraphExec_t>(recorded_), the_stream), "cudaGraphLaunch");
}

std::string Graph::replay_timed(double& microseconds) {
    std::string wrong = said(cudaEventRecord(begin_event, the_stream), "cudaEventRecord");
    if (wrong.empty()) {
        wrong = replay();
    }
    if (wrong.empty()) {
        wrong = said(cudaEventRecord(end_event, the_stream), "cudaEventRecord");
    }
    if (wrong.empty()) {
        wrong = wait();
    }
    float milliseconds = 0;
    if (wrong.empty()) {
        wrong = said(cudaEventElapsedTime(&milliseconds, begin_event, end_event), "cudaEventElapsedTime");
    }
    microseconds = 1e3 * static_cast<double>(milliseconds);
    return wrong;
}

}  // namespace conformance
