"""Write the shards of a data set anew, with the labels and weights that an audited run found: for any trainer.

    python -m training.clean gs://bucket/runs/mine --data gs://bucket/mine --out gs://bucket/mine-clean

The same images in the same shards, with more columns: `label` is the corrected one, what the audit proposes where it
finds the given label of low quality and is confident, else the given one; `given_label` keeps that in any case.
`weight` is the mean ω of the given label, 1 being ordinary; 1 where the label was corrected. `label_quality`, 0…1, is
that of the given label, as cleanlab means it; `pred_probs` (with --predictions), the probability of each class.
Trusted images keep their label, with weight and quality 1; images that the run never met, with weight 1 and no quality.

Killed at any time, the same command goes on.

Shapes: N rows of a shard, K classes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import tyro
from rich.console import Console

from pipeline import command, compute, job, predictions, storage
from pipeline.dataset import HeldOut, InputError
from pipeline.features import Features
from pipeline.index import NAME, SHARD_SCHEMA, Index, Shard, Sharded, Shards, read_index, require_images, write_shard
from pipeline.job import JobProgress, Record
from pipeline.predictions import Predictions
from training.recipe import source_of
from training.runs import recipe_file

LABELS = "audit/labels.parquet"  # in a run's folder: a row an audited id
AUDITED = {
    "id": np.int64,
    "label": np.int32,
    "proposed": np.int32,
    "quality": np.float32,
    "weight": np.float32,
    "confidence": np.float32,
}
CHUNK_ROWS = 1 << 20  # of the audit: 28 MB
LOOK = 16  # shards whose first rows are looked up before all work

SCHEMA = pa.schema(
    [*SHARD_SCHEMA, ("given_label", pa.int32()), ("weight", pa.float32()), ("label_quality", pa.float32())]
)
WITH_PROBABILITIES = SCHEMA.append(pa.field("pred_probs", pa.list_(pa.float32())))


@dataclass(frozen=True)
class Request:
    """Describe what is asked for."""

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """Folder of an audited run, or of audited features: a local path or any fsspec URL."""
    data: str
    """The shards to write anew: those that the run was trained on, or others of the same images."""
    out: str
    """Folder of the new shards: a local path or any fsspec URL."""
    predictions: str = ""
    """Predictions of --data by training.predict with --all-probabilities, for the column pred_probs."""
    quality: float = 0.5
    """A label is corrected where its quality is below this …"""
    confidence: float = 0.5
    """… and the confidence in the proposed one is at least this."""

    def __post_init__(self) -> None:
        for name in ("quality", "confidence"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must lie in 0…1")


@dataclass(frozen=True)
class Audit:
    """Hold an audit, sorted by id, in the object store: a task fetches the chunks that its ids fall in.

    Ids of most data sets are sorted through their shards: then that is one or two. Else a machine holds all of it once,
    whatever the number of its processes.
    """

    rows: int
    digest: str
    first: np.ndarray  # the first id of each chunk
    chunks: list[ray.ObjectRef]  # columns of AUDITED

    def of(self, id_N: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Return which ids the audit knows, and the columns of AUDITED for all of them: zeros where it does not."""
        known_N = np.zeros(len(id_N), bool)
        audited = {name: np.zeros(len(id_N), kind) for name, kind in AUDITED.items()}
        chunk_N = np.searchsorted(self.first, id_N, side="right") - 1
        for chunk in np.unique(chunk_N[chunk_N >= 0]):
            held = ray.get(self.chunks[chunk])
            here = np.flatnonzero(chunk_N == chunk)
            place = np.searchsorted(held["id"], id_N[here], side="right") - 1
            found = held["id"][place] == id_N[here]
            known_N[here[found]] = True
            for name, column_N in audited.items():
                column_N[here[found]] = held[name][place[found]]
        return known_N, audited


def clean(request: Request, console: Console | None = None) -> Index:
    """Return the index of the new shards, made now unless they are there already.

    Raises InputError for what cannot work: no audit, one of other images or labels, predictions of others.
    """
    console = console or Console()
    storage.require_writable(request.out)
    _require_shards(request.run)
    index = read_index(request.data)
    require_images(index, request.data)
    about, starts = _predictions(request, index)
    compute.join()
    audit = read_audit(request.run, len(index.class_names))
    _look_up(audit, index, request)
    chosen = {"quality": request.quality, "confidence": request.confidence}
    made_from = [[shard.sha256 for shard in index.shards], audit.digest, chosen, about and asdict(about)]
    made_of = hashlib.sha256(json.dumps(made_from).encode()).hexdigest()
    if there := job.whole(request.out, made_of):
        console.print(f"{request.out} is whole already", highlight=False, soft_wrap=True)
        return there
    done = job.records(request.out, made_of)
    if done:
        console.print(f"{len(done):,} of {len(index.shards):,} shards are done in {request.out}", highlight=False)
    tasks = [
        pa.table({"shard": [json.dumps(asdict(shard))], "start": [start]})
        for shard, start in zip(index.shards, starts, strict=True)
        if shard.name not in done
    ]
    _make(tasks, done, (request, audit, about, index.row_group, made_of), index, console)
    found, changed = (sum(record[name] for record in done.values()) for name in ("found", "corrected"))
    if found < audit.rows:
        raise InputError(
            f"{request.run}/{LABELS} has {audit.rows - found:,} ids that are not in {request.data}: "
            "give the shards that the run was trained on"
        )
    shards = job.shards_of((shard.name for shard in index.shards), done)
    options = {**index.options, "cleaned": chosen}
    cleaned = replace(index, made_of=made_of, shards=shards, rejected=0, options=options)
    job.seal(request.out, cleaned)
    text = f"{changed:,} of {index.count('train'):,} training labels are corrected"
    console.print(f"{request.out}: {text}", highlight=False, soft_wrap=True)
    return cleaned


