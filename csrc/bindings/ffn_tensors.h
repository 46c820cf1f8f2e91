#pragma once

#include "bindings/checks.h"

namespace locas {

// gate, up, down and their biases in the order of HostWeights, then the slots as in SlotViews.
struct FfnTensors {
  const TensorRef &gate, &up, &down;
  const MaybeTensor &gate_bias, &up_bias, &down_bias;
  const TensorRef &gate_key, &value;
};

}  // namespace locas
