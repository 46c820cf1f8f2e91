// Bindings of the norms over rows.
#include "common/norm_params.h"

#include "bindings/checks.h"
#include "bindings/dispatch.h"
#include "bindings/module.h"

namespace locas {
namespace {

void rms_norm(const TensorRef& x, const MaybeTensor& residual, const TensorRef& weight, const MaybeTensor& sum,
              const TensorRef& out, const MaybeTensor& inverse_rms, float weight_offset, float eps, uintptr_t stream) {
  const Checker check = matrix_checker("rms_norm", {"x", x});
  const int64_t rows = x.shape[0], cols = x.shape[1];
  RmsNormParams p;
  p.x = check.matrix({"x", x}, rows, cols);
  p.residual = check.matrix_or_null("residual", residual, rows, cols);
  p.weight = check.vector<const void>({"weight", weight}, cols);
  p.sum = check.matrix_or_null("sum", sum, rows, cols);
  check.both_or_none("sum", sum, "residual", residual);
  p.out = check.matrix({"out", out}, rows, cols);
  p.inverse_rms = check.vector_or_null<float>("inverse_rms", inverse_rms, rows);
  p.weight_offset = weight_offset;
  p.eps = eps;
  p.dtype = x.dtype;
  LOCAS_DISPATCH(rms_norm, p, x.device, stream);
}

void rms_norm_backward(const TensorRef& d_out, const TensorRef& x, const TensorRef& weight,
                       const TensorRef& inverse_rms, const MaybeTensor& d_sum, const TensorRef& dx, float weight_offset,
                       uintptr_t stream) {
  const Checker check = matrix_checker("rms_norm_backward", {"x", x});
  const int64_t rows = x.shape[0], cols = x.shape[1];
  RmsNormBackwardParams p;
  p.x = check.matrix({"x", x}, rows, cols);
  p.d_out = check.matrix({"d_out", d_out}, rows, cols);
  p.weight = check.vector<const void>({"weight", weight}, cols);
  p.inverse_rms = check.vector<const float>({"inverse_rms", inverse_rms}, rows);
  p.d_sum = check.matrix_or_null("d_sum", d_sum, rows, cols);
  p.dx = check.matrix({"dx", dx}, rows, cols);
  p.weight_offset = weight_offset;
  p.dtype = x.dtype;
  LOCAS_DISPATCH(rms_norm_backward, p, x.device, stream);
}

void layer_norm(const TensorRef& x, const MaybeTensor& residual, const TensorRef& weight, const MaybeTensor& bias,
                const MaybeTensor& sum, const TensorRef& out, const MaybeTensor& mean, const MaybeTensor& inverse_std,
                float eps, uintptr_t stream) {
  const Checker check = matrix_checker("layer_norm", {"x", x});
  const int64_t rows = x.shape[0], cols = x.shape[1];
  LayerNormParams p;
  p.x = check.matrix({"x", x}, rows, cols);
  p.residual = check.matrix_or_null("residual", residual, rows, cols);
  p.weight = check.vector<const void>({"weight", weight}, cols);
  p.bias = check.vector_or_null<const void>("bias", bias, cols);
  p.sum = check.matrix_or_null("sum", sum, rows, cols);
  check.both_or_none("sum", sum, "residual", residual);
  p.out = check.matrix({"out", out}, rows, cols);
  p.mean = check.vector_or_null<float>("mean", mean, rows);
  p.inverse_std = check.vector_or_null<float>("inverse_std", inverse_std, rows);
  check.both_or_none("inverse_std", inverse_std, "mean", mean);
  p.eps = eps;
  p.dtype = x.dtype;
  LOCAS_DISPATCH(layer_norm, p, x.device, stream);
}

void layer_norm_backward(const TensorRef& d_out, const TensorRef& x, const TensorRef& weight, const TensorRef& mean,
                         const TensorRef& inverse_std, const MaybeTensor& d_sum, const TensorRef& dx,
                         uintptr_t stream) {
  const Checker check = matrix_checker("layer_norm_backward", {"x", x});
  const int64_t rows = x.shape[0], cols = x.shape[1];
  LayerNormBackwardParams p;
  p.x = check.matrix({"x", x}, rows, cols);
  p.d_out = check.matrix({"d_out", d_out}, rows, cols);
  p.weight = check.vector<const void>({"weight", weight}, cols);
  p.mean = check.vector<const float>({"mean", mean}, rows);
  p.inverse_std = check.vector<const float>({"inverse_std", inverse_std}, rows);
  p.d_sum = check.matrix_or_null("d_sum", d_sum, rows, cols);
  p.dx = check.matrix({"dx", dx}, rows, cols);
  p.dtype = x.dtype;
  LOCAS_DISPATCH(layer_norm_backward, p, x.device, stream);
}

}  // namespace

void bind_norms(py::module_& m) {
  m.def("rms_norm", &rms_norm, py::arg("x"), py::arg("residual"), py::arg("weight"), py::arg("sum"), py::arg("out"),
        py::arg("inverse_rms"), py::arg("weight_offset"), py::arg("eps"), py::arg("stream"));
  m.def("rms_norm_backward", &rms_norm_backward, py::arg("d_out"), py::arg("x"), py::arg("weight"),
        py::arg("inverse_rms"), py::arg("d_sum"), py::arg("dx"), py::arg("weight_offset"), py::arg("stream"));
  m.def("layer_norm", &layer_norm, py::arg("x"), py::arg("residual"), py::arg("weight"), py::arg("bias"),
        py::arg("sum"), py::arg("out"), py::arg("mean"), py::arg("inverse_std"), py::arg("eps"), py::arg("stream"));
  m.def("layer_norm_backward", &layer_norm_backward, py::arg("d_out"), py::arg("x"), py::arg("weight"), py::arg("mean"),
        py::arg("inverse_std"), py::arg("d_sum"), py::arg("dx"), py::arg("stream"));
}

}  // namespace locas
