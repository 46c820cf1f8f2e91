"""What the tests of sideway_mlp and write_slots_ share: devices and dtypes."""

import pytest
import torch

from locas_ext import _C

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.cuda,
            pytest.mark.skipif(not torch.cuda.is_available() or _C.build_info()["cuda_architectures"] is None, reason="no GPU"),
        ],
    ),
]
