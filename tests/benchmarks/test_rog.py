"""RoG: the densest half of each class, and the classifier against linear discriminants.

Shapes: N examples, D features, K classes.
"""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from benchmarks.rog import (
    densest,
    layer_features,
    mixture_weights,
    robust_classifier,
    robust_ensemble,
)
from training.engine.networks import build


def log_determinant(feature: np.ndarray) -> float:
    return np.linalg.slogdet(np.cov(feature.T, bias=True))[1]


@pytest.mark.parametrize(("n", "D", "outliers"), [(80, 2, 20), (200, 3, 60), (400, 5, 120), (700, 4, 200)])
def test_the_subset_is_the_densest(n, D, outliers):
    """No outlier is in it, and no other subset that an exchange of two rows makes is denser."""
    rng = np.random.default_rng(n)
    feature = rng.normal(size=(n, D)) @ rng.normal(size=(D, D)) + rng.normal(size=D)
    feature[:outliers] += 8
    size = int(0.5 * (n + D + 1))
    chosen = densest(torch.from_numpy(feature), size, seed=0).numpy()
    assert chosen.sum() == size
    assert not chosen[:outliers].any()
    found = log_determinant(feature[chosen])
    for _ in range(300):
        other = chosen.copy()
        other[rng.choice(np.flatnonzero(chosen))] = False
        other[rng.choice(np.flatnonzero(~chosen))] = True
        assert log_determinant(feature[other]) > found


@pytest.mark.parametrize("spoil", ["constant", "copied"])
def test_features_without_variance_of_their_own_change_nothing(spoil):
    rng = np.random.default_rng(1)
    feature = rng.normal(size=(200, 4)) @ rng.normal(size=(4, 4))
    feature[:60] += 8
    more = np.full((200, 1), 3.0) if spoil == "constant" else feature[:, :1] - 2 * feature[:, 1:2]
    plain, spoilt = (densest(torch.from_numpy(each), 102, seed=0) for each in (feature, np.hstack([more, feature])))
    assert not plain[:60].any()
    assert torch.equal(plain, spoilt)


def test_with_all_examples_it_is_linear_discriminant_analysis():
    feature, label = load_digits(return_X_y=True)
    feature = feature[:, feature.std(0) > 0.5]
    oracle = LinearDiscriminantAnalysis(solver="lsqr").fit(feature[:1000], label[:1000])
    found = robust_classifier(torch.from_numpy(feature[:1000]), torch.from_numpy(label[:1000]), 10, support=1.0)
    logits = found(torch.from_numpy(feature[1000:]))
    np.testing.assert_allclose(logits.softmax(1), oracle.predict_proba(feature[1000:]), atol=2e-6)
    # linear logits are those of the Gaussians up to what all classes share
    away = torch.from_numpy(feature[1000:1010, None]) - found.mean_KD
    quadratic = -0.5 * torch.einsum("nkd,de,nke->nk", away, found.precision_DD, away) + found.prior_K.log()
    torch.testing.assert_close(logits[:10].log_softmax(1), quadratic.log_softmax(1))


@pytest.mark.parametrize("seed", [0, 1])
def test_wrong_labels_move_it_less_than_means_and_covariances_of_all(seed):
    """Six clusters with 40 % of the labels redrawn: the robust means are the clean ones."""
    rng = np.random.default_rng(seed)
    centre, label = 4 * rng.normal(size=(6, 8)), rng.integers(0, 6, 1800)
    feature = torch.from_numpy(centre[label] + rng.normal(size=(1800, 8)) @ np.diag(np.linspace(0.5, 2.5, 8)))
    noisy = torch.from_numpy(np.where(rng.random(1800) < 0.4, rng.integers(0, 6, 1800), label))
    robust, plain = (robust_classifier(feature, noisy, 6, support=support) for support in (0.5, 1.0))
    gaps = [(torch.from_numpy(centre) - each.mean_KD).norm() for each in (robust, plain)]
    assert gaps[0] < 0.25 * gaps[1]
    rights = [(each(feature).argmax(1).numpy() == label).mean() for each in (robust, plain)]
    assert rights[0] > 0.99
    assert rights[0] >= rights[1]
    likelihoods = [
        each(feature).log_softmax(1)[torch.arange(1800), torch.from_numpy(label)].mean() for each in (robust, plain)
    ]
    assert likelihoods[0] > 0.2 * likelihoods[1]


def test_the_same_seed_gives_the_same_classifier():
    feature, label = torch.randn(90, 3, generator=torch.Generator().manual_seed(0)), torch.arange(90) % 3
    one, again = (robust_classifier(feature, label, 3) for _ in range(2))
    assert torch.equal(one.mean_KD, again.mean_KD)
    assert torch.equal(one.precision_DD, again.precision_DD)


def test_more_features_than_examples_are_no_failure():
    """A class's covariance is singular then; distances are measured where it is not."""
    rng = np.random.default_rng(0)
    label = np.arange(60) % 2
    feature = torch.from_numpy(rng.normal(size=(60, 50)) + 3 * label[:, None])
    found = robust_classifier(feature, torch.from_numpy(label), 2)
    assert (found(feature).argmax(1).numpy() == label).mean() > 0.95


def test_a_class_without_examples_is_refused():
    with pytest.raises(ValueError, match="class 2 has 0 examples: each needs 2 or more"):
        robust_classifier(torch.rand(20, 2), torch.arange(20) % 2, 3)


def test_mixture_weights_are_the_most_likely():
    """Against a search over the simplex of three."""
    rng = np.random.default_rng(0)
    likelihood = rng.beta(1, 1, size=(3, 40)) * np.array([[1.0], [0.8], [0.3]])
    weight_L = mixture_weights(torch.from_numpy(likelihood))
    assert float(weight_L.sum()) == pytest.approx(1)
    grid = [(a, b, 1 - a - b) for a in np.linspace(0, 1, 101) for b in np.linspace(0, 1 - a, 101)]
    values = np.log(np.maximum(np.array(grid) @ likelihood, 1e-12)).sum(1)
    assert np.log(weight_L.numpy() @ likelihood).sum() >= values.max() - 1e-6


def test_an_ensemble_leans_on_the_layer_that_can_tell():
    rng = np.random.default_rng(0)
    label = torch.from_numpy(rng.integers(0, 4, 800))
    noisy = torch.where(torch.from_numpy(rng.random(800) < 0.3), torch.from_numpy(rng.integers(0, 4, 800)), label)
    telling = 3 * torch.eye(4, dtype=torch.float64)[label] + torch.from_numpy(rng.normal(size=(800, 4)))
    blind = torch.from_numpy(rng.normal(size=(800, 6)))
    train, held, test = slice(400), slice(400, 480), slice(480, None)
    ensemble = robust_ensemble(
        [blind[train], telling[train]], noisy[train], [blind[held], telling[held]], label[held], 4
    )
    assert ensemble.weight_L[1] > 0.95
    probability = ensemble([blind[test], telling[test]])
    torch.testing.assert_close(probability.sum(1), torch.ones(320, dtype=torch.float64))
    assert (probability.argmax(1) == label[test]).double().mean() > 0.9


@pytest.mark.parametrize(("network", "sizes"), [("wrn-10-1", [16, 32, 64]), ("densenet100", [300, 150, 342])])
def test_features_are_of_three_layers(network, sizes):
    model = build(network, 3, 5, seed=0).eval()
    image_NCHW = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    features = layer_features(model, image_NCHW, 5)
    assert [list(each.shape) for each in features] == [[2, size] for size in sizes]
    assert not any(module._forward_hooks for module in model.modules())
