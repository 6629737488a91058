"""What is measured before a selection: labelled examples of the training part, read by the network as it stands.

Letters: B batch, n prunable weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils import parametrize

from capcli import parallel
from capcli.config.prune import PruneConfig
from capcli.data import batches
from capcli.data.batches import Batch, Examples
from capcli.data.kinds import KINDS, NO_LABEL
from capcli.errors import DataError
from capcli.models import predict, task_losses
from capcli.models.model import Model
from capcli.pruning.masked import Matrices

LEAST_EXAMPLES = FISHER_BATCH = 8  # of one gradient
REFIT_BATCH = 32


Gradient = Callable[[NDArray[np.int64], int, Sequence[Tensor]], list[Tensor]]


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """The network, and the examples that it is calibrated with.

    count: how many are drawn each time. block: weights that are judged together, see `information.information`.
    regrow: whether removed weights, which are trained straight through, are judged and keep their values as well.
    target: the network whose outputs the weights that stay are fitted to, see `refit.refit`; None for the student
    itself as it was before the selection.
    gradient: (rows, step, leaves) -> the gradient at the leaves of what counts beside the task's loss, on batches of
    `batch_size`.
    asked: the network whose answers take the place of labels, where the examples have none.
    check: called between batches; what it raises ends the work.
    """

    model: Model
    examples: Examples
    device: torch.device
    seed: int
    count: int
    block: int = 1
    regrow: bool = False
    target: Model | None = None
    gradient: Gradient | None = None
    batch_size: int = REFIT_BATCH
    asked: Model | None = None
    check: Callable[[], None] = lambda: None

    def rows(self, step: int) -> NDArray[np.int64]:
        """The examples that step `step` draws by the seed, the shortest first."""
        wanted = min(len(self.examples), self.count)
        rows = np.random.default_rng([self.seed, step]).choice(len(self.examples), wanted, replace=False)
        return rows[np.argsort(self.examples.lengths[rows], kind="stable")]

    def pieces(self, step: int, size: int) -> Iterator[NDArray[np.int64]]:
        """The `rows` of a step, `size` at a time."""
        for rows in batches.pieces(self.rows(step), size):
            self.check()
            yield rows

    def drawn(self, step: int, size: int) -> Iterator[Batch]:
        """Batches of `size` of the `rows` of a step."""
        for rows in self.pieces(step, size):
            yield batches.collate(self.examples, rows, self.device)

    def gradients(self, matrices: Matrices, step: int, of: Sequence[int]) -> Iterator[list[Tensor]]:
        """What reaches the weights of the matrices `of`, [out, in] each: dL/dW'∘M, or dL/dW' with `regrow`; see
        `of_task`."""
        masks = matrices.matrix_masks()
        for found in self.of_task([matrices.original(i) for i in of], step):
            yield found if self.regrow else [g * masks[i] for i, g in zip(of, found, strict=True)]

    def of_task(self, leaves: Sequence[Tensor], step: int) -> Iterator[list[Tensor]]:
        """dL/dleaf of the `leaves` for one small batch after another; L is the task's loss, without dropout, or for
        vectors that of `sampled`. Each rank has those of every R-th batch."""
        with predict.without_dropout(self.model):
            for index, rows in enumerate(self.pieces(step, FISHER_BATCH)):
                if index % parallel.size() != parallel.rank():
                    continue
                batch, seed = batches.collate(self.examples, rows, self.device), [self.seed, step, index]
                labels = batch.labels if self.asked is None else answers(self.asked, batch, seed)
                with torch.enable_grad(), parametrize.cached():
                    logits, _ = predict.forward(self.model, batch.inputs)
                    if KINDS[self.model.kind].vectors:
                        labels = sampled(logits, seed)
                    loss = task_losses.task_loss(logits, labels, self.model.kind, batch.inputs["attention_mask"])
                    found = torch.autograd.grad(loss, leaves, materialize_grads=True)
                yield list(found)

    def summed(self, leaves: Sequence[Tensor], of: Callable[[Sequence[Tensor]], Tensor], step: int) -> Tensor:
        """The sum over batches of `of` the `gradient` at the `leaves`, without dropout. Common to all ranks."""
        assert self.gradient is not None
        total: Tensor | None = None
        with predict.without_dropout(self.model):
            for rows in self.pieces(step, self.batch_size):
                with torch.enable_grad():
                    found = of(self.gradient(rows, step, leaves))
                total = found if total is None else total + found
        assert total is not None, "a training set has examples"
        return total


@torch.no_grad()
def sampled(vectors: Tensor, seed: Sequence[int]) -> Tensor:
    """What vectors [B, H] would have to be, [B, H]: drawn from a normal distribution around their directions.

    A model that learns its own vectors begins at a loss of 0, where no weight has a gradient. The mean of g·gᵀ over
    such labels is its Fisher information all the same, and the Gauss-Newton matrix of 1 - cos, because this is half
    the squared distance of two directions (Martens, arXiv 1412.1193, sections 6 and 9).
    """
    noise = np.random.default_rng(list(seed)).standard_normal(tuple(vectors.shape))
    return F.normalize(vectors.float(), dim=-1) + torch.from_numpy(noise).to(vectors.device, torch.float32)


@torch.no_grad()
def answers(model: Model, batch: Batch, seed: Sequence[int]) -> Tensor:
    """What a teacher answers, in the shapes that `task_losses.task_loss` has for labels.

    The most likely class of an example [B] or of each word [B, S], where these have labels; begin and end of an answer
    [B, 2]; labels that are more likely than not [B, C]. Numbers [B] are drawn from a normal distribution around its
    own, because a student that begins as its teacher has no gradient at these; see `sampled`.
    """
    with predict.without_dropout(model):
        found, kind = predict.forward(model, batch.inputs)[0].float(), KINDS[model.kind]
    if kind.numbers:
        noise = np.random.default_rng(list(seed)).standard_normal(len(found))
        return found[:, 0] + torch.from_numpy(noise).to(found.device, torch.float32)
    if kind.several:
        return (found > 0).float()
    if kind.windows:
        padding = batch.inputs["attention_mask"][:, :, None] == 0
        return found.masked_fill(padding, -torch.inf).argmax(dim=1)
    found = found.argmax(dim=-1)
    return torch.where(batch.labels == NO_LABEL, NO_LABEL, found) if kind.words else found


def check_enough(n_examples: int) -> None:
    """Raise `DataError` when there are too few examples for a single gradient."""
    if n_examples < LEAST_EXAMPLES:
        raise DataError(
            f"calibration needs at least {LEAST_EXAMPLES} labelled training examples, there are {n_examples}",
            "give more data, or use a method that measures nothing on examples, such as --method magnitude",
        )


def few_tokens(config: PruneConfig, examples: Examples, model: Model) -> list[str]:
    """A note when a calibration reads fewer tokens than the widest matrix has inputs: it cannot tell them all apart."""
    widest = max(max(linear.weight.shape) for linear in model.prunable().values())
    read = round(min(config.calibration, len(examples)) * float(examples.lengths.mean()))
    if read >= widest:
        return []
    return [
        f"calibration reads about {read:,} tokens, and layers have up to {widest:,} inputs: "
        "the result rests on little; give more texts, or raise --calibration"
    ]
