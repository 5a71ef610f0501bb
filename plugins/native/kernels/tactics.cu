#include "kernels/tactics.h"

namespace shuntyard {
namespace {

// One line: for at most so many rows an expert, if they are spread evenly, this tactic. One of Hopper's only where
// there are tiles for all multiprocessors, twice: its blocks do not share the sums of a tile.
struct Line {
    int64_t rows_of_expert;
    int tactic;
};

constexpr int64_t kAny = INT64_MAX;

// The first line that fits and that the call's form has kernels for; `plain` always does.
//
// Worked out, not yet measured. Decoding reads each expert's weights once, so what counts is how many bytes are on
// their way: `direct` cuts weights finely enough for all multiprocessors even where one expert is all there is. Where
// there are tiles enough for everyone, TMA keeps 192 KiB a multiprocessor on their way; 64 rows a tile multiply fewer
// in vain, 128 read each weight half as often. Where products are the limit, wide tiles take 48 bytes a clock from L2
// where others of 128 rows take 64, of perhaps 40 that there are (scales that are given, and so up's rows of their own:
// 64 and 96). bench/moe_kernels.py times every tactic.
constexpr Line kTable[] = {
    {80, SHUNTYARD_HOPPER_64},   {kAny, SHUNTYARD_HOPPER_WIDE}, {kAny, SHUNTYARD_HOPPER_128},
    {8, SHUNTYARD_DIRECT_8},     {16, SHUNTYARD_DIRECT_16},     {32, SHUNTYARD_DIRECT_32},
    {kAny, SHUNTYARD_DIRECT_64}, {kAny, SHUNTYARD_DIRECT_32},   {kAny, SHUNTYARD_DIRECT_16},
    {kAny, SHUNTYARD_PLAIN},
};

struct Tactic {
    const char* name;
    enum {
        kTable,
        kPlain,
        kDirect,
        kHopper
    } family;
    int tokens;       // of a tile, direct
    HopperTile tile;  // hopper
};

// By their numbers.
constexpr Tactic kTactics[] = {
    {"by shape", Tactic::kTable, 0, {}},
    {"plain", Tactic::kPlain, 0, {}},
    {"direct, 8 tokens a tile", Tactic::kDirect, 8, {}},
    {"direct, 16 tokens a tile", Tactic::kDirect, 16, {}},
    {"direct, 32 tokens a tile", Tactic::kDirect, 32, {}},
    {"direct, 64 tokens a tile", Tactic::kDirect, 64, {}},
    {"hopper, 64 rows a tile", Tactic::kHopper, 0, HopperTile::k64},
    {"hopper, 128 rows a tile", Tactic::kHopper, 0, HopperTile::k128},
    {"hopper, 128 rows a wide tile", Tactic::kHopper, 0, HopperTile::kWide},
};
static_assert(sizeof(kTactics) / sizeof(Tactic) == SHUNTYARD_LAST_TACTIC + 1, "one line for each number");

}  // namespace

bool takes(const Experts& call, int tactic) {
    switch (kTactics[tactic].family) {
        case Tactic::kPlain: return true;
        case Tactic::kDirect: return direct_takes(call, kTactics[tactic].tokens);
        case Tactic::kHopper: return hopper_takes(call, kTactics[tactic].tile);
        default: return false;
    }
}

int by_shape(const Experts& call) {
    // Tiles of the second product, which are fewest: 256 columns, and one of rows for each expert that may have some.
    const int64_t busy = call.experts < call.all_rows ? call.experts : call.all_rows;
    const int64_t tiles = (busy + call.all_rows / 128) * ceil_div(call.width, 256);
    const bool many = tiles >= 2 * call.device.multiprocessors;
    for (const Line& line : kTable) {
        if (ceil_div(call.all_rows, call.experts) <= line.rows_of_expert &&
            (many || kTactics[line.tactic].family != Tactic::kHopper) && takes(call, line.tactic)) {
            return line.tactic;
        }
    }
    return SHUNTYARD_PLAIN;
}

int run(const Experts& call, int tactic) {
    switch (kTactics[tactic].family) {
        case Tactic::kDirect: return run_direct(call, kTactics[tactic].tokens);
        case Tactic::kHopper: return run_hopper(call, kTactics[tactic].tile);
        default: return run_plain(call);
    }
}

}  // namespace shuntyard

const char* shuntyard_tactic_name(int tactic) {
    return tactic < 0 || tactic > SHUNTYARD_LAST_TACTIC ? "an unknown tactic" : shuntyard::kTactics[tactic].name;
}
