"""Saving and loading: a memory's state to the files of a folder, and back. All is checked before anything changes."""

import copy
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path

from torch import Tensor

from locas_ext.config import LocasConfig
from locas_ext.errors import LocasError
from locas_ext.hosts.fingerprint import differences, fingerprint
from locas_ext.hosts.registry import Host
from locas_ext.hosts.sharding import companions
from locas_ext.ops.ranks import Ranks, together
from locas_ext.patching.attachment import Attachment
from locas_ext.signals import uninterrupted
from locas_ext.state.stream import Stream, TextRecord
from locas_ext.version import __version__

from . import config_file, folder, tensor_file
from .schema import Wrong

_MOST_EMPTY_BYTES = 4 * 2**30  # of slots that a file names but does not hold


# ---- writing ---------------------------------------------------------------------------------------------------
def save(attachment: Attachment, path: Path, optimizer: bool) -> None:
    """See `Memory.save_pretrained`. What `load` would refuse is refused before anything in the folder changes.

    Of processes that run the host together the first one writes, for which the others wait.
    """
    with attachment.state.exclusion.read("save_pretrained"):
        record, memory = _serialized(attachment, path, optimizer)
    ranks = companions(attachment.host.model)
    with together(ranks):
        if ranks is None or ranks.rank == 0:
            folder.write(path, record, memory)


def _serialized(attachment: Attachment, path: Path, optimizer: bool) -> tuple[bytes, bytes]:
    """-> the config file's and the tensor file's bytes. LocasError for what a reader would refuse."""
    state, stream = attachment.state, attachment.stream
    state.sync()
    streams = (stream.ranks or [stream]) if stream else []
    other = {"other_streams": [each.to_dict() for each in streams[1:]]} if optimizer and streams[1:] else {}
    fields = {
        "format_version": config_file.FORMAT_VERSION,
        "locas_ext_version": __version__,
        "created_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "config": config_file.config_record(attachment.config),
        "layers": list(state.layers),
        "host": fingerprint(attachment.host),
        "memory_version": state.version,
        "initialized": state.initialized,
        "slots_used": state.used * state.processes,
        "tokens_seen": streams[0].position if streams else 0,
        "texts": [text.to_dict() for text in attachment.texts],
        "stream": streams[0].to_dict() if streams and optimizer else None,
        **other,
    }
    try:
        kept = stream.kept.tensors() if optimizer and stream and stream.kept else {}
        memory = tensor_file.serialize({**_whole(state.tensors(optimizer), state.ranks), **kept}, fields)
        return config_file.serialize({**fields, "memory_sha256": config_file.digest(memory)}), memory
    except Wrong as error:
        raise LocasError(f"cannot save the memory: {error}; nothing in {path} was changed") from None


def _whole(tensors: dict[str, Tensor], ranks: Ranks | None) -> dict[str, Tensor]:
    """Of tensors by slot [L, planes, r, d] those of all processes, which all call this; the others as they are."""
    if ranks is None:
        return tensors
    return {name: ranks.gathered(tensor, 2) if tensor.dim() == 4 else tensor for name, tensor in tensors.items()}


def _part(tensors: dict[str, Tensor], ranks: Ranks | None) -> dict[str, Tensor]:
    """The reverse."""
    if ranks is None:
        return tensors
    return {name: ranks.mine(tensor, 2) if tensor.dim() == 4 else tensor for name, tensor in tensors.items()}


# ---- reading ---------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Saved:
    """A saved memory as it was read, whole and checked: what it is made of does not change when others save there."""

    path: Path
    fields: dict
    tensors: dict[str, Tensor]

    @cached_property
    def config(self) -> LocasConfig:
        """With its layers spelled out; its backend may be one that is not available here."""
        return config_file.config_of(self.fields)

    @cached_property
    def stream(self) -> Stream | None:
        """The place in a text, where one was saved."""
        return config_file.stream_of(self.fields, self.tensors)

    @cached_property
    def texts(self) -> list[TextRecord]:
        """What the memory has learned from; files of format 1 do not say."""
        return [TextRecord(**text) for text in self.fields.get("texts", [])]

    def check_host(self, host: Host) -> None:
        """LocasError if the memory is of another host."""
        if different := differences(self.fields["host"], host):
            raise LocasError(f"{self.path} is a memory of another host: {', '.join(different)}")

    def check_room(self) -> None:
        """LocasError for a rank that would take far more room than what was saved.

        Only a memory that grows can have one: its rank is the slots it begins with, of which few may be in use.
        """
        layers, planes, rows, hidden_size = tensor_file.slots_shape(self.fields)
        rank = self.config.rank
        size = 4 * layers * planes * rank * hidden_size
        if rank > rows and size > _MOST_EMPTY_BYTES:
            raise LocasError(
                f"{self.path}: rank is {rank}, which takes {size / 2**30:.1f} GiB for {rows} slots in use; if that is meant, "
                "attach(model, LocasConfig(rank=...)) and load it with memory.load(path)"
            )

    def put_into(self, attachment: Attachment) -> None:
        """Makes it the memory that is attached. LocasError, with nothing changed, if it does not fit."""
        fields, state = self.fields, attachment.state
        self.check_host(attachment.host)
        if fields["layers"] != list(state.layers):
            raise LocasError(f"{self.path} has slots in layers {fields['layers']}; attached are {list(state.layers)}")
        for name in ("variant", "rank"):
            there, here = getattr(self.config, name), getattr(attachment.config, name)
            if there != here:
                raise LocasError(f"{self.path} has {name} {there!r}; attached is {here!r}")
        own = {name: tensor for name, tensor in self.tensors.items() if name in tensor_file.OF_MEMORY}
        own, stream = _part(own, state.ranks), copy.deepcopy(self.stream)
        with uninterrupted():
            state.load(own, fields["memory_version"], fields["slots_used"] // state.processes)
            attachment.stream, attachment.texts = stream, list(self.texts)


def read(path: Path, ranks: Ranks | None = None) -> Saved:
    """The memory saved in a folder. FileNotFoundError, OSError or LocasError if none is there, or not all of it.

    ranks: the processes that read it together: what one cannot read, none takes
    """
    with together(ranks):
        saved = Saved(path, *folder.read(path))
    if ranks is not None and not ranks.same(saved.fields["memory_sha256"]):
        raise LocasError(f"{path}: the processes that share the memory have read different files")
    return saved
