"""What the tests of the fused CUDA kernels share."""

import pytest
import torch

from locas_ext.ops.backends import cuda

on_gpu = [
    pytest.mark.cuda,
    pytest.mark.skipif(
        not torch.cuda.is_available() or not cuda.BUILT, reason="needs a CUDA device and a build with CUDA kernels"
    ),
]
DTYPES = [torch.bfloat16, torch.float16]
