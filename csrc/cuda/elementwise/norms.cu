// rms_norm, layer_norm and their backwards: a row's sum with its residual, its norm, and the way back. rows.cuh has the
// layout. A variance is that of the centred row, so a large mean costs no digits.
#include "cuda/elementwise/rms_norm.cuh"
#include "cuda/elementwise/rows.cuh"

namespace locas::cuda {
namespace {

struct KernelNames {
  const char *forward, *forward_any_width, *backward, *backward_any_width;
};

// A formula: what it makes of a number of the row, which is centred where the formula says so.
struct RmsFormula {
  static constexpr KernelNames names = {"rms_norm", "rms_norm_any_width", "rms_norm_backward",
                                        "rms_norm_backward_any_width"};
  static constexpr bool centres = false;

  template <class T>
  static LOCAS_DEVICE float out(const NormParams& p, float x, float inverse, float weight, float) {
    return normalized<T>(x, inverse, weight, p.weight_offset);
  }
  static LOCAS_DEVICE float factor(const NormBackwardParams& p, float weight) { return p.weight_offset + weight; }
  static LOCAS_DEVICE float back(float d, float x, float inverse, float, float slope) {
    return inverse * (d - x * slope);
  }
};

struct LayerFormula {
  static constexpr KernelNames names = {"layer_norm", "layer_norm_any_width", "layer_norm_backward",
                                        "layer_norm_backward_any_width"};
  static constexpr bool centres = true;

  template <class T>
  static LOCAS_DEVICE float out(const NormParams&, float x, float inverse, float weight, float bias) {
    return x * inverse * weight + bias;
  }
  static LOCAS_DEVICE float factor(const NormBackwardParams&, float weight) { return weight; }
  static LOCAS_DEVICE float back(float d, float x, float inverse, float shift, float slope) {
    return inverse * (d - shift - x * slope);
  }
};

template <class Formula>
LOCAS_DEVICE void store_statistics(const NormParams& p, int64_t row, float mean, float inverse) {
  if (!p.inverse) return;
  if constexpr (Formula::centres) ptx::store(p.mean + row, mean);
  ptx::store(p.inverse + row, inverse);
}

// ---- Rows in registers ---------------------------------------------------------------------------------------------
template <class Formula>
struct Norm {
  template <class T, int kLanes, int kVectors>
  struct Kernel {
    using Params = NormParams;
    using Rows = Row<kLanes, kVectors>;
    static constexpr const char* name = Formula::names.forward;
    static constexpr int threads = Rows::threads, min_blocks = 1;

    static LOCAS_DEVICE void run(const Params& p, unsigned char* shared) {
      const Rows row(p.x);
      typename Rows::Values x, weight, bias, residual;
      row.template load<T>(p.x, x);
      if (p.residual.data) row.template load<T>(p.residual, residual);
      row.template load<T>(p.weight, weight);
      if (Formula::centres && p.bias) row.template load<T>(p.bias, bias);
      float sum = 0.0f, squares = 0.0f, mean = 0.0f;
      row.for_each_vector([&](int k, int64_t) {
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
          if (p.residual.data) x[k][i] = rounded<T>(residual[k][i] + x[k][i]);
          if constexpr (Formula::centres) sum += x[k][i];
          else squares += x[k][i] * x[k][i];
        }
      });
      if (p.residual.data) row.template store<T>(x, p.sum);
      if constexpr (Formula::centres) {
        mean = Rows::template sum<1>(sum, shared) / static_cast<float>(p.x.cols);
        row.for_each_vector([&](int k, int64_t) {
#pragma unroll
          for (int i = 0; i < kVector; ++i) {
            x[k][i] -= mean;
            squares += x[k][i] * x[k][i];
          }
        });
      }
      const float inverse = inverse_rms(Rows::sum(squares, shared), p.x.cols, p.eps);
      if (row.is_first_thread()) store_statistics<Formula>(p, row.index, mean, inverse);
      row.for_each_vector([&](int k, int64_t) {
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
          const float added = Formula::centres && p.bias ? bias[k][i] : 0.0f;
          x[k][i] = Formula::template out<T>(p, x[k][i], inverse, weight[k][i], added);
        }
      });
      row.template store<T>(x, p.out);
    }
  };
};

template <class Formula>
struct NormBackward {
  template <class T, int kLanes, int kVectors>
  struct Kernel {
    using Params = NormBackwardParams;
    using Rows = Row<kLanes, kVectors>;
    static constexpr const char* name = Formula::names.backward;
    static constexpr int threads = Rows::threads, min_blocks = 1;

    static LOCAS_DEVICE void run(const Params& p, unsigned char* shared) {
      const Rows row(p.x);
      typename Rows::Values d, x, weight, d_sum;
      row.template load<T>(p.d_out, d);
      row.template load<T>(p.x, x);
      row.template load<T>(p.weight, weight);
      if (p.d_sum.data) row.template load<T>(p.d_sum, d_sum);
      const float mean = Formula::centres && row.exists ? ptx::load(p.mean + row.index) : 0.0f;
      const float inverse = row.exists ? ptx::load(p.inverse + row.index) : 0.0f;
      float sum = 0.0f, dot = 0.0f, shift = 0.0f;
      row.for_each_vector([&](int k, int64_t) {
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
          d[k][i] *= Formula::factor(p, weight[k][i]);
          if constexpr (Formula::centres) {
            x[k][i] -= mean;
            sum += d[k][i];
          }
          dot += d[k][i] * x[k][i];
        }
      });
      const float count = static_cast<float>(p.x.cols);
      if constexpr (Formula::centres) shift = Rows::template sum<1>(sum, shared) / count;
      const float slope = Rows::sum(dot, shared) * inverse * inverse / count;
      row.for_each_vector([&](int k, int64_t) {
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
          d[k][i] = Formula::back(d[k][i], x[k][i], inverse, shift, slope);
          if (p.d_sum.data) d[k][i] += d_sum[k][i];
        }
      });
      row.template store<T>(d, p.dx);
    }
  };
};

