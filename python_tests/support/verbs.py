"""Random verbs: lines of Python that run in the names of a World (support/world.py), so a sequence reads as a script."""

import random
from dataclasses import dataclass

from support.hosts import TWO_LAYER

FAMILIES = ("llama", "llama", "qwen3", "phi3", "gemma", "opt", "opt", "gpt2")
DTYPES = ("torch.float32", "torch.float32", "torch.float32", "torch.bfloat16", "torch.float16", "torch.float64")
CONTEXTS = ("torch.inference_mode()", "torch.no_grad()", "default_dtype(torch.bfloat16)", "default_dtype(torch.float64)")


@dataclass(frozen=True)
class Step:
    """A line to run.

    on_host: it changes the host alone, so it also runs on the copies that say what the host is to be
    must: it may not be refused
    """

    line: str
    on_host: bool = False
    must: bool = False


def first_step(draw: random.Random) -> Step:
    return Step(f"model = host({draw.choice(FAMILIES)!r}, {draw.choice(DTYPES)})", must=True)


def next_step(world, draw: random.Random) -> Step:
    """A verb that makes sense where the world stands, now and then one that does not."""
    life = world.life
    if life.memory is None:
        return draw.choices(*zip(*WITHOUT_MEMORY, strict=True))[0](world, draw)
    step = draw.choices(*zip(*WITH_MEMORY, strict=True))[0](world, draw)
    if not step.on_host and draw.random() < 0.15:
        inner = step.line.replace("\n", "\n    ")
        return Step(f"with {draw.choice(CONTEXTS)}:\n    {inner}", must=step.must)
    return step


def _ids(draw: random.Random, low: int, high: int) -> str:
    outside = ", vocab=61" if draw.random() < 0.1 else ""
    return f"ids({draw.randint(low, high)}, seed={draw.randrange(5)}{outside})"


# ---- without a memory ------------------------------------------------------------------------------------------
def attach(world, draw):
    two_layer = world.life.family in TWO_LAYER
    variant = "mlp" if two_layer or draw.random() < 0.2 else "glu"
    backend = draw.choice(["auto"] * 6 + ["matmul", "reference", "fused"])
    layers = draw.choice(["None", "None", "None", "[0]", "[-1]", "[1, 0]"])
    init = draw.choice(["topk", "topk", "bottomk", "random", "gaussian", "activation"])
    scale = draw.choice(["'host'", "'paper'", "'16x'", "0.5", "-0.3"])
    rehome = variant == "glu" and draw.random() < 0.3
    config = f"{variant!r}, rank={draw.choice([1, 3, 4, 8])}, layers={layers}, init={init!r}, scale={scale}"
    config += f", clip={draw.random() < 0.8}, backend={backend!r}, seed={draw.randrange(3)}"
    return Step(f"memory = locas.attach(model, locas.LocasConfig({config}), rehome={rehome})")


def attach_saved(world, draw):
    if not world.saved:
        return attach(world, draw)
    return Step(f"memory = locas.load(model, folder / {draw.choice(world.saved)!r}, rehome={draw.random() < 0.2})")


def unmerge(world, draw):
    return Step("model = locas.unmerge(model)", must=bool(world.life.unmerged))


def verb_of_a_detached(world, draw):
    verb = draw.choice(["memorize(ids(9), progress=False)", "detach()", "merge_and_unload()", "reset()", "status()", "fork()"])
    return Step(f"old.{verb}") if world.names.get("old") is not None else attach(world, draw)


# ---- learning --------------------------------------------------------------------------------------------------
def memorize(world, draw):
    window = draw.choice([8, 16, 24, 32])
    stride = draw.choice([stride for stride in (3, 4, 8, 16) if stride <= window])
    settings = [f"window={window}, stride={stride}, progress=False"]
    if draw.random() < (0.4 if world.life.memory.config.variant == "mlp" else 0.05):
        when_full = draw.choice(["'compress'", "'drop_oldest'", "'error'", "None"])
        capacity = draw.choice(["None", "24", "40", "200"])
        settings.append(f"update=locas.Write(epsilon=0.05, capacity={capacity}, when_full={when_full})")
    else:
        settings.append(f"learning_rate={draw.choice([1e-2, 5e-2, 0.0])}, epochs={draw.choice([1, 1, 2])}")
        settings.append(f"optimizer={draw.choice(['adamw', 'adamw', 'sgd', 'shampoo'])!r}")
    for option in ("context_gradient=True", "bos=True", "title='a text'"):
        if draw.random() < 0.15:
            settings.append(option)
    if draw.random() < 0.3:
        error = draw.choice(["Stop", "KeyboardInterrupt"])
        settings.append(f"callback=stop_after({draw.randint(1, 3)}, {error})")
    return Step(f"memory.memorize({_ids(draw, 2, 40)}, {', '.join(settings)})")


def resume(world, draw):
    runs = [name for name in world.saved if world.runs.get(name)]
    if not runs:
        return save(world, draw)
    name = draw.choice(runs)
    line = world.runs[name]
    begin = line.index("callback=") if "callback=" in line else len(line) - 1
    return Step(f"{line[:begin].rstrip(', ')}, resume=folder / {name!r})")


def feed(world, draw):
    return Step(f"memory.feed({_ids(draw, 1, 20)}, progress=False)")


