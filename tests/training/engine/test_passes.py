"""A network run in chunks, in bf16 or channels last, is the network: same numbers, same names, less memory.

Shapes: B images, K classes.
"""

import copy
import dataclasses
import io
import pickle
import runpy
import subprocess
import sys
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.forward_ad import dual_level, make_dual, unpack_dual
from torch.func import functional_call
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from training.engine import networks
from training.engine.optimiser import Sgd, kernels
from training.engine.passes import compiled as compiled_passes
from training.engine.passes.network import Passes
from training.engine.state import TrainState
from training.engine.step import update
from training.objectives.baselines.reweight import Reweight
from training.objectives.baselines.supervised import Supervised
from training.objectives.ieg import paper, reference, winnow
from training.objectives.interface import Alone, Moment
from training.objectives.losses import normalised_weights
from training.objectives.meta import MetaProblem, meta_gradient
from training.objectives.registry import BASELINES, METHODS
from training.objectives.tangents import FusedTangents, Recorded

build_problem = runpy.run_path(str(Path(__file__).parents[1] / "conftest.py"))["build_problem"]

ENGINES = ["forward", "second_order"]
OBJECTIVES = {
    "supervised": Supervised(),
    **{
        f"{make.__name__} by {engine}": dataclasses.replace(make(), engine=engine)
        for make in (reference, paper, winnow, Reweight)
        for engine in ENGINES
    },
}


def passes(network, chunks=1, dtype=torch.float64, channels_last=False, recompute=False) -> Passes:
    return Passes(network, chunks=chunks, dtype=dtype, channels_last=channels_last, recompute=recompute)


def new_state(model, memory=None) -> TrainState:
    optimiser = Sgd(model, memory or nn.Module(), momentum=0.9, weight_decay=0.03, decays=kernels)
    return TrainState(model, optimiser, average=True, memory=memory)


def train(model, objective, batch, steps=2, workers=None):
    """The state after some steps, and every step's outcome."""
    state = new_state(model, objective.memory(model, 40, batch.classes))
    said = [update(state, objective, batch, lr=0.05, workers=workers or Alone(), steps=steps) for _ in range(steps)]
    return state, said


def assert_trained_alike(found, expected, tolerance):
    """Parameters, averages, velocities, losses and coefficients."""
    torch.testing.assert_close(
        (found[0].state_dict(), found[0].optimiser.descent().velocity),
        (expected[0].state_dict(), expected[0].optimiser.descent().velocity),
        rtol=tolerance,
        atol=tolerance,
        equal_nan=True,  # what a memory has not seen
    )
    for one, other in zip(found[1], expected[1], strict=True):
        for left, right in (
            (one.total, other.total),
            (one.parts, other.parts),
            (one.prediction_BK, other.prediction_BK),
            (vars(one.coefficients), vars(other.coefficients)),
        ):
            torch.testing.assert_close(left, right, rtol=tolerance, atol=tolerance)


def tensors(values: dict) -> dict:
    return {name: value.detach().clone() for name, value in values.items()}


@pytest.fixture
def compiling(monkeypatch):
    """As torch.compile does it, but for the code at its end, which wants a C++ compiler; counts what it does."""
    counters = torch._dynamo.utils.counters

    def backend(operations, inputs):
        counters["backend"]["calls"] += 1
        return torch._dynamo.lookup_backend("aot_eager")(operations, inputs)

    monkeypatch.setattr(compiled_passes, "BACKEND", backend)
    torch._dynamo.reset()
    counters.clear()
    yield counters
    torch._dynamo.reset()


# --- chunks


@pytest.fixture(scope="module")
def group_problem():
    return build_problem("wrn-10-1:group")


@pytest.mark.parametrize("name", OBJECTIVES)
def test_chunks_of_a_group_norm_network_are_the_whole_batch(name, group_problem):
    expected = train(group_problem.fresh().model, OBJECTIVES[name], group_problem.batch)
    found = train(passes(group_problem.fresh().model, chunks=2), OBJECTIVES[name], group_problem.batch)
    assert_trained_alike(found, expected, 1e-12)


