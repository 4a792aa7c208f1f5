"""Write what a run learned about its labels: one row per image in labels.parquet, and audit.html to read and to send.

    python -m training.audit runs/custom --data gs://bucket/shards

Both are written into the run's folder audit/, with suggest.csv where images to check are asked for. The columns of
labels.parquet are those of `training.audit.evidence.SCHEMA`.

Shapes: N images, K classes.
"""

from __future__ import annotations

import csv
import functools
import io
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import tyro
from rich.console import Console

from pipeline import storage
from pipeline.census import census
from pipeline.dataset import Dataset, InputError
from pipeline.keyed import TASK_ROWS, reduce_by_key
from training.audit import page
from training.audit.evidence import SCHEMA, Findings, reduce_visits, settled
from training.engine.schedule import Schedule
from training.launch import guarded
from training.runs import checkpoint, ledger
from training.runs.finished import Run

LABELS, PAGE, SUGGESTIONS = "audit/labels.parquet", "audit/audit.html", "audit/suggest.csv"  # in the run's folder
EPOCHS = 3  # visits of an image, at least, that are read where no number of cycles is asked for
FOOTER = 1 << 16  # bytes at the end of a part, in which its number of rows is
READERS = 16  # requests to storage at once
READ = ["id", "step", "label", "pseudo_label", "trust", "weight", "confidence", "loss"]


