#!/usr/bin/env bash
# Ray Tune's OptunaSearch wants every starting point whole, where Optuna takes part of one.
#
# Guess: `points_to_evaluate` is handed to Optuna's `enqueue_trial`, which fixes the parameters it is given and samples
# the others; so a point that names one of two parameters starts a trial with that value.
# So is: with a search space given, OptunaSearch counts the names first and raises ValueError. The same point is taken
# where the space is a function ("define by run"), and by Optuna itself.
# Seen with ray 2.60.0 and optuna 5.0.0 on Python 3.11. Fails when that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet 'ray[tune]==2.60.0' 'optuna==5.0.0'
"$folder/env/bin/python" - <<'PYTHON'
import optuna
from ray import tune
from ray.tune.search.optuna import OptunaSearch

optuna.logging.set_verbosity(optuna.logging.WARNING)
part = {"rate": 0.5}  # and nothing of "width"

study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
study.enqueue_trial(part)
study.optimize(lambda trial: trial.suggest_float("rate", 0, 1) + trial.suggest_int("width", 1, 9), n_trials=1)
print("Optuna alone:", study.trials[0].params)
assert study.trials[0].params["rate"] == 0.5 and 1 <= study.trials[0].params["width"] <= 9

def by_run(trial):
    trial.suggest_float("rate", 0, 1)
    trial.suggest_int("width", 1, 9)

searcher = OptunaSearch(space=by_run, metric="loss", mode="min", points_to_evaluate=[part])
first = searcher.suggest("one")
print("OptunaSearch, space as a function:", first)
assert first["rate"] == 0.5 and 1 <= first["width"] <= 9

space = {"rate": tune.uniform(0, 1), "width": tune.randint(1, 10)}
try:
    OptunaSearch(space=space, metric="loss", mode="min", points_to_evaluate=[part])
except ValueError as error:
    print("OptunaSearch, space as a dict: ValueError:", error)
else:
    raise SystemExit("OptunaSearch takes part of a point now: this finding is out of date")
PYTHON
