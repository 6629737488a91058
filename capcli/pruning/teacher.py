"""The teacher of a run, and the banks of vectors that are made with it."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from typing import Any

import torch

from capcli import files, stages
from capcli.config.options import flatten
from capcli.config.prune import PruneConfig
from capcli.data.kinds import KINDS
from capcli.data.splits import TaskData
from capcli.errors import ConfigError, ModelError
from capcli.events import Event, told
from capcli.measuring import chance
from capcli.models import loading, predict, stock
from capcli.models.model import Model, copy, place
from capcli.pruning import banks, train
from capcli.pruning.objective import Objective
from capcli.pruning.phase import make_job
from capcli.pruning.setup import Setup, found_stage, measure_splits, origin_of, stage_record
from capcli.records.codec import from_json, to_json
from capcli.records.pruned import SplitScores
from capcli.stored import read_json


def make_bank(
    setup: Setup, name: str, model: Model, event: Callable[..., Event] | None = None
) -> Generator[Event, None, tuple[torch.Tensor, torch.Tensor]]:
    """Vectors and, of the teacher, logits of the training set by `model`, encoded unless published before; without a
    head the vectors are the logits."""
    wanted, of = name == "finetuned" and not KINDS[setup.data.kind].vectors, origin_of(setup, f"bank-{name}")
    folder = setup.run.place(of["stage"])
    if (yield from found_stage(setup, of)) is None:
        began = time.monotonic()
        event = event or setup.meter.stoppable(f"bank {name}")
        coding = predict.encoded(model, setup.train, setup.on.exact, setup.pooling, logits=wanted)
        logits, vectors = yield from told(coding, event)
        setup.run.check()
        banks.save(folder, vectors.cpu().numpy(), logits.cpu().numpy(), time.monotonic() - began, of)
    vectors, logits = banks.load(folder, setup.on.device, len(setup.train), setup.train.n_outputs if wanted else 0)
    return vectors, logits if wanted else vectors


def given_teacher(config: PruneConfig, data: TaskData, student: Model) -> Model | None:
    """The teacher that the user named; or, where nothing is trained or nothing has labels, the model itself, if it has
    a head for the task, or none is needed.

    None when the run has to make one. Raises `ModelError` or `ConfigError` when the named one does not fit.
    """
    if not config.teacher:
        return None if config.epochs and not config.unlabelled else _itself(config, data)
    names = config.source.label_names
    teacher = loading.load_model(config.teacher, data.classes, data.kind, config.seed, need_head=True, label_map=names)
    _check_teacher(config, teacher, student)
    return teacher


def _itself(config: PruneConfig, data: TaskData) -> Model | None:
    """The model to prune with the head that it came with; None when that is not for this task, or there is none."""
    names = config.source.label_names
    try:
        return loading.load_dense(config.model, data.classes, data.kind, config.seed, need_head=True, label_map=names)
    except ModelError:
        return None


def fine_tuned(setup: Setup, student: Model) -> Generator[Event, None, Model]:
    """The student's copy, fine-tuned on the task and published as a stock folder."""
    config, of = setup.config, origin_of(setup, "teacher")
    folder = setup.run.place(of["stage"])
    if (yield from found_stage(setup, of)) is None:
        teacher = copy(student)
        job = make_job(setup, teacher, "teacher", Objective(losses=("ce",)), None)
        state = yield from train.train(job)
        steps = {name: value for name, value in flatten(config).items() if name in stages.STAGES["teacher-steps"]}
        about = {"seconds": state.seconds, "history": state.history, "steps": steps, "of": of}
        setup.run.check()
        with files.publish(folder) as staging:
            stock.save_dense(teacher, staging)
            files.write_json(staging / stages.STAGE, about)
        files.remove(setup.run.place("teacher-steps"))
        return teacher
    for note in other_steps(setup):
        yield setup.meter.of("teacher")(note=note)
    return _published(setup)