// ---- Any width -----------------------------------------------------------------------------------------------------
template <class Formula, class T>
struct NormAnyWidth {
  using Params = NormParams;
  static constexpr const char* name = Formula::names.forward_any_width;
  static constexpr int threads = kStridedThreads, min_blocks = 1;

  static LOCAS_DEVICE void run(const Params& p, unsigned char* shared) {
    const int64_t row = ptx::block_index();
    float sum = 0.0f, squares = 0.0f, mean = 0.0f;
    for_each_column(p.x.cols, [&](int64_t col) {
      float x = load_float(p.x.at<const T>(row, col));
      if (p.residual.data) {
        x = rounded<T>(load_float(p.residual.at<const T>(row, col)) + x);
        ptx::store(p.sum.at<T>(row, col), ptx::from_float<T>(x));
      }
      if constexpr (Formula::centres) sum += x;
      else squares += x * x;
    });
    const Matrix& from = p.residual.data ? p.sum : p.x;  // each thread reads what it wrote itself
    const auto centred = [&](int64_t col) { return load_float(from.at<const T>(row, col)) - mean; };
    if constexpr (Formula::centres) {
      mean = strided_sum<1>(sum, shared) / static_cast<float>(p.x.cols);
      for_each_column(p.x.cols, [&](int64_t col) {
        const float x = centred(col);
        squares += x * x;
      });
    }
    const float inverse = inverse_rms(strided_sum(squares, shared), p.x.cols, p.eps);
    if (ptx::thread_index() == 0) store_statistics<Formula>(p, row, mean, inverse);
    for_each_column(p.x.cols, [&](int64_t col) {
      const float weight = load_float(static_cast<const T*>(p.weight) + col);
      const float bias = Formula::centres && p.bias ? load_float(static_cast<const T*>(p.bias) + col) : 0.0f;
      const float out = Formula::template out<T>(p, centred(col), inverse, weight, bias);
      ptx::store(p.out.at<T>(row, col), ptx::from_float<T>(out));
    });
  }
};

template <class Formula, class T>
struct NormBackwardAnyWidth {
  using Params = NormBackwardParams;
  static constexpr const char* name = Formula::names.backward_any_width;
  static constexpr int threads = kStridedThreads, min_blocks = 1;

  static LOCAS_DEVICE void run(const Params& p, unsigned char* shared) {
    const int64_t row = ptx::block_index();
    const float mean = Formula::centres ? ptx::load(p.mean + row) : 0.0f, inverse = ptx::load(p.inverse + row);
    const auto weighted = [&](int64_t col) {
      return load_float(p.d_out.at<const T>(row, col)) *
             Formula::factor(p, load_float(static_cast<const T*>(p.weight) + col));
    };
    const auto centred = [&](int64_t col) { return load_float(p.x.at<const T>(row, col)) - mean; };
    float sum = 0.0f, dot = 0.0f, shift = 0.0f;
    for_each_column(p.x.cols, [&](int64_t col) {
      if constexpr (Formula::centres) sum += weighted(col);
      dot += weighted(col) * centred(col);
    });
    const float count = static_cast<float>(p.x.cols);
    if constexpr (Formula::centres) shift = strided_sum<1>(sum, shared) / count;
    const float slope = strided_sum(dot, shared) * inverse * inverse / count;
    for_each_column(p.x.cols, [&](int64_t col) {
      float dx = Formula::back(weighted(col), centred(col), inverse, shift, slope);
      if (p.d_sum.data) dx += load_float(p.d_sum.at<const T>(row, col));
      ptx::store(p.dx.at<T>(row, col), ptx::from_float<T>(dx));
    });
  }
};

// ---- Launches ------------------------------------------------------------------------------------------------------
template <class Formula>
void norm(const NormParams& p, Queue queue) {
  with_type(p.dtype, [&]<class T>() {
    const bool vectors = is_aligned<T>(p.x) && is_aligned<T>(p.residual) && is_aligned(p.weight) &&
                         is_aligned(p.bias) && is_aligned<T>(p.sum) && is_aligned<T>(p.out);
    launch_for_width<Norm<Formula>::template Kernel, NormAnyWidth<Formula, T>, T>(p.x, vectors, queue, p);
  });
}

template <class Formula>
void norm_backward(const NormBackwardParams& p, Queue queue) {
  with_type(p.dtype, [&]<class T>() {
    const bool vectors = is_aligned<T>(p.d_out) && is_aligned<T>(p.x) && is_aligned(p.weight) &&
                         is_aligned<T>(p.d_sum) && is_aligned<T>(p.dx);
    launch_for_width<NormBackward<Formula>::template Kernel, NormBackwardAnyWidth<Formula, T>, T>(p.x, vectors, queue,
                                                                                                  p);
  });
}

}  // namespace

void rms_norm(const NormParams& p, Queue queue) { norm<RmsFormula>(p, queue); }
void rms_norm_backward(const NormBackwardParams& p, Queue queue) { norm_backward<RmsFormula>(p, queue); }
void layer_norm(const NormParams& p, Queue queue) { norm<LayerFormula>(p, queue); }
void layer_norm_backward(const NormBackwardParams& p, Queue queue) { norm_backward<LayerFormula>(p, queue); }

}  // namespace locas::cuda
