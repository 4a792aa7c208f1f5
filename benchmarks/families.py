"""Whether the meta gradient is exact for every family of timm's networks: the smallest member of each of its modules.

    python -m benchmarks.families --out benchmarks/results/families.json
    python -m benchmarks.families --markdown                            the table of docs/networks.md

Forward mode, as training runs it, is held in float64 against two oracles, each with the random draws of its own:
`second_order` is double backward, with attention by its mathematical kernel, where torch has it for all operations of
the network; `rows` is reverse mode alone, ⟨∇L^p(θ'), ∇CE_i⟩ by one backward pass for each example and coefficient.
An error is ‖x − x°‖/‖x°‖, the larger of ω's and λ's; `off` without drop path and dropout, `on` with both. `float32` and
`bf16` are forward mode in that precision, off, against `rows` in float64. A family that a run would refuse says why.

Each network runs in a process of its own, so that none can stop the table; what fails keeps its row, with an `error`.
Rows are written as they come, and what is there already is not run again.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest.mock import patch

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from benchmarks.meta_gradient import cast
from training.engine.networks import build, require_forward_mode
from training.engine.optimiser import SgdDescent, kernels
from training.engine.passes.network import Passes
from training.objectives.interface import Alone, Batch, Descent, Moment
from training.objectives.losses import cross_entropy
from training.objectives.meta import Engine, MetaProblem, meta_gradient
from training.objectives.private_torch import BatchNorm
from training.objectives.tangents import Recorded

RESULTS = "benchmarks/results/families.json"
CLASSES, IMAGES, LAMBDA0 = 4, 3, 0.7
LARGEST_STEP = 0.1  # of the lookahead, for all parameters: far steps from random weights end where float32 says nothing
DROP_PATH, DROPOUT = 0.3, 0.2
EXACT = 1e-13  # beyond it reverse mode decides
SIZES = (32, 64, 96, 128, 0)  # pixels a side; 0 is the network's own
BATCH_NORM_SIZE = 64  # from here on: statistics of three numbers a channel, at 32 px, are ill-conditioned
LARGE = 5_000_000  # parameters: of larger networks, one with fewer of the same blocks
FEWER: tuple[dict[str, Any], ...] = ({"depth": 2}, {"depths": (1, 1, 1, 1)}, {"layers": (1, 1, 1, 1)})
Row = dict[str, Any]
Found = tuple[Tensor, Tensor]  # ∂L^p/∂ω_B, ∂L^p/∂λ_B


def parameters(network: str, **settings: Any) -> int:
    """Count the parameters of a network of timm's, without making them."""
    with torch.device("meta"):
        model = timm.create_model(network, num_classes=CLASSES, **settings)
    return sum(value.numel() for value in model.parameters())


def shortened(network: str) -> dict[str, Any]:
    """Return the settings by which a large network has fewer blocks, if it knows any."""
    whole = parameters(network)
    known = (settings for settings in FEWER if whole > LARGE and _knows(network, settings))
    return next((settings for settings in known if parameters(network, **settings) < whole), {})


def _knows(network: str, settings: dict[str, Any]) -> bool:
    try:
        parameters(network, **settings)
    except Exception:  # each network's own
        return False
    return True


def smallest(family: str) -> str:
    """Return the network with the fewest parameters of one of timm's modules; minutes for the large modules."""
    return min(timm.list_models(module=family), key=parameters)


@dataclass(frozen=True)
class Case:
    """Hold one network and one batch, in float64, with the seed of all random layers."""

    model: nn.Module
    batch: Batch
    descent: Descent
    size: int
    alpha: float = 0.03
    seed: int = 5
    keeps: bool = True  # whether forward mode is given what the weak pass has computed

    def to(self, dtype: torch.dtype) -> Case:
        """Return a copy whose parameters and images have another precision."""
        model, batch, moment = cast((self.model, self.batch, Moment(self.alpha, self.descent)), dtype)
        return replace(self, model=model, batch=batch, descent=moment.descent)

    def in_bf16(self) -> Case:
        """Return a copy that computes in bf16, as `--precision bf16` does."""
        case = self.to(torch.float32)
        return replace(case, model=Passes(case.model, chunks=1, dtype=torch.bfloat16, channels_last=False))


