import json

import pytest
import torch

from benchmarks import ledger
from benchmarks.ledger import Work


@pytest.fixture(autouse=True)
def _restored_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_every_setting_has_its_shares_and_every_stop_its_memory(tmp_path, monkeypatch, capsys):
    settings = (Work("supervised", 25, 10, 3), Work("winnow", 50, 10, 1))
    monkeypatch.setattr(ledger, "SETTINGS", settings)
    monkeypatch.setattr(ledger, "ROWS", (2_000, 5_000))
    monkeypatch.setattr("training.runs.ledger.PART_ROWS", 1_000)
    monkeypatch.setattr("training.runs.ledger.MOST_PARTS", 4)
    ledger.main(["--out", str(tmp_path / "out.json")])
    told = json.loads((tmp_path / "out.json").read_text())
    assert [Work(*(row[name] for name in vars(settings[0]))) for row in told["time"]] == list(settings)
    for row in told["time"]:
        assert set(row) == {*vars(settings[0]), *ledger.FORMATS}
        assert 0 < row["ledger_share"] < 1
        assert row["writer_share"] > 0
    assert [(row["storage"], row["rows"]) for row in told["memory"]] == [
        ("local", 2_000),
        ("local", 5_000),
        ("refuses", 5_000),  # the part after those that may wait is one too many, and is told at the next
    ]
    assert all(row["peak_growth_bytes"] >= 0 for row in told["memory"])
    assert len(capsys.readouterr().out.splitlines()) == 3 + 1 + len(settings)
