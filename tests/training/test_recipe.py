import dataclasses
import importlib
import json
import math
import re
import sys

import pytest

from pipeline.cifar import Cifar
from pipeline.dataset import InputError
from pipeline.digits import Digits
from pipeline.index import Sharded
from pipeline.noise import Noise
from training.engine import networks
from training.objectives.baselines.reweight import Reweight
from training.objectives.baselines.supervised import Supervised
from training.objectives.ieg import Ieg, ablation, paper, reference
from training.objectives.interface import Objective
from training.objectives.registry import METHODS
from training.recipe import Recipe, as_json, difference, override, parse, source_of, tuned


def recipe(method: str) -> Recipe:
    """A run on digits."""
    return Recipe(name="run", dataset=Digits(), objective=METHODS[method]())


def refusal(arguments, capsys) -> str:
    """What a refused command line leaves on stderr, in one line without frames; status 2, nothing on stdout."""
    with pytest.raises(SystemExit) as stopped:
        parse(recipe, arguments)
    assert stopped.value.code == 2
    output = capsys.readouterr()
    assert output.out == ""
    return " ".join(re.sub(r"[│╭╮╰╯─]", " ", output.err).split())


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_a_fresh_frozen_objective(method):
    objective = METHODS[method]()
    assert isinstance(objective, Objective)
    assert isinstance(objective.average_parameters, bool)
    assert objective == METHODS[method]()
    with pytest.raises(dataclasses.FrozenInstanceError):
        objective.average_parameters = False


def test_presets_are_those_of_the_documentation():
    assert METHODS["reference"]() == Ieg() == reference()
    assert reference() == dataclasses.replace(
        paper(),
        label_weight=0.5,
        lookahead_lr=0.1,
        probe_decay=True,
        weights="gradient",
        logit_norm=True,
        kl_into_weak=False,
        fold_beta=True,
        average_parameters=True,
    )
    assert paper().label_weight == 1
    assert paper().lookahead_lr is None
    for shared in (reference(), paper()):
        assert (shared.p, shared.kl, shared.threshold, shared.lambda0, shared.temperature) == (5, 20, 1, 0.9, 0.5)


@pytest.mark.parametrize("base", [reference(), paper()])
def test_ablations_follow_table_9(base):
    """(L_KL, L_β, λ) of the ablations in docs/method.md; the augmentation column belongs to the data set."""
    table = {
        1: (False, "off", False),
        2: (False, "off", True),
        3: (False, "off", True),
        4: (False, "on", True),
        5: (True, "on", True),
        6: (True, "off", True),
        7: (True, "on", True),
        8: (True, "on", False),
        9: (True, "unmixed", True),
        10: (True, "unmixed", True),
    }
    for number, expected in table.items():
        row = ablation(number, base)
        assert (row.kl > 0, row.mixup, row.relabel) == expected
        assert (row.lookahead == "l2r") == (number == 1)
    assert ablation(5, base) == base
    for number in (0, 11):
        with pytest.raises(ValueError, match=f"no ablation M-{number}"):
            ablation(number, base)


@pytest.mark.parametrize("method", ["supervised", "reweight", "paper", "M-6"])
def test_method_is_set_before_all_else(method):
    expected = METHODS[method]()
    assert parse(recipe, ["--method", method]).objective == expected
    assert parse(recipe, ["--seed", "3", f"--method={method}"]).objective == expected


def test_fields_change_one_by_one():
    changed = parse(
        recipe,
        [
            "--objective.kl", "4",
            "--method", "reference",
            "--objective.lookahead-lr", "None",
            "--objective.no-logit-norm",
            "--objective.mixup", "unmixed",
            "--schedule.lr", "0.02",
            "--dataset.noise.rate", "0.4",
            "--batch", "40",
            "--group", "10",
        ],
    )  # fmt: skip
    assert changed == dataclasses.replace(
        recipe("reference"),
        objective=dataclasses.replace(reference(), kl=4.0, lookahead_lr=None, logit_norm=False, mixup="unmixed"),
        schedule=dataclasses.replace(recipe("paper").schedule, lr=0.02),
        dataset=Digits(dataclasses.replace(Digits().noise, rate=0.4)),
        batch=40,
        group=10,
    )
    assert parse(recipe, ["--method", "reweight", "--objective.engine", "second_order"]).objective == Reweight(
        engine="second_order"
    )


