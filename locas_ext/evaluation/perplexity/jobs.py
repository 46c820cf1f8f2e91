"""Jobs: one arm on one book each, and the files it leaves in the output folder.

chunks/JOB.jsonl has one line a chunk, records/JOB.json is there once the job is done, memories/JOB holds what Locas
learned, adapters/JOB what Temp-LoRA did. results.json is put together from the records there are, in the order of the jobs.
"""

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from locas_ext.evaluation import results
from locas_ext.evaluation.curve import running_perplexity
from locas_ext.evaluation.json_files import read_json
from locas_ext.evaluation.methods.arm import Arm, slug
from locas_ext.evaluation.methods.registry import Measurement, measure
from locas_ext.evaluation.schemas import JOB_RECORD
from locas_ext.evaluation.texts import Text
from locas_ext.learning.perplexity import perplexity
from locas_ext.memory import Chunk
from locas_ext.storage.files import write_atomically
from locas_ext.storage.lock import folder_lock

from .parallel import claimed, world_size
from .study import Study

_LONGEST_NAME = 180  # bytes; file systems take 255, endings included
MILESTONES = (50_000, 100_000, 150_000, 200_000)


@dataclass(frozen=True)
class Job:
    """One arm on one book."""

    study: Study
    book: Text
    arm: Arm

    @property
    def name(self) -> str:
        name = f"{slug(self.book.name)}-{self.arm.slug}"
        if len(name.encode()) <= _LONGEST_NAME:
            return name
        return f"{name.encode()[:_LONGEST_NAME].decode(errors='ignore')}-{hashlib.sha256(name.encode()).hexdigest()[:12]}"

    def path(self, kind: str, suffix: str = "") -> Path:
        return self.study.task.out / kind / f"{self.name}{suffix}"

    @property
    def record_file(self) -> Path:
        return self.path("records", ".json")

    @property
    def done(self) -> bool:
        return self.record_file.exists()

    def record(self) -> dict | None:
        """What the finished job left, or None. LocasError if it cannot be read."""
        try:
            return read_json(self.record_file, JOB_RECORD)
        except FileNotFoundError:
            return None

    def run(self, progress: bool) -> dict | None:
        """Runs the job unless it is done or another process is at it, and keeps its record, which is returned."""
        if self.done:
            return None
        with claimed(self.path("chunks", ".jsonl")) as log:
            if log is None or self.done:
                return None
            log.truncate(0)
            study, before = self.study, self.study.held_out_before
            measurement = measure(
                study.host,
                self.arm,
                self.book,
                study.protocol,
                study.held_out,
                self.path("adapters" if self.arm.method == "temp-lora" else "memories"),
                lambda chunk: log.write(json.dumps(asdict(chunk)) + "\n"),
                progress,
            )
            record = results.plain(_record(self, measurement, before))
            write_atomically(self.record_file, json.dumps(record).encode())
            return record


def make_jobs(study: Study) -> list[Job]:
    """Book by book, in the order of the arms."""
    return [Job(study, book, arm) for book in study.books for arm in study.arms]


def _record(job: Job, measurement: Measurement, held_out_before: float | None) -> dict:
    chunks, book, whole = measurement.chunks, job.book, measurement.error is None
    order = reading_order(chunks)
    chunks = sorted(chunks, key=lambda chunk: chunk.start) if whole or order is None else []  # of a text with gaps: no curve
    tokens, nll = sum(chunk.tokens for chunk in chunks), math.fsum(chunk.nll for chunk in chunks)
    curve = running_perplexity(chunks)
    task = job.study.task
    return {
        "method": job.arm.method,
        "arm": job.arm.label,
        "arm_settings": job.arm.settings,
        "book": book.name,
        "tokens": tokens,
        "words": book.words,
        "bytes": book.bytes,
        "nll": nll if whole else None,
        "perplexity": perplexity(nll, tokens) if whole else None,
        "perplexity_per_word": perplexity(nll, book.words) if whole and book.words else None,
        "perplexity_per_byte": perplexity(nll, book.bytes) if whole else None,
        "milestones": milestones(curve),
        "held_out_perplexity": measurement.held_out_perplexity,
        "held_out_perplexity_before": held_out_before,
        "extra_parameters": measurement.extra_parameters,
        "seconds": measurement.seconds,
        "peak_memory_bytes": measurement.peak_memory_bytes,
        "error": measurement.error,
        "device": str(job.study.host.device),
        "threads": torch.get_num_threads(),
        "processes": max(task.processes, world_size()),
        "curve": curve,
        "reading_order": order,
    }


def reading_order(chunks: list[Chunk]) -> list[int] | None:
    """Where in the text the chunks stood that were read one after another, counted in chunks; None: in order."""
    starts = [chunk.start for chunk in chunks]
    places = {start: place for place, start in enumerate(sorted(starts))}
    return None if starts == sorted(starts) else [places[start] for start in starts]


def milestones(curve: list[tuple[int, float]]) -> dict[str, float]:
    """Perplexity at the milestones a text reaches: of all chunks that end at or before that many tokens."""
    reached = {}
    for milestone in MILESTONES:
        before = [value for position, value in curve if position <= milestone]
        if before and curve[-1][0] >= milestone:
            reached[str(milestone)] = before[-1]
    return reached


def assemble(jobs: list[Job]) -> list[dict]:
    """The records there are, each with its time relative to truncation on the same book."""
    records = [record for job in jobs if (record := job.record()) is not None]
    baseline = {
        record["book"]: record["seconds"] for record in records if record["method"] == "truncation" and record["error"] is None
    }
    for record in records:
        truncation = baseline.get(record["book"])
        record["relative_time"] = None if truncation is None else record["seconds"] / truncation
    return records


def publish(study: Study, jobs: list[Job]) -> None:
    """Writes results.json anew; other processes may do so at the same time."""
    with folder_lock(study.task.out):
        results.write(study.task.out, study.settings, assemble(jobs))
