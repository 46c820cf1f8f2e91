"""A saved run resumed: its place in the text, and whether text and settings are the same."""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from locas_ext.checks import path
from locas_ext.errors import LocasError
from locas_ext.patching.attachment import Attachment
from locas_ext.state.stream import Stream
from locas_ext.storage import checkpoint

from .settings import ResolvedSettings, Settings
from .text_digest import TextDigest, format1_digest
from .update import Backprop, backprop_numbers


@dataclass(frozen=True)
class SavedRun:
    """A run as a folder held it, read once: who saves there meanwhile changes nothing here."""

    memory: checkpoint.Saved
    stream: Stream
    settings: Settings


def saved_run(resume: str | Path, place: int = 0) -> SavedRun:
    """LocasError if the folder holds no run, or one that cannot be read. place: which of the texts that were learned at once"""
    memory = checkpoint.read(path("resume", resume))
    if (stream := memory.stream) is None:
        raise LocasError(
            f"{resume} holds no place to resume from; it must be saved with save_pretrained(path, optimizer=True) "
            "after a memorize() call"
        )
    if place < len(stream.ranks):
        stream = stream.of_rank(place)
    return SavedRun(memory, stream, settings_of(stream, resume))


def settings_of(stream: Stream, place: str | Path) -> Settings:
    """The settings of a run that was saved; LocasError, which names the place, for a record that does not hold them."""
    try:
        return Settings.from_record(stream.settings)
    except (KeyError, TypeError, ValueError) as error:
        raise LocasError(f"{place}: the record of the run is damaged: {type(error).__name__}: {error}") from None


def check_same_run(attachment: Attachment, ids: Tensor, settings: ResolvedSettings, saved: SavedRun) -> TextDigest:
    """LocasError if a saved run was not over this text with these settings.

    Returns the digest of what was read of the text.
    """
    # layers are checked by load(); the backend may be another one, as on another machine
    configs = [config.to_dict() for config in (saved.memory.config, attachment.config)]
    before, wanted = (
        {**config, "layers": None, "backend": None, **run.to_record()}
        for config, run in zip(configs, (saved.settings, settings.as_settings()), strict=True)
    )
    absent = {**backprop_numbers(Backprop.paper()), "context": "recompute", "texts": 1}  # what a record without the key means
    dtype = attachment.host.dtype_name
    before = {**absent, **before, "dtype": saved.stream.settings.get("dtype", dtype)}
    wanted = {**absent, **wanted, "dtype": dtype}
    different = [name for name in wanted if before.get(name) != wanted[name]]
    if different:
        details = ", ".join(f"{name} was {before.get(name)!r}, is {wanted[name]!r}" for name in different)
        raise LocasError(f"resume: {saved.memory.path} was saved by a run with other settings: {details}")
    digest = TextDigest()
    digest.update(ids[: saved.stream.position])
    if not _is_of(saved.stream, ids, digest):
        raise LocasError(f"resume: {saved.memory.path} was saved by a run over another text")
    return digest


def _is_of(stream: Stream, ids: Tensor, digest: TextDigest) -> bool:
    """Whether the text begins with what the run has read, whose digest is given."""
    read = ids[: stream.position]
    if len(read) < stream.position:
        return False
    if stream.tail is None:
        return stream.text_digest == format1_digest(read)
    return stream.text_digest == digest.blocks and read[len(read) - len(stream.tail) :].tolist() == stream.tail
