"""`locas perplexity`: methods side by side on books, each scored under the same windows before it learns."""

import sys

from rich import box
from rich.console import Console
from rich.table import Table
from transformers.utils import logging

from . import Interrupted, results
from .jobs import Job, assemble, make_jobs, publish
from .parallel import device_for, local_rank, share_threads, spawned, world_size
from .study import PerplexityTask, Study


def _work(study: Study, jobs: list[Job], progress: bool) -> None:
    """Runs every job that is neither done nor another process's."""
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    study.warm_up()
    for job in jobs:
        record = job.run(progress)
        if record is None:
            continue
        publish(study, jobs)
        outcome = record["error"] or f"perplexity {record['perplexity']:.2f}"
        done = sum(other.done for other in jobs)
        line = f"[{done}/{len(jobs)}] {job.book.name}, {job.arm.label}: {outcome}, {record['seconds']:.1f} s"
        console.print(line, markup=False)


def _spawned_worker(index: int, task: PerplexityTask) -> None:
    """Another process's whole life."""
    try:
        logging.disable_progress_bar()
        study = Study(task, device_for(task.device, index))
        _work(study, make_jobs(study), progress=False)
    except KeyboardInterrupt:
        sys.exit(130)  # the process that was started first says what was kept


def _table(records: list[dict]) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("book", "method"):
        table.add_column(name)
    for name in ("perplexity", "held out", "time", "extra parameters"):
        table.add_column(name, justify="right")
    for record in records:
        held_out, time = record["held_out_perplexity"], record["relative_time"]
        table.add_row(
            record["book"], record["arm"], record["error"] or f"{record['perplexity']:.3f}",
            f"{held_out:.3f}" if held_out is not None else "", f"{time:.2f}x" if time is not None else "",
            f"{record['extra_parameters']:,}",
        )
    return table


def run_perplexity(task: PerplexityTask, console: Console) -> None:
    """Runs every arm on every book that the output folder has no record of yet, in as many processes as asked for.

    Raises ValueError, LocasError or OSError for arguments that do not fit, Interrupted at Ctrl-C.
    """
    share_threads(task.processes)
    logging.disable_progress_bar()
    study = Study(task, device_for(task.device, local_rank()))
    results.open_folder(task.out, study.settings)
    for folder in ("chunks", "records", "memories"):
        (task.out / folder).mkdir(exist_ok=True)
    jobs = make_jobs(study)
    processes = min(task.processes, sum(not job.done for job in jobs))
    try:
        with spawned(processes - 1, _spawned_worker, task):
            _work(study, jobs, progress=processes == 1 == world_size())
    except KeyboardInterrupt:
        done = sum(job.done for job in jobs)
        raise Interrupted(
            f"{done} of {len(jobs)} records are kept in {task.out}; the same command goes on"
        ) from None
    if not all(job.done for job in jobs):
        return  # other processes are still at it; the last one reports
    publish(study, jobs)
    # The report (Markdown, plots) of the folder is written here.
    console.print(_table(assemble(jobs)))
    console.print(f"results: {task.out / results.NAME}")
