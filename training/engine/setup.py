"""What a worker begins with: the recipe's network and training state, and the newest checkpoint in it.

Shapes: N noisy examples of the training set, K classes.
"""

from __future__ import annotations

import torch
from torch import nn

from training.engine import networks
from training.engine.adamw import AdamW
from training.engine.clipping import Clipped
from training.engine.layers import Frozen, Scaled, scales
from training.engine.optimiser import Optimiser, Sgd, TorchOptimiser, everything, kernels
from training.engine.passes.network import Passes
from training.engine.state import TrainState
from training.recipe import Recipe
from training.runs import checkpoint


def new_network(recipe: Recipe, classes: int, workers: int, device: torch.device) -> nn.Module:
    """Build the network before step 0, as each of `workers` runs it.

    Raises ValueError for an unknown name, and for what the network cannot be or do.
    """
    height, _, channels = recipe.dataset.shape
    network: nn.Module = networks.build(
        recipe.network,
        channels,
        classes,
        recipe.seed,
        size=height,
        drop_path=recipe.drop_path,
        own_input=bool(recipe.weights),
    ).to(device)
    chunks = recipe.groups // workers // recipe.pass_groups if recipe.pass_groups else 1
    dtype = torch.bfloat16 if recipe.precision == "bf16" else torch.get_default_dtype()
    if chunks == 1 and dtype != torch.bfloat16 and not (recipe.channels_last or recipe.recompute or recipe.compile):
        return network
    return Passes(
        network,
        chunks=chunks,
        dtype=dtype,
        channels_last=recipe.channels_last,
        recompute=recipe.recompute,
        compiled=recipe.compile,
    )


def new_state(recipe: Recipe, classes: int, examples: int, workers: int, device: torch.device) -> TrainState:
    """Build the state before step 0, the same on every one of `workers`; for training on `examples` noisy ones."""
    model = new_network(recipe, classes, workers, device)
    memory = recipe.objective.memory(model, examples, classes).to(device)
    optimiser = new_optimiser(recipe, model, memory, classes)
    average = recipe.objective.average_parameters
    return TrainState(model, optimiser, average=average, memory=memory, average_decay=recipe.ema_decay)


def new_optimiser(recipe: Recipe, model: nn.Module, memory: nn.Module, classes: int) -> Optimiser:
    """Return the recipe's optimiser of a model and of its objective's memory, before its first update.

    Around it stand rates by layer, then clipping, then freezing: a norm is of the gradients that move something. Raises
    ValueError where the network knows no layers.
    """
    decays = everything if recipe.decay == "all" else kernels
    momentum, weight_decay = recipe.momentum, recipe.weight_decay
    if recipe.optimiser == "adamw":
        inner: TorchOptimiser = AdamW(
            model, memory, momentum=momentum, weight_decay=weight_decay, decays=decays, beta2=recipe.beta2
        )
    else:
        inner = Sgd(model, memory, momentum=momentum, weight_decay=weight_decay, decays=decays)
    optimiser: Optimiser = inner
    if recipe.layer_decay != 1:
        optimiser = Scaled(inner, model, scales(model, recipe.layer_decay))
    if recipe.clip:
        optimiser = Clipped(optimiser, [*model.parameters(), *memory.parameters()], recipe.clip)
    if recipe.freeze == "backbone":
        optimiser = Frozen(optimiser, model, classes, recipe.freeze_steps)
    return optimiser


def resume(state: TrainState, folder: str, rank: int, world: int) -> list[dict[str, float]]:
    """Continue from the newest checkpoint, if there is one; return the history until then.

    Every worker gets its own batch-norm statistics back, or their mean where the number of workers has changed. Raises
    checkpoint.DamagedError, and then takes the damaged checkpoint out of the folder, so that the next start goes on
    from the one before it.
    """
    done = checkpoint.commits(folder)
    if not done:
        return []
    try:
        saved = checkpoint.load(folder, done[-1])
    except checkpoint.DamagedError:
        checkpoint.drop_after(folder, done[-2].step if len(done) > 1 else 0)
        raise
    state.load_state_dict(saved)
    of_all = saved["statistics"]
    for name, buffer in state.model.named_buffers():
        values = torch.stack([of_one[name] for of_one in of_all])
        mean = values.mean(0) if values.is_floating_point() else values[0]
        buffer.copy_(values[rank] if len(of_all) == world else mean)
    return saved["history"]
