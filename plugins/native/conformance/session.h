// TensorRT's part: from the library to a plugin that is attached to a context, for the tensors of one case.
//
// Functions that can fail return what went wrong, or an empty string.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "abi/plugin.h"
#include "conformance/cases.h"

namespace conformance {

class Library {
  public:
    // Throws std::runtime_error where the file is no plugin library.
    explicit Library(const std::string& path);

    // Null if there is none of that name.
    nvinfer1::IPluginCreatorV3One* creator_of(const std::string& name) const;
    // What shuntyard_build_info() says, or an empty string.
    std::string build_info() const;
    // The tactics that the library's C interface has for a call, beside those that its plugins offer TensorRT.
    std::vector<int32_t> tactics_of(const Case& made) const;
    // What a tactic is called, or its number.
    std::string name_of(int32_t tactic) const;

  private:
    void* handle_;
    std::vector<nvinfer1::IPluginCreatorV3One*> creators_;
};

class Session {
  public:
    // Builds, stores, loads and attaches.
    std::string open(const Library& library, const Case& made);

    // The default, 0, and then those that the plugin or the C interface has.
    const std::vector<int32_t>& tactics() const { return tactics_; }
    size_t workspace_size() const { return workspace_size_; }

    std::string set_tactic(int32_t tactic);
    // Pointers in the order of the tensors.
    bool enqueue(const void* const* inputs, void* const* outputs, void* workspace, void* stream);

  private:
    std::string build(nvinfer1::IPluginV3& plugin, const Case& made);
    std::string load(nvinfer1::IPluginCreatorV3One& creator, nvinfer1::IPluginV3& built);

    std::unique_ptr<nvinfer1::IPluginV3> loaded_, attached_;
    nvinfer1::IPluginV3OneRuntime* runtime_ = nullptr;
    std::vector<nvinfer1::PluginTensorDesc> descs_;
    int32_t inputs_ = 0, outputs_ = 0;
    std::vector<int32_t> tactics_;
    size_t workspace_size_ = 0;
};

}  // namespace conformance