def pose(network: str, *, drops: bool = False, fewer: dict[str, Any] | None = None) -> Case:
    """Build a network for the smallest images that it takes, and a batch. Raises the last error where it takes none."""
    for size in SIZES:
        try:
            model = _built(network, size, drops, fewer or {})
            side = size or int(vars(model)["pretrained_cfg"]["input_size"][-1])
            if side < BATCH_NORM_SIZE and any(isinstance(module, BatchNorm) for module in model.modules()):
                continue
            with torch.no_grad():
                model.eval()(torch.zeros(1, 3, side, side))
        except (AssertionError, RuntimeError, TypeError, ValueError, IndexError, ZeroDivisionError):
            if not size:
                raise
        else:
            return _posed(model.double().train(), side)
    raise ValueError("takes images of no size")


def _built(network: str, size: int, drops: bool, fewer: dict[str, Any]) -> nn.Module:
    with patch.object(timm, "create_model", partial(timm.create_model, **fewer)):
        try:
            model = build(network, 3, CLASSES, seed=3, size=size, drop_path=drops * DROP_PATH)
        except ValueError as error:
            if "no drop path" not in str(error):
                raise
            model = build(network, 3, CLASSES, seed=3, size=size)
    for module in model.modules():
        if isinstance(module, nn.Dropout) and not module.inplace:  # behind a softmax that cannot be trained at all
            module.p = drops * DROPOUT
        if isinstance(getattr(module, "drop_rate", None), float):  # what timm gives F.dropout
            vars(module)["drop_rate"] = drops * DROPOUT
    return model


def _posed(model: nn.Module, side: int) -> Case:
    rng = torch.Generator().manual_seed(7)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    with torch.no_grad():
        for value in model.parameters():  # layers that begin at zero hide what lies behind them
            value.add_(drawn(*value.shape), alpha=0.02)
    velocity = {name: 0.01 * drawn(*value.shape) for name, value in model.named_parameters()}
    weak_BCHW, probe_MCHW = drawn(2 * IMAGES, 3, side, side).tanh().chunk(2)
    label_B, probe_label_M = torch.randint(CLASSES, (2 * IMAGES,), generator=rng).chunk(2)
    batch = Batch(weak_BCHW, weak_BCHW, label_B, torch.arange(IMAGES), probe_MCHW, probe_label_M, (0,), CLASSES)
    logits_BK = model(weak_BCHW)
    if logits_BK.shape != (IMAGES, CLASSES):
        raise ValueError(f"no classifier: of {IMAGES} images it makes {'×'.join(map(str, logits_BK.shape))} numbers")
    loss = F.cross_entropy(logits_BK, label_B)
    gradients = torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True)
    norm = float(torch.stack([gradient.square().sum() for gradient in gradients]).sum().sqrt())
    descent = SgdDescent(5e-4, kernels(model), velocity=velocity)
    return Case(model, batch, descent, side, min(Case.alpha, LARGEST_STEP / norm))


class Float32Inside(TorchFunctionMode):
    """See whether a float64 pass computes in float32 on the way, whatever it is asked for."""

    seen = False

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """See `TorchFunctionMode`."""
        out = func(*args, **(kwargs or {}))
        self.seen |= isinstance(out, Tensor) and out.dtype == torch.float32 and out.requires_grad
        return out


def problem_of(case: Case) -> MetaProblem:
    """Return the meta step after its weak pass, which is recorded."""
    model, batch = deepcopy(case.model), case.batch
    torch.manual_seed(case.seed)
    with Recorded(keeps=case.keeps) as recorded:
        logits_BK = model(batch.weak_BCHW)
    rng = torch.Generator().manual_seed(9)
    pseudo_BK = torch.randn(IMAGES, CLASSES, generator=rng, dtype=torch.float64).softmax(1).to(logits_BK.dtype)
    given_BK = F.one_hot(batch.label_B, CLASSES).to(logits_BK.dtype)
    return MetaProblem(
        model, batch, Moment(case.alpha, case.descent), Alone(), logits_BK, given_BK, pseudo_BK, LAMBDA0, case.alpha,
        "momentum", probe_decay=True, recorded=recorded,
    )  # fmt: skip


