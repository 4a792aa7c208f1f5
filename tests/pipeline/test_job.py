"""What a person sees of a job while it works."""

import io

from rich.console import Console

from pipeline import job
from pipeline.job import JobProgress


def test_speed_and_time_left_count_from_the_first_results(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(job.time, "monotonic", lambda: clock[0])
    console = Console(file=io.StringIO(), width=200)
    with JobProgress(1000, 100, console) as progress:
        for seconds, count, note in [(60, 50, ""), (5, 100, ""), (0.5, 0, "3 rejected"), (11, 150, "3 rejected")]:
            clock[0] += seconds
            progress.advance(count, note)
    # 150 were done after a minute in which workers started; then 100 in 5 s, and 250 in 16.5 s.
    assert console.file.getvalue().splitlines() == [
        "250 of 1,000 images, 20 img/s, 0:00:38 left",
        "400 of 1,000 images, 15 img/s, 3 rejected, 0:00:40 left",
    ]
