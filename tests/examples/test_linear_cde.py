"""The example: its languages, what its structures can hold, and a trial run of the whole script."""

import numpy as np
import pytest
from scripts import load_example


@pytest.fixture(scope="module")
def example():
    return load_example("linear_cde")


@pytest.mark.parametrize("name, size", [("parity", 2), ("A5", 60)])
def test_the_table_is_a_group_generated_by_its_two_tokens(example, name, size):
    table, tokens = example.group(name)
    assert table.shape == (size, size)
    np.testing.assert_array_equal(table[0], np.arange(size))  # 0 is the identity
    assert all(len(set(row)) == size for row in [*table, *table.T])
    a, b, c = np.random.default_rng(0).integers(0, size, (3, 100))
    np.testing.assert_array_equal(table[table[a, b], c], table[a, table[b, c]])
    reached = {0}
    while len(reached | {int(table[t, r]) for t in tokens for r in reached}) > len(reached):
        reached |= {int(table[t, r]) for t in tokens for r in reached}
    assert len(reached) == size


def test_the_answers_are_those_of_permutations(example):
    tokens, products = example.words("A5", 5, 12, seed=3)
    cycles = np.array([[1, 2, 0, 3, 4], [1, 2, 3, 4, 0]])
    seen = {}
    for word, answers in zip(np.argmax(tokens, axis=-1), np.asarray(products), strict=True):
        state = np.arange(5)
        for token, answer in zip(word, answers, strict=True):
            state = cycles[token][state]
            assert seen.setdefault(int(answer), tuple(state)) == tuple(state)
    assert len(set(seen.values())) == len(seen) > 10


def worst(example, model):
    """The worst accuracy up to four times the training length, by seed."""
    return example.train("parity", *example.MODELS[model], steps=400, seeds=3).min(axis=1)


@pytest.mark.slow
def test_blocks_hold_parity_at_four_times_the_length_and_a_diagonal_does_not(example):
    assert worst(example, "block 4, orthogonal").min() > 0.95
    assert worst(example, "diagonal, exponential").max() < 0.7


@pytest.mark.slow
@pytest.mark.parametrize("model", ["block 2, orthogonal", "diagonal, first order"])
def test_most_runs_with_small_turns_or_signs_hold_parity(example, model):
    assert np.median(worst(example, model)) > 0.95


def test_a_trial_run_reports_every_model_and_writes_nothing(example, tmp_path, monkeypatch, capsys):
    one = "block 2, first order"
    monkeypatch.setattr(example, "MODELS", {one: example.MODELS[one]})
    monkeypatch.chdir(tmp_path)
    results = example.main(steps=2, plot=False, seeds=1)
    assert list(results) == [(name, model) for name in example.CLASSES for model in example.MODELS]
    assert not list(tmp_path.iterdir())
    lines = capsys.readouterr().out.splitlines()
    for (name, model), row in results.items():
        line = next(line for line in lines if line.startswith(f"{name}, {model}"))
        assert f"{row['short']:.3f}" in line and f"{row['long']:.3f}" in line
        assert row["long_worst"] <= row["long"] <= row["long_best"]
