"""Self-learning's prototypes and CleanNet's relevance, written out a second time example by example.

Shapes: B noisy examples, M probe examples, N of the training set, K classes, m features of a class, D numbers each.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.training.tables import B, K, N, plane_batch
from training.objectives.baselines.cleannet import CleanNet
from training.objectives.baselines.self_learning import SelfLearning, prototypes
from training.objectives.interface import Alone, Moment


class Features(nn.Module):
    """A network that ends in features and a linear classifier."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(2, 6, dtype=torch.float64)
        self.last = nn.Linear(6, K, dtype=torch.float64)

    def forward(self, image_BCHW: torch.Tensor) -> torch.Tensor:
        return self.last(self.of(image_BCHW))

    def of(self, image_BCHW: torch.Tensor) -> torch.Tensor:
        return F.relu(self.first(image_BCHW.flatten(1)))


def by_the_paper(feature_mD: np.ndarray, count: int) -> np.ndarray:
    """§3.2: similarities, densities by a reference value, distinctness, and the densest that are distinct."""
    m = len(feature_mD)
    unit = feature_mD / np.linalg.norm(feature_mD, axis=1, keepdims=True)
    s = np.array([[float(unit[i] @ unit[j]) for j in range(m)] for i in range(m)])
    reference = np.sort(s.flatten())[::-1][int(0.4 * m * m)]
    density = [sum(np.sign(s[i, j] - reference) for j in range(m)) for i in range(m)]
    eta = []
    for i in range(m):
        denser = [j for j in range(m) if density[j] > density[i]]
        eta.append(max(s[i, j] for j in denser) if denser else min(s[i]))
    ranked = sorted(range(m), key=lambda i: (eta[i] > 0.95, -density[i]))
    return unit[ranked[:count]]


@pytest.mark.parametrize("seed", range(4))
def test_prototypes_are_dense_and_distinct(seed):
    rng = np.random.default_rng(seed)
    centres = np.eye(5)[:2] + 0.05
    feature_mD = np.concatenate([
        centres[0] + 0.1 * rng.random((14, 5)), centres[1] + 0.1 * rng.random((9, 5)), rng.random((7, 5)),
    ])  # fmt: skip
    feature_mD = rng.permutation(feature_mD) * rng.uniform(0.5, 3, (30, 1))  # length does not matter
    found = prototypes(torch.from_numpy(feature_mD), 3).numpy()
    expected = by_the_paper(feature_mD, 3)
    np.testing.assert_allclose(np.sort(found, 0), np.sort(expected, 0), atol=1e-9)
    unit = centres / np.linalg.norm(centres, axis=1, keepdims=True)
    assert (unit[0] @ found.T).max() > 0.98  # the denser cluster


def test_few_features_make_few_prototypes():
    assert prototypes(torch.rand(2, 4), 8).shape == (2, 4)
    assert prototypes(torch.rand(1, 4), 8).shape == (1, 4)


