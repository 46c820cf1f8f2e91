"""`locas perplexity`: methods side by side on books, each scored under the same windows before it learns."""

import sys

from rich.console import Console
from rich.table import Table
from rich.text import Text

from locas_ext.errors import Interrupted, LocasError
from locas_ext.evaluation import results
from locas_ext.evaluation.display import one_line
from locas_ext.evaluation.report.build import write_report
from locas_ext.evaluation.report.tables import console_table, parameters_text, perplexity_text, times_text
from locas_ext.storage.lock import folder_lock
from locas_ext.terminal import Terminal

from .jobs import Job, assemble, make_jobs, publish
from .parallel import device_for, local_rank, share_threads, spawned, world_size
from .study import PerplexityTask, Study

FOLDERS = ("chunks", "records", "memories", "adapters")


def _work(study: Study, jobs: list[Job], progress: bool) -> None:
    """Runs every job that is neither done nor another process's."""
    console = Terminal(stderr=True)
    study.warm_up()
    for job in jobs:
        record = job.run(progress)
        if record is None:
            continue
        publish(study, jobs)
        outcome = record["error"] or f"perplexity {perplexity_text(record['perplexity'])}"
        done = sum(other.done for other in jobs)
        line = f"[{done}/{len(jobs)}] {job.book.name}, {job.arm.label}: {outcome}, {record['seconds']:.1f} s"
        console.print(one_line(line))


def _spawned_worker(index: int, task: PerplexityTask) -> None:
    """Another process's whole life."""
    try:
        study = Study(task, device_for(task.device, index))
        results.open_folder(task.out, study.settings)  # what it has read itself is what the others have read
        _work(study, make_jobs(study), progress=False)
    except KeyboardInterrupt:
        sys.exit(130)  # the process that was started first says what was kept
    except (LocasError, OSError) as error:
        Terminal(stderr=True).print(f"locas: process {index}: {one_line(error)}")
        sys.exit(1)


def _table(records: list[dict]) -> Table:
    rows = [
        [
            record["book"],
            record["arm"],
            record["error"] or perplexity_text(record["perplexity"]),
            perplexity_text(record["held_out_perplexity"]),
            times_text(record["relative_time"]),
            parameters_text(record["extra_parameters"]),
        ]
        for record in records
    ]
    return console_table(["book", "arm", "perplexity", "held out", "time", "extra parameters"], rows, left=2)


def run_perplexity(task: PerplexityTask, console: Console) -> None:
    """Runs every arm on every book that the output folder has no record of yet, then writes the report.

    Raises ValueError, LocasError or OSError for arguments that do not fit, Interrupted at Ctrl-C.
    """
    share_threads(task.processes)
    study = Study(task, device_for(task.device, local_rank()))
    results.open_folder(task.out, study.settings)
    for folder in FOLDERS:
        if (task.out / folder).is_symlink():
            raise FileExistsError(f"--out: {task.out / folder} is a link; expected a folder of the run's own")
        (task.out / folder).mkdir(exist_ok=True)
    jobs = make_jobs(study)
    processes = min(task.processes, sum(not job.done for job in jobs))
    try:
        with spawned(processes - 1, _spawned_worker, task):
            _work(study, jobs, progress=processes == 1 == world_size())
    except KeyboardInterrupt:
        done = sum(job.done for job in jobs)
        raise Interrupted(f"{done} of {len(jobs)} records are kept in {task.out}; the same command continues") from None
    if not all(job.done for job in jobs):
        return  # other processes are still at it; the last one reports
    publish(study, jobs)
    with folder_lock(task.out):  # two processes may both have seen the last job done
        report = write_report(task.out)
    console.print(_table(assemble(jobs)))
    console.print(Text(f"results: {task.out / results.NAME}\nreport: {report}"))
