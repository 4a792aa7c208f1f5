"""A recipe is everything a run is: a frozen dataclass, changed from the command line, the same everywhere.

A training script is a function that returns a recipe, and `parse`, by which the command line changes any field. What is
found elsewhere, by a sweep or in a file, changes it in the same way: through `override`.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NamedTuple

import tyro
import yaml

from pipeline import sources, storage
from pipeline.dataset import InputError, Source
from training.engine.schedule import Schedule
from training.objectives.ieg import Ieg
from training.objectives.interface import Objective
from training.objectives.registry import METHODS

HUB = "pretrained"  # weights of timm's own hub


@dataclass(frozen=True)
class Recipe:
    """Describe a training run."""

    name: str
    """Name of the run: its folder under `storage`. The same name again resumes from the last checkpoint."""
    dataset: Source
    """Which data set, with which noise and probe set."""
    objective: Objective
    """What is minimised; chosen by --method, its fields changed one by one."""
    data: str = ""
    """Where the data set is: a local path or any fsspec URL, such as gs://bucket/folder."""
    storage: str = "runs"
    """Where runs are kept: a local path or a URL."""
    start_from: str = ""
    """Folder or URL of a finished run whose weights this one starts from: of the same network, with a new last layer
    where the classes are others."""
    network: str = "wrn-28-10"
    """wrn-DEPTH-WIDTH, resnet29, resnet29-preact, any of them with :group for group normalisation, or a timm name, with
    or without a tag: resnet50.a1_in1k."""
    weights: str = ""
    """What a timm network starts from: pretrained (timm's hub), or a .safetensors or .pth file at any path or URL. With
    other classes it gets a new last layer; images come to it with the mean and deviation it was trained with."""
    drop_path: float = 0.0
    """Probability at which a timm network leaves out its last block, falling to 0 at the first (stochastic depth)."""
    schedule: Schedule = field(default_factory=Schedule)
    """Learning rate over the steps, and how many steps there are."""
    batch: int = 100
    """Noisy examples a step, over all workers (paper: B = 100 on CIFAR)."""
    probe_batch: int = 100
    """Trusted examples a step, over all workers (paper: M = B)."""
    group: int = 25
    """Noisy examples of one group: the unit of order, handed to workers in turn. The number of workers changes nothing
    as long as it divides batch/group."""
    optimiser: Literal["sgd", "adamw"] = "sgd"
    """What updates the parameters (paper: SGD). The lookahead is that of the optimiser, and exact in either."""
    momentum: float = 0.9
    """Momentum of SGD, or AdamW's β₁, read by the lookahead (paper: 0.9)."""
    beta2: float = 0.999
    """AdamW's β₂: how slowly its mean of squared gradients moves."""
    weight_decay: float = 5e-4
    """Weight decay in PyTorch's sense, coupled in SGD (WRN 5e-4, ResNet-29 2e-4, ResNet-50 4e-4), decoupled in AdamW
    (0.05 is usual)."""
    decay: Literal["all", "kernels"] = "all"
    """What weight decay acts on: all parameters (WRN), or kernels of convolutions and linear layers (ResNet-29)."""
    clip: float = 0.0
    """Norm that the gradient of all parameters together is clipped to, in the lookahead as well; 0: not at all."""
    layer_decay: float = 1.0
    """Factor of the rate from each layer of a timm network to the one before it, as timm counts layers (0.65 to 0.9 is
    usual for pretrained transformers); 1: all have the same."""
    freeze: Literal["nothing", "backbone"] = "nothing"
    """What stays as it is for the first freeze_steps: backbone is all but the last layer."""
    freeze_steps: int = 0
    """Steps at the start in which that does not move; 0: the whole run."""
    ema_decay: float = 0.999
    """Decay of the moving average of parameters, which is evaluated; near the start it is lower, (1+t)/(10+t)."""
    workers: int | tuple[int, int] = 1
    """Training workers, one process each (one GPU each where there are GPUs); 0 trains inside this process, without
    Ray, and starts in seconds. Of two numbers, least and most, the run takes what the cluster has, and goes on with the
    rest as machines come and go."""
    actors: int = 2
    """The most CPU actors that make views; without workers, threads of this process."""
    device: Literal["auto", "cpu", "gpu"] = "auto"
    """Where workers train; auto takes GPUs where the cluster has one for each worker, or sets training nodes apart."""
    precision: Literal["float32", "bf16", "float64"] = "float32"
    """Numbers that the network computes in; under bf16 parameters, averages and losses stay in float32."""
    channels_last: bool = False
    """Keep images and kernels in NHWC order, which GPUs with tensor cores prefer."""
    compile: bool = False
    """Compile the network's training passes with torch.compile: a minute or more at every start, then perhaps shorter
    steps. It leaves out methods that read features. On a CPU it needs a C++ compiler."""
    cuda_graph: bool = False
    """Let a GPU repeat the step's passes by itself, as one CUDA graph, instead of waiting for its host: a third of the
    time with ResNet-29, nearly the same with networks that fill a GPU. For one worker, networks without random layers
    such as dropout, and methods whose steps are all alike (an error names them)."""
    recompute: bool = False
    """Keep what goes from block to block alone, and compute the inside of a block again in backward: the same numbers,
    with 0.4 of the memory for a quarter more time; networks of few blocks save less. With pass_groups, less still."""
    pass_groups: int = 0
    """Groups that go through the network at once; 0: all that a worker has. Fewer need less memory and more time, for
    the same result: the meta step is still over the whole batch. Batch norm normalises the groups of a pass together,
    so with 1 even networks with batch norm do not depend on the number of workers."""
    evaluate_every: int = 0
    """Steps between test evaluations, for curves; cycle ends are always evaluated; 0: only those."""
    checkpoint_steps: int = 0
    """Steps between checkpoints; evaluations are always followed by one; 0: by the clock only."""
    checkpoint_minutes: float = 10.0
    """Minutes between checkpoints, counted on one worker; 0: not by the clock."""
    timeout: float = 600.0
    """Seconds that a worker waits for the others before the run starts again from its last checkpoint."""
    tracker: Literal["tensorboard", "mlflow", "wandb"] = "tensorboard"
    """Where rank 0 logs: event files in the run's folder, or MLflow or W&B (pip install -e ".[trackers]")."""
    seed: int = 0
    """Seed of the data split, the noise, the network and every draw."""

    def __post_init__(self) -> None:
        self._check_numbers()
        self._check_optimiser()
        self._check_groups()
        self._check_passes()

    def _check_numbers(self) -> None:
        positive = ("batch", "probe_batch", "group", "actors")
        for name in positive:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be 1 or more")
        at_least_0 = ("evaluate_every", "weight_decay", "seed", "checkpoint_steps", "checkpoint_minutes", "pass_groups")
        for name in (*at_least_0, "clip", "freeze_steps"):
            if not getattr(self, name) >= 0:  # NaN too
                raise ValueError(f"{name} is {getattr(self, name)}: it must be 0 or more")
        if self.seed >= 2**32:
            raise ValueError(f"seed is {self.seed}: it must be below 2^32")
        for name in ("momentum", "beta2", "drop_path", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 0 and below 1")
        if not self.name or "/" in self.name:
            raise ValueError(f"name is {self.name!r}: it must be a folder name")
        if not self.timeout > 0:
            raise ValueError(f"timeout is {self.timeout}: it must be above 0 seconds")

    def _check_optimiser(self) -> None:
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"layer_decay is {self.layer_decay}: it must be above 0 and at most 1")
        if self.freeze_steps and self.freeze == "nothing":
            raise ValueError(f"freeze_steps is {self.freeze_steps} and nothing is frozen: set --freeze backbone")
        ahead = getattr(self.objective, "lookahead_lr", None)
        if self.optimiser == "adamw" and ahead is not None and ahead > 10 * self.schedule.lr:
            raise ValueError(
                f"objective.lookahead_lr {ahead} is made for SGD: AdamW moves every parameter by about that much; "
                "set it to None (the schedule's rate), or near schedule.lr"
            )

    def _check_groups(self) -> None:
        if self.batch % self.group:
            raise ValueError(f"batch {self.batch} is not a multiple of group {self.group}: change one of them")
        least, most = self.least_workers, self.most_workers
        if least < 0 or most < least or (isinstance(self.workers, tuple) and least < 1):
            raise ValueError(f"workers is {self.workers}: it must be 0 or more, or two numbers, least and most, from 1")
        for workers in range(max(least, 1), most + 1):
            if self.groups % workers:
                raise ValueError(
                    f"{self.groups} groups a batch do not divide among {workers} workers: change group ({self.group})"
                )
            held = self.groups // workers
            if self.pass_groups and held % self.pass_groups:
                raise ValueError(f"{held} groups a worker do not divide into passes of {self.pass_groups}")
        if self.probe_batch % self.groups:
            raise ValueError(f"probe_batch {self.probe_batch} is not a multiple of the {self.groups} groups a batch")

    def _check_passes(self) -> None:
        engine, scope = getattr(self.objective, "engine", ""), getattr(self.objective, "meta_scope", "all")
        if self.compile and (engine == "second_order" or scope != "all" or self.pass_groups or self.recompute):
            raise ValueError(
                "compile goes with none of engine second_order, a smaller meta_scope, pass_groups and recompute"
            )
        if self.cuda_graph and self.freeze_steps:
            raise ValueError("cuda_graph repeats one and the same step: leave freeze_steps out")
        if self.cuda_graph and (self.most_workers > 1 or not self.objective.steady):
            steady = ", ".join(name for name, make in METHODS.items() if make().steady)
            raise ValueError(
                f"cuda_graph is for one worker, and for the methods {steady} with an objective.lookahead_lr"
            )

    @property
    def groups(self) -> int:
        """Return the number of groups of a batch."""
        return self.batch // self.group

    @property
    def least_workers(self) -> int:
        """Return the fewest workers the run may have."""
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def most_workers(self) -> int:
        """Return the most workers the run may have."""
        return self.workers if isinstance(self.workers, int) else self.workers[1]

    @property
    def evaluations(self) -> frozenset[int]:
        """Return the numbers of steps after which the model is evaluated and a checkpoint kept."""
        ends = frozenset(self.schedule.ends)
        if not self.evaluate_every:
            return ends
        return ends | frozenset(range(self.evaluate_every, self.schedule.steps, self.evaluate_every))


