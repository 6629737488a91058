"""Forward passes: logits and sentence vectors, of a batch or of a whole split.

Letters: B batch, S tokens, H hidden size, C labels, N examples.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import parametrize

from capcli.data.batches import Batch, Examples, collate, evaluation_batches
from capcli.events import Event
from capcli.models import families
from capcli.models.devices import Compute
from capcli.models.model import Model, accepted_inputs


def forward(model: Model, inputs: Mapping[str, Tensor], pooling: str = "head") -> tuple[Tensor, Tensor]:
    """Logits and the sentence vector [B, H] (section 2), not normalised.

    Logits are [B, C]; [B, S, C] for token classification; [B, S, 2], begin and end, for spans.
    pooling: `head` is the vector that enters the classifier; for heads that answer per token it is that of `cls`, for
    unknown families, which may be causal, that of `mean`. `cls` is the last state of the first token (of the last one
    in a causal model), `mean` the mean of the last states over real tokens.
    """
    logits, vector, _ = forward_states(model, inputs, pooling, keep=False)
    return logits, vector


def forward_states(
    model: Model, inputs: Mapping[str, Tensor], pooling: str = "head", *, keep: bool = True
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """As `forward`, and if `keep` the hidden states, each [B, S, H]: of the embeddings and after each layer."""
    net, family, mask = model.net, model.family, inputs["attention_mask"]
    inputs = {name: value for name, value in inputs.items() if name in accepted_inputs(net)}
    if family is None or model.per_token:
        out = net(**inputs, output_hidden_states=True)
        states = _states(out)[-1]
        logits = out.logits if "logits" in out else torch.stack([out.start_logits, out.end_logits], dim=-1)
        head = None if family is not None else families.mean(states, mask)
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


def encode(
    model: Model, batches: Iterable[Batch], n_examples: int, n_outputs: int, on: Compute, pooling: str = "head"
) -> Generator[int, None, tuple[Tensor, Tensor]]:
    """Run every batch in eval mode without gradients; yields how many examples are done.

    Returns logits [n_outputs, C] in 32 bits and L2-normalised sentence vectors [N, H] in 16 bits, both on the device;
    in the order of the example ids, the logits of a head that answers per token in the order of all tokens. With
    `n_outputs` 0, no logits are kept.
    """
    was_training = model.net.training
    model.net.eval()
    done, logits, vectors = 0, torch.empty(0), torch.empty(0)
    with parametrize.cached():
        for batch in batches:
            with torch.inference_mode(), on.autocast():
                some_logits, some_vectors = forward(model, batch.inputs, pooling)
                some_vectors = torch.nn.functional.normalize(some_vectors.float(), dim=-1)
            if not done:
                logits = torch.empty(n_outputs, some_logits.shape[-1], device=on.device)
                vectors = torch.empty(n_examples, some_vectors.shape[1], device=on.device, dtype=torch.float16)
            if n_outputs:
                batch.put(some_logits.float(), logits)
            vectors[batch.ids] = some_vectors.half()
            done += len(batch.ids)
            yield done
    model.net.train(was_training)
    return logits, vectors


def encoded(
    model: Model,
    examples: Examples,
    on: Compute,
    event: Callable[..., Event],
    pooling: str = "head",
    *,
    logits: bool = True,
) -> Generator[Event, None, tuple[Tensor, Tensor]]:
    """Logits, if wanted, and sentence vectors of tokenised examples; yields `event(done, total)`. See `encode`."""
    rows = evaluation_batches(examples, on.token_budget)
    batches = (collate(examples, some, on.device) for some in rows)
    coding = encode(model, batches, len(examples), examples.n_outputs if logits else 0, on, pooling)
    with contextlib.closing(coding):  # or the cache of masked weights, which is global, would outlive a stopped run
        while True:
            try:
                yield event(done=next(coding), total=len(examples))
            except StopIteration as stop:
                found: tuple[Tensor, Tensor] = stop.value
                return found
