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
from training import launch, ledger, networks, report
from training.monitor import NotFiniteError
from training.recipe import METHODS, Recipe
from training.schedule import Schedule
from training.step import normalised


def recipe(tmp_path, **changes) -> Recipe:
    """Twelve steps of digits on a network without batch norm, so that worker counts can be compared."""
    return replace(
        Recipe(
            name="run",
            dataset=Digits(probe_per_class=2),
            objective=METHODS["reference"](),
            storage=str(tmp_path),
            network="wrn-10-1:group",
            schedule=Schedule(lr=0.05, first_cycle=8, cycles=2, t_mul=1.0),
            batch=100,
            probe_batch=20,
            group=50,
            workers=0,
            actors=1,
            evaluate_every=5,
        ),
        **changes,
    )


def weights(folder: str) -> dict[str, torch.Tensor]:
    with safe_open(f"{str(folder).removeprefix('file://')}/model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


@pytest.fixture(scope="module")
def in_process(local_ray, tmp_path_factory):
    """The run inside this process, and what it printed."""
    output = io.StringIO()
    result = launch.run(recipe(tmp_path_factory.mktemp("zero")), Console(file=output, width=200))
    return result, output.getvalue()


@pytest.fixture(scope="module")
def two_workers(local_ray, tmp_path_factory):
    """The same run on two workers, its storage given as a URL."""
    storage = f"file://{tmp_path_factory.mktemp('two')}"
    return launch.run(recipe(storage, workers=2), Console(file=io.StringIO()))


def test_history_has_every_evaluation(in_process):
    result, printed = in_process
    assert [row["step"] for row in result.history] == [5, 8, 10, 15, 16]
    assert all(0 <= row["top1"] <= row["top5"] <= 1 for row in result.history)
    assert result.history[-1]["cycle"] == 2
    assert "uniform 0.80 asked" in printed
    assert "run 16/16 cycle 2" in printed


def test_ledger_has_each_id_once_an_epoch(in_process, two_workers):
    for result in (in_process[0], two_workers):
        table = ledger.read(result.folder)
        assert table.num_rows == 16 * 100
        epoch, ids = table["epoch"].to_numpy(), table["id"].to_numpy()
        first = np.sort(ids[epoch == 0])
        np.testing.assert_array_equal(first, np.sort(result.dataset.train.id_N))
        assert len(np.unique(ids[epoch == 1])) == (epoch == 1).sum() == 1600 - len(first)
        given = dict(zip(result.dataset.train.id_N, result.dataset.train.label_N, strict=True))
        assert [given[i] for i in ids] == table["label"].to_pylist()


def test_two_workers_train_the_same_as_one(in_process, two_workers):
    """Through the real stream, in float32: its rounding flips a λ now and then (test_step.py is exact, in float64)."""
    by_id = [("step", "ascending"), ("id", "ascending")]
    one, two = (ledger.read(result.folder).sort_by(by_id) for result in (in_process[0], two_workers))
    assert one["id"].to_pylist() == two["id"].to_pylist()
    first = one["step"].to_numpy() == 0
    for column in ("weight", "confidence", "loss"):
        np.testing.assert_allclose(two[column].to_numpy()[first], one[column].to_numpy()[first], rtol=1e-3, atol=1e-4)
    assert (one["trust"].to_numpy() == two["trust"].to_numpy()).mean() > 0.95
    expected, actual = weights(in_process[0].folder), weights(two_workers.folder)
    moved = networks.build("wrn-10-1:group", 1, 10, seed=0).state_dict()
    apart = sum(float((actual[name] - expected[name]).norm() ** 2) for name in expected) ** 0.5
    travelled = sum(float((expected[name] - moved[name]).norm() ** 2) for name in expected) ** 0.5
    assert apart < 0.02 * travelled


def test_model_file_tells_what_it_is(in_process):
    result, _ = in_process
    with safe_open(f"{result.folder}/model.safetensors", "pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["class_names"]) == [str(k) for k in range(10)]
    saved = json.loads(metadata["recipe"])
    model = networks.build(saved["network"], 1, 10, seed=1)
    model.load_state_dict(weights(result.folder))


def test_checkpoint_is_plain_data_and_a_finished_run_is_not_repeated(two_workers, tmp_path):
    saved = launch._checkpoint(two_workers.folder)  # torch.load(weights_only=True)
    assert saved["step"] == 16
    same = recipe(two_workers.folder.rsplit("/", 1)[0], workers=1)
    again = launch.run(same, Console(file=io.StringIO()))
    assert again.history == two_workers.history


def test_another_recipe_under_the_same_name_is_refused(two_workers):
    storage = two_workers.folder.rsplit("/", 1)[0]
    with pytest.raises(InputError, match=r"made with another seed: .* choose another --name"):
        launch.run(recipe(storage, seed=1), Console(file=io.StringIO()))


def test_resume_goes_on_from_the_checkpoint(two_workers, local_ray, tmp_path):
    """Cut a finished run back to its checkpoint before last: the rest is trained again, to the same end."""
    import shutil

    folder = shutil.copytree(two_workers.folder.removeprefix("file://"), tmp_path / "run")
    snapshot = json.loads((folder / "checkpoint_manager_snapshot.json").read_text())
    snapshot["checkpoint_results"] = snapshot["checkpoint_results"][:1]
    snapshot["latest_checkpoint_result"] = snapshot["checkpoint_results"][0]
    snapshot["checkpoint_report_indices"] = snapshot["checkpoint_report_indices"][:1]
    snapshot["current_report_index"] -= 1
    (folder / "checkpoint_manager_snapshot.json").write_text(json.dumps(snapshot))
    shutil.rmtree(folder / "step_00000016")
    output = io.StringIO()
    resumed = launch.run(recipe(tmp_path, workers=2), Console(file=output, width=200))
    assert "15 of 16 steps are done" in output.getvalue()
    assert [row["step"] for row in resumed.history] == [row["step"] for row in two_workers.history]
    expected, actual = weights(two_workers.folder), weights(resumed.folder)
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=0, atol=0)


def test_report_is_drawn(in_process, tmp_path):
    result, _ = in_process
    report.draw({"one": result, "two": result}, str(tmp_path / "report.png"))
    assert (tmp_path / "report.png").read_bytes()[:4] == b"\x89PNG"
    curves = report.coefficients_over_time(result.folder, result.dataset.train)
    assert len(curves["step"]) == 16
    assert all(((curves[name] >= 0) & (curves[name] <= 1)).all() for name in ("trust_right", "trust_wrong"))


def wild(storage, **changes) -> Recipe:
    schedule = Schedule(lr=1e30, first_cycle=40, cycles=1)
    return recipe(storage, objective=METHODS["supervised"](), schedule=schedule, evaluate_every=0, **changes)


def test_a_loss_that_is_no_number_stops_the_run(local_ray, tmp_path):
    with pytest.raises(NotFiniteError, match=r"the loss is (nan|inf) at step \d+ \(label .*last good checkpoint: none"):
        launch.run(wild(tmp_path), Console(file=io.StringIO()))


def test_no_checkpoint_is_made_of_parameters_that_are_no_numbers(local_ray, tmp_path):
    wilder = replace(wild(tmp_path), evaluate_every=1, weight_decay=1e12)
    with pytest.raises(NotFiniteError, match=r"no numbers after step 0; last good checkpoint: none"):
        launch.run(wilder, Console(file=io.StringIO()))


def test_the_script_of_two_workers_names_the_loss_in_one_line(local_ray, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        launch.guarded(lambda: launch.run(wild(tmp_path, workers=2), Console(file=io.StringIO())))
    assert re.match(r"error: the loss is (nan|inf) at step \d+ ", stopped.value.code)
    assert "\n" not in stopped.value.code


def test_two_workers_export_the_model_that_they_evaluate(local_ray, tmp_path):
    """With batch norm, whose statistics differ between workers until they are averaged."""
    short = Schedule(lr=0.05, first_cycle=4, cycles=1)
    result = launch.run(recipe(tmp_path, network="wrn-10-1", workers=2, schedule=short), Console(file=io.StringIO()))
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
        ({"data": "/nowhere"}, "leave --data out"),
        ({"storage": "/proc/nowhere"}, "storage /proc/nowhere cannot be written"),
        ({"storage": "nothing://here"}, "storage nothing://here cannot be written"),
        ({"dataset": Digits(Noise("uniform", 0.8), probe_per_class=500)}, "too few to take 500 for the probe"),
    ],
)
def test_what_cannot_work_is_refused_before_ray_starts(changes, message, tmp_path, monkeypatch):
    monkeypatch.setattr(launch.compute, "join", lambda **_: pytest.fail("Ray was started"))
    with pytest.raises(InputError, match=message):
        launch.run(recipe(tmp_path, **changes), Console(file=io.StringIO()))


def test_unreadable_checkpoint_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(launch.compute, "join", lambda **_: pytest.fail("Ray was started"))
    folder = tmp_path / "run"
    (folder / "step_00000005").mkdir(parents=True)
    (folder / "step_00000005" / "state.pt").write_bytes(b"half a file")
    (folder / "checkpoint_manager_snapshot.json").write_text(
        json.dumps({"latest_checkpoint_result": {"checkpoint_dir_name": "step_00000005"}})
    )
    with pytest.raises(InputError, match="step_00000005 cannot be read"):
        launch.run(recipe(tmp_path), Console(file=io.StringIO()))
    (folder / "checkpoint_manager_snapshot.json").write_text("{")
    with pytest.raises(InputError, match="run/snapshot cannot be read"):
        launch.run(recipe(tmp_path), Console(file=io.StringIO()))


def test_mistakes_end_a_script_with_one_line(tmp_path, capsys):
    def fail():
        raise InputError("the thing is wrong: mend it")

    with pytest.raises(SystemExit) as exit_status:
        launch.guarded(fail)
    assert exit_status.value.code == "error: the thing is wrong: mend it"