@pytest.mark.parametrize("name", BASELINES)
def test_chunks_and_bf16_serve_every_objective(name, group_problem):
    """Three steps, through two stages of those that have some; in bf16 what is kept stays in float32."""
    expected = train(group_problem.fresh().model, METHODS[name](), group_problem.batch, steps=3)
    found = train(passes(group_problem.fresh().model, chunks=2), METHODS[name](), group_problem.batch, steps=3)
    assert_trained_alike(found, expected, 1e-10)
    problem = build_problem(dtype=torch.float32)
    state, said = train(passes(problem.model, 2, torch.bfloat16), METHODS[name](), problem.batch, steps=3)
    kept = [*state.trained(), *(value.grad for value in state.trained()), said[-1].prediction_BK]
    assert {value.dtype for value in kept} == {torch.float32}
    assert all(torch.isfinite(value).all() for value in kept)


def test_chunks_in_float32_are_the_whole_batch_to_rounding():
    problem = build_problem("wrn-10-1:group", dtype=torch.float32)
    expected = train(problem.fresh().model, winnow(), problem.batch)
    found = train(passes(problem.fresh().model, chunks=2, dtype=torch.float32), winnow(), problem.batch)
    assert_trained_alike(found, expected, 1e-4)


def test_one_chunk_is_the_bare_network_bit_for_bit(problem):
    expected = train(problem.fresh().model, reference(), problem.batch)
    assert_trained_alike(train(passes(problem.fresh().model), reference(), problem.batch), expected, 0)


def test_batch_norm_normalises_each_chunk_by_itself(problem):
    image_BCHW = problem.batch.weak_BCHW
    alone = problem.fresh().model
    logits_BK = torch.cat([alone(chunk) for chunk in image_BCHW.chunk(3)])
    logits_BK.square().sum().backward()

    model = passes(problem.fresh().model, chunks=3)
    found_BK = model(image_BCHW)
    moved = tensors(dict(model.named_buffers()))
    found_BK.square().sum().backward()
    torch.testing.assert_close(found_BK, logits_BK, rtol=0, atol=0)
    # running statistics: once a chunk, and not again when backward runs the chunks a second time
    torch.testing.assert_close(moved, dict(alone.named_buffers()), rtol=0, atol=0)
    torch.testing.assert_close(dict(model.named_buffers()), moved, rtol=0, atol=0)
    for value, expected in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(value.grad, expected.grad, rtol=1e-12, atol=1e-12)


def test_a_step_moves_statistics_by_its_weak_views_only(problem):
    model = passes(problem.fresh().model, chunks=2)
    expected = passes(problem.fresh().model, chunks=2)
    expected(problem.batch.weak_BCHW)
    train(model, reference(), problem.batch, steps=1)
    torch.testing.assert_close(dict(model.named_buffers()), dict(expected.named_buffers()), rtol=0, atol=0)


def posed(problem, model, lookahead="momentum") -> MetaProblem:
    batch, dtype = problem.batch, problem.batch.weak_BCHW.dtype
    noise_BK = torch.randn(len(batch.label_B), batch.classes, generator=torch.Generator().manual_seed(1)).to(dtype)
    return MetaProblem(
        model=model,
        batch=batch,
        moment=problem.moment,
        workers=Alone(),
        logits_BK=model(batch.weak_BCHW),
        given_BK=F.one_hot(batch.label_B, batch.classes).to(dtype),
        pseudo_BK=(2 * noise_BK).softmax(1),
        lambda0=0.7,
        alpha=0.1,
        lookahead=lookahead,
        probe_decay=True,
    )


@pytest.mark.parametrize("lookahead", ["momentum", "sgd", "l2r"])
def test_engines_agree_on_chunks_with_batch_norm(problem, lookahead):
    answers = {
        engine: meta_gradient(engine, posed(problem, passes(problem.fresh().model, chunks=2), lookahead))
        for engine in ENGINES
    }
    whole_B = meta_gradient("forward", posed(problem, problem.fresh().model, lookahead))[0]
    for exact_B, oracle_B in zip(*(answers[engine] for engine in ENGINES), strict=True):
        assert (exact_B - oracle_B).norm() <= 1e-10 * oracle_B.norm()
    assert (answers["forward"][0] - whole_B).norm() > 1e-3 * whole_B.norm()  # batch norm does tell chunks from a whole


