// Checks of what accompanies a memory's slots.
#pragma once

#include "bindings/checks.h"

namespace locas {

// An fp32 contiguous tensor of the slots' shape on the slots' device.
inline float* slot_state(const char* op, const Named& t, const TensorRef& slots) {
  if (!t.tensor.same_shape(slots))
    fail(op, t, "has shape " + t.tensor.shape_text() + "; expected " + slots.shape_text());
  if (t.tensor.dtype != DType::f32) fail(op, t, "must be float32");
  if (t.tensor.device != slots.device) fail(op, t, "lies on another device than slots");
  if (!t.tensor.contiguous()) fail(op, t, "must be contiguous");
  return static_cast<float*>(t.tensor.data);
}

// The rounded copy of the slots, in a half dtype; returns null for None.
inline void* compute_copy(const char* op, const MaybeTensor& t, const TensorRef& slots) {
  if (!t) return nullptr;
  const Named named{"compute", *t};
  if (!t->same_shape(slots)) fail(op, named, "has shape " + t->shape_text() + "; expected " + slots.shape_text());
  if (t->dtype == DType::f64 || t->dtype == DType::i64) fail(op, named, "must be float32, bfloat16 or float16");
  if (t->device != slots.device) fail(op, named, "lies on another device than slots");
  if (!t->contiguous()) fail(op, named, "must be contiguous");
  return t->data;
}

}  // namespace locas