def read_audit(run: str, classes: int) -> Audit:
    """Return the audit of a run. Raises InputError where there is none, or none that can be used."""
    url = storage.join(run, LABELS)
    table = _audited(run, url)
    order = np.argsort(table["id"].to_numpy())
    column = {name: table[name].to_numpy()[order].astype(kind) for name, kind in AUDITED.items()}
    if not len(table) or (np.diff(column["id"]) == 0).any():
        raise InputError(f"{url} has {'an id twice' if len(table) else 'no rows'}: audit the run again")
    for name in ("label", "proposed"):
        if not 0 <= column[name].min() <= column[name].max() < classes:
            raise InputError(f"{url} has a {name} outside 0…{classes - 1}: give the shards that the run was trained on")
    digest = hashlib.sha256()
    for values in column.values():
        digest.update(values)
    chunks = [slice(start, start + CHUNK_ROWS) for start in range(0, len(table), CHUNK_ROWS)]
    refs = [ray.put({name: values[chunk] for name, values in column.items()}) for chunk in chunks]
    return Audit(len(table), digest.hexdigest(), column["id"][::CHUNK_ROWS].copy(), refs)


def _audited(run: str, url: str) -> pa.Table:
    fs, path = storage.connect(url)
    try:
        with storage.attempt(fs, path, lambda: fs.open(path, "rb")) as file:
            table = pq.ParquetFile(file).read(list(AUDITED))
    except FileNotFoundError:
        raise InputError(f"no {LABELS} in {run}: make it first, python -m training.audit {run}") from None
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{url} cannot be read ({type(error).__name__}): audit the run again") from None
    if missing := [name for name in AUDITED if name not in table.column_names]:
        raise InputError(f"{url} has no column {', '.join(missing)}: audit the run again")
    return table


def clean_shard(
    task: pa.Table, request: Request, audit: Audit, about: Predictions | None, row_group: int, made_of: str
) -> pa.Table:
    """Write one shard anew; returns its record: how many ids the audit knows, and how many labels were corrected."""
    shard = Shard.of(json.loads(task["shard"][0].as_py()))
    table = Shards(request.data, (shard,), row_group).table(np.arange(shard.rows), SHARD_SCHEMA.names)
    id_N, given_N = table["id"].to_numpy(), table["label"].to_numpy()
    trusted_N = table["trusted"].to_numpy()
    found_N, audited = audit.of(id_N)
    known_N = found_N & ~trusted_N  # an image may have become trusted since: its label is a person's now
    _require_same_labels(id_N, given_N, known_N, audited, request)
    label_N, weight_N = corrected(given_N, known_N, audited, request.quality, request.confidence)
    columns = {name: table[name] for name in SHARD_SCHEMA.names} | {
        "label": label_N,
        "given_label": given_N,
        "weight": weight_N,
        "label_quality": pa.array(np.where(known_N, audited["quality"], 1), mask=~known_N & ~trusted_N),
    }
    if about:
        columns["pred_probs"] = _probabilities(request.predictions, about, task["start"][0].as_py(), id_N)
    record = {
        "name": shard.name,
        "made_of": made_of,
        "listed": shard.rows,
        "found": int(found_N.sum()),
        "corrected": int((label_N != given_N).sum()),
    }
    schema = WITH_PROBABILITIES if about else SCHEMA
    rows, classes = pa.table(columns).to_pylist(), len(shard.per_class)
    return job.put(request.out, record, lambda path: write_shard(path, rows, classes, schema))


