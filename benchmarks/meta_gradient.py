"""What the meta gradient costs by each engine, and how far each is from the exact one. Needs torch alone.

    python -m benchmarks.meta_gradient --out meta_gradient.json

`seconds` is all that ω* and λ* need (weak forward, pseudo labels, meta gradient), `vanilla_seconds` forward and
backward of cross-entropy on the same batch: medians over rounds that run each once. `memory_ratio` compares the peaks
of what torch's allocator holds beyond what it held before: `max_memory_allocated` on a GPU; on the CPU torch's
profiler, in an untimed call (oneDNN's own scratch is not seen). `weight_rel_error` is ‖ω − ω°‖/‖ω°‖ of the gradients
by ω, `trust_sign_agreement` the share of equal signs of those by λ; ω° and λ° are double backward's in float64 from
the same weights and batch. In float32 the exact engines share an error: activations within rounding of zero cross the
ReLU. What fails keeps its row, with nulls and an `error`.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.engine.networks import build
from training.engine.optimiser import SgdDescent
from training.objectives.interface import Alone, Batch, Moment
from training.objectives.losses import sharpen
from training.objectives.meta import Engine, MetaProblem, meta_gradient
from training.objectives.tangents import Recorded

ENGINES: tuple[Engine, ...] = ("forward", "second_order")
FORMATS = {"seconds": ".4f", "vanilla_seconds": ".4f", "time_ratio": ".2f", "memory_ratio": ".2f"}
FORMATS |= {"weight_rel_error": ".1e", "trust_sign_agreement": ".3f"}
Row = dict[str, Any]
Setting = tuple[nn.Module, Batch, Moment]
CLASSES, TRAINING_STEPS, WARM_UPS = 10, 5, 2


def prepare(network: str, size: int, batch: int, device: torch.device) -> Setting:
    """Smooth noise with random labels, and a float32 network after a few steps of SGD on it."""
    generator = torch.Generator().manual_seed(0)
    coarse, grain = (torch.randn(2 * batch, 3, side, side, generator=generator) for side in (4, size))
    images = (F.interpolate(coarse, (size, size), mode="bicubic") + 0.05 * grain).tanh()
    weak_BCHW, probe_MCHW = images.to(device, memory_format=torch.channels_last).chunk(2)  # as training stores them
    label_B, probe_label_M = torch.randint(CLASSES, (2 * batch,), generator=generator).to(device).chunk(2)
    model = build(network, 3, CLASSES, seed=0, size=size).to(device).train()
    parameters = dict(model.named_parameters())
    buffers = {name: torch.zeros_like(value) for name, value in parameters.items()}
    for _ in range(TRAINING_STEPS):  # without torch.optim, whose import takes longer than a small run
        loss = F.cross_entropy(model(weak_BCHW), label_B)
        for name, gradient in zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True):
            buffers[name].mul_(0.9).add_(gradient)
            parameters[name].data.sub_(0.05 * buffers[name])
    moment = Moment(0.1, SgdDescent(weight_decay=5e-4, decayed=frozenset(buffers), velocity=buffers))
    row_B = torch.arange(batch, device=device)
    return model, Batch(weak_BCHW, weak_BCHW, label_B, row_B, probe_MCHW, probe_label_M, (0,), CLASSES), moment


def cast(setting: Setting, dtype: torch.dtype) -> Setting:
    """A copy in another precision."""
    model, batch, moment = setting
    images = {name: getattr(batch, name).to(dtype) for name in ("weak_BCHW", "strong_BCHW", "probe_MCHW")}
    return deepcopy(model).to(dtype), replace(batch, **images), replace(moment, descent=moment.descent.to(dtype))


def vanilla(setting: Setting) -> None:
    """Forward and backward of cross-entropy."""
    model, batch, _ = setting
    torch.autograd.grad(F.cross_entropy(model(batch.weak_BCHW), batch.label_B), list(model.parameters()))


def gradients(setting: Setting, engine: Engine) -> tuple[Tensor, Tensor]:
    """(∂L^p/∂ω_B, ∂L^p/∂λ_B) from images: what a training step pays for its coefficients."""
    model, batch, moment = setting
    with Recorded(keeps=engine == "forward") as recorded:
        logits_BK = model(batch.weak_BCHW)
    given_BK = torch.eye(CLASSES, dtype=logits_BK.dtype, device=logits_BK.device)[batch.label_B]
    pseudo_BK = sharpen(logits_BK.detach().softmax(1), 0.5)
    problem = MetaProblem(
        model, batch, moment, Alone(), logits_BK, given_BK, pseudo_BK, 0.9, 0.1, "momentum", True, recorded=recorded
    )
    return meta_gradient(engine, problem)


def elapsed(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call; on a CPU those that the processor spent on it, which other processes do not lengthen."""
    if device.type != "cuda":
        start = time.process_time()
        call()
        return time.process_time() - start
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    torch.cuda.synchronize(device)
    return time.perf_counter() - start


