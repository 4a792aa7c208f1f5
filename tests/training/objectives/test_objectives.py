"""Every objective keeps one contract; every switch of the method is what docs/method.md says, written out twice.

Shapes: B noisy examples, M probe examples, K classes, n groups of R mixup rows.
"""

import copy
import dataclasses
import functools
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.autograd.forward_ad import dual_level

from tests.training.conftest import build_problem
from training.engine import networks
from training.objectives.ieg import Ieg, paper, reference
from training.objectives.interface import Alone
from training.objectives.losses import (
    cross_entropy,
    forward_aside,
    is_affine,
    kl_divergence,
    logit_norm,
    mix,
    mixing_draws,
    sharpen,
)
from training.objectives.meta import parameters_of
from training.objectives.registry import ABLATIONS, BASELINES, METHODS, PRESETS

EXAMPLES = 40  # of the training set that the problem's batch is of

THRESHOLD = 0.08  # of 12 examples: those a little below the mean weight 1/12 and up keep their labels

# One switch away from a preset each.
SWITCHED = {
    "no decay in the meta loss": replace(reference(), probe_decay=False),
    "scheduled lookahead": replace(reference(), lookahead_lr=None),
    "plain lookahead": replace(reference(), lookahead="sgd"),
    "step weights": replace(reference(), weights="step"),
    "no logit norm": replace(reference(), logit_norm=False),
    "logit norm in paper": replace(paper(), logit_norm=True),
    "kl into weak": replace(reference(), kl_into_weak=True),
    "unfolded beta": replace(reference(), fold_beta=False),
    "label weight": replace(reference(), label_weight=2.0),
    "lambda0": replace(reference(), lambda0=0.3),
    "temperature": replace(reference(), temperature=0.8),
    "p and kl": replace(reference(), p=1.5, kl=3.0),
    "threshold": replace(reference(), threshold=THRESHOLD),
    "threshold in paper": replace(paper(), threshold=THRESHOLD),
    "unmixed": replace(reference(), mixup="unmixed"),
    "unmixed with threshold": replace(reference(), mixup="unmixed", threshold=THRESHOLD),
    "no mixup": replace(reference(), mixup="off"),
    "no relabelling": replace(reference(), relabel=False),
    "no consistency": replace(reference(), kl=0.0),
    "second order": replace(reference(), engine="second_order"),
    "second order in paper": replace(paper(), engine="second_order"),
    "per replica": replace(reference(), scope="replica"),
    "last block": replace(reference(), meta_scope="last_block"),
    "last layer": replace(reference(), meta_scope="last_layer"),
    "last layer in paper": replace(paper(), meta_scope="last_layer"),
    "last block by second order": replace(reference(), meta_scope="last_block", engine="second_order"),
}
SCOPES = {"all": "", "last_block": ("blocks.2.", "norm.", "head."), "last_layer": "head."}
STEPS, LATE = 10, 9  # of a run; its step in which methods are looked at, too


def in_so_few_steps(objective):
    """With a warm-up that is counted in steps, and so would hardly begin, over at the end."""
    return replace(objective, warm_up=STEPS) if isinstance(getattr(objective, "warm_up", None), int) else objective


LATER = {f"{name} later": in_so_few_steps(make()) for name, make in METHODS.items() if name not in ABLATIONS}
EVERY = {**{name: make() for name, make in METHODS.items()}, **SWITCHED, **LATER}
UNPACED = {name: make() for name, make in METHODS.items() if isinstance(make(), Ieg) and not make().paced}
IEG = {**UNPACED, **SWITCHED}  # what is written out a second time below
MIXING = [name for name, objective in IEG.items() if objective.mixup == "on"]


@dataclasses.dataclass(frozen=True)
class Ran:
    """What one call did."""

    outcome: object
    gradient: dict
    before: dict  # the model's state
    after: dict
    moved: dict  # buffers after one plain forward of the weak batch
    prediction_BK: torch.Tensor
    momentum_is_untouched: bool
    batch_is_untouched: bool


