"""The whole way of one run: recipe → launch → real Ray → loop → step → ledger, checkpoint, model; and what stops it."""

import io
import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import safe_open

from pipeline.dataset import InputError
from pipeline.digits import Digits
from pipeline.noise import Noise
from training import launch, report
from training.engine import graph, networks
from training.engine.batch import normalised
from training.engine.schedule import Schedule
from training.objectives.registry import METHODS
from training.recipe import Recipe
from training.runs import checkpoint, ledger


def recipe(tmp_path, **changes) -> Recipe:
    """20 steps of digits in float64 on a network without batch norm, so that worker counts can be compared exactly."""
    return replace(
        Recipe(
            name="run",
            dataset=Digits(probe_per_class=2),
            objective=METHODS["reference"](),
            storage=str(tmp_path),
            network="wrn-10-1:group",
            schedule=Schedule(lr=0.05, first_cycle=10, cycles=2, t_mul=1.0),
            batch=100,
            probe_batch=20,
            group=25,
            workers=0,
            actors=1,
            precision="float64",
            evaluate_every=6,
        ),
        **changes,
    )


def weights(folder: str) -> dict[str, torch.Tensor]:
    with safe_open(f"{str(folder).removeprefix('file://')}/model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


@pytest.fixture(scope="module")
def in_process(tmp_path_factory):
    """The run inside this process, and what it printed."""
    output = io.StringIO()
    result = launch.run(recipe(tmp_path_factory.mktemp("zero")), Console(file=output, width=200))
    return result, output.getvalue()


@pytest.fixture(scope="module")
def one_after_two(local_ray, tmp_path_factory):
    """The same run on two workers up to its middle and in this process from there, its storage given as a URL."""
    storage, output = f"file://{tmp_path_factory.mktemp('several')}", io.StringIO()
    launch.run(recipe(storage, workers=2), Console(file=io.StringIO()), until=10)
    result = launch.run(recipe(storage), Console(file=output, width=200))
    assert "10 of 20 steps are done" in output.getvalue()
    return result


@pytest.fixture(scope="module")
def recomputed(tmp_path_factory):
    """The same run inside this process, its blocks computed again in backward."""
    return launch.run(recipe(tmp_path_factory.mktemp("again"), recompute=True), Console(file=io.StringIO()))


def test_history_has_every_evaluation(in_process):
    result, printed = in_process
    assert [row["step"] for row in result.history] == [6, 10, 12, 18, 20]
    assert all(0 <= row["top1"] <= row["top5"] <= 1 for row in result.history)
    assert result.history[-1]["cycle"] == 2
    assert "uniform 0.80 asked" in printed
    assert re.search(r"run 20/20 cycle 2 .* img/s, \d+ % waiting for data", printed)


def test_history_tells_what_the_ledger_holds(in_process):
    result, _ = in_process
    rows = ledger.read(result.folder)
    step, trust, weight = (rows[name].to_numpy() for name in ("step", "trust", "weight"))
    for told in result.history:
        here = step == told["step"] - 1
        assert told["trust"] == pytest.approx(trust[here].mean())
        assert told["zero_weights"] == pytest.approx((weight[here] == 0).mean())
        assert 0 < told["waiting_for_data"] < 1


def test_ledger_has_each_id_once_an_epoch(in_process, one_after_two):
    for result in (in_process[0], one_after_two):
        table = ledger.read(result.folder)
        assert table.num_rows == 20 * 100
        epoch, ids = table["epoch"].to_numpy(), table["id"].to_numpy()
        first = np.sort(ids[epoch == 0])
        np.testing.assert_array_equal(first, np.sort(result.dataset.train.id_N))
        assert len(np.unique(ids[epoch == 1])) == (epoch == 1).sum() == 2000 - len(first)
        given = dict(zip(result.dataset.train.id_N, result.dataset.train.label_N, strict=True))
        assert [given[i] for i in ids] == table["label"].to_pylist()


@pytest.mark.parametrize("how", ["one_after_two", "recomputed"])
def test_however_it_is_computed_a_run_is_the_same(in_process, how, request):
    """Through the real stream: the same examples in each step, the same coefficients, the same parameters."""
    same = request.getfixturevalue(how)
    by_id = [("step", "ascending"), ("id", "ascending")]
    one, other = (ledger.read(result.folder).sort_by(by_id) for result in (in_process[0], same))
    for column in ("step", "epoch", "id", "label", "pseudo_label", "trust"):
        assert one[column].equals(other[column]), column
    for column in ("weight", "confidence", "loss"):  # kept in float32
        np.testing.assert_allclose(other[column].to_numpy(), one[column].to_numpy(), rtol=1e-6, atol=1e-7)
    expected, actual = weights(in_process[0].folder), weights(same.folder)
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=0, atol=1e-10)
    assert [row["top1"] for row in same.history] == [row["top1"] for row in in_process[0].history]


