"""Which of many images are copies of each other, against all pairs compared one by one; no Ray."""

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import near
from pipeline.images import Rejected
from tests.pipeline.layouts import jpeg, scenes


def flipped(words: np.ndarray, bits: np.ndarray) -> np.ndarray:
    """The hash with those of its bits turned; the first 64 are the coarse ones."""
    flat = np.unpackbits(words.view(np.uint8), bitorder="little")
    flat[bits] ^= 1
    return np.packbits(flat, bitorder="little").view(np.uint64)


def hashes(rng: np.random.Generator, count: int, narrow: int) -> np.ndarray:
    """Hashes about as near as the thresholds, many in the same bands: `narrow` coarse bits and 80 fine ones vary."""
    base = rng.integers(0, 2**64, near.WORDS, dtype=np.uint64)
    made = []
    for _ in range(count):
        coarse = rng.choice(64, narrow, replace=False)[: rng.integers(0, narrow + 1)] if narrow else []
        fine = 64 + rng.choice(80, rng.integers(0, 30), replace=False)
        made.append(flipped(base, np.concatenate([coarse, fine]).astype(int)))
    return np.array(made)


def brute(hash_NW: np.ndarray) -> np.ndarray:
    """N×N fine distances, −1 where two are not near."""
    differ = np.bitwise_count(hash_NW[:, None] ^ hash_NW)
    fine = differ[..., 1:].sum(-1, dtype=int)
    return np.where((differ[..., 0] <= near.DISTANCE) & (fine <= near.FINE_DISTANCE), fine, -1)


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**32), count=st.integers(0, 60), narrow=st.integers(0, 12), short=st.sampled_from([1, 4, 256])
)
def test_every_near_pair_is_found_once(seed, count, narrow, short):
    hash_HW = hashes(np.random.default_rng(seed), count, narrow) if count else np.empty((0, near.WORDS), np.uint64)
    patch = pytest.MonkeyPatch()
    with patch.context() as context:
        context.setattr(near, "SHORT", short)  # so that a few hashes are told apart by more bands
        context.setattr(near, "BLOCK", 7)
        blocks = list(near.near_hashes(hash_HW))
    found = [(min(i, j), max(i, j), int(fine)) for block in blocks for i, j, fine in zip(*block, strict=True)]
    distance = brute(hash_HW)
    expected = {(i, j, distance[i, j]) for j in range(count) for i in range(j) if distance[i, j] >= 0}
    assert set(found) == expected
    assert len(found) == len(expected)


@settings(max_examples=60)
@given(seed=st.integers(0, 2**32), count=st.integers(1, 40), narrow=st.integers(0, 8))
def test_each_image_has_its_nearest_copy_in_each_split(seed, count, narrow):
    rng = np.random.default_rng(seed)
    source = hashes(rng, count, narrow)
    image = rng.integers(0, count, 2 * count)  # some twice
    hash_NW, detailed, split = source[image], (rng.random(count) < 0.8)[image], np.sort(rng.integers(0, 3, 2 * count))
    digest = np.where(rng.random(2 * count) < 0.6, image, count + np.arange(2 * count))  # or compressed without change
    row, other, distance, equal = near.nearest_copies(digest, hash_NW, detailed, split)

    between = np.where(detailed[:, None] & detailed, brute(hash_NW), -1)
    same = digest[:, None] == digest
    between[same] = 0
    np.fill_diagonal(between, -1)
    assert (row < other).all()
    assert (between[row, other] == distance).all()
    assert (same[row, other] == equal).all()
    assert len(set(zip(row, other, strict=True))) == len(row) <= 2 * count * 3
    for one in range(2 * count):
        for part in range(3):
            there = between[one][split == part]
            told = [*distance[(row == one) & (split[other] == part)], *distance[(other == one) & (split[row] == part)]]
            assert min(told, default=-1) == min(there[there >= 0], default=-1)


def test_thousands_of_equal_images_make_as_many_pairs():
    count = 20_000
    hash_NW = np.tile(hashes(np.random.default_rng(0), 1, 0), (count, 1))
    split, digest = np.repeat([0, 2], count // 2), np.arange(count)
    digest[::2] = 0
    row, other, distance, equal = near.nearest_copies(digest, hash_NW, np.ones(count, bool), split)
    assert count <= len(row) <= 3 * count
    assert not distance.any()
    assert equal.sum() >= count // 2 - 1
    assert set(row) | set(other) == set(range(count))
    leaks = split[row] != split[other]
    assert set(other[leaks]) == set(range(count // 2, count))
    assert set(row[leaks]) == set(range(count // 2))


def test_nothing_makes_no_pairs():
    for count in (0, 1):
        found = near.nearest_copies(
            np.arange(count), np.zeros((count, near.WORDS), np.uint64), np.zeros(count, bool), np.zeros(count, int)
        )
        assert [len(column) for column in found] == [0] * 4


def is_copy(one: bytes, other: bytes) -> bool:
    first, second = near.perceptual_hash(one), near.perceptual_hash(other)
    return brute(np.array([first, second]))[0, 1] >= 0


def test_copies_are_near_and_other_pictures_are_not():
    pictures = scenes(12)
    stored = [jpeg(picture) for picture in pictures]
    for picture, original in zip(pictures, stored, strict=True):
        for quality in (30, 60, 90):
            assert is_copy(original, cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes())
        for scale in (0.5, 0.25, 2):
            small = cv2.resize(picture, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
            assert is_copy(original, jpeg(small))
        assert is_copy(original, cv2.imencode(".png", picture)[1].tobytes())
    assert not any(is_copy(stored[i], stored[j]) for j in range(12) for i in range(j))


def test_pictures_without_detail_have_no_hash():
    ramp = np.linspace(0, 255, 200)
    y, x = np.mgrid[-1:1:200j, -1:1:200j]
    plain = [
        np.full((200, 200), 120),
        np.tile(ramp, (200, 1)),
        (ramp + ramp[:, None]) / 2,
        255 * np.exp(-(x**2) - y**2),
    ]
    for grey in plain:
        assert near.perceptual_hash(jpeg(np.repeat(grey[..., None], 3, 2).astype(np.uint8))) is None
    with pytest.raises(Rejected):
        near.perceptual_hash(b"<html>404")