def posed(name, problem):
    """The problem at the step that `name` asks for, with the objective's memory of all steps before it.

    It has seen all of the training set, through a copy of the model.
    """
    objective, batch = EVERY[name], problem.batch
    memory = objective.memory(problem.model, EXAMPLES, batch.classes)
    step = LATE if name in LATER else 0
    rng, model = torch.Generator().manual_seed(5), copy.deepcopy(problem.model)
    rows = torch.cat([torch.randperm(EXAMPLES, generator=rng) for _ in range(STEPS)])
    label_N = torch.randint(batch.classes, (EXAMPLES,), generator=rng)
    label_N[batch.row_B] = batch.label_B
    for past in range(step):
        row_B = rows[past * len(batch.row_B) :][: len(batch.row_B)]
        weak_BCHW = torch.randn(batch.weak_BCHW.shape, generator=rng, dtype=torch.float64)
        seen = replace(batch, weak_BCHW=weak_BCHW, row_B=row_B, label_B=label_N[row_B], group_keys=(past, 99 + past))
        objective(model, seen, replace(problem.moment, step=past, steps=STEPS, memory=memory), Alone())
    return replace(problem, moment=replace(problem.moment, step=step, steps=STEPS, memory=memory))


def call(objective, problem) -> tuple[object, dict]:
    outcome = objective(problem.model, problem.batch, problem.moment, Alone())
    outcome.total.backward()
    return outcome, {name: value.grad for name, value in problem.model.named_parameters()}


@pytest.fixture(scope="module")
def ran(_pristine):
    @functools.cache
    def run(name: str) -> Ran:
        problem, plain = posed(name, _pristine.fresh()), _pristine.fresh().model
        problem = replace(problem, batch=copy.deepcopy(_pristine.batch))
        problem = problem.with_velocity(copy.deepcopy(_pristine.moment.descent.velocity))
        outcome = EVERY[name](problem.model, problem.batch, problem.moment, Alone())
        assert all(value.grad is None for value in problem.model.parameters())
        after = copy.deepcopy(problem.model.state_dict())
        outcome.total.backward()
        with torch.no_grad():
            prediction_BK = plain(problem.batch.weak_BCHW).softmax(1)
        return Ran(
            outcome,
            {key: value.grad for key, value in problem.model.named_parameters()},
            _pristine.model.state_dict(),
            after,
            dict(plain.named_buffers()),
            prediction_BK,
            same(problem.moment.descent.velocity, _pristine.moment.descent.velocity),
            same(vars(problem.batch), vars(_pristine.batch)),
        )

    return run