def test_bf16_in_passes_of_one_group_gives_a_model_of_the_network_s_own_names(tmp_path):
    changes = {"precision": "bf16", "channels_last": True, "pass_groups": 1, "network": "wrn-10-1"}
    schedule = Schedule(lr=0.05, first_cycle=3, cycles=1)
    result = launch.run(recipe(tmp_path, schedule=schedule, **changes), Console(file=io.StringIO()))
    saved, bare = weights(result.folder), networks.build("wrn-10-1", 1, 10, seed=0).state_dict()
    assert saved.keys() == bare.keys()
    assert {value.dtype for value in saved.values() if value.is_floating_point()} == {torch.float32}
    assert ledger.read(result.folder).num_rows == 300


def test_model_file_tells_what_it_is(in_process):
    result, _ = in_process
    with safe_open(f"{result.folder}/model.safetensors", "pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["class_names"]) == [str(k) for k in range(10)]
    saved = json.loads(metadata["recipe"])
    model = networks.build(saved["network"], 1, 10, seed=1)
    model.load_state_dict(weights(result.folder))


def test_checkpoint_is_plain_data_and_a_finished_run_is_not_repeated(one_after_two, tmp_path):
    saved = checkpoint.latest(one_after_two.folder, pytest.fail)  # torch.load(weights_only=True)
    assert saved["step"] == 20
    same = recipe(one_after_two.folder.rsplit("/", 1)[0], workers=1)
    again = launch.run(same, Console(file=io.StringIO()))
    assert again.history == one_after_two.history


def test_another_recipe_under_the_same_name_is_refused(one_after_two):
    storage = one_after_two.folder.rsplit("/", 1)[0]
    with pytest.raises(InputError, match=r"made with another seed: .* choose another --name"):
        launch.run(recipe(storage, seed=1), Console(file=io.StringIO()))


def test_fewer_workers_go_on_from_a_checkpoint(in_process, one_after_two):
    """That a run ends to the bit where it would have without a stop is for test_resume and test_faults to show."""
    assert [row["step"] for row in one_after_two.history] == [row["step"] for row in in_process[0].history]


def test_report_is_drawn(in_process, tmp_path):
    result, _ = in_process
    report.draw({"one": result, "two": result}, str(tmp_path / "report.png"))
    assert (tmp_path / "report.png").read_bytes()[:4] == b"\x89PNG"
    curves = report.coefficients_over_time(result.folder, result.dataset.train)
    assert len(curves["step"]) == 20
    assert all(((curves[name] >= 0) & (curves[name] <= 1)).all() for name in ("trust_right", "trust_wrong"))


def wild(storage, **changes) -> Recipe:
    schedule = Schedule(lr=1e30, first_cycle=40, cycles=1)
    changes = {"schedule": schedule, "evaluate_every": 0, "precision": "float32", **changes}
    return recipe(storage, objective=METHODS["supervised"](), **changes)


def test_a_loss_that_is_no_number_stops_the_run(tmp_path):
    with pytest.raises(InputError, match=r"the loss is (nan|inf) at step \d+ \(label .*last good checkpoint: none"):
        launch.run(wild(tmp_path), Console(file=io.StringIO()))


def test_no_checkpoint_is_made_of_parameters_that_are_no_numbers(tmp_path):
    wilder = replace(wild(tmp_path), evaluate_every=1, weight_decay=1e12)
    with pytest.raises(InputError, match=r"NaN or infinite after step 0; last good checkpoint: none"):
        launch.run(wilder, Console(file=io.StringIO()))


def test_the_script_of_two_workers_names_the_loss_in_one_line(local_ray, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        launch.guarded(lambda: launch.run(wild(tmp_path, workers=2), Console(file=io.StringIO())))
    assert re.match(r"error: the loss is (nan|inf) at step \d+ ", stopped.value.code)
    assert "\n" not in stopped.value.code


def test_two_workers_export_the_model_that_they_evaluate(local_ray, tmp_path):
    """With batch norm, whose statistics differ between workers until they are averaged."""
    short = Schedule(lr=0.05, first_cycle=4, cycles=1)
    made = recipe(tmp_path, network="wrn-10-1", workers=2, schedule=short, precision="float32")
    result = launch.run(made, Console(file=io.StringIO()))
    model = networks.build("wrn-10-1", 1, 10, seed=1).eval()
    model.load_state_dict(weights(result.folder))
    test = result.dataset.tests["test"]
    with torch.no_grad():
        answer_N = model(normalised(torch.from_numpy(test.image_N))).argmax(1).numpy()
    assert result.top1 == pytest.approx((answer_N == test.label_N).mean(), abs=1.5 / len(test))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"network": "wrm-28-10"}, "unknown network 'wrm-28-10': did you mean wrn-28-10"),
        ({"network": "wrn-11-1"}, "depth must be 10, 16, 22"),
        (
            {"network": "sequencer2d_s"},
            "no forward mode for LSTM, of which sequencer2d_s is made.* --method supervised",
        ),
        ({"network": "vgg13", "recompute": True}, "no two blocks in an nn.Sequential .* leave recompute out"),
        ({"network": "mobilenetv5_300m_enc"}, "mobilenetv5_300m_enc is no classifier, it gives features of"),
        ({"layer_decay": 0.75}, "layer_decay wants a network of timm, which knows its layers: leave it at 1"),
        ({"data": "/nowhere"}, "leave --data out"),
        ({"storage": "/proc/nowhere"}, "cannot write to /proc/nowhere/run: choose another folder"),
        ({"storage": "nothing://here"}, "cannot open nothing://here/run: its scheme is unknown"),
        ({"dataset": Digits(Noise("uniform", 0.8), probe_per_class=500)}, "too few to take 500 for the probe"),
    ],
)
def test_what_cannot_work_is_refused_before_training_begins(changes, message, tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "_train_here", lambda *_: pytest.fail("training began"))
    with pytest.raises(InputError, match=message):
        launch.run(recipe(tmp_path, **changes), Console(file=io.StringIO()))


