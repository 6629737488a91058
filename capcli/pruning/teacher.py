"""The teacher of a run, and the banks of vectors that are made with it."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from capcli import files, stages
from capcli.config.options import flatten
from capcli.config.prune import PruneConfig
from capcli.data.kinds import KINDS
from capcli.data.splits import TaskData
from capcli.errors import ConfigError, ModelError
from capcli.events import Event, told
from capcli.measuring import chance, scoring
from capcli.measuring.scoring import Measured
from capcli.models import loading, predict, predictor, stock
from capcli.models.model import Model, added_names, copy, place
from capcli.pruning import banks, train
from capcli.pruning.objective import Objective
from capcli.pruning.phase import make_job
from capcli.pruning.setup import Setup, answers, found_stage, origin_of, scores, stage_record
from capcli.stored import read_tensors

ANSWERS = "answers.safetensors"  # of the teacher, to the evaluation splits in order


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
        seconds, found = time.monotonic() - began, (vectors.cpu(), logits.cpu())
        stages.publish(setup.run, of["stage"], lambda staging: banks.save(staging, *found, seconds, of))
    vectors, logits = banks.load(folder, setup.on.device, len(setup.train), setup.train.n_outputs if wanted else 0)
    return vectors, logits if wanted else vectors


def given_teacher(config: PruneConfig, data: TaskData, student: Model) -> Model | None:
    """The teacher that the user named; or, where nothing is trained or nothing has labels, the model itself, if it has
    a head for the task, or none is needed.

    None when the run has to make one. Raises `ModelError` or `ConfigError` when the named one does not fit.
    """
    if not config.teacher:
        return None if config.epochs and config.uses_labels else _itself(config, data)
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


def hand_on(config: PruneConfig, student: Model, teacher: Model) -> None:
    """Give the student what it starts from: the teacher's weights; or to learn masks only, the teacher's in place of
    those alone that the model to prune came without."""
    own = teacher.net.state_dict()
    if config.from_teacher:
        student.net.load_state_dict(own)
    elif config.masks_only:
        student.net.load_state_dict({name: own[name] for name in added_names(student)}, strict=False)


def with_answers(setup: Setup, teacher: Model) -> Generator[Event, None, Setup]:
    """The setup with the teacher's answers to what is evaluated on, where metrics compare with them."""
    if not setup.data.compares:
        return setup
    event, found = setup.meter.stoppable("answers of the teacher"), {}
    answering = predictor.of_network(teacher, setup.on.exact)
    with predict.evaluating(teacher):
        for name, examples in setup.evals.items():
            found[name] = yield from told(scoring.answered(answering, examples), event)
        curve = yield from told(scoring.answered(answering, setup.curve), event)
    return replace(setup, evals=found, curve=curve)


def fine_tuned(setup: Setup, student: Model) -> Generator[Event, None, Model]:
    """The student's copy, fine-tuned on the task and published as a stock folder."""
    config, of = setup.config, origin_of(setup, "teacher")
    if (yield from found_stage(setup, of)) is None:
        teacher = copy(student)
        job = make_job(setup, teacher, "teacher", Objective(losses=("ce",)), None)
        state = yield from train.train(job)
        steps = {name: value for name, value in flatten(config).items() if name in stages.STAGES["teacher-steps"]}
        about = {"seconds": state.seconds, "history": state.history, "steps": steps, "of": of}

        def write(staging: Path) -> None:
            stock.save_dense(teacher, staging)
            files.write_json(staging / stages.STAGE, about)

        stages.publish(setup.run, of["stage"], write)
        stages.remove(setup.run.place("teacher-steps"))
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
    if config.masks_only and any(shapes[0].get(name) != shapes[1][name] for name in added_names(student)):
        raise ConfigError(
            f"the head of the teacher {config.teacher} does not fit {config.model}, and {config.method} takes it over",
            "use a teacher that was fine-tuned from the model, or leave --teacher out",
        )
    if config.from_teacher and shapes[0] != shapes[1]:
        raise ConfigError(
            "the teacher has another architecture than the model, so training cannot start from its weights",
            "use --init pretrained",
        )


def teacher_bank(setup: Setup, teacher: Model) -> Generator[Event, None, tuple[Any, Any, dict[str, Measured]]]:
    """Vectors and logits of the teacher on the training set (None when no loss needs them), and its metrics."""
    names, vectors, logits = setup.config.loss_names, None, None
    if setup.config.epochs and ("fic" in names or "kd" in names):  # what heals asks the teacher itself
        vectors, logits = yield from make_bank(setup, "finetuned", teacher)
    return vectors, logits, (yield from _scores(setup, teacher))


def _scores(setup: Setup, teacher: Model) -> Generator[Event, None, dict[str, Measured]]:
    """The teacher measured on each split; its answers are kept, so that the student is compared on each example."""
    of = origin_of(setup, "dense")
    folder, splits = setup.run.place(of["stage"]), list(setup.evals)
    if (yield from found_stage(setup, of)) is None:
        found = yield from answers(setup, teacher, setup.meter.stoppable("evaluate dense"))
        for name, one in scores(setup, teacher, found).items():  # said now, as pruning may take hours
            for note in chance.doubts({"the dense model": one}, name, setup.data.primary, weak_teacher(setup)):
                yield setup.meter.of("evaluate dense")(done=1, total=1, note=note)

        def write(staging: Path) -> None:
            files.write_tensors(staging / ANSWERS, {str(i): found[name] for i, name in enumerate(splits)})
            files.write_json(staging / stages.STAGE, {"of": of})

        stages.publish(setup.run, of["stage"], write)
    stored = read_tensors(folder / ANSWERS)
    return scores(setup, teacher, {name: stored[str(i)] for i, name in enumerate(splits)})
