// The kernels of one instruction set, which LOCAS_ISA names. elementwise.cpp, norms_and_loss.cpp and slots.cpp are
// readable: they are also the specification of the CUDA kernels.
#pragma once

#include "cpu/kernels.h"

namespace locas::cpu::LOCAS_ISA {

// elementwise.cpp
void glu_forward(const GluForwardParams&);
void glu_backward(const GluBackwardParams&);
void importance(const ImportanceParams&);

// norms_and_loss.cpp
void cross_entropy(const CrossEntropyParams&);
void rms_norm(const RmsNormParams&);
void rms_norm_backward(const RmsNormBackwardParams&);

// slots.cpp
void adamw(const AdamWParams&);
void sgd(const SgdParams&);
void write_slots(const WriteSlotsParams&);

extern const Kernels table;

}  // namespace locas::cpu::LOCAS_ISA
