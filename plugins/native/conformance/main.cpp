// The program: kUsage says what it does.
#include <algorithm>
#include <cerrno>
#include <chrono>
#include <climits>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <stdexcept>

#include "conformance/arena.h"
#include "conformance/device.h"
#include "conformance/judge.h"
#include "conformance/session.h"
#include "conformance/timing.h"

namespace conformance {
namespace {

constexpr char kUsage[] = R"(Runs cases through a plugin library as TensorRT would, and judges what comes
out; without TensorRT and Python.

  shuntyard_conformance LIBRARY CASES [options]

  LIBRARY           libshuntyard_plugins.so
  CASES             a file, or - for stdin: gzip -dc cases.bin.gz | ... -
  --tactic N        with tactic N, in the cases that have it
  --every-tactic    with the default, and then with every tactic that the
                    plugin or the C interface has
  --except N        but not with tactic N
  --shift N         tensors lie N bytes, a multiple of 4, behind multiples of
                    256: what wants more must not run
  --only TEXT       the cases whose names hold this
  --every N         the first of each N cases
  --outputs FILE    also writes what came out (of the first run of each case and
                    tactic) for Python to judge
  --most-failures N how many failures are printed in full (20)
  --time            times the cases instead: microseconds a call, on copies of
                    the inputs that no cache holds; on a GPU
  --help            this

Each case runs twice from the plugin's enqueue and, on a GPU, once from a graph
that was captured from it: with other bytes in outputs, workspace and guards
each time, and the same bytes must come out. Exit status: 0 all is well,
1 something failed, 2 it could not run.
)";

struct Options {
    std::string library, cases, only, outputs;
    int32_t tactic = 0, left_out = -1;
    bool every_tactic = false, time = false, help = false;
    unsigned long every = 1, most_failures = 20, shift = 0;
};

struct Filling {
    unsigned char guard, fill;
};
// NaN in every float format, zero, a large number; guards differ from what a stray write would likely leave.
constexpr Filling kFillings[] = {{0xa5, 0xff}, {0xff, 0x00}, {0x5a, 0x7b}};

struct Tally {
    unsigned long cases = 0, runs = 0, failures = 0, tactics_absent = 0;
    std::map<std::string, unsigned long> by_tactic;  // runs
};

// A call whose failure leaves the device unusable.
struct DeviceLost : std::runtime_error {
    using std::runtime_error::runtime_error;
};

std::string difference(const std::vector<Bytes>& a, const std::vector<Bytes>& b, const Case& made) {
    for (size_t i = 0; i < a.size(); ++i) {
        for (size_t byte = 0; byte < a[i].size(); ++byte) {
            if (a[i][byte] != b[i][byte]) {
                return "output " + std::to_string(i) + " at element " + std::to_string(byte / made.outputs[i].item());
            }
        }
    }
    return {};
}

std::string judge_all(const Case& made, const std::vector<Bytes>& outputs) {
    for (size_t i = 0; i < outputs.size(); ++i) {
        if (const std::string wrong = judge(made.outputs[i], outputs[i]); !wrong.empty()) {
            return "output " + std::to_string(i) + ": " + wrong;
        }
    }
    return {};
}

// Runs one case with the tactic that is set; `outputs` are the first run's.
std::string run(Session& session, Arena& arena, const Case& made, std::vector<Bytes>& outputs, Tally& tally) {
    const auto enqueue = [&] { return session.enqueue(arena.inputs(), arena.outputs(), arena.workspace(), stream()); };
    for (int turn = 0; turn < 3; ++turn) {
        const bool from_graph = turn == 2 && has_graphs();
        const std::string which = turn == 0 ? "" : from_graph ? "from a graph: " : "run again: ";
        std::string wrong = arena.prepare(kFillings[turn].guard, kFillings[turn].fill);
        if (!wrong.empty()) {
            throw DeviceLost(wrong);
        }
        if (from_graph) {
            Graph graph;
            wrong = graph.record(enqueue);
            if (!wrong.empty()) {
                return which + wrong;
            }
            wrong = graph.replay();
            wrong = wrong.empty() ? wait() : wrong;
        } else if (!enqueue()) {
            return which + "enqueue fails";
        } else {
            wrong = wait();
        }
        ++tally.runs;
        if (!wrong.empty()) {
            throw DeviceLost(which + wrong);
        }
        std::vector<Bytes> got;
        wrong = arena.collect(got);
        if (!wrong.empty()) {
            return which + wrong;
        }
        if (turn == 0 || made.runs_may_differ) {
            wrong = judge_all(made, got);
        } else if (const std::string differs = difference(outputs, got, made); !differs.empty()) {
            wrong = "not the first run's bytes: " + differs;
        }
        if (turn == 0) {
            outputs = std::move(got);
        }
        if (!wrong.empty()) {
            return which + wrong;
        }
    }
    return {};
}

// As in --outputs: text name, i32 tactic, u32 outputs, each u64 bytes and so many; u64 and text as in cases.h.
void write_outputs(std::FILE* to, const Case& made, int32_t tactic, const std::vector<Bytes>& outputs) {
    const uint16_t length = static_cast<uint16_t>(made.name.size());
    const uint32_t count = static_cast<uint32_t>(outputs.size());
    std::fwrite(&length, sizeof(length), 1, to);
    std::fwrite(made.name.data(), 1, length, to);
    std::fwrite(&tactic, sizeof(tactic), 1, to);
    std::fwrite(&count, sizeof(count), 1, to);
    for (const Bytes& bytes : outputs) {
        const uint64_t size = bytes.size();
        std::fwrite(&size, sizeof(size), 1, to);
        std::fwrite(bytes.data(), 1, bytes.size(), to);
    }
}

void failed(const Options& options, const Case& made, const std::string& tactic, const std::string& what,
            Tally& tally) {
    if (++tally.failures <= options.most_failures) {
        std::printf("FAIL %s%s: %s\n", made.name.c_str(), tactic.c_str(), what.c_str());
        std::fflush(stdout);
    }
}

std::vector<int32_t> chosen(const Options& options, const Session& session, Tally& tally) {
    if (options.every_tactic) {
        std::vector<int32_t> all = session.tactics();
        all.erase(std::remove(all.begin(), all.end(), options.left_out), all.end());
        return all;
    }
    for (const int32_t tactic : session.tactics()) {
        if (tactic == options.tactic) {
            return {tactic};
        }
    }
    ++tally.tactics_absent;
    return {};
}

void time_case(const Case& made, const std::string& tactic, Session& session, Stopwatch& stopwatch) {
    Times times;
    if (const std::string wrong = stopwatch.measure(session, times); !wrong.empty()) {
        throw DeviceLost(wrong);
    }
    std::printf("TIME %s%s: %.3f us, least %.3f us (%zu calls on %zu copies, %g launches each)\n", made.name.c_str(),
                tactic.c_str(), times.median, times.least, times.calls, times.copies, times.launches);
    std::fflush(stdout);
}

void take(const Options& options, const Library& library, const Case& made, Arena& arena, Stopwatch& stopwatch,
          std::FILE* outputs_file, Tally& tally) {
    Session session;
    ++tally.cases;
    if (const std::string wrong = session.open(library, made); !wrong.empty()) {
        failed(options, made, "", wrong, tally);
        return;
    }
    const std::string wrong = options.time ? stopwatch.prepare(made, session.workspace_size())
                                           : arena.lay_out(made, session.workspace_size(), options.shift);
    if (!wrong.empty()) {
        failed(options, made, "", wrong, tally);
        return;
    }
    for (const int32_t tactic : chosen(options, session, tally)) {
        const std::string named = tactic == 0 ? "" : " (tactic " + library.name_of(tactic) + ")";
        try {
            std::string wrong = session.set_tactic(tactic);
            if (wrong.empty() && options.time) {
                time_case(made, named, session, stopwatch);
            } else if (wrong.empty()) {
                std::vector<Bytes> outputs;
                const unsigned long before = tally.runs;
                wrong = run(session, arena, made, outputs, tally);
                tally.by_tactic[made.op == 1 ? library.name_of(tactic) : kOpNames[made.op]] += tally.runs - before;
                if (outputs_file != nullptr && !outputs.empty()) {
                    write_outputs(outputs_file, made, tactic, outputs);
                }
            }
            if (!wrong.empty()) {
                failed(options, made, named, wrong, tally);
            }
        } catch (const DeviceLost& lost) {
            failed(options, made, named, lost.what(), tally);
            throw DeviceLost("the device cannot be used any more: the cases behind this one did not run");
        }
    }
}

int run_all(const Options& options) {
    const Library library(options.library);
    Reader reader(options.cases);
    std::string device;
    if (const std::string wrong = open_device(device); !wrong.empty()) {
        throw std::runtime_error(wrong);
    }
    if (options.time && !has_graphs()) {
        throw std::runtime_error("--time needs a GPU, and this program was built without CUDA");
    }
    std::printf("on %s; %s\n", device.c_str(), library.build_info().c_str());
    std::FILE* outputs_file = options.outputs.empty() ? nullptr : std::fopen(options.outputs.c_str(), "wb");
    if (!options.outputs.empty() && outputs_file == nullptr) {
        throw std::runtime_error(options.outputs + " cannot be written");
    }
    const auto begin = std::chrono::steady_clock::now();
    Tally tally;
    Stopwatch stopwatch;
    if (options.time) {
        double rate = 0;
        if (const std::string wrong = stopwatch.copy_rate(rate); !wrong.empty()) {
            throw std::runtime_error(wrong);
        }
        std::printf("COPY %.1f GB/s, read and written\n", rate / 1e9);
    }
    int status = 0;
    try {
        Arena arena;
        Case made;
        for (unsigned long seen = 0; reader.next(made);) {
            if (made.name.find(options.only) != std::string::npos && seen++ % options.every == 0) {
                take(options, library, made, arena, stopwatch, outputs_file, tally);
            }
        }
    } catch (const DeviceLost& lost) {
        std::printf("%s\n", lost.what());
    }
    if (outputs_file != nullptr && std::fclose(outputs_file) != 0) {
        throw std::runtime_error(options.outputs + " cannot be written");
    }
    if (tally.cases == 0) {
        std::printf("there is no such case\n");
        status = 1;
    }
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - begin;
    const std::string absent =
        tally.tactics_absent == 0 ? "" : ", " + std::to_string(tally.tactics_absent) + " cases do not have the tactic";
    std::printf("%lu cases, %lu runs%s, %lu failures, %.1f s\n", tally.cases, tally.runs, absent.c_str(),
                tally.failures, took.count());
    for (const auto& [name, runs] : tally.by_tactic) {
        std::printf("  %lu runs of %s\n", runs, name.c_str());
    }
    if (!options.time && tally.runs == 0) {
        std::printf("nothing has run\n");
        status = 1;
    }
    return tally.failures == 0 ? status : 1;
}

unsigned long whole(const std::string& option, const char* text, unsigned long least, unsigned long most) {
    char* end = nullptr;
    errno = 0;
    const unsigned long value = std::strtoul(text, &end, 10);
    if (*text < '0' || *text > '9' || *end != '\0') {
        throw std::runtime_error(option + ": " + text + " is no number");
    }
    if (errno != 0 || value < least || value > most) {
        throw std::runtime_error(option + ": " + text + " is not from " + std::to_string(least) + " to " +
                                 std::to_string(most));
    }
    return value;
}

Options parse(int argc, char** argv) {
    Options options;
    std::vector<std::string> paths;
    for (int i = 1; i < argc; ++i) {
        const std::string option = argv[i];
        const auto value = [&] {
            if (i + 1 == argc) {
                throw std::runtime_error(option + " needs a value");
            }
            return argv[++i];
        };
        const auto number = [&](unsigned long least, unsigned long most) {
            return whole(option, value(), least, most);
        };
        if (option == "--tactic") {
            options.tactic = static_cast<int32_t>(number(0, INT32_MAX));
        } else if (option == "--except") {
            options.left_out = static_cast<int32_t>(number(0, INT32_MAX));
        } else if (option == "--every-tactic") {
            options.every_tactic = true;
        } else if (option == "--time") {
            options.time = true;
        } else if (option == "--only") {
            options.only = value();
        } else if (option == "--every") {
            options.every = number(1, LONG_MAX);
        } else if (option == "--shift") {
            options.shift = number(0, 252);
        } else if (option == "--outputs") {
            options.outputs = value();
        } else if (option == "--most-failures") {
            options.most_failures = number(0, LONG_MAX);
        } else if (option == "--help" || option == "-h") {
            options.help = true;
            return options;
        } else if (option.size() > 1 && option[0] == '-') {
            throw std::runtime_error("there is no option " + option);
        } else {
            paths.push_back(option);
        }
    }
    if (options.shift % 4 != 0) {
        throw std::runtime_error("--shift must be a multiple of 4");
    }
    if (paths.size() != 2) {
        throw std::runtime_error("give a plugin library and a file of cases; --help says more");
    }
    options.library = paths[0];
    options.cases = paths[1];
    return options;
}

}  // namespace
}  // namespace conformance

int main(int argc, char** argv) {
    try {
        const conformance::Options options = conformance::parse(argc, argv);
        if (options.help) {
            std::fputs(conformance::kUsage, stdout);
            return 0;
        }
        return conformance::run_all(options);
    } catch (const std::exception& error) {
        std::fprintf(stderr, "shuntyard_conformance: %s\n", error.what());
        return 2;
    }
}
