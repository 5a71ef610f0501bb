// FOR TESTS ONLY: fibers, their scheduler, and barriers of blocks and clusters. See emulator.h.
#include <sys/mman.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <numeric>
#include <string>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#include "host/machine.h"

namespace shuntyard {
namespace emulated {

Machine machine;

namespace {

constexpr size_t kStack = 128 * 1024;
constexpr size_t kGuard = 4096;  // bytes, around stacks and around shared memory
constexpr unsigned char kWall = 0xa5;

uint64_t given_seed = 1;
Device given_device{90, 4};

// -- switching

#if defined(__x86_64__)
// Pushes what a call must keep, leaves the stack at *from, and goes on from the stack `to`.
extern "C" void shuntyard_switch(void** from, void* to);
asm(R"(
.text
.hidden shuntyard_switch
.globl shuntyard_switch
.type shuntyard_switch, @function
shuntyard_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size shuntyard_switch, . - shuntyard_switch
)");

void* prepare(char* stack, void (*entry)()) {
    void** top = reinterpret_cast<void**>(stack + kStack);
    *--top = nullptr;  // nowhere to return to, and the alignment of a call
    *--top = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; ++i) {
        *--top = nullptr;
    }
    return top;
}
#else
void shuntyard_switch(void** from, void* to) {
    ucontext_t here;
    *from = &here;
    swapcontext(&here, static_cast<ucontext_t*>(to));
}

void* prepare(char* stack, void (*entry)()) {
    ucontext_t* context = new (stack) ucontext_t;  // at the end that the stack grows towards
    getcontext(context);
    context->uc_stack.ss_sp = stack + 4096;
    context->uc_stack.ss_size = kStack - 4096;
    context->uc_link = nullptr;
    makecontext(context, entry, 0);
    return context;
}
#endif

struct Launch {
    void (*thread)(void*);
    void* arguments;
};
Launch the_launch;
void* scheduler_stack;

std::vector<char*> stacks;         // all that were ever made
std::vector<char*> arenas;         // shared memory of each block of a cluster, behind a wall
std::vector<std::unique_ptr<Fiber>> fibers;

char* map_memory(size_t size) {
    void* memory = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) {
        fail("no memory");
    }
    return static_cast<char*>(memory);
}

void need_fibers(size_t count) {
    while (fibers.size() < count) {
        constexpr size_t kTogether = 64;
        char* memory = map_memory(kTogether * (kGuard + kStack));
        for (size_t i = 0; i < kTogether; ++i) {
            char* guard = memory + i * (kGuard + kStack);
            mprotect(guard, kGuard, PROT_NONE);
            stacks.push_back(guard + kGuard);
            fibers.push_back(std::make_unique<Fiber>());
        }
    }
}

char* arena(size_t rank) {
    while (arenas.size() <= rank) {
        char* memory = map_memory(kMostShared + 4 * kGuard);
        arenas.push_back(memory + kGuard);  // a page's start: aligned to 1024
    }
    return arenas[rank];
}

void put_wall(char* shared, size_t size) {
    memset(shared - kGuard, kWall, kGuard);
    memset(shared, kPoison, size);
    memset(shared + size, kWall, kGuard);
}

bool wall_stands(const char* shared, size_t size) {
    for (size_t i = 0; i < kGuard; ++i) {
        if (static_cast<unsigned char>(shared[-1 - static_cast<int64_t>(i)]) != kWall ||
            static_cast<unsigned char>(shared[size + i]) != kWall) {
            return false;
        }
    }
    return true;
}

void back_to_scheduler() { shuntyard_switch(&machine.running->stack_pointer, scheduler_stack); }

bool all_of_block_wait(const Block& block) {
    const size_t waiting = block.barriers[0].waiting.size();
    return waiting > 0 && waiting == block.threads - block.exited;
}

void release(std::vector<Fiber*>& waiting) {
    std::vector<Fiber*> woken;
    woken.swap(waiting);
    for (Fiber* fiber : woken) {
        make_ready(*fiber);
    }
}

void thread_exits(Fiber& fiber) {
    Block& block = *fiber.block;
    Warp& warp = *fiber.warp;
    if (warp.arrived > 0) {
        fail("it exits while other lanes of its warp wait for it in %s", warp.operation->name);
    }
    if (fiber.copies_unfenced) {
        fail("it has initialised barriers and called no barrier_init_fence");
    }
    fiber.state = State::kDone;
    ++warp.exited;
    ++block.exited;
    ++machine.exited;
    if (all_of_block_wait(block)) {
        release(block.barriers[0].waiting);
    }
    if (!machine.at_cluster_barrier.empty() &&
        machine.at_cluster_barrier.size() == machine.threads - machine.exited) {
        release(machine.at_cluster_barrier);
    }
    if (block.exited == block.threads) {
        check_finished(block);
        if (!wall_stands(block.shared, block.shared_size)) {
            fail("its block has written outside of its shared memory");
        }
    }
}

void fiber_main() {
    the_launch.thread(the_launch.arguments);
    thread_exits(*machine.running);
    back_to_scheduler();
    abort();  // nobody goes on with it
}

std::string named(const Fiber& fiber) {
    char text[128];
    const dim3& index = fiber.block->index;
    snprintf(text, sizeof(text), "block %u,%u,%u thread %u", index.x, index.y, index.z, fiber.thread);
    return text;
}

[[noreturn]] void report_deadlock() {
    fprintf(stderr, "emulator: deadlock: no thread can go on\n");
    for (const auto& block : machine.blocks) {
        for (uint32_t i = 0; i < block->threads;) {
            const Fiber& first = *block->fibers[i];
            uint32_t end = i;
            const auto same = [&](const Fiber& other) {
                return other.state == first.state && other.waits_for == first.waits_for &&
                       other.which == first.which && other.detail == first.detail;
            };
            while (end < block->threads && same(*block->fibers[end])) {
                ++end;
            }
            fprintf(stderr, "  %s .. %u: ", named(first).c_str(), end - 1);
            if (first.state == State::kDone) {
                fprintf(stderr, "exited\n");
            } else {
                fprintf(stderr, first.waits_for, static_cast<long long>(first.which),
                        static_cast<long long>(first.detail));
                fprintf(stderr, "\n");
            }
            i = end;
        }
        for (const auto& [offset, barrier] : block->mbarriers) {
            fprintf(stderr, "  block %u mbarrier %u: phase %llu, %u of %u arrivals pending, %lld bytes awaited\n",
                    block->index.x, offset, static_cast<unsigned long long>(barrier.phase), barrier.pending,
                    barrier.count, static_cast<long long>(barrier.bytes));
        }
    }
    abort();
}

Fiber* next_fiber() {
    std::deque<Fiber*>& ready = machine.ready;
    size_t which = 0;
    switch (machine.policy.order) {
        case Policy::Order::kFirst: break;
        case Policy::Order::kRandom: which = random_below(ready.size()); break;
        case Policy::Order::kLast: which = ready.size() - 1; break;
        case Policy::Order::kPriority: {
            which = random_below(ready.size());
            const size_t looks = std::min<size_t>(ready.size(), 64);
            const size_t from = random_below(ready.size());
            for (size_t i = 0; i < looks; ++i) {
                const size_t other = (from + i) % ready.size();
                if (ready[other]->warp->priority > ready[which]->warp->priority) {
                    which = other;
                }
            }
            if (chance(1)) {
                ready[which]->warp->priority = random_below(1u << 30);
            }
            break;
        }
    }
    Fiber* chosen = ready[which];
    ready[which] = ready.front();
    ready.pop_front();
    return chosen;
}

void make_block(Block& block, dim3 index, uint32_t rank, const Shape& shape, size_t first_fiber) {
    block.index = index;
    block.rank = rank;
    block.threads = shape.block.x;
    block.shared = arena(rank);
    block.shared_size = shape.shared;
    put_wall(block.shared, block.shared_size);
    block.warps.resize(block.threads / 32);
    block.groups.resize(block.threads / 128);
    for (uint32_t i = 0; i < block.warps.size(); ++i) {
        block.warps[i].block = &block;
        block.warps[i].number = i;
        block.warps[i].priority = random_below(1u << 30);
    }
    for (uint32_t i = 0; i < block.threads; ++i) {
        Fiber& fiber = *fibers[first_fiber + i];
        fiber = Fiber{};
        fiber.stack = stacks[first_fiber + i];
        fiber.stack_pointer = prepare(fiber.stack, fiber_main);
        fiber.block = &block;
        fiber.warp = &block.warps[i / 32];
        fiber.warp->fibers[i % 32] = &fiber;
        fiber.thread = i;
        block.fibers.push_back(&fiber);
        machine.ready.push_back(&fiber);
    }
}

void run_cluster(const Shape& shape, dim3 first) {
    machine.blocks.clear();
    machine.copies.clear();
    machine.at_cluster_barrier.clear();
    machine.unexecuted = 0;
    machine.exited = 0;
    machine.threads = shape.cluster * shape.block.x;
    for (uint32_t rank = 0; rank < shape.cluster; ++rank) {
        machine.blocks.push_back(std::make_unique<Block>());
        make_block(*machine.blocks.back(), dim3(first.x + rank, first.y, first.z), rank, shape, rank * shape.block.x);
    }
    while (machine.exited < machine.threads) {
        if (!machine.copies.empty() && chance(machine.policy.copies)) {
            bring_some_copy();
        }
        if (machine.unexecuted > 0 && chance(machine.policy.products)) {
            compute_some_product();
        }
        if (machine.ready.empty()) {
            if (!bring_some_copy()) {
                report_deadlock();
            }
            continue;
        }
        Fiber* fiber = next_fiber();
        fiber->state = State::kRunning;
        machine.running = fiber;
        threadIdx = dim3(fiber->thread, 0, 0);
        blockIdx = fiber->block->index;
        shuntyard_switch(&scheduler_stack, fiber->stack_pointer);
        machine.running = nullptr;
    }
}

Policy draw_policy() {
    if (given_seed == 0) {
        return {Policy::Order::kFirst, 0, 0, 0};
    }
    constexpr uint32_t kChances[] = {0, 1, 8, 64};
    return {static_cast<Policy::Order>(random_below(4)), kChances[random_below(4)], kChances[random_below(4)],
            kChances[random_below(3)]};
}

bool possible(const Shape& shape) {
    const dim3 &grid = shape.grid, &block = shape.block;
    if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) {
        return false;
    }
    // Blocks of one dimension and whole warps: what kernels here use, and more than CUDA asks.
    if (block.x == 0 || block.x > 1024 || block.x % 32 != 0 || block.y != 1 || block.z != 1) {
        return false;
    }
    if (shape.cluster == 0 || shape.cluster > 16 || grid.x % shape.cluster != 0) {
        return false;
    }
    return shape.cluster == 1 || given_device.capability >= 90;
}

}  // namespace