def by_engine(case: Case, engine: Engine) -> Found:
    """Return the meta gradient as training computes it."""
    with sdpa_kernel(SDPBackend.MATH) if engine == "second_order" else nullcontext():
        return meta_gradient(engine, problem_of(case))


def by_rows(case: Case) -> Found:
    """Return the meta gradient by reverse mode alone: the chain rule, one example and coefficient at a time."""
    problem = problem_of(case)
    model, theta = problem.model, problem.parameters

    def gradient(loss: Tensor, values: Sequence[Tensor]) -> Sequence[Tensor]:
        return torch.autograd.grad(loss, list(values), retain_graph=True, materialize_grads=True)

    loss_B = cross_entropy(problem.target(LAMBDA0), problem.logits_BK)
    slope_B = cross_entropy(problem.given_BK - problem.pseudo_BK, problem.logits_BK)  # of loss_B by λ
    inner = gradient(loss_B.mean(), list(theta.values()))
    ahead = case.descent.look_ahead({name: value.detach() for name, value in theta.items()}, inner, case.alpha)
    leaves = {name: value.detach().requires_grad_() for name, value in ahead.items()}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    logits_MK = functional_call(model, {**leaves, **buffers}, (problem.batch.probe_MCHW,))
    loss = F.cross_entropy(logits_MK, problem.batch.probe_label_M) + case.descent.penalty(leaves)
    direction = gradient(loss, list(leaves.values()))

    def along(rows_B: Tensor) -> Tensor:
        rows = [gradient(row, list(theta.values())) for row in rows_B]
        return torch.stack(
            [torch.stack([(a * b).sum() for a, b in zip(direction, row, strict=True)]).sum() for row in rows]
        )

    return -case.alpha * along(loss_B), -case.alpha / IMAGES * along(slope_B)


def relative(found: Found, expected: Found) -> float:
    """Return the larger relative error of the two."""
    return max(
        float((a.double() - b.double()).norm() / b.double().norm()) for a, b in zip(found, expected, strict=True)
    )


def measure(network: str) -> Row:
    """Return what is known of one network. Never raises: an error is told under what failed."""
    fewer = shortened(network)
    row: Row = {"fewer": fewer, "errors": {}}

    def attempt(name: str, work: Callable[[], Any]) -> Any:
        try:
            return work()
        except Exception as error:  # whatever a network does
            row["errors"][name] = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
            return None

    for which in ("off", "on"):
        case = attempt("build", partial(pose, network, drops=which == "on", fewer=fewer))
        if case is None:
            break
        row |= {"size": case.size, "parameters": sum(value.numel() for value in case.model.parameters())}
        try:
            require_forward_mode(network, case.model)
        except ValueError as error:
            row["refused"] = str(error)
            break
        forward = attempt(f"forward {which}", partial(by_engine, case, "forward"))
        if forward is not None:
            row |= _against_oracles(case, which, forward, attempt)
    return row | {"seconds": round(time.process_time(), 1)}


def _against_oracles(case: Case, which: str, forward: Found, attempt: Callable[[str, Callable[[], Any]], Any]) -> Row:
    """Return how far others are from forward mode in float64, with drop path and dropout `which` is off or on."""

    def error(name: str, work: Callable[[], Found]) -> float | None:
        found = attempt(name, work)
        return relative(forward, found) if found else None

    row: Row = {which: {"second_order": error(f"second_order {which}", partial(by_engine, case, "second_order"))}}
    if (row[which]["second_order"] or 1) > EXACT:
        row[which]["rows"] = error(f"rows {which}", partial(by_rows, case))
        if (row[which]["rows"] or 1) > EXACT:
            with Float32Inside() as inside:
                attempt("pass", partial(deepcopy(case.model), case.batch.weak_BCHW))
            row["float32_inside"] = inside.seen
    if which == "on":
        row[which]["alone"] = error("alone", partial(by_engine, replace(case, keeps=False), "forward"))
    else:
        row["float32"] = error("float32", lambda: by_engine(case.to(torch.float32), "forward"))
        row["bf16"] = error("bf16", lambda: by_engine(case.in_bf16(), "forward"))
    return row