@pytest.mark.parametrize("apart", [None, {"ray-subcluster": "!data"}])
def test_gpus_that_are_to_come_are_waited_for(apart, tmp_path, local_ray, monkeypatch):
    """Where training nodes are set apart none may be up yet: `auto` must not go for their CPUs."""
    monkeypatch.setattr(launch.compute, "training_nodes", lambda: apart)
    silent = Console(file=io.StringIO())
    assert launch._use_gpu(recipe(tmp_path, workers=2), silent) == bool(apart)
    assert not launch._use_gpu(recipe(tmp_path, workers=2, device="cpu"), silent)


def test_a_run_captures_its_step_once(tmp_path, monkeypatch):
    """Without a GPU: what is captured has been computed once, and a replay does nothing."""
    captured = []
    monkeypatch.setattr(launch, "_device_here", lambda _: torch.device("cpu"))
    monkeypatch.setattr(graph, "aside", lambda work: work())
    monkeypatch.setattr(graph, "capture", lambda work: (captured.append(work()) or captured[-1], lambda: None))
    made = recipe(tmp_path, cuda_graph=True, schedule=Schedule(lr=0.05, first_cycle=4, cycles=1))
    result = launch.run(made, Console(file=io.StringIO()))
    assert result.history[-1]["step"] == 4
    assert len(captured) == 1


def test_a_cuda_graph_without_a_gpu_is_refused(tmp_path, local_ray):
    for workers in (0, 1):
        with pytest.raises(InputError, match="cuda_graph wants a GPU and the run would be on a CPU: leave it out"):
            launch.run(recipe(tmp_path, workers=workers, cuda_graph=True), Console(file=io.StringIO()))


def test_mistakes_end_a_script_with_one_line(tmp_path, capsys):
    def fail():
        raise InputError("the thing is wrong: fix it")

    with pytest.raises(SystemExit) as exit_status:
        launch.guarded(fail)
    assert exit_status.value.code == "error: the thing is wrong: fix it"
