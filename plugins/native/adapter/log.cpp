#include "adapter/log.h"

#include <cxxabi.h>

#include <atomic>
#include <cstdio>
#include <cstring>
#include <typeinfo>

#include "abi/logging.h"

namespace shuntyard {
namespace {

enum class FinderKind {
    kNone,
    kTensorRT10,
    kTensorRT11,
};

// Any polymorphic object, as far as typeid needs to know it.
class Polymorphic {
  public:
    virtual ~Polymorphic() = default;
};

bool derives_from(const std::type_info* type, const std::type_info& base) {
    while (type != nullptr) {
        if (std::strcmp(type->name(), base.name()) == 0) {
            return true;
        }
        const auto* derived = dynamic_cast<const abi::__si_class_type_info*>(type);
        type = derived == nullptr ? nullptr : derived->__base_type;
    }
    return false;
}

// The same entry point is handed objects of two layouts. Their class names differ, and RTTI has them.
FinderKind finder_kind(void* finder) {
    if (finder == nullptr) {
        return FinderKind::kNone;
    }
    const std::type_info& type = typeid(*static_cast<Polymorphic*>(finder));
    if (derives_from(&type, typeid(nvinfer1::v_1_0::ILoggerFinder))) {
        return FinderKind::kTensorRT11;
    }
    if (derives_from(&type, typeid(nvinfer1::ILoggerFinder))) {
        return FinderKind::kTensorRT10;
    }
    return FinderKind::kNone;
}

std::atomic<void*> logger_finder{nullptr};
std::atomic<FinderKind> logger_finder_kind{FinderKind::kNone};

template <typename Finder, typename Logger>
bool log_through(void* finder, Severity severity, const char* message) {
    Logger* logger = static_cast<Finder*>(finder)->findLogger();
    if (logger == nullptr) {
        return false;
    }
    logger->log(static_cast<typename Logger::Severity>(severity), message);
    return true;
}

bool log_to_tensorrt(Severity severity, const char* message) {
    void* finder = logger_finder.load();
    switch (logger_finder_kind.load()) {
        case FinderKind::kTensorRT10:
            return log_through<nvinfer1::ILoggerFinder, nvinfer1::ILogger>(finder, severity, message);
        case FinderKind::kTensorRT11:
            return log_through<nvinfer1::v_1_0::ILoggerFinder, nvinfer1::v_1_0::ILogger>(finder, severity, message);
        case FinderKind::kNone: break;
    }
    return false;
}

}  // namespace

void set_logger_finder(void* finder) {
    logger_finder_kind.store(FinderKind::kNone);
    logger_finder.store(finder);
    logger_finder_kind.store(finder_kind(finder));
}

void log(Severity severity, const std::string& message) noexcept {
    const std::string line = "[shuntyard] " + message;
    if (!log_to_tensorrt(severity, line.c_str())) {
        std::fprintf(stderr, "%s\n", line.c_str());
    }
}

}  // namespace shuntyard
