// The kernels of one instruction set, which LOCAS_ISA names. elementwise.cpp, norms_and_loss.cpp and slots.cpp are
// readable: they are also the specification of the CUDA kernels.
#pragma once

#include "cpu/kernels.h"

namespace locas::cpu::LOCAS_ISA {

// elementwise.cpp
void glu_activation_forward(const GluActivationForwardParams&);
void glu_activation_backward(const GluActivationBackwardParams&);
void neuron_importance_of_products(const NeuronImportanceOfProductsParams&);

// norms_and_loss.cpp
void token_nll(const TokenNllParams&);
void rms_norm(const RmsNormParams&);
void rms_norm_backward(const RmsNormBackwardParams&);

// slots.cpp
void adamw_slots(const AdamwSlotsParams&);
void sgd_slots(const SgdSlotsParams&);
void write_slots(const WriteSlotsParams&);

extern const Kernels table;

}  // namespace locas::cpu::LOCAS_ISA
