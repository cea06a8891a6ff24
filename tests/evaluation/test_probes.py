import numpy as np
import pytest
import torch

from ringmo.evaluation import probes
from ringmo.evaluation.probes import knn, linear_probe


def clouds(each: int, seed: int, spread: float = 0.5) -> tuple[torch.Tensor, torch.Tensor]:
    """Points around three corners of eight dimensions, in a random order."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.arange(3).repeat(each)[torch.randperm(3 * each, generator=random)]
    noise = spread * torch.randn(3 * each, 8, generator=random)
    return 4 * torch.nn.functional.one_hot(labels, 8).float() + noise, labels


def brute_force(train, labels, test, k, temperature):  # type: ignore[no-untyped-def]
    predicted = []
    for row in test:
        similarity = train @ row / np.linalg.norm(train, axis=1) / np.linalg.norm(row)
        nearest = np.argsort(-similarity)[:k]
        votes = [
            sum(np.exp(similarity[i] / temperature) for i in nearest if labels[i] == c)
            for c in range(labels.max() + 1)
        ]
        predicted.append(int(np.argmax(votes)))
    return predicted


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (20, 0.07), (20, 5.0), (500, 0.5)])
def test_neighbours_vote_as_when_counted_one_by_one(
    k: int, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probes, "CHUNK", 7)  # 50 is no multiple of it
    random = np.random.default_rng(0)
    train, test = random.normal(size=(90, 6)), random.normal(size=(50, 6))
    labels = random.integers(0, 5, 90)
    found = knn(*(torch.from_numpy(a) for a in (train, labels, test)), k, temperature)
    assert found.tolist() == brute_force(train, labels, test, k, temperature)
    assert len(set(found.tolist())) > 2


def test_neighbours_are_asked_for_direction_not_length() -> None:
    train, labels = clouds(20, 0)
    test, truth = clouds(20, 1)
    lengths = torch.rand(60, 1, generator=torch.Generator().manual_seed(2)) * 100 + 0.01
    assert torch.equal(knn(train, labels, test * lengths), knn(train, labels, test))
    assert (knn(train, labels, test) == truth).float().mean() > 0.95
    assert knn(train, labels, test[:0]).shape == (0,)


def test_neighbours_of_nothing_or_of_other_features_are_refused() -> None:
    train, labels = clouds(4, 0)
    for wrong in ((train[:0], labels[:0], train), (train, labels[:3], train)):
        with pytest.raises(ValueError, match="do not belong together"):
            knn(*wrong)
    with pytest.raises(ValueError, match=r"\(12, 8\).*\(12, 5\)"):
        knn(train, labels, train[:, :5])


def test_linear_probe_finds_what_separates_and_says_it_again() -> None:
    (train, labels), (val, val_labels), (test, truth) = (clouds(30, seed) for seed in range(3))
    # Scales that a penalty without standardising would not survive.
    scale = 10.0 ** torch.arange(-4, 4)
    features = [tiles * scale for tiles in (train, val, test)]
    with torch.inference_mode():  # where features come from
        found = linear_probe(features[0], labels, features[1], val_labels, features[2], 3)
    assert torch.equal(found, truth)
    assert torch.equal(
        found, linear_probe(features[0], labels, features[1], val_labels, features[2], 3)
    )


def test_linear_probe_is_penalised_as_the_validation_tiles_ask(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (train, labels), (val, val_labels), (test, truth) = (clouds(10, seed) for seed in range(3))
    train, labels = torch.cat((train, train[labels == 1])), torch.cat((labels, labels[labels == 1]))
    # Under the first all coefficients vanish, and the commonest class is the answer to everything.
    monkeypatch.setattr(probes, "PENALTIES", (1e4, 1e-2))
    assert torch.equal(linear_probe(train, labels, val, val_labels, test, 3), truth)
    always = torch.ones_like(val_labels)
    assert (linear_probe(train, labels, val, always, test, 3) == 1).all()


def test_linear_probe_takes_odd_features() -> None:
    (train, labels), (test, truth) = clouds(10, 0), clouds(10, 1)
    train, test = (torch.cat((rows, torch.ones(30, 1)), 1) for rows in (train, test))  # constant
    # No validation tiles, and a class that no training tile has.
    found = linear_probe(train, labels, test[:0], truth[:0], test, 4)
    assert torch.equal(found, truth)
