"""The demo as a script, on a few steps inside this process: both methods, the picture and the summary."""

import json
import sys

from training import digits


def test_the_demo_compares_both_and_leaves_picture_and_summary(local_ray, tmp_path, monkeypatch, capsys):
    changes = {
        "workers": 0,
        "actors": 1,
        "seed": 1,
        "evaluate-every": 3,
        "network": "wrn-10-1",
        "schedule.first-cycle": 6,
        "storage": tmp_path,
    }
    monkeypatch.setattr(sys, "argv", ["digits.py", *(f"--{name}={value}" for name, value in changes.items())])
    digits.main()
    summary = json.loads((tmp_path / "digits" / "summary.json").read_text())
    assert set(summary) == {"noise_rate", "top1", "top1_supervised", "seconds", "seed", "steps"}
    assert (summary["seed"], summary["steps"]) == (1, 6)
    assert 0.65 < summary["noise_rate"] < 0.8
    assert (tmp_path / "digits" / "report.png").stat().st_size > 10_000
    assert (tmp_path / "digits-supervised" / "model.safetensors").exists()
    printed = capsys.readouterr().out
    assert f"{100 * summary['top1']:.1f} %" in printed
    assert f"{100 * summary['top1_supervised']:.1f} %" in printed
