// Switching stacks: 15 instructions on x86-64 (5-15 ns), ucontext elsewhere (200 ns, it saves
// signal masks by system call).
#pragma once

#include <cstddef>

#if !defined(__x86_64__) && !defined(VLMQ_EMULATOR_UCONTEXT)
#define VLMQ_EMULATOR_UCONTEXT
#endif
#if defined(VLMQ_EMULATOR_UCONTEXT)
#include <ucontext.h>
#endif

namespace vlmq::emulator {

#if !defined(VLMQ_EMULATOR_UCONTEXT)

// Saves the callee-saved registers on the running stack, its pointer in *save, and goes on where
// `load` was saved.
extern "C" void vlmq_emulator_switch(void** save, void* load);
asm(R"(
.text
.p2align 4
.local vlmq_emulator_switch
.type vlmq_emulator_switch,@function
vlmq_emulator_switch:
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
.size vlmq_emulator_switch,.-vlmq_emulator_switch
)");

struct Context {
  void* stack_pointer;

  // `start` never returns.
  void prepare(char* stack, size_t bytes, void (*start)()) {
    void** top = reinterpret_cast<void**>(stack + bytes);
    *--top = nullptr;  // where a return address would be: keeps the stack aligned as after a call
    *--top = reinterpret_cast<void*>(start);
    stack_pointer = top - 6;
  }
  void switch_to(Context& other) { vlmq_emulator_switch(&stack_pointer, other.stack_pointer); }
  // The lines that going on here reads first.
  void prefetch() const {
    for (int line = 0; line < 4; ++line) {
      __builtin_prefetch(static_cast<const char*>(stack_pointer) + 64 * line, 1);
    }
  }
};

#else

struct Context {
  ucontext_t context;

  void prepare(char* stack, size_t bytes, void (*start)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = bytes;
    context.uc_link = nullptr;
    makecontext(&context, start, 0);
  }
  void switch_to(Context& other) { swapcontext(&context, &other.context); }
  void prefetch() const {}
};

#endif

}  // namespace vlmq::emulator
