// A fiber: a stack of its own and the point where it stopped. The runner makes each CUDA thread one.
#pragma once

#include <cstddef>

#if !defined(__x86_64__) || defined(LOCAS_SIMT_UCONTEXT)
#define LOCAS_FIBER_UCONTEXT  // the portable switch; slower, as it saves the signal mask with a system call
#include <ucontext.h>
#endif

namespace locas::simt {

class Fiber {
 public:
  Fiber() = default;               // the stack that is running already
  explicit Fiber(void (*body)());  // starts in body, which must never return
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // Stops `from`, which must be running, and goes on with `to`.
  static void switch_to(Fiber& from, Fiber& to);

 private:
  static void entry();

  void (*body_)() = nullptr;
  char* stack_ = nullptr;  // for AddressSanitizer and to free it
  size_t stack_bytes_ = 0;
  void* fake_stack_ = nullptr;  // AddressSanitizer's own state of a stopped fiber
#ifdef LOCAS_FIBER_UCONTEXT
  ucontext_t context_;
#else
  void* stack_pointer_ = nullptr;
#endif
};

}  // namespace locas::simt
