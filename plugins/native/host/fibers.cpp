// FOR TESTS ONLY: fibers, each on a stack of its own. See emulator.h.
#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <new>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#include "host/machine.h"

// Pushes what a call must keep, leaves the stack at *from, and goes on from the stack `to`.
extern "C" void shuntyard_switch(void** from, void* to);

namespace shuntyard {
namespace emulated {
namespace {

constexpr size_t kStack = 128 * 1024;
constexpr size_t kGuard = 4096;  // bytes below a stack that cannot be accessed

std::vector<char*> stacks;  // all that were ever made
std::vector<std::unique_ptr<Fiber>> fibers;
void* scheduler_stack;

#if defined(__x86_64__)
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

void fiber_main() {
    the_launch.thread(the_launch.arguments);
    thread_exits(*machine.running);
    back_to_scheduler();
    abort();  // nobody goes on with it
}

}  // namespace

char* map_memory(size_t size) {
    void* memory = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) {
        fail("no memory");
    }
    return static_cast<char*>(memory);
}

Fiber& fresh_fiber(size_t number) {
    need_fibers(number + 1);
    Fiber& fiber = *fibers[number];
    fiber = Fiber{};
    fiber.stack_pointer = prepare(stacks[number], fiber_main);
    return fiber;
}

void run_fiber(Fiber& fiber) {
    fiber.state = State::kRunning;
    machine.running = &fiber;
    shuntyard_switch(&scheduler_stack, fiber.stack_pointer);
    machine.running = nullptr;
}

void back_to_scheduler() { shuntyard_switch(&machine.running->stack_pointer, scheduler_stack); }

bool on_a_fiber_stack(const void* pointer) {
    const char* place = static_cast<const char*>(pointer);
    return std::any_of(stacks.begin(), stacks.end(),
                       [&](const char* stack) { return stack <= place && place < stack + kStack; });
}

}  // namespace emulated
}  // namespace shuntyard

#if !defined(__x86_64__)
extern "C" void shuntyard_switch(void** from, void* to) {
    ucontext_t here;
    *from = &here;
    swapcontext(&here, static_cast<ucontext_t*>(to));
}
#endif