def tuned(objective: Objective, p: float, kl: float) -> Objective:
    """Return `objective` with a data set's own weights p and k, where it has those terms."""
    if not isinstance(objective, Ieg):
        return objective
    return dataclasses.replace(objective, p=p, kl=kl if objective.kl else 0.0)


def looking_ahead(objective: Objective, lr: float | None) -> Objective:
    """Return `objective` whose meta step, if it has one, looks ahead by an update at `lr`; None: at the schedule's."""
    return dataclasses.replace(objective, lookahead_lr=lr) if isinstance(objective, Ieg) else objective


def from_imagenet(recipe: Recipe, schedule: Schedule, weight_decay: float) -> Recipe:
    """Return `recipe` from torchvision's first ResNet-50 of ImageNet, of 2016, from which most others started too.

    Its meta step looks ahead at the schedule's first rate.
    """
    return dataclasses.replace(
        recipe,
        objective=looking_ahead(recipe.objective, schedule.lr),
        network="resnet50.tv_in1k",
        weights=HUB,
        schedule=schedule,
        weight_decay=weight_decay,
    )


def parse(
    recipe: Callable[[str], Recipe],
    arguments: Sequence[str] | None = None,
    variants: Sequence[Callable[[str], Recipe]] = (),
) -> Recipe:
    """Return the recipe that the command line asks for.

    It is `recipe(method)`, or that of the variant that --variant names, changed by the fields of a file, then field by
    field.

    `--help` shows every field; a misspelt or impossible one ends the program with the reason and status 2.
    """
    chosen = preset(recipe, arguments, variants)
    return tyro.cli(
        Recipe, default=chosen.recipe, args=chosen.rest, description=chosen.about, config=(tyro.conf.AvoidSubcommands,)
    )


