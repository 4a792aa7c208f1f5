"""What a ledger shows of each example's label: its visits reduced to one row, and what all rows come to together.

Shapes: R visits (rows of the ledger), N ids, V pairs of an id and a pseudo label it got, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from training.engine.schedule import Schedule

HISTOGRAMS = {"quality": (1.0, 50), "trust": (1.0, 10), "weight": (4.0, 40)}  # upper end and bins; the last is open
SETTLING = 4  # power of the fall of the learning rate: nine tenths of the weight lie in the last third of a cycle
FRESH = 0.001  # weight of a visit at the very start of a cycle, so that an image visited only then has a mean at all

# One row per id: labels.parquet. Means of probability, confidence and pseudo labels weigh visits by `settled`; those of
# ω and λ count all alike.
SCHEMA = pa.schema(
    [
        ("id", pa.int64()),
        ("label", pa.int32()),  # as given
        ("proposed", pa.int32()),  # the agreed pseudo label: the one with the most confidence, summed over visits
        ("quality", pa.float32()),  # how probable it is that `label` is right, 0…1: `quality` of `probability`
        ("suspect", pa.bool_()),  # a quality below ½, and `proposed` is another label
        ("probability", pa.float32()),  # of `label`, according to the network
        ("weight", pa.float32()),  # ω, relative to 1/B
        ("trust", pa.float32()),  # share of the visits with λ = 1, where `label` was believed
        ("confidence", pa.float32()),  # in `proposed`; a visit with another pseudo label had none
        ("stability", pa.float32()),  # share of the visits whose pseudo label it was
        ("visits", pa.int32()),
    ]
)


def settled(step_R: np.ndarray, schedule: Schedule) -> np.ndarray:
    """Return the weights of the visits at these steps, by how far the learning rate of their cycle has fallen.

    A network judges labels best once it has settled; each cycle starts with shaking it up.
    """
    steps, place_R = np.unique(step_R, return_inverse=True)
    top = np.array([schedule.lr * schedule.m_mul ** schedule.cycle(int(step)) for step in steps])
    rate = np.array([schedule.learning_rate(int(step)) for step in steps])
    return (FRESH + (1 - rate / top) ** SETTLING)[place_R]


def quality(probability_N: np.ndarray, classes: int) -> np.ndarray:
    """Return how probable it is that labels are right, 0…1, to which the network gives `probability_N`.

    By Bayes' rule for a judge who knows nothing of the noise: right and wrong labels equally frequent beforehand, and
    wrong ones drawn from the other classes alike. So ½ is what a guess, 1/K, gets.
    """
    return probability_N / (probability_N + (1 - probability_N) / (classes - 1))


def probability(quality_N: np.ndarray, classes: int) -> np.ndarray:
    """Return the probability that has this `quality`: as it stands for a judge that knows the noise."""
    return quality_N / (quality_N + (1 - quality_N) * (classes - 1))


def reduce_visits(visits: pa.Table, classes: int) -> pa.Table:
    """Return a table of SCHEMA with one row per id, in the ids' order, from all visits of those ids, in any order.

    `visits` has the ledger's columns id, label, pseudo_label, trust, weight, confidence, loss, and `settled`.
    """
    order = np.lexsort([visits[name].to_numpy() for name in ("pseudo_label", "id")])
    column = {name: visits[name].to_numpy()[order] for name in visits.column_names}
    id_R, pseudo_R, settled_R = column["id"], column["pseudo_label"], column["settled"].astype(np.float64)
    starts_N = np.flatnonzero(np.diff(id_R, prepend=id_R[:1] - 1))
    visits_N = np.diff(starts_N, append=len(id_R))
    total_N = np.add.reduceat(settled_R, starts_N)

    new_R = np.diff(pseudo_R, prepend=pseudo_R[:1] - 1) != 0
    new_R[starts_N] = True
    starts_V = np.flatnonzero(new_R)
    owner_V = np.searchsorted(starts_N, starts_V, side="right") - 1
    settled_V = np.add.reduceat(settled_R, starts_V)
    votes_V = np.add.reduceat(settled_R * column["confidence"], starts_V)
    most_N = np.maximum.reduceat(votes_V, np.searchsorted(starts_V, starts_N))
    ahead = np.flatnonzero(votes_V == most_N[owner_V])
    won_N = ahead[np.unique(owner_V[ahead], return_index=True)[1]]  # of equals, the lowest label

    probability_N = np.add.reduceat(settled_R * np.exp(-column["loss"].astype(np.float64)), starts_N) / total_N
    label_N, proposed_N = column["label"][starts_N], pseudo_R[starts_V[won_N]]
    quality_N = quality(probability_N, classes)
    columns = {
        "id": id_R[starts_N],
        "label": label_N,
        "proposed": proposed_N,
        "quality": quality_N,
        "suspect": (quality_N < 0.5) & (proposed_N != label_N),
        "probability": probability_N,
        "weight": np.add.reduceat(column["weight"].astype(np.float64), starts_N) / visits_N,
        "trust": np.add.reduceat(column["trust"].astype(np.float64), starts_N) / visits_N,
        "confidence": votes_V[won_N] / total_N,
        "stability": settled_V[won_N] / total_N,
        "visits": visits_N,
    }
    return pa.table([pa.array(columns[field.name]).cast(field.type) for field in SCHEMA], schema=SCHEMA)


@dataclass
class Findings:
    """Hold what many tables of `reduce_visits` come to; they are added one by one, and few of their rows are kept."""

    trusted_K: np.ndarray  # trusted images of each class
    per_class: int  # suspects that are kept of each given label
    overall: int  # images that are kept as the hardest
    suggestions: int  # images that are kept for a person to check

    def __post_init__(self) -> None:
        classes = len(self.trusted_K)
        self.count_K = np.zeros(classes, np.int64)  # images by given label
        self.suspect_K = np.zeros(classes, np.int64)
        self.wrong_K = np.zeros(classes)  # wrong labels, by estimate: the sum of 1 − quality
        self.moved_KK = np.zeros((classes, classes))  # of these, by given and proposed label
        # By column: the suspects' histogram below the others'.
        self.histograms = {name: np.zeros((2, bins), np.int64) for name, (_, bins) in HISTOGRAMS.items()}
        self.visits = 0
        self.suspects = self.hardest = self.unsure = SCHEMA.append(pa.field("key", pa.float64())).empty_table()

    def add(self, table: pa.Table) -> None:
        """Add the rows of `table`."""
        column = {name: table[name].to_numpy() for name in table.column_names}
        label_N, proposed_N, quality_N, suspect_N = (
            column[name] for name in ("label", "proposed", "quality", "suspect")
        )
        classes = len(self.trusted_K)
        self.count_K += np.bincount(label_N, minlength=classes)
        self.suspect_K += np.bincount(label_N[suspect_N], minlength=classes)
        self.wrong_K += np.bincount(label_N, 1 - quality_N, minlength=classes)
        differs_N = proposed_N != label_N
        np.add.at(self.moved_KK, (label_N[differs_N], proposed_N[differs_N]), 1 - quality_N[differs_N])
        for name, (end, bins) in HISTOGRAMS.items():
            value_N = np.minimum(column[name], end)
            for row, of_N in enumerate((suspect_N, ~suspect_N)):
                self.histograms[name][row] += np.histogram(value_N[of_N], bins, (0, end))[0]
        self.visits += int(column["visits"].sum())

        suspects = table.filter(pa.array(suspect_N))
        self.suspects = lowest(self.suspects, suspects, quality_N[suspect_N], self.per_class, "label")
        belief_N = np.maximum(column["probability"], column["confidence"])
        self.hardest = lowest(self.hardest, table, belief_N, self.overall)
        self.unsure = lowest(self.unsure, table, np.abs(quality_N - 0.5), self.suggestions, "proposed")

    def suggested(self) -> pa.Table:
        """Return the images whose check by a person would help most, best first.

        It is worth more the closer quality is to ½, and the fewer images of the class are trusted or chosen already.
        """
        proposed, doubt = self.unsure["proposed"].to_numpy(), 1 - 2 * self.unsure["key"].to_numpy()
        already = np.arange(len(proposed)) - np.searchsorted(proposed, proposed) + self.trusted_K[proposed]
        chosen = np.argsort(-doubt / (1 + already), kind="stable")[: self.suggestions]
        return self.unsure.take(pa.array(chosen))


def lowest(kept: pa.Table, table: pa.Table, key_N: np.ndarray, count: int, of: str | None = None) -> pa.Table:
    """Return the `count` rows of both tables with the lowest keys, of each value of column `of` where one is named.

    They are sorted by `of` and key; the result has the keys as a column. `kept` is such a result.
    """
    both = pa.concat_tables([kept, table.append_column("key", pa.array(key_N.astype(np.float64)))])
    group = both[of].to_numpy() if of else np.zeros(len(both), np.int64)
    order = np.lexsort((both["id"].to_numpy(), both["key"].to_numpy(), group))
    place = np.arange(len(order)) - np.searchsorted(group[order], group[order])
    return both.take(pa.array(order[place < count]))
