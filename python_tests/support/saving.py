"""Processes that save into and load from one folder, for tests: without a model, and forked, so they start quickly.

python saving.py loops FOLDER TIMES save|load...: a process each; prints what `loop` returns of each.
python saving.py hold FOLDER SECONDS: keeps the folder locked.
"""

import json
import multiprocessing
import random
import sys
import time
from pathlib import Path

import torch

from locas_ext.storage import config_file, folder, lock, tensor_file

SAMPLES = "A" * 342 + "=="


def memory(rows):
    """A whole memory of its own rank: the record and the tensors, with `rows` in every number."""
    fields = {
        "format_version": 2,
        "locas_ext_version": "0",
        "created_at": "2026-01-01T00:00:00+00:00",
        "config": dict(variant="glu", rank=rows, layers=None, init="topk", scale="paper", clip=True, backend="auto", seed=0),
        "layers": [0, 1],
        "host": dict(model_type="x", hidden_size=8, intermediate_size=99, num_hidden_layers=2, samples=[SAMPLES, SAMPLES]),
        "memory_version": rows,
        "initialized": True,
        "slots_used": rows,
        "tokens_seen": 0,
        "texts": [],
        "stream": None,
    }
    return fields, {"slots": torch.full((2, 3, rows, 8), float(rows)), "scale": torch.full((2,), float(rows))}


def save(path, rows):
    fields, tensors = memory(rows)
    content = tensor_file.serialize(tensors, fields)
    record = config_file.serialize({**fields, "memory_sha256": config_file.digest(content)})
    folder.write(Path(path), record, content)


def load(path):
    """-> its rank; every number says the same."""
    fields, tensors = folder.read(Path(path))
    rank = fields["config"]["rank"]
    assert fields["memory_version"] == rank and all((tensor == rank).all() for tensor in tensors.values())
    return rank


def loop(verb, path, times, savers):
    """Saves so many times, or loads while anybody saves. -> how often, and every error that is not the lock's."""
    count, wrong, draw = 0, set(), random.Random()
    while count < times if verb == "save" else savers.value:
        count += 1
        try:
            save(path, draw.choice((1, 2, 2, 50))) if verb == "save" else load(path)
        except Exception as error:
            if verb == "load" or "is being saved into by process" not in str(error):
                wrong.add(f"{type(error).__name__}: {error}")
    if verb == "save":
        with savers.get_lock():
            savers.value -= 1
    return count, sorted(wrong)


def loops(path, times, verbs):
    """savers: how many have not saved as often as they are to"""
    context = multiprocessing.get_context("fork")
    savers, results = context.Value("i", verbs.count("save")), context.SimpleQueue()
    run = lambda verb: results.put(loop(verb, path, times, savers))
    processes = [context.Process(target=run, args=(verb,)) for verb in verbs]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        print(json.dumps(results.get()))


def hold(path, seconds):
    with lock.folder_lock(Path(path)):
        print("locked", flush=True)
        time.sleep(float(seconds))


if __name__ == "__main__":
    verb, path, number, *verbs = sys.argv[1:]
    loops(path, int(number), verbs) if verb == "loops" else hold(path, number)
