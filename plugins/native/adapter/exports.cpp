// The two entry points by which TensorRT's plugin registry takes a library in.
#include "adapter/log.h"
#include "adapter/plugin.h"
#include "shuntyard_plugins.h"

extern "C" SHUNTYARD_API nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count) {
    static shuntyard::Creator routing(shuntyard::kRouting);
    static shuntyard::Creator experts(shuntyard::kExperts);
    static shuntyard::Creator scatter_add(shuntyard::kScatterAdd);
    static nvinfer1::IPluginCreatorInterface* const creators[] = {&routing, &experts, &scatter_add};
    count = 3;
    return creators;
}

// An ILoggerFinder of TensorRT 10 or of 11; see abi/logging.h.
extern "C" SHUNTYARD_API void setLoggerFinder(void* finder) { shuntyard::set_logger_finder(finder); }
