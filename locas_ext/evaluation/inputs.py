"""Models and tokenizers by the names a command line gives them."""

import hashlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from locas_ext.caller import caller_stacklevel
from locas_ext.errors import LocasError

from .gguf_files import is_gguf, load_gguf
from .hub import must_use_cache
from .model_files import check_config_files, check_weight_files

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_SAMPLES = 4096


def load_host(model: str, dtype: str | None, device: str | None):
    """A causal language model in evaluation mode, and its tokenizer. No code that comes with a model is run.

    model: a folder, a hub name or a GGUF file
    dtype: float32, bfloat16 or float16; None: float32 on the CPU, on CUDA the checkpoint's own, for a GGUF file bfloat16
    device: such as "cpu" or "cuda:0"; None: CUDA where there is one

    Raises ValueError for a dtype or device that is not there, OSError or LocasError, in one line, if the model cannot
    be loaded.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; expected one of {', '.join(DTYPES)}")
    place = _device(device)
    if is_gguf(model):
        with _quiet_transformers(), _one_line(model):
            of_file = DTYPES[dtype or ("float32" if place.type == "cpu" else "bfloat16")]
            host, tokenizer, found = load_gguf(model, of_file)
            _check_loaded(model, found)
            return host.to(place).eval(), tokenizer
    chosen = DTYPES[dtype] if dtype else torch.float32 if place.type == "cpu" else "auto"
    from_cache = _check_name(model)
    check_config_files(model, from_cache)
    options = {"trust_remote_code": False, "local_files_only": from_cache}
    with _quiet_transformers(), _one_line(model):
        tokenizer = AutoTokenizer.from_pretrained(model, **options)
        if Path(model).is_dir():
            check_weight_files(Path(model), AutoConfig.from_pretrained(model, **options))
        options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # _check_loaded says which do not match
        host, found = AutoModelForCausalLM.from_pretrained(model, dtype=chosen, **options)
        _check_loaded(model, found)
        return host.to(place).eval(), tokenizer


def _check_name(model: str) -> bool:
    """Whether only files of the hub's cache are to be used. OSError for what is neither a folder nor a hub name."""
    if Path(model).is_file():
        raise NotADirectoryError(f"--model: {model} is a file; expected a folder, a hub name or a GGUF file")
    if Path(model).is_dir():
        return True
    if not model or Path(model).is_absolute() or model.count("/") > 1 or model.startswith("."):
        raise FileNotFoundError(f"--model: {model} is not a folder")  # nor a hub name, which has at most one slash
    return must_use_cache(model)


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without its progress bars and its warnings: what a command does next has a bar, what matters is raised."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def _one_line(model: str) -> Iterator[None]:
    """Whatever transformers makes of a stranger's files as one LocasError with the model's name."""
    try:
        yield
    except (LocasError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        words = " ".join(str(error).split()) or "no reason given"
        raise LocasError(f"--model: {model} cannot be loaded: {type(error).__name__}: {words[:300]}") from error


def _check_loaded(model: str, found: dict) -> None:
    """LocasError for weights that the checkpoint lacks or has in other shapes; a warning for those that nobody uses."""
    if missing := sorted(found["missing_keys"]):
        raise LocasError(
            f"--model: the weights of {model} are not whole: {len(missing)} tensors are missing, such as {missing[0]}"
        )
    if other := sorted(found["mismatched_keys"]):
        name, there, here = other[0]
        shapes = f"{list(there)} where the config makes it {list(here)}"
        raise LocasError(f"--model: {len(other)} tensors of {model} have other shapes, such as {name}, {shapes}")
    if unexpected := sorted(found["unexpected_keys"]):
        warnings.warn(
            f"{model} holds {len(unexpected)} tensors that its architecture has no use for, such as {unexpected[0]}",
            stacklevel=caller_stacklevel(),
        )


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


def weights_digest(host) -> str:
    """Tells checkpoints of one name apart: SHA-256 over samples of every parameter, rounded to bfloat16."""
    digest = hashlib.sha256()
    for name, parameter in host.named_parameters():
        digest.update(f"{name} {list(parameter.shape)}".encode())
        for tensor in _held(parameter.detach()):
            flat = tensor.reshape(-1)
            samples = flat[:: max(1, flat.numel() // _SAMPLES)].to("cpu", torch.bfloat16)
            digest.update(samples.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def _held(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The tensors with the numbers: of a quantization library's those inside it."""
    if not is_traceable_wrapper_subclass(tensor):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from _held(getattr(tensor, name))
