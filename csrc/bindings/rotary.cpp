// Bindings of the rotary position embedding.
#include "common/rotary_params.h"

#include "bindings/checks.h"
#include "bindings/dispatch.h"
#include "bindings/module.h"

namespace locas {
namespace {

// [rows, heads * head_size] of any number of heads.
Matrix heads(const Checker& check, const Argument& a, int64_t rows, int head_size) {
  const TensorRef& t = a.tensor;
  if (t.ndim != 2 || t.shape[1] % head_size != 0)
    check.fail_shape(a, "[" + std::to_string(rows) + ", heads * " + std::to_string(head_size) + "]");
  return check.matrix(a, rows, t.shape[1]);
}

void check_head_size(const Checker& check, int head_size) {
  if (head_size < 1 || head_size > kMostHeadSize)
    check.fail("head_size", "is " + std::to_string(head_size) + "; expected 1 to " + std::to_string(kMostHeadSize));
}

// The columns that turn: an even number of them, at most a head.
int64_t rotated(const Checker& check, const TensorRef& cos, int head_size) {
  if (cos.ndim != 2 || cos.shape[1] % 2 != 0 || cos.shape[1] > head_size)
    check.fail_shape({"cos", cos}, "[rows, an even number up to " + std::to_string(head_size) + ", the head size]");
  return cos.shape[1];
}

// What both directions are told of the turn; like: the query's heads or their gradient
RotaryTurn rotary_turn(const Checker& check, const TensorRef& like, const TensorRef& cos, const TensorRef& sin,
                       const MaybeTensor& query_weight, const MaybeTensor& key_weight, int head_size,
                       float weight_offset, float eps, bool interleaved) {
  const Argument angles{"cos", cos};
  const int64_t rows = like.shape[0], turned = rotated(check, cos, head_size);
  check.is_beside_like(angles);
  const Checker angle_check = cos.dtype == DType::f32 ? check.with_like(angles) : check;
  RotaryTurn turn;
  turn.cos = angle_check.matrix(angles, rows, turned);
  turn.sin = angle_check.matrix({"sin", sin}, rows, turned);
  turn.query_weight = check.vector_or_null<const void>("query_weight", query_weight, head_size);
  turn.key_weight = check.vector_or_null<const void>("key_weight", key_weight, head_size);
  check.both_or_none("key_weight", key_weight, "query_weight", query_weight);
  turn.head_size = head_size;
  turn.weight_offset = weight_offset;
  turn.eps = eps;
  turn.interleaved = interleaved;
  turn.dtype = like.dtype;
  turn.angle_dtype = cos.dtype;
  return turn;
}

void rotary_forward(const TensorRef& query, const TensorRef& key, const MaybeTensor& value, const TensorRef& cos,
                    const TensorRef& sin, const MaybeTensor& query_weight, const MaybeTensor& key_weight,
                    const TensorRef& query_out, const TensorRef& key_out, const MaybeTensor& value_out, int head_size,
                    float weight_offset, float eps, bool interleaved, uintptr_t stream) {
  const Checker check = matrix_checker("rotary_forward", {"query", query});
  check_head_size(check, head_size);
  const int64_t rows = query.shape[0];
  RotaryForwardParams p;
  p.query = heads(check, {"query", query}, rows, head_size);
  p.key = heads(check, {"key", key}, rows, head_size);
  p.value = check.matrix_or_null("value", value, rows, p.key.cols);
  p.turn = rotary_turn(check, query, cos, sin, query_weight, key_weight, head_size, weight_offset, eps, interleaved);
  p.query_out = check.matrix({"query_out", query_out}, rows, p.query.cols);
  p.key_out = check.matrix({"key_out", key_out}, rows, p.key.cols);
  p.value_out = check.matrix_or_null("value_out", value_out, rows, p.key.cols);
  check.both_or_none("value_out", value_out, "value", value);
  if (query_weight && (p.query_out.data == p.query.data || p.key_out.data == p.key.data))
    check.fail("query_out", "or key_out is the memory of query or key; expected others, as the heads are normed");
  LOCAS_DISPATCH(rotary_forward, p, query.device, stream);
}

void rotary_backward(const TensorRef& d_query, const TensorRef& d_key, const MaybeTensor& query, const MaybeTensor& key,
                     const TensorRef& cos, const TensorRef& sin, const MaybeTensor& query_weight,
                     const MaybeTensor& key_weight, const TensorRef& query_grad, const TensorRef& key_grad,
                     int head_size, float weight_offset, float eps, bool interleaved, uintptr_t stream) {
  const Checker check = matrix_checker("rotary_backward", {"d_query", d_query});
  check_head_size(check, head_size);
  const int64_t rows = d_query.shape[0];
  RotaryBackwardParams p;
  p.d_query = heads(check, {"d_query", d_query}, rows, head_size);
  p.d_key = heads(check, {"d_key", d_key}, rows, head_size);
  p.turn = rotary_turn(check, d_query, cos, sin, query_weight, key_weight, head_size, weight_offset, eps, interleaved);
  p.query = check.matrix_or_null("query", query, rows, p.d_query.cols);
  p.key = check.matrix_or_null("key", key, rows, p.d_key.cols);
  check.both_or_none("query", query, "query_weight", query_weight);
  check.both_or_none("key", key, "key_weight", key_weight);
  p.query_grad = check.matrix({"query_grad", query_grad}, rows, p.d_query.cols);
  p.key_grad = check.matrix({"key_grad", key_grad}, rows, p.d_key.cols);
  LOCAS_DISPATCH(rotary_backward, p, d_query.device, stream);
}

}  // namespace

void bind_rotary(py::module_& m) {
  m.def("rotary_forward", &rotary_forward, py::arg("query"), py::arg("key"), py::arg("value"), py::arg("cos"),
        py::arg("sin"), py::arg("query_weight"), py::arg("key_weight"), py::arg("query_out"), py::arg("key_out"),
        py::arg("value_out"), py::arg("head_size"), py::arg("weight_offset"), py::arg("eps"), py::arg("interleaved"),
        py::arg("stream"));
  m.def("rotary_backward", &rotary_backward, py::arg("d_query"), py::arg("d_key"), py::arg("query"), py::arg("key"),
        py::arg("cos"), py::arg("sin"), py::arg("query_weight"), py::arg("key_weight"), py::arg("query_grad"),
        py::arg("key_grad"), py::arg("head_size"), py::arg("weight_offset"), py::arg("eps"), py::arg("interleaved"),
        py::arg("stream"));
}

}  // namespace locas
