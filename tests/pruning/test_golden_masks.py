"""The masks that each method chose when its code was last trusted, at three steps of a fixed run.

Weights, scores and gradients are drawn by numpy and changed elementwise, never multiplied as matrices, so that no
library's rounding decides what is kept; methods that run the network are not among them. A change of these
digests is a change of a method: say so in the changelog.
"""

import hashlib
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from capcli.config.names import METHODS
from capcli.config.prune import PruneConfig
from capcli.config.task import TaskConfig
from capcli.models import families
from capcli.models.model import Model
from capcli.pruning.criteria.seat import Step
from capcli.pruning.masked import Matrices, gates_of
from capcli.pruning.pruner import make_pruner

STEPS = 40
SHOWN = (10, 20, 39)  # in the ramp, later in it, and at the final sparsity
FIRST_ORDER = ("cap-f", "first-order")
CASES = [
    *((method, {}) for method, row in METHODS.items() if not (row.staged or row.one_shot)),
    *((method, {"structure": "dimensions"}) for method in FIRST_ORDER),
    ("movement", {"scope": "global"}),
    ("movement", {"score_init": "zero"}),
    ("magnitude", {"scope": "global"}),
]
GOLDEN: dict[str, list[tuple[int, str]]] = {
    "cap-soft": [(9635, "1e4d61f40bd76eed"), (4309, "15c4c8c66e778180"), (3277, "3ca16e5c817ada42")],
    "cap-m": [(9635, "16db988fb6d945bd"), (4309, "89d3162e2e6cf0b8"), (3277, "fae051a13c99e049")],
    "cap-f": [(13120, "be41a7be6e2fa63a"), (8192, "ce73b0fb0dd87e99"), (3264, "b71fcaa05caae593")],
    "soft-movement": [(9635, "1e4d61f40bd76eed"), (4309, "15c4c8c66e778180"), (3277, "3ca16e5c817ada42")],
    "movement": [(9635, "16db988fb6d945bd"), (4309, "89d3162e2e6cf0b8"), (3277, "fae051a13c99e049")],
    "first-order": [(13120, "be41a7be6e2fa63a"), (8192, "ce73b0fb0dd87e99"), (3264, "b71fcaa05caae593")],
    "smp": [(9635, "fd24115dfbda56c2"), (4309, "0d7f0005bc263326"), (3277, "47f433c8000c65f1")],
    "magnitude": [(9635, "90b354dee9d49b37"), (4309, "c7fe411788963cf6"), (3277, "602f7e4a5a11baeb")],
    "cap-pins": [(9635, "b538eed7b1aad5be"), (4309, "ed4568165743c68a"), (3277, "919ceb004c342fb5")],
    "pins": [(9635, "b538eed7b1aad5be"), (4309, "ed4568165743c68a"), (3277, "919ceb004c342fb5")],
    "platon": [(9635, "7dc62e4ffa9f9893"), (4309, "26a5f2129d595b34"), (3277, "af2935f358b20573")],
    "cap-f dimensions": [(9664, "dbf76595f449fdce"), (4416, "810c98680e319e83"), (3264, "dd490407d9011a61")],
    "first-order dimensions": [(9664, "dbf76595f449fdce"), (4416, "810c98680e319e83"), (3264, "dd490407d9011a61")],
    "movement global": [(9635, "1e4d61f40bd76eed"), (4309, "15c4c8c66e778180"), (3277, "3ca16e5c817ada42")],
    "movement zero": [(9635, "25f3e4399c786601"), (4309, "d6aa3c164027997d"), (3277, "f9e4732dc347c115")],
    "magnitude global": [(9635, "03d0321102e52b63"), (4309, "5e542a2ecf0a3c43"), (3277, "5de93a98ca19df9e")],
}


def name_of(method: str, options: dict[str, str]) -> str:
    return " ".join([method, *options.values()])


def network() -> Model:
    """A BERT of two layers whose parameters are drawn one after another by numpy."""
    net = BertForSequenceClassification(
        BertConfig(
            vocab_size=20,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            max_position_embeddings=16,
        )
    )
    rng = np.random.default_rng(11)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.from_numpy(rng.standard_normal(parameter.shape)))
    return Model(
        net=net, tokenizer=None, family=families.FAMILIES["bert"], labels=("a", "b"), kind="classification", source=""
    )


def at_gates(matrices: Matrices) -> None:
    """Leave at the gates what a backward pass would that left these gradients at the weights."""
    for i, linear in enumerate(matrices.linears):
        weight, gates = matrices.original(i), gates_of(linear)
        if gates is not None:
            gates.grad = (weight.detach() * weight.grad).sum(dim=0)


def masks_of(method: str, options: dict[str, Any]) -> list[tuple[int, str]]:
    """Weights kept and a digest of the mask, at each of the steps shown."""
    config = PruneConfig(
        source=TaskConfig(task="mr"), method=method, sparsity=0.8, dense_share=0.1, final_share=0.2, **options
    )
    model = network()
    pruner = make_pruner(model, config, STEPS)
    rng = np.random.default_rng(12)
    found = []
    for step in range(STEPS):
        pruner.update(step)
        if step in SHOWN:
            bits = np.packbits(pruner.matrices.mask.numpy() != 0).tobytes()
            found.append((pruner.matrices.kept(), hashlib.sha256(bits).hexdigest()[:16]))
        for parameter in model.net.parameters():
            parameter.grad = torch.from_numpy(rng.standard_normal(parameter.shape)).to(parameter.dtype)
        at_gates(pruner.matrices)
        pruner.observe(Step(number=step, lr=0.05))
        with torch.no_grad():
            for parameter in model.net.parameters():
                parameter -= 0.05 * parameter.grad
    return found


def test_soft_movement_without_its_regulariser_is_movement_over_all_matrices() -> None:
    """As the help of `--reg-weight` says."""
    assert GOLDEN["soft-movement"] == GOLDEN["movement global"] != GOLDEN["movement"]


@pytest.mark.parametrize(("method", "options"), CASES, ids=[name_of(*case) for case in CASES])
def test_masks_are_those_that_were_recorded(method: str, options: dict[str, str]) -> None:
    assert masks_of(method, options) == GOLDEN[name_of(method, options)]
