#include "cpu/table.h"

namespace locas::cpu::LOCAS_ISA {

const Kernels table = {LOCAS_ISA_NAME,
                       glu_activation_forward,
                       glu_activation_backward,
                       neuron_importance_of_products,
                       token_nll,
                       rms_norm,
                       rms_norm_backward,
                       layer_norm,
                       layer_norm_backward,
                       rotary_forward,
                       rotary_backward,
                       adamw_slots,
                       sgd_slots,
                       write_slots};

}  // namespace locas::cpu::LOCAS_ISA
