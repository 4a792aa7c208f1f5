"""What objectives with a memory share: rows once each, second networks, features, and their bank.

Shapes: B noisy examples, N of the training set, K classes, m features of a class, D numbers each.
"""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn

from training.engine import networks
from training.engine.passes.network import Passes
from training.objectives.interface import Alone
from training.objectives.memory import (
    FeatureBank,
    classifier,
    epoch_steps,
    fresh_copy,
    initialised,
    seen,
    with_features,
)


@dataclass
class Among:
    """Workers that all have told beforehand what they give to `gather`, rank after rank, in the order of the calls."""

    told: list[list[torch.Tensor]]

    @property
    def size(self) -> int:
        return len(self.told)

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        rows = [of_worker.pop(0) for of_worker in self.told]
        assert any(torch.equal(tensor, mine) for mine in rows)
        return torch.cat(rows)


def test_rows_are_seen_once_each_whoever_holds_them():
    row_B, value_B = torch.tensor([7, 3, 7, 0, 9, 3]), torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 8.0])
    matrix_B2 = torch.stack([value_B, -value_B], 1)
    rows_U, (value_U, matrix_U2) = seen(row_B, [value_B, matrix_B2], Alone())
    assert rows_U.tolist() == [0, 3, 7, 9]
    assert value_U.tolist() == [4, 5, 2, 5]
    torch.testing.assert_close(matrix_U2, torch.stack([value_U, -value_U], 1))
    for cut in ([0, 2, 4], [1, 3, 5]), ([5, 0, 1], [4, 3, 2]):
        held = [[row_B[mine], value_B[mine]] for mine in cut]
        mine = held[0][:]
        other_U, (other_value_U,) = seen(mine[0], [mine[1]], Among(held))
        assert torch.equal(other_U, rows_U)
        assert torch.equal(other_value_U, value_U)


def test_an_epoch_is_rounded_up(problem):
    assert epoch_steps(37, problem.batch, Alone()) == 4  # of 12
    assert epoch_steps(36, problem.batch, Alone()) == 3
    assert epoch_steps(49, problem.batch, Among([[], []])) == 3


def test_a_fresh_copy_has_other_weights_of_the_same_distribution():
    model = networks.build("wrn-10-2", 3, 10, seed=0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    copies = [fresh_copy(model), fresh_copy(model)]
    for name, value in copies[0].named_parameters():
        assert torch.equal(value, dict(copies[1].named_parameters())[name])
        assert torch.equal(value.flatten().sort().values, before[name].flatten().sort().values)
        if before[name].unique().numel() > 1:
            assert (value == before[name]).double().mean() < 0.01
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    image_BCHW = torch.randn(4, 3, 8, 8)
    assert not torch.allclose(model(image_BCHW), copies[0](image_BCHW), atol=0.1)


def test_what_is_initialised_is_the_same_and_leaves_the_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    layers = []
    for _ in range(2):
        with initialised():
            layers.append(nn.Linear(3, 2))
    assert torch.equal(layers[0].weight, layers[1].weight)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("chunks", [1, 2])
def test_features_are_what_the_classifier_is_given(problem, chunks):
    image_BCHW, classes = problem.batch.weak_BCHW, problem.batch.classes
    bare = problem.fresh().model
    model = Passes(problem.model, chunks=chunks, dtype=torch.float64, channels_last=False)
    logits_BK, feature_BD = with_features(model, image_BCHW, classes)
    torch.testing.assert_close(logits_BK, bare.head(feature_BD), rtol=1e-12, atol=1e-12)
    assert not feature_BD.requires_grad
    assert feature_BD.shape == (12, bare.head.in_features)
    before = {name: value.clone() for name, value in model.named_buffers()}
    again_BK, again_BD = with_features(model, image_BCHW, classes, aside=True)
    torch.testing.assert_close(again_BK, logits_BK, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(again_BD, feature_BD, rtol=1e-12, atol=1e-12)
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())
    (logits_BK.sum() + again_BK.sum()).backward()  # which runs chunks again, long after the hook
    assert not classifier(model, classes)._forward_pre_hooks


def test_a_network_without_a_linear_classifier_is_refused(problem):
    assert classifier(problem.model, 5) is problem.model.head
    with pytest.raises(ValueError, match="reads the input of a linear last layer"):
        classifier(nn.Conv2d(3, 5, 1), 5)


def test_a_bank_keeps_the_last_features_of_each_class(problem):
    """Against a list a class, over batches in which a row is twice and a class has more than fits."""
    classes, kept, rng = 5, 3, torch.Generator().manual_seed(1)
    bank, lists = FeatureBank(classes, kept, 2, torch.float64), [[] for _ in range(classes)]
    assert not bank.filled().any()
    label_N = torch.randint(classes, (40,), generator=rng)
    for _ in range(6):
        row_B = torch.randint(40, (8,), generator=rng)
        feature_BD = torch.stack([row_B.double(), torch.rand(40, generator=rng, dtype=torch.float64)[row_B]], 1)
        batch = replace(problem.batch, row_B=row_B, label_B=label_N[row_B])
        bank.add(batch, feature_BD, Alone())
        for k in range(classes):
            new = {int(row): feature for row, feature in zip(row_B, feature_BD, strict=True) if label_N[row] == k}
            lists[k] += [new[row] for row in sorted(new)][:kept]
        for k, features in enumerate(lists):
            held = bank.feature_KmD[k][bank.filled()[k]]
            assert len(held) == min(len(features), kept)
            expected = sorted(tuple(feature.tolist()) for feature in features[-kept:])
            assert sorted(tuple(feature.tolist()) for feature in held) == expected
