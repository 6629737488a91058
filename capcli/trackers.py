"""Experiment trackers, each as three calls: start with a configuration, log numbers of a step, finish with a summary.

They run in a process of their own, which `tracking` starts: it reads lines of JSON from stdin and answers on stdout
with where the run is to be seen, or with why the tracker failed. What the packages print is not shown.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

PROJECT = "capcli"  # unless the variables of the tracker name another
STDOUT, STDERR = 1, 2


@dataclass(frozen=True, kw_only=True)
class About:
    """A run: its name, the sweep that it belongs to, if any, its configuration, and a folder for trackers that write
    files."""

    name: str
    group: str
    config: Mapping[str, Any]
    folder: str


class Tracker(Protocol):
    """What a tracker does. Names of numbers begin with their phase, as `prune/loss`; steps count within a phase."""

    def start(self, about: About) -> str:
        """Begin a run; returns where it is to be seen."""

    def log(self, phase: str, step: int, numbers: Mapping[str, float]) -> None:
        """Numbers of one step."""

    def finish(self, summary: Mapping[str, float]) -> None:
        """End the run with its results; empty where it was stopped or failed."""


class Trackio:
    """trackio, of Hugging Face: a local database, or what TRACKIO_SPACE_ID or TRACKIO_SERVER_URL name."""

    def start(self, about: About) -> str:
        import trackio  # type: ignore[import-not-found,unused-ignore]

        project = os.environ.get("TRACKIO_PROJECT", PROJECT)
        self.run = trackio.init(
            project=project, name=about.name, group=about.group or None, config=dict(about.config), embed=False
        )
        return f'trackio show --project "{project}"'

    def log(self, phase: str, step: int, numbers: Mapping[str, float]) -> None:
        self.run.log(dict(numbers), step=step)

    def finish(self, summary: Mapping[str, float]) -> None:
        if summary:
            self.run.log(dict(summary))
        self.run.finish()


class Wandb:
    """Weights & Biases; where and whether it sends is up to its login and WANDB_MODE."""

    def start(self, about: About) -> str:
        import wandb  # type: ignore[import-not-found,unused-ignore]

        silent = {"console": "off", "silent": True, "disable_code": True, "disable_git": True}
        self.phases: set[str] = set()
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=about.name,
            group=about.group or None,
            config=dict(about.config),
            settings=wandb.Settings(x_disable_meta=True, x_disable_machine_info=True, **silent),
        )
        return str(self.run.url or f"wandb sync {os.path.relpath(self.run.settings.sync_dir)}")

    def log(self, phase: str, step: int, numbers: Mapping[str, float]) -> None:
        axis = f"{phase}/step"
        if phase not in self.phases:  # its own steps only rise, over all phases
            self.phases.add(phase)
            self.run.define_metric(axis)
            self.run.define_metric(f"{phase}/*", step_metric=axis)
        self.run.log({axis: step, **numbers})

    def finish(self, summary: Mapping[str, float]) -> None:
        self.run.summary.update(dict(summary))
        self.run.finish(exit_code=0 if summary else 1)


class Tensorboard:
    """Event files for TensorBoard."""

    def start(self, about: About) -> str:
        from tensorboard.summary import Writer  # type: ignore[import-not-found,unused-ignore]

        self.writer = Writer(str(Path(about.folder)))
        above = Path(about.folder).parent
        return f"tensorboard --logdir {os.path.relpath(above.parent if about.group else above)}"

    def log(self, phase: str, step: int, numbers: Mapping[str, float]) -> None:
        for name, number in numbers.items():
            self.writer.add_scalar(name, number, step)

    def finish(self, summary: Mapping[str, float]) -> None:
        for name, number in summary.items():
            self.writer.add_scalar(name, number, 0)
        self.writer.close()


class Mlflow:
    """MLflow, at MLFLOW_TRACKING_URI, in the experiment MLFLOW_EXPERIMENT_NAME."""

    def start(self, about: About) -> str:
        import mlflow  # type: ignore[import-not-found,unused-ignore]

        if "MLFLOW_EXPERIMENT_NAME" not in os.environ and "MLFLOW_EXPERIMENT_ID" not in os.environ:
            mlflow.set_experiment(PROJECT)
        nobody = {"mlflow.user": "", "mlflow.source.name": "cap prune"}  # else a name and a path of this machine
        self.run = mlflow.start_run(
            run_name=about.name, tags={**nobody, **({"group": about.group} if about.group else {})}
        )
        mlflow.log_params({name: value for name, value in about.config.items() if value != ""})
        self.log_metrics: Callable[..., Any] = mlflow.log_metrics
        self.end: Callable[..., Any] = mlflow.end_run
        return f"run {self.run.info.run_id}"

    def log(self, phase: str, step: int, numbers: Mapping[str, float]) -> None:
        self.log_metrics(dict(numbers), step=step)

    def finish(self, summary: Mapping[str, float]) -> None:
        if summary:
            self.log_metrics(dict(summary))
        self.end(status="FINISHED" if summary else "KILLED")


TRACKERS: Mapping[str, Callable[[], Tracker]] = {
    "trackio": Trackio,
    "wandb": Wandb,
    "tensorboard": Tensorboard,
    "mlflow": Mlflow,
}


def main() -> None:
    """Do what stdin says, and answer."""
    channel = os.dup(STDOUT)
    os.dup2(STDERR, STDOUT)  # what packages print is no answer
    with os.fdopen(channel, "w", encoding="ascii") as pipe:

        def answer(**said: str) -> None:
            pipe.write(json.dumps(said) + "\n")
            pipe.flush()

        try:
            serve(TRACKERS, sys.stdin, answer)
        except Exception as error:
            first = (str(error).strip().splitlines() or [""])[0]
            answer(failed=f"{type(error).__name__}: {first}"[:300])


def serve(trackers: Mapping[str, Callable[[], Tracker]], lines: Iterable[str], answer: Callable[..., None]) -> None:
    """Make the calls of the lines: the first starts a tracker by name, a summary or their end finishes it."""
    messages = map(json.loads, lines)
    first = next(messages)
    tracker = trackers[first.pop("tracker")]()
    answer(place=tracker.start(About(**first)))
    summary: Mapping[str, float] = {}
    for message in messages:
        if "summary" in message:
            summary = message["summary"]
        else:
            tracker.log(**message)
    tracker.finish(summary)
