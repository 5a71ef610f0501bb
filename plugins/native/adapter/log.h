// Messages to TensorRT's logger.
#pragma once

#include <string>

namespace shuntyard {

enum class Severity : int {
    kError = 1,
    kWarning = 2,
    kInfo = 3,
};

// Remembers where TensorRT's logger is to be had: an ILoggerFinder of TensorRT 10 or 11, or null for none.
void set_logger_finder(void* finder);

// Logs to TensorRT, or to stderr before TensorRT has said where its logger is.
void log(Severity severity, const std::string& message) noexcept;

inline void log_error(const std::string& message) noexcept { log(Severity::kError, message); }

}  // namespace shuntyard
