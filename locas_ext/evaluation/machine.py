"""What a report says about the machine it was made on."""

import platform
from pathlib import Path

import torch
import transformers

from locas_ext.version import __version__


def processor() -> str:
    """The processor's name and its logical cores."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {len(names)} logical" if names else platform.machine()


def machine() -> dict:
    """Processor, GPUs, threads and versions, ready for JSON."""
    return {
        "processor": processor(),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "locas_ext": __version__,
    }
