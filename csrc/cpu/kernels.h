// The CPU kernels as a table of functions. There is one table per instruction set (table.h), compiled from the same
// files; dispatch.cpp picks the best one that this processor can run, so one build serves every machine of its
// architecture.
#pragma once

#include "common/elementwise_params.h"
#include "common/ffn_params.h"
#include "common/slot_params.h"

namespace locas::cpu {

struct Kernels {
  const char* isa;
  void (*glu_forward)(const GluForwardParams&);
  void (*glu_backward)(const GluBackwardParams&);
  void (*importance)(const ImportanceParams&);
  void (*cross_entropy)(const CrossEntropyParams&);
  void (*rms_norm)(const RmsNormParams&);
  void (*rms_norm_backward)(const RmsNormBackwardParams&);
  void (*adamw)(const AdamWParams&);
  void (*sgd)(const SgdParams&);
  void (*write_slots)(const WriteSlotsParams&);
};

const Kernels& kernels();

// The whole FFN with its own matrix products (ffn.cpp).
struct FfnKernels {
  bool bf16;  // whether it takes bfloat16 besides float32
  void (*forward)(const CpuFfnForwardParams&);
  void (*backward)(const CpuFfnBackwardParams&);
};

// Null on a processor without AVX-512.
const FfnKernels* ffn_kernels();

}  // namespace locas::cpu
