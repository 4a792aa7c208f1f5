"""Write which labels are wrong: one row per image in labels.parquet, and audit.html to read and to send.

    python -m training.audit runs/custom --data gs://bucket/shards
    python -m training.audit --features gs://bucket/features --data gs://bucket/shards
    python -m training.audit runs/custom --data gs://bucket/shards --features gs://bucket/features

By what a run has learned; by stored features, without a run: heads are trained on them, and each label is judged by one
that has not seen it; or by both. All is written into the folder audit/ of the run, or of the features, with suggest.csv
where images to check are asked for. With features the page also has look-alikes, outliers and a map, and
neighbours.parquet tells of every image which one is next to it and how alone it is. The columns of both files are those
of `training.audit.evidence.SCHEMA` and `training.audit.neighbours.SCHEMA`.

Shapes: N images, K classes.
"""

from __future__ import annotations

import csv
import functools
import io
import tempfile
from collections.abc import Callable, Iterator, Sequence
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
from pipeline.features import Embedded
from pipeline.keyed import TASK_ROWS, reduce_by_key
from training.audit import folds, page
from training.audit.evidence import SCHEMA, Findings, reduce_visits, settled
from training.audit.folds import Folds
from training.audit.neighbours import Neighbours, around
from training.engine.schedule import Schedule
from training.launch import guarded
from training.objectives.registry import METHODS
from training.runs import checkpoint, ledger
from training.runs.finished import Run

# In the folder of the run, or of the features.
LABELS, PAGE, SUGGESTIONS = "audit/labels.parquet", "audit/audit.html", "audit/suggest.csv"
NEIGHBOURS = "audit/neighbours.parquet"
EPOCHS = 3  # visits of an image, at least, that are read where no number of cycles is asked for
FOOTER = 1 << 16  # bytes at the end of a part, in which its number of rows is
READERS = 16  # requests to storage at once
READ = ["id", "step", "label", "pseudo_label", "trust", "weight", "confidence", "loss"]


