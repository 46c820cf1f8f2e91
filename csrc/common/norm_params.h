// Launch parameters of the norms over rows.
#pragma once

#include "common/types.h"

namespace locas {

// sum = residual + x, rounded to the storage type, or x itself where there is no residual; with
// rms = sqrt(mean(sum^2) + eps) per row:
//      weight_offset 0    out = weight * round(sum / rms), rounded in between as Llama's norms do
//      otherwise          out = (weight_offset + weight) * sum / rms in float, as Gemma's do, whose offset is 1
struct RmsNormParams {
  Matrix x;            // [rows, cols]
  Matrix residual;     // [rows, cols]; data may be null
  const void* weight;  // [cols]
  Matrix sum;          // [rows, cols] out; data is null where residual's is
  Matrix out;          // [rows, cols]
  float* inverse_rms;  // [rows] out; may be null
  float weight_offset;
  float eps;
  DType dtype;
};

// dx from d_out, and what reached the sum by other ways added to it; the weight is frozen.
struct RmsNormBackwardParams {
  Matrix d_out;              // [rows, cols]
  Matrix x;                  // [rows, cols] the forward's sum
  const void* weight;        // [cols]
  const float* inverse_rms;  // [rows]
  Matrix d_sum;              // [rows, cols]; data may be null
  Matrix dx;                 // [rows, cols] out
  float weight_offset;
  DType dtype;
};

// sum as in RmsNormParams; out = weight * (sum - mean) / sqrt(variance + eps) + bias per row, in float and rounded once as
// torch's layer norms do.
struct LayerNormParams {
  Matrix x;            // [rows, cols]
  Matrix residual;     // [rows, cols]; data may be null
  const void* weight;  // [cols]
  const void* bias;    // [cols]; may be null
  Matrix sum;          // [rows, cols] out; data is null where residual's is
  Matrix out;          // [rows, cols]
  float* mean;         // [rows] out; may be null
  float* inverse_std;  // [rows] out; null where mean is
  float eps;
  DType dtype;
};

// dx from d_out, and what reached the sum by other ways added to it; weight and bias are frozen.
struct LayerNormBackwardParams {
  Matrix d_out;              // [rows, cols]
  Matrix x;                  // [rows, cols] the forward's sum
  const void* weight;        // [cols]
  const float* mean;         // [rows]
  const float* inverse_std;  // [rows]
  Matrix d_sum;              // [rows, cols]; data may be null
  Matrix dx;                 // [rows, cols] out
  DType dtype;
};

}  // namespace locas
