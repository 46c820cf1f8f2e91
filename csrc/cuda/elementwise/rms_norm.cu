// rms_norm, rms_norm_backward: a row's sum with its residual, its norm, and the way back. rows.cuh has the layout.
#include "cuda/elementwise/rms_norm.cuh"
#include "cuda/elementwise/rows.cuh"

namespace locas::cuda {
namespace {

template <class T, int kLanes, int kVectors>
struct RmsNorm {
  using Params = RmsNormParams;
  using Rows = Row<kLanes, kVectors>;
  static constexpr const char* name = "rms_norm";
  static constexpr int threads = Rows::threads, min_blocks = 1;

  static LOCAS_DEVICE void run(const Params& p, unsigned char* shared) {
    const Rows row(p.x);
    typename Rows::Values x, weight, residual;
    row.template load<T>(p.x, x);
    if (p.residual.data) row.template load<T>(p.residual, residual);
    row.template load<T>(p.weight, weight);
    float squares = 0.0f;
    row.for_each_vector([&](int k, int64_t) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        if (p.residual.data) x[k][i] = rounded<T>(residual[k][i] + x[k][i]);
        squares += x[k][i] * x[k][i];
      }
    });
    if (p.residual.data) row.template store<T>(x, p.sum);
    const float inverse = inverse_rms(Rows::sum(squares, shared), p.x.cols, p.eps);
    if (p.inverse_rms && row.is_first_thread()) ptx::store(p.inverse_rms + row.index, inverse);
    row.for_each_vector([&](int k, int64_t) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) x[k][i] = normalized<T>(x[k][i], inverse, weight[k][i], p.weight_offset);
    });
    row.template store<T>(x, p.out);
  }
};

template <class T, int kLanes, int kVectors>
struct RmsNormBackward {
  using Params = RmsNormBackwardParams;
  using Rows = Row<kLanes, kVectors>;
  static constexpr const char* name = "rms_norm_backward";
  static constexpr int threads = Rows::threads, min_blocks = 1;

  static LOCAS_DEVICE void run(const Params& p, unsigned char* shared) {
    const Rows row(p.x);
    typename Rows::Values d, x, weight, d_sum;
    row.template load<T>(p.d_out, d);
    row.template load<T>(p.x, x);
    row.template load<T>(p.weight, weight);
    if (p.d_sum.data) row.template load<T>(p.d_sum, d_sum);
    const float inverse = row.exists ? ptx::load(p.inverse_rms + row.index) : 0.0f;
    float dot = 0.0f;
    row.for_each_vector([&](int k, int64_t) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        d[k][i] *= p.weight_offset + weight[k][i];
        dot += d[k][i] * x[k][i];
      }
    });
    const float shift = Rows::sum(dot, shared) * inverse * inverse / static_cast<float>(p.x.cols);
    row.for_each_vector([&](int k, int64_t) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        d[k][i] = inverse * (d[k][i] - x[k][i] * shift);
        if (p.d_sum.data) d[k][i] += d_sum[k][i];
      }
    });
    row.template store<T>(d, p.dx);
  }
};

// ---- Any width -----------------------------------------------------------------------------------------------------
template <class T>
struct RmsNormAnyWidth {
  using Params = RmsNormParams;
  static constexpr const char* name = "rms_norm_any_width";
  static constexpr int threads = kStridedThreads, min_blocks = 1;

  static LOCAS_DEVICE void run(const Params& p, unsigned char* shared) {
    const int64_t row = ptx::block_index();
    float squares = 0.0f;
    for_each_column(p.x.cols, [&](int64_t col) {
      float x = load_float(p.x.at<const T>(row, col));
      if (p.residual.data) {
        x = rounded<T>(load_float(p.residual.at<const T>(row, col)) + x);
        ptx::store(p.sum.at<T>(row, col), ptx::from_float<T>(x));
      }
      squares += x * x;
    });
    const float inverse = inverse_rms(strided_sum(squares, shared), p.x.cols, p.eps);
    if (p.inverse_rms && ptx::thread_index() == 0) ptx::store(p.inverse_rms + row, inverse);
    const Matrix& from = p.residual.data ? p.sum : p.x;  // each thread reads what it wrote itself
    for_each_column(p.x.cols, [&](int64_t col) {
      const float weight = load_float(static_cast<const T*>(p.weight) + col);
      const float out = normalized<T>(load_float(from.at<const T>(row, col)), inverse, weight, p.weight_offset);
      ptx::store(p.out.at<T>(row, col), ptx::from_float<T>(out));
    });
  }
};

template <class T>
struct RmsNormBackwardAnyWidth {
  using Params = RmsNormBackwardParams;
  static constexpr const char* name = "rms_norm_backward_any_width";
  static constexpr int threads = kStridedThreads, min_blocks = 1;

  static LOCAS_DEVICE void run(const Params& p, unsigned char* shared) {
    const int64_t row = ptx::block_index();
    const float inverse = ptx::load(p.inverse_rms + row);
    const auto weighted = [&](int64_t col) {
      return load_float(p.d_out.at<const T>(row, col)) *
             (p.weight_offset + load_float(static_cast<const T*>(p.weight) + col));
    };
    float dot = 0.0f;
    for_each_column(p.x.cols, [&](int64_t col) { dot += weighted(col) * load_float(p.x.at<const T>(row, col)); });
    const float shift = strided_sum(dot, shared) * inverse * inverse / static_cast<float>(p.x.cols);
    for_each_column(p.x.cols, [&](int64_t col) {
      float dx = inverse * (weighted(col) - load_float(p.x.at<const T>(row, col)) * shift);
      if (p.d_sum.data) dx += load_float(p.d_sum.at<const T>(row, col));
      ptx::store(p.dx.at<T>(row, col), ptx::from_float<T>(dx));
    });
  }
};

}  // namespace

void rms_norm(const RmsNormParams& p, Queue queue) {
  with_type(p.dtype, [&]<class T>() {
    const bool vectors = is_aligned<T>(p.x) && is_aligned<T>(p.residual) && is_aligned(p.weight) &&
                         is_aligned<T>(p.sum) && is_aligned<T>(p.out);
    launch_for_width<RmsNorm, RmsNormAnyWidth<T>, T>(p.x, vectors, queue, p);
  });
}

void rms_norm_backward(const RmsNormBackwardParams& p, Queue queue) {
  with_type(p.dtype, [&]<class T>() {
    const bool vectors = is_aligned<T>(p.d_out) && is_aligned<T>(p.x) && is_aligned(p.weight) &&
                         is_aligned<T>(p.d_sum) && is_aligned<T>(p.dx);
    launch_for_width<RmsNormBackward, RmsNormBackwardAnyWidth<T>, T>(p.x, vectors, queue, p);
  });
}

}  // namespace locas::cuda
