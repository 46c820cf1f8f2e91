// The kernels of one instruction set, which LOCAS_ISA names. elementwise.cpp, norms.cpp, rotary.cpp, slots.cpp
// and token_nll.cpp are readable: they are also the specification of the CUDA kernels.
#pragma once

#include "cpu/kernels.h"

namespace locas::cpu::LOCAS_ISA {

// elementwise.cpp
void glu_activation_forward(const GluActivationForwardParams&);
void glu_activation_backward(const GluActivationBackwardParams&);
void neuron_importance_of_products(const NeuronImportanceOfProductsParams&);

// token_nll.cpp
void token_nll(const TokenNllParams&);

// norms.cpp
void rms_norm(const NormParams&);
void rms_norm_backward(const NormBackwardParams&);
void layer_norm(const NormParams&);
void layer_norm_backward(const NormBackwardParams&);

// rotary.cpp
void rotary_forward(const RotaryForwardParams&);
void rotary_backward(const RotaryBackwardParams&);

// slots.cpp
void adamw_slots(const AdamwSlotsParams&);
void sgd_slots(const SgdSlotsParams&);
void write_slots(const WriteSlotsParams&);

extern const Kernels table;

}  // namespace locas::cpu::LOCAS_ISA
