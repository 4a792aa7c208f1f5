"""Copies among images, PURE: what is told of one image by itself, and which of many are copies of each other.

Two images are near where their hashes differ in few bits, by the signs of a discrete cosine transform (pHash): 64
bits, by which candidates are found, and 256 bits of finer detail, which confirm them. 64 bits alone are too few: shirts
on one wall agree in them as well as two copies of one photograph. docs/own-data.md says how well both tell them apart.

Shapes: N images, H different hashes, W words of 64 bits, S splits, G groups.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import cv2
import numpy as np

from pipeline.images import read_image

SIDE = 64  # px: to what the shorter side is shrunk first, cheaply, while a JPEG is decoded
GRID = 32  # px: both sides of what is transformed, grey
COARSE, FINE = 8, 16  # cosines each way, of the lowest frequencies: 64 and 256 bits
WORDS = 1 + FINE * FINE // 64  # of a hash: the coarse bits, then the fine ones
DETAIL = 4.0  # grey levels that half of the coarse cosines must exceed; 6.7 does in 99.9 % of ImageNet's photographs

DISTANCE = 8  # bits of 64 in which candidates may differ; always an even number: half of the bits are ones
FINE_DISTANCE = 40  # bits of 256 in which copies may differ. The nearest other photographs differ in 46

# Hashes that differ in 8 bits agree in at least 2 of 10 bands.
BANDS = np.linspace(0, 64, DISTANCE + 3).astype(int)  # where bands of bits begin, and 64
SHORT = 256  # hashes that agree so far and are compared with each other, rather than told apart by one more band
ROW_BITS = 40  # of a number that holds a distance above a row
ROW = (1 << ROW_BITS) - 1
NONE = 1 << 62  # more than any such number
BLOCK = 1 << 15  # hashes compared at once: they fit into a core's cache


def digest(encoded: bytes) -> int:
    """Return 64 bits that are equal for equal bytes; two of 10⁸ different images agree with probability 3·10⁻⁴."""
    return int.from_bytes(hashlib.blake2b(encoded, digest_size=8).digest(), "little", signed=True)


def perceptual_hash(encoded: bytes) -> np.ndarray | None:
    """Return the hash of a raw image, W uint64; None where it has too little detail to tell it from others.

    Flat colours and smooth gradients have few cosines that are not zero; the signs of the others are noise, and equal
    for all such images. Raises Rejected for what cannot be decoded. Not for threads, as `read_image`.
    """
    # OpenCV's transform, which is a dependency already: ImageHash, whose hash found the same copies to within 0.1 %,
    # would bring PyWavelets; OpenCV's img_hash is in a package that excludes the one we use.
    grey = cv2.cvtColor(read_image(encoded, SIDE), cv2.COLOR_RGB2GRAY)
    cosines = cv2.dct(cv2.resize(grey, (GRID, GRID), interpolation=cv2.INTER_AREA).astype(np.float32))
    coarse, fine = cosines[:COARSE, :COARSE], cosines[:FINE, :FINE]
    if np.median(np.abs(coarse)) < DETAIL:
        return None
    bits = np.concatenate([(part > np.median(part)).ravel() for part in (coarse, fine)])
    return np.packbits(bits).view(np.uint64)


def nearest_copies(
    digest_N: np.ndarray, hash_NW: np.ndarray, hashed_N: np.ndarray, split_N: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return P pairs of copies, at most N times S: each image with its nearest copy in each split, where there is one.

    Four arrays: rows, higher rows, fine bits that differ, and whether the bytes are equal. Of images with equal bytes,
    or equal hashes, in one split the first stands for all, so that a thousand copies are a thousand pairs, not half a
    million. `split_N` holds numbers below S; rows without `hashed_N` are copies only of what has their bytes.
    """
    splits = int(split_N.max(initial=0)) + 1
    byte_N = np.unique(digest_N, return_inverse=True)[1]
    hashed = np.flatnonzero(hashed_N)  # rows
    hash_HW, number = np.unique(hash_NW[hashed], axis=0, return_inverse=True)
    same_bytes_GS = _first(byte_N, split_N, np.arange(len(split_N)), splits)
    same_hash_HS = _first(number.reshape(-1), split_N[hashed], hashed, splits)
    near_HS = _nearest_hash(hash_HW, same_hash_HS >= 0)
    found = [np.empty((0, 4), np.int64)]
    for split in range(splits):
        partner_N, distance_N = same_bytes_GS[byte_N, split], np.zeros(len(split_N), np.int64)
        partner_N[partner_N == np.arange(len(split_N))] = -1
        equal_N = partner_N >= 0
        near = near_HS[number.reshape(-1), split]
        for partner, distance in (
            (same_hash_HS[number.reshape(-1), split], 0),
            (np.where(near < NONE, same_hash_HS[near & ROW, split], -1), near >> ROW_BITS),
        ):
            new = (partner_N[hashed] < 0) & (partner >= 0) & (partner != hashed)
            partner_N[hashed[new]] = partner[new]
            distance_N[hashed[new]] = np.broadcast_to(distance, new.shape)[new]
        row = np.flatnonzero(partner_N >= 0)
        partner = partner_N[row]
        ends = (np.minimum(row, partner), np.maximum(row, partner))
        found.append(np.stack([*ends, distance_N[row], equal_N[row]], axis=1))
    left, right, distance, equal = np.unique(np.concatenate(found), axis=0).T
    return left, right, distance, equal.astype(bool)


