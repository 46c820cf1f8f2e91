"""`locas chat`: a conversation with a model and its memory, line by line."""

import sys
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import LogitsProcessorList, PreTrainedModel

from locas_ext import memory as locas
from locas_ext.cli.failures import CLOSED_PIPE, failure
from locas_ext.cli.values import at_home
from locas_ext.config import LocasConfig
from locas_ext.evaluation.inputs import load_host
from locas_ext.evaluation.texts import read_whole
from locas_ext.hosts.text_config import max_positions
from locas_ext.learning.study.generation import ends_of
from locas_ext.learning.study.prompts import Prompter
from locas_ext.memory import Memory

from .generate import Finite, Streamer, sampling

HELP = """/off          answer without the memory, to compare
/on           answer with it again
/study FILE   learn a text from questions about it
/save DIR     keep the memory in a folder
/new          forget this conversation (not the memory)
/quit         end"""


@dataclass(frozen=True, kw_only=True)
class ChatTask:
    """The arguments of the command.

    memory: a folder; None: a new one of `config`
    temperature: 0 takes the likeliest token each time
    """

    model: str
    memory: Path | None
    max_new_tokens: int
    temperature: float
    config: LocasConfig
    dtype: str | None
    device: str | None


@dataclass
class Chat:
    """A conversation and what it has done to the memory.

    Attributes:
        said: what was said so far, {"role", "content"} each
        uses_memory: whether answers are given with the memory
        unsaved: whether something was learned and not kept
    """

    task: ChatTask
    console: Console
    memory: Memory
    tokenizer: Any
    prompter: Prompter
    said: list[dict[str, str]] = field(default_factory=list)
    uses_memory: bool = True
    unsaved: bool = False

    # ---- answers -------------------------------------------------------------------------------------------------
    def _ids(self) -> list[int]:
        """The conversation as a prompt; its oldest exchanges are left out where it would not fit."""
        room = max_positions(self.memory.model) - self.task.max_new_tokens
        while True:
            ids = self._prompt()
            if len(ids) <= room:
                return ids
            if len(self.said) <= 1:
                raise ValueError(
                    f"this takes {len(ids):,} tokens and --max-new-tokens {self.task.max_new_tokens}, but the model has "
                    f"{max_positions(self.memory.model):,} positions"
                )
            del self.said[:2]

    def _prompt(self) -> list[int]:
        if not self.prompter.has_chat:
            return self.prompter.ask(self.said[-1]["content"])
        text = self.tokenizer.apply_chat_template(self.said, tokenize=False, add_generation_prompt=True)
        return self.prompter.encode(text)

    def answer(self, text: str) -> None:
        """Answers while the answer is made. Ctrl-C ends the answer, not the conversation."""
        self.said.append({"role": "user", "content": text})
        task, model = self.task, self.memory.model
        assert isinstance(model, PreTrainedModel)
        inputs = torch.tensor([self._ids()], device=model.device)
        stops = {} if self.prompter.has_chat else {"stop_strings": ["\n"], "tokenizer": self.tokenizer}
        streamer = Streamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        with nullcontext() if self.uses_memory else self.memory.disabled(), torch.inference_mode():
            output = model.generate(
                input_ids=inputs,
                attention_mask=torch.ones_like(inputs),
                max_new_tokens=task.max_new_tokens,
                streamer=streamer,
                pad_token_id=self.tokenizer.pad_token_id or self.tokenizer.eos_token_id,
                eos_token_id=ends_of(model, self.tokenizer),
                logits_processor=LogitsProcessorList([Finite()]),
                **sampling(task.temperature),
                **stops,
            )
        said = self.tokenizer.decode(output[0, inputs.shape[1] :], skip_special_tokens=True).strip()
        self.said.append({"role": "assistant", "content": said})

    # ---- commands ------------------------------------------------------------------------------------------------
    def obey(self, line: str) -> bool:
        """Does what a line that begins with / says. -> whether the conversation goes on"""
        name, _, argument = line[1:].partition(" ")
        argument = argument.strip()
        if name in ("quit", "exit"):
            return False
        if name in ("on", "off"):
            self.uses_memory = name == "on"
            self.console.print("with the memory" if self.uses_memory else "the bare host")
        elif name == "new":
            self.said.clear()
        elif name == "study":
            self._study(argument)
        elif name == "save":
            self._save(argument)
        else:
            self.console.print(HELP if name == "help" else f"there is no /{name}\n{HELP}")
        return True

    def _study(self, argument: str) -> None:
        if not argument:
            raise ValueError("/study: expected a text file")
        version = self.memory.version
        try:
            report = self.memory.study(read_whole(Path(at_home(argument))), self.tokenizer, seed=self.task.config.seed)
            self.console.print(str(report))
        finally:
            self.unsaved |= self.memory.version != version

    def _save(self, argument: str) -> None:
        if not argument:
            raise ValueError("/save: expected a folder")
        self.memory.save_pretrained(at_home(argument))
        self.unsaved = False
        self.console.print(f"memory: {argument}")


def _heard(prompt: str) -> str | None:
    """The next line; None at the end of the input. The prompt is shown to a person only."""
    try:
        return input(prompt if sys.stdin.isatty() else "")
    except EOFError:
        return None


def _turn(chat: Chat, line: str) -> bool:
    """One line and what comes of it; what is wrong with it is said, and the conversation goes on."""
    try:
        _check_text(line)
        if line.startswith("/"):
            return chat.obey(line)
        if line:
            chat.answer(line)
    except Exception as error:
        if (ended := failure(error)).status == CLOSED_PIPE:
            raise
        chat.console.print(" ".join(ended.line.split()))
    except KeyboardInterrupt as error:
        if error.args:  # not Ctrl-C, but a signal that ends the process
            raise
        chat.console.print("\nstopped")
    chat.said = chat.said[: len(chat.said) - len(chat.said) % 2]  # a question without an answer
    return True


def _check_text(line: str) -> None:
    try:
        line.encode()
    except UnicodeEncodeError:
        raise ValueError("this line is not text in UTF-8") from None


def run_chat(task: ChatTask, console: Console) -> None:
    """Talks until /quit, the end of the input or Ctrl-C at the prompt. Raises what loading a model or a memory raises."""
    host, tokenizer = load_host(task.model, task.dtype, task.device)
    memory = locas.load(host, task.memory) if task.memory else locas.attach(host, task.config)
    chat = Chat(task, console, memory, tokenizer, Prompter(tokenizer))
    torch.manual_seed(task.config.seed)
    console.print(f"{memory!r}\n/help says what else there is")
    try:
        while (line := _heard("> ")) is not None and _turn(chat, line.strip()):
            pass
    except KeyboardInterrupt as error:
        console.print("")
        if error.args:
            raise
    finally:
        if chat.unsaved:
            console.print("what was studied in this conversation was not kept; /save DIR would have kept it")