@dataclass(frozen=True)
class Options:
    """Describe what is asked for."""

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """Folder or URL of a run that has finished."""
    data: str = ""
    """Where the data set of the run is: a local path or any fsspec URL."""
    cycles: int = 0
    """How many of the schedule's last cycles to read; 0: as few as hold three visits of every image."""
    suggest: int = 0
    """Images to suggest for a check by a person, as suggest.csv: fill in its column label, then use it as --trusted."""

    def __post_init__(self) -> None:
        for name in ("cycles", "suggest"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be 0 or more")


def audit(options: Options, console: Console | None = None) -> Findings:
    """Write labels.parquet, audit.html and, where asked for, suggest.csv; return the findings in them.

    Raises InputError for what is missing, damaged or does not belong together, most of it before the ledger is read.
    """
    console = console or Console()
    run = Run.open(options.run)
    dataset = run.load(options.data)
    steps = window(run, options.cycles, len(dataset.train))
    parts = whole_parts(run, steps)
    storage.require_writable(run.folder)

    trusted_K = np.bincount(dataset.probe.label_N, minlength=len(dataset.class_names))
    findings = Findings(trusted_K, page.PER_CLASS, page.OVERALL, options.suggest)
    write_labels(run, reduced(run, steps, parts), findings)
    console.print(f"{run.folder}/{LABELS}: {_summary(findings)}", highlight=False, soft_wrap=True)

    shown = page.shown(findings)
    suggested = findings.suggested()
    found = census(dataset.train, dataset.probe, np.concatenate([shown["id"].to_numpy(), suggested["id"].to_numpy()]))
    noisy = found.filter(pc.invert(found["trusted"]))
    row_of = dict(zip(noisy["id"].to_pylist(), noisy["row"].to_pylist(), strict=True))
    if missing := set(shown["id"].to_pylist() + suggested["id"].to_pylist()) - row_of.keys():
        raise InputError(
            f"the ledger of {run.folder} has id {min(missing)}, which {options.data or 'the data set'} has not: "
            "the ledger is of another run; copy it again"
        )
    write_page(run, steps, dataset, findings, found, row_of)
    console.print(f"{run.folder}/{PAGE} written", highlight=False, soft_wrap=True)
    if options.suggest:
        names = dataset.train.names(np.array([row_of[id_] for id_ in suggested["id"].to_pylist()]))
        _write(run, SUGGESTIONS, suggestions(suggested, names, dataset.class_names))
        console.print(
            f"{run.folder}/{SUGGESTIONS}: {len(suggested):,} images: fill in the column label; pipeline.shards custom "
            f"takes the file as --trusted, and a new run goes on with --start-from {run.folder}",
            highlight=False,
            soft_wrap=True,
        )
    return findings


# ---- the ledger ------------------------------------------------------------------------------------------------------


def window(run: Run, cycles: int, images: int) -> range:
    """Return the steps to read: those of the last `cycles`, or of as few as visit each of `images` EPOCHS times."""
    starts = [0, *run.schedule.ends[:-1]]
    if cycles > len(starts):
        raise InputError(f"{run.folder} has {len(starts)} cycles, not {cycles}: lower --cycles")
    enough = run.schedule.steps - EPOCHS * images / run.recipe["batch"]
    first = starts[-cycles] if cycles else max((start for start in starts if start <= enough), default=0)
    return range(first, run.schedule.steps)


def whole_parts(run: Run, steps: range) -> list[tuple[ledger.Part, int]]:
    """Return the parts of the ledger that hold rows of `steps`, with their numbers of rows.

    Raises InputError where rows of a step are missing, or there are too many.
    """
    fs, _ = storage.connect(run.folder)
    parts = [part for part in ledger.parts(run.folder) if part.last >= steps.start and part.first < steps.stop]

    def rows(part: ledger.Part) -> int:
        try:
            return pq.read_metadata(pa.BufferReader(storage.read(fs, part.path, start=-FOOTER))).num_rows
        except pa.ArrowException as error:
            raise _damaged(part.path, error) from None

    with ThreadPoolExecutor(READERS) as pool:
        counts = list(pool.map(rows, parts))
    change = np.zeros(max([part.last for part in parts], default=0) + steps.stop + 2)
    for part, count in zip(parts, counts, strict=True):
        a_step = count / (part.last - part.first + 1)  # a worker's share is the same at all of them
        change[part.first] += a_step
        change[part.last + 1] -= a_step
    held, batch = np.cumsum(change)[steps.start : steps.stop], run.recipe["batch"]
    wrong = np.flatnonzero(np.abs(held - batch) > 1e-6)
    if len(wrong):
        raise InputError(
            f"the ledger of {run.folder} holds {held[wrong[0]]:.0f} of {batch} rows of step {steps[wrong[0]]}: "
            "parts of it are missing, or of another run; copy it again"
        )
    return list(zip(parts, counts, strict=True))


def reduced(run: Run, steps: range, parts: list[tuple[ledger.Part, int]]) -> Iterator[pa.Table]:
    """Return the rows of `steps` in these parts, reduced to one per id by a Ray Data job, table by table."""
    tasks: list[list[str]] = [[]]
    held = 0
    for part, count in parts:
        if tasks[-1] and held + count > TASK_ROWS:
            tasks.append([])
            held = 0
        tasks[-1].append(part.path)
        held += count
    return reduce_by_key(
        [pa.table({"path": paths}) for paths in tasks],
        functools.partial(_visits, folder=run.folder, steps=steps, schedule=run.schedule),
        "id",
        sum(count for _, count in parts),
        functools.partial(reduce_visits, classes=len(run.model.class_names)),
    )


def _visits(task: pa.Table, folder: str, steps: range, schedule: Schedule) -> pa.Table:
    # The rows of some parts, with the weights of their steps.
    fs, _ = storage.connect(folder)
    tables = []
    for path in task["path"].to_pylist():
        try:
            rows = pq.read_table(pa.BufferReader(storage.read(fs, path)), columns=READ)
        except pa.ArrowException as error:
            raise _damaged(path, error) from None
        tables.append(rows.filter((pc.field("step") >= steps.start) & (pc.field("step") < steps.stop)))
    rows = pa.concat_tables(tables)
    weight = settled(rows["step"].to_numpy(), schedule).astype(np.float32)
    rows = rows.drop_columns("step").append_column("settled", pa.array(weight))
    for name in ("label", "pseudo_label"):  # half the bytes to move
        rows = rows.set_column(rows.schema.get_field_index(name), name, rows[name].cast(pa.int32()))
    return rows


def _damaged(path: str, error: Exception) -> InputError:
    return InputError(f"ledger part {path} is damaged ({type(error).__name__}): copy it again")


# ---- what is written -------------------------------------------------------------------------------------------------


def write_labels(run: Run, tables: Iterator[pa.Table], findings: Findings) -> None:
    """Write `tables` as labels.parquet, one by one, and add them to `findings`."""
    fs, path = storage.connect(run.folder)
    with tempfile.TemporaryDirectory() as scratch:
        local = f"{scratch}/labels.parquet"
        with pq.ParquetWriter(local, SCHEMA, compression="zstd") as writer:
            for table in tables:
                writer.write_table(table)
                findings.add(table)
        storage.commit(fs, local, storage.join(path, LABELS))


def suggestions(rows: pa.Table, names: list[str], class_names: tuple[str, ...]) -> str:
    """Return CSV with a line per image to check.

    `uri` and `label` are the columns of a list of trusted images; the others are help for the person who checks.
    """
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(["uri", "label", "given", "proposed", "quality", "id"])
    for row, name in zip(rows.to_pylist(), names, strict=True):
        given, proposed = class_names[row["label"]], class_names[row["proposed"]]
        writer.writerow([name, "", given, proposed, f"{row['quality']:.3f}", row["id"]])
    return text.getvalue()


def write_page(
    run: Run, steps: range, dataset: Dataset, findings: Findings, found: pa.Table, row_of: dict[int, int]
) -> None:
    """Write audit.html; `found` is the census and `row_of` where the shown images are."""
    ids = page.shown(findings)["id"].to_pylist()
    held = dataset.train.take(np.array([row_of[id_] for id_ in ids]))
    torn, torn_images = _torn(dataset, found)
    disputed, disputed_images = _disputed(run, dataset)
    measured = [commit.top1 for commit in checkpoint.commits(run.folder) if commit.top1 is not None]
    ends = [0, *run.schedule.ends]
    report = page.Report(
        name=run.folder.rstrip("/").rpartition("/")[2],
        about=(
            f"{len(dataset.train):,} images of {len(dataset.class_names)} classes, {len(dataset.probe):,} trusted; "
            f"{run.recipe['network']}; read from steps {steps.start:,} to {steps.stop:,}, "
            f"the last {len(ends) - 1 - ends.index(steps.start)} of {len(ends) - 1} cycles"
        ),
        class_names=dataset.class_names,
        accuracy=measured[-1] if measured else None,
        findings=findings,
        images={id_: held.image(row) for row, id_ in enumerate(ids)},
        disputed=disputed,
        disputed_images=disputed_images,
        torn=torn,
        torn_images=torn_images,
    )
    _write(run, PAGE, page.render(report))


def _disputed(run: Run, dataset: Dataset) -> tuple[list[page.Judged], int]:
    # Of the trusted images to which the network gives another label, those with the least probable label; how many are.
    probe = dataset.probe
    probability_MK = run.model.probabilities(probe)
    answer_M = probability_MK.argmax(1)
    own_M = probability_MK[np.arange(len(probe)), probe.label_N]
    rows = np.flatnonzero(answer_M != probe.label_N)
    shown = [
        page.Judged(
            int(probe.id_N[row]), probe.image(row), int(probe.label_N[row]), int(answer_M[row]), float(own_M[row])
        )
        for row in rows[np.argsort(own_M[rows])][: page.OVERALL]
    ]
    return shown, len(rows)


def _torn(dataset: Dataset, found: pa.Table) -> tuple[list[tuple[np.ndarray, tuple[str, ...]]], int]:
    # Some images that are stored under several labels, with these, and how many there are.
    torn = found.filter(found["torn"])
    digests = torn["digest"].unique()
    shown = []
    for digest in digests[: page.OVERALL]:
        group = torn.filter(pc.equal(torn["digest"], digest)).to_pylist()
        split = dataset.probe if group[0]["trusted"] else dataset.train
        labels = sorted({dataset.class_names[row["label"]] for row in group})
        shown.append((split.take(np.array([group[0]["row"]])).image(0), tuple(labels)))
    return shown, len(digests)


def _write(run: Run, name: str, text: str) -> None:
    fs, path = storage.connect(run.folder)
    storage.write(fs, storage.join(path, name), text.encode())


def _summary(findings: Findings) -> str:
    images, suspects = findings.count_K.sum(), findings.suspect_K.sum()
    return f"{images:,} images, {suspects:,} suspect labels, {findings.wrong_K.sum() / images:.1%} wrong by estimate"


def main() -> None:
    """Run the command line."""
    guarded(lambda: audit(tyro.cli(Options, prog="python -m training.audit", description=__doc__)))