def _child(network: str, seconds: int, sent: Connection) -> None:
    spent = int(time.process_time())
    resource.setrlimit(resource.RLIMIT_CPU, (spent + seconds, spent + seconds))
    warnings.simplefilter("ignore")
    sent.send(measure(network))


def measured(network: str, seconds: int) -> Row:
    """Return `measure` of a process of its own, or an error where that ends or takes too long."""
    forking = multiprocessing.get_context("fork")  # torch and timm are imported once
    received, sent = forking.Pipe(duplex=False)
    child = forking.Process(target=_child, args=(network, seconds, sent))
    child.start()
    sent.close()
    try:
        return received.recv()
    except EOFError:
        return {"error": f"ended: out of memory, or more than {seconds} s", "seconds": seconds}
    finally:
        child.kill()
        child.join()


def exactness(row: Row, which: str) -> float | None:
    """Return the error of forward mode in float64, by the oracle that has the same random draws."""
    errors = row.get(which, {})
    return errors.get("rows", errors.get("second_order"))


def verdict(row: Row) -> str:
    """Say in a few words what is to know of a row."""
    if "refused" in row:
        return "refused: " + row["refused"].split(",")[0].replace("torch has ", "")
    told = [row["error"]] if "error" in row else [] if "seconds" in row else ["not measured"]
    if row.get("float32_inside"):
        told.append("computes in float32 inside")
    lacking = row.get("errors", {}).get("second_order off", "")
    if lacking:
        told.append("no double backward: " + lacking.removeprefix("derivative for aten::").split(" ")[0])
    told += [
        why if name == "build" else f"{name}: {why}"
        for name, why in row.get("errors", {}).items()
        if not name.startswith("second_order")
    ]
    return "; ".join(told)


def markdown(told: dict[str, Any]) -> str:
    """Return the table of docs/networks.md."""
    lines = ["| family | network | px | parameters | float64, off | on | float32 | bf16 | |", "|" + "---|" * 9]
    for row in told["rows"]:
        numbers = [exactness(row, "off"), exactness(row, "on"), row.get("float32"), row.get("bf16")]
        cells = ["–" if number is None else f"{number:.0e}" for number in numbers]
        count = f"{row['parameters'] / 1e6:.1f} M"
        name = row["network"] + "".join(f", {key} {value}" for key, value in row.get("fewer", {}).items())
        lines.append(
            f"| {row['family']} | {name} | {row.get('size', '–')} | {count} | {' | '.join(cells)} | {verdict(row)} |"
        )
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Exactness of the meta gradient over timm's families.")
    parser.add_argument("--out", type=Path, default=Path(RESULTS), help="the JSON file to write, and to go on with")
    parser.add_argument("--families", nargs="+", help="of timm.list_modules(); all")
    parser.add_argument("--seconds", type=int, default=300, help="of a processor that one may take (%(default)s)")
    parser.add_argument("--again", action="store_true", help="also those that are there")
    parser.add_argument("--markdown", action="store_true", help="print the table of docs/networks.md instead")
    chosen = parser.parse_args(arguments)
    told: dict[str, Any] = json.loads(chosen.out.read_text()) if chosen.out.exists() else {"rows": []}
    if chosen.markdown:
        print(markdown(told), end="")
        return
    torch.set_num_threads(1)  # a process of more threads cannot fork
    told |= {"timm": timm.__version__, "torch": torch.__version__}
    told |= {"device": f"CPU, {torch.backends.cpu.get_cpu_capability()}"}
    rows = {row["family"]: row for row in told["rows"]}
    for family in chosen.families or timm.list_modules():
        old = rows.get(family, {})
        if "seconds" in old and not chosen.again:
            continue
        network = old.get("network") or smallest(family)
        rows[family] = {"family": family, "network": network, **measured(network, chosen.seconds)}
        rows[family].setdefault("parameters", parameters(network))
        print(json.dumps(rows[family]), flush=True)
        told["rows"] = [rows[name] for name in sorted(rows)]
        partly = chosen.out.with_suffix(".part")
        partly.write_text(json.dumps(told, indent=1) + "\n")
        os.replace(partly, chosen.out)


if __name__ == "__main__":
    main()