def test_the_command_line_is_read_from_the_process(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["digits.py", "--method", "supervised", "--seed", "9"])
    parsed = parse(recipe)
    assert parsed == dataclasses.replace(recipe("supervised"), seed=9)


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        (["--objective.kll", "4"], ["Unrecognized options: --objective.kll", "--objective.kl FLOAT"]),
        (["--schedule.firstcycle", "4"], ["Unrecognized", "--schedule.first-cycle INT"]),
        (["--method", "papre"], ["--method", "papre", "reference", "paper"]),
        (["--method", "supervised", "--objective.kl", "4"], ["Unrecognized options: --objective.kl"]),
        (["--objective.p", "-1"], ["objective.p is -1.0: it must be 0 or more"]),
        (["--objective.lambda0", "1.5"], ["objective.lambda0 is 1.5: it must be between 0 and 1"]),
        (["--objective.lambda0", "-0.1"], ["objective.lambda0 is -0.1: it must be between 0 and 1"]),
        (["--objective.engine", "backward"], ["--objective.engine", "forward", "second_order"]),
        (["--schedule.t-mul", "0.5"], ["schedule.t_mul is 0.5"]),
        (["--dataset.noise.rate", "2"], ["noise rate is 2.0"]),
        (["--batch", "99"], ["batch 99 is not a multiple of group 25"]),
        (["--workers", "3"], ["4 groups a batch do not divide among 3 workers: change group"]),
        (["--probe-batch", "50"], ["probe_batch 50 is not a multiple of the 4 groups a batch"]),
        (["--batch", "many"], ["--batch", "many"]),
    ],
)
def test_what_cannot_be_asked_ends_with_the_reason(arguments, messages, capsys):
    said = refusal(arguments, capsys)
    for message in messages:
        assert message in said


def test_help_shows_methods_and_fields(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(recipe, ["--help"])
    assert stopped.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    for expected in ("A run on digits.", *METHODS, "--objective.kl", "--schedule.first-cycle", "--dataset.noise.rate"):
        assert expected in said


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch": 0}, "batch is 0: it must be 1 or more"),
        ({"group": 0}, "group is 0: it must be 1 or more"),
        ({"probe_batch": -1}, "probe_batch is -1: it must be 1 or more"),
        ({"actors": 0}, "actors is 0: it must be 1 or more"),
        ({"workers": -1}, "workers is -1: it must be 0 or more"),
        ({"evaluate_every": -1}, "evaluate_every is -1"),
        ({"weight_decay": -1e-4}, "weight_decay is -0.0001"),
        ({"seed": -1}, "seed is -1"),
        ({"momentum": 1.0}, "momentum is 1.0: it must be at least 0 and below 1"),
        ({"momentum": -0.1}, "momentum is -0.1"),
        ({"name": ""}, "must be a folder name"),
        ({"name": "a/b"}, "must be a folder name"),
        ({"group": 30}, "batch 100 is not a multiple of group 30"),
        ({"workers": 8}, "4 groups a batch do not divide among 8 workers"),
        ({"probe_batch": 10}, "probe_batch 10 is not a multiple of the 4 groups"),
    ],
)
def test_recipes_that_cannot_run_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(recipe("supervised"), **changes)


def test_workers_that_divide_the_groups_are_accepted():
    for workers in (0, 1, 2, 4):
        assert dataclasses.replace(recipe("supervised"), workers=workers).groups == 4


@pytest.mark.parametrize("method", METHODS)
def test_as_json_is_plain_and_names_its_kinds(method):
    made = recipe(method)
    data = as_json(made)
    assert json.loads(json.dumps(data, allow_nan=False)) == data
    assert data["objective"].pop("kind") == type(made.objective).__name__
    assert data["dataset"].pop("kind") == "Digits"
    assert type(made.objective)(**data["objective"]) == made.objective
    assert data["schedule"]["lr"] == made.schedule.lr
    assert set(data) == {field.name for field in dataclasses.fields(Recipe)}


@pytest.mark.parametrize(
    "dataset",
    [
        Digits(noise=Noise("uniform", 0.3), probe_per_class=2),
        Cifar(classes=100, noise=Noise("labels", source="labels.npz:worse"), policy="none", size=16, limit=40),
        Sharded("webvision", evaluate=("imagenet", "val"), size=128),
    ],
)
def test_a_data_set_comes_back_from_recipe_json(dataset):
    said = as_json(dataclasses.replace(recipe("winnow"), dataset=dataset))["dataset"]
    assert source_of(json.loads(json.dumps(said))) == dataset


@pytest.mark.parametrize("said", [{"kind": "Elsewhere"}, {"kind": "Digits", "rows": 3}, {}])
def test_a_data_set_that_is_unknown_here_is_refused(said):
    with pytest.raises(InputError, match=r"the recipe names a data set that is unknown here .*: use the code"):
        source_of(said)


@pytest.mark.parametrize("script", ["clothing1m", "food101n"])
def test_a_script_of_photographs_starts_from_imagenet_where_that_is_asked_for(script, capsys):
    made = importlib.import_module(f"training.{script}")
    for method in METHODS:
        assert made.pretrained(method).weights == "pretrained"
    arguments = ["--variant", "pretrained", "--method", "winnow", "--workers", "4"]
    chosen = parse(made.recipe, arguments, [made.pretrained])
    assert chosen == dataclasses.replace(made.pretrained("winnow"), workers=4)
    assert networks.build(chosen.network, 3, 14, seed=0, own_input=True).pretrained_cfg["tag"] == "tv_in1k"
    assert parse(made.recipe, [], [made.pretrained]) == made.recipe("winnow")
    for words, message in (
        (["--variant", "other"], "error: --variant is 'other': choose one of paper, pretrained"),
        (["--help"], "--variant pretrained: Start from ImageNet's ResNet-50"),
    ):
        with pytest.raises(SystemExit):
            parse(made.recipe, words, [made.pretrained])
        assert message in " ".join("".join(capsys.readouterr()).split())


