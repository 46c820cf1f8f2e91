"""Models on the hub: one question before anything is loaded, so that an unreachable hub is one line and not minutes."""

from pathlib import Path

from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, is_offline_mode, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

CONFIG = "config.json"
_SECONDS = 10.0


def must_use_cache(name: str) -> bool:
    """Whether only the files in the cache are to be used, since the hub does not answer or is switched off.

    Raises FileNotFoundError for a model that the hub does not know, ConnectionError where it does not answer and has
    left nothing in the cache.
    """
    why = "HF_HUB_OFFLINE is set"
    if not is_offline_mode():
        try:
            get_hf_file_metadata(hf_hub_url(name, CONFIG), timeout=_SECONDS)  # asks once: without retries
            return False
        except (HFValidationError, RepositoryNotFoundError):
            raise FileNotFoundError(f"--model: {name} is neither a folder here nor a model on the hub") from None
        except EntryNotFoundError:
            raise FileNotFoundError(f"--model: {name} has no {CONFIG} on the hub, so it is not a transformers model") from None
        except Exception as error:  # no common class: what a connection can end with depends on the HTTP library
            why = f"the hub does not answer: {error}"
    if not isinstance(try_to_load_from_cache(name, CONFIG), str):
        raise ConnectionError(
            f"--model: {name} is not a folder here, it is not in the hub's cache, and {why}; expected a model's folder, "
            f"or run `hf download {name}` where the hub can be reached"
        )
    return True


def hub_file(name: str, file: str, from_cache: bool) -> Path | None:
    """A file of a model on the hub, downloaded if need be; None if it has none."""
    try:
        return Path(hf_hub_download(name, file, local_files_only=from_cache))
    except (EntryNotFoundError, LocalEntryNotFoundError):
        return None
