"""A saved run taken up again: its place in the text, and that text and settings are the same."""

from dataclasses import asdict
from pathlib import Path

from torch import Tensor

from locas_ext.errors import LocasError
from locas_ext.patching.attachment import Attachment
from locas_ext.state.stream import Stream
from locas_ext.storage import checkpoint

from .inputs import text_digest
from .settings import ResolvedSettings


def saved_stream(resume: str | Path) -> Stream:
    stream = checkpoint.read_stream(resume)
    if stream is None:
        raise LocasError(
            f"{resume} holds no place to resume from; it must be saved with save_pretrained(path, optimizer=True) "
            "after a memorize() call"
        )
    return stream


def take_up(attachment: Attachment, ids: Tensor, settings: ResolvedSettings, resume: str | Path, stream: Stream) -> None:
    """Loads the memory of a saved run; ValueError if that was not over this text with these settings."""
    # layers are checked by load(); the backend may be another one, as on another machine
    configs = [config.to_dict() for config in (checkpoint.read_config(resume), attachment.config)]
    before, wanted = (
        {**config, "layers": None, "backend": None, **run}
        for config, run in zip(configs, (stream.settings, asdict(settings)), strict=True)
    )
    different = [name for name in wanted if before.get(name) != wanted[name]]
    if different:
        details = ", ".join(f"{name} was {before.get(name)!r}, is {wanted[name]!r}" for name in different)
        raise ValueError(f"resume: {Path(resume)} was saved by a run with other settings: {details}")
    if stream.position > len(ids) or text_digest(ids[: stream.position]) != stream.text_digest:
        raise ValueError(f"resume: {Path(resume)} was saved by a run over another text")
    attachment.stream = checkpoint.load(attachment.state, attachment.config, attachment.host, resume)
