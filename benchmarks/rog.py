"""RoG, "Robust inference via generative classifiers for handling noisy labels" (Lee et al. 2019).

A trained network's features and their noisy labels make a classifier a layer, and these an ensemble: no label is
corrected and nothing is trained.

Shapes: N examples, M held-out ones, L layers, D features, K classes, n examples of one class.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.covariance import fast_mcd
from torch import Tensor, nn

from training.objectives.memory import outer_blocks, with_features

LAYERS = 3  # as the authors' code has for DenseNet, there all of the last block; 4 for ResNet
EM_STEPS = 500


def layer_features(model: nn.Module, image_NCHW: Tensor, classes: int) -> list[Tensor]:
    """Return the outputs of a network's two blocks before the last, averaged over pixels, and its classifier's input.

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
    """Hold classes as Gaussians of one covariance: linear discriminant analysis."""

    mean_KD: Tensor
    precision_DD: Tensor
    prior_K: Tensor

    def __call__(self, feature_ND: Tensor) -> Tensor:
        """Return logits, N×K: their softmax is the posterior."""
        direction_DK = self.precision_DD @ self.mean_KD.T
        offset_K = self.prior_K.log() - (self.mean_KD.T * direction_DK).sum(0) / 2
        return feature_ND.to(direction_DK) @ direction_DK + offset_K


@dataclass(frozen=True)
class Ensemble:
    """Hold classifiers of one layer's features each; their posteriors are averaged by weight."""

    classifiers: Sequence[GaussianClassifier]
    weight_L: Tensor

    def __call__(self, features: Sequence[Tensor]) -> Tensor:
        """Return probabilities, N×K."""
        posteriors = [each(feature_ND).softmax(1) for each, feature_ND in zip(self.classifiers, features, strict=True)]
        return torch.einsum("l,lnk->nk", self.weight_L, torch.stack(posteriors))


def robust_ensemble(
    features: Sequence[Tensor], label_N: Tensor, held: Sequence[Tensor], held_label_M: Tensor, classes: int
) -> Ensemble:
    """Return a robust classifier a layer, weighted so that the labels of held-out examples are most likely.

    The paper's held-out labels are as noisy as the others, and it keeps the half that the last classifier finds most
    likely; here they are the trusted ones, which needs no such choice. Raises ValueError as `robust_classifier`.
    """
    classifiers = [robust_classifier(feature_ND, label_N, classes) for feature_ND in features]
    posteriors = [each(feature_MD).softmax(1) for each, feature_MD in zip(classifiers, held, strict=True)]
    likelihood_LM = torch.stack([posterior_MK.gather(1, held_label_M[:, None])[:, 0] for posterior_MK in posteriors])
    return Ensemble(classifiers, mixture_weights(likelihood_LM))


def mixture_weights(likelihood_LM: Tensor) -> Tensor:
    """Return the weights of L classifiers, summing to 1, that maximise the concave Σ_m log Σ_l α_l p_l(m), by EM."""
    likelihood_LM = likelihood_LM.clamp_min(1e-12)
    weight_L = torch.full_like(likelihood_LM[:, 0], 1 / len(likelihood_LM))
    for _ in range(EM_STEPS):
        joint_LM = weight_L[:, None] * likelihood_LM
        weight_L = (joint_LM / joint_LM.sum(0)).mean(1)
    return weight_L


def robust_classifier(
    feature_ND: Tensor, label_N: Tensor, classes: int, *, support: float = 0.5, seed: int = 0
) -> GaussianClassifier:
    """Return Gaussians of the minimum covariance determinant estimates of each class's mean and of their covariance.

    `feature_ND` is what a network's last layer is given (`objectives.memory.with_features`), in eval mode. Of each
    class's n examples, support·(n + D + 1) count, at most n. Raises ValueError for a class with fewer than 2 examples.
    """
    feature_ND, count = feature_ND.double(), torch.bincount(label_N, minlength=classes)
    means, scatter_DD, used = [], torch.zeros((), dtype=torch.float64), 0
    if (count < 2).any():
        raise ValueError(f"class {int((count < 2).nonzero()[0])} has {int(count.min())} examples: each needs 2 or more")
    for k in range(classes):
        of_class_nD = feature_ND[label_N == k]
        size = min(int(support * (len(of_class_nD) + feature_ND.shape[1] + 1)), len(of_class_nD))
        chosen = of_class_nD[densest(of_class_nD, size, seed)]
        means.append(chosen.mean(0))
        scatter_DD = scatter_DD + (chosen - means[-1]).T @ (chosen - means[-1])
        used += size
    # The paper's mean of the covariances, each by its number of examples.
    return GaussianClassifier(
        torch.stack(means), torch.linalg.pinv(scatter_DD / used, hermitian=True), count / len(label_N)
    )


def densest(feature_nD: Tensor, size: int, seed: int) -> Tensor:
    """Return a mask of the `size` rows whose covariance has the smallest determinant that fast MCD finds.

    The search is blind to the features' coordinates, but in those of scikit-learn it stops at its first subset where
    any has no variance: it is given the principal components that have one, at unit scale.
    """
    if size == len(feature_nD):
        return torch.ones(size, dtype=torch.bool)
    left_nr, scale_r, _ = np.linalg.svd(feature_nD.numpy() - feature_nD.numpy().mean(0), full_matrices=False)
    whitened_nr = left_nr[:, scale_r > 1e-9 * scale_r[0]] * len(feature_nD) ** 0.5
    support_n = fast_mcd(whitened_nr, support_fraction=(size + 0.5) / len(feature_nD), random_state=seed)[2]
    return torch.from_numpy(support_n)