def test_self_learning_adds_the_label_whose_prototypes_are_near():
    """An epoch of 3 steps fills the bank; at step 3 prototypes are chosen, and labels corrected from then on."""
    objective, model = SelfLearning(warm_up=0.2, alpha=0.3, samples=50, count=2), Features()
    memory, seen, batch = objective.memory(model, 3 * B, K), {}, plane_batch()
    for step in range(3):
        row_B = torch.arange(B) + B * step
        image = torch.randn(B, 1, 1, 2, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        held = replace(batch, weak_BCHW=image, row_B=row_B, label_B=row_B * 3 % K)
        outcome = objective(model, held, Moment(0.1, step=step, steps=10, memory=memory), Alone())
        torch.testing.assert_close(outcome.total, F.cross_entropy(model(image), held.label_B))
        for row, label, feature in zip(row_B.tolist(), held.label_B.tolist(), model.of(image).detach(), strict=True):
            seen[(step, row)] = label, feature.numpy()
    outcome = objective(model, batch, Moment(0.1, step=3, steps=10, memory=memory), Alone())
    similarity_BK = np.zeros((B, K))
    feature_BD = model.of(batch.weak_BCHW).detach().numpy()
    for k in range(K):
        chosen = by_the_paper(np.stack([feature for label, feature in seen.values() if label == k]), 2)
        for i in range(B):
            similarity_BK[i, k] = np.mean([feature_BD[i] @ p / np.linalg.norm(feature_BD[i]) for p in chosen])
    corrected_B = similarity_BK.argmax(1)
    assert outcome.coefficients.pseudo_label_B.tolist() == corrected_B.tolist()
    assert len(set(corrected_B)) > 1
    logits_BK = model(batch.weak_BCHW)
    expected = 0.7 * F.cross_entropy(logits_BK, batch.label_B)
    expected = expected + 0.3 * F.cross_entropy(logits_BK, torch.from_numpy(corrected_B))
    torch.testing.assert_close(outcome.total, expected)
    assert set(outcome.coefficients.trust_B.tolist()) == {0.7}


def relevance_by_hand(memory, feature_D: np.ndarray, references: list[np.ndarray]) -> tuple[float, float]:
    """(Cosine of a feature and a class, squared reconstruction error) as the paper's figure draws them."""

    def through(layers, x):
        for layer in layers:
            if isinstance(layer, nn.Linear):
                x = np.tanh(layer.weight.detach().numpy() @ x + layer.bias.detach().numpy())
        return x

    v = np.log1p(feature_D)
    query = through(memory.query, v)
    hidden = [through(memory.reference, np.log1p(reference)) for reference in references]
    score = [memory.context.weight.detach().numpy()[0] @ through(memory.attention, h) for h in hidden]
    share = np.exp(score) / np.exp(score).sum()
    class_ = through(memory.of_class, sum(a * h for a, h in zip(share, hidden, strict=True)))
    cosine = query @ class_ / np.linalg.norm(query) / np.linalg.norm(class_)
    return cosine, ((through(memory.decoder, query) - v) ** 2).sum()


@pytest.mark.parametrize("warm", [True, False])
def test_cleannet_weighs_labels_by_their_relevance(warm):
    objective, model, batch = CleanNet(warm_up=0.5, references=5), Features(), plane_batch(probe=4)
    memory = objective.memory(model, N, K)
    outcome = objective(model, batch, Moment(0.1, step=0 if warm else 6, steps=10, memory=memory), Alone())
    feature_BD, feature_MD = (model.of(x).detach().numpy() for x in (batch.weak_BCHW, batch.probe_MCHW))
    label_B = batch.label_B.tolist()
    references = [[feature_BD[i] for i in range(B) if label_B[i] == k] for k in range(K)]
    by_B = [relevance_by_hand(memory, feature_BD[i], references[label_B[i]]) for i in range(B)]
    loss_B = F.cross_entropy(model(batch.weak_BCHW), batch.label_B, reduction="none").detach().numpy()
    weight_B = np.ones(B) if warm else np.array([max(cosine, 0) for cosine, _ in by_B])
    np.testing.assert_allclose(outcome.coefficients.weight_B, weight_B, rtol=1e-9)
    assert float(outcome.parts["weighted"]) == pytest.approx((weight_B * loss_B).mean(), rel=1e-9)

    relevance = [0.1 * (1 - cosine if cosine >= 0.1 else 0.0) for cosine, _ in by_B]
    errors = [error for _, error in by_B]
    for feature_D, label in zip(feature_MD, batch.probe_label_M.tolist(), strict=True):
        by_K = [relevance_by_hand(memory, feature_D, of_class) for of_class in references]
        cosine_K = [cosine for cosine, _ in by_K]
        wrong = np.mean([max(cosine_K[k] - 0.1, 0) for k in range(K) if k != label])
        relevance.append(1 - cosine_K[label] + 5 * wrong)
        errors.append(by_K[0][1])
    assert float(outcome.parts["relevance"]) == pytest.approx(np.mean(relevance), rel=1e-9)
    assert float(outcome.parts["reconstruction"]) == pytest.approx(np.mean(errors), rel=1e-9)
    total = (weight_B * loss_B).mean() + 0.1 * (np.mean(relevance) + 0.1 * np.mean(errors))
    assert float(outcome.total.detach()) == pytest.approx(total, rel=1e-9)
    # neither network's loss teaches the other
    of_last = torch.autograd.grad(outcome.total, model.last.weight, retain_graph=True)[0]
    plain = F.cross_entropy(model(batch.weak_BCHW), batch.label_B, reduction="none")
    (expected,) = torch.autograd.grad((torch.from_numpy(weight_B) * plain).mean(), model.last.weight)
    torch.testing.assert_close(of_last, expected)
