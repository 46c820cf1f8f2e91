"""Devices and dtypes that tests are run for."""

import pytest
import torch

from support.fused import on_gpu

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DEVICES = ["cpu", pytest.param("cuda", marks=on_gpu)]