def corrected(
    given_N: np.ndarray, known_N: np.ndarray, audited: Mapping[str, np.ndarray], quality: float, confidence: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return labels (int32) and weights (float32) of N rows, of which the audit knows some.

    `audited` has the columns of AUDITED.

    The weight was measured on the given label, so that a corrected one has the weight of an ordinary example.
    """
    doubted_N = known_N & (audited["quality"] < quality) & (audited["confidence"] >= confidence)
    label_N = np.where(doubted_N, audited["proposed"], given_N).astype(np.int32)
    weight_N = np.where(known_N & (label_N == given_N), audited["weight"], 1).astype(np.float32)
    return label_N, weight_N


def _make(
    tasks: list[pa.Table], done: dict[str, Record], arguments: Sequence[Any], index: Index, console: Console
) -> None:
    """Make the shards of `tasks`, and add their records to those that are `done`."""
    if not tasks:
        return
    before, count = (sum(record[name] for record in done.values()) for name in ("listed", "corrected"))
    with JobProgress(sum(shard.rows for shard in index.shards), before, console) as progress:
        for record in job.make(tasks, clean_shard, arguments):
            done[record["name"]] = record
            count += record["corrected"]
            progress.advance(record["listed"], f"{count:,} labels corrected")


def _require_shards(run: str) -> None:
    """Raise InputError where the run's data set is read whole, without shards. Features are of shards."""
    fs, path = storage.connect(run)
    if storage.exists(fs, storage.join(path, NAME)):  # a folder of features, with an audit of its own
        return
    source = source_of(recipe_file.read(run)["dataset"])
    source = source.source if isinstance(source, HeldOut) else source  # a sweep's trial
    if not isinstance(source, (Sharded, Features)):
        raise InputError(
            f"{run} was trained on {type(source).__name__}, which has no shards to write anew: "
            f"its audited labels are in {storage.join(run, LABELS)}"
        )


def _look_up(audit: Audit, index: Index, request: Request) -> None:
    """Raise InputError where the first rows of some shards show that the audit is of other images or labels."""
    none_known = True
    for shard in [shard for shard in index.shards if shard.split == "train"][:LOOK]:
        rows = np.arange(min(shard.rows, index.row_group))
        table = Shards(request.data, (shard,), index.row_group).table(rows, ("id", "label"))
        id_N = table["id"].to_numpy()
        known_N, audited = audit.of(id_N)
        _require_same_labels(id_N, table["label"].to_numpy(), known_N, audited, request)
        none_known &= not known_N.any()
    if none_known:
        raise InputError(
            f"{request.run}/{LABELS} knows none of the images of {request.data}: "
            "give the shards that the run was trained on"
        )


def _require_same_labels(
    id_N: np.ndarray, given_N: np.ndarray, known_N: np.ndarray, audited: Mapping[str, np.ndarray], request: Request
) -> None:
    other = np.flatnonzero(known_N & (audited["label"] != given_N))
    if len(other):
        row = other[0]
        raise InputError(
            f"image {id_N[row]} has label {given_N[row]} in {request.data} and had {audited['label'][row]} in "
            f"{request.run}: give the shards that the run was trained on"
        )


# ---- predictions -----------------------------------------------------------------------------------------------------


def _predictions(request: Request, index: Index) -> tuple[Predictions | None, list[int]]:
    """Return what the predictions are of, if any, and where each shard's first row is in them; −1 where it is not."""
    url = request.predictions
    if not url:
        return None, [-1] * len(index.shards)
    again = f"python -m training.predict {request.run} {request.data} --all-probabilities --out {url}"
    try:
        about = predictions.read(url)
    except FileNotFoundError:
        raise InputError(f"no predictions in {url}: make them first, {again}") from None
    if not about.all_probabilities:
        raise InputError(f"{url} has the probabilities of the top classes only: predict again with --all-probabilities")
    inside = [about.split in ("", shard.split) for shard in index.shards]
    predicted = tuple(shard for shard, is_in in zip(index.shards, inside, strict=True) if is_in)
    if Shards(request.data, predicted, index.row_group).digest != about.data_set:
        raise InputError(f"{url} are predictions of other images than {request.data}: predict these, to another folder")
    if missing := predictions.missing(url, about):
        raise InputError(f"{len(missing):,} parts of {url} are not made yet: {again}")
    end = np.cumsum([shard.rows if is_in else 0 for shard, is_in in zip(index.shards, inside, strict=True)]).tolist()
    starts = [
        place - shard.rows if is_in else -1 for shard, is_in, place in zip(index.shards, inside, end, strict=True)
    ]
    return about, starts


def _probabilities(url: str, about: Predictions, start: int, id_N: np.ndarray) -> pa.Array:
    # Of the rows of a shard, whose first is row `start` of the predictions.
    if start < 0:
        return pa.nulls(len(id_N), pa.list_(pa.float32()))
    table = predictions.read_rows(url, about, range(start, start + len(id_N)), ("id", "pred_probs"))
    if not np.array_equal(table["id"].to_numpy(), id_N):
        raise InputError(f"{url} are predictions of other images: predict these, to another folder")
    return table["pred_probs"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    description = (__doc__ or "").partition("\n\nShapes")[0]
    request = tyro.cli(Request, args=arguments, prog="python -m training.clean", description=description)

    def work() -> None:
        clean(request)

    command.guarded(work)


if __name__ == "__main__":
    main()
