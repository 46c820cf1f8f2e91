// layer_norm, layer_norm_backward: a row's sum with its residual, its norm, and the way back. rows.cuh has the layout.
// The variance is that of the centred row, so a large mean costs no digits.
#include <cmath>

#include "cuda/elementwise/rows.cuh"

namespace locas::cuda {
namespace {

LOCAS_DEVICE float inverse_std(float sum_of_squares, int64_t count, float eps) {
  return 1.0f / sqrtf(sum_of_squares / static_cast<float>(count) + eps);
}

LOCAS_DEVICE void store_statistics(const LayerNormParams& p, int64_t row, float mean, float inverse) {
  if (!p.mean) return;
  ptx::store(p.mean + row, mean);
  ptx::store(p.inverse_std + row, inverse);
}

template <class T, int kLanes, int kVectors>
struct LayerNorm {
  using Params = LayerNormParams;
  using Rows = Row<kLanes, kVectors>;
  static constexpr const char* name = "layer_norm";
  static constexpr int threads = Rows::threads, min_blocks = 1;

  static LOCAS_DEVICE void run(const Params& p, unsigned char* shared) {
    const Rows row(p.x);
    typename Rows::Values x, weight, bias, residual;
    row.template load<T>(p.x, x);
    if (p.residual.data) row.template load<T>(p.residual, residual);
    row.template load<T>(p.weight, weight);
    if (p.bias) row.template load<T>(p.bias, bias);
    float sum = 0.0f, squares = 0.0f;
    row.for_each_vector([&](int k, int64_t) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        if (p.residual.data) x[k][i] = rounded<T>(residual[k][i] + x[k][i]);
        sum += x[k][i];
      }
    });
    if (p.residual.data) row.template store<T>(x, p.sum);
    const float mean = Rows::sum(sum, shared) / static_cast<float>(p.x.cols);
    row.for_each_vector([&](int k, int64_t) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        x[k][i] -= mean;
        squares += x[k][i] * x[k][i];
      }
    });
    const float inverse = inverse_std(Rows::template sum<1>(squares, shared), p.x.cols, p.eps);
    if (row.is_first_thread()) store_statistics(p, row.index, mean, inverse);
    row.for_each_vector([&](int k, int64_t) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) x[k][i] = x[k][i] * inverse * weight[k][i] + (p.bias ? bias[k][i] : 0.0f);
    });
    row.template store<T>(x, p.out);
  }
};

template <class T, int kLanes, int kVectors>
struct LayerNormBackward {
  using Params = LayerNormBackwardParams;
  using Rows = Row<kLanes, kVectors>;
  static constexpr const char* name = "layer_norm_backward";
  static constexpr int threads = Rows::threads, min_blocks = 1;

  static LOCAS_DEVICE void run(const Params& p, unsigned char* shared) {
    const Rows row(p.x);
    typename Rows::Values d, x, weight, d_sum;
    row.template load<T>(p.d_out, d);
    row.template load<T>(p.x, x);
    row.template load<T>(p.weight, weight);
    if (p.d_sum.data) row.template load<T>(p.d_sum, d_sum);
    const float mean = row.exists ? ptx::load(p.mean + row.index) : 0.0f;
    const float inverse = row.exists ? ptx::load(p.inverse_std + row.index) : 0.0f;
    float sum = 0.0f, dot = 0.0f;
    row.for_each_vector([&](int k, int64_t) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        d[k][i] *= weight[k][i];
        x[k][i] -= mean;
        sum += d[k][i];
        dot += d[k][i] * x[k][i];
      }
    });
    const float count = static_cast<float>(p.x.cols), shift = Rows::sum(sum, shared) / count;
    const float slope = Rows::template sum<1>(dot, shared) * inverse * inverse / count;
    row.for_each_vector([&](int k, int64_t) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        d[k][i] = inverse * (d[k][i] - shift - x[k][i] * slope);
        if (p.d_sum.data) d[k][i] += d_sum[k][i];
      }
    });
    row.template store<T>(d, p.dx);
  }
};

// ---- Any width -----------------------------------------------------------------------------------------------------
template <class T>
struct LayerNormAnyWidth {
  using Params = LayerNormParams;
  static constexpr const char* name = "layer_norm_any_width";
  static constexpr int threads = kStridedThreads, min_blocks = 1;

