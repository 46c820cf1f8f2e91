"""`locas info`: what a bug report needs to say, as plain text."""

import platform
from importlib import metadata

import torch
import transformers
from rich.console import Console

from locas_ext import _C
from locas_ext.evaluation.machine import processor
from locas_ext.hosts.registry import HOSTS
from locas_ext.ops.backends.cuda_families import families
from locas_ext.version import __version__

from .selftest import self_test


def _installed() -> list[str]:
    """Versions of the libraries whose models and wrappers a memory meets, as far as they are installed."""
    versions = []
    for name in ("accelerate", "peft", "bitsandbytes", "torchao", "safetensors", "tokenizers", "typer"):
        try:
            versions.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            pass
    return versions


def _native(build: dict) -> str:
    cuda = build["cuda_architectures"]
    return (
        f"{build['version']}, {build['compiler']}, CPU kernels for {build['cpu_isa']}, "
        f"{build['openmp_threads']} threads, " + (f"CUDA kernels for {cuda}" if cuda else "no CUDA kernels")
    )


def _cuda_devices() -> list[str]:
    result = []
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        result.append(
            f"cuda:{index} {device.name}, compute capability {device.major}.{device.minor}, "
            f"{device.total_memory / 2**30:.0f} GiB"
        )
    for index, family in enumerate(families()[: len(result)]):  # torch may be built without CUDA
        result[index] += f", kernels: {family or 'none, it is too old for them'}"
    return result


def info(console: Console) -> bool:
    """Prints versions, build, devices and the kernels' self-test; returns whether the self-test passed."""
    build = _C.build_info()
    lines = {
        "locas_ext": __version__,
        "native": _native(build),
        "python": f"{platform.python_version()}, {platform.platform()}",
        "torch": f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}, {torch.get_num_threads()} threads",
        "transformers": transformers.__version__,
        "beside it": ", ".join(_installed()),
        "hosts": f"any decoder whose FFNs are found (`locas info --model`); known: {', '.join(HOSTS)}",
        "cpu": processor(),
    }
    for name, value in lines.items():
        console.print(f"{name:<13} {value}")
    cuda = _cuda_devices()
    for device in cuda:
        console.print(f"{'device':<13} {device}")

    devices = ["cpu"]
    if build["cuda_architectures"]:
        devices += [f"cuda:{index}" for index in range(len(cuda))]
    elif cuda:
        console.print("self-test     skipped on CUDA: this build has no CUDA kernels")
    console.print("\nself-test against float64 (largest error; in brackets that of plain torch)")
    failures = count = 0
    for device in devices:
        for check in self_test(torch.device(device)):
            verdict = "ok" if check.passed else f"FAILED, limit {check.limit:.1e}"
            console.print(
                f"  {check.device:<7} {check.dtype:<9} {check.op:<18} {check.error:.1e} "
                f"({check.plain_torch_error:.1e})  {verdict}"
            )
            count += 1
            failures += not check.passed
    outcome = f"{failures} of {count} checks failed" if failures else f"all {count} checks passed"
    console.print(f"self-test: {outcome}")
    return not failures
