"""What a head learns from, as pure functions: the labels (CE) and the teacher's logits (KD).

Letters: B batch, C labels, S tokens. Section numbers are those of the design's ALGORITHM.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from capcli.data.kinds import KINDS, NO_LABEL


def task_loss(logits: Tensor, labels: Tensor, kind: str, mask: Tensor | None = None) -> Tensor:
    """CE of section 1, the mean over examples, in 32-bit floats.

    classification: cross-entropy of logits [B, C] and labels [B]. multilabel: binary cross-entropy of logits [B, C] and
    labels [B, C], the mean over both. regression: squared error of logits [B, 1] and labels [B]. tokens: cross-entropy
    of logits [B, S, C] and labels [B, S], the mean over tokens that have a label. spans: the mean of the cross-entropy
    over the real tokens (mask [B, S]) of begin and end, logits [B, S, 2] and labels [B, 2]. embedding: half the squared
    distance of the vectors [B, H] of length 1 to labels [B, H], which is 1 - cos where these have length 1 too.
    """
    return TASK_LOSSES[kind](logits.float(), labels, mask)


def distillation(
    logits: Tensor,
    teacher: Tensor,
    kind: str,
    temperature: float,
    mask: Tensor | None = None,
    *,
    scaled: bool = True,
) -> Tensor:
    """KD of section 1: T²·KL(teacher ‖ student), the mean over examples; squared error for regression, and for
    embedding the cosine distance 1 - cos of both vectors.

    scaled: with the factor T², which keeps the size of the gradient when T changes. Shapes are those of `task_loss`.
    multilabel: the KL of each label's yes and no. tokens: over the tokens of mask [B, S]. spans: the KL of begin and of
    end over the real tokens of mask [B, S].
    """
    scale = temperature**2 if scaled and not (KINDS[kind].numbers or KINDS[kind].vectors) else 1.0
    return scale * DISTILLATIONS[kind](logits.float(), teacher.float(), temperature, mask)


# The task ------------------------------------------------------------------------------------------------------------


def _of_classes(logits: Tensor, labels: Tensor, mask: Tensor | None) -> Tensor:
    return F.cross_entropy(logits, labels)


def _of_numbers(logits: Tensor, labels: Tensor, mask: Tensor | None) -> Tensor:
    return F.mse_loss(logits.squeeze(-1), labels.float())


def _of_label_sets(logits: Tensor, labels: Tensor, mask: Tensor | None) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, labels.float())


def _of_words(logits: Tensor, labels: Tensor, mask: Tensor | None) -> Tensor:
    total = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=NO_LABEL, reduction="sum")
    return total / (labels != NO_LABEL).sum().clamp(min=1)


def _of_places(logits: Tensor, labels: Tensor, mask: Tensor | None) -> Tensor:
    return F.cross_entropy(_over_tokens(logits, mask).flatten(0, 1), labels.flatten())


def _of_vectors(logits: Tensor, labels: Tensor, mask: Tensor | None) -> Tensor:
    return (F.normalize(logits, dim=-1) - labels).square().sum(dim=-1).mean() / 2


TASK_LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor | None], Tensor]] = {
    "classification": _of_classes,
    "regression": _of_numbers,
    "ranking": _of_numbers,
    "multilabel": _of_label_sets,
    "tokens": _of_words,
    "spans": _of_places,
    "embedding": _of_vectors,
}


# Distillation --------------------------------------------------------------------------------------------------------


def _from_classes(logits: Tensor, teacher: Tensor, temperature: float, mask: Tensor | None) -> Tensor:
    return _divergence(logits, teacher, temperature).mean()


def _from_numbers(logits: Tensor, teacher: Tensor, temperature: float, mask: Tensor | None) -> Tensor:
    return F.mse_loss(logits, teacher)


def _from_label_sets(logits: Tensor, teacher: Tensor, temperature: float, mask: Tensor | None) -> Tensor:
    return _divergence(_yes_or_no(logits), _yes_or_no(teacher), temperature).mean()


def _from_words(logits: Tensor, teacher: Tensor, temperature: float, mask: Tensor | None) -> Tensor:
    assert mask is not None, "which tokens count"
    return (_divergence(logits, teacher, temperature) * mask).sum() / mask.sum().clamp(min=1)


def _from_places(logits: Tensor, teacher: Tensor, temperature: float, mask: Tensor | None) -> Tensor:
    return _divergence(_over_tokens(logits, mask), _over_tokens(teacher, mask), temperature).mean()


def _from_vectors(logits: Tensor, teacher: Tensor, temperature: float, mask: Tensor | None) -> Tensor:
    return (1 - F.cosine_similarity(logits, teacher, dim=-1)).mean()


DISTILLATIONS: dict[str, Callable[[Tensor, Tensor, float, Tensor | None], Tensor]] = {
    "classification": _from_classes,
    "regression": _from_numbers,
    "ranking": _from_numbers,
    "multilabel": _from_label_sets,
    "tokens": _from_words,
    "spans": _from_places,
    "embedding": _from_vectors,
}


def _divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """KL(teacher ‖ student) over the last dimension of logits."""
    student_logp = F.log_softmax(student / temperature, dim=-1)
    teacher_logp = F.log_softmax(teacher / temperature, dim=-1)
    return F.kl_div(student_logp, teacher_logp, log_target=True, reduction="none").sum(dim=-1)


def _yes_or_no(logits: Tensor) -> Tensor:
    """The logit of each label as the logits of yes and no."""
    return torch.stack([logits, torch.zeros_like(logits)], dim=-1)


def _over_tokens(logits: Tensor, mask: Tensor | None) -> Tensor:
    """Logits [B, S, 2] as [B, 2, S], where padding is out of the question."""
    assert mask is not None, "which tokens are real"
    return logits.transpose(1, 2).masked_fill(mask[:, None] == 0, -1e4)