@dataclass(frozen=True)
class Options:
    """Describe what is asked for."""

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")] = ""
    """Folder or URL of a run that has finished."""
    data: str = ""
    """Where the data set is: a local path or any fsspec URL. Of features it may be left out: then there are no
    pictures."""
    features: str = ""
    """Features of the same images, made by pipeline.embed, on which heads are trained and judge."""
    folds: int = 5
    """Of how many heads: each is trained on all rows but its share, which it judges."""
    method: str = "winnow"
    """How the heads are trained: a name of --method."""
    cycles: int = 0
    """How many of the schedule's last cycles to read; 0: as few as hold three visits of every image."""
    suggest: int = 0
    """Images to suggest for a check by a person, as suggest.csv: fill in its column label, then use it as --trusted."""

    def __post_init__(self) -> None:
        for name in ("cycles", "suggest"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be 0 or more")
        if self.folds < 2:
            raise ValueError(f"folds is {self.folds}: it must be 2 or more")
        if self.method not in METHODS:
            raise ValueError(f"method is {self.method!r}: choose one of {', '.join(METHODS)}")


@dataclass(frozen=True)
class Subject:
    """Hold what is audited."""

    folder: str  # of the run, or the features: audit/ is in it
    dataset: Dataset  # of features, where no images are given
    pictures: bool
    about: str  # the network and the evidence, for the page
    features: Embedded | None = None  # of the training images


def audit(options: Options, console: Console | None = None) -> Findings:
    """Write labels.parquet, audit.html and, where asked for, suggest.csv; return the findings in them.

    Raises InputError for what is missing, damaged or does not belong together, most of it before the ledger is read.
    """
    console = console or Console()
    subject, tables, judge = _evidence(options, console)
    dataset = subject.dataset
    trusted_K = np.bincount(dataset.probe.label_N, minlength=len(dataset.class_names))
    findings = Findings(trusted_K, page.PER_CLASS, page.OVERALL, options.suggest)
    write_labels(subject.folder, tables, findings)
    console.print(f"{subject.folder}/{LABELS}: {_summary(findings)}", highlight=False, soft_wrap=True)

    neighbours = around(subject.features) if subject.features else None
    if neighbours:
        write_neighbours(subject.folder, neighbours)
    shown, suggested = page.shown(findings, neighbours), findings.suggested()
    ids = shown + suggested["id"].to_pylist()
    found = census(dataset.train, dataset.probe, np.array(ids, np.int64))
    noisy = found.filter(pc.invert(found["trusted"]))
    row_of = dict(zip(noisy["id"].to_pylist(), noisy["row"].to_pylist(), strict=True))
    if missing := set(ids) - row_of.keys():
        raise InputError(
            f"the evidence of {subject.folder} has id {min(missing)}, which {options.data or 'the data set'} has not: "
            "it is of other images; copy it again, or give their --data"
        )
    rows = {id_: row_of[id_] for id_ in shown}
    write_page(subject, *judge(), findings, found, rows, neighbours)
    console.print(f"{subject.folder}/{PAGE} written", highlight=False, soft_wrap=True)
    if options.suggest:
        names = dataset.train.names(np.array([row_of[id_] for id_ in suggested["id"].to_pylist()]))
        _write(subject.folder, SUGGESTIONS, suggestions(suggested, names, dataset.class_names))
        goes_on = f", and a new run goes on with --start-from {subject.folder}" if options.run else ""
        console.print(
            f"{subject.folder}/{SUGGESTIONS}: {len(suggested):,} images: fill in the column label; pipeline.shards "
            f"custom takes the file as --trusted{goes_on}",
            highlight=False,
            soft_wrap=True,
        )
    return findings


Judge = Callable[[], tuple[np.ndarray, float | None]]  # probabilities of trusted images, M×K; accuracy on the tests


def _evidence(options: Options, console: Console) -> tuple[Subject, Iterator[pa.Table], Judge]:
    """Return what is audited, its rows of `SCHEMA`, table by table, and how trusted images are judged."""
    heads = Folds(options.features, options.folds, options.method) if options.features else None
    if not options.run:
        if heads is None:
            raise InputError("nothing to audit: give the folder of a run, or --features")
        return _of_heads(heads, options.data, console)
    run = Run.open(options.run)
    dataset = run.load(options.data)
    steps = window(run, options.cycles, len(dataset.train))
    parts = whole_parts(run, steps)
    storage.require_writable(run.folder)
    ends = [0, *run.schedule.ends]
    about = (
        f"{run.recipe['network']}; read from steps {steps.start:,} to {steps.stop:,}, "
        f"the last {len(ends) - 1 - ends.index(steps.start)} of {len(ends) - 1} cycles"
    )
    if heads:
        heads.require_same(dataset)
        about += f"; and {heads.told}, both counting alike"
    measured = [commit.top1 for commit in checkpoint.commits(run.folder) if commit.top1 is not None]
    accuracy = measured[-1] if measured else None
    judged = heads.write(console) if heads else []
    tables = reduced(run, steps, parts, judged)
    pictures = not run.model.source.direct
    return (
        Subject(run.folder, dataset, pictures, about, heads.rows if heads else None),
        tables,
        lambda: (run.model.probabilities(dataset.probe), accuracy),
    )


def _of_heads(heads: Folds, data: str, console: Console) -> tuple[Subject, Iterator[pa.Table], Judge]:
    dataset = heads.images(data)
    storage.require_writable(heads.url)
    tables = (reduce_visits(table, len(dataset.class_names)) for table in heads.visits(console))
    return Subject(heads.url, dataset, bool(data), heads.told, heads.rows), tables, heads.trusted


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


def reduced(
    run: Run, steps: range, parts: list[tuple[ledger.Part, int]], judged: Sequence[tuple[str, int]] = ()
) -> Iterator[pa.Table]:
    """Return the rows of `steps` in these parts, reduced to one per id by a Ray Data job, table by table.

    `judged` are files of what heads say of the same ids, with their numbers of rows: both sources count alike, whatever
    the number of their visits.
    """
    tasks: list[list[str]] = [[]]
    held = 0
    for part, count in parts:
        if tasks[-1] and held + count > TASK_ROWS:
            tasks.append([])
            held = 0
        tasks[-1].append(part.path)
        held += count
    made = [pa.table({"path": paths, "heads": [False] * len(paths)}) for paths in tasks]
    made += [pa.table({"path": [path], "heads": [True]}) for path, _ in judged]
    return reduce_by_key(
        made,
        functools.partial(_visits, folder=run.folder, steps=steps, schedule=run.schedule),
        "id",
        sum(count for _, count in [*parts, *judged]),
        functools.partial(_reduce, classes=len(run.model.class_names)),
    )


def _reduce(visits: pa.Table, classes: int) -> pa.Table:
    # Of each source of evidence an id's visits weigh one together.
    id_R, heads_R, settled_R = (visits[name].to_numpy(zero_copy_only=False) for name in ("id", "heads", "settled"))
    _, place_R = np.unique(np.stack([id_R, heads_R]), axis=1, return_inverse=True)
    share_R = settled_R / np.bincount(place_R, settled_R)[place_R]
    rows = visits.drop_columns(["heads", "settled"]).append_column("settled", pa.array(share_R))
    return reduce_visits(rows, classes)


def _visits(task: pa.Table, folder: str, steps: range, schedule: Schedule) -> pa.Table:
    # The rows of some parts, with the weights of their steps.
    fs, _ = storage.connect(folder)
    tables = []
    if task["heads"][0].as_py():
        return folds.read(task["path"][0].as_py())
    for path in task["path"].to_pylist():
        try:
            rows = pq.read_table(pa.BufferReader(storage.read(fs, path)), columns=READ)
        except pa.ArrowException as error:
            raise _damaged(path, error) from None
        tables.append(rows.filter((pc.field("step") >= steps.start) & (pc.field("step") < steps.stop)))
    rows = pa.concat_tables(tables)
    weight = settled(rows["step"].to_numpy(), schedule).astype(np.float32)
    rows = rows.drop_columns("step").append_column("settled", pa.array(weight))
    rows = rows.append_column("heads", pa.array(np.zeros(len(rows), bool)))
    for name in ("label", "pseudo_label"):  # half the bytes to move
        rows = rows.set_column(rows.schema.get_field_index(name), name, rows[name].cast(pa.int32()))
    return rows


def _damaged(path: str, error: Exception) -> InputError:
    return InputError(f"ledger part {path} is damaged ({type(error).__name__}): copy it again")


# ---- what is written -------------------------------------------------------------------------------------------------


def write_labels(folder: str, tables: Iterator[pa.Table], findings: Findings) -> None:
    """Write `tables` as labels.parquet, one by one, and add them to `findings`."""
    fs, path = storage.connect(folder)
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
    subject: Subject,
    probability_MK: np.ndarray,
    accuracy: float | None,
    findings: Findings,
    found: pa.Table,
    rows: dict[int, int],
    neighbours: Neighbours | None,
) -> None:
    """Write audit.html; `found` is the census and `rows` where the images that it shows are, by id."""
    dataset = subject.dataset
    images: dict[int, np.ndarray] = {}
    if subject.pictures:
        held = dataset.train.take(np.array(list(rows.values())))
        images = {id_: held.image(place) for place, id_ in enumerate(rows)}
    torn, torn_images = _torn(subject, found)
    disputed, disputed_images = _disputed(subject, probability_MK)
    report = page.Report(
        name=subject.folder.rstrip("/").rpartition("/")[2],
        about=(
            f"{len(dataset.train):,} images of {len(dataset.class_names)} classes, {len(dataset.probe):,} trusted; "
            f"{subject.about}"
        ),
        class_names=dataset.class_names,
        accuracy=accuracy,
        findings=findings,
        images=images,
        disputed=disputed,
        disputed_images=disputed_images,
        torn=torn,
        torn_images=torn_images,
        neighbours=neighbours,
        map_suspect_P=_suspects(subject.folder, neighbours.map_id_P) if neighbours else None,
    )
    _write(subject.folder, PAGE, page.render(report))