void fail(const char* format, ...) {
    fprintf(stderr, "emulator: ");
    if (machine.running != nullptr) {
        fprintf(stderr, "%s: ", named(*machine.running).c_str());
    }
    va_list values;
    va_start(values, format);
    vfprintf(stderr, format, values);
    va_end(values);
    fprintf(stderr, "\n");
    abort();
}

uint32_t random_below(uint32_t bound) {
    // Steele, Lea, Flood: Fast splittable pseudorandom number generators, OOPSLA 2014.
    uint64_t z = machine.random_state += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    z ^= z >> 31;
    return static_cast<uint32_t>((z >> 32) * bound >> 32);
}

Fiber& self(const char* operation) {
    if (machine.running == nullptr) {
        fail("%s in a kernel that was launched without a Shape", operation);
    }
    return *machine.running;
}

void wait_as(const char* waits_for, int64_t which, int64_t detail) {
    Fiber& fiber = *machine.running;
    fiber.state = State::kWaiting;
    fiber.waits_for = waits_for;
    fiber.which = which;
    fiber.detail = detail;
    back_to_scheduler();
}

void make_ready(Fiber& fiber) {
    fiber.state = State::kReady;
    machine.ready.push_back(&fiber);
}

void maybe_yield() {
    if (chance(machine.policy.yields)) {
        Fiber& fiber = *machine.running;
        fiber.state = State::kReady;
        machine.ready.push_front(&fiber);
        back_to_scheduler();
    }
}

