"""Online memorization: score a chunk, learn from it, go on (docs/method.md, "The online protocol").

A chunk's loss (chunk.py) is computed once: it is reported, then learned from by backpropagation (step.py; graph_step.py
on CUDA) or written in closed form (write.py).
"""

import hashlib
import math
import numbers
import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from . import checkpoint
from .chunk import Window, may_end_early
from .errors import LocasError
from .fast_norms import fast_norms
from .graph_step import MemorizeStep
from .initialization import initial_rows
from .ops import token_nll
from .optim import OPTIMIZERS
from .patch import Attachment
from .progress import StreamProgress
from .slots import MemoryState
from .step import check_loss
from .stream import Chunk, MemorizeReport, Stream
from .write import WriteReport, WriteStep, write_tokens
from .write_settings import WriteSettings, check_fits, resolve


@dataclass(frozen=True)
class Settings:
    """The arguments of `Memory.memorize` that decide what is learned."""

    window: int | None = None
    stride: int | None = None
    learning_rate: float = 4e-3
    epochs: int = 1
    optimizer: str = "adamw"
    update: str = "backprop"
    context_gradient: bool = False
    bos: bool = False
    write: WriteSettings | None = None  # with update="write"


# ---- arguments ------------------------------------------------------------------------------------------------
def token_ids(input_ids, vocab_size: int, at_least: int) -> Tensor:
    """[n] int64 on the CPU from a list or an integer tensor [n] or [1, n]; ValueError or TypeError names what is off."""
    if not isinstance(input_ids, Tensor):
        try:
            input_ids = torch.tensor(input_ids)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"input_ids: expected a tensor or list of token ids ({error})") from None
        if input_ids.numel() == 0:
            input_ids = input_ids.long()
    if input_ids.is_floating_point() or input_ids.is_complex() or input_ids.dtype == torch.bool:
        raise TypeError(f"input_ids is {input_ids.dtype}; expected integers")
    if input_ids.dim() == 2 and input_ids.shape[0] == 1:
        input_ids = input_ids[0]
    if input_ids.dim() != 1:
        raise ValueError(f"input_ids has shape {list(input_ids.shape)}; expected [n] or [1, n]")
    if input_ids.numel() < at_least:
        raise ValueError(f"input_ids holds {input_ids.numel()} tokens; expected at least {at_least}")
    with torch.inference_mode(False):
        ids = input_ids.detach().to("cpu", torch.int64, copy=True)
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"input_ids holds token {low if low < 0 else high}; expected ids from 0 to {vocab_size - 1}, "
            "the host's vocabulary"
        )
    return ids


def _integer(name: str, value, low: int, high: float, why: str = "") -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} is {value!r}; expected an integer")
    if not low <= value <= high:
        limit = f">= {low}" if high == math.inf else f"from {low} to {int(high)}"
        raise ValueError(f"{name} is {value}; expected an integer {limit}{why}")
    return int(value)


UPDATES = ("backprop", "write")


