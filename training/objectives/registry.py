"""Every method by its name: what --method can be, and what each contract test runs.

A new objective is one file in baselines/ and one line here. What tests and benchmarks must know of it, it says itself:
`remembers`, `steady`, `staged` and `own_weights` of `Objective`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module

from training.objectives.ieg import ablation, paper, reference, winnow
from training.objectives.interface import Objective

Make = Callable[[], Objective]


def baseline(file: str, name: str) -> Make:
    """Return the class or function of this name in a file of baselines/."""
    return getattr(import_module(f"training.objectives.baselines.{file}"), name)


PRESETS: dict[str, Make] = {"winnow": winnow, "reference": reference, "paper": paper}  # of the full method
BASELINES: dict[str, Make] = {
    "supervised": baseline("supervised", "Supervised"),
    "reweight": baseline("reweight", "Reweight"),
    "gce": baseline("gce", "Gce"),
    "bootstrap-soft": baseline("bootstrap", "soft"),
    "bootstrap-hard": baseline("bootstrap", "hard"),
    "forward": baseline("forward", "Forward"),
    "glc": baseline("glc", "Glc"),
    "mentornet": baseline("mentornet", "MentorNet"),
    "co-teaching": baseline("co_teaching", "CoTeaching"),
    "cleannet": baseline("cleannet", "CleanNet"),
    "m-correction": baseline("m_correction", "MCorrection"),
    "self-learning": baseline("self_learning", "SelfLearning"),
    "incv": baseline("incv", "Incv"),
    "mwn": baseline("meta_weight_net", "MetaWeightNet"),
    "elr": baseline("elr", "Elr"),
    "mlc": baseline("meta_label_correction", "MetaLabelCorrection"),
    "mixmatch": baseline("mixmatch", "MixMatch"),
    "mixmatch-kl": baseline("mixmatch", "mixmatch_kl"),
}
ABLATIONS: dict[str, Make] = {f"M-{number}": partial(ablation, number, reference()) for number in range(1, 11)}
METHODS: dict[str, Make] = {**PRESETS, **BASELINES, **ABLATIONS}
