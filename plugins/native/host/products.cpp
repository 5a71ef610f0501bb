// FOR TESTS ONLY: products of warp groups. See emulator.h.
//
// A product reads shared memory at some moment between its issue and the wait for its group, in the order of issue.
// Its registers hold a NaN of ours from its issue to that wait, or that for the last product that goes on with them.
#include <algorithm>

#include "host/machine.h"

namespace shuntyard {
namespace emulated {
namespace {

constexpr uint32_t kUnderWay = 0x7fdead0fu;  // a NaN that no arithmetic makes

const Operation kBegin{"products_begin"}, kCommit{"products_commit"}, kWait{"products_wait"};

bool hopper_fp8 = false;

struct Wait {
    size_t pending;
    void* frame;  // of the stack, which grows downwards: what lies below is no longer anybody's
};

int rows_of(int thread) { return 16 * (thread / 32) + thread % 32 / 4; }

// Where d[i] of a thread stands in sums [64, columns].
int place_of(int thread, int i, int columns) {
    const int row = rows_of(thread) + 8 * (i / 2 % 2);
    return row * columns + 8 * (i / 4) + 2 * (thread % 4) + i % 2;
}

int registers_of(const Product& product) { return product.columns / 2; }

struct Descriptor {
    uint32_t start, leading, stride;
};

Descriptor decode(uint64_t word) {
    if (word >> 62 != 1) {
        fail("a product's descriptor names another swizzle than that of 128 bytes");
    }
    if ((word >> 49 & 7) != 0) {
        fail("a product's descriptor has a base offset");
    }
    const auto field = [&](int bit) { return static_cast<uint32_t>(word >> bit & 0x3fff) << 4; };
    return {field(0), field(16), field(32)};
}

// 16 bytes at an address, as the swizzle has them.
const char* sixteen(const Block& block, uint32_t address) {
    const uint32_t swizzled = address ^ (address >> 7 & 7) << 4;
    if (swizzled < kWindow || swizzled + 16 > kWindow + block.shared_size) {
        fail("a product reads at %lld, outside of the block's shared memory of %zu bytes",
             static_cast<long long>(swizzled) - kWindow, block.shared_size);
    }
    if (!block.brought[(swizzled - kWindow) / kLine]) {
        fail("a product reads at %u what no copy has brought, or what another has begun to overwrite",
             swizzled - kWindow);
    }
    return block.shared + (swizzled - kWindow);
}

// The numbers of 16 bytes.
int widen(Operand operand, const char* from, float* to) {
    if (operand == Operand::kE4m3) {
        for (int i = 0; i < 16; ++i) {
            to[i] = e4m3_values()[static_cast<unsigned char>(from[i])];
        }
        return 16;
    }
    uint16_t bits[8];
    memcpy(bits, from, 16);
    for (int i = 0; i < 8; ++i) {
        to[i] = operand == Operand::kHalf ? half_values()[bits[i]] : to_float(Bfloat{bits[i]});
    }
    return 8;
}

// A matrix along K, 32 bytes of each of its rows: to[row * row_stride + k * k_stride].
void read_along_k(const Block& block, Operand operand, uint64_t word, int rows, float* to, int row_stride,
                  int k_stride) {
    const Descriptor from = decode(word);
    for (int row = 0; row < rows; ++row) {
        const uint32_t line = from.start + row / 8 * from.stride + row % 8 * 128;
        int k = 0;
        for (uint32_t half = 0; half < 32; half += 16) {
            float values[16];
            const int count = widen(operand, sixteen(block, line + half), values);
            for (int i = 0; i < count; ++i, ++k) {
                to[row * row_stride + k * k_stride] = values[i];
            }
        }
    }
}

// 16 rows of a matrix along N: to[k * columns + n].
void read_along_n(const Block& block, Operand operand, uint64_t word, int columns, float* to) {
    const Descriptor from = decode(word);
    for (int k = 0; k < 16; ++k) {
        for (int n = 0; n < columns; n += 8) {
            const uint32_t line = from.start + n / 64 * from.leading + k / 8 * from.stride + k % 8 * 128;
            widen(operand, sixteen(block, line + n % 64 * 2), to + k * columns + n);
        }
    }
}

// A left operand [64, 16] that the threads hold: see multiply() in primitives.h.
void read_operands(Operand operand, const uint32_t* const* operands, float* to) {
    for (int thread = 0; thread < 128; ++thread) {
        for (int i = 0; i < 4; ++i) {
            for (int half = 0; half < 2; ++half) {
                const uint16_t bits = static_cast<uint16_t>(operands[thread][i] >> 16 * half);
                const int row = rows_of(thread) + 8 * (i % 2), k = 8 * (i / 2) + 2 * (thread % 4) + half;
                to[row * 16 + k] = operand == Operand::kHalf ? half_values()[bits] : to_float(Bfloat{bits});
            }
        }
    }
}

template <int kColumns>
void add_products(const float* a, const float* b, float* sums, int columns, int depth) {
    for (int row = 0; row < 64; ++row) {
        for (int first = 0; first < columns; first += kColumns) {
            float line[kColumns];
            memcpy(line, sums + row * columns + first, sizeof(line));
            for (int k = 0; k < depth; ++k) {
                const float factor = a[row * depth + k];
                const float* other = b + k * columns + first;
                for (int i = 0; i < kColumns; ++i) {
                    line[i] += factor * other[i];
                }
            }
            memcpy(sums + row * columns + first, line, sizeof(line));
        }
    }
}

void execute(const Block& block, WarpGroup& group, Pending& pending) {
    const Product& product = pending.product;
    const int columns = product.columns;
    const int depth = product.operand == Operand::kE4m3 ? 32 : 16;
    static float a[64 * 32], b[32 * 256];
    if (product.in_registers) {
        read_operands(product.operand, pending.operands, a);  // as late as all else: they must not have changed
    } else {
        read_along_k(block, product.operand, product.left, 64, a, depth, 1);
    }
    if (product.major == Major::kK) {
        read_along_k(block, product.operand, product.right, columns, b, 1, columns);
    } else {
        read_along_n(block, product.operand, product.right, columns, b);
    }
    if (pending.before >= 0 && static_cast<uint64_t>(pending.before) >= group.first) {
        pending.sums = std::move(group.pending[pending.before - group.first].sums);
    }
    if (!product.accumulate) {
        pending.sums.assign(64 * columns, 0.0f);
    }
    if (columns % 32 == 0) {
        add_products<32>(a, b, pending.sums.data(), columns, depth);
    } else {
        add_products<8>(a, b, pending.sums.data(), columns, depth);
    }
    if (hopper_fp8 && product.operand == Operand::kE4m3) {
        for (float& sum : pending.sums) {
            sum = float_of(bits_of(sum) & ~0x3ffu);  // 14 bits, the leading one included
        }
    }
    pending.executed = true;
    --machine.unexecuted;
}

void execute_below(const Block& block, WarpGroup& group, uint64_t end) {
    for (uint64_t number = std::max(group.executed, group.first); number < end; ++number) {
        execute(block, group, group.pending[number - group.first]);
    }
    group.executed = std::max(group.executed, end);
}

void issue(Block& block, WarpGroup& group) {
    const Product& product = group.product;
    Pending next{};
    next.product = product;
    memcpy(next.registers, group.registers, sizeof(next.registers));
    memcpy(next.operands, group.operands, sizeof(next.operands));
    for (int thread = 0; product.in_registers && thread < 128; ++thread) {
        memcpy(next.given[thread], next.operands[thread], sizeof(next.given[thread]));
    }
    const int count = registers_of(product);
    const Warp* warps = group.fibers[0]->warp;
    for (int i = 1; i < 4; ++i) {
        if (warps[i].retired != warps[0].retired || warps[i].committed != warps[0].committed) {
            fail("GroupProduct::multiply: the warps of its group have not waited for the same products");
        }
    }
    for (uint64_t number = warps[0].retired; number < group.issued(); ++number) {
        Pending& other = group.pending[number - group.first];
        if (other.superseded) {
            continue;
        }
        if (other.registers[0] == next.registers[0] && other.product.columns == product.columns) {
            next.before = static_cast<int64_t>(number);
            other.superseded = true;
            other.after = group.issued();
        } else if (next.registers[0] < other.registers[0] + registers_of(other.product) &&
                   other.registers[0] < next.registers[0] + count) {
            fail("GroupProduct::multiply: another product is working on some of its registers");
        }
    }
    if (next.before < 0 || product.in_registers) {
        for (int i = 0; i < 4; ++i) {
            if (!warps[i].begun) {
                fail("GroupProduct::multiply: no products_begin since its registers were free for use");
            }
        }
    }
    if (next.before < 0) {
        next.sums.resize(64 * product.columns);
        for (int thread = 0; thread < 128; ++thread) {
            for (int i = 0; i < count; ++i) {
                float& value = next.registers[thread][i];
                next.sums[place_of(thread, i, product.columns)] = value;
                value = float_of(kUnderWay);
            }
        }
    }
    group.pending.push_back(std::move(next));
    ++machine.unexecuted;
    if (chance(machine.policy.products)) {
        execute_below(block, group, group.issued());
    }
}

// Shows the warp what has come of the products below `end`.
void retire_below(Warp& warp, WarpGroup& group, uint64_t end) {
    execute_below(*warp.block, group, end);
    for (; warp.retired < end; ++warp.retired) {
        Pending& done = group.pending[warp.retired - group.first];
        const int first = warp.number % 4 * 32;
        for (int thread = first; thread < first + 32; ++thread) {
            const Wait& wait = *static_cast<Wait*>(warp.arguments[thread - first]);
            if (done.product.in_registers &&
                (static_cast<const void*>(done.operands[thread]) < wait.frame ||
                 memcmp(done.given[thread], done.operands[thread], sizeof(done.given[thread])) != 0)) {
                fail("products_wait: thread %d has written operands that a product was reading", thread);
            }
            if (done.superseded) {
                continue;
            }
            if (static_cast<void*>(done.registers[thread]) < wait.frame) {
                fail("products_wait: the registers of thread %d that a product was working on are gone", thread);
            }
            for (int i = 0; i < registers_of(done.product); ++i) {
                float& value = done.registers[thread][i];
                if (bits_of(value) != kUnderWay) {
                    fail("products_wait: thread %d has written register %d while a product was working on it", thread,
                         i);
                }
                value = done.sums[place_of(thread, i, done.product.columns)];
            }
        }
    }
    const Warp* warps = group.fibers[0]->warp;
    while (!group.pending.empty() && warps[0].retired > group.first && warps[1].retired > group.first &&
           warps[2].retired > group.first && warps[3].retired > group.first) {
        Pending& gone = group.pending.front();
        if (gone.superseded && !group.pending[gone.after - group.first].executed) {
            group.pending[gone.after - group.first].sums = std::move(gone.sums);
        }
        group.pending.pop_front();
        ++group.first;
    }
}

WarpGroup& group_of(const Warp& warp, const char* operation) {
    if (warp.number / 4 >= warp.block->groups.size()) {
        fail("%s: its warp belongs to no group of four", operation);
    }
    return warp.block->groups[warp.number / 4];
}

}  // namespace

void compute_some_product() {
    for (const auto& block : machine.blocks) {
        for (WarpGroup& group : block->groups) {
            const uint64_t executed = std::max(group.executed, group.first);
            if (executed < group.issued() && chance(32)) {
                const uint64_t more = 1 + random_below(static_cast<uint32_t>(group.issued() - executed));
                execute_below(*block, group, executed + more);
                return;
            }
        }
    }
}

}  // namespace emulated

using namespace emulated;

void products_begin() {
    self("products_begin", kHopper);
    with_warp(kBegin, nullptr, [](Warp& warp) { warp.begun = true; });
}

void products_commit() {
    with_warp(kCommit, nullptr, [](Warp& warp) {
        const WarpGroup& group = group_of(warp, "products_commit");
        if (warp.committed == group.issued()) {
            fail("products_commit: there is no product to commit");
        }
        warp.committed = group.issued();
        warp.groups.push_back(warp.committed);
    });
}

void wait_for_products(int pending) {
    Wait own{static_cast<size_t>(pending), __builtin_frame_address(0)};
    with_warp(kWait, &own, [](Warp& warp) {
        WarpGroup& group = group_of(warp, "products_wait");
        const size_t left = static_cast<Wait*>(warp.arguments[0])->pending;
        while (warp.groups.size() > left) {
            const uint64_t end = warp.groups.front();
            warp.groups.pop_front();
            retire_below(warp, group, end);
        }
        warp.begun = false;
    });
}

void multiply_group(float* d, const Product& product, const uint32_t* operands) {
    Fiber& fiber = self("GroupProduct::multiply", kHopper);
    WarpGroup& group = group_of(*fiber.warp, "GroupProduct::multiply");
    if (group.arrived > 0 && (group.product.operand != product.operand || group.product.major != product.major ||
                              group.product.columns != product.columns || group.product.left != product.left ||
                              group.product.right != product.right || group.product.accumulate != product.accumulate ||
                              group.product.in_registers != product.in_registers)) {
        fail("GroupProduct::multiply: the threads of its group multiply different matrices");
    }
    group.product = product;
    group.fibers[fiber.thread % 128] = &fiber;
    group.registers[fiber.thread % 128] = d;
    group.operands[fiber.thread % 128] = operands;
    if (++group.arrived < 128) {
        wait_as("GroupProduct::multiply");
        return;
    }
    group.arrived = 0;
    issue(*fiber.block, group);
    for (Fiber* other : group.fibers) {
        if (other != &fiber) {
            make_ready(*other);
        }
    }
    maybe_yield();
}

}  // namespace shuntyard

extern "C" {

// Whether sums of e4m3 products keep 14 bits, as Hopper's do.
SHUNTYARD_API void test_hopper_fp8(int on) { shuntyard::emulated::hopper_fp8 = on != 0; }
}