  static LOCAS_DEVICE void run(const Params& p, unsigned char* shared) {
    const int64_t row = ptx::block_index();
    float sum = 0.0f, squares = 0.0f;
    for_each_column(p.x.cols, [&](int64_t col) {
      float x = load_float(p.x.at<const T>(row, col));
      if (p.residual.data) {
        x = rounded<T>(load_float(p.residual.at<const T>(row, col)) + x);
        ptx::store(p.sum.at<T>(row, col), ptx::from_float<T>(x));
      }
      sum += x;
    });
    const float mean = strided_sum(sum, shared) / static_cast<float>(p.x.cols);
    const Matrix& from = p.residual.data ? p.sum : p.x;  // each thread reads what it wrote itself
    for_each_column(p.x.cols, [&](int64_t col) {
      const float x = load_float(from.at<const T>(row, col)) - mean;
      squares += x * x;
    });
    const float inverse = inverse_std(strided_sum<1>(squares, shared), p.x.cols, p.eps);
    if (ptx::thread_index() == 0) store_statistics(p, row, mean, inverse);
    for_each_column(p.x.cols, [&](int64_t col) {
      const float normed = (load_float(from.at<const T>(row, col)) - mean) * inverse;
      const float bias = p.bias ? load_float(static_cast<const T*>(p.bias) + col) : 0.0f;
      const float out = normed * load_float(static_cast<const T*>(p.weight) + col) + bias;
      ptx::store(p.out.at<T>(row, col), ptx::from_float<T>(out));
    });
  }
};

template <class T>
struct LayerNormBackwardAnyWidth {
  using Params = LayerNormBackwardParams;
  static constexpr const char* name = "layer_norm_backward_any_width";
  static constexpr int threads = kStridedThreads, min_blocks = 1;

  static LOCAS_DEVICE void run(const Params& p, unsigned char* shared) {
    const int64_t row = ptx::block_index();
    const float mean = ptx::load(p.mean + row), inverse = ptx::load(p.inverse_std + row);
    const auto weighted = [&](int64_t col) {
      return load_float(p.d_out.at<const T>(row, col)) * load_float(static_cast<const T*>(p.weight) + col);
    };
    const auto centred = [&](int64_t col) { return load_float(p.x.at<const T>(row, col)) - mean; };
    float sum = 0.0f, dot = 0.0f;
    for_each_column(p.x.cols, [&](int64_t col) {
      sum += weighted(col);
      dot += weighted(col) * centred(col);
    });
    const float count = static_cast<float>(p.x.cols), shift = strided_sum(sum, shared) / count;
    const float slope = strided_sum<1>(dot, shared) * inverse * inverse / count;
    for_each_column(p.x.cols, [&](int64_t col) {
      float dx = inverse * (weighted(col) - shift - centred(col) * slope);
      if (p.d_sum.data) dx += load_float(p.d_sum.at<const T>(row, col));
      ptx::store(p.dx.at<T>(row, col), ptx::from_float<T>(dx));
    });
  }
};

}  // namespace

void layer_norm(const LayerNormParams& p, Queue queue) {
  with_type(p.dtype, [&]<class T>() {
    const bool vectors = is_aligned<T>(p.x) && is_aligned<T>(p.residual) && is_aligned(p.weight) &&
                         is_aligned(p.bias) && is_aligned<T>(p.sum) && is_aligned<T>(p.out);
    launch_for_width<LayerNorm, LayerNormAnyWidth<T>, T>(p.x, vectors, queue, p);
  });
}

void layer_norm_backward(const LayerNormBackwardParams& p, Queue queue) {
  with_type(p.dtype, [&]<class T>() {
    const bool vectors = is_aligned<T>(p.d_out) && is_aligned<T>(p.x) && is_aligned(p.weight) &&
                         is_aligned<T>(p.d_sum) && is_aligned<T>(p.dx);
    launch_for_width<LayerNormBackward, LayerNormBackwardAnyWidth<T>, T>(p.x, vectors, queue, p);
  });
}

}  // namespace locas::cuda
