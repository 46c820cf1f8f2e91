"""Whether the Hopper kernels are right: every tile, whole and in slices, on small integers exactly and on random numbers."""

import itertools

import torch
from torch.nn import functional as F

from .sm90_library import ACTIVATIONS, Library

FUNCTIONS = {
    "silu": F.silu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu": F.gelu,
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}
ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-11}
# tokens, d, m, r: nothing fits a tile.
SHAPES = [(1, 64, 64, 1), (131, 264, 520, 37), (257, 1032, 1544, 65), (300, 520, 392, 0), (33, 128, 200, 130)]


class Wrong(Exception):
    """A kernel's numbers are wrong."""


def make(tokens: int, d: int, m: int, r: int, dtype: torch.dtype, splits: int = 1, integers: bool = False, **also) -> dict:
    """An FFN with memory by the names of Arguments. Outputs hold NaN and one row more, which must keep it."""

    def draw(*shape: int, fan_in: int = 1) -> torch.Tensor:
        if integers:
            return torch.randint(-3, 4, shape, device="cuda").div(3, rounding_mode="trunc").to(dtype)
        return torch.randn(shape, device="cuda").mul_(fan_in**-0.5).to(dtype)

    def poison(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.full((shape[0] + 1, *shape[1:]), float("nan"), device="cuda", dtype=dtype)[:-1]

    width = m + (r + 7) // 8 * 8
    ffn = {
        "gate": draw(m, d, fan_in=d),
        "up": draw(m, d, fan_in=d),
        "down": draw(d, m, fan_in=m),
        "slots": draw(3, r, d, fan_in=d),
        "x": draw(tokens, d),
        "hidden": draw(tokens, width),
        "y": poison(tokens, d),
        "workspace": poison(splits, tokens, d, dtype=torch.float32),
    }
    if also.get("biases"):
        ffn |= {"gate_bias": draw(m), "up_bias": draw(m), "down_bias": draw(d)}
    if also.get("saves"):
        ffn |= {"hidden": poison(tokens, width), "gate_out": poison(tokens, width), "up_out": poison(tokens, width)}
    return ffn


def kept_poison(tensor: torch.Tensor) -> bool:
    """Whether the row behind an output still holds NaN."""
    shape = (tensor.shape[0] + 1, *tensor.shape[1:])
    return bool(tensor.as_strided(shape, tensor.stride(), tensor.storage_offset())[-1].isnan().all())


def hidden_reference(ffn: dict, activation: str, scale: float, wide: torch.dtype) -> dict[str, torch.Tensor]:
    """gate_out, up_out, hidden, in the dtype; products in `wide`."""
    dtype, m, r = ffn["x"].dtype, ffn["gate"].shape[0], ffn["slots"].shape[1]
    x, (g, k, _) = ffn["x"].to(wide), ffn["slots"].to(wide)

    def part(weight: str, bias: str, rows: torch.Tensor) -> torch.Tensor:
        host = x @ ffn[weight].to(wide).T
        if bias in ffn:
            host = host + ffn[bias].to(wide)
        padding = x.new_zeros(len(x), -r % 8)
        return torch.cat([host, x @ rows.T, padding], dim=1).to(dtype)

    gate, up = part("gate", "gate_bias", g), part("up", "up_bias", k)
    scales = torch.ones(gate.shape[1], device="cuda", dtype=torch.float64)
    scales[m:] = scale
    hidden = scales * FUNCTIONS[activation](gate.double()) * up.double()
    return {"gate_out": gate, "up_out": up, "hidden": hidden.to(dtype)}


def down_reference(ffn: dict, wide: torch.dtype) -> torch.Tensor:
    m, r = ffn["gate"].shape[0], ffn["slots"].shape[1]
    hidden = ffn["hidden"].to(wide)
    y = hidden[:, :m] @ ffn["down"].to(wide).T + hidden[:, m : m + r] @ ffn["slots"][2].to(wide)
    return (y + ffn["down_bias"].to(wide) if "down_bias" in ffn else y).to(ffn["x"].dtype)


def compare(what: str, ours: torch.Tensor, exact: torch.Tensor, integers: bool) -> None:
    """Integers are equal; others within three roundings of the largest."""
    if not kept_poison(ours):
        raise Wrong(f"{what}: wrote behind its end")
    difference = (ours.double() - exact.double()).abs()
    allowed = 0.0 if integers else 3 * ROUNDING[ours.dtype] * float(exact.abs().max())
    if not bool((difference <= allowed).all()):
        wrong = ~(difference <= allowed)
        row, col = (int(i) for i in wrong.nonzero()[0])
        raise Wrong(
            f"{what}: {int(wrong.sum())} of {wrong.numel()} differ, the first at [{row}, {col}]: {float(ours[row, col])} "
            f"instead of {float(exact[row, col])}; columns {sorted(set(wrong.nonzero()[:, 1].tolist()))[:12]}, "
            f"rows {sorted(set(wrong.nonzero()[:, 0].tolist()))[:12]}"
        )


def check_tile(library: Library, tile: int, shape: tuple, dtype: torch.dtype, integers: bool, activation: str) -> None:
    tokens, d, m, r = shape
    what = f"{library.names[tile]}, {dtype}, tokens {tokens}, d {d}, m {m}, r {r}, {'integers' if integers else activation}"
    ffn = make(*shape, dtype, splits=4, integers=integers, biases=True, saves=True)
    library.hidden(ffn, tile, 2.0, activation)
    for name, exact in hidden_reference(ffn, activation, 2.0, torch.float64).items():
        compare(f"K1 {what}, {name}", ffn[name], exact, integers)
    bare = {name: tensor for name, tensor in ffn.items() if name not in ("gate_out", "up_out")}
    bare["hidden"] = torch.full_like(ffn["hidden"], float("nan"))
    library.hidden(bare, tile, 2.0, activation)
    if not torch.equal(bare["hidden"], ffn["hidden"]):
        raise Wrong(f"K1 {what}: without saving it differs")
    for splits in (1, 2, 4):
        if (m + 63) // 64 + (r + 63) // 64 < splits:
            continue
        ffn["y"].fill_(float("nan"))
        library.down(ffn, tile, splits)
        compare(f"K2 {what}, {splits} slices", ffn["y"], down_reference(ffn, torch.float64), integers)
        first = ffn["y"].clone()
        library.down(ffn, tile, splits)
        if not torch.equal(first, ffn["y"]):
            raise Wrong(f"K2 {what}, {splits} slices: does not repeat")


def check_whole(library: Library, tokens: int, d: int, m: int, r: int) -> None:
    ffn = make(tokens, d, m, r, torch.bfloat16, splits=8)
    library.forward(ffn, 0.5)
    compare(f"forward {tokens}, {d}, {m}, {r}", ffn["y"], down_reference(ffn, torch.float32), False)
    exact = hidden_reference(ffn, "silu", 0.5, torch.float32)["hidden"]
    first = ffn["y"].clone()
    for _ in range(5):
        library.forward(ffn, 0.5)
        if not torch.equal(first, ffn["y"]):
            raise Wrong("the forward does not repeat")
    error = float((ffn["hidden"].double() - exact.double()).abs().max() / exact.double().abs().max())
    if not error <= 3 * ROUNDING[torch.bfloat16]:
        raise Wrong(f"forward {tokens}, {d}, {m}, {r}: hidden is off by {error:.3g} of the largest")


def check_all(library: Library) -> bool:
    """Runs every case and says what is wrong; whether nothing is."""
    numbers = itertools.count()
    cases = [
        (check_tile, tile, shape, dtype, integers, "relu" if integers else ACTIVATIONS[next(numbers) % len(ACTIVATIONS)])
        for tile, shape, dtype in itertools.product(range(len(library.tiles)), SHAPES, ROUNDING)
        for integers in (True, False)
    ]
    cases += [(check_whole, *shape) for shape in [(2048, 1024, 3072, 64), (2049, 2048, 6144, 64), (511, 4096, 12288, 512)]]
    wrong = []
    for check, *case in cases:
        try:
            check(library, *case)
        except Wrong as error:
            wrong.append(str(error))
            if len(wrong) <= 12:
                print(f"WRONG {error}", flush=True)
    torch.cuda.synchronize()
    print(f"{len(cases) - len(wrong)} of {len(cases)} cases of {len(library.tiles)} tiles are right", flush=True)
    return not wrong
