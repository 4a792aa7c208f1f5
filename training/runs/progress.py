"""What a person sees of a run while it trains: one live line on a terminal, a line every few seconds in a log."""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from training.recipe import Recipe

LOG_EVERY = 10.0  # seconds between lines where the output is not a terminal
NOT_PARTS = {
    "step", "cycle", "lr", "loss", "images_per_second", "waiting_for_data", "trust", "zero_weights", "warnings",
}  # fmt: skip


class Progress:
    """Show a run's messages; a context manager, so that the terminal is left in order."""

    def __init__(self, recipe: Recipe, console: Console) -> None:
        self.recipe, self.console = recipe, console
        self.steps, self.started, self.first, self.printed = recipe.schedule.steps, time.monotonic(), 0, 0.0
        self.bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(20),
            TextColumn("{task.completed:.0f}/{task.total:.0f} {task.fields[text]}"),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=console,
            disable=not console.is_terminal,
        )
        self.task = self.bar.add_task(recipe.name, total=self.steps, text="starting workers")

    def __enter__(self) -> Progress:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def put_nowait(self, message: Mapping[str, Any]) -> None:
        """Show a message at once: for training in this process, in place of a queue."""
        self.show(message)

    def show(self, message: Mapping[str, Any]) -> None:
        """Show one message of the training loop."""
        step, text = int(message["step"]), describe(message)
        self.bar.update(self.task, completed=step, text=text)
        for warning in message.get("warnings", ()):
            self.console.print(f"warning: {warning}", style="yellow", highlight=False, soft_wrap=True)
        now = time.monotonic()
        if not self.first:
            self.first, self.started = step, now
        if not self.console.is_terminal and (now - self.printed > LOG_EVERY or "top1" in message):
            self.printed = now
            left = (now - self.started) / max(step - self.first, 1) * (self.steps - step)
            remaining = f"{timedelta(seconds=round(left))} left" if step > self.first else ""
            self.console.print(
                f"{self.recipe.name} {step}/{self.steps} {text} {remaining}", highlight=False, soft_wrap=True
            )


def describe(message: Mapping[str, Any]) -> str:
    """Return one line: cycle, learning rate, loss and parts, speed, waiting, and accuracies where they are new."""
    accuracies = {name: value for name, value in message.items() if name.endswith(("top1", "top5"))}
    parts = " ".join(
        f"{name} {value:.2f}" for name, value in message.items() if name not in NOT_PARTS | accuracies.keys()
    )
    measured = " ".join(
        f"{name.replace('_', ' ').replace('top', 'top-')} {100 * value:.1f} %" for name, value in accuracies.items()
    )
    return (
        f"cycle {message['cycle']} lr {message['lr']:.4f} loss {message['loss']:.2f} ({parts}) "
        f"{message['images_per_second']:.0f} img/s, {100 * message['waiting_for_data']:.0f} % waiting for data"
        + (f" · {measured}" if measured else "")
    )
