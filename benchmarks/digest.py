"""Reduce finished runs to digests, which are equal where the runs are equal to the bit.

    make demo && python -m benchmarks.digest runs/digits-supervised runs/digits

Prints a line a run: the SHA-256 of the model's tensors, of the ledger's rows by step and id, and of the history without
its timings. Two versions of the code that give the same three compute the same.
"""

from __future__ import annotations

import hashlib
import json
import sys

import numpy as np
from safetensors.torch import load

from pipeline import storage
from training.runs import checkpoint, ledger, model_file

TIMINGS = ("images_per_second", "waiting_for_data")


def digests(folder: str) -> dict[str, str]:
    """Return the digests of the run in `folder`: of its `model`, `ledger` and `history`."""
    weights = load(storage.read(*storage.connect(storage.join(folder, model_file.NAME))))
    rows = ledger.read(folder)
    order = np.lexsort((rows["id"].to_numpy(), rows["step"].to_numpy()))
    saved = checkpoint.latest(folder, warn=print)
    if saved is None:
        raise FileNotFoundError(f"{folder} has no checkpoint: give the folder of a finished run")
    history = [{name: value for name, value in row.items() if name not in TIMINGS} for row in saved["history"]]
    return {
        "model": _sha256(*(part for name in sorted(weights) for part in (name, weights[name].numpy()))),
        "ledger": _sha256(*(part for name in rows.column_names for part in (name, rows[name].to_numpy()[order]))),
        "history": _sha256(json.dumps(history)),
    }


def _sha256(*parts: str | np.ndarray) -> str:
    total = hashlib.sha256()
    for part in parts:
        total.update(part.encode() if isinstance(part, str) else part.tobytes())
    return total.hexdigest()


if __name__ == "__main__":
    for folder in sys.argv[1:]:
        print(folder, *(f"{name} {digest[:16]}" for name, digest in digests(folder).items()))
