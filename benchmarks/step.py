r"""What a whole training step of the method costs beside a vanilla step, exactly and by each saving. Needs torch alone.

    python -m benchmarks.step --out benchmarks/results/step.json

A step is `training.engine.step.update`: passes, coefficients, backward, SGD, moving average; vanilla is cross-entropy
with SGD. One round runs each variant in turn. `ms` is the median over rounds, on a CPU of the processor's own time;
`ratio_to_vanilla` is the median of each round's own ratio, which other work on the machine disturbs least.
`memory_ratio` compares the peaks of what torch's allocator holds beyond what it held before (see
`benchmarks.meta_gradient`). What fails keeps its row, with nulls and an `error`. A timm network, such as resnet50, is
measured where timm is installed. What the savings cost in fidelity: `benchmarks.savings`. `recompute` is exact with the
activations of one block at a time (`--recompute`), `by_group` with one of four groups in the network at a time
(`--pass-groups 1`); `graph`, `vanilla_graph` … on GPUs are one CUDA graph (`--cuda-graph`), their memory that of its
capture. Those by torch.compile (`--compile`) want a C++ compiler on a CPU, and a minute a network; they are measured
where they are named, beside what they compare with:

    python -m benchmarks.step --out benchmarks/results/step_compiled.json --variants exact vanilla_compiled compiled

With AdamW, and networks of timm:

    python -m benchmarks.step --out benchmarks/results/step_adamw.json --optimiser adamw --size 96 --batch 16 \
        --networks vit_tiny_patch16_224 convnext_atto --variants exact second_order last_layer
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.meta_gradient import CLASSES, Row, elapsed, peak_memory, prepare
from training.engine.adamw import AdamW
from training.engine.graph import WARM_UPS, StepGraph
from training.engine.optimiser import Sgd
from training.engine.passes.network import Passes
from training.engine.state import TrainState
from training.engine.step import Differentiate, differentiate, update
from training.objectives.baselines.supervised import Supervised
from training.objectives.ieg import winnow
from training.objectives.interface import Alone, Batch, Objective

VARIANTS: dict[str, Objective] = {
    "vanilla": Supervised(average_parameters=False),
    "exact": winnow(),
    "second_order": replace(winnow(), engine="second_order"),
    "last_block": replace(winnow(), meta_scope="last_block"),
    "last_layer": replace(winnow(), meta_scope="last_layer"),
}
GROUPS = 4
HOW: dict[str, tuple[str, dict[str, Any]]] = {  # objective, and how its network is run
    **{name: (name, {}) for name in VARIANTS},
    "recompute": ("exact", {"recompute": True}),
    "by_group": ("exact", {"chunks": GROUPS}),
    "vanilla_compiled": ("vanilla", {"compiled": True}),
    "compiled": ("exact", {"compiled": True}),
    "vanilla_graph": ("vanilla", {}),
    "graph": ("exact", {}),
    "recompute_graph": ("exact", {"recompute": True}),
    "by_group_graph": ("exact", {"chunks": GROUPS}),
    "last_layer_graph": ("last_layer", {}),
    "vanilla_compiled_graph": ("vanilla", {"compiled": True}),
    "compiled_graph": ("exact", {"compiled": True}),
}
FORMATS = {"ms": ".1f", "ratio_to_vanilla": ".2f", "memory_ratio": ".2f"}


def stepping(
    network: str, size: int, batch: int, dtype: str, device: torch.device, names: Sequence[str], optimiser: str
) -> dict[str, Callable[[], object]]:
    """A step of each variant, each on a network of its own with the same weights and batch."""
    torch.compiler.reset()  # of networks before; beyond some graphs of one function it would give up without a word
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    model, held, _ = prepare(network, size, batch, device)
    flipped = held.weak_BCHW.flip(3).contiguous(memory_format=torch.channels_last)
    held = replace(held, strong_BCHW=flipped, group_keys=tuple(range(GROUPS)))
    calls: dict[str, Callable[[], object]] = {}
    for name in names:
        variant, how = HOW[name]
        objective = VARIANTS[variant]
        by = StepGraph() if name.endswith("graph") else differentiate
        state = _state(deepcopy(model), dtype, how, objective, batch, optimiser)
        calls[name] = partial(_step, state, objective, held, by)
        if variant == "second_order":  # other attention cannot be differentiated twice
            calls[name] = sdpa_kernel(SDPBackend.MATH)(calls[name])
    return calls


def _state(
    model: torch.nn.Module, dtype: str, how: dict[str, Any], objective: Objective, batch: int, optimiser: str
) -> TrainState:
    on_gpu = next(model.parameters()).is_cuda
    if dtype == "bf16" or how:
        precision = torch.bfloat16 if dtype == "bf16" else torch.float32
        model = Passes(model, dtype=precision, channels_last=on_gpu or dtype == "bf16", **{"chunks": 1, **how})
    elif on_gpu:
        model.to(memory_format=torch.channels_last)
    memory = objective.memory(model, batch, CLASSES).to(next(model.parameters()).device)
    make = {"sgd": Sgd, "adamw": AdamW}[optimiser]
    updates = make(model, memory, momentum=0.9, weight_decay=5e-4)
    return TrainState(model, updates, average=objective.average_parameters, memory=memory)


def _step(state: TrainState, objective: Objective, batch: Batch, by: Differentiate) -> None:
    update(state, objective, batch, lr=0.01, workers=Alone(), by=by)
    state.optimiser.zero_grad()


def measure(
    network: str,
    size: int,
    batch: int,
    dtype: str,
    device: torch.device,
    names: Sequence[str],
    rounds: int,
    optimiser: str = "sgd",
) -> Iterator[Row]:
    """One row a variant, printed too."""
    errors: dict[str, str] = {}

    def attempt(name: str, call: Callable[[], Any]) -> Any:
        try:
            return None if name in errors or "network" in errors else call()
        except (RuntimeError, MemoryError, ImportError, ValueError) as error:
            errors[name] = f"{name}: {str(error).strip() or type(error).__name__}".splitlines()[0]
        gc.collect()
        torch.cuda.empty_cache()
        return None

    calls = attempt("network", lambda: stepping(network, size, batch, dtype, device, names, optimiser)) or {}
    for _ in range(WARM_UPS):
        for name, call in calls.items():
            attempt(name, call)
    peaks = {name: attempt(name, partial(peak_memory, call, device)) for name, call in calls.items()}
    taken = [{n: attempt(n, partial(elapsed, c, device)) for n, c in calls.items()} for _ in range(rounds)]
    for name in names:
        row: Row = {"network": network, "device": device.type, "dtype": dtype, "batch": batch, "variant": name}
        row |= {"optimiser": optimiser, "size": size}
        row |= dict.fromkeys(FORMATS)
        if calls and not {"vanilla", name} & set(errors):
            row["ms"] = 1e3 * statistics.median(times[name] for times in taken)
            row["ratio_to_vanilla"] = statistics.median(times[name] / times["vanilla"] for times in taken)
            row["memory_ratio"] = peaks[name] / peaks["vanilla"]
        failed = [errors[part] for part in ("network", "vanilla", name) if part in errors]
        cells = [f"{'–' if row[n] is None else format(row[n], form):>{len(n) + 2}}" for n, form in FORMATS.items()]
        print(f"{network:<11}{dtype:<9}{name:<18}" + "".join(cells), *failed, flush=True)
        yield row | ({"error": "; ".join(failed)} if failed else {})


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Time and memory of a training step against a vanilla one.")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--networks", nargs="+", help="wrn-10-1 resnet29; on a GPU resnet29 wrn-28-10 resnet50")
    parser.add_argument("--batch", type=int, help="noisy and trusted examples each; 48, on a GPU 100")
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bf16"), help="float32; on a GPU both")
    parser.add_argument(
        "--variants", nargs="+", choices=HOW, metavar="NAME", help=f"of {', '.join(HOW)}; all but the compiled"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 …")
    parser.add_argument("--rounds", type=int, default=9, help="in which each variant runs once (%(default)s)")
    parser.add_argument("--size", type=int, help="pixels a side; 32, of a timm network 224")
    parser.add_argument("--optimiser", choices=("sgd", "adamw"), default="sgd", help="what updates (%(default)s)")
    chosen = parser.parse_args(arguments)
    device = torch.device(chosen.device.replace("auto", "cuda" if torch.cuda.is_available() else "cpu"))
    if gpu := device.type == "cuda":
        torch.cuda.set_device(device.index or 0)
    batch, networks = (100, ["resnet29", "wrn-28-10", "resnet50"]) if gpu else (48, ["wrn-10-1", "resnet29"])
    named = chosen.variants or [n for n in HOW if "compiled" not in n and (gpu or "graph" not in n)]
    names = [name for name in HOW if name == "vanilla" or name in named]
    torch.set_num_threads(torch.get_num_threads() if gpu else 1)  # one is steadier
    name = torch.cuda.get_device_name(device) if gpu else f"CPU, {torch.backends.cpu.get_cpu_capability()}"
    told: dict[str, Any] = {"device": name, "torch": torch.__version__, "threads": torch.get_num_threads()}
    told |= {"load": os.getloadavg()[0], "rounds": chosen.rounds, "rows": []}
    print(*(f"{key} {value}" for key, value in told.items() if key != "rows"), sep=", ")
    print(f"{'network':<11}{'dtype':<9}{'variant':<18}" + "".join(f"{name:>{len(name) + 2}}" for name in FORMATS))
    for network in chosen.networks or networks:
        size = chosen.size or (32 if network.startswith(("wrn", "resnet29")) else 224)
        for dtype in chosen.dtypes or (["float32", "bf16"] if gpu else ["float32"]):
            what = (network, size, chosen.batch or batch, dtype, device, names, chosen.rounds, chosen.optimiser)
            told["rows"] += measure(*what)
            chosen.out.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
