// The CPU kernels as a table of functions. There is one table per instruction set (table.h), compiled from the same
// files; dispatch.cpp picks the best one that this processor can run, so one build serves every machine of its
// architecture.
#pragma once

#include "common/elementwise_params.h"
#include "common/ffn_params.h"
#include "common/norm_params.h"
#include "common/rotary_params.h"
#include "common/slot_params.h"

namespace locas::cpu {

struct Kernels {
  const char* isa;
  void (*glu_activation_forward)(const GluActivationForwardParams&);
  void (*glu_activation_backward)(const GluActivationBackwardParams&);
  void (*neuron_importance_of_products)(const NeuronImportanceOfProductsParams&);
  void (*token_nll)(const TokenNllParams&);
  void (*rms_norm)(const NormParams&);
  void (*rms_norm_backward)(const NormBackwardParams&);
  void (*layer_norm)(const NormParams&);
  void (*layer_norm_backward)(const NormBackwardParams&);
  void (*rotary_forward)(const RotaryForwardParams&);
  void (*rotary_backward)(const RotaryBackwardParams&);
  void (*adamw_slots)(const AdamwSlotsParams&);
  void (*sgd_slots)(const SgdSlotsParams&);
  void (*write_slots)(const WriteSlotsParams&);
};

const Kernels& kernels();

// The whole FFN with its own matrix products (ffn.cpp).
struct GluFfnKernels {
  bool bf16;  // whether it takes bfloat16 besides float32
  void (*forward)(const CpuGluFfnForwardParams&);
  void (*backward)(const CpuGluFfnBackwardParams&);
};

// Null on a processor without AVX-512.
const GluFfnKernels* glu_ffn_kernels();

}  // namespace locas::cpu
