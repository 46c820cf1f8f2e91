// Checks of what accompanies a memory's slots.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <string>

#include "bindings/checks.h"

namespace locas {

// A checker of one call over slots, a contiguous float32 tensor.
inline Checker slots_checker(const char* op, const TensorRef& slots) {
  const Checker check(op, {"slots", slots});
  if (slots.ndim < 1) check.fail_shape({"slots", slots}, "[..., d]");
  check.rows<float>({"slots", slots}, {"slots", slots});
  return check;
}

// The rounded copy of the slots; of no rows for None.
inline Matrix compute_copy(const Checker& check, const MaybeTensor& compute, const TensorRef& slots) {
  if (!compute) return {};
  check.has_dtype({"compute", *compute}, {DType::f32, DType::bf16, DType::f16});
  return check.rows_of_any_dtype({"compute", *compute}, {"slots", slots});
}

// A contiguous tensor of a call; null for None.
struct Part {
  const char* name;
  const TensorRef* tensor;
};
inline Part part(const char* name, const MaybeTensor& t) { return {name, t ? &*t : nullptr}; }

inline bool share_memory(const Part& a, const Part& b) {
  if (!a.tensor || !b.tensor) return false;
  const auto begin = [](const Part& p) { return reinterpret_cast<uintptr_t>(p.tensor->data); };
  const auto bytes = [](const Part& p) { return static_cast<uintptr_t>(p.tensor->numel() * p.tensor->element_size()); };
  return begin(a) < begin(b) + bytes(b) && begin(b) < begin(a) + bytes(a);
}

// Each of what is written shares memory with no other tensor of the call.
inline void check_apart(const Checker& check, std::initializer_list<Part> written, std::initializer_list<Part> read) {
  const auto compare = [&](const Part& a, const Part& b) {
    if (share_memory(a, b))
      check.fail(b.name,
                 std::string("shares memory with ") + a.name + ", which is written; expected memory of its own");
  };
  for (auto a = written.begin(); a != written.end(); ++a) {
    for (auto b = a + 1; b != written.end(); ++b) compare(*a, *b);
    for (const Part& b : read) compare(*a, b);
  }
}

inline DType dtype_of_copy(const MaybeTensor& compute) { return compute ? compute->dtype : DType::f32; }

}  // namespace locas
