"""The meta gradient over a dozen of timm's families, and the table of all of them."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import families
from benchmarks.families import by_engine, by_rows, measure, measured, pose, relative

ROOT = Path(families.__file__).parents[1]
TOLD = json.loads((ROOT / families.RESULTS).read_text())
SHORT = {"depth": 2}


@pytest.mark.parametrize(
    ("network", "fewer"),
    [
        ("test_vit", {}),  # fused attention
        ("test_convnext", {}),
        ("test_efficientnet", {}),
        ("test_nfnet", {}),  # no batch norm
        ("test_coatnet", {}),  # attention with a bias that is learnt
        ("starnet_s050", {}),
        ("convit_tiny", SHORT),  # parameters that no pass uses
        ("tnt_s_legacy_patch16_224", SHORT),
    ],
)
def test_forward_mode_equals_double_backward(network, fewer):
    case = pose(network, drops=True, fewer=fewer)
    assert relative(by_engine(case, "forward"), by_engine(case, "second_order")) <= 1e-13


@pytest.mark.parametrize("network", ["lcnet_035", "repghostnet_050"])
def test_forward_mode_is_exact_where_there_is_no_double_backward(network):
    case = pose(network, drops=True)
    with pytest.raises(RuntimeError, match="hardsigmoid_backward is not implemented"):
        by_engine(case, "second_order")
    assert relative(by_engine(case, "forward"), by_rows(case)) <= 1e-13


@pytest.mark.parametrize("keeps", [True, False])
def test_dropout_behind_attention_leaves_out_what_the_weak_pass_left_out(keeps):
    """Kernels of attention lay their output out in memory in two orders, and dropout draws in the order of memory."""
    case = replace(pose("cpubone_nano", drops=True), keeps=keeps)
    assert relative(by_engine(case, "forward"), by_rows(case)) <= 1e-13


def test_both_oracles_agree_with_each_other():
    case = pose("test_vit", drops=True)
    with sdpa_kernel(SDPBackend.MATH):
        rows = by_rows(case)
    assert relative(by_engine(case, "second_order"), rows) <= 1e-13


def test_modules_under_two_names_compute_in_bf16():
    case = pose("coat_tiny", drops=True, fewer={"parallel_depth": 1})
    names = len(dict(case.model.named_parameters(remove_duplicate=False)))
    assert names > len(dict(case.model.named_parameters()))
    assert relative(by_engine(case.in_bf16(), "forward"), by_engine(case, "forward")) <= 0.05


def test_a_row_says_what_is_refused_and_why(monkeypatch):
    monkeypatch.setattr(families, "shortened", lambda network: {})
    monkeypatch.setattr(families, "pose", lambda *_, **__: replace(case, model=torch.nn.LSTM(1, 1)))
    case = pose("test_nfnet")
    row = measure("sequencer2d_s")
    assert "off" not in row
    assert families.verdict(row) == "refused: no forward mode for LSTM"


def test_a_network_that_fails_keeps_its_row(monkeypatch):
    def fails(case, engine):
        raise RuntimeError("of this\nor that")

    monkeypatch.setattr(families, "by_engine", fails)
    row = measure("test_nfnet")
    assert row["errors"] == {"forward off": "of this", "forward on": "of this"}
    assert families.verdict(row) == "forward off: of this; forward on: of this"


def test_a_process_that_ends_keeps_its_row(monkeypatch):
    monkeypatch.setattr(families, "measure", lambda network: torch._exit(1))
    assert measured("test_nfnet", 30)["error"].startswith("ended")


def test_the_table_is_what_was_measured_of_every_family():
    assert families.markdown(TOLD) in (ROOT / "docs" / "networks.md").read_text()
    if timm.__version__ == TOLD["timm"]:
        assert [row["family"] for row in TOLD["rows"]] == sorted(timm.list_modules())


def test_what_was_measured_is_exact_or_says_why_not():
    for row in TOLD["rows"]:
        errors = [families.exactness(row, which) for which in ("off", "on")]
        exact = all(error is not None and error <= families.EXACT for error in errors)
        assert exact or families.verdict(row), row["family"]
        assert (row.get("on") or {}).get("alone", 0) <= 1e-12 or families.verdict(row), row["family"]
