"""A host and its memories through a sequence of verbs (support/verbs.py), and what must hold after each of them."""

import copy
import json
import linecache
import random
import traceback
import warnings
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

import locas_ext as locas
from support.helpers import assert_same_host, logits_of, random_ids, snapshot
from support.hosts import tiny
from support.interrupting import Stop, stop_after
from support.memory_reference import assert_outputs_are_the_formula
from support.torch_settings import setting
from support.verbs import Step, first_step, next_step

IDS = random_ids(10, seed=7, vocab=40)
ALONE = {"gpt2": dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0), "opt": dict(dropout=0.0)}
REFUSALS = (ValueError, TypeError, RuntimeError, OSError)
PACKAGE = str(Path(locas.__file__).parent)


class Wrong(AssertionError):
    """Something that must hold does not."""


@dataclass
class Life:
    """A model, its memory, and a copy of the host that no memory was ever attached to."""

    model: Any
    family: str
    twin: Any
    memory: Any = None
    unmerged: list = field(default_factory=list)  # twins from before each merge
    shares: bool = False  # whether its weights are another life's too
    kept: Any = None  # what it was when another life took its place

    def hosts(self):
        return [self.model, self.twin, *self.unmerged]


@lru_cache
def _template(family):
    return tiny(family, **ALONE.get(family, {}))


def default_dtype(dtype):
    return setting(torch.set_default_dtype, dtype, torch.get_default_dtype())


def train(model, memory, optimizer):
    """A step of somebody else's training loop."""
    with torch.inference_mode(False), torch.enable_grad():
        optimizer.zero_grad()
        loss = model(input_ids=IDS[None], labels=IDS[None]).loss
        if loss.requires_grad:
            loss.backward()
        optimizer.step()
        model.zero_grad()


def bits(tensors):
    return {name: tensor.clone() for name, tensor in tensors.items()}


def facts(memory):
    """All that a refused verb must leave alone."""
    state, attachment = memory.state, memory._attachment
    stream = attachment.stream
    return {
        "version": state.version,
        "slots used": state.used,
        "capacity": state.capacity,
        "tensors": bits(state.tensors()),
        "compute copy": {str(k): arena.compute.clone() for k, arena in enumerate(state.arenas)},
        "place in the text": None if stream is None else stream.to_dict(),
        "texts": list(attachment.texts),
        "attached": attachment.attached,
        "requires_grad": [p.requires_grad for arena in state.arenas for p in arena.parameters],
        "disabled": state.disabled,
    }


def same(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num())
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return a == b


def require(condition, what):
    if not condition:
        raise Wrong(what)