def _first(group_N: np.ndarray, split_N: np.ndarray, row_N: np.ndarray, splits: int) -> np.ndarray:
    # The first row of each group in each split; −1 where there is none.
    first_GS = np.full((int(group_N.max(initial=-1)) + 1, splits), -1)
    first_GS[group_N[::-1], split_N[::-1]] = row_N[::-1]  # the last one written stays
    return first_GS


def _nearest_hash(hash_HW: np.ndarray, present_HS: np.ndarray) -> np.ndarray:
    # The fine distance and the number of each hash's nearest other hash that has an image in the split, or NONE.
    nearest_HS = np.full(present_HS.shape, NONE)
    for left, right, fine in near_hashes(hash_HW):
        for one, other in ((left, right), (right, left)):
            for split in range(present_HS.shape[1]):
                there = present_HS[other, split]
                np.minimum.at(nearest_HS[:, split], one[there], fine[there] << ROW_BITS | other[there])
    return nearest_HS


def near_hashes(hash_HW: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield every pair of near hashes once, block by block: rows, other rows, and the fine bits in which they differ.

    Exact: a pair with at most DISTANCE coarse bits of difference agrees in some band. Each band in turn is taken for
    the first in which it does: hashes are sorted by it into runs, and long runs by one band more, of those behind it.
    For each band that was passed over one bit fewer may differ in the rest.
    """
    row_H = np.arange(len(hash_HW))
    for row, other in _search(hash_HW[:, 0], row_H, np.zeros_like(row_H), 0, DISTANCE, []):
        fine = np.bitwise_count(hash_HW[row, 1:] ^ hash_HW[other, 1:]).sum(1, dtype=np.int64)
        near = fine <= FINE_DISTANCE
        yield row[near], other[near], fine[near]


def _search(
    coarse_H: np.ndarray, row_H: np.ndarray, run_H: np.ndarray, band: int, budget: int, passed: list[int]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    # Pairs of one run that differ in all bands `passed`, and, from `band` on, in no more bits than `budget`, which are
    # fewer than the bands left.
    for first in range(band, band + budget + 1):
        apart, left = [*passed, *range(band, first)], budget - (first - band)
        key_H = run_H << (BANDS[first + 1] - BANDS[first]) | _bits(coarse_H, first).astype(np.int64)
        order_H = np.argsort(key_H)
        start_R = np.flatnonzero(np.diff(key_H[order_H], prepend=-1))
        size_R = np.diff(start_R, append=len(key_H))
        # Where the rest may differ in all bands left, none of these tells any more pairs apart.
        deeper_R = (size_R > SHORT) & (len(BANDS) - 2 - first > left)
        for chosen_R, deeper in ((~deeper_R & (size_R > 1), False), (deeper_R, True)):
            order = order_H[np.repeat(chosen_R, size_R)]
            coarse, row, size = coarse_H[order], row_H[order], size_R[chosen_R]
            run = np.repeat(np.arange(len(size)), size)
            if deeper and len(size):
                yield from _search(coarse, row, run, first + 1, left, apart)
            elif len(size):
                yield from _compare(coarse, row, run, size, apart)


def _bits(coarse_H: np.ndarray, band: int) -> np.ndarray:
    return (coarse_H & _mask(band)) >> np.uint64(BANDS[band])


def _mask(band: int) -> np.uint64:
    return np.uint64((1 << int(BANDS[band + 1])) - (1 << int(BANDS[band])))


def _compare(
    coarse_H: np.ndarray, row_H: np.ndarray, run_H: np.ndarray, size_R: np.ndarray, apart: list[int]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    # Pairs of one run that are near, and differ in all bands `apart`. Each hash is compared with those behind it, as
    # far as the longest run of the block reaches: straight through memory, which is faster than to spare the others.
    masks = [_mask(band) for band in apart]
    for start in range(0, len(coarse_H), BLOCK):
        here = coarse_H[start : start + BLOCK]
        longest = int(size_R[run_H[start] : run_H[start + len(here) - 1] + 1].max())
        for step in range(1, min(longest, len(coarse_H) - start)):
            differ = here[: len(coarse_H) - start - step] ^ coarse_H[start + step : start + step + BLOCK]
            hit = (np.bitwise_count(differ) <= DISTANCE).nonzero()[0]
            if not len(hit):
                continue
            differ = differ[hit]
            for mask in masks:
                if len(hit):
                    kept = (differ & mask).nonzero()[0]
                    differ, hit = differ[kept], hit[kept]
            hit += start
            hit = hit[run_H[hit] == run_H[hit + step]]
            if len(hit):
                yield row_H[hit], row_H[hit + step]