def resolve_settings(settings: Settings, host, state: MemoryState, resumed: Stream | None = None) -> Settings:
    """The settings with what is None filled in; ValueError or TypeError for one out of range.

    resumed: where the run that is taken up again stood; what it filled in holds for the rest too.
    """
    positions = host.max_positions
    window = min(2048, positions) if settings.window is None else settings.window
    window = _integer("window", window, 2, positions, " (the host's positions)")
    stride = max(1, window // 4) if settings.stride is None else settings.stride
    if settings.bos:
        stride = _integer("stride", stride, 1, window - 1, " (the window without its BOS token)")
    else:
        stride = _integer("stride", stride, 1, window, " (the window)")
    epochs = _integer("epochs", settings.epochs, 1, math.inf)
    rate = settings.learning_rate
    if isinstance(rate, bool) or not isinstance(rate, numbers.Real):
        raise TypeError(f"learning_rate is {rate!r}; expected a number >= 0")
    if not (0.0 <= rate < math.inf):
        raise ValueError(f"learning_rate is {rate}; expected a finite number >= 0")
    if settings.optimizer not in tuple(OPTIMIZERS):
        raise ValueError(f"optimizer is {settings.optimizer!r}; expected one of {', '.join(OPTIMIZERS)}")
    if settings.update not in UPDATES:
        raise ValueError(f"update is {settings.update!r}; expected one of {', '.join(UPDATES)}")
    if settings.bos and bos_token(host) is None:
        raise ValueError("bos is True, but the host's config has no bos_token_id")
    return Settings(
        window, stride, float(rate), epochs, settings.optimizer, settings.update, bool(settings.context_gradient),
        bool(settings.bos), _resolve_writing(settings, state, stride, resumed),
    )


def _resolve_writing(settings: Settings, state: MemoryState, stride: int, resumed: Stream | None) -> WriteSettings | None:
    """The settings of update="write", None for "backprop"; by default an expansion-compression cycle (docs/method.md)."""
    write = settings.write or WriteSettings()
    if settings.update != "write":
        unused = [name for name, value in asdict(write).items() if value != getattr(WriteSettings(), name)]
        if unused:
            raise ValueError(f"{unused[0]} is given, but update is {settings.update!r}; expected update='write'")
        return None
    if not state.grows:
        raise ValueError(
            "update is 'write', but the variant is 'glu'; only a Locas-MLP memory (variant='mlp') can be written"
        )
    if settings.epochs != 1:
        raise ValueError(f"epochs is {settings.epochs}, but update is 'write', which writes each token once; expected 1")
    if write.when_full is None:
        write = replace(write, when_full="compress")
    used = state.used if resumed is None else 0  # the resumed memory is loaded later, and fits what it was made with
    if write.capacity is None and write.when_full != "error":
        before = (resumed.settings.get("write") or {}).get("capacity") if resumed is not None else None
        write = replace(write, capacity=before or used + 2 * max(stride, state.rank))
    write = resolve(write, state.hidden_size, used, None)
    if write.when_full != "error":
        check_fits(min(stride, write.tokens) if isinstance(write.tokens, int) else stride, write)
    return write


def bos_token(host) -> int | None:
    return getattr(host.config, "bos_token_id", None)


def text_digest(ids: Tensor) -> str:
    return hashlib.sha256(ids.numpy().tobytes()).hexdigest()


# ---- initialization -------------------------------------------------------------------------------------------
@contextmanager
def _observe(attachment: Attachment, rows: list):
    """Collects each layer's initial rows during one forward."""
    generator = torch.Generator().manual_seed(attachment.config.seed)

    def observer(ffn):
        def observe(x: Tensor) -> None:
            x = x.detach().reshape(-1, x.shape[-1])
            rows.append(initial_rows(attachment.config, ffn.importance(x), ffn.host_rows(x), x, generator))

        return observe

    try:
        for ffn in attachment.ffns:
            ffn.observer = observer(ffn)
        yield
    finally:
        for ffn in attachment.ffns:
            ffn.observer = None


def _initialize_from(attachment: Attachment, ids: Tensor, forward: Callable[[Tensor], Tensor]) -> Tensor:
    """Runs `forward` over ids [1, n] through the host alone, sets the slots from what it saw, returns its result."""
    state, rows = attachment.state, []
    device = attachment.host.input_device()
    state.disabled += 1
    try:
        with _observe(attachment, rows), torch.no_grad():
            result = forward(ids.to(device)[None])
    finally:
        state.disabled -= 1
    first = state.arenas[0].slots
    slots = first.new_zeros(len(state.layers), state.planes, state.rank, state.hidden_size)
    for index, planes in enumerate(rows):
        for plane, values in enumerate(planes):
            slots[index, plane] = values
    if not torch.isfinite(slots).all():
        raise LocasError("the host's activations on this text are not finite; the memory was not initialized")
    state.set_slots(slots, version=0)
    return result


def initialize(attachment: Attachment, input_ids) -> None:
    """See `Memory.initialize`."""
    host = attachment.host
    ids = token_ids(input_ids, host.vocab_size, at_least=1)
    if len(ids) > host.max_positions:
        raise ValueError(f"input_ids holds {len(ids)} tokens; expected at most {host.max_positions}, the host's positions")
    with _quiet_host(host.model), torch.inference_mode(False):
        _initialize_from(attachment, ids, lambda x: host.model.base_model(input_ids=x, use_cache=False))
    attachment.stream = None


def _score_and_initialize(attachment: Attachment, window: Window) -> Tensor:
    """The first chunk: scored by the host, which also shows which neurons it uses. Returns the summed NLL."""

    def forward(x: Tensor) -> Tensor:
        logits = attachment.host.model(input_ids=x, use_cache=False).logits[0, -len(window.targets) - 1 : -1]
        return token_nll(logits, window.targets.to(logits.device)).sum()

    return _initialize_from(attachment, torch.cat([window.context, window.inputs, window.targets[-1:]]), forward)


def write(attachment: Attachment, input_ids, settings: WriteSettings, exact: bool) -> WriteReport:
    """See `Memory.write`."""
    host = attachment.host
    ids = token_ids(input_ids, host.vocab_size, at_least=2)
    if len(ids) > host.max_positions:
        raise ValueError(
            f"input_ids holds {len(ids)} tokens; expected at most {host.max_positions}, the host's positions: a longer text is "
            "for memorize(update='write')"
        )
    with _interrupt_between_chunks() as check_interrupt, _quiet_host(host.model), torch.inference_mode(False), \
            torch.enable_grad():
        report = write_tokens(attachment, ids, settings, exact)
        check_interrupt()
        return report


# ---- the whole text -------------------------------------------------------------------------------------------
@contextmanager
def _quiet_host(model):
    """Evaluation mode, dropout off; every module's own mode is restored."""
    training = [module for module in model.modules() if module.training]
    try:
        if training:
            model.eval()
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _interrupt_between_chunks():
    """Yields a function that raises KeyboardInterrupt if Ctrl-C was pressed since.

    Within a chunk Ctrl-C only takes note, so that memory and place in the text never part.

    Where Ctrl-C does not mean KeyboardInterrupt here (another thread, a handler of the caller's), nothing changes.
    """
    mine = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )
    pressed = False

    def handler(signum, frame):
        nonlocal pressed
        if not pressed:
            os.write(2, b"\nstopping after this chunk\n")  # print() may not be called from a signal handler
        pressed = True

    def check():
        if pressed:
            raise KeyboardInterrupt

    if mine:
        signal.signal(signal.SIGINT, handler)
    try:
        yield check
    finally:
        if mine:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _saved_stream(resume: str | Path) -> Stream:
    stream = checkpoint.read_stream(resume)
    if stream is None:
        raise LocasError(
            f"{resume} holds no place to resume from; it must be saved with save_pretrained(path, optimizer=True) "
            "after a memorize() call"
        )
    return stream


