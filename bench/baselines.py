"""What memorizing a full window is compared with, as work on static tensors: run eagerly, or captured in a CUDA graph.

truncation     one forward of the plain host over the window, without gradient; logits of the last S tokens
sliding        one forward of the plain host over the last S tokens, on the keys and values that were kept of those before
host step      context forward into a cache, then forward and backward of the last S tokens, without a memory:
               what every method that learns from the chunk pays
Temp-LoRA      the same with a LoRA adapter on every linear layer, and AdamW's step, as often as the adapter learns a chunk
All run by transformers' own code; truncation and the host's step also with the host kernels that memorizing uses
(learning/host_kernels). They may share one host, but for Temp-LoRA, which changes it.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from locas_ext.hosts.context_cache import two_forwards
from locas_ext.hosts.registry import Host, inspect_host
from locas_ext.learning.chunk import Window, WindowReader
from locas_ext.learning.cuda_graph import capture, rehearse
from locas_ext.learning.host_kernels.kernels import HostKernels, host_kernels
from locas_ext.learning.keep import Keep
from locas_ext.learning.kept_context import KeptContext


def _frozen(model) -> Host:
    return inspect_host(model.requires_grad_(False))


def _kernels(reader: WindowReader, ids: Tensor) -> HostKernels:
    """Those of the reader's host for windows of ids [window]; ValueError where they are not all there."""
    text = torch.arange(len(ids), device=ids.device) % reader.host.vocab_size
    kernels = host_kernels(reader.host, text, len(ids) + 1)
    if isinstance(kernels, str) or not kernels.found.attentions or kernels.found.head is None:
        why = kernels if isinstance(kernels, str) else kernels.report()
        raise ValueError(f"the host kernels do not suit this host: {why}")
    return kernels


class Truncation:
    """Scores the last `stride` tokens of a window of ids [window].

    causal_flag: passes no attention mask, so that SDPA takes its causal kernel also where transformers, while a graph is
        captured, would make a mask. For hosts whose layers all attend to the whole window.
    """

    def __init__(self, model, window: int, stride: int, causal_flag: bool = False):
        self.model, self.stride = model, stride
        self.mask = {"attention_mask": {"full_attention": None}} if causal_flag else {}
        self.ids = torch.zeros(window, dtype=torch.int64, device=model.device)
        self.nll = torch.zeros((), device=model.device)

    @torch.no_grad()
    def work(self) -> None:
        logits = self.model(input_ids=self.ids[None, :-1], use_cache=False, logits_to_keep=self.stride, **self.mask).logits[0]
        targets = self.ids[-self.stride :]
        self.nll.copy_(F.cross_entropy(logits.float(), targets, reduction="sum"))


class FastTruncation:
    """As Truncation, through the host kernels."""

    def __init__(self, model, window: int, stride: int):
        self.ids = torch.zeros(window, dtype=torch.int64, device=model.device)
        self.stride = stride
        self.nll = torch.zeros((), device=model.device)
        self.kernels = _kernels(WindowReader(_frozen(model)), self.ids)

    @torch.no_grad()
    def work(self) -> None:
        self.nll.copy_(self.kernels.nll(self.kernels.behind(self.ids[:0]), self.ids[:-1], self.ids[-self.stride :]).sum())


class Sliding:
    """Scores the last `stride` tokens of windows of ids [window] that follow one another, over a kept context; eagerly."""

    def __init__(self, model, window: int, stride: int):
        self.model, self.stride = model, stride
        self.latest = torch.empty(0, dtype=torch.int64, device=model.device)
        self.ids = torch.zeros(window, dtype=torch.int64, device=model.device)
        self.nll = torch.zeros((), device=model.device)

    @torch.no_grad()
    def work(self) -> None:
        context, inputs = self.ids[:-1].split([len(self.ids) - 1 - self.stride, self.stride])
        if not torch.equal(
            self.latest[self.stride :], self.ids[: -self.stride]
        ):  # another text, whose beginning is read at once
            self.kept = KeptContext(self.model, self.model.device, len(self.ids), Keep().sinks, len(self.ids))
            self._read(context)
        self.latest = self.ids.clone()
        logits = self._read(inputs)
        self.nll.copy_(F.cross_entropy(logits.float(), self.ids[-self.stride :], reduction="sum"))

    def _read(self, inputs: Tensor) -> Tensor:
        self.kept.prepare(len(inputs))
        logits = self.kept.read(inputs)
        self.kept.keep(inputs, self.kept.left)
        return logits


class HostStep:
    """The forward and backward that learning from the last `stride` tokens of ids [window] takes, down to the embeddings."""

    def __init__(self, model, window: int, stride: int, kernels: bool = False):
        """kernels: whether the host kernels read the window"""
        self.embeddings, self.reader = model.get_input_embeddings(), WindowReader(_frozen(model))
        self.ids = torch.zeros(window, dtype=torch.int64, device=model.device)
        self.window = Window.of(self.ids, window - stride, window, window, None)
        self.nll = torch.zeros((), device=model.device)
        self.embedded: Tensor | None = None
        if kernels:
            self.reader.kernels = _kernels(self.reader, self.ids)
            self.reader.settle(self.window, window)

    def _need_gradient(self, module, inputs, output: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            self.embedded = output.requires_grad_()
        return output

    @torch.enable_grad()
    def work(self) -> None:
        hook = self.embeddings.register_forward_hook(self._need_gradient)
        try:
            loss = self.reader.loss(self.window)
        finally:
            hook.remove()
        torch.autograd.grad(loss / self.window.targets.numel(), [self.embedded])
        self.nll.copy_(loss.detach())


class TempLora:
    """Scores the last `stride` tokens of ids [window], and learns them, as evaluation/methods/temp_lora.py does.

    model: with an adapter, whose parameters these are; capturable: whether for a CUDA graph
    """

    def __init__(
        self, model, parameters: list[nn.Parameter], window: int, stride: int, capturable: bool = False, epochs: int = 2
    ):
        self.model, self.parameters, self.stride, self.epochs = model, parameters, stride, epochs
        self.ids = torch.zeros(window, dtype=torch.int64, device=model.device)
        self.nll = torch.zeros((), device=model.device)
        self.optimizer = torch.optim.AdamW(
            parameters, lr=5e-5, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, capturable=capturable
        )

    @torch.enable_grad()
    def work(self) -> None:
        context, inputs = self.ids[:-1].split([len(self.ids) - 1 - self.stride, self.stride])
        for epoch in range(self.epochs):
            logits = two_forwards(self.model, context, inputs)
            loss = F.cross_entropy(logits.float(), self.ids[-self.stride :], reduction="sum")
            if epoch == 0:
                self.nll.copy_(loss.detach())
            gradients = torch.autograd.grad(loss / self.stride, self.parameters)
            for parameter, gradient in zip(self.parameters, gradients, strict=True):
                parameter.grad = gradient
            self.optimizer.step()
            self.optimizer.zero_grad()


def eager(baseline) -> Callable[[Tensor], float]:
    """-> a function from ids [window] to their summed loss."""

    def score(ids: Tensor) -> float:
        baseline.ids.copy_(ids)
        baseline.work()
        return baseline.nll.item()

    return score


def graphed(baseline) -> Callable[[Tensor], float]:
    """As `eager`, with the work replayed from a CUDA graph."""
    device = baseline.ids.device
    rehearse(baseline.work, device)
    replay = capture(baseline.work, device)

    def score(ids: Tensor) -> float:
        baseline.ids.copy_(ids)
        replay()
        return baseline.nll.item()

    return score
