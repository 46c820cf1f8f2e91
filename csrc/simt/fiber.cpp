#include "simt/fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>

#ifdef LOCAS_SIMT_ASAN
#include <sanitizer/common_interface_defs.h>
#endif

namespace locas::simt {
namespace {

// AddressSanitizer needs room for its red zones. Pages that are never touched cost nothing.
constexpr size_t kStackBytes = 256 << 10, kGuardBytes = 4096;

Fiber* previous = nullptr;  // who switched to the fiber that runs now
Fiber* running = nullptr;

}  // namespace

#ifndef LOCAS_FIBER_UCONTEXT
// Saves what the System V ABI makes the callee keep, on the old stack; restores it from the new one.
extern "C" void locas_simt_switch(void** save_stack_pointer, void* load_stack_pointer);
asm(R"(
.text
.globl locas_simt_switch
.hidden locas_simt_switch
.type locas_simt_switch, @function
locas_simt_switch:
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
.size locas_simt_switch, .-locas_simt_switch
)");
#endif

Fiber::Fiber(void (*body)()) : body_(body), stack_bytes_(kStackBytes) {
  // The lowest page stays without access: an overflow faults instead of writing into a neighbour's stack.
  void* mapping = mmap(nullptr, kStackBytes + kGuardBytes, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapping == MAP_FAILED || mprotect(mapping, kGuardBytes, PROT_NONE) != 0) std::abort();
  stack_ = static_cast<char*>(mapping) + kGuardBytes;
#ifdef LOCAS_FIBER_UCONTEXT
  getcontext(&context_);
  context_.uc_stack.ss_sp = stack_;
  context_.uc_stack.ss_size = stack_bytes_;
  context_.uc_link = nullptr;
  makecontext(&context_, &Fiber::entry, 0);
#else
  // What locas_simt_switch pops: six registers and the address it returns to. At entry the stack is 8 off 16.
  void** top = reinterpret_cast<void**>(stack_ + stack_bytes_ - 16);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(&Fiber::entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  stack_pointer_ = top;
#endif
}

Fiber::~Fiber() {
  if (body_) munmap(stack_ - kGuardBytes, stack_bytes_ + kGuardBytes);
}

void Fiber::entry() {
#ifdef LOCAS_SIMT_ASAN
  // The first fiber is entered from the thread's own stack, whose bounds only the sanitizer knows.
  const void* bottom;
  size_t bytes;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &bytes);
  if (!previous->stack_) {
    previous->stack_ = const_cast<char*>(static_cast<const char*>(bottom));
    previous->stack_bytes_ = bytes;
  }
#endif
  running->body_();
  std::abort();
}

void Fiber::switch_to(Fiber& from, Fiber& to) {
  previous = &from;
  running = &to;
#ifdef LOCAS_SIMT_ASAN
  __sanitizer_start_switch_fiber(&from.fake_stack_, to.stack_, to.stack_bytes_);
#endif
#ifdef LOCAS_FIBER_UCONTEXT
  swapcontext(&from.context_, &to.context_);
#else
  locas_simt_switch(&from.stack_pointer_, to.stack_pointer_);
#endif
#ifdef LOCAS_SIMT_ASAN
  __sanitizer_finish_switch_fiber(from.fake_stack_, nullptr, nullptr);
#endif
}

}  // namespace locas::simt