def teacher_again(setup: Setup, student: Model) -> Model:
    """The teacher of a run whose phases are over: as the user named it, or as this run published it."""
    given = given_teacher(setup.config, setup.data, student) if setup.teacher else None
    return place(given, setup.on) if given is not None else _published(setup)


def _published(setup: Setup) -> Model:
    folder, labels = setup.run.place("teacher"), setup.data.classes
    return place(loading.load_dense(str(folder), labels, setup.data.kind, setup.config.seed, need_head=True), setup.on)


def other_steps(setup: Setup) -> list[str]:
    """A note when the teacher was trained with options that have changed since."""
    before, now = stage_record(setup, "teacher").get("steps", {}), flatten(setup.config)
    options = [f"{name} {value}" for name, value in before.items() if value != now[name]]
    return [f"the teacher was trained with {', '.join(options)}"] if options else []


def weak_teacher(setup: Setup) -> str:
    """What helps when the dense model is no better than guessing."""
    if setup.teacher:
        return "use a teacher that has learned the task"
    return "use more --teacher-epochs or training data, or a larger model"


def _check_teacher(config: PruneConfig, teacher: Model, student: Model) -> None:
    theirs, ours = teacher.net.config.hidden_size, student.net.config.hidden_size
    if "fic" in config.loss_names and theirs != ours and not teacher.embedding:
        raise ConfigError(
            f"the teacher's vectors have {theirs} dimensions, the model's {ours}; fic cannot compare them",
            "leave fic out with --losses ce,kd,prc,snc, or use a teacher of the same width",
        )
    if teacher.embedding and theirs != ours:
        raise ConfigError(
            f"the teacher's vectors have {theirs} dimensions, the model's {ours}: they cannot be learned",
            "use a teacher of the same width",
        )
    sizes = [(one.net.config.hidden_size, one.net.config.num_hidden_layers) for one in (teacher, student)]
    if "hid" in config.loss_names and sizes[0] != sizes[1]:
        raise ConfigError(
            f"the teacher has {sizes[0][1]} layers of width {sizes[0][0]}, the model {sizes[1][1]} of {sizes[1][0]}; "
            "hid cannot compare their hidden states",
            "leave hid out of --losses, or use a teacher of the same width and depth",
        )
    if teacher.tokenizer.get_vocab() != student.tokenizer.get_vocab():
        raise ConfigError(
            f"the teacher {config.teacher} has another vocabulary than {config.model}: it cannot read the same tokens",
            "use a teacher that was fine-tuned from the same model family",
        )
    shapes = [{name: tuple(t.shape) for name, t in one.net.state_dict().items()} for one in (teacher, student)]
    if config.from_teacher and shapes[0] != shapes[1]:
        raise ConfigError(
            "the teacher has another architecture than the model, so training cannot start from its weights",
            "use --init pretrained",
        )


def teacher_bank(setup: Setup, teacher: Model) -> Generator[Event, None, tuple[Any, Any, dict[str, SplitScores]]]:
    """Vectors and logits of the teacher on the training set (None when no loss needs them), and its metrics."""
    names, vectors, logits = setup.config.loss_names, None, None
    if setup.config.epochs and ("fic" in names or "kd" in names):  # what heals asks the teacher itself
        vectors, logits = yield from make_bank(setup, "finetuned", teacher)
    of = origin_of(setup, "dense")
    folder = setup.run.place(of["stage"])
    if (yield from found_stage(setup, of)) is None:
        measured = yield from measure_splits(setup, teacher, setup.meter.stoppable("evaluate dense"))
        for name, one in measured.items():  # said now, as pruning may take hours
            for note in chance.doubts({"the dense model": one}, name, setup.data.primary, weak_teacher(setup)):
                yield setup.meter.of("evaluate dense")(done=1, total=1, note=note)
        setup.run.check()
        with files.publish(folder) as staging:
            files.write_json(staging / "metrics.json", to_json(measured))
            files.write_json(staging / stages.STAGE, {"of": of})
    path = folder / "metrics.json"
    stored = read_json(path)
    return vectors, logits, {name: from_json(SplitScores, one, str(path)) for name, one in stored.items()}