def _take_up(attachment: Attachment, ids: Tensor, settings: Settings, resume: str | Path, stream: Stream) -> None:
    """Loads the memory of a saved run; ValueError if that was not over this text with these settings."""
    # layers are checked by load(); the backend may be another one, as on another machine
    configs = [config.to_dict() for config in (checkpoint.read_config(resume), attachment.config)]
    before, wanted = ({**config, "layers": None, "backend": None, **run}
                      for config, run in zip(configs, (stream.settings, asdict(settings))))
    different = [name for name in wanted if before.get(name) != wanted[name]]
    if different:
        details = ", ".join(f"{name} was {before.get(name)!r}, is {wanted[name]!r}" for name in different)
        raise ValueError(f"resume: {Path(resume)} was saved by a run with other settings: {details}")
    if stream.position > len(ids) or text_digest(ids[: stream.position]) != stream.text_digest:
        raise ValueError(f"resume: {Path(resume)} was saved by a run over another text")
    checkpoint.load(attachment, resume)


def memorize(
    attachment: Attachment,
    input_ids,
    settings: Settings,
    progress: bool = True,
    callback: Callable[[Chunk], None] | None = None,
    resume: str | Path | None = None,
) -> MemorizeReport:
    """See `Memory.memorize`."""
    host, state, config = attachment.host, attachment.state, attachment.config
    if not attachment.attached:
        raise ValueError("memorize: this memory is no longer attached to its model")
    resumed = None if resume is None else _saved_stream(resume)
    settings = resolve_settings(settings, host, state, resumed)
    ids = token_ids(input_ids, host.vocab_size, at_least=2)
    first_chunk = min(settings.stride, len(ids))
    writes = settings.update == "write"
    if not writes and config.init == "activation" and not state.initialized and resume is None and config.rank > first_chunk:
        raise ValueError(
            f"init='activation' takes one token a slot: rank is {config.rank}, but the first chunk has "
            f"{first_chunk} tokens; use a stride of at least the rank"
        )
    if resumed is not None:
        _take_up(attachment, ids, settings, resume, resumed)
    stream = resumed or Stream(asdict(settings), 0, text_digest(ids[:0]), [])
    if writes and (settings.write.capacity or 0) > state.capacity:
        state.resize(settings.write.capacity)
    report = MemorizeReport(chunks=list(stream.chunks))
    hasher = hashlib.sha256(ids[: stream.position].numpy().tobytes())
    bos = bos_token(host) if settings.bos else None
    step = (WriteStep if writes else MemorizeStep)(attachment, settings, may_end_early(host.model))
    started = time.perf_counter()

    state.zero_grad()
    bar = StreamProgress(len(ids), stream.position, report) if progress else nullcontext()
    with bar, _interrupt_between_chunks() as check_interrupt, _quiet_host(host.model), \
            fast_norms(host.model), torch.inference_mode(False), torch.enable_grad():
        for start in range(stream.position, len(ids), settings.stride):
            end = min(start + settings.stride, len(ids))
            place = f"chunk {len(report.chunks)} (tokens {start} to {end - 1})"
            if end == 1:  # a text's first token alone: nothing to score
                hasher.update(ids[:1].numpy().tobytes())
                continue
            version = state.version
            window = Window.of(ids, start, end, settings.window, bos)
            nll = None
            if not (state.initialized or writes):
                nll = _score_and_initialize(attachment, window).item()
                check_loss(nll, state, place)
            for _ in range(settings.epochs):
                loss = step(window, place)
                nll = loss if nll is None else nll
            chunk = Chunk(start, end, len(window.targets), nll, version)
            report.chunks.append(chunk)
            hasher.update(ids[start:end].numpy().tobytes())
            attachment.stream = Stream(asdict(settings), end, hasher.hexdigest(), list(report.chunks))
            report.seconds, report.cuda_graph = time.perf_counter() - started, step.report()
            if progress:
                bar.advance(end)
            if callback is not None:
                callback(chunk)
            check_interrupt()
    report.seconds = time.perf_counter() - started
    return report