bool on_a_fiber_stack(const void* pointer) {
    const char* place = static_cast<const char*>(pointer);
    return std::any_of(stacks.begin(), stacks.end(),
                       [&](const char* stack) { return stack <= place && place < stack + kStack; });
}

bool in_shared(const Block& block, const void* pointer) {
    const char* place = static_cast<const char*>(pointer);
    return block.shared <= place && place < block.shared + block.shared_size;
}

uint32_t offset_in_shared(const Block& block, const void* pointer, size_t size, const char* operation) {
    const char* place = static_cast<const char*>(pointer);
    const int64_t offset = place - block.shared;
    if (place < block.shared || offset + size > block.shared_size) {
        fail("%s: %lld .. %lld lies outside of the block's shared memory of %zu bytes", operation,
             static_cast<long long>(offset), static_cast<long long>(offset + size), block.shared_size);
    }
    return static_cast<uint32_t>(offset);
}

}  // namespace emulated

using namespace emulated;

int current_device(Device& device) {
    device = given_device;
    return 0;
}

int run_fibers(const Shape& shape, void (*thread)(void* arguments), void* arguments) {
    static std::mutex one_at_a_time;
    const std::lock_guard<std::mutex> lock(one_at_a_time);
    if (!possible(shape)) {
        return 9;  // cudaErrorInvalidConfiguration
    }
    if (shape.shared > kMostShared) {
        return 1;  // cudaErrorInvalidValue, of cudaFuncSetAttribute
    }
    machine.random_state = given_seed;
    machine.policy = draw_policy();
    machine.ready.clear();
    the_launch = {thread, arguments};
    need_fibers(size_t{shape.cluster} * shape.block.x);
    gridDim = shape.grid;
    blockDim = shape.block;
    const uint64_t along_x = shape.grid.x / shape.cluster;
    std::vector<uint64_t> order(along_x * shape.grid.y * shape.grid.z);
    std::iota(order.begin(), order.end(), uint64_t{0});
    if (given_seed != 0) {
        for (size_t i = order.size(); i > 1; --i) {
            std::swap(order[i - 1], order[random_below(static_cast<uint32_t>(i))]);
        }
    }
    for (const uint64_t number : order) {
        const uint64_t line = number / along_x;
        run_cluster(shape, dim3(static_cast<unsigned>(number % along_x) * shape.cluster,
                                static_cast<unsigned>(line % shape.grid.y),
                                static_cast<unsigned>(line / shape.grid.y)));
    }
    return 0;
}

