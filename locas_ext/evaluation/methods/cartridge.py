"""Cartridges (arXiv 2506.06266), the peer that studies: keys and values of some tokens before everything, trained.

The parameters, their beginning (the keys and values of the text's first tokens) and the first token that stays as it is are
peft's `CartridgeConfig`. Taken from `Memory.study`, so that the two compare: questions, targets, loss, guard, and the number
and schedule of updates. AdamW without weight decay; the default learning rate is that of the public code, 2e-2
(github.com/HazyResearch/cartridges, examples/arxiv/arxiv_train.py).
"""

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from locas_ext.config import LocasConfig
from locas_ext.errors import LocasError
from locas_ext.evaluation.arguments import needs_extra
from locas_ext.hosts.cache_names import cache_argument, given_cache
from locas_ext.hosts.context_cache import holds_keys_and_values_only
from locas_ext.hosts.registry import inspect_host
from locas_ext.hosts.text_config import max_positions
from locas_ext.learning.protocol import Protocol
from locas_ext.learning.run_guards import interrupt_between_chunks, quiet_host
from locas_ext.learning.study.learner import Learner, Material, Progress
from locas_ext.learning.study.prompts import Prompter
from locas_ext.learning.study.settings import LEARNED
from locas_ext.learning.study.study import Study, timed
from locas_ext.memory import StudyReport, StudySettings
from locas_ext.patching.attachment import Attachment

_FIRST_VERSION = "0.19"  # of peft that has cartridges


def require_cartridge() -> None:
    """LocasError, naming what to install, if there is no peft or one without cartridges."""
    try:
        import peft
    except ImportError as error:
        raise needs_extra("cartridge", f"peft >= {_FIRST_VERSION}", error) from None
    if not hasattr(peft, "CartridgeConfig"):
        raise LocasError(
            f"cartridge needs peft >= {_FIRST_VERSION}, but {peft.__version__} is installed: "
            f"pip install 'peft>={_FIRST_VERSION}'"
        )


def check_cartridge(model: Any, tokens: int, protocol: Protocol) -> None:
    """LocasError for a host or a peft that cannot, ValueError where a window does not fit behind the cartridge."""
    require_cartridge()
    if not holds_keys_and_values_only(model):
        raise LocasError(f"cartridge: {type(model).__name__} keeps more of a text than keys and values")
    if tokens + protocol.window > max_positions(model):
        raise ValueError(
            f"--cartridge-tokens is {tokens} and --window {protocol.window}; expected at most {max_positions(model)} together, "
            "the host's positions"
        )


class _Learner(Learner):
    """The updates of a study on other parameters than a memory's."""

    def __init__(self, parameters: list[nn.Parameter], *arguments: Any):
        super().__init__(*arguments)
        self._parameters = parameters
        self._optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)

    def gradient(self, step: int) -> float:
        total, shown = self._loss(step)
        value, loss = torch.stack([total.detach(), shown]).tolist()
        if not math.isfinite(value):
            raise LocasError(f"cartridge: the loss is {value} at update {step}")
        total.backward()
        return float(loss)

    def _update(self) -> None:
        step = self.progress.step
        self._optimizer.zero_grad()
        self.outcome.losses.append(self.gradient(step))
        for group in self._optimizer.param_groups:
            group["lr"] = self._rate(step)
        self._optimizer.step()
        self.progress.step += 1

    def _taken(self) -> Any:
        return [parameter.detach().clone() for parameter in self._parameters]

    def _put_back(self) -> None:
        best: Any = self._best
        if best is not None:
            with torch.no_grad():
                for parameter, kept in zip(self._parameters, best, strict=True):
                    parameter.copy_(kept)
            self._grown()


