// FOR TESTS ONLY: what the lanes of a warp do together. See emulator.h.
#include <vector>

#include "host/machine.h"

namespace shuntyard {
namespace emulated {
namespace {

constexpr int kMoreRegisters = 232, kFewerRegisters = 40;  // as primitives.h has them

const Operation kSyncWarp{"sync_warp"}, kShuffle{"shuffle"}, kShuffleXor{"shuffle_xor"}, kShuffleUp{"shuffle_up"},
    kBallot{"ballot"}, kMatchAny{"match_any"}, kReduce{"reduce_max or reduce_min"}, kMore{"more_registers"},
    kFewer{"fewer_registers"};
const Operation kMultiply[] = {{"multiply<kHalf>"}, {"multiply<kBfloat>"}, {"multiply<kE4m3>"}};

struct Exchange {
    uint32_t value;
    int other;  // lane, mask or delta
    uint32_t result;
};

Exchange& exchange_of(Warp& warp, int lane) { return *static_cast<Exchange*>(warp.arguments[lane]); }

struct Fragments {
    float* d;
    const uint32_t* a;
    uint32_t b[2];
};

void unpack(Operand operand, uint32_t word, float* values) {
    const auto half = [&](int i) { return static_cast<uint16_t>(word >> 16 * i); };
    switch (operand) {
        case Operand::kHalf:
            values[0] = half_values()[half(0)];
            values[1] = half_values()[half(1)];
            break;
        case Operand::kBfloat:
            values[0] = to_float(Bfloat{half(0)});
            values[1] = to_float(Bfloat{half(1)});
            break;
        case Operand::kE4m3:
            for (int i = 0; i < 4; ++i) {
                values[i] = e4m3_values()[word >> 8 * i & 0xff];
            }
            break;
    }
}

template <Operand kOperand>
void multiply_warp(Warp& warp) {
    constexpr int kWord = kOperand == Operand::kE4m3 ? 4 : 2;  // numbers of a register
    constexpr int kDepth = 8 * kWord;
    float a[16][kDepth], b[kDepth][8], d[16][8];
    for (int lane = 0; lane < 32; ++lane) {
        const Fragments& own = *static_cast<Fragments*>(warp.arguments[lane]);
        const int g = lane / 4, t = lane % 4;
        for (int half = 0; half < 2; ++half) {
            const int k = kWord * (t + 4 * half);
            unpack(kOperand, own.a[2 * half], &a[g][k]);
            unpack(kOperand, own.a[2 * half + 1], &a[g + 8][k]);
            float values[kWord];
            unpack(kOperand, own.b[half], values);
            for (int i = 0; i < kWord; ++i) {
                b[k + i][g] = values[i];
            }
            d[g + 8 * half][2 * t] = own.d[2 * half];
            d[g + 8 * half][2 * t + 1] = own.d[2 * half + 1];
        }
    }
    for (int row = 0; row < 16; ++row) {
        for (int k = 0; k < kDepth; ++k) {
            for (int column = 0; column < 8; ++column) {
                d[row][column] += a[row][k] * b[k][column];
            }
        }
    }
    for (int lane = 0; lane < 32; ++lane) {
        const Fragments& own = *static_cast<Fragments*>(warp.arguments[lane]);
        const int g = lane / 4, t = lane % 4;
        for (int half = 0; half < 2; ++half) {
            own.d[2 * half] = d[g + 8 * half][2 * t];
            own.d[2 * half + 1] = d[g + 8 * half][2 * t + 1];
        }
    }
}

template <typename X, typename Bits>
std::vector<float> values_of() {
    std::vector<float> all(size_t{1} << 8 * sizeof(Bits));
    for (size_t i = 0; i < all.size(); ++i) {
        all[i] = to_float(X{static_cast<Bits>(i)});
    }
    return all;
}

void nothing(Warp&) {}

int registers_at_start(const Block& block) {
    const int registers = static_cast<int>(65536 / block.threads / 8 * 8);
    return registers < 248 ? registers : 248;
}

}  // namespace

const float* half_values() {
    static const std::vector<float> values = values_of<Half, uint16_t>();
    return values.data();
}

const float* e4m3_values() {
    static const std::vector<float> values = values_of<E4m3, uint8_t>();
    return values.data();
}

void with_warp(const Operation& operation, void* argument, void (*act)(Warp& warp)) {
    Fiber& fiber = self(operation.name);
    Warp& warp = *fiber.warp;
    if (warp.exited > 0) {
        fail("it comes to %s after another lane of its warp has exited", operation.name);
    }
    if (warp.arrived > 0 && warp.operation != &operation) {
        fail("it comes to %s while other lanes of its warp are in %s", operation.name, warp.operation->name);
    }
    warp.operation = &operation;
    warp.arguments[fiber.thread % 32] = argument;
    if (++warp.arrived < 32) {
        wait_as(operation.name);
        return;
    }
    act(warp);
    warp.arrived = 0;
    for (Fiber* other : warp.fibers) {
        if (other != &fiber) {
            make_ready(*other);
        }
    }
    maybe_yield();
}

}  // namespace emulated

using namespace emulated;

void sync_warp() { with_warp(kSyncWarp, nullptr, nothing); }

// A block's threads begin with an equal part of the 65,536 registers of a multiprocessor, in steps of 8. More of them
// come from what others give back: until then, a warp waits.
void more_registers() {
    Fiber& fiber = self("more_registers", kHopper);
    with_warp(kMore, nullptr, nothing);
    Block& block = *fiber.block;
    const int more = kMoreRegisters - registers_at_start(block);
    while (fiber.warp->registers == 0) {
        if (block.free_registers >= 32 * more) {
            block.free_registers -= 32 * more;
            fiber.warp->registers = kMoreRegisters;
            break;
        }
        block.need_registers.push_back(&fiber);
        wait_as("more_registers");
    }
    if (fiber.warp->registers != kMoreRegisters || more < 0) {
        fail("more_registers: %d of them, and its warp had more or has changed their number before", kMoreRegisters);
    }
}

void fewer_registers() {
    self("fewer_registers", kHopper);
    with_warp(kFewer, nullptr, [](Warp& warp) {
        Block& block = *warp.block;
        if (warp.registers != 0) {
            fail("fewer_registers: its warp has changed their number before");
        }
        warp.registers = kFewerRegisters;
        block.free_registers += 32 * (registers_at_start(block) - kFewerRegisters);
        for (Fiber* waiting : block.need_registers) {
            make_ready(*waiting);
        }
        block.need_registers.clear();
    });
}

uint32_t shuffle(uint32_t value, int lane) {
    Exchange own{value, lane, 0};
    with_warp(kShuffle, &own, [](Warp& warp) {
        for (int i = 0; i < 32; ++i) {
            exchange_of(warp, i).result = exchange_of(warp, exchange_of(warp, i).other & 31).value;
        }
    });
    return own.result;
}

uint32_t shuffle_xor(uint32_t value, int mask) {
    Exchange own{value, mask, 0};
    with_warp(kShuffleXor, &own, [](Warp& warp) {
        for (int i = 0; i < 32; ++i) {
            exchange_of(warp, i).result = exchange_of(warp, (i ^ exchange_of(warp, i).other) & 31).value;
        }
    });
    return own.result;
}

int32_t shuffle_up(int32_t value, int delta) {
    Exchange own{static_cast<uint32_t>(value), delta, 0};
    with_warp(kShuffleUp, &own, [](Warp& warp) {
        for (int i = 0; i < 32; ++i) {
            const int from = i - exchange_of(warp, i).other;
            exchange_of(warp, i).result = exchange_of(warp, from >= 0 && from < 32 ? from : i).value;
        }
    });
    return static_cast<int32_t>(own.result);
}

uint32_t ballot(bool value) {
    Exchange own{value, 0, 0};
    with_warp(kBallot, &own, [](Warp& warp) {
        uint32_t all = 0;
        for (int i = 0; i < 32; ++i) {
            all |= exchange_of(warp, i).value << i;
        }
        for (int i = 0; i < 32; ++i) {
            exchange_of(warp, i).result = all;
        }
    });
    return own.result;
}

uint32_t match_any(uint32_t value) {
    Exchange own{value, 0, 0};
    with_warp(kMatchAny, &own, [](Warp& warp) {
        for (int i = 0; i < 32; ++i) {
            uint32_t same = 0;
            for (int j = 0; j < 32; ++j) {
                same |= uint32_t{exchange_of(warp, i).value == exchange_of(warp, j).value} << j;
            }
            exchange_of(warp, i).result = same;
        }
    });
    return own.result;
}

uint32_t reduce_max(uint32_t value) {
    Exchange own{value, 0, 0};
    with_warp(kReduce, &own, [](Warp& warp) {
        uint32_t largest = 0;
        for (int i = 0; i < 32; ++i) {
            largest = exchange_of(warp, i).value > largest ? exchange_of(warp, i).value : largest;
        }
        for (int i = 0; i < 32; ++i) {
            exchange_of(warp, i).result = largest;
        }
    });
    return own.result;
}

void multiply_fragments(Operand operand, float* d, const uint32_t* a, uint32_t b0, uint32_t b1) {
    self("multiply", 89);
    Fragments own{d, a, {b0, b1}};
    constexpr void (*kActs[])(Warp&) = {multiply_warp<Operand::kHalf>, multiply_warp<Operand::kBfloat>,
                                        multiply_warp<Operand::kE4m3>};
    const int which = static_cast<int>(operand);
    with_warp(kMultiply[which], &own, kActs[which]);
}

void shared_max(int32_t* place, int32_t value) {
    Fiber& fiber = self("shared_max");
    offset_in_shared(*fiber.block, place, sizeof(*place), "shared_max");
    maybe_yield();
    *place = *place > value ? *place : value;
}

Quad load(const void* address) {
    if (reinterpret_cast<uintptr_t>(address) % 16 != 0) {
        fail("a load of 16 bytes from %p", address);
    }
    Quad q;
    memcpy(&q, address, sizeof(q));
    return q;
}

Quad load_once(const void* address) { return load(address); }

void store(void* address, const Quad& q) {
    if (reinterpret_cast<uintptr_t>(address) % 16 != 0) {
        fail("a store of 16 bytes to %p", address);
    }
    memcpy(address, &q, sizeof(q));
}

}  // namespace shuntyard