def same(left, right) -> bool:
    def equal(a, b):
        return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b

    return left.keys() == right.keys() and all(equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("name", EVERY)
def test_loss_is_finite_and_every_parameter_learns(name, ran):
    it = ran(name)
    assert it.outcome.total.shape == ()
    assert torch.isfinite(it.outcome.total)
    assert all(not part.requires_grad and torch.isfinite(part) for part in it.outcome.parts.values())
    assert all(gradient is not None and bool(torch.isfinite(gradient).all()) for gradient in it.gradient.values())
    assert sum(bool(gradient.any()) for gradient in it.gradient.values()) >= 0.9 * len(it.gradient)


@pytest.mark.parametrize("name", EVERY)
def test_only_batch_norm_statistics_move_and_they_move_once(name, ran):
    it = ran(name)
    for key, value in it.after.items():
        if key in it.moved:
            assert torch.equal(value, it.moved[key])
            assert not torch.equal(value, it.before[key])
        else:
            assert torch.equal(value, it.before[key])
    assert it.momentum_is_untouched
    assert it.batch_is_untouched


@pytest.mark.parametrize("name", [*PRESETS, *BASELINES])
def test_who_has_stages_says_so(name, ran):
    first, last = ran(name), ran(f"{name} later")
    weights = [it.outcome.coefficients.weight_B.sum() for it in (first, last)]
    assert all(weights)
    gaps = [(first.gradient[key] - last.gradient[key]).norm() / first.gradient[key].norm() for key in first.gradient]
    if EVERY[name].staged:
        assert max(gaps) > 0.05
    elif not EVERY[name].remembers:
        assert not max(gaps)


@pytest.mark.parametrize("name", [*PRESETS, *BASELINES])
def test_who_goes_through_the_network_in_forward_mode_says_so(name, problem, monkeypatch):
    moved = []
    monkeypatch.setattr("training.objectives.meta.dual_level", lambda: moved.append(name) or dual_level())
    posing = posed(name, problem)
    moved.clear()
    call(EVERY[name], posing)
    assert bool(moved) == EVERY[name].forward_mode


@pytest.mark.parametrize("name", [*PRESETS, *BASELINES])
def test_who_remembers_says_so(name, problem):
    """Memories are the same whenever they are made, and change; their parameters learn."""
    posing = posed(f"{name} later", problem)
    memory, new = posing.moment.memory, EVERY[name].memory(problem.model, EXAMPLES, problem.batch.classes)
    again = EVERY[name].memory(problem.model, EXAMPLES, problem.batch.classes)
    torch.testing.assert_close(new.state_dict(), again.state_dict(), rtol=0, atol=0, equal_nan=True)
    assert bool(memory.state_dict()) == EVERY[name].remembers
    if own := own_buffers(memory):
        assert not all(torch.equal(a, b) for a, b in zip(own, own_buffers(new), strict=True))
    before = copy.deepcopy(dict(memory.named_parameters()))
    call(EVERY[name], posing)
    assert same(dict(memory.named_parameters()), before)
    gradients = [value.grad for value in memory.parameters()]
    assert all(gradient is not None and bool(torch.isfinite(gradient).all()) for gradient in gradients)
    assert sum(bool(gradient.any()) for gradient in gradients) >= 0.9 * len(gradients)


def own_buffers(memory) -> list[torch.Tensor]:
    """Those that an objective changes itself: not the statistics of a second network, which nothing reads."""
    layers = [layer for layer in memory.modules() if not isinstance(layer, torch.nn.BatchNorm2d)]
    return [buffer for layer in layers for buffer in layer.buffers(recurse=False)]


@pytest.mark.parametrize("name", EVERY)
def test_the_same_call_gives_the_same_bits(name, ran, problem):
    it = ran(name)
    outcome, gradient = call(EVERY[name], posed(name, problem))
    assert torch.equal(outcome.total, it.outcome.total)
    assert same(outcome.parts, it.outcome.parts)
    assert same(vars(outcome.coefficients), vars(it.outcome.coefficients))
    assert same(gradient, it.gradient)


@pytest.mark.parametrize("name", EVERY)
def test_coefficients_are_what_they_say(name, ran, problem):
    it = ran(name)
    said, batch = it.outcome.coefficients, problem.batch
    assert all(len(value) == len(batch.label_B) and not value.requires_grad for value in vars(said).values())
    assert (said.weight_B >= 0).all()
    if EVERY[name].own_weights:
        assert (said.weight_B <= 1).all()
    else:
        assert float(said.weight_B.mean()) == pytest.approx(1, abs=2e-3) or not said.weight_B.any()
    if name in IEG:
        assert set(said.trust_B.tolist()) <= {0.0, 1.0}
    assert ((said.trust_B >= 0) & (said.trust_B <= 1)).all()
    assert said.pseudo_label_B.dtype == torch.int64
    assert ((said.pseudo_label_B >= 0) & (said.pseudo_label_B < batch.classes)).all()
    least = (
        0 if name == "self-learning later" else 1 / batch.classes
    )  # its pseudo label need not be the likeliest class
    assert ((said.confidence_B > least) & (said.confidence_B <= 1)).all()
    rows = torch.arange(len(batch.label_B))
    torch.testing.assert_close(said.loss_B, -it.prediction_BK[rows, batch.label_B].log(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(it.outcome.prediction_BK, it.prediction_BK, rtol=1e-9, atol=1e-12)
    assert not it.outcome.prediction_BK.requires_grad


@pytest.mark.parametrize("name", ["reference", "paper", "M-9", "M-6", "supervised", "reweight"])
def test_group_keys_decide_the_mixing_and_nothing_else(name, ran, problem):
    it = ran(name)
    other = EVERY[name](problem.model, replace(problem.batch, group_keys=(11, 12)), problem.moment, Alone())
    mixes = name in MIXING
    for part, value in other.parts.items():
        assert torch.equal(value, it.outcome.parts[part]) == (not (mixes and part.startswith("mixed")))
    assert torch.equal(other.total, it.outcome.total) == (not mixes)
    assert same(vars(other.coefficients), vars(it.outcome.coefficients))


@pytest.mark.parametrize(("make", "c"), [(reference, 0.5), (paper, 1.0)])
def test_total_is_the_weighted_sum_of_step_7(make, c, problem):
    outcome, _ = call(make(), problem)
    part = outcome.parts
    assert set(part) == {"weighted", "relabelled", "mixed_probe", "mixed_noisy", "consistency"}
    expected = (
        c * (part["weighted"] + part["relabelled"]) + part["mixed_probe"] + 5 * part["mixed_noisy"]
    ) + 20 * part["consistency"]
    assert outcome.total.item() == pytest.approx(expected.item(), rel=1e-12)


# The method a second time, from docs/method.md alone: plain formulas, double backward, no code of the objectives.


def norm(block):
    return block / (block**2).mean().add(1e-8).sqrt()


def soft_ce(target, logits):
    return -(target * torch.log_softmax(logits, 1)).sum(1)


def forward_with(model, values, image):
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    return torch.func.functional_call(model, {**dict(model.named_parameters()), **values, **buffers}, (image,))


def by_the_method(ieg, problem):
    """(total, parts, ω* summing to 1, λ*, g) as steps 2–7 of docs/method.md say."""
    model, batch, moment = problem.model, problem.batch, problem.moment
    B, n = len(batch.label_B), len(batch.group_keys)
    y_BK = F.one_hot(batch.label_B, batch.classes).double()
    a_BK = forward_with(model, {}, batch.weak_BCHW)
    views = ieg.mixup != "off" or ieg.kl > 0 or ieg.relabel
    s_BK = forward_with(model, {}, batch.strong_BCHW) if views else a_BK
    with torch.no_grad():  # step 3
        n_a, n_s = (norm(a_BK), norm(s_BK)) if ieg.logit_norm else (a_BK, s_BK)
        g_BK = ((torch.softmax(n_a, 1) + torch.softmax(n_s, 1)) / 2) ** (1 / ieg.temperature)
        g_BK = g_BK / g_BK.sum(1, keepdim=True)

    # step 4
    lambda0 = ieg.lambda0 if ieg.relabel else 1.0
    omega0 = 0.0 if ieg.lookahead == "l2r" else 1 / B
    alpha = moment.lr if ieg.lookahead_lr is None else ieg.lookahead_lr
    omega_B = torch.full((B,), omega0, dtype=torch.float64, requires_grad=True)
    lambda_B = torch.full((B,), lambda0, dtype=torch.float64, requires_grad=True)
    inner = (omega_B * soft_ce(lambda_B[:, None] * y_BK + (1 - lambda_B[:, None]) * g_BK, a_BK)).sum()
    theta = {name: value for name, value in model.named_parameters() if name.startswith(SCOPES[ieg.meta_scope])}
    ahead = {}
    for (name, value), slope in zip(
        theta.items(), torch.autograd.grad(inner, list(theta.values()), create_graph=True), strict=True
    ):
        if name in moment.descent.decayed and ieg.lookahead != "l2r":
            slope = slope + moment.descent.weight_decay * value
        if ieg.lookahead == "momentum":
            slope = slope + moment.descent.momentum * moment.descent.velocity[name]
        ahead[name] = value - alpha * slope
    probe = F.cross_entropy(forward_with(model, ahead, batch.probe_MCHW), batch.probe_label_M)
    if ieg.probe_decay:
        decayed = [value for name, value in ahead.items() if name in moment.descent.decayed]
        probe = probe + moment.descent.weight_decay / 2 * sum((value**2).sum() for value in decayed)
    d_omega_B, d_lambda_B = torch.autograd.grad(probe, (omega_B, lambda_B), retain_graph=True)
    raw_B = torch.relu((omega0 if ieg.weights == "step" else 0.0) - d_omega_B)
    weight_B = raw_B / (raw_B.sum() + 1e-5)
    trusts_B = d_lambda_B < 0 if ieg.relabel else torch.ones(B, dtype=torch.bool)
    P_BK = lambda0 * y_BK + (1 - lambda0) * g_BK

    parts = {"weighted": (weight_B * soft_ce(P_BK, a_BK)).sum()}
    total = ieg.label_weight * parts["weighted"]
    if ieg.relabel:
        parts["relabelled"] = soft_ce(torch.where(trusts_B[:, None], y_BK, g_BK), a_BK).mean()
        total = total + ieg.label_weight * parts["relabelled"]
    if ieg.mixup != "off":  # step 5
        label_BK = torch.where((weight_B >= ieg.threshold)[:, None] & (ieg.threshold < 1), y_BK, g_BK)
        z_MK = F.one_hot(batch.probe_label_M, batch.classes).double()
        images, labels, is_probe = [], [], []
        M = len(z_MK)
        for group, key in enumerate(batch.group_keys):
            noisy = slice(group * B // n, (group + 1) * B // n)
            trusted = slice(group * M // n, (group + 1) * M // n)
            image = torch.cat([batch.probe_MCHW[trusted], batch.weak_BCHW[noisy], batch.strong_BCHW[noisy]])
            label = torch.cat([z_MK[trusted], label_BK[noisy], label_BK[noisy]])
            if ieg.mixup == "on":
                rng = np.random.Generator(np.random.Philox(key=key))
                partner, beta = rng.permutation(len(image)), torch.from_numpy(rng.beta(0.5, 0.5, len(image)))
                beta = torch.maximum(beta, 1 - beta) if ieg.fold_beta else beta
                pairs = [(i, j, b) for i, (j, b) in enumerate(zip(partner, beta, strict=True))]
                image = torch.stack([b * image[i] + (1 - b) * image[j] for i, j, b in pairs])
                label = torch.stack([b * label[i] + (1 - b) * label[j] for i, j, b in pairs])
            images.append(image)
            labels.append(label)
            is_probe += [True] * (M // n) + [False] * (2 * B // n)
        logits, labels, is_probe = forward_with(model, {}, torch.cat(images)), torch.cat(labels), torch.tensor(is_probe)
        for name, rows in (("mixed_probe", is_probe), ("mixed_noisy", ~is_probe)):
            block = norm(logits[rows]) if ieg.logit_norm else logits[rows]
            parts[name] = soft_ce(labels[rows], block).mean()
        total = total + parts["mixed_probe"] + ieg.p * parts["mixed_noisy"]
    if ieg.kl > 0:  # step 6
        anchor_BK = a_BK if ieg.kl_into_weak else a_BK.detach()
        q_BK = torch.softmax(anchor_BK, 1)
        parts["consistency"] = (q_BK * (q_BK.log() - torch.log_softmax(s_BK, 1))).sum(1).mean()
        total = total + ieg.kl * parts["consistency"]
    return total, parts, weight_B, trusts_B, g_BK


@pytest.mark.parametrize("name", IEG)
def test_the_method_is_what_method_md_says(name, ran, problem):
    it = ran(name)
    total, parts, weight_B, trusts_B, g_BK = by_the_method(IEG[name], problem)
    said = it.outcome.coefficients
    torch.testing.assert_close(said.weight_B / len(weight_B), weight_B, rtol=1e-8, atol=1e-10)
    assert torch.equal(said.trust_B > 0, trusts_B)
    torch.testing.assert_close(said.confidence_B, g_BK.max(1).values, rtol=1e-9, atol=0)
    assert torch.equal(said.pseudo_label_B, g_BK.argmax(1))
    assert it.outcome.parts.keys() == parts.keys()
    for part, value in parts.items():
        torch.testing.assert_close(it.outcome.parts[part], value.detach(), rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(it.outcome.total.detach(), total.detach(), rtol=1e-9, atol=0)
    slopes = torch.autograd.grad(total, list(problem.model.parameters()))
    for found, expected in zip(it.gradient.values(), slopes, strict=True):
        assert (found - expected).norm() <= 1e-8 * expected.norm()


def test_every_switch_changes_the_outcome(ran):
    alike = {"second order": "reference", "second order in paper": "paper", "per replica": "reference"}
    alike |= {"last block by second order": "last block"}
    for name in SWITCHED:
        preset = alike.get(name, "paper" if name.endswith("in paper") else "reference")
        gap = max(
            float((ran(name).gradient[key] - ran(preset).gradient[key]).norm() / ran(preset).gradient[key].norm())
            for key in ran(preset).gradient
        )
        if name in alike:
            assert gap < 1e-9  # one worker alone, exact engines
        else:
            assert gap > 1e-6, name


def test_the_problem_asks_both_questions(ran):
    """ω*, λ* and T tell examples apart here: else the tests above would prove little."""
    for name in ("reference", "paper"):
        said = ran(name).outcome.coefficients
        assert 0 < said.trust_B.sum() < len(said.trust_B)
        assert 0 < (said.weight_B / len(said.weight_B) >= THRESHOLD).sum() < len(said.weight_B)
    assert (ran("reference").outcome.coefficients.weight_B == 0).any()


def test_negative_meta_gradients_trust_and_others_do_not(problem, monkeypatch):
    """λ* = 1 only where ∂L^p/∂λ < 0 (a zero gradient trusts the pseudo label); all ∂L^p/∂ω > 0 gives all-zero ω*."""
    size = len(problem.batch.label_B)
    slope_B = torch.tensor([-1.0, 0.0, 1.0] * (size // 3), dtype=torch.float64)
    monkeypatch.setattr("training.objectives.ieg.meta_gradient", lambda *_: (torch.ones_like(slope_B), slope_B))
    outcome, gradient = call(reference(), problem)
    assert outcome.coefficients.trust_B.tolist() == [1, 0, 0] * (size // 3)
    assert not outcome.coefficients.weight_B.any()
    assert all(torch.isfinite(value).all() for value in gradient.values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"p": -1.0}, "objective.p is -1.0: it must be 0 or more"),
        ({"kl": -0.5}, "objective.kl is -0.5"),
        ({"threshold": -0.1}, "objective.threshold is -0.1"),
        ({"label_weight": -1.0}, "objective.label_weight is -1.0"),
        ({"lambda0": 1.01}, "objective.lambda0 is 1.01: it must be between 0 and 1"),
        ({"lambda0": -0.01}, "objective.lambda0 is -0.01"),
        ({"temperature": 0.0}, "objective.temperature is 0.0: it must be above 0"),
        ({"lookahead_lr": 0.0}, "objective.lookahead_lr is 0.0: it must be above 0, or None"),
        ({"lookahead": "l2r"}, "objective.lookahead l2r .* set objective.relabel to False"),
    ],
)
def test_impossible_fields_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Ieg(**changes)


def test_fields_at_their_ends_are_accepted(problem):
    for ends in ({"p": 0.0, "kl": 0.0, "threshold": 0.0, "lambda0": 0.0}, {"lambda0": 1.0, "label_weight": 0.0}):
        outcome, _ = call(replace(reference(), **ends), problem.fresh())
        assert torch.isfinite(outcome.total)


@pytest.mark.parametrize(
    ("network", "block", "layer"),
    [
        ("wrn-16-1", "blocks.5.", "head."),
        ("resnet29", "blocks.8.", "head."),
        ("resnet18", "layer4.1.", "fc."),
        ("mobilenetv3_small_050", "blocks.5.", "classifier."),
        ("vgg13", "0.31.", "3."),  # itself a nn.Sequential
    ],
)
def test_the_last_block_and_layer_are_found(network, block, layer):
    model = networks.build(network, 3, 5, seed=0)
    names = list(dict(model.named_parameters()))
    of_block, of_layer = (list(parameters_of(model, scope, 5)) for scope in ("last_block", "last_layer"))
    assert of_block == names[-len(of_block) :]
    assert of_block[0].startswith(block)
    assert [name for name in names if name.startswith(block)] == of_block[: sum(n.startswith(block) for n in of_block)]
    assert of_layer == [f"{layer}weight", f"{layer}bias"]
    assert list(parameters_of(model, "all", 5)) == names


def test_a_network_without_blocks_is_told_so():
    with pytest.raises(ValueError, match=r"set objective\.meta_scope to all"):
        parameters_of(torch.nn.Linear(2, 5), "last_block", 5)


def test_every_pass_is_channels_last_where_the_images_are(problem):
    names = ("weak_BCHW", "strong_BCHW", "probe_MCHW")
    images = {name: getattr(problem.batch, name).contiguous(memory_format=torch.channels_last) for name in names}
    seen = []
    problem.model.stem.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    call(reference(), replace(problem, batch=replace(problem.batch, **images)))
    assert [len(image) for image in seen] == [12, 12, 10, 12, 34]
    assert all(image.is_contiguous(memory_format=torch.channels_last) for image in seen)


# The small formulas.

LOGITS = st.lists(st.lists(st.floats(-30, 30), min_size=3, max_size=3), min_size=1, max_size=5).map(
    lambda rows: torch.tensor(rows, dtype=torch.float64)
)


@given(logits_BK=LOGITS, other_BK=LOGITS)
def test_divergences_against_their_definition(logits_BK, other_BK):
    size = min(len(logits_BK), len(other_BK))
    p, q = (x[:size].softmax(1).numpy() for x in (logits_BK, other_BK))
    expected_ce, expected_kl = -(p * np.log(q)).sum(1), (p * np.log(p / q)).sum(1)
    target_BK = torch.from_numpy(p)
    np.testing.assert_allclose(cross_entropy(target_BK, other_BK[:size]), expected_ce, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(kl_divergence(logits_BK[:size], other_BK[:size]), expected_kl, rtol=1e-9, atol=1e-12)


@given(logits_BK=LOGITS, temperature=st.floats(0.2, 2))
def test_sharpening_scales_logits(logits_BK, temperature):
    sharp_BK = sharpen(logits_BK.div(4).softmax(1), temperature)
    torch.testing.assert_close(sharp_BK, logits_BK.div(4 * temperature).softmax(1), rtol=1e-9, atol=1e-300)


def test_logit_norm_is_per_block_over_all_entries():
    rng = torch.Generator().manual_seed(0)
    blocks = [scale * torch.randn(3, 4, generator=rng, dtype=torch.float64) for scale in (0.1, 7.0)]
    for block, normal in zip(blocks, logit_norm(blocks, Alone()), strict=True):
        np.testing.assert_allclose(normal, block / np.sqrt(np.mean(block.numpy() ** 2) + 1e-8), rtol=1e-12)
    assert not logit_norm([torch.zeros(2, 2)], Alone())[0].any()


def test_forward_aside_leaves_statistics_alone(problem):
    before = copy.deepcopy(problem.model.state_dict())
    expected_BK = copy.deepcopy(problem.model)(problem.batch.strong_BCHW)
    logits_BK = forward_aside(problem.model, problem.batch.strong_BCHW)
    assert torch.equal(logits_BK, expected_BK)
    assert same(problem.model.state_dict(), before)
    logits_BK.sum().backward()
    assert problem.model.head.weight.grad is not None


@pytest.mark.parametrize("fold", [True, False])
def test_mixing_draws_follow_beta_one_half(fold):
    partner_nR, beta_nR = mixing_draws(range(50), 200, fold=fold, dtype=torch.float64, device=torch.device("cpu"))
    assert torch.equal(partner_nR.sort(1).values, torch.arange(200).expand(50, 200))
    # Beta(½, ½) is the arcsine law: P(β ≤ x) = 2/π · asin √x; folded, P(β ≤ x) is that at x less that at 1 − x.
    sample = np.sort(beta_nR.flatten().numpy())
    law = 2 / np.pi * np.arcsin(np.sqrt(sample))
    if fold:
        assert sample[0] >= 0.5
        law = law - 2 / np.pi * np.arcsin(np.sqrt(1 - sample))
    distance = np.abs(law - (np.arange(len(sample)) + 0.5) / len(sample)).max()
    assert distance < 1.95 / np.sqrt(len(sample))  # Kolmogorov–Smirnov at 0.1 %
    assert len({tuple(row.tolist()) for row in partner_nR}) == 50


def test_a_group_s_draws_depend_on_its_key_alone():
    draw = functools.partial(mixing_draws, rows=9, fold=True, dtype=torch.float32, device=torch.device("cpu"))
    both, second = draw((3, 2**127)), draw((2**127,))
    for pair, single in zip(both, second, strict=True):
        assert torch.equal(pair[1:], single)
        assert not torch.equal(pair[:1], single)
    assert both[1].dtype == torch.float32


@pytest.mark.parametrize("trailing", [(), (4,), (3, 2, 2)])
def test_mix_stays_within_the_group(trailing):
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, *trailing, generator=rng)
    partner = torch.tensor([[1, 2, 0], [0, 2, 1]])
    beta = torch.rand(2, 3, generator=rng)
    mixed = mix(x, partner, beta)
    for g in range(2):
        for r in range(3):
            expected = beta[g, r] * x[g, r] + (1 - beta[g, r]) * x[g, partner[g, r]]
            torch.testing.assert_close(mixed[g, r], expected)


@pytest.mark.parametrize("name", [name for name in EVERY if "last block" not in name])
def test_of_an_affine_network_logits_may_be_mixed_instead_of_images(name):
    said = build_problem("linear", size=1)
    layer = nn.Linear(said.model[1].in_features, said.batch.classes, dtype=torch.float64)
    layer.load_state_dict(said.model[1].state_dict())
    unsaid = replace(said, model=nn.Sequential(nn.Flatten(), layer))
    assert is_affine(said.model)
    assert not is_affine(unsaid.model)
    outcomes, gradients = [], []
    for problem in (said, unsaid):
        outcome, gradient = call(EVERY[name], posed(name, problem))
        outcomes.append(outcome)
        gradients.append(list(gradient.values()))
    torch.testing.assert_close(outcomes[0].parts, outcomes[1].parts, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-10, atol=1e-13)
    for column in ("weight_B", "trust_B", "loss_B"):
        found, expected = (getattr(outcome.coefficients, column) for outcome in outcomes)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