class Cartridge:
    """Keys and values before all that a host reads, of a text's first tokens until more is learned.

    Attributes:
        parameters: those that learn, float32; none before the first text
    """

    def __init__(self, model: Any, tokens: int, learning_rate: float):
        self.parameters: list[nn.Parameter] = []
        self._model, self._tokens, self._learning_rate = model, tokens, learning_rate
        self._wrapper: Any = None
        self._acts = False

    # ---- how the host reads behind it -----------------------------------------------------------------------------
    def _begin(self, ids: list[int]) -> None:
        """The wrapper of peft, with the keys and values of some tokens; the model is the bare host here."""
        from peft import CartridgeConfig, get_peft_model, initialize_kv_prefix_from_past_key_values

        config = CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=len(ids), num_frozen_tokens=1)
        with torch.random.fork_rng(), warnings.catch_warnings():  # peft draws what is then replaced
            warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers in an old way
            self._wrapper = get_peft_model(self._model, config)
        cache = DynamicCache()
        with torch.no_grad():
            inputs = torch.tensor([ids], device=self._model.device)
            self._model(input_ids=inputs, **cache_argument(self._model, cache), use_cache=True)
        pairs = [(layer.keys, layer.values) for layer in cache.layers]
        try:
            initialize_kv_prefix_from_past_key_values(self._wrapper, past_key_values=pairs)
        except (RuntimeError, ValueError) as error:  # layers of several shapes, keys wider than values, layers without any
            name = type(self._model).__name__
            raise LocasError(f"cartridge: peft's does not fit the keys and values of {name} ({error})") from error
        self.parameters = [parameter for parameter in self._wrapper.parameters() if parameter.requires_grad]

    def _states(self) -> Tensor:
        """Keys and values [layers, 2, 1, heads, tokens, size] from the rows in which peft's encoder has them.

        Its own `get_prompt` loses those that a sliding window does not reach, and with them how many there were.
        """
        config, encoder = self._wrapper.active_peft_config, self._wrapper.prompt_encoder[self._wrapper.active_adapter]
        shape = (1, config.num_virtual_tokens, config.num_layers, 2, config.num_attention_heads, -1)
        states: Tensor = encoder.weight.to(self._model.dtype).view(shape).permute(2, 3, 0, 4, 1, 5)
        return states

    def put_before(self, module: nn.Module, arguments: tuple, named: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        """A forward pre-hook: what is read begins behind the cartridge, which an empty cache gets.

        Padding on the left stands between the two, so a sliding window that ends within the cartridge reaches less of it.
        """
        if not self._acts:
            return None
        count, named = self._wrapper.active_peft_config.num_virtual_tokens, dict(named)
        cache = given_cache(named)
        if cache is None:
            cache = DynamicCache(config=self._model.config)
        if not cache.get_seq_length():
            for index, (keys, values) in enumerate(self._states()):
                cache.update(*(states.expand(len(named["input_ids"]), -1, -1, -1) for states in (keys, values)), index)
        named |= {**cache_argument(module, cache), "use_cache": True}
        mask: Tensor | None = named.get("attention_mask")
        if mask is not None:
            named["attention_mask"] = torch.cat([mask.new_ones(len(mask), count), mask], dim=1)
        for name in ("position_ids", "cache_position"):
            if named.get(name) is not None:
                named[name] = named[name] + count
        return arguments, named

    # ---- learning -------------------------------------------------------------------------------------------------
    def study(
        self, text: str, prompter: Prompter, loss: str, settings: StudySettings, seed: int, cache: Path | None
    ) -> StudyReport:
        """Learns a text as `Memory.study` does, from the same questions; addresses are a memory's own and left out.

        cache: where the questions that the host writes are kept
        """
        self._acts, chosen = False, replace(settings, keys=LEARNED, learning_rate=self._learning_rate)
        gated = all(ffn.is_gated for ffn in inspect_host(self._model).ffns.values())
        # a study asks its host through an attachment, of which nothing else is used here
        attachment = Attachment(self._model, LocasConfig(rank=1, variant="glu" if gated else "mlp"))
        try:
            attachment.bind(lambda: None)
            made = Study(attachment, text, prompter.tokenizer, loss, None, chosen, seed, True, cache)
            seconds = made.report.seconds
            with quiet_host(self._model), torch.inference_mode(False), interrupt_between_chunks() as check_interrupt:
                with attachment.state.disable():
                    with timed(seconds, "writing"):
                        pairs = made.pairs(check_interrupt)
                    with timed(seconds, "reading"):
                        material = made.material(made.lessons(pairs))
                attachment.detach()
                if not self.parameters:
                    self._begin(prompter.passage(text)[: self._tokens])
                self._acts = True
                with torch.enable_grad(), timed(seconds, "learning"):
                    self._learn(made, material, check_interrupt)
        finally:
            if attachment.attached:
                attachment.detach()
        return made.report

    def _learn(self, made: Study, material: Material, check_interrupt: Any) -> None:
        count, most = self._wrapper.active_peft_config.num_virtual_tokens, max_positions(self._model)
        longest = max(len(row.ids) for row in (*material.lessons, *material.raw, *material.guard, *material.kept_back))
        if count + longest > most:
            raise LocasError(f"cartridge: {longest} tokens are to be learned behind {count}, but the host has {most} positions")
        learner = _Learner(self.parameters, made.attachment, material, made.settings, made.loss, made.seed, Progress())
        with made.bar("studying", learner.planned, "updates") as advance:

            def after_step() -> None:
                advance(1)
                check_interrupt()

            learner.run(after_step)
        learner.tell(made.report, 0)


@contextmanager
def cartridge(model: Any, tokens: int, learning_rate: float) -> Iterator[Cartridge]:
    """A host with a fresh cartridge that learns texts, while the block runs; afterwards the host is exactly as before.

    Args:
        model: a transformers causal language model that keeps keys and values only
        tokens: of the cartridge; a text with fewer tokens gives it as many as it has
        learning_rate: of AdamW

    Raises LocasError if peft has no cartridges.
    """
    require_cartridge()
    required_grad = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    attributes, pretraining_tp = set(model.__dict__), getattr(model.config, "pretraining_tp", None)
    made = Cartridge(model, tokens, learning_rate)
    handle = model.register_forward_pre_hook(made.put_before, with_kwargs=True)
    try:
        yield made
    finally:
        handle.remove()
        for name in set(model.__dict__) - attributes:
            delattr(model, name)
        if pretraining_tp is not None:
            model.config.pretraining_tp = pretraining_tp  # peft sets it to 1
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(required_grad[name])