class World:
    """Runs steps and checks after each; `log` is what was run, `tally` how often a verb was done or refused."""

    def __init__(self, folder: Path):
        self.folder, self.lives, self.log = Path(folder), [], []
        self.saved, self.runs, self.tally = [], {}, {}
        self.names = {
            **dict(torch=torch, locas=locas, copy=copy, Stop=Stop, stop_after=stop_after, train=train),
            **dict(default_dtype=default_dtype, folder=self.folder, snapshots=[], host=self._host, swap=self._swap),
            "ids": lambda n, seed=0, vocab=40: random_ids(n, seed, vocab),
        }
        self.last_run = None

    @property
    def life(self) -> Life:
        return self.lives[0]

    def shared(self) -> bool:
        return any(life.shares for life in self.lives)

    # ---- what the lines call ---------------------------------------------------------------------------------
    def _host(self, family, dtype):
        model = copy.deepcopy(_template(family)).to(dtype)
        self.lives = [Life(model, family, copy.deepcopy(model))]
        return model

    def _swap(self):
        self.lives.append(self.lives.pop(0))
        self.lives[-1].kept = self._kept(self.lives[-1])
        self.names.update(model=self.life.model, memory=self.life.memory)

    def _kept(self, life):
        return facts(life.memory) if life.memory is not None else None, logits_of(life.model, IDS)

    # ---- one step --------------------------------------------------------------------------------------------
    def run(self, step: Step, thorough: bool) -> None:
        self.log.append(step.line)
        memory = self.life.memory if self.lives else None
        before = None if memory is None else facts(memory)
        verb = step.line.split("\n")[-1].strip().split("(")[0]
        done = self._execute(step)
        count = self.tally.setdefault(verb, [0, 0])
        count[0 if done else 1] += 1
        if done is False and memory is not None:
            now = facts(memory)
            for name in before:
                require(same(before[name], now[name]), f"a refused verb changed: {name}")
        if done is True:
            self._follow(step)
        self._check(step, thorough)

    def _execute(self, step):
        """True where the line ran, False where it was refused, None where its callback ended it."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                exec(step.line, self.names)
                if step.on_host:
                    for other in self.life.hosts()[1:]:
                        exec(step.line, {**self.names, "model": other})
        except (Stop, KeyboardInterrupt):
            self.last_run = step.line
            return None
        except REFUSALS as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            ours = frame.filename.startswith(PACKAGE) and "raise" in linecache.getline(frame.filename, frame.lineno)
            if step.must or not ours or len(str(error)) < 10:
                raise Wrong(f"{type(error).__name__}: {error}") from error
            frames = traceback.extract_tb(error.__traceback__)
            return None if any(each.name == "go" for each in frames) else False  # a run ends with what it has learned
        except Exception as error:
            raise Wrong(f"{type(error).__name__}: {error}") from error
        return True

    def _follow(self, step):
        """Brings what is expected up to what was done."""
        life, names, line = self.life, self.names, step.line
        if "locas.attach(" in line or "locas.load(" in line:
            life.memory = names["memory"]
        elif "memory.detach(" in line:
            names["old"], names["memory"], life.memory = life.memory, None, None
        elif "merge_and_unload(" in line and "old." not in line:
            self._follow_merge(life)
        elif "locas.unmerge(" in line:
            life.twin = life.unmerged.pop(0)
            life.unmerged.clear()
        elif "other = " in line:
            memory = names["other"]
            other = Life(memory.model, life.family, copy.deepcopy(life.twin), memory, copy.deepcopy(life.unmerged))
            if "fork" in line:
                other.shares = life.shares = True
            require(same(facts(memory)["tensors"], facts(life.memory)["tensors"]), "the copy holds other tensors")
            other.kept = self._kept(other)
            self.lives.append(other)
        elif "memory.memorize(" in line:
            self.last_run = line
        if "save_pretrained(" in line:
            self._follow_save(line)

    def _follow_merge(self, life):
        memory, names = life.memory, self.names
        assert_outputs_are_the_formula(life.model, life.twin, memory, logits_of(life.model, IDS), IDS, merged=True)
        life.unmerged.append(life.twin)
        before = snapshot(life.twin)
        assert_same_host(
            life.model, before, what=("training", "forwards", "hooks", *([] if self.shared() else ["requires_grad"]))
        )
        names["old"], names["memory"], life.memory = memory, None, None
        life.twin = copy.deepcopy(life.model)

    def _follow_save(self, line):
        name = line.split("folder / ")[-1][1]
        if name not in self.saved:
            self.saved.append(name)
        inner = next(part for part in line.split("\n") if "save_pretrained" in part)
        stream = self.life.memory._attachment.stream
        self.runs[name] = None
        if "optimizer=True" in inner and stream is not None and self.last_run:
            run = self.last_run.split("\n")[-1].strip()
            self.runs[name] = run if "resume=" not in run else None
        self._check_file(self.folder / name)

    # ---- what must hold --------------------------------------------------------------------------------------
    def _check(self, step, thorough):
        life = self.life
        require(torch.get_default_dtype() == torch.float32 and torch.is_grad_enabled(), "torch's settings changed")
        before = snapshot(life.twin)
        if life.memory is None:
            if not self.shared():
                assert_same_host(life.model, before)
            require(torch.equal(logits_of(life.model, IDS), logits_of(life.twin, IDS)), "without a memory: not the host")
        else:
            assert_same_host(life.model, before, what=("state", "gradients", "training", "config"))
            self._check_memory(life, thorough)
        for other in self.lives[1:] if thorough else ():
            require(same(dict(enumerate(other.kept)), dict(enumerate(self._kept(other)))), "another memory changed")

    def _check_memory(self, life, thorough):
        model, memory = life.model, life.memory
        logits, alone = logits_of(model, IDS), logits_of(life.twin, IDS)
        with memory.disabled():
            require(torch.equal(logits_of(model, IDS), alone), "disabled(): not the host")
        if memory.version == 0:
            require(torch.equal(logits, alone), "version 0: not the host")
        elif thorough:
            assert_outputs_are_the_formula(model, life.twin, memory, logits, IDS)
        statuses, state = memory.status(), memory.state
        require(all(status.slots_used == state.used for status in statuses), "status() tells other slots used")
        require(all(status.capacity == state.capacity for status in statuses), "status() tells another capacity")
        require(tuple(status.layer for status in statuses) == memory.layers, "status() tells other layers")
        require(memory.version == state.version and f"version {memory.version}," in repr(memory), "another version")
        require(memory.tokens_seen == 0 or memory.texts, "tokens were seen of no text")
        dtype = next(model.parameters()).dtype
        require(all(arena.slots.dtype == torch.float32 for arena in state.arenas), f"slots are not float32 on a {dtype} host")

    def _check_file(self, path):
        """What was saved loads into a fresh host, and is this memory."""
        life, memory = self.life, self.life.memory
        fresh = copy.deepcopy(life.twin)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = locas.load(fresh, path)
        mine, its = memory.state.tensors(optimizer=False), loaded.state.tensors(optimizer=False)
        require(same(mine, its), "the file holds other slots")
        record = json.loads((path / "locas_config.json").read_text())
        told = (memory.version, memory.tokens_seen, memory.texts, memory.state.used, memory.layers)
        read = (loaded.version, loaded.tokens_seen, loaded.texts, loaded.state.used, loaded.layers)
        if record["stream"] is None:
            told, read = (told[0], *told[2:]), (read[0], *read[2:])
            require(record["tokens_seen"] == memory.tokens_seen, "the file tells other tokens seen")
        require(told == read, f"the file says {read}, the memory {told}")
        if memory.version and not memory.state.disabled:
            assert_outputs_are_the_formula(fresh, life.twin, loaded, logits_of(fresh, IDS), IDS)


def run_sequence(seed: int, folder: Path, steps: int = 14) -> World:
    """One random sequence; Wrong, with the lines so far in `.world.log`, if something does not hold."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    world = World(folder)
    try:
        world.run(first_step(draw), False)
        for _ in range(steps):
            world.run(next_step(world, draw), draw.random() < 0.3)
    except Exception as error:
        error.world = world
        raise
    return world
