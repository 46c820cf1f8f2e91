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
# tokens, d, m, r: nothing fits a tile. Of LONG, every tile gives a CTA several units.
LONG = (4200, 2048, 1024, 64)
SLICES = (1, 2, 4, 8)  # of K
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
        "workspace": poison(splits * (tokens + 3 * r), d, dtype=torch.float32),
    }
    if also.get("gradients"):
        ffn |= {"gate_out": draw(tokens, width), "up_out": draw(tokens, width), "dy": draw(tokens, d)}
        ffn |= {"d_gate": poison(tokens, width), "d_up": poison(tokens, width), "dx": poison(tokens, d)}
        ffn |= {"memory_hidden": poison(tokens, width - m), "slots_grad": poison(3, r, d, dtype=torch.float32).fill_(1)}
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


def compare(what: str, ours: torch.Tensor, exact: torch.Tensor, integers: bool, columns: int | None = None) -> None:
    """Integers are equal; others within three roundings of the largest. columns: those that count; else all."""
    if not kept_poison(ours):
        raise Wrong(f"{what}: wrote behind its end")
    if exact.numel() == 0:
        return
    ours = ours[:, :columns]
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
    ffn = make(*shape, dtype, splits=8, integers=integers, biases=True, saves=True)
    if tile in library.instances["K1"]:
        check_hidden(library, ffn, tile, integers, activation, what)
    else:
        library.hidden(ffn, library.instances["K1"][0], 2.0, activation)
    for splits in SLICES if tile in library.instances["K2"] else ():
        if (m + 63) // 64 + (r + 63) // 64 >= splits:
            check_down(library, ffn, tile, splits, integers, what)
    if tile in library.instances["K3"] or tile in library.instances["K4"]:
        check_gradients(
            library, make(*shape, dtype, splits=8, integers=integers, gradients=True), tile, integers, activation, what
        )


def check_hidden(library: Library, ffn: dict, tile: int, integers: bool, activation: str, what: str) -> None:
    library.hidden(ffn, tile, 2.0, activation)
    for name, exact in hidden_reference(ffn, activation, 2.0, torch.float64).items():
        compare(f"K1 {what}, {name}", ffn[name], exact, integers)
    bare = {name: tensor for name, tensor in ffn.items() if name not in ("gate_out", "up_out")}
    bare["hidden"] = torch.full_like(ffn["hidden"], float("nan"))
    library.hidden(bare, tile, 2.0, activation)
    if not torch.equal(bare["hidden"], ffn["hidden"]):
        raise Wrong(f"K1 {what}: without saving it differs")


def check_down(library: Library, ffn: dict, tile: int, splits: int, integers: bool, what: str) -> None:
    ffn["y"].fill_(float("nan"))
    library.down(ffn, tile, splits)
    compare(f"K2 {what}, {splits} slices", ffn["y"], down_reference(ffn, torch.float64), integers)
    first = ffn["y"].clone()
    library.down(ffn, tile, splits)
    if not torch.equal(first, ffn["y"]):
        raise Wrong(f"K2 {what}, {splits} slices: does not repeat")


def gradient_references(ffn: dict, activation: str, scale: float, wide: torch.dtype) -> dict[str, torch.Tensor]:
    """d_gate, d_up, memory_hidden, in the dtype, from dy and what the forward saved."""
    m, r = ffn["gate"].shape[0], ffn["slots"].shape[1]
    dy, gate = ffn["dy"].to(wide), ffn["gate_out"][:, : m + r].double().requires_grad_()
    scales = torch.ones(m + r, device="cuda", dtype=torch.float64)
    scales[m:] = scale
    hidden = scales * FUNCTIONS[activation](gate) * ffn["up_out"][:, : m + r].double()
    d_hidden = torch.cat([dy @ ffn["down"].to(wide), dy @ ffn["slots"][2].to(wide).T], dim=1).double()
    (d_gate,) = torch.autograd.grad(hidden, gate, d_hidden)
    d_up = d_hidden * scales * FUNCTIONS[activation](gate.detach())
    dtype = ffn["dy"].dtype
    return {"d_gate": d_gate.to(dtype), "d_up": d_up.to(dtype), "memory_hidden": hidden[:, m:].detach().to(dtype)}


def check_hidden_grad(library: Library, ffn: dict, tile: int, integers: bool, activation: str, what: str) -> None:
    library.hidden_grad(ffn, tile, 2.0, activation)
    for name, exact in gradient_references(ffn, activation, 2.0, torch.float64).items():
        ours = ffn[name]
        compare(f"K3 {what}, {name}", ours, exact, integers, columns=exact.shape[1])


def check_input_grad(library: Library, ffn: dict, tile: int, splits: int, slot_splits: int, integers: bool, what: str) -> None:
    """dx and the slots' gradients of d_gate, d_up and memory_hidden as they stand."""
    m, r = ffn["gate"].shape[0], ffn["slots"].shape[1]
    ffn["slots_grad"].fill_(1.0)
    library.input_grad(ffn, tile, splits, slot_splits)
    parts = [(ffn["d_gate"], ffn["gate"], ffn["slots"][0]), (ffn["d_up"], ffn["up"], ffn["slots"][1])]
    wide = [(d.double(), host.double(), slots.double()) for d, host, slots in parts]
    dx = sum(d[:, :m] @ host + d[:, m : m + r] @ slots for d, host, slots in wide)
    compare(f"K4 {what}, {splits} slices, dx", ffn["dx"], dx.to(ffn["dx"].dtype), integers)
    check_slots_grad(ffn, integers, f"K4 {what}, {splits} slices, {slot_splits} of the slots")