class Preset(NamedTuple):
    """Hold what a command line starts from."""

    method: str
    recipe: Recipe
    rest: list[str]  # arguments that neither --method nor --recipe took
    about: str  # the text above the help


def preset(
    recipe: Callable[[str], Recipe],
    arguments: Sequence[str] | None,
    variants: Sequence[Callable[[str], Recipe]] = (),
) -> Preset:
    """Return what --method, --recipe and --variant make of `recipe` and its `variants`, which have their functions'
    names; a mistake in them ends the program with status 2.
    """
    made = {"paper": recipe, **{each.__name__: each for each in variants}}
    try:
        (method, found, variant), rest = tyro.cli(_start, args=arguments, return_unknown_args=True, add_help=False)
        if variant not in made:
            raise InputError(f"--variant is {variant!r}: choose one of {', '.join(made)}")
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    recipe = made[variant]
    about = (
        f"{(recipe.__doc__ or '').strip()}\n\n--method METHOD sets the objective before all else: {', '.join(METHODS)}."
        "\n--recipe FILE sets it and some fields as a sweep found them, such as its best.yaml; a path or URL."
    )
    for each in variants:
        about += f"\n--variant {each.__name__}: {(each.__doc__ or '').strip().splitlines()[0]}"
    return Preset(method, override(recipe(method), found), rest, about)


