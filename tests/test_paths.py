from __future__ import annotations

import itertools
import math

import pytest
import torch

from pathnet import paths


@pytest.mark.parametrize(("n", "length"), [(1, 0), (1, 1), (7, 3), (54, 0), (54, 11), (54, 54)])
def test_a_sample_has_its_length_and_shape(n: int, length: int) -> None:
    codes = paths.sample(n, length, count=20, seed=3)
    assert codes.shape == (20, n) and codes.dtype == torch.uint8
    assert (codes.sum(1) == length).all()


def test_draws_depend_on_seed_row_and_length_alone() -> None:
    whole = paths.sample(54, 11, count=50, seed=7)
    assert torch.equal(whole[:20], paths.sample(54, 11, count=20, seed=7))
    assert torch.equal(whole[20:], paths.sample(54, 11, count=30, seed=7, first=20))
    assert not torch.equal(whole, paths.sample(54, 11, count=50, seed=8))
    plan = paths.one_of_each_length(54, seed=7, batch=31)
    assert torch.equal(plan[10], whole[31])
    assert plan.sum(1).tolist() == list(range(1, 55))


def test_every_path_of_a_length_is_equally_likely() -> None:
    codes = paths.sample(5, 2, count=4000, seed=1)
    counts = torch.bincount((codes * (2 ** torch.arange(5))).sum(1), minlength=32)
    drawn = counts[counts > 0]
    assert len(drawn) == math.comb(5, 2)
    chi_squared = ((drawn - 400) ** 2 / 400).sum()
    assert chi_squared < 27.9  # the 0.1 % quantile of 9 degrees of freedom


def test_all_paths_are_listed_once() -> None:
    codes = paths.enumerate_all(6)
    assert {tuple(code) for code in codes.tolist()} == set(itertools.product((0, 1), repeat=6))
    assert len(codes) == 64


def test_lengths_of_the_54_block_network() -> None:
    shares = paths.length_distribution(54)
    assert shares.sum() == 1
    assert shares[19:36].sum() > 0.95
    assert round(float(shares[5:18].sum()) * 100, 2) == 0.45


def test_equation_8_counts_the_paths_that_avoid_the_deleted_blocks() -> None:
    n, deleted = 6, 2
    codes = paths.enumerate_all(n)
    left = codes[(codes[:, :deleted] == 0).all(1)].sum(1)
    expected = torch.bincount(left, minlength=n + 1) / torch.bincount(codes.sum(1).long(), minlength=n + 1)
    torch.testing.assert_close(paths.remaining_fraction(n, deleted), expected.double())


def test_routing_of_a_path() -> None:
    assert paths.routing(torch.tensor([[0, 1]], dtype=torch.uint8)).tolist() == [[[1, 0], [0, 1]]]


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: paths.sample(0, 0, 1), "n"),
        (lambda: paths.sample(5, 6, 1), "length"),
        (lambda: paths.sample(5, -1, 1), "length"),
        (lambda: paths.sample(5, 2, -1), "count"),
        (lambda: paths.sample(5, 2, 1, seed=-1), "seed"),
        (lambda: paths.enumerate_all(21), "n"),
        (lambda: paths.length_distribution(0), "n"),
        (lambda: paths.remaining_fraction(5, 6), "deleted"),
    ],
)
def test_bad_input_is_named(call: object, name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}"):
        call()  # type: ignore[operator]
