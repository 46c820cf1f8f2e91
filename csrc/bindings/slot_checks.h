// Checks of what accompanies a memory's slots.
#pragma once

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

inline DType dtype_of_copy(const MaybeTensor& compute) { return compute ? compute->dtype : DType::f32; }

}  // namespace locas