class Threads:
    """Workers that are threads, one at a time since forward mode is not made for them; autograd does not go through."""

    def __init__(self, size: int) -> None:
        self.size, self.turn = size, threading.Lock()
        self._barrier, self._given = threading.Barrier(size, timeout=60), {}

    def _meet(self) -> None:
        self.turn.release()
        try:
            self._barrier.wait()
        finally:
            self.turn.acquire()

    def mean(self, tensors) -> list[Tensor]:
        assert not any(tensor.requires_grad for tensor in tensors)
        self._given[threading.get_ident()] = tensors
        self._meet()
        means = [sum(parts) / self.size for parts in zip(*self._given.values(), strict=True)]
        self._meet()
        return means


def part_of(batch, rank: int, world: int):
    """What `rank` holds of a batch of four groups."""

    def mine(rows: Tensor) -> Tensor:
        return rows.unflatten(0, (4, -1))[rank::world].flatten(0, 1)

    held = {name: mine(value) for name, value in vars(batch).items() if isinstance(value, Tensor)}
    return dataclasses.replace(batch, **held, group_keys=batch.group_keys[rank::world])


def test_chunks_of_a_group_make_batch_norm_independent_of_the_workers(problem):
    """Also where a group has fewer trusted images than noisy ones."""
    batch = dataclasses.replace(
        problem.batch,
        probe_MCHW=problem.batch.probe_MCHW[:8],
        probe_label_M=problem.batch.probe_label_M[:8],
        group_keys=(1, 2, 3, 4),
    )
    one, said = train(passes(problem.fresh().model, chunks=4), winnow(), batch)
    for world in (2, 4):
        workers, found = Threads(world), {}

        def work(rank, world=world, workers=workers, found=found):
            with workers.turn:
                model = passes(problem.fresh().model, chunks=4 // world)
                found[rank] = train(model, winnow(), part_of(batch, rank, world), workers=workers)

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(world)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for rank in range(world):
            state, answers = found[rank]
            expected = tensors(dict(one.model.named_parameters()))
            torch.testing.assert_close(tensors(dict(state.model.named_parameters())), expected, rtol=1e-11, atol=1e-11)
            for found_step, step in zip(answers, said, strict=True):
                weight_B = step.coefficients.weight_B.unflatten(0, (4, -1))[rank::world].flatten()
                torch.testing.assert_close(found_step.coefficients.weight_B, weight_B, rtol=1e-9, atol=1e-9)


class Dropping(nn.Module):
    """Random in training, by a flag of its own; with a parameter and an unsaved buffer at the root."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((3, 1, 1), 2.0))
        self.register_buffer("shift", torch.ones(3, 1, 1), persistent=False)
        self.head = nn.Linear(3, 2)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        mean_BC = (image_BCHW * self.scale + self.shift).square().mean((2, 3))
        return self.head(F.dropout(mean_BC, 0.5, self.training))


def test_chunks_drop_the_same_again_in_backward():
    network, image_BCHW = Dropping(), torch.randn(6, 3, 4, 4)
    gradients = []
    for model in (copy.deepcopy(network), passes(copy.deepcopy(network), chunks=3, dtype=torch.float32)):
        torch.manual_seed(5)
        chunks = [image_BCHW] if isinstance(model, Passes) else image_BCHW.chunk(3)
        torch.cat([model(chunk) for chunk in chunks]).square().sum().backward()
        gradients.append([value.grad for value in model.parameters()])
    torch.testing.assert_close(gradients[1], gradients[0])
    model.eval()
    assert torch.equal(model(image_BCHW), model(image_BCHW))


def test_a_batch_that_does_not_divide_is_refused_in_training_only(problem):
    state = new_state(passes(problem.model, chunks=4))
    with pytest.raises(ValueError, match="10 images do not divide into 4 equal chunks"):
        update(state, reference(), problem.batch, lr=0.1, workers=Alone())
    assert state.predict(problem.batch.probe_MCHW).shape == (10, 5)


# --- blocks computed again


@pytest.mark.parametrize("name", [*OBJECTIVES, *BASELINES, "last_block", "last_layer"])
def test_blocks_computed_again_are_the_network_to_rounding(name, problem):
    """Batch norm and its running statistics included, whatever the objective reads of the network."""
    scoped = dataclasses.replace(winnow(), meta_scope=name) if name.startswith("last") else None
    objective = scoped or OBJECTIVES.get(name) or METHODS[name]()
    steps = 2 if name in OBJECTIVES else 3
    expected = train(problem.fresh().model, objective, problem.batch, steps)
    found = train(passes(problem.fresh().model, recompute=True), objective, problem.batch, steps)
    assert_trained_alike(found, expected, 1e-11)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_chunks_whose_blocks_are_computed_again_are_the_chunks(dtype, problem):
    problem = problem if dtype == torch.float64 else build_problem(dtype=torch.float32)
    expected, found = (
        train(passes(problem.fresh().model, 2, dtype, True, recompute), winnow(), problem.batch)
        for recompute in (False, True)
    )
    assert_trained_alike(found, expected, 1e-11 if dtype == torch.float64 else 0.02)


@pytest.mark.parametrize(
    ("network", "share"),
    [("resnet18", 0.5), ("densenet100", 0.1), ("mobilenetv3_small_050", 0.5), ("convnext_atto", 0.3),
     ("xcit_nano_12_p8_224", 0.3), ("hrnet_w18_small", 0.9)],  # HRNet changes lists of what its blocks are given
)  # fmt: skip
def test_any_network_s_blocks_are_computed_again(network, share):
    image_BCHW, kept, found = torch.randn(2, 3, 32, 32), [], []
    for recompute in (False, True):
        model = passes(networks.build(network, 3, 4, seed=0), dtype=torch.float32, recompute=recompute)
        held = []
        torch.manual_seed(3)
        with torch.autograd.graph.saved_tensors_hooks(lambda x, held=held: held.append(x.nbytes) or x, lambda x: x):
            logits_BK = model(image_BCHW)
        logits_BK.square().sum().backward()
        kept.append(sum(held))
        found.append([logits_BK.detach(), *(value.grad for value in model.parameters()), *model.buffers()])
    torch.testing.assert_close(found[1], found[0])
    assert kept[1] < share * kept[0]


class Block(nn.Module):
    """Two convolutions behind `first`; changes the list that it is given, as HRNet's and selecsls' do."""

    def __init__(self, first: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(first, nn.Conv2d(3, 3, 1), nn.ReLU(), nn.Conv2d(3, 3, 1))

    def forward(self, image_BCHW: Tensor, *, shifts: Sequence[Tensor | None] = (None,)) -> Tensor:
        if isinstance(shifts, list):
            shifts[0] = shifts[0] + 1
        return self.layers(image_BCHW if shifts[0] is None else image_BCHW * shifts[0])


class Deep(nn.Module):
    """Blocks that begin with `first`, called with `named`."""

    def __init__(self, first: nn.Module, blocks: int = 3, **named: Sequence[Tensor | None]) -> None:
        super().__init__()
        self.blocks, self.named = nn.ModuleList(Block(copy.deepcopy(first)) for _ in range(blocks)), named

    def forward(self, image_BCHW: Tensor) -> Tensor:
        for block in self.blocks:
            image_BCHW = block(image_BCHW, **self.named)
        return image_BCHW.mean((2, 3))


class Growing(nn.Module):
    """Reads a buffer that it moves."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("passes", torch.ones(()))

    def forward(self, image_BCHW: Tensor) -> Tensor:
        self.passes.add_(1)
        return image_BCHW * self.passes.clone()


class Frozen(nn.BatchNorm2d):
    """Batch norm that stays in eval mode."""

    def train(self, mode: bool = True) -> nn.Module:
        return super().train(False)


@pytest.mark.parametrize(
    "network",
    [Deep(Growing()), Deep(spectral_norm(nn.Conv2d(3, 3, 1))), Deep(Frozen(3)), Deep(nn.Identity(), shifts=(None,)),
     Deep(nn.Identity(), shifts=[torch.ones(())])],
)  # fmt: skip
def test_blocks_are_computed_again_from_the_same(network):
    image_BCHW, found = torch.randn(6, 3, 4, 4), []
    for recompute in (False, True):
        model = passes(copy.deepcopy(network), dtype=torch.float32, recompute=recompute).train()
        model(image_BCHW).square().sum().backward()
        found.append([*(value.grad for value in model.parameters()), *model.buffers()])
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


def test_blocks_drop_the_same_again_in_backward_and_in_forward_mode():
    image_BCHW, found = torch.randn(6, 3, 4, 4), []
    network = Deep(nn.Dropout(0.5))
    for recompute in (False, True):
        model = passes(copy.deepcopy(network), dtype=torch.float32, recompute=recompute)
        torch.manual_seed(5)
        with Recorded(keeps=True) as recorded:
            logits_BK = model(image_BCHW)
        for retained in (True, False):
            logits_BK.square().sum().backward(retain_graph=retained)
        found.append([logits_BK.detach(), *(value.grad for value in model.parameters())])
        with torch.no_grad(), dual_level(), FusedTangents(recorded.calls), recorded.replayed():
            moving = {name: make_dual(value.detach(), value.detach()) for name, value in model.named_parameters()}
            found[-1].append(unpack_dual(functional_call(model, moving, (image_BCHW,))).tangent)
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


def test_blocks_that_change_what_they_are_given_are_not_computed_from_that():
    model = passes(Deep(nn.ReLU(inplace=True)), dtype=torch.float32, recompute=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        model(torch.randn(2, 3, 4, 4)).sum().backward()


def test_without_blocks_nothing_can_be_computed_again():
    for network in (
        networks.build("vgg13", 3, 4, seed=0),
        networks.build("regnety_002", 3, 4, seed=0),
        Deep(nn.ReLU(), 1),
    ):
        with pytest.raises(ValueError, match=r"no two blocks .* to compute in turn: leave recompute out"):
            passes(network, recompute=True)


# --- memory


class Peak(TorchDispatchMode):
    """The most bytes that tensors made under it held at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.bytes = 0
        self._held: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for tensor in tree_leaves(made):
            if not isinstance(tensor, Tensor):
                continue
            storage = tensor.untyped_storage()
            if storage._cdata not in self._held | given:
                self._held.add(storage._cdata)
                self.live += storage.nbytes()
                self.bytes = max(self.bytes, self.live)
                weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())
        return made

    def _free(self, storage: int, size: int) -> None:
        self._held.discard(storage)
        self.live -= size


@pytest.mark.parametrize(
    ("objective", "share"),
    [
        (Supervised(), 0.4),
        (winnow(), 0.35),
        # all of the gradient's own graph is kept, whatever the chunks
        (dataclasses.replace(winnow(), engine="second_order"), 0.6),
    ],
)
def test_chunks_save_memory(objective, share):
    problem = build_problem(dtype=torch.float32, noisy=32, probe=32)
    peaks, saved = [], []
    for chunks in (1, 4):
        state = new_state(passes(problem.fresh().model, chunks=chunks, dtype=torch.float32))
        with Peak() as peak:
            update(state, objective, problem.batch, lr=0.05, workers=Alone())
        peaks.append(peak.bytes - peak.live)  # beyond the gradients and velocities that stay
        held = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, held=held: held.append(x.nbytes) or x, lambda x: x):
            state.model(problem.batch.weak_BCHW)
        saved.append(sum(held))
    assert peaks[1] < share * peaks[0]
    assert saved[1] < 0.1 * saved[0]  # after a forward pass


@pytest.mark.slow
@pytest.mark.parametrize("in_stages", [False, True])
def test_blocks_computed_again_save_memory(in_stages):
    """Of the whole step, which needs hardly more than a vanilla one then."""
    problem = build_problem("wrn-22-1", dtype=torch.float32, noisy=16, probe=16, size=32)
    if in_stages:  # as most of timm's are
        blocks = list(problem.model.blocks)
        problem.model.blocks = nn.Sequential(*(nn.Sequential(*blocks[start : start + 3]) for start in (0, 3, 6)))
    peaks = []
    for objective, chunks, recompute in (
        (Supervised(), 1, False), (winnow(), 1, True), (winnow(), 4, False), (winnow(), 4, True),
    ):  # fmt: skip
        state = new_state(passes(problem.fresh().model, chunks, torch.float32, recompute=recompute))
        with Peak() as peak:
            update(state, objective, problem.batch, lr=0.05, workers=Alone())
        peaks.append(peak.bytes - peak.live)
    vanilla, by_block, by_chunk, by_both = peaks
    assert by_block < 1.3 * vanilla
    assert by_both < 0.6 * by_chunk


def test_a_step_holds_three_batches_of_activations_at_most():
    """Those of the joint pass, 3B images: the weak and strong passes are done with by then (`losses.settled`)."""
    problem = build_problem(dtype=torch.float32, noisy=16, probe=16, size=32)
    peaks = []
    for objective in (Supervised(), winnow()):
        state = new_state(problem.fresh().model)
        with Peak() as peak:
            update(state, objective, problem.batch, lr=0.05, workers=Alone())
        peaks.append(peak.bytes - peak.live)
    assert peaks[1] < 3.7 * peaks[0]


# --- bf16


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["forward", "second_order"])
@pytest.mark.parametrize("network", ["wrn-10-1", "wrn-10-1:group", "resnet29"])
def test_meta_gradient_in_bf16_judges_as_in_float32(network, engine):
    problem = build_problem(network, dtype=torch.float32, noisy=64, probe=64)
    exact = meta_gradient(engine, posed(problem, problem.fresh().model))
    found = meta_gradient(engine, posed(problem, passes(problem.fresh().model, dtype=torch.bfloat16)))
    for found_B, exact_B in zip(found, exact, strict=True):
        assert found_B.dtype == torch.float32
        clear_B = exact_B.abs() > 0.1 * exact_B.abs().mean()
        assert (found_B.sign() == exact_B.sign())[clear_B].float().mean() >= 0.95
    weights = torch.stack([normalised_weights(-omega_B, Alone()) for omega_B, _ in (found, exact)])
    assert not torch.equal(weights[0], weights[1])
    assert torch.corrcoef(weights)[0, 1] > 0.98


@pytest.mark.parametrize("name", OBJECTIVES)
def test_bf16_is_inside_the_network_only(name):
    problem = build_problem(dtype=torch.float32)
    model = passes(problem.fresh().model, chunks=2, dtype=torch.bfloat16, channels_last=True)
    inside = set()
    for module in (model.blocks[0].conv1, model.blocks[0].norm2, model.head):
        module.register_forward_hook(lambda module, inputs, output: inside.add((inputs[0].dtype, output.dtype)))
    state, said = train(model, OBJECTIVES[name], problem.batch)
    state.predict(problem.batch.probe_MCHW)
    assert inside == {(torch.bfloat16, torch.bfloat16)}
    kept = [*state.model.parameters(), *state.optimiser.descent().velocity.values(), *state.averaged.values()]
    kept += [buffer for buffer in state.model.buffers() if buffer.is_floating_point()]
    kept += [value.grad for value in state.model.parameters()]
    kept += [said[-1].total, said[-1].prediction_BK, said[-1].coefficients.weight_B]
    assert {value.dtype for value in kept} == {torch.float32}
    same, other = passes(problem.fresh().model, 2, torch.bfloat16), passes(problem.fresh().model, 2, torch.float32)
    for running in (same, other):  # statistics move as in float32, by more than bf16 errs
        running(problem.batch.weak_BCHW)
    moved = same.norm.running_mean - problem.model.norm.running_mean
    expected = other.norm.running_mean - problem.model.norm.running_mean
    assert (moved - expected).norm() < 0.02 * expected.norm()
    assert all(torch.isfinite(value).all() for value in kept)


@pytest.mark.slow
def test_bf16_trains_as_far_as_float32():
    """Three colours to tell apart; after 30 steps of cross-entropy the losses are within 0.02 of each other."""
    rng = torch.Generator().manual_seed(0)
    label_B = torch.arange(48) % 3
    image_BCHW = 0.5 * torch.randn(48, 3, 8, 8, generator=rng)
    image_BCHW[torch.arange(48), label_B] += 0.7
    batch = build_problem(dtype=torch.float32).batch
    batch = dataclasses.replace(batch, weak_BCHW=image_BCHW, label_B=label_B, classes=3)
    losses = []
    for dtype in (torch.float32, torch.bfloat16):
        model = passes(networks.build("wrn-10-1", 3, 3, seed=0), chunks=2, dtype=dtype)
        _, said = train(model, Supervised(), batch, steps=30)
        losses.append([outcome.total.item() for outcome in said])
    assert losses[0] != losses[1]
    assert min(losses[0][0], losses[1][0]) > 0.9
    assert max(losses[0][-1], losses[1][-1]) < 0.1
    assert losses[1][-1] == pytest.approx(losses[0][-1], abs=0.02)


# --- channels last


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("chunks", [1, 2])
def test_channels_last_is_the_same_to_rounding(problem, chunks, engine):
    objective = dataclasses.replace(winnow(), engine=engine)
    expected = train(passes(problem.fresh().model, chunks), objective, problem.batch)
    model, seen = passes(problem.fresh().model, chunks, channels_last=True), []
    model.stem.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], module.weight)))
    found = train(model, objective, problem.batch)
    assert_trained_alike(found, expected, 1e-10)
    tensors = [x for pair in seen for x in pair] + [found[0].averaged["stem.weight"]]
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in tensors)
    assert not expected[0].averaged["stem.weight"].is_contiguous(memory_format=torch.channels_last)


# --- names


@pytest.mark.parametrize(("name", "recompute"), [("wrn-10-1", False), ("wrn-10-1", True), ("", False)])
def test_names_are_the_networks_own(name, recompute):
    network = networks.build(name, 3, 2, seed=0) if name else Dropping()
    names = (
        [[name for name, _ in named] for named in (network.named_parameters(), network.named_buffers())],
        list(network.state_dict()),
    )
    decayed = kernels(network)
    model = passes(network, chunks=2, dtype=torch.bfloat16, channels_last=True, recompute=recompute)
    assert names == (
        [[name for name, _ in named] for named in (model.named_parameters(), model.named_buffers())],
        list(model.state_dict()),
    )
    assert kernels(model) == decayed
    assert list(new_state(model).inference_weights()) == names[1]


def test_weights_and_checkpoints_serve_the_bare_network(problem):
    state, _ = train(passes(problem.fresh().model, chunks=2, channels_last=True), reference(), problem.batch)
    image_BCHW = problem.batch.probe_MCHW
    predicted_BK = state.predict(image_BCHW)
    assert state.model.training
    exported = problem.fresh().model.eval()
    exported.load_state_dict(state.inference_weights())
    with torch.no_grad():
        torch.testing.assert_close(exported(image_BCHW), predicted_BK, rtol=1e-12, atol=1e-12)

    file = io.BytesIO()
    torch.save(state.state_dict(), file)
    file.seek(0)
    bare = new_state(problem.fresh().model)
    bare.load_state_dict(torch.load(file, weights_only=True))
    torch.testing.assert_close(bare.state_dict(), state.state_dict(), rtol=0, atol=0)
    again = new_state(passes(problem.fresh().model, chunks=1, dtype=torch.bfloat16))
    again.load_state_dict(bare.state_dict())
    torch.testing.assert_close(again.state_dict(), state.state_dict(), rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("how", [{"chunks": 2}, {"chunks": 1, "compiled": True}, {"chunks": 1, "recompute": True}])
def test_a_copy_lives_on_its_own(problem, how, compiling):
    model = Passes(problem.model, dtype=torch.float64, channels_last=False, **how)
    other, before = copy.deepcopy(model), tensors(model.state_dict())
    train(other, winnow(), problem.batch, steps=1)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    again = pickle.loads(pickle.dumps(other))  # what is compiled is left behind
    torch.testing.assert_close(again.state_dict(), other.state_dict(), rtol=0, atol=0)
    other.eval()
    assert model.training
    assert all(module.training for module in model.modules())
    moment = Moment(lr=0.05)
    totals = [Supervised()(copied, problem.batch, moment, Alone()).total for copied in (model, copy.deepcopy(model))]
    assert totals[0] == totals[1]


# --- compiled


def compiled(network, dtype=torch.float64) -> Passes:
    return Passes(network, chunks=1, dtype=dtype, channels_last=False, compiled=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "sizes", "moved"),
    [("winnow", 3, 1), ("paper", 3, 1), ("supervised", 1, 0), ("mwn", 2, 1), ("mlc", 2, 1)],
)
def test_compiled_passes_are_the_same_and_few_graphs(name, sizes, moved, compiling, problem):
    expected = train(problem.fresh().model, METHODS[name](), problem.batch, steps=3)
    found = train(compiled(problem.fresh().model), METHODS[name](), problem.batch, steps=3)
    assert_trained_alike(found, expected, 1e-9)
    assert compiling["stats"]["unique_graphs"] == sizes  # of noisy, trusted and mixed images
    assert compiling["backend"]["calls"] == sizes + moved  # forward mode once, too
    assert not compiling["graph_break"]
    found[0].predict(problem.batch.probe_MCHW[:3])  # evaluation is left as it is
    assert compiling["stats"]["unique_graphs"] == sizes


@pytest.mark.slow
def test_compiled_bf16_trains(compiling):
    problem = build_problem(dtype=torch.float32)
    state, said = train(compiled(problem.fresh().model, torch.bfloat16), winnow(), problem.batch, steps=3)
    assert state.finite()
    assert said[-1].total < said[0].total
    assert not compiling["graph_break"]


@pytest.mark.slow
def test_compiled_forward_mode_knows_what_moves(compiling, problem):
    """Two parameters of one shape, and then both."""
    model, image = compiled(problem.fresh().model), problem.batch.weak_BCHW
    names = [name for name, _ in model.named_parameters() if name.startswith("blocks.0.norm1.")]
    for moving in (names[:1], names[1:], names):
        tangents = []
        for network in (model, model._original):
            buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}
            with torch.no_grad(), dual_level(), FusedTangents():
                held = {name: model.get_parameter(name).detach() for name in moving}
                values = {name: make_dual(value, torch.ones_like(value)) for name, value in held.items()}
                tangents.append(unpack_dual(functional_call(network, {**buffers, **values}, (image,))).tangent)
        torch.testing.assert_close(*tangents, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
def test_two_networks_compile_each_their_own(compiling, problem):
    expected = train(problem.fresh().model, METHODS["co-teaching"](), problem.batch, steps=2)
    found = train(compiled(problem.fresh().model), METHODS["co-teaching"](), problem.batch, steps=2)
    assert_trained_alike(found, expected, 1e-9)


@pytest.mark.slow
def test_a_fresh_process_compiles():
    """As a worker is: without what other tests have imported of torch."""
    code = """
import torch
from training.engine import networks
from training.engine.passes import compiled, network as passes
compiled.BACKEND = "aot_eager"
network = networks.build("wrn-10-1", 3, 4, seed=0)
model = passes.Passes(network, chunks=1, dtype=torch.float32, channels_last=False, compiled=True)
logits = model(torch.randn(2, 3, 8, 8))
for retained in (True, False):
    logits.sum().backward(retain_graph=retained)
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
