"""The FFN with memory against the FFN without: forward, and forward + backward.

Every peer's weights are frozen and x requires a gradient, as while memorizing; the sideway branch's slots learn in both
arms that have one. `python -m bench.ffn --help` lists the settings.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP

from locas_ext import ops, reference
from locas_ext.kernels import HostWeights, SlotViews
from locas_ext.ops import GluFFNFunction, native_backend

from .harness import interleaved, ratio, report, summary

SCALE = 0.1


class Case:
    """One shape: a host FFN and a memory on it, with fresh random activations every round."""

    def __init__(self, d: int, tokens: int, rank: int, dtype: torch.dtype, device: str):
        config = Qwen3Config(hidden_size=d, intermediate_size=3 * d)
        self.mlp = Qwen3MLP(config).to(device, dtype).requires_grad_(False)
        for linear in (self.mlp.gate_proj, self.mlp.up_proj, self.mlp.down_proj):
            torch.nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
        slots = F.normalize(torch.randn(3, rank, d, device=device), dim=-1)
        self.slots = torch.nn.Parameter(slots)
        self.compute = slots.to(dtype)
        self.views = SlotViews.of(self.compute)
        self.grad = torch.zeros_like(slots)
        self.host = HostWeights(self.mlp.gate_proj.weight, self.mlp.up_proj.weight, self.mlp.down_proj.weight)
        self.x = torch.randn(tokens, d, device=device).to(dtype).requires_grad_()
        self.dy = torch.randn(tokens, d, device=device).to(dtype)
        self.sideway = torch.nn.Parameter(self.compute.clone())
        self.backend = native_backend("bench.ffn", self.x, self.host.gate, "auto")
        self.flop = 6 * tokens * d * 3 * d

    def eager(self):
        return self.mlp(self.x)

    def eager_sideway(self):
        return self.mlp(self.x) + reference.sideway_glu(self.x, self.sideway, SCALE)

    def ours(self):
        if torch.is_grad_enabled():
            return GluFFNFunction.apply(self.x, self.slots, self.views, self.host, SCALE, 0, self.grad, self.backend)
        return self.backend.glu_ffn_forward(self.x, self.host, self.views, SCALE, 0, save=False)[0]

    def forward(self, ffn):
        with torch.no_grad():
            return ffn()

    def forward_backward(self, ffn):
        self.x.grad = None
        ffn().backward(self.dy)

    def check(self) -> None:
        """The timed outputs against float64, by the error of the eager arm: raises if ours is worse than twice that."""
        exact = reference.glu_ffn(
            self.x.double(), *(w.double() for w in self.host[:3]), self.compute.double(), SCALE
        ).detach()
        errors = [(self.forward(f).double() - exact).norm() / exact.norm() for f in (self.ours, self.eager_sideway)]
        if not errors[0] <= 2 * errors[1] + 1e-7:
            raise SystemExit(f"wrong result: relative error {errors[0]:.2e}, eager has {errors[1]:.2e}")


def run_case(case: Case, rounds: int, compiled: bool) -> list[dict]:
    case.check()
    ffns = {"eager": case.eager, "eager + sideway": case.eager_sideway, "ours": case.ours}
    if compiled:
        ffns["compiled"] = torch.compile(case.eager)
        ffns["compiled + sideway"] = torch.compile(case.eager_sideway)
    ffns["eager again"] = case.eager
    records = []
    for mode, run in (("forward", case.forward), ("forward + backward", case.forward_backward)):
        arms = {name: (lambda ffn=ffn: run(ffn)) for name, ffn in ffns.items()}
        seconds = interleaved(arms, rounds)
        flop = case.flop * (1 if mode == "forward" else 2)
        for name, values in seconds.items():
            times = summary(values)
            records.append({
                "mode": mode, "arm": name, **times, "gflops": flop / times["median_us"] / 1e3,
                "ratio_eager": ratio(values, seconds["eager"]),
                "ratio_eager_sideway": ratio(values, seconds["eager + sideway"]),
            })
    return records


def overhead(rounds: int) -> dict:
    """Microseconds of Python around the torch and native calls of a patched FFN, at a shape too small to compute."""
    from transformers import Qwen3ForCausalLM

    import locas_ext as locas

    config = Qwen3Config(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, max_position_embeddings=32,
    )
    model = Qwen3ForCausalLM(config).eval()
    memory = locas.attach(model, locas.LocasConfig(rank=8))
    memory.memorize(torch.arange(32), window=16, stride=8, progress=False)
    patched, mlp = memory._attachment.ffns[0], model.model.layers[0].mlp
    x = torch.randn(1, 1, 16)
    x2d, host, views = x[0], patched.ffn.weights(), memory.state.arenas[0].views[0]
    backend = native_backend("bench.ffn", x, host.gate, "auto")

    def repeat(call, times=50):
        def run():
            with torch.no_grad():
                for _ in range(times):
                    call()

        return run

    empty = torch.nn.Identity()
    arms = {
        "module call": repeat(lambda: empty(x)),
        "patched": repeat(lambda: mlp(x)),
        "bare": repeat(lambda: backend.glu_ffn_forward(x2d, host, views, SCALE, 0, save=False)),
        "op": repeat(lambda: ops.glu_ffn(x, *host[:3], memory.slots[0], SCALE)),
        "eager": repeat(lambda: patched.original(x)),
    }
    seconds = interleaved(arms, rounds)
    each = {name: summary(values)["median_us"] / 50 for name, values in seconds.items()}
    around = each["bare"] + each["module call"]
    return {**each, "overhead of a patched FFN": each["patched"] - around, "overhead of the op": each["op"] - around}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.ffn", description=__doc__)
    parser.add_argument("--d", type=int, nargs="+", default=[256, 1024, 2048], help="hidden sizes; m = 3 d")
    parser.add_argument("--tokens", type=int, nargs="+", default=[128, 512, 2048])
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--compile", action="store_true", help="also time torch.compile of both peers (minutes)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON file")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)

    records, rows = [], []
    for dtype in arguments.dtype:
        for d in arguments.d:
            for tokens in arguments.tokens:
                case = Case(d, tokens, arguments.rank, getattr(torch, dtype), "cpu")
                measured = run_case(case, arguments.rounds, arguments.compile)
                records += [{"dtype": dtype, "d": d, "tokens": tokens, "rank": arguments.rank, **r} for r in measured]
                for mode in ("forward", "forward + backward"):
                    arms = {r["arm"]: r for r in measured if r["mode"] == mode}
                    rows.append(_row(f"{dtype} {d} {tokens}", mode, arms))
    calls = overhead(max(50, arguments.rounds))
    columns = ["dtype d T", "", "eager us", "ours us", "p10", "p90", "GFLOP/s", "ours / eager",
               "ours / eager + sideway", "noise"]
    if arguments.compile:
        columns += ["ours / compiled", "ours / compiled + sideway"]
    report("FFN with memory, forward and backward", columns, rows, {"records": records, "call_us": calls}, arguments.out)
    print("a call at T = 1, d = 16, in us:", ", ".join(f"{name} {value:.1f}" for name, value in calls.items()))


def _row(shape: str, mode: str, arms: dict[str, dict]) -> list:
    ours, eager = arms["ours"], arms["eager"]
    row = [shape, mode, eager["median_us"], ours["median_us"], ours["p10_us"], ours["p90_us"], ours["gflops"],
           ours["ratio_eager"], ours["ratio_eager_sideway"], arms["eager again"]["ratio_eager"]]
    for name in ("compiled", "compiled + sideway"):
        if name in arms:
            row.append(ours["median_us"] / arms[name]["median_us"])
    return row


if __name__ == "__main__":
    main()
