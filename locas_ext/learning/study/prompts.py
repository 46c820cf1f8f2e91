"""How a host is asked: through its chat template, or as plain text where it has none.

A prompt is put together from parts that are encoded apart, so that prompts with the same context share it token by token.
"""

from typing import Any

from locas_ext.errors import LocasError

_MARK = "QUESTION-STANDS-HERE"  # found again in what the template makes of it
PLAIN_QUESTION, PLAIN_END = "Question: {}\nAnswer:", "\n"
BETWEEN = "\n\n"  # a context and its question


class Prompter:
    """Prompts and answers as token ids.

    Args:
        tokenizer: of the host

    Attributes:
        has_chat: whether the tokenizer brings a chat template, which is then used

    Raises LocasError if the template cannot be used.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.has_chat = bool(getattr(tokenizer, "chat_template", None))
        self._before, self._after = self._chat_parts() if self.has_chat else ("", "")

    def _chat_parts(self) -> tuple[str, str]:
        """What the template puts before and after the words of a user."""
        try:
            rendered = self.tokenizer.apply_chat_template(
                [{"role": "user", "content": _MARK}], tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # jinja's errors have many types, and jinja may be missing
            raise LocasError(f"the tokenizer's chat template cannot be used: {' '.join(str(error).split())}") from error
        before, mark, after = rendered.partition(_MARK)
        if not mark:
            raise LocasError("the tokenizer's chat template leaves out what the user says")
        return before, after

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without special tokens of the tokenizer's own."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _begin(self) -> list[int]:
        """The BOS token where the tokenizer begins a text with it; a chat template has its own."""
        bos = self.tokenizer.bos_token_id
        return [bos] if bos is not None and self.tokenizer("")["input_ids"][:1] == [bos] else []

    def context(self, text: str | None = None) -> list[int]:
        """The ids that a question goes on from: the template's own words, and a text in view."""
        shown = "" if text is None else text + BETWEEN
        return self.encode(self._before + shown) if self.has_chat else self._begin() + self.encode(shown)

    def question(self, text: str) -> list[int]:
        """The ids of a question, up to where its answer begins."""
        return self.encode(text + self._after if self.has_chat else PLAIN_QUESTION.format(text))

    def ask(self, question: str, context: str | None = None) -> list[int]:
        """A whole prompt."""
        return self.context(context) + self.question(question)

    def answer(self, text: str) -> list[int]:
        """The ids of an answer, without its end."""
        return self.encode(text if self.has_chat else f" {text}")

    def end(self) -> list[int]:
        """What ends an answer."""
        if self.has_chat and self.tokenizer.eos_token_id is not None:
            return [self.tokenizer.eos_token_id]
        return self.encode(PLAIN_END)

    def passage(self, text: str) -> list[int]:
        """The ids of running text, as a text that is memorized."""
        return self._begin() + self.encode(text)