def write_neighbours(folder: str, neighbours: Neighbours) -> None:
    """Write neighbours.parquet."""
    fs, path = storage.connect(folder)
    storage.write_table(fs, storage.join(path, NEIGHBOURS), neighbours.table, "zstd")


def _suspects(folder: str, id_P: np.ndarray) -> np.ndarray:
    # Which of these are suspect, as labels.parquet has it.
    fs, path = storage.connect(storage.join(folder, LABELS))
    rows = pq.read_table(pa.BufferReader(storage.read(fs, path)), columns=["id", "suspect"])
    return np.isin(id_P, rows.filter(rows["suspect"])["id"].to_numpy())


def _disputed(subject: Subject, probability_MK: np.ndarray) -> tuple[list[page.Judged], int]:
    # Of the trusted images to which the judge gives another label, those with the least probable label; how many are.
    probe = subject.dataset.probe
    answer_M = probability_MK.argmax(1)
    own_M = probability_MK[np.arange(len(probe)), probe.label_N]
    rows = np.flatnonzero(answer_M != probe.label_N)
    shown = [
        page.Judged(
            int(probe.id_N[row]),
            probe.image(row) if subject.pictures else None,
            int(probe.label_N[row]),
            int(answer_M[row]),
            float(own_M[row]),
        )
        for row in rows[np.argsort(own_M[rows])][: page.OVERALL]
    ]
    return shown, len(rows)


def _torn(subject: Subject, found: pa.Table) -> tuple[list[tuple[np.ndarray | None, tuple[str, ...]]], int]:
    # Some images that are stored under several labels, with these, and how many there are.
    dataset, torn = subject.dataset, found.filter(found["torn"])
    digests = torn["digest"].unique()
    shown: list[tuple[np.ndarray | None, tuple[str, ...]]] = []
    for digest in digests[: page.OVERALL]:
        group = torn.filter(pc.equal(torn["digest"], digest)).to_pylist()
        split = dataset.probe if group[0]["trusted"] else dataset.train
        labels = sorted({dataset.class_names[row["label"]] for row in group})
        image = split.take(np.array([group[0]["row"]])).image(0) if subject.pictures else None
        shown.append((image, tuple(labels)))
    return shown, len(digests)


def _write(folder: str, name: str, text: str) -> None:
    fs, path = storage.connect(folder)
    storage.write(fs, storage.join(path, name), text.encode())


def _summary(findings: Findings) -> str:
    images, suspects = findings.count_K.sum(), findings.suspect_K.sum()
    return f"{images:,} images, {suspects:,} suspect labels, {findings.wrong_K.sum() / images:.1%} wrong by estimate"


def main() -> None:
    """Run the command line."""
    guarded(lambda: audit(tyro.cli(Options, prog="python -m training.audit", description=__doc__)))
