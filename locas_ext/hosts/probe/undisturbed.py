"""A host runs for inspection and does not notice."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

# Buffers up to this many numbers are put back: frequencies and counters, not quantized weights.
_SMALL = 1 << 16


class _ModuleState:
    """What a forward may change about one module besides its parameters: mode, attributes, small buffers."""

    def __init__(self, module: nn.Module):
        self.module, self.attributes, self.buffers = module, dict(module.__dict__), dict(module._buffers)
        self.contents = {
            name: buffer.clone()
            for name, buffer in self.buffers.items()
            if buffer is not None and not buffer.is_meta and buffer.numel() <= _SMALL
        }

    def restore(self) -> None:
        attributes = self.module.__dict__
        for name in attributes.keys() - self.attributes.keys():
            del attributes[name]
        attributes.update(self.attributes)
        self.module._buffers.clear()
        self.module._buffers.update(self.buffers)
        for name, content in self.contents.items():
            buffer = self.buffers[name]
            if buffer is not None and not torch.equal(buffer, content):
                buffer.copy_(content)


class _GeneratorStates:
    """torch's random generators of the CPU and of the CUDA devices that a model lies on."""

    def __init__(self, model: nn.Module):
        self.devices = {parameter.device for parameter in model.parameters() if parameter.is_cuda}
        self.before = self._states()

    def _states(self) -> list[Tensor]:
        return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in self.devices)]

    def restore(self) -> None:
        """Only what was drawn from: another thread may be using the others."""
        cpu, *cuda = [
            None if torch.equal(now, before) else before for now, before in zip(self._states(), self.before, strict=True)
        ]
        if cpu is not None:
            torch.set_rng_state(cpu)
        for device, state in zip(self.devices, cuda, strict=True):
            if state is not None:
                torch.cuda.set_rng_state(state, device)


def _is_compiled(module: nn.Module) -> bool:
    return module._compiled_call_impl is not None or hasattr(module, "_orig_mod")


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Inside, a model can run without a trace: evaluation mode, no gradients, nothing compiled anew; then all is as before."""
    modules = list(model.modules())
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        if any(map(_is_compiled, modules)):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        generators = _GeneratorStates(model)
        states = [_ModuleState(module) for module in modules]
        try:
            for module in modules:
                module.training = False
            yield
        finally:
            for state in states:
                state.restore()
            generators.restore()