def test_supervised_has_one_field():
    assert [field.name for field in dataclasses.fields(Supervised)] == ["average_parameters"]
    assert not math.isnan(Ieg().p)


@pytest.mark.parametrize(
    ("script", "p", "kl"), [("webvision", 4, 8), ("clothing1m", 1, 3.5), ("food101n", 1, 14), ("custom", 1, 4)]
)
def test_scripts_of_photographs_have_their_weights_in_every_method_that_knows_them(script, p, kl):
    made = importlib.import_module(f"training.{script}")
    for method in METHODS:
        recipe = made.recipe(method)
        assert recipe.name == recipe.dataset.dataset == script
        if isinstance(recipe.objective, Ieg):
            assert recipe.objective.p == p
            assert recipe.objective.kl in (0, kl)
        assert all(recipe.groups % workers == 0 for workers in (1, 2, 4))
    assert made.recipe("reference").objective.kl == kl
    assert tuned(Supervised(), p=1, kl=2) == Supervised()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"workers": (2, 1)}, r"workers is \(2, 1\): it must be 0 or more, or two numbers"),
        ({"workers": (0, 2)}, r"workers is \(0, 2\)"),
        ({"batch": 100, "group": 25, "workers": (1, 4)}, "4 groups a batch do not divide among 3 workers"),
        (
            {"batch": 100, "group": 25, "workers": 2, "pass_groups": 3},
            "2 groups a worker do not divide into passes of 3",
        ),
        ({"layer_decay": 0.0}, "layer_decay is 0.0: it must be above 0 and at most 1"),
        ({"ema_decay": 1.0}, "ema_decay is 1.0: it must be at least 0 and below 1"),
        ({"freeze_steps": 5}, "freeze_steps is 5 and nothing is frozen: set --freeze backbone"),
        ({"freeze": "backbone", "freeze_steps": 5, "cuda_graph": True}, "cuda_graph repeats one and the same step"),
        ({"timeout": 0.0}, "timeout is 0.0"),
        ({"compile": True, "objective": Ieg(engine="second_order")}, "compile goes with none of"),
        ({"compile": True, "objective": Ieg(meta_scope="last_block")}, "compile goes with none of"),
        ({"compile": True, "pass_groups": 1}, "compile goes with none of"),
        ({"compile": True, "recompute": True}, "compile goes with none of"),
        ({"cuda_graph": True, "batch": 100, "group": 25, "workers": (1, 2)}, "cuda_graph is for one worker"),
        (
            {"cuda_graph": True, "objective": paper()},
            "for the methods winnow, reference, supervised, M-1,",
        ),
        ({"checkpoint_steps": -1}, "checkpoint_steps is -1"),
        ({"checkpoint_minutes": math.nan}, "checkpoint_minutes is nan"),
    ],
)
def test_what_workers_and_checkpoints_cannot_be(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(recipe("winnow"), **changes)


def test_workers_are_a_number_or_a_range():
    assert parse(recipe, ["--workers", "3", "--batch", "96", "--group", "8", "--probe-batch", "96"]).workers == 3
    made = parse(recipe, ["--workers", "1", "4", "--batch", "96", "--group", "8", "--probe-batch", "96"])
    assert (made.workers, made.least_workers, made.most_workers) == ((1, 4), 1, 4)
    assert made.least_workers <= made.most_workers


def test_override_is_the_command_line():
    fields = {"objective.p": 1 / 3, "schedule.first_cycle": 30, "workers": (1, 2), "objective.lookahead_lr": None}
    made = override(recipe("winnow"), fields)
    flags = ["--objective.p", repr(1 / 3), "--schedule.first-cycle", "30", "--workers", "1", "2"]
    assert made == parse(recipe, [*flags, "--objective.lookahead-lr", "None"])
    assert difference(made, recipe("winnow")) == fields
    assert override(recipe("winnow"), {}) == recipe("winnow")


def test_a_file_of_fields_comes_before_the_flags(tmp_path):
    file = tmp_path / "best.yaml"
    file.write_text("method: reference\nobjective.p: 3.5\nschedule.lr: 0.05\nworkers: [1, 2]\n")
    made = parse(recipe, ["--recipe", str(file), "--schedule.lr", "0.2"])
    assert made.objective == dataclasses.replace(reference(), p=3.5)
    assert (made.schedule.lr, made.workers) == (0.2, (1, 2))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("objective.kll: 3", "--objective.kl "),
        ("method: winnnow", "names the method 'winnnow'"),
        ("- 1", "holds no fields"),
        ("a: [", "is not YAML"),
        ("schedule.lr: fast", "schedule.lr"),
        (None, "there is no file"),
    ],
)
def test_a_bad_file_of_fields_is_refused(tmp_path, capsys, text, told):
    file = tmp_path / "best.yaml"
    if text is not None:
        file.write_text(text)
    assert told in refusal(["--recipe", str(file)], capsys)


def test_a_file_and_a_method_exclude_each_other(capsys):
    assert "are not allowed together" in refusal(["--recipe", "a.yaml", "--method", "paper"], capsys)
