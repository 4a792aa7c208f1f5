import json

import pytest

from benchmarks import scaling

LINK = {"bandwidth": 1e9, "latency": 1e-5}


def test_one_gpu_does_not_communicate():
    assert scaling.seconds_on(1, 3.0, (16, 10**9), **LINK) == 3


def test_a_step_is_compute_transfer_and_latency():
    assert scaling.seconds_on(4, 8.0, (10, 10**9), **LINK) == pytest.approx(8 / 4 + 2 * 3 / 4 * 1 + 10 * 1e-5 * 2)
    # with ever more GPUs only the ring's two passes and the hops are left
    assert scaling.seconds_on(2**20, 8.0, (10, 10**9), **LINK) == pytest.approx(2 + 10 * 1e-5 * 20, rel=1e-3)


def test_the_model_is_monotone():
    seconds = [scaling.seconds_on(n, 8.0, (10, 10**6), **LINK) for n in scaling.GPUS]
    assert seconds == sorted(seconds, reverse=True)
    efficiency = [8 / n / s for n, s in zip(scaling.GPUS, seconds, strict=True)]
    assert efficiency == sorted(efficiency, reverse=True)
    more = [
        scaling.seconds_on(8, 8.0, (10, 10**7), **LINK),
        scaling.seconds_on(8, 8.0, (99, 10**6), **LINK),
        scaling.seconds_on(8, 8.0, (10, 10**6), bandwidth=1e8, latency=1e-5),
    ]
    assert all(slower > seconds[3] for slower in more)


@pytest.mark.slow
def test_two_workers_are_measured_counted_and_agree(tmp_path, capsys):
    tiny = ["--workers", "1", "2", "--steps", "2", "--warm-ups", "1", "--size", "8", "--batch", "8", "--groups", "2"]
    scaling.main(["--out", str(tmp_path / "out.json"), "--double", *tiny])
    told = json.loads((tmp_path / "out.json").read_text())
    one, two = told["rows"]
    parameters = sum(value.numel() for value in scaling.networks.build("wrn-10-1:group", 3, 10, seed=0).parameters())
    for workers, row in enumerate(told["rows"], 1):
        assert set(row) == {"workers", "oversubscribed", *scaling.FORMATS}
        assert row["workers"] == workers
        assert row["oversubscribed"] == (workers > told["cores"])
        assert row["bytes_streamed"] == 3 * 8 * (8 * 8 * 3 + 5 * 8)  # three views of 8 px, with five int64 each
        assert min(row["data_seconds"], row["compute_seconds"], row["cpu_seconds"]) > 0
        assert row["seconds"] > row["compute_seconds"]
    assert (one["reductions"], one["bytes_reduced"], one["collective_seconds"]) == (0, 0, 0)
    assert two["reductions"] == 3 + 4
    assert two["bytes_reduced"] == 8 * (3 * parameters + 7)
    assert two["collective_seconds"] > 0
    assert one["max_abs_difference"] == 0
    assert 0 < two["max_abs_difference"] < 1e-10

    model = told["model"]
    assert model["parameters"] == 25_557_032  # torchvision's ResNet-50
    assert (model["reductions_of_all_parameters"], model["small_reductions"], model["small_bytes"]) == (3, 4, 28)
    assert model["bytes_reduced"] == 3 * 4 * model["parameters"] + 28
    assert model["reductions"] == 3 * 4 + 4  # 97.5 MiB are four buckets
    assert all(f"assumed {name}" in " ".join(model["assumptions"]) for name in ("compute", *scaling.ASSUMED_LINKS))
    assert [row["gpus"] for row in model["rows"]] == [*scaling.GPUS] * 2
    assert all(row["efficiency"] == 1 for row in model["rows"] if row["gpus"] == 1)
    printed = capsys.readouterr().out
    assert "Modelled, not measured:" in printed


def test_workers_that_do_not_divide_the_groups_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        scaling.main(["--out", str(tmp_path / "out.json"), "--workers", "3"])
    assert "must divide the groups" in capsys.readouterr().err
