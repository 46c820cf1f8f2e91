#include "cpu/table.h"

namespace locas::cpu::LOCAS_ISA {

const Kernels table = {LOCAS_ISA_NAME, glu_forward,       glu_backward, importance, cross_entropy,
                       rms_norm,       rms_norm_backward, adamw,        sgd,        write_slots};

}  // namespace locas::cpu::LOCAS_ISA