def write(world, draw):
    tokens = draw.choice(["'all'", "'all'", "locas.TopLoss(3)", "locas.LossAbove(2.0)", "[1, 2]"])
    full = draw.choice(["", "", ", capacity=12, when_full='drop_oldest'", ", capacity=20, compress_to=4", ", exact=True"])
    return Step(f"memory.write({_ids(draw, 2, 14)}, tokens={tokens}{full})")


def initialize(world, draw):
    return Step(f"memory.initialize({_ids(draw, 1, 40)})")


def compress(world, draw):
    return Step(f"memory.compress({draw.choice([1, 3, 8, 33])})")


def reset(world, draw):
    return Step("memory.reset()", must=True)


def inside_disabled(world, draw):
    step = draw.choice([memorize, feed, write, save, take_snapshot, reset, restore, fork])(world, draw)
    return Step(f"with memory.disabled():\n    {step.line}")


# ---- changes from outside --------------------------------------------------------------------------------------
def outside_step(world, draw):
    optimizer = draw.choice(
        [
            "torch.optim.AdamW(memory.parameters(), lr=1e-2)",
            "torch.optim.AdamW(memory.parameters(), lr=1e-2, fused=True)",
            "torch.optim.SGD(memory.parameters(), lr=1e-1)",
            "locas.SlotAdamW(memory, lr=1e-2)",
            "locas.SlotSGD(memory, lr=1e-1, momentum=0.5)",
        ]
    )
    return Step(f"train(model, memory, {optimizer})")


def outside_write(world, draw):
    changes = [
        "memory.slots[0].mul_(0.5)",
        "memory.parameters()[0].data.add_(0.01)",
        "memory.parameters()[-1].data = memory.parameters()[-1].data * 0.75",
        "memory.slots.numpy()[...] *= 0.9",
        "memory.parameters()[0].requires_grad_(False)",
        "memory.parameters()[0].requires_grad_(True)",
    ]
    return Step(f"with torch.no_grad():\n    {draw.choice(changes)}")


def convert(world, draw):
    if world.shared():
        return take_snapshot(world, draw)
    fused = world.life.memory.config.backend == "fused"  # asked for by name, it refuses a dtype that it has no kernels for
    dtype = draw.choice(DTYPES[2:4] if fused else DTYPES[2:])
    return Step(f"model.to({dtype})", on_host=True, must=True)


def resize(world, draw):
    if world.shared():
        return take_snapshot(world, draw)
    size = draw.choice([50, 61, 70])
    return Step(f"torch.manual_seed(0)\nmodel.resize_token_embeddings({size}, mean_resizing=False)", on_host=True, must=True)


def thaw(world, draw):
    if world.shared():
        return take_snapshot(world, draw)
    line = f"list(model.parameters())[{draw.randrange(6)}].requires_grad_(True)"
    return Step(line, on_host=True, must=True)


def freeze(world, draw):
    if world.shared() or world.life.memory is not None:
        return take_snapshot(world, draw) if world.life.memory is not None else attach(world, draw)
    return Step(f"list(model.parameters())[{draw.randrange(6)}].requires_grad_(False)", on_host=True, must=True)


def change_mode(world, draw):
    return Step(draw.choice(["model.train()", "model.eval()"]), on_host=True, must=True)


# ---- keeping ---------------------------------------------------------------------------------------------------
def save(world, draw):
    name = draw.choice("abc")
    return Step(f"memory.save_pretrained(folder / {name!r}, optimizer={draw.random() < 0.6})", must=True)


def load(world, draw):
    if not world.saved:
        return save(world, draw)
    return Step(f"memory.load(folder / {draw.choice(world.saved)!r})")


def take_snapshot(world, draw):
    return Step("snapshots.append(memory.snapshot())", must=True)


def restore(world, draw):
    if not world.names["snapshots"]:
        return take_snapshot(world, draw)
    return Step(f"memory.restore(snapshots[{draw.randrange(len(world.names['snapshots']))}])")


def fork(world, draw):
    return Step("other = memory.fork()", must=True)


def deepcopy(world, draw):
    return Step("other = locas.memory_of(copy.deepcopy(model))", must=True)


def swap(world, draw):
    return Step("swap()", must=True) if len(world.lives) > 1 else fork(world, draw)


# ---- ending ----------------------------------------------------------------------------------------------------
def detach(world, draw):
    return Step("memory.detach()", must=True)


def merge(world, draw):
    return Step(f"model = memory.merge_and_unload({draw.choice(['', '8', '1'])})")


WITHOUT_MEMORY = [(attach, 8), (attach_saved, 3), (unmerge, 3), (verb_of_a_detached, 1), (freeze, 1), (change_mode, 1)]
WITH_MEMORY = [
    *[(memorize, 9), (resume, 3), (feed, 4), (write, 3), (initialize, 2), (compress, 1), (reset, 1), (inside_disabled, 2)],
    *[(outside_step, 3), (outside_write, 3), (convert, 2), (resize, 1), (thaw, 1), (freeze, 1), (change_mode, 1)],
    *[(save, 5), (load, 3), (take_snapshot, 2), (restore, 3), (fork, 1), (deepcopy, 1), (swap, 1)],
    *[(detach, 2), (merge, 2)],
]
