// The Python module locas_ext._C. The other files of this folder have its functions: each checks its arguments once,
// fills the launch parameters and picks the device.
#include "bindings/module.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "common/activations.h"
#include "common/ffn_params.h"
#include "common/peer_params.h"
#include "common/slot_params.h"
#include "cpu/kernels.h"
#ifdef LOCAS_WITH_CUDA
#include "cuda/api.h"
#endif

#ifdef _OPENMP
#include <omp.h>
#endif

namespace locas {
namespace {

namespace py = pybind11;

py::dict build_info() {
  py::dict info;
  info["version"] = LOCAS_VERSION;
  info["compiler"] = LOCAS_COMPILER;
  info["cpu_isa"] = cpu::kernels().isa;
  const cpu::GluFfnKernels* ffn = cpu::glu_ffn_kernels();
  info["cpu_ffn"] = !ffn        ? py::list()
                    : ffn->bf16 ? py::list(py::make_tuple("float32", "bfloat16"))
                                : py::list(py::make_tuple("float32"));
#ifdef _OPENMP
  info["openmp_threads"] = omp_get_max_threads();
#else
  info["openmp_threads"] = 1;
#endif
#ifdef LOCAS_WITH_CUDA
  info["cuda_architectures"] = cuda::compiled_architectures();
  info["cuda_devices"] = cuda::devices();
#else
  info["cuda_architectures"] = py::none();
  info["cuda_devices"] = py::list();
#endif
  return info;
}

// What Python must agree on with the kernels.
void bind_constants(py::module_& m) {
  py::list activations;
  for (const char* name : kActivationNames) activations.append(name);
  m.attr("ACTIVATIONS") = py::tuple(activations);
  m.attr("CPU_TOKEN_MULTIPLE") = kCpuTokenMultiple;
  m.attr("MOST_PEERS") = kMostPeers;
  m.attr("PEER_BOX_BYTES") = sizeof(PeerBox);
  m.attr("PIECE_ELEMENTS") = kPieceElements;
  m.attr("MOST_FACTOR_LAYERS") = kMostFactorLayers;
  m.attr("MOST_FACTOR_TOKENS") = kMostFactorTokens;
  m.attr("MOST_FACTOR_WIDTH") = kMostFactorWidth;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of locas_ext; use them through locas_ext.ops.";
  bind_elementwise(m);
  bind_ffn_cuda(m);
  bind_ffn_cpu(m);
  bind_norms(m);
  bind_peer_sum(m);
  bind_rotary(m);
  bind_update_slots(m);
  bind_write_slots(m);
  m.def("build_info", &build_info);
  bind_constants(m);
}

}  // namespace locas
