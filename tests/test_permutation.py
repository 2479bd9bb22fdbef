"""The keyed permutation: a bijection, spread evenly, the same on every machine."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.data.permutation import Permutation, derive_key


def mix(z: int) -> int:
    """The finaliser of SplitMix64."""
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


def reference(size: int, key: int, position: int) -> int:
    """The same permutation in plain Python integers."""
    encoded = b"str 6:rounds" + b"int %d:%d" % (len(str(key)), key)
    start = int.from_bytes(hashlib.blake2b(encoded, digest_size=8).digest(), "little")
    keys = [mix((start + i * 0x9E3779B97F4A7C15) % 2**64) for i in range(1, 13)]
    bits = (size - 1).bit_length()
    while True:
        widths = [bits // 2, bits - bits // 2]
        left, right = position >> widths[1], position & ((1 << widths[1]) - 1)
        for round_key in keys:
            mixed = mix((right + round_key) % 2**64)
            left, right = right, left ^ (mixed & ((1 << widths[0]) - 1))
            widths.reverse()
        position = (left << widths[1]) | right
        if position < size:
            return position


def chi_square(counts: np.ndarray) -> float:
    """Chi-square against uniform, as standard deviations above its mean."""
    expected = counts.sum() / counts.size
    degrees = counts.size - 1
    statistic = ((counts - expected) ** 2 / expected).sum()
    return (statistic - degrees) / np.sqrt(2 * degrees)


def test_is_a_bijection_of_every_small_size():
    for size in range(1, 5001):
        images = Permutation(size, size - 300)(np.arange(size))
        assert np.array_equal(np.sort(images), np.arange(size)), size


@settings(max_examples=10, deadline=None)
@given(st.integers(601, 200_000), st.integers(0, 2**64 - 1))
def test_is_a_bijection_of_larger_sizes(size, key):
    images = Permutation(size, key)(np.arange(size))
    assert np.array_equal(np.sort(images), np.arange(size))


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 2**62), st.integers(0, 2**64 - 1), st.integers(0, 2**62))
def test_agrees_with_plain_integers_at_any_size(size, key, position):
    position %= size
    assert int(Permutation(size, key)(position)) == reference(size, key, position)


@settings(max_examples=30, deadline=None)
@given(st.integers(10**4, 10**13), st.integers(0, 2**64 - 1), st.integers(0, 2**32))
def test_huge_sizes_stay_in_range_without_collision(size, key, start):
    positions = (start + np.arange(5000)) % size
    images = Permutation(size, key)(positions)
    assert images.min() >= 0
    assert images.max() < size
    assert len(np.unique(images)) == len(np.unique(positions))


def test_golden_values():
    assert Permutation(10, 42)(np.arange(10)).tolist() == [6, 8, 4, 3, 7, 2, 1, 0, 5, 9]
    assert Permutation(10**13, 42)(np.arange(3)).tolist() == [
        8216518602384,
        3419851930413,
        5536146996136,
    ]
    assert derive_key(42, "order", 7) == 16510698902648946545


def test_keys_depend_on_every_part_its_type_and_its_borders():
    parts = [(1, 2), (12,), ("1", 2), ("12",), ("1", "2"), (2, 1), ("", "12"), ("12", ""), (-1, 2)]
    assert len({derive_key(*p) for p in parts}) == len(parts)


def test_other_keys_give_other_orders():
    orders = {tuple(Permutation(1000, key)(np.arange(1000)).tolist()) for key in range(200)}
    assert len(orders) == 200


@pytest.mark.parametrize("size", [16, 37, 1024])
def test_the_place_of_an_element_is_uniform_over_keys(size):
    images = np.array([Permutation(size, key)(np.array([0, 1, size - 1])) for key in range(2000)])
    bins = min(size, 64)  # each as wide as the others
    for column in images.T:
        assert chi_square(np.bincount(column * bins // size, minlength=bins)) < 5


def test_neighbours_are_independent_over_keys():
    size = 8
    pairs = np.array([Permutation(size, key)(np.array([3, 4])) for key in range(4000)])
    counts = np.bincount(pairs[:, 0] * size + pairs[:, 1], minlength=size * size)
    off_diagonal = counts.reshape(size, size)[~np.eye(size, dtype=bool)]
    assert counts.reshape(size, size).trace() == 0
    assert chi_square(off_diagonal) < 5


def test_one_order_is_spread_evenly_and_leaves_few_in_place():
    size = 1_000_003
    images = Permutation(size, 1)(np.arange(size))
    first_tenth = images[: size // 10]
    assert chi_square(np.bincount(first_tenth * 1000 // size, minlength=1000)) < 5
    assert np.count_nonzero(images == np.arange(size)) < 10


@pytest.mark.parametrize("size", [4096, 100_003, 2**20 + 1])
def test_one_order_has_no_serial_correlation(size):
    images = Permutation(size, 7)(np.arange(size))
    centred = images - (size - 1) / 2
    variance = (size**2 - 1) / 12
    for lag in (1, 2, 3, 7, 64, 1024):
        correlation = (centred[:-lag] * centred[lag:]).mean() / variance
        # Of a random order: mean -1 / size, standard deviation 1 / sqrt(size).
        assert abs(correlation) < 4.5 / size**0.5, lag
    # Pairs of neighbours fill the cells of a 16 x 16 grid evenly (chi-square, 255 degrees).
    cells = images * 16 // size
    counts = np.bincount(cells[:-1:2] * 16 + cells[1::2][: len(cells[:-1:2])], minlength=256)
    expected = counts.sum() / 256
    assert 160 < ((counts - expected) ** 2 / expected).sum() < 375  # 1e-5 on either side
    rises = (np.diff(images) > 0).mean()
    assert abs(rises - 0.5) < 4.5 * (1 / 12 / size) ** 0.5


def test_positions_keep_their_shape_and_any_integer_type_is_taken():
    permutation = Permutation(100, 3)
    grid = np.arange(100, dtype=np.uint64).reshape(4, 25)
    assert permutation(grid).shape == (4, 25)
    assert permutation(grid).dtype == np.int64
    assert np.array_equal(permutation(grid).ravel(), permutation(np.arange(100, dtype=np.int32)))
    assert permutation(np.array([], np.int64)).shape == (0,)
    assert grid[0, 0] == 0  # the argument is not changed


@pytest.mark.parametrize("position", [-1, 100, 2**62])
def test_positions_outside_are_refused(position):
    with pytest.raises(ValueError, match="outside range"):
        Permutation(100, 3)(np.array([position]))


@pytest.mark.parametrize("size", [0, -1, 2**62 + 1])
def test_sizes_outside_are_refused(size):
    with pytest.raises(ValueError, match="1 to 2"):
        Permutation(size, 3)