def peak_memory(call: Callable[[], object], device: torch.device) -> int:
    """Bytes that one call holds at its peak, beyond what was held before."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    with torch.autograd.profiler.profile(profile_memory=True) as recorded:
        call()
    memory = [event for event in recorded.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate(event.nbytes() for event in sorted(memory, key=lambda event: event.start_ns())), default=0)


def measure(network: str, dtype: str, device: torch.device, batch: int, size: int, repeats: int) -> Iterator[Row]:
    """One row an engine, printed too."""
    errors: dict[str, str] = {}

    def attempt(name: str, call: Callable[[], Any]) -> Any:
        try:
            return None if name in errors or "setting" in errors else call()
        except (RuntimeError, MemoryError) as error:
            errors[name] = f"{name}: {str(error).strip() or type(error).__name__}".splitlines()[0]
        gc.collect()
        torch.cuda.empty_cache()
        return None

    trained = attempt("setting", lambda: prepare(network, size, batch, device))
    oracle = attempt("oracle", lambda: gradients(cast(trained, torch.float64), "second_order"))
    setting = attempt("setting", lambda: cast(trained, getattr(torch, dtype)))
    calls: dict[str, Callable[[], Any]] = {"vanilla": partial(vanilla, setting)}
    calls |= {engine: partial(gradients, setting, engine) for engine in ENGINES}
    found = {name: attempt(name, call) for name, call in calls.items()}
    peaks = {name: attempt(name, partial(peak_memory, call, device)) for name, call in calls.items()}
    rounds = [{n: attempt(n, partial(elapsed, c, device)) for n, c in calls.items()} for _ in range(WARM_UPS + repeats)]
    seconds = {n: statistics.median(times[n] for times in rounds[WARM_UPS:]) for n in calls if rounds[-1][n]}
    for engine in ENGINES:
        row: Row = {"engine": engine, "network": network, "device": device.type, "dtype": dtype, "batch": batch}
        row |= dict.fromkeys(FORMATS) | {"seconds": seconds.get(engine), "vanilla_seconds": seconds.get("vanilla")}
        if engine in seconds and "vanilla" in seconds:
            row["time_ratio"] = seconds[engine] / seconds["vanilla"]
            row["memory_ratio"] = peaks[engine] / peaks["vanilla"] if peaks["vanilla"] else None
        if engine in seconds and oracle:
            row["weight_rel_error"] = ((found[engine][0] - oracle[0]).norm() / oracle[0].norm()).item()
            row["trust_sign_agreement"] = ((found[engine][1] < 0) == (oracle[1] < 0)).double().mean().item()
        failed = [errors[name] for name in ("setting", "oracle", "vanilla", engine) if name in errors]
        cells = [f"{'–' if row[n] is None else format(row[n], form):>{len(n) + 2}}" for n, form in FORMATS.items()]
        print(f"{network:<11}{dtype:<9}{engine:<13}" + "".join(cells), *failed, flush=True)
        yield row | ({"error": "; ".join(failed)} if failed else {})


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Cost and accuracy of the meta gradient's engines.")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--networks", nargs="+", help="wrn-10-1 wrn-16-2 resnet29; on a GPU resnet29 wrn-28-10")
    parser.add_argument("--batch", type=int, help="noisy and trusted examples each; 50, on a GPU 100")
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "float64"), default=["float32"])
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 …")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--size", type=int, default=32, help="pixels a side")
    parser.add_argument("--no-tf32", action="store_true", help="float32 convolutions in full; by default torch's TF32")
    chosen = parser.parse_args(arguments)
    device = torch.device(chosen.device.replace("auto", "cuda" if torch.cuda.is_available() else "cpu"))
    gpu = device.type == "cuda"
    batch, networks = (100, ["resnet29", "wrn-28-10"]) if gpu else (50, ["wrn-10-1", "wrn-16-2", "resnet29"])
    torch.set_num_threads(torch.get_num_threads() if gpu else 1)  # one is steadier
    torch.backends.cudnn.allow_tf32 &= not chosen.no_tf32
    name = torch.cuda.get_device_name(device) if gpu else f"CPU, {torch.backends.cpu.get_cpu_capability()}"
    told: dict[str, Any] = {"device": name, "torch": torch.__version__, "size": chosen.size, "rows": []}
    told |= {"threads": torch.get_num_threads(), "tf32": gpu and torch.backends.cudnn.allow_tf32}
    print(*(f"{key} {value}" for key, value in told.items() if key != "rows"), sep=", ")
    print(f"{'network':<11}{'dtype':<9}{'engine':<13}" + "".join(f"{name:>{len(name) + 2}}" for name in FORMATS))
    for network in chosen.networks or networks:
        for dtype in chosen.dtypes:
            told["rows"] += measure(network, dtype, device, chosen.batch or batch, chosen.size, chosen.repeats)
            chosen.out.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
