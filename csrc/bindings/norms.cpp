// Bindings of the norms over rows.
#include "common/norm_params.h"

#include "bindings/checks.h"
#include "bindings/dispatch.h"
#include "bindings/module.h"

namespace locas {
namespace {

// What both norms are given, and whose tensors tell shape and dtype: x [rows, cols].
NormParams norm_params(const Checker& check, const TensorRef& x, const MaybeTensor& residual, const TensorRef& weight,
                       const MaybeTensor& sum, const TensorRef& out, float eps) {
  const int64_t rows = x.shape[0], cols = x.shape[1];
  NormParams p{};
  p.x = check.matrix({"x", x}, rows, cols);
  p.residual = check.matrix_or_null("residual", residual, rows, cols);
  p.weight = check.vector<const void>({"weight", weight}, cols);
  p.sum = check.matrix_or_null("sum", sum, rows, cols);
  check.both_or_none("sum", sum, "residual", residual);
  p.out = check.matrix({"out", out}, rows, cols);
  p.eps = eps;
  p.dtype = x.dtype;
  return p;
}

NormBackwardParams norm_backward_params(const Checker& check, const TensorRef& d_out, const TensorRef& x,
                                        const TensorRef& weight, const MaybeTensor& d_sum, const TensorRef& dx) {
  const int64_t rows = x.shape[0], cols = x.shape[1];
  NormBackwardParams p{};
  p.x = check.matrix({"x", x}, rows, cols);
  p.d_out = check.matrix({"d_out", d_out}, rows, cols);
  p.weight = check.vector<const void>({"weight", weight}, cols);
  p.d_sum = check.matrix_or_null("d_sum", d_sum, rows, cols);
  p.dx = check.matrix({"dx", dx}, rows, cols);
  p.dtype = x.dtype;
  return p;
}

void rms_norm(const TensorRef& x, const MaybeTensor& residual, const TensorRef& weight, const MaybeTensor& sum,
              const TensorRef& out, const MaybeTensor& inverse_rms, float weight_offset, float eps, uintptr_t stream) {
  const Checker check = matrix_checker("rms_norm", {"x", x});
  NormParams p = norm_params(check, x, residual, weight, sum, out, eps);
  p.inverse = check.vector_or_null<float>("inverse_rms", inverse_rms, p.x.rows);
  p.weight_offset = weight_offset;
  LOCAS_DISPATCH(rms_norm, p, x.device, stream);
}

void rms_norm_backward(const TensorRef& d_out, const TensorRef& x, const TensorRef& weight,
                       const TensorRef& inverse_rms, const MaybeTensor& d_sum, const TensorRef& dx, float weight_offset,
                       uintptr_t stream) {
  const Checker check = matrix_checker("rms_norm_backward", {"x", x});
  NormBackwardParams p = norm_backward_params(check, d_out, x, weight, d_sum, dx);
  p.inverse = check.vector<const float>({"inverse_rms", inverse_rms}, p.x.rows);
  p.weight_offset = weight_offset;
  LOCAS_DISPATCH(rms_norm_backward, p, x.device, stream);
}

void layer_norm(const TensorRef& x, const MaybeTensor& residual, const TensorRef& weight, const MaybeTensor& bias,
                const MaybeTensor& sum, const TensorRef& out, const MaybeTensor& mean, const MaybeTensor& inverse_std,
                float eps, uintptr_t stream) {
  const Checker check = matrix_checker("layer_norm", {"x", x});
  NormParams p = norm_params(check, x, residual, weight, sum, out, eps);
  p.bias = check.vector_or_null<const void>("bias", bias, p.x.cols);
  p.mean = check.vector_or_null<float>("mean", mean, p.x.rows);
  p.inverse = check.vector_or_null<float>("inverse_std", inverse_std, p.x.rows);
  check.both_or_none("inverse_std", inverse_std, "mean", mean);
  LOCAS_DISPATCH(layer_norm, p, x.device, stream);
}

void layer_norm_backward(const TensorRef& d_out, const TensorRef& x, const TensorRef& weight, const TensorRef& mean,
                         const TensorRef& inverse_std, const MaybeTensor& d_sum, const TensorRef& dx,
                         uintptr_t stream) {
  const Checker check = matrix_checker("layer_norm_backward", {"x", x});
  NormBackwardParams p = norm_backward_params(check, d_out, x, weight, d_sum, dx);
  p.mean = check.vector<const float>({"mean", mean}, p.x.rows);
  p.inverse = check.vector<const float>({"inverse_std", inverse_std}, p.x.rows);
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
