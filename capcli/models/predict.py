"""Forward passes: logits and sentence vectors, of a batch or of a whole split; the one loop over a split.

Letters: B batch, S tokens, H hidden size, C labels, N examples, T tokens of all examples.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from torch.nn.utils import parametrize

from capcli import parallel
from capcli.data.batches import Batch, Examples, collate, evaluation_batches
from capcli.errors import out_of_memory
from capcli.models import families
from capcli.models.devices import Compute, Room
from capcli.models.model import Model, accepted_inputs


def forward(model: Model, inputs: Mapping[str, Tensor], pooling: str = "head") -> tuple[Tensor, Tensor]:
    """Logits and the sentence vector [B, H] (section 2), not normalised.

    Logits are [B, C]; [B, S, C] for token classification; [B, S, 2], begin and end, for spans. Where there is no head,
    they are the vector [B, H] that the model gives for the text, normalised where it does so.
    pooling: `head` is the vector that enters the classifier, or the one that is given without a head; for heads that
    answer per token it is that of `cls`, for unknown families, which may be causal, that of `mean`. `cls` is the last
    state of the first token (of the last one in a causal model), `mean` the mean of the last states over real tokens.
    """
    logits, vector, _ = forward_states(model, inputs, pooling, keep=False)
    return logits, vector


def forward_states(
    model: Model, inputs: Mapping[str, Tensor], pooling: str = "head", *, keep: bool = True
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """As `forward`, and if `keep` the hidden states, each [B, S, H]: of the embeddings and after each layer."""
    net, family, mask = model.net, model.family, inputs["attention_mask"]
    taken = accepted_inputs(net)
    inputs = {name: value for name, value in inputs.items() if name in taken}
    if model.embedding is not None:
        out = net(**inputs, output_hidden_states=keep)
        states = out.last_hidden_state
        head = logits = model.embedding(states, mask)
    elif family is None or model.per_token:
        out = net(**inputs, output_hidden_states=True)
        states = _states(out)[-1]
        logits = out.logits if "logits" in out else torch.stack([out.start_logits, out.end_logits], dim=-1)
        head = families.represented(states, mask, family.causal) if family is not None else families.mean(states, mask)
    else:
        out = net.base_model(**inputs, output_hidden_states=keep)
        states = out.last_hidden_state
        head = family.vector(net, out, families.represented(states, mask, family.causal), mask)
        logits = family.classify(net, head)
    if pooling == "head" and head is not None:
        vector = head
    elif pooling == "mean":
        vector = families.mean(states, mask)
    else:
        vector = families.represented(states, mask, family is not None and family.causal)
    return logits, vector, _states(out) if keep else ()


def _states(out: Any) -> tuple[Tensor, ...]:
    names = ("hidden_states", "decoder_hidden_states", "encoder_hidden_states")
    return tuple(next(out[name] for name in names if name in out))


# The loop ------------------------------------------------------------------------------------------------------------

Run = Callable[[Mapping[str, Tensor]], tuple[Tensor, Tensor | None]]
"""Anything that answers: inputs [B, S] -> logits, as those of `forward`, and vectors, or None where it has none."""
Progress = tuple[int, int]
"""How much is done, of how much."""


def running(model: Model, on: Compute, pooling: str = "head") -> Run:
    """The network as something that answers, on its device; see `forward`."""

    def run(inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        with torch.inference_mode(), on.autocast():
            return forward(model, {name: tensor.to(on.device) for name, tensor in inputs.items()}, pooling)

    return run


def asked(run: Run, inputs: Mapping[str, Tensor]) -> Callable[[], object]:
    """A call that returns when the answer to these inputs is there."""
    return lambda: run(inputs)[0].cpu()


def outputs(
    run: Run,
    examples: Examples,
    batches: Iterable[NDArray[np.int64]],
    device: torch.device,
    *,
    logits: bool = True,
    of_tokens: bool = False,
    room: Room | None = None,
) -> Generator[Progress, None, tuple[Tensor, Tensor]]:
    """Ask `run` about every batch, without gradients; yields how many examples are done, of how many. Several processes
    share the batches, and each has all answers in the end.

    batches: the rows of each. device: where the inputs are made. room: what is known of its memory.
    Returns logits [N, C] in 32 bits, [T, C] of a kind that answers per token (with `logits` False none, of length 0),
    and L2-normalised vectors [N, ..., H] in 16 bits, where `run` has any, both where `run` put them and in the order of
    the examples, or of all tokens. of_tokens: the vectors of `run` are [B, S, ..., H], one per token, and so are those
    that are returned, [T, ..., H].
    """
    every, room = list(batches), room or Room()
    at_once = parallel.size() if len(every) >= parallel.size() else 1
    told, vectors, begun, done = torch.empty(0), torch.empty(0), False, 0
    for begin in range(0, len(every), at_once):
        turn = every[begin : begin + at_once]
        own = turn[parallel.rank() :][:1] if at_once > 1 else turn
        for batch, some, found in (one for rows in own for one in _fitting(run, examples, rows, device, room)):
            if not begun:  # zeros, for what another rank adds
                told = some.new_zeros(examples.n_outputs if logits else 0, some.shape[-1], dtype=torch.float32)
                if found is not None:
                    shape = (examples.n_outputs, *found.shape[2:]) if of_tokens else (len(examples), *found.shape[1:])
                    vectors = torch.zeros(shape, device=found.device, dtype=torch.float16)
                begun = True
            if logits:
                batch.put(some.float(), told)
            if found is not None and of_tokens:
                batch.put(found, vectors)
            elif found is not None:
                vectors[batch.ids] = found
        done += sum(map(len, turn))
        yield done, len(examples)
    if at_once > 1:
        parallel.total([told, vectors])
        room.tokens = parallel.lowest(room.tokens)
    return told, vectors


def _fitting(
    run: Run, examples: Examples, rows: NDArray[np.int64], device: torch.device, room: Room
) -> Iterator[tuple[Batch, Tensor, Tensor | None]]:
    """What `run` answers to the examples `rows`, in halves of halves once memory runs out, which `room` remembers."""
    begin, width = 0, int(examples.lengths[rows].max())
    while begin < len(rows):
        some = rows[begin : begin + max(1, room.tokens // width if room.tokens else len(rows))]
        try:
            answer = _answer(run, collate(examples, some, device))
        except (RuntimeError, MemoryError) as error:
            if len(some) == 1 or not out_of_memory(error):
                raise
            room.tokens = width * (len(some) // 2)
            continue
        yield answer
        begin += len(some)


def _answer(run: Run, batch: Batch) -> tuple[Batch, Tensor, Tensor | None]:
    with torch.inference_mode():
        some, found = run(batch.inputs)
        return batch, some, None if found is None else functional.normalize(found.float(), dim=-1).half()


def encoded(
    model: Model, examples: Examples, on: Compute, pooling: str = "head", *, logits: bool = True
) -> Generator[Progress, None, tuple[Tensor, Tensor]]:
    """`outputs` of a model in eval mode, of tokenised examples in batches of like lengths."""
    rows = evaluation_batches(examples, on.token_budget)
    with evaluating(model):
        run = running(model, on, pooling)
        return (yield from outputs(run, examples, rows, on.device, logits=logits, room=on.room))


@contextlib.contextmanager
def without_dropout(model: Model) -> Iterator[None]:
    """The network of a training run in eval mode."""
    was_training = model.net.training
    model.net.eval()
    try:
        yield
    finally:
        model.net.train(was_training)


@contextlib.contextmanager
def evaluating(model: Model) -> Iterator[None]:
    """The same with its masked weights made once; a generator in it is to be closed."""
    with without_dropout(model), parametrize.cached():  # which is global
        yield
