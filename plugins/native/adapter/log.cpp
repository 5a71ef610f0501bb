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

// One for each layout, so that a pointer can never be read together with the other's kind.
std::atomic<void*> finder_of_tensorrt10{nullptr};
std::atomic<void*> finder_of_tensorrt11{nullptr};

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
    if (void* finder = finder_of_tensorrt11.load()) {
        return log_through<nvinfer1::v_1_0::ILoggerFinder, nvinfer1::v_1_0::ILogger>(finder, severity, message);
    }
    if (void* finder = finder_of_tensorrt10.load()) {
        return log_through<nvinfer1::ILoggerFinder, nvinfer1::ILogger>(finder, severity, message);
    }
    return false;
}

}  // namespace

void set_logger_finder(void* finder) {
    const FinderKind kind = finder_kind(finder);
    finder_of_tensorrt10.store(kind == FinderKind::kTensorRT10 ? finder : nullptr);
    finder_of_tensorrt11.store(kind == FinderKind::kTensorRT11 ? finder : nullptr);
}

void log(Severity severity, const std::string& message) noexcept {
    const std::string line = "[shuntyard] " + message;
    if (!log_to_tensorrt(severity, line.c_str())) {
        std::fprintf(stderr, "%s\n", line.c_str());
    }
}

}  // namespace shuntyard
