"""How long a million perceptual hashes take to be compared, how much memory, and whether planted copies are found.

    python -m benchmarks.near --hashes 1000000 --out near.json

"random" are hashes without structure; "skewed" share their halves among 5,000, as photographs share parts of theirs, so
that some bands of bits are very common; in "equal" all are one. A thousandth of the first two are copies of others, at
distances up to those that count as near.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import resource
import time
from pathlib import Path

import numpy as np

from pipeline import near

HALVES, SPLITS = 5_000, 3


def hashes(kind: str, count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return hashes (count × W, uint64) and the rows of planted copies, each with the row it is a copy of (P × 2)."""
    hash_NW = rng.integers(0, 2**64, (count, near.WORDS), dtype=np.uint64)
    if kind == "equal":
        hash_NW[:] = hash_NW[0]
        return hash_NW, np.empty((0, 2), np.int64)
    if kind == "skewed":
        half_H = rng.integers(0, 2**32, HALVES, dtype=np.uint64)
        high_N, low_N = half_H[rng.integers(0, HALVES, (2, count))]
        hash_NW[:, 0] = high_N << np.uint64(32) | low_N
    planted_P2 = rng.permutation(count)[: count // 1000 * 2].reshape(-1, 2)
    for copy, original in planted_P2:
        hash_NW[copy] = hash_NW[original]
        for most, first, last in ((near.DISTANCE, 0, 64), (near.FINE_DISTANCE, 64, 64 * near.WORDS)):
            for bit in rng.choice(np.arange(first, last), rng.integers(0, most + 1), replace=False):
                hash_NW[copy, bit // 64] ^= np.uint64(1) << np.uint64(bit % 64)
    return hash_NW, planted_P2


def measure(kind: str, count: int) -> dict[str, object]:
    """Compare `count` hashes of a kind, in this process."""
    rng = np.random.default_rng(0)
    hash_NW, planted_P2 = hashes(kind, count, rng)
    split_N = np.sort(rng.integers(0, SPLITS, count))
    started = time.monotonic()
    left, right, _, _ = near.nearest_copies(np.arange(count), hash_NW, np.ones(count, bool), split_N)
    seconds = time.monotonic() - started
    found = set(zip(left.tolist(), right.tolist(), strict=True))
    return {
        "hashes": kind,
        "count": count,
        "seconds": round(seconds, 1),
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1000,
        "pairs": len(left),
        "planted": len(planted_P2),
        "planted_found": sum((min(pair), max(pair)) in found for pair in planted_P2.tolist()),
    }


def main() -> None:
    """Run the command line; every kind in a process of its own, for its own peak of memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hashes", type=int, default=1_000_000)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rows = []
    for kind in ("random", "skewed", "equal"):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            rows.append(pool.apply(measure, (kind, arguments.hashes)))
        print(rows[-1], flush=True)
    if arguments.out:
        about = {"machine": platform.machine(), "python": platform.python_version(), "numpy": np.__version__}
        arguments.out.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
