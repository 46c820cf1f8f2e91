// rms_norm, rms_norm_backward: a row is read once, held in registers, and written once.
//
//      rows [rows, cols]    [ l0 | l1 | ... | l0 | l1 | ... ]    kLanes threads own a row. A thread holds kVectors times
//                                                                8 columns that lie kLanes * 8 apart, in 16-byte
//                                                                accesses; all loads are under way before the sum.
//
// Up to 256 columns a row belongs to 16 or 32 lanes of a warp, and a CTA has several rows; above, a CTA owns a row.
// Rows that are no whole vectors, or not aligned, and very wide ones go through a strided loop, twice.
//
// Sums have a fixed order: results repeat bit for bit.
#include "cuda/common/block_sum.cuh"
#include "cuda/elementwise/rms_norm.cuh"
#include "cuda/launch.cuh"
#include "cuda/ptx/convert.cuh"
#include "cuda/ptx/memory.cuh"
#include "cuda/ptx/thread.cuh"

namespace locas::cuda {
namespace {

// What kLanes threads hold of a row, and where.
template <int kLanes, int kVectors>
struct Row {
  static constexpr int threads = kLanes < 128 ? 128 : kLanes, rows_per_block = threads / kLanes;
  using Sums = WarpSums<float, threads / 32>;
  static constexpr size_t shared_bytes = kLanes <= 32 ? 0 : sizeof(Sums);
  using Values = float[kVectors][kVector];

  const int64_t index, cols;
  const bool exists;

  LOCAS_DEVICE Row(const Matrix& m)
      : index(static_cast<int64_t>(ptx::block_index()) * rows_per_block + ptx::thread_index() / kLanes), cols(m.cols),
        exists(index < m.rows) {}

  // Calls f(k, col) for each vector of this thread that the row has.
  template <class F>
  LOCAS_DEVICE void for_each_vector(F&& f) const {
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      const int64_t col = (k * kLanes + ptx::thread_index() % kLanes) * kVector;
      if (exists && col < cols) f(k, col);
    }
  }
  template <class T>
  LOCAS_DEVICE void load(const Matrix& m, Values& to) const {
    for_each_vector([&](int k, int64_t col) { load_piece(m.at<const T>(index, col), to[k]); });
  }
  template <class T>
  LOCAS_DEVICE void load(const void* vector, Values& to) const {
    for_each_vector([&](int k, int64_t col) { load_piece(static_cast<const T*>(vector) + col, to[k]); });
  }
  template <class T>
  LOCAS_DEVICE void store(const Values& from, const Matrix& m) const {
    for_each_vector([&](int k, int64_t col) { store_piece(from[k], m.at<T>(index, col)); });
  }
  // Over the row; once a launch.
  static LOCAS_DEVICE float sum(float value, unsigned char* shared) {
    if constexpr (kLanes <= 32) return lane_sum<kLanes>(value);
    else return block_sum(value, *reinterpret_cast<Sums*>(shared));
  }
  LOCAS_DEVICE bool is_first_thread() const { return exists && ptx::thread_index() % kLanes == 0; }
};

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

// ---- Any width: a CTA owns a row, its threads stride over it -----------------------------------------------------
constexpr int kThreads = 256;
using Sums = WarpSums<float, kThreads / 32>;

template <class F>
LOCAS_DEVICE void for_each_column(int64_t cols, F&& f) {
  for (int64_t col = ptx::thread_index(); col < cols; col += kThreads) f(col);
}

template <class T>
LOCAS_DEVICE float load_float(const T* from) {
  return ptx::to_float(ptx::load(from));
}

template <class T>
struct RmsNormAnyWidth {
  using Params = RmsNormParams;
  static constexpr const char* name = "rms_norm_any_width";
  static constexpr int threads = kThreads, min_blocks = 1;

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
    const float inverse = inverse_rms(block_sum(squares, *reinterpret_cast<Sums*>(shared)), p.x.cols, p.eps);
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
  static constexpr int threads = kThreads, min_blocks = 1;

  static LOCAS_DEVICE void run(const Params& p, unsigned char* shared) {
    const int64_t row = ptx::block_index();
    const float inverse = ptx::load(p.inverse_rms + row);
    const auto weighted = [&](int64_t col) {
      return load_float(p.d_out.at<const T>(row, col)) *
             (p.weight_offset + load_float(static_cast<const T*>(p.weight) + col));
    };
    float dot = 0.0f;
    for_each_column(p.x.cols, [&](int64_t col) { dot += weighted(col) * load_float(p.x.at<const T>(row, col)); });
    const float shift =
        block_sum(dot, *reinterpret_cast<Sums*>(shared)) * inverse * inverse / static_cast<float>(p.x.cols);
    for_each_column(p.x.cols, [&](int64_t col) {
      float dx = inverse * (weighted(col) - load_float(p.x.at<const T>(row, col)) * shift);
      if (p.d_sum.data) dx += load_float(p.d_sum.at<const T>(row, col));
      ptx::store(p.dx.at<T>(row, col), ptx::from_float<T>(dx));
    });
  }
};

template <template <class, int, int> class Kernel, class T, int kLanes, int kVectors>
void launch_rows(int64_t rows, Queue queue, const auto& p) {
  using Rows = Row<kLanes, kVectors>;
  launch<Kernel<T, kLanes, kVectors>>(divide_up(rows, Rows::rows_per_block), Rows::shared_bytes, queue, p);
}

// The instance that has room for a row, with few threads idle; AnyWidth where none has or `vectors` says no.
template <template <class, int, int> class Kernel, class AnyWidth, class T>
void launch_for_width(const Matrix& x, bool vectors, Queue queue, const auto& p) {
  const int64_t rows = x.rows, cols = x.cols;
  if (!vectors || cols % kVector != 0 || cols > 8192) launch<AnyWidth>(rows, sizeof(Sums), queue, p);
  else if (cols <= 128) launch_rows<Kernel, T, 16, 1>(rows, queue, p);
  else if (cols <= 256) launch_rows<Kernel, T, 32, 1>(rows, queue, p);
  else if (cols <= 1024) launch_rows<Kernel, T, 128, 1>(rows, queue, p);
  else if (cols <= 2048) launch_rows<Kernel, T, 256, 1>(rows, queue, p);
  else if (cols <= 4096) launch_rows<Kernel, T, 256, 2>(rows, queue, p);
  else launch_rows<Kernel, T, 512, 2>(rows, queue, p);
}

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
