"""Models, tokenizers and texts by the names a command line gives them."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_host(model: str, dtype: str | None, device: str | None):
    """A causal language model in evaluation mode, and its tokenizer.

    model: a folder or a hub name
    dtype: float32, bfloat16 or float16; None: float32 on the CPU, the checkpoint's own on CUDA
    device: such as "cpu" or "cuda:0"; None: CUDA where there is one

    Raises ValueError for a dtype or device that is not there, OSError if the model cannot be read.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; expected one of {', '.join(DTYPES)}")
    if Path(model).is_file():
        raise NotADirectoryError(f"--model: {model} is a file; expected a folder or a hub name")
    if not Path(model).is_dir() and (Path(model).is_absolute() or model.count("/") > 1 or model.startswith(".")):
        raise FileNotFoundError(f"--model: {model} is not a folder")  # nor a hub name, which has at most one slash
    place = _device(device)
    logging.disable_progress_bar()  # what a command does next has a bar of its own
    chosen = DTYPES[dtype] if dtype else torch.float32 if place.type == "cpu" else "auto"
    tokenizer = AutoTokenizer.from_pretrained(model)
    host = AutoModelForCausalLM.from_pretrained(model, dtype=chosen)
    return host.to(place).eval(), tokenizer


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device is {name!r}; expected such as cpu, cuda or cuda:0") from None
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device is {name!r}, but there are {torch.cuda.device_count()} CUDA devices here")
    return place


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start})") from None


@dataclass(frozen=True)
class Text:
    """A text file, or its beginning.

    name: the file's name without its ending
    sha256: of the whole file
    ids: [n] int64 token ids
    words, bytes: of exactly the text that is scored, from the end of the first token to the end of the last: runs of
        characters that are not white space, and bytes of UTF-8
    """

    name: str
    sha256: str
    ids: torch.Tensor
    words: int
    bytes: int

    @property
    def fingerprint(self) -> dict:
        return {"name": self.name, "sha256": self.sha256, "tokens": len(self.ids)}


def read_text(path: Path, tokenizer, max_tokens: int | None) -> Text:
    """At most `max_tokens` tokens of a text file (None: all).

    Raises OSError for a file that cannot be read, ValueError for one that is not UTF-8 text or holds fewer
    than 2 tokens.
    """
    text = _read(path)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=tokenizer.is_fast)
    ids = encoded["input_ids"][:max_tokens]
    if len(ids) < 2:
        count = "1 token" if ids else "no text"
        raise ValueError(f"{path} holds {count}; expected at least 2 tokens, one to predict the other from")
    if tokenizer.is_fast:
        offsets = encoded["offset_mapping"]
        scored = text[offsets[0][1] : offsets[len(ids) - 1][1]]
    else:
        scored = tokenizer.decode(ids[1:], clean_up_tokenization_spaces=False)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return Text(path.stem, digest, torch.tensor(ids), len(scored.split()), len(scored.encode()))


def read_texts(paths: list[Path], tokenizer) -> torch.Tensor:
    """The token ids [n] of text files one after another, with the end-of-text token between two.

    Raises OSError for a file that cannot be read, ValueError for one that is not UTF-8 text or is empty, and for a
    single token in all.
    """
    ids: list[int] = []
    for path in paths:
        tokens = tokenizer(_read(path), add_special_tokens=False)["input_ids"]
        if not tokens:
            raise ValueError(f"{path} holds no text")
        if ids and tokenizer.eos_token_id is not None:
            ids.append(tokenizer.eos_token_id)
        ids.extend(tokens)
    if len(ids) < 2:
        raise ValueError(f"{paths[0]} holds 1 token; expected at least 2 tokens, one to predict the other from")
    return torch.tensor(ids)
