// Launch parameters of the norms over rows: rms_norm and layer_norm.
#pragma once

#include "common/types.h"

namespace locas {

// sum = residual + x, rounded to the storage type, or x itself where there is no residual. Per row
//      rms_norm      inverse = 1 / sqrt(mean(sum^2) + eps)
//          weight_offset 0    out = weight * round(sum * inverse), rounded in between as Llama's norms do
//          otherwise          out = (weight_offset + weight) * sum * inverse in float, as Gemma's do, whose offset is 1
//      layer_norm    inverse = 1 / sqrt(variance(sum) + eps)
//          out = weight * (sum - mean) * inverse + bias, in float and rounded once as torch's layer norms do
struct NormParams {
  Matrix x;             // [rows, cols]
  Matrix residual;      // [rows, cols]; data may be null
  const void* weight;   // [cols]
  const void* bias;     // [cols]; may be null: rms_norm has none
  Matrix sum;           // [rows, cols] out; data is null where residual's is
  Matrix out;           // [rows, cols]
  float* mean;          // [rows] out; null where inverse is, and rms_norm has none
  float* inverse;       // [rows] out; may be null
  float weight_offset;  // of rms_norm
  float eps;
  DType dtype;
};

// dx from d_out, and what reached the sum by other ways added to it; weight and bias are frozen.
struct NormBackwardParams {
  Matrix d_out;          // [rows, cols]
  Matrix x;              // [rows, cols] the forward's sum
  const void* weight;    // [cols]
  const float* mean;     // [rows]; rms_norm has none
  const float* inverse;  // [rows]
  Matrix d_sum;          // [rows, cols]; data may be null
  Matrix dx;             // [rows, cols] out
  float weight_offset;   // of rms_norm
  DType dtype;
};

}  // namespace locas
