"""RoG, "Robust inference via generative classifiers for handling noisy labels" (Lee et al. 2019).

A trained network's features and their noisy labels make a classifier a layer, and these an ensemble: no label is
corrected and nothing is trained.

Shapes: N examples, M held-out ones, L layers, D features, K classes, n examples of one class.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from training.objectives.memory import outer_blocks, with_features

STARTS, MOST_STEPS = 10, 100
LAYERS = 3  # as the authors' code has for DenseNet, there all of the last block; 4 for ResNet
EM_STEPS = 500


def layer_features(model: nn.Module, image_NCHW: Tensor, classes: int) -> list[Tensor]:
    """What a network makes of images in its two blocks before the last, averaged over pixels, and gives its classifier.

    N×D each; the model is in eval mode.
    """
    seen: dict[str, Tensor] = {}
    hooks = [
        model.get_submodule(name).register_forward_hook(
            lambda _, inputs, output, name=name: seen.update({name: output.detach().flatten(2).mean(2)})
        )
        for name in outer_blocks(model)[-LAYERS:-1]
    ]
    try:
        last_ND = with_features(model, image_NCHW, classes)[1]
    finally:
        for hook in hooks:
            hook.remove()
    return [*seen.values(), last_ND]


@dataclass(frozen=True)
class GaussianClassifier:
    """Classes as Gaussians of one covariance: linear discriminant analysis."""

    mean_KD: Tensor
    precision_DD: Tensor
    prior_K: Tensor

    def __call__(self, feature_ND: Tensor) -> Tensor:
        """Logits, N×K: their softmax is the posterior."""
        direction_DK = self.precision_DD @ self.mean_KD.T
        offset_K = self.prior_K.log() - (self.mean_KD.T * direction_DK).sum(0) / 2
        return feature_ND.to(direction_DK) @ direction_DK + offset_K


@dataclass(frozen=True)
class Ensemble:
    """Classifiers of one layer's features each; their posteriors are averaged by weight."""

    classifiers: Sequence[GaussianClassifier]
    weight_L: Tensor

    def __call__(self, features: Sequence[Tensor]) -> Tensor:
        """Probabilities, N×K."""
        posteriors = [each(feature_ND).softmax(1) for each, feature_ND in zip(self.classifiers, features, strict=True)]
        return torch.einsum("l,lnk->nk", self.weight_L, torch.stack(posteriors))


def robust_ensemble(
    features: Sequence[Tensor], label_N: Tensor, held: Sequence[Tensor], held_label_M: Tensor, classes: int
) -> Ensemble:
    """A robust classifier a layer, weighted so that the labels of held-out examples are most likely.

    The paper's held-out labels are as noisy as the others, and it keeps the half that the last classifier finds most
    likely; here they are the trusted ones, which needs no such choice. Raises ValueError as `robust_classifier`.
    """
    classifiers = [robust_classifier(feature_ND, label_N, classes) for feature_ND in features]
    posteriors = [each(feature_MD).softmax(1) for each, feature_MD in zip(classifiers, held, strict=True)]
    likelihood_LM = torch.stack([posterior_MK.gather(1, held_label_M[:, None])[:, 0] for posterior_MK in posteriors])
    return Ensemble(classifiers, mixture_weights(likelihood_LM))


def mixture_weights(likelihood_LM: Tensor) -> Tensor:
    """The weights of L classifiers, summing to 1, that maximise Σ_m log Σ_l α_l p_l(m): by EM, as that is concave."""
    likelihood_LM = likelihood_LM.clamp_min(1e-12)
    weight_L = torch.full_like(likelihood_LM[:, 0], 1 / len(likelihood_LM))
    for _ in range(EM_STEPS):
        joint_LM = weight_L[:, None] * likelihood_LM
        weight_L = (joint_LM / joint_LM.sum(0)).mean(1)
    return weight_L


def robust_classifier(
    feature_ND: Tensor, label_N: Tensor, classes: int, *, support: float = 0.5, seed: int = 0
) -> GaussianClassifier:
    """Gaussians whose means and common covariance are the minimum covariance determinant estimates of each class.

    `feature_ND` is what a network's last layer is given (`objectives.memory.with_features`), in eval mode. Raises
    ValueError for a class with fewer than 2 examples.
    """
    rng, feature_ND = torch.Generator().manual_seed(seed), feature_ND.double()
    means, total, count = [], torch.zeros((), dtype=torch.float64), torch.bincount(label_N, minlength=classes)
    if (count < 2).any():
        raise ValueError(f"class {int((count < 2).nonzero()[0])} has {int(count.min())} examples: each needs 2 or more")
    for k in range(classes):
        of_class_nD = feature_ND[label_N == k]
        chosen = of_class_nD[minimum_covariance_determinant(of_class_nD, support, rng)]
        means.append(chosen.mean(0))
        total = total + (chosen - means[-1]).T @ (chosen - means[-1])  # the paper's mean of covariances, by size
    used = sum(_size(int(n), feature_ND.shape[1], support) for n in count)
    return GaussianClassifier(torch.stack(means), torch.linalg.pinv(total / used, hermitian=True), count / count.sum())


def minimum_covariance_determinant(feature_nD: Tensor, support: float, rng: torch.Generator) -> Tensor:
    """Indices of the support·(n + D + 1) rows, at most n, whose covariance has the smallest determinant found.

    From random subsets by C-steps (Rousseeuw & Van Driessen 1999): the rows next to the subset's mean, in its own
    Mahalanobis distance, until they stay; no step makes the determinant larger.
    """
    n, D = feature_nD.shape
    size, best, smallest = _size(n, D, support), torch.arange(n), torch.inf
    for _ in range(STARTS):
        chosen = torch.randperm(n, generator=rng)[:size].sort().values.to(feature_nD.device)
        for _ in range(MOST_STEPS):
            subset = feature_nD[chosen]
            away_nD = feature_nD - subset.mean(0)
            precision_DD = torch.linalg.pinv(subset.T.cov(correction=0).reshape(D, D), hermitian=True)
            nearest = ((away_nD @ precision_DD) * away_nD).sum(1).argsort(stable=True)[:size].sort().values
            if torch.equal(nearest, chosen):
                break
            chosen = nearest
        determinant = float(torch.logdet(feature_nD[chosen].T.cov(correction=0).reshape(D, D)).nan_to_num(-torch.inf))
        if determinant < smallest:
            best, smallest = chosen, determinant
    return best


def _size(n: int, D: int, support: float) -> int:
    return min(int(support * (n + D + 1)), n)
