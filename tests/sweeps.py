"""Sweeps of which every run takes a part."""

from collections.abc import Iterable

import pytest


def sweep(cases: Iterable, *quick) -> list:
    """`cases` for `pytest.mark.parametrize`; those that are not `quick` run with `-m slow` only."""

    def slow(case):
        values = case if isinstance(case, tuple) else (case,)
        return pytest.param(*values, marks=pytest.mark.slow)

    return [case if case in quick else slow(case) for case in cases]
