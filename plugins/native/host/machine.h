// FOR TESTS ONLY: what the emulator's parts share. See emulator.h.
#pragma once

#include <deque>
#include <map>
#include <memory>
#include <utility>
#include <vector>

#include "kernels/primitives.h"

namespace shuntyard {
namespace emulated {

constexpr uint32_t kWindow = 1024;          // the first address of dynamic shared memory
constexpr size_t kMostShared = 227 * 1024;  // bytes of dynamic shared memory of a block
constexpr uint32_t kLine = 128;             // bytes of a box's row
constexpr unsigned char kPoison = 0xff;     // NaN in every float format, -1 as an integer

struct Block;
struct Warp;

// What lanes, or warps, come to together: told apart by address.
struct Operation {
    const char* name;
};

enum class State {
    kReady,
    kRunning,
    kWaiting,
    kDone
};

// A thread of the kernel.
struct Fiber {
    void* stack_pointer = nullptr;
    Block* block = nullptr;
    Warp* warp = nullptr;
    uint32_t thread = 0;
    State state = State::kReady;
    const char* waits_for = "";  // said of a deadlock: printf's format, for these two numbers
    int64_t which = 0, detail = 0;
    std::map<const TensorMap*, uint64_t> acquired;  // when
    bool copies_unfenced = false;                   // it has initialised barriers that copies do not know yet
};

struct Warp {
    Block* block = nullptr;
    uint32_t number = 0;
    uint32_t priority = 0;
    const Operation* operation = nullptr;
    int arrived = 0, exited = 0;
    Fiber* fibers[32];
    void* arguments[32];
    // Products of its group, by their numbers: all below these have been committed, and waited for.
    uint64_t committed = 0, retired = 0;
    std::deque<uint64_t> groups;  // that are not waited for: the number behind the last product of each
    bool begun = false;
    int registers = 0;  // of a thread
};

// A product that is under way.
struct Pending {
    Product product;
    float* registers[128];
    const uint32_t* operands[128];  // the left one's, if it is in registers,
    uint32_t given[128][4];         // and what they held
    std::vector<float> sums;        // [64, columns]
    bool executed = false;
    int64_t before = -1;      // the number of the product whose sums it goes on with
    bool superseded = false;  // a later one works on the same registers:
    uint64_t after = 0;       // its number
};

struct WarpGroup {
    int arrived = 0;
    Fiber* fibers[128];
    float* registers[128];
    const uint32_t* operands[128];
    Product product;
    uint64_t first = 0;  // the number of pending.front()
    uint64_t executed = 0;
    std::deque<Pending> pending;
    uint64_t issued() const { return first + pending.size(); }
};

struct NamedBarrier {
    int threads = 0;
    std::vector<Fiber*> waiting;
};

struct Mbarrier {
    uint64_t* place;
    uint32_t count, pending;
    int64_t bytes;
    uint64_t phase;
    Fiber* unfenced;  // who has initialised it and not made it known to copies
    std::vector<Fiber*> waiting;
};

struct Block {
    dim3 index;
    uint32_t rank = 0;  // in its cluster
    uint32_t threads = 0, exited = 0;
    char* shared = nullptr;
    size_t shared_size = 0;
    std::vector<bool> brought;  // lines of shared memory that a copy has written
    int free_registers = 0;     // of those that fewer_registers gave back
    std::vector<Fiber*> need_registers;
    std::vector<Fiber*> fibers;
    std::vector<Warp> warps;
    std::vector<WarpGroup> groups;
    NamedBarrier barriers[16];
    std::map<uint32_t, Mbarrier> mbarriers;  // by offset
};

// A TMA load that has not arrived.
struct Copy {
    Block* block;
    uint32_t offset, barrier;
    TensorMap map;
    int32_t column, row;
};

// Chances, of 64, that something happens at a step of the scheduler.
struct Policy {
    enum class Order {
        kFirst,
        kRandom,
        kLast,
        kPriority
    } order;
    uint32_t copies, products, yields;
};

struct Machine {
    uint64_t random_state = 0;
    Policy policy{};
    Fiber* running = nullptr;
    std::vector<std::unique_ptr<Block>> blocks;  // of the cluster that runs
    std::deque<Fiber*> ready;
    std::vector<Fiber*> at_cluster_barrier;
    uint32_t exited = 0, threads = 0;  // of the cluster
    std::vector<Copy> copies;
    uint64_t unexecuted = 0;  // products
    uint64_t clock = 0;       // of maps being published and acquired
};
extern Machine machine;

struct Launch {
    void (*thread)(void*);
    void* arguments;
};
extern Launch the_launch;

// Ends the process with a message that says which thread did it.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

uint32_t random_below(uint32_t bound);
inline bool chance(uint32_t of_64) { return of_64 > 0 && random_below(64) < of_64; }

// The fiber that runs, which there must be, for an operation that takes a device of this compute capability or more;
// kHopper: of this one.
constexpr int kHopper = 90;
Fiber& self(const char* operation, int capability = 0);
// A fiber, to be started from the beginning of the launch's kernel; each number is a stack of its own.
Fiber& fresh_fiber(size_t number);
void run_fiber(Fiber& fiber);
void back_to_scheduler();
void thread_exits(Fiber& fiber);
char* map_memory(size_t size);

// Lets others run until it is made ready.
void wait_as(const char* waits_for, int64_t which = 0, int64_t detail = 0);
void make_ready(Fiber& fiber);
// Lets others run first, sometimes.
void maybe_yield();

// All lanes of the warp; the last to come acts for all, by what each has left in `arguments`.
void with_warp(const Operation& operation, void* argument, void (*act)(Warp& warp));

// Poisoned shared memory, between walls that its end checks.
void give_shared(Block& block, size_t size);

// The offset of `size` bytes of the block's shared memory.
uint32_t offset_in_shared(const Block& block, const void* pointer, size_t size, const char* operation);

// What happens by itself: a copy arrives, a product is computed. False if there is none.
bool bring_some_copy();
void compute_some_product();
void check_finished(Block& block);  // fails if something is still under way when the block ends
bool on_a_fiber_stack(const void* pointer);

// The values of all patterns.
const float* half_values();
const float* e4m3_values();

}  // namespace emulated
}  // namespace shuntyard
