// Each binding file adds its functions to the module.
#pragma once

#include <pybind11/pybind11.h>

namespace locas {

void bind_elementwise(pybind11::module_&);
void bind_ffn_cpu(pybind11::module_&);
void bind_ffn_cuda(pybind11::module_&);
void bind_norms(pybind11::module_&);
void bind_peer_sum(pybind11::module_&);
void bind_rotary(pybind11::module_&);
void bind_update_slots(pybind11::module_&);
void bind_write_slots(pybind11::module_&);

}  // namespace locas
