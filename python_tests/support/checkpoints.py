"""Memory files for tests: read, rewritten, refused."""

import hashlib
import json

from safetensors.torch import load_file, save_file

from support.helpers import random_ids

CONFIG, MEMORY = "locas_config.json", "locas_memory.safetensors"
IDS = random_ids(20, seed=5)


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def rewrite(folder, change_record=lambda record: None, change_tensors=None):
    """Changes a memory's files and mends both checksums: an attacker, or a bug in a writer."""
    record = json.loads((folder / CONFIG).read_text())
    if change_tensors is not None:
        tensors = load_file(folder / MEMORY)
        tensors = change_tensors(tensors) or tensors
        save_file(tensors, folder / MEMORY)
        record["memory_sha256"] = hashlib.sha256((folder / MEMORY).read_bytes()).hexdigest()
    change_record(record)
    record.pop("config_sha256", None)
    record["config_sha256"] = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
    (folder / CONFIG).write_text(json.dumps(record))


def put(place, value):
    """A change of a record: the value at a place such as "stream.chunks.0.nll"."""

    def change(record):
        *path, last = [int(part) if part.isdecimal() else part for part in place.split(".")]
        for part in path:
            record = record[part]
        record[last] = value

    return change
