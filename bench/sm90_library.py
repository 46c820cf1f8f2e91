"""The Hopper kernels alone, one product at a time and with any tile: csrc/cuda/ffn/sm90 as a library of its own."""

import ctypes
import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
FAMILY = ROOT / "csrc" / "cuda" / "ffn" / "sm90"
SOURCES = [FAMILY / "forward.cu", FAMILY / "backward.cu", ROOT / "bench" / "sm90.cu"]
PRODUCTS = ["K1", "K2", "K3", "K4"]
ACTIVATIONS = ["silu", "gelu_pytorch_tanh", "gelu", "relu", "relu2", "quick_gelu"]
DTYPES = {torch.bfloat16: 1, torch.float16: 2}


def _path() -> Path:
    """Where the library of these sources is: its name has their hash."""
    digest = hashlib.sha256()
    for folder in ("csrc/common", "csrc/cuda", "bench"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".cu", ".cuh", ".h"):
                digest.update(path.read_bytes())
    return ROOT / "build" / "sm90" / f"{digest.hexdigest()[:16]}.so"


def build(library: Path) -> None:
    """Compiles it: a minute on two cores, seconds on sixteen."""
    library.parent.mkdir(parents=True, exist_ok=True)
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    options = ["-std=c++20", "-O3", "--expt-relaxed-constexpr", f"-I{ROOT / 'csrc'}", "-split-compile=0"]
    options += ["-gencode", "arch=compute_90a,code=sm_90a", "-Xcompiler", "-fPIC"]
    objects = [library.parent / f"{path.parent.name}_{path.stem}.o" for path in SOURCES]
    processes = [
        subprocess.Popen([nvcc, *options, "-c", str(path), "-o", str(to)]) for path, to in zip(SOURCES, objects, strict=True)
    ]
    if any([process.wait() for process in processes]):
        raise SystemExit("nvcc failed")
    check = str(ROOT / "csrc" / "cuda" / "check_host_calls.cmake")
    subprocess.run(["cmake", "-DNM=nm", f"-DOBJECTS={','.join(map(str, objects))}", "-P", check], check=True)
    part = library.with_suffix(f".{os.getpid()}")
    subprocess.run([nvcc, "-shared", *map(str, objects), "-o", str(part)], check=True)
    part.rename(library)


def load() -> ctypes.CDLL:
    """The library, compiled if it is not there, or if it came from a machine with other system libraries."""
    library = _path()
    if library.exists():
        try:
            return ctypes.CDLL(str(library))
        except OSError as error:
            print(f"{error}: compiling anew")
    build(library)
    return ctypes.CDLL(str(library))


class Arguments(ctypes.Structure):
    """As bench/sm90.cu lays it out."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ["gate", "up", "down", "gate_bias", "up_bias", "down_bias", "slots"]),
        *((name, ctypes.c_void_p) for name in ["x", "hidden", "gate_out", "up_out", "y", "workspace"]),
        *((name, ctypes.c_void_p) for name in ["dy", "d_gate", "d_up", "memory_hidden", "dx", "slots_grad"]),
        *((name, ctypes.c_int64) for name in ["tokens", "d", "m", "r"]),
        ("scale", ctypes.c_float),
        *((name, ctypes.c_int32) for name in ["activation", "dtype", "device"]),
        ("stream", ctypes.c_void_p),
    ]


class Library:
    """The launchers. `ffn`: a dict of tensors by the names of Arguments and others; what is missing is null."""

    def __init__(self) -> None:
        self._library = load()
        for name in ["hidden", "down", "forward", "hidden_grad", "input_grad", "backward"]:
            getattr(self._library, f"locas_{name}").restype = ctypes.c_char_p
        shapes = (ctypes.c_int * 256)()
        count = self._library.locas_tiles(shapes)
        tiles = [shapes[3 * i : 3 * i + 3] for i in range(count)]
        self.names = [f"{m}x{n}{'pp' if pp else ''}" for m, n, pp in tiles]
        self.instances: dict[str, list[int]] = {}
        for number, product in enumerate(PRODUCTS):
            count = self._library.locas_instances(number, shapes)
            self.instances[product] = shapes[:count]

    def hidden(self, ffn: dict, tile: int, scale: float = 1.0, activation: str = "silu") -> None:
        self._run("locas_hidden", ffn, scale, activation, tile)

    def down(self, ffn: dict, tile: int, splits: int) -> None:
        self._run("locas_down", ffn, 1.0, "silu", tile, splits)

    def forward(self, ffn: dict, scale: float = 1.0, activation: str = "silu") -> None:
        self._run("locas_forward", ffn, scale, activation)

    def hidden_grad(self, ffn: dict, tile: int, scale: float = 1.0, activation: str = "silu") -> None:
        self._run("locas_hidden_grad", ffn, scale, activation, tile)

    def input_grad(self, ffn: dict, tile: int, splits: int, slot_splits: int) -> None:
        self._run("locas_input_grad", ffn, 1.0, "silu", tile, splits, slot_splits)

    def backward(self, ffn: dict, scale: float = 1.0, activation: str = "silu") -> None:
        self._run("locas_backward", ffn, scale, activation)

    def plan(self, tokens: int, d: int, m: int, r: int) -> dict[str, tuple[int, int, int]]:
        """-> each product's tile, slices, and slices of the slots' gradients."""
        plan = (ctypes.c_int * 12)()
        self._library.locas_plan(*map(ctypes.c_int64, (tokens, d, m, r)), plan)
        return {product: tuple(plan[3 * i : 3 * i + 3]) for i, product in enumerate(PRODUCTS)}

    def arm(self, tile: int, splits: int = 1, slot_splits: int = 1) -> str:
        """Its name."""
        return self.names[tile] + (f"/{splits}" if splits > 1 else "") + (f"s{slot_splits}" if slot_splits > 1 else "")

    def _run(self, name: str, ffn: dict, scale: float, activation: str, *numbers: int) -> None:
        x, gate, slots = ffn["x"], ffn["gate"], ffn["slots"]
        arguments = Arguments(
            **{key: ffn[key].data_ptr() for key, _ in Arguments._fields_[:19] if key in ffn},
            **dict(tokens=x.shape[0], d=x.shape[1], m=gate.shape[0], r=slots.shape[1], scale=scale),
            **dict(activation=ACTIVATIONS.index(activation), dtype=DTYPES[x.dtype], device=x.device.index or 0),
            stream=torch.cuda.current_stream().cuda_stream,
        )
        said = getattr(self._library, name)(ctypes.byref(arguments), *map(ctypes.c_int, numbers))
        if said:
            raise RuntimeError(said.decode())
