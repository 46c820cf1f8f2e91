"""The CUDA kernels on the CPU: csrc/simt's tests, built with AddressSanitizer and run. docs/kernels.md says what they check."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "simt-asan"  # kept, so that a second run compiles only what changed

# The cmake and ninja installed beside this Python come before the system's, which may be too old.
PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])


def run(*command):
    result = subprocess.run(
        command, env={**os.environ, "PATH": PATH}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert result.returncode == 0, f"{' '.join(map(str, command))} ended with {result.returncode}:\n{result.stdout}"
    return result.stdout


def test_kernels_on_the_simt_runner(record_property):
    cmake = shutil.which("cmake", path=PATH)
    assert cmake and shutil.which("ninja", path=PATH), "needs cmake and ninja: pip install '.[test]'"
    run(cmake, "-G", "Ninja", "-S", ROOT / "csrc" / "simt", "-B", BUILD, "-DLOCAS_SIMT_ASAN=ON")
    run(cmake, "--build", BUILD)
    report = run(BUILD / "locas_simt_tests")
    record_property("kernels", report)  # conftest.py prints it at the end

    shapes, *lines = report.splitlines()
    assert shapes.startswith("shape seed")
    assert all(": ok (" in line for line in lines)
    for kernel in [
        "families:",
        "glu_ffn with",
        "glu_ffn of sm90",
        "plans of the sm90 family",
        "glu_ffn_decode",
        "neuron_importance:",
        "neuron_importance_of_products",
        "adamw_slots:",
        "sgd_slots:",
        "adamw_slots_from_factors",
        "glu_activation_forward",
        "token_nll",
        "rms_norm",
        "layer_norm",
        "rotary",
        "write_slots",
        "peer_sum",
    ]:
        assert any(line.startswith(kernel) for line in lines), f"{kernel} did not run"
    (planted,) = [line for line in lines if line.startswith("runner: planted bugs")]
    for bug in ["no sync_threads", "no cp.async wait", "no mbarrier wait", "no bound", "no sync_grid before a read"]:
        assert f"{bug} found by" in planted