char* shared_memory() { return self("shared_memory").block->shared; }

uint32_t shared_address(const void* pointer) {
    const Block& block = *self("shared_address").block;
    return kWindow + offset_in_shared(block, pointer, 0, "shared_address");
}

void sync_block() {
    Fiber& fiber = self("sync_block");
    Block& block = *fiber.block;
    block.barriers[0].waiting.push_back(&fiber);
    if (all_of_block_wait(block)) {
        release(block.barriers[0].waiting);
        fiber.state = State::kReady;
        emulated::back_to_scheduler();
        return;
    }
    wait_as("sync_block");
}

void sync_some(int number, int threads) {
    Fiber& fiber = self("sync_some");
    Block& block = *fiber.block;
    if (number < 1 || number > 15) {
        fail("sync_some: there is no barrier %d", number);
    }
    if (threads <= 0 || threads % 32 != 0 || static_cast<uint32_t>(threads) > block.threads) {
        fail("sync_some: barrier %d for %d threads of %u", number, threads, block.threads);
    }
    NamedBarrier& barrier = block.barriers[number];
    if (!barrier.waiting.empty() && barrier.threads != threads) {
        fail("sync_some: barrier %d for %d threads, while others wait there for %d", number, threads, barrier.threads);
    }
    barrier.threads = threads;
    barrier.waiting.push_back(&fiber);
    if (barrier.waiting.size() < static_cast<size_t>(threads)) {
        wait_as("sync_some of barrier %lld for %lld threads", number, threads);
        return;
    }
    std::vector<int> lanes(block.warps.size());
    for (const Fiber* other : barrier.waiting) {
        ++lanes[other->thread / 32];
    }
    for (size_t warp = 0; warp < lanes.size(); ++warp) {
        if (lanes[warp] != 0 && lanes[warp] != 32) {
            fail("sync_some: barrier %d has %d lanes of warp %zu, must have all", number, lanes[warp], warp);
        }
    }
    release(barrier.waiting);
    emulated::back_to_scheduler();
}

void sync_cluster() {
    Fiber& fiber = self("sync_cluster");
    machine.at_cluster_barrier.push_back(&fiber);
    if (machine.at_cluster_barrier.size() == machine.threads - machine.exited) {
        release(machine.at_cluster_barrier);
        emulated::back_to_scheduler();
        return;
    }
    wait_as("sync_cluster");
}

}  // namespace shuntyard

// -- for tests

extern "C" {

// Draws orders anew; 0: one thread after the other, and everything as late as it may be.
SHUNTYARD_API void test_seed(uint64_t seed) { shuntyard::emulated::given_seed = seed; }

SHUNTYARD_API void test_device(int capability, int multiprocessors) {
    shuntyard::emulated::given_device = {capability, multiprocessors};
}
}
