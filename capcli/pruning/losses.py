"""The contrastive terms, the distillation of hidden states and the score regulariser, as pure functions.

Letters: B batch, S tokens, K bank vectors per example, X examples drawn from the bank, H hidden size. Section
numbers are those of the design's ALGORITHM; the paper is arXiv 2112.07198.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def contrastive_terms(
    z: Tensor,
    ids: Tensor,
    labels: Tensor | None,
    own: Tensor,
    extra: Tensor,
    extra_ids: Tensor,
    extra_labels: Tensor | None,
    *,
    tau: float,
    normalization: str = "mean",
) -> tuple[Tensor, Tensor]:
    """Unsupervised and supervised contrastive term of one module (section 2; equations 1 to 4 of the paper).

    The candidates of anchor i are the other vectors of the batch, detached; the bank vectors of the whole batch; and
    the bank vectors drawn at random. `logp(c|i) = z_i·c/tau - logsumexp over the candidates`. Positives of U are the
    candidates that are the same example (by id), positives of P those with the same label.

    Args:
        z: [B, H] live, L2-normalised vectors; the only argument that receives a gradient.
        ids: [B] example ids of the batch.
        labels: [B] class of each example, or None (regression, spans): then P is zero.
        own: [B, K, H] bank vectors of the batch.
        extra: [X, K, H] drawn bank vectors; X may be 0.
        extra_ids: [X]; extra_labels: [X] or None.
        tau: temperature, > 0.
        normalization: `mean` averages over positives, then over anchors that have one. `reference` divides the sum
            over anchors of those averages by the number of positives of all anchors, as the reference code does.

    Returns:
        (U, P), two scalars; computed in 32-bit floats at least. A term without any positive is zero.
    """
    assert normalization in ("mean", "reference"), normalization
    batch, n_bank = z.shape[0], own.shape[1]
    kind = torch.promote_types(z.dtype, torch.float32)
    z = z.to(kind)
    candidates = torch.cat([z, own.flatten(0, 1).to(kind), extra.flatten(0, 1).to(kind)]).detach()
    candidate_ids = torch.cat([ids, ids.repeat_interleave(n_bank), extra_ids.repeat_interleave(n_bank)])
    itself = torch.zeros(batch, len(candidates), dtype=torch.bool, device=z.device)
    itself[:, :batch].fill_diagonal_(True)
    similarity = (z @ candidates.T / tau).masked_fill(itself, -torch.inf)  # [B, candidates]
    logp = similarity - similarity.logsumexp(dim=1, keepdim=True)
    same_example = (ids[:, None] == candidate_ids) & ~itself
    unsupervised = _over_positives(logp, same_example, normalization)
    if labels is None or extra_labels is None:
        return unsupervised, z.new_zeros(())
    candidate_labels = torch.cat([labels, labels.repeat_interleave(n_bank), extra_labels.repeat_interleave(n_bank)])
    same_label = (labels[:, None] == candidate_labels) & ~itself
    return unsupervised, _over_positives(logp, same_label, normalization)


def _over_positives(logp: Tensor, positive: Tensor, normalization: str) -> Tensor:
    """Minus the normalised sum of `logp` [B, candidates] over `positive` [B, candidates]; zero without positives."""
    count = positive.sum(dim=1)  # [B]
    anchor_mean = torch.where(positive, logp, 0.0).sum(dim=1) / count.clamp(min=1)
    anchors = (count > 0).sum() if normalization == "mean" else count.sum()
    return -anchor_mean.sum() / anchors.clamp(min=1)


def hidden_distillation(
    states: Sequence[Tensor], teacher: Sequence[Tensor], projections: Sequence[Tensor], mask: Tensor
) -> Tensor:
    """HID: squared difference of hidden states and the teacher's, as in GRAIN (arXiv 2212.07634), in 32-bit floats.

    The sum over layers, as there, of the mean over real tokens and dimensions of (states @ projection - teacher)².

    Args:
        states, teacher: per layer [B, S, H], the teacher's without gradient.
        projections: per layer [H, H], trained, identity at the start: the student need not use the same directions.
        mask: [B, S], 0 for padding.
    """
    terms = []
    n_tokens = mask.sum().clamp(min=1)
    for ours, theirs, projection in zip(states, teacher, projections, strict=True):
        squares = (ours.float() @ projection - theirs.float()).square().mean(dim=-1)  # [B, S]
        terms.append((squares * mask).sum() / n_tokens)
    return torch.stack(terms).sum()


def score_regulariser(scores: list[Tensor]) -> Tensor:
    """REG of section 4: the mean over matrices of the mean σ(S)."""
    return torch.stack([torch.sigmoid(score).mean() for score in scores]).mean()