def check_slots_grad(ffn: dict, integers: bool, what: str) -> None:
    """Gradients that were added to 1."""
    m, r = ffn["gate"].shape[0], ffn["slots"].shape[1]
    coefficients = [ffn["d_gate"][:, m : m + r], ffn["d_up"][:, m : m + r], ffn["memory_hidden"][:, :r]]
    for kind, (name, rows) in enumerate([("gate", ffn["x"]), ("key", ffn["x"]), ("value", ffn["dy"])]):
        exact = 1.0 + coefficients[kind].double().T @ rows.double()
        ours = ffn["slots_grad"][kind]
        if not kept_poison(ffn["slots_grad"]):
            raise Wrong(f"{what}: wrote behind the slots' gradients")
        if r and not bool(((ours - exact).abs() <= (0.0 if integers else 1e-5 * float(exact.abs().max()))).all()):
            raise Wrong(f"{what}: the gradient of {name} is off by {float((ours - exact).abs().max()):.3g}")


def check_gradients(library: Library, ffn: dict, tile: int, integers: bool, activation: str, what: str) -> None:
    in_hidden = tile in library.instances["K3"]
    check_hidden_grad(library, ffn, tile if in_hidden else library.instances["K3"][0], integers, activation, what)
    for splits in SLICES if tile in library.instances["K4"] else ():
        if 2 * ((ffn["gate"].shape[0] + 63) // 64 + (ffn["slots"].shape[1] + 63) // 64) >= splits:
            slot_splits = min(splits, (len(ffn["x"]) + 63) // 64)
            check_input_grad(library, ffn, tile, splits, slot_splits, integers, what)
            first, slots_grad = ffn["dx"].clone(), ffn["slots_grad"].clone()
            ffn["slots_grad"].fill_(1.0)
            library.input_grad(ffn, tile, splits, slot_splits)
            if not torch.equal(first, ffn["dx"]) or not torch.equal(slots_grad, ffn["slots_grad"]):
                raise Wrong(f"K4 {what}, {splits} slices: does not repeat")


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


def check_whole_backward(library: Library, tokens: int, d: int, m: int, r: int) -> None:
    ffn = make(tokens, d, m, r, torch.bfloat16, splits=16, gradients=True)
    library.backward(ffn, 0.5)
    what = f"backward {tokens}, {d}, {m}, {r}"
    for name, exact in gradient_references(ffn, "silu", 0.5, torch.float32).items():
        compare(f"{what}, {name}", ffn[name], exact, False, columns=exact.shape[1])
    parts = [(ffn["d_gate"].float(), "gate", 0), (ffn["d_up"].float(), "up", 1)]
    dx = sum(g[:, :m] @ ffn[host].float() + g[:, m : m + r] @ ffn["slots"][kind].float() for g, host, kind in parts)
    compare(f"{what}, dx", ffn["dx"], dx.bfloat16(), False)
    check_slots_grad(ffn, False, what)
    first, slots_grad = ffn["dx"].clone(), ffn["slots_grad"].clone()
    for _ in range(5):
        ffn["slots_grad"].fill_(1.0)
        library.backward(ffn, 0.5)
        if not torch.equal(first, ffn["dx"]) or not torch.equal(slots_grad, ffn["slots_grad"]):
            raise Wrong(f"{what}: does not repeat")


def cases_of(library: Library, tile: int) -> list[tuple]:
    """The checks of a tile."""
    numbers = itertools.count(tile)
    shapes = [*itertools.product(SHAPES, ROUNDING), (LONG, torch.bfloat16)]
    return [
        (check_tile, tile, shape, dtype, integers, "relu" if integers else ACTIVATIONS[next(numbers) % len(ACTIVATIONS)])
        for (shape, dtype), integers in itertools.product(shapes, (True, False))
    ]


def cases_of_plans() -> list[tuple]:
    """The checks of whole passes, which the plan cuts."""
    whole = [(29, 1024, 3072, 64), (64, 2048, 6144, 64), (2049, 2048, 6144, 64), (511, 4096, 12288, 512)]
    return [(check, *shape) for check, shape in itertools.product((check_whole, check_whole_backward), whole)]


def check_all(library: Library, what: str, cases: list[tuple]) -> bool:
    """Runs every case and says what is wrong; whether nothing is."""
    wrong = []
    for check, *case in cases:
        try:
            check(library, *case)
        except Wrong as error:
            wrong.append(str(error))
            if len(wrong) <= 3:
                print(f"WRONG {error}", flush=True)
    torch.cuda.synchronize()
    print(f"{what}: {len(cases) - len(wrong)} of {len(cases)} cases are right", flush=True)
    return not wrong