_EITHER = tyro.conf.create_mutex_group(required=False)


def _start(
    method: Annotated[str, _EITHER] = "winnow", recipe: Annotated[str, _EITHER] = "", variant: str = "paper"
) -> tuple[str, dict[str, Any], str]:
    # A method's name, fields by dotted path, and which of a script's recipes, for tyro to call.
    found = read_fields(recipe) if recipe else {}
    method = found.pop("method", method)
    if method not in METHODS:
        named = f"{recipe} names the method {method!r}" if recipe else f"--method is {method!r}"
        raise InputError(f"{named}: choose one of {', '.join(METHODS)}")
    return method, found, variant


def override(recipe: Recipe, fields: Mapping[str, Any]) -> Recipe:
    """Return `recipe` with fields changed by their dotted paths, as the flags of the same names do it.

    An unknown path or an impossible value ends the program, as on the command line: with the reason, the closest name
    and status 2.
    """
    flags = [word for path, value in fields.items() for word in (f"--{path}", *_words(value))]
    return tyro.cli(Recipe, default=recipe, args=flags, config=(tyro.conf.AvoidSubcommands,))


def difference(recipe: Recipe, from_: Recipe) -> dict[str, Any]:
    """Return the fields, by dotted path, by which `override` makes `recipe` of `from_`.

    Both are of one data set and method.
    """

    def leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
        if not dataclasses.is_dataclass(value):
            yield path, value
            return
        for each in dataclasses.fields(value):
            yield from leaves(getattr(value, each.name), f"{path}.{each.name}" if path else each.name)

    before = dict(leaves(from_, ""))
    return {path: value for path, value in leaves(recipe, "") if value != before[path]}


def _words(value: Any) -> Iterator[str]:
    # A float in full, so that a run from a file is to the bit the run of the sweep.
    yield from (str(each) for each in value) if isinstance(value, (list, tuple)) else (str(value),)


def read_fields(url: str) -> dict[str, Any]:
    """Return fields of a recipe by dotted path, and perhaps its method, from a YAML file.

    Raises InputError where there is no such file, or no YAML of lines such as 'objective.p: 4.5' in it.
    """
    fs, path = storage.connect(url)
    try:
        held = yaml.safe_load(storage.read(fs, path))
    except FileNotFoundError as error:
        raise InputError(f"there is no file {url}: a sweep writes its best.yaml when it ends") from error
    except yaml.YAMLError as error:
        raise InputError(f"{url} is not YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(held, dict) or not all(isinstance(name, str) for name in held):
        raise InputError(f"{url} holds no fields: it wants lines such as 'objective.p: 4.5'")
    return held


def publishable(recipe: Recipe) -> dict[str, Any]:
    """Return the recipe as plain data without its URLs, which may hold secrets: for trackers and model files."""
    plain = {name: value for name, value in as_json(recipe).items() if name not in ("data", "storage", "start_from")}
    return plain | {"weights": "a file" if recipe.weights not in ("", HUB) else recipe.weights}


def source_of(data: Mapping[str, Any]) -> Source:
    """Return the data set of a recipe as plain data, such as recipe.json's `dataset`: the inverse of `as_json` there.

    Raises InputError for an unknown kind or field.
    """
    return sources.from_json(data)


def as_json(recipe: Recipe) -> dict[str, Any]:
    """Return the recipe as plain data, as JSON has it, with the names of its data set's and objective's classes."""
    plain = {
        **dataclasses.asdict(recipe),
        "dataset": sources.to_json(recipe.dataset),
        "objective": {"kind": type(recipe.objective).__name__, **dataclasses.asdict(recipe.objective)},  # type: ignore[call-overload]
    }
    return json.loads(json.dumps(plain))  # tuples are lists
