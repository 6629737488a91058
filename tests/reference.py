"""The equations of the design's ALGORITHM as slow loops over Python floats, written from the text and not from capcli.

Vectors are lists of floats. Nothing here is fast, and nothing here imports capcli.
"""

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Vector = Sequence[float]
Candidate = tuple[Vector, int, int | None]  # vector, example id, label


def dot(a: Vector, b: Vector) -> float:
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def candidates_of(
    anchor: int,
    z: Sequence[Vector],
    ids: Sequence[int],
    labels: Sequence[int] | None,
    own: Sequence[Sequence[Vector]],
    extra: Sequence[Sequence[Vector]],
    extra_ids: Sequence[int],
    extra_labels: Sequence[int] | None,
) -> list[Candidate]:
    """C(i) of section 2: the other vectors of the batch, the bank vectors of the batch, the drawn bank vectors."""
    found: list[Candidate] = []
    for b in range(len(z)):
        if b != anchor:
            found.append((z[b], ids[b], labels[b] if labels else None))
    for b in range(len(z)):
        for vector in own[b]:
            found.append((vector, ids[b], labels[b] if labels else None))
    for x in range(len(extra)):
        for vector in extra[x]:
            found.append((vector, extra_ids[x], extra_labels[x] if extra_labels else None))
    return found


def log_probabilities(anchor: Vector, candidates: Sequence[Candidate], tau: float) -> list[float]:
    """logp(c|i) of section 2 for every candidate."""
    similarity = [dot(anchor, vector) / tau for vector, _, _ in candidates]
    top = max(similarity, default=0.0)
    norm = top + math.log(math.fsum(math.exp(s - top) for s in similarity)) if similarity else 0.0
    return [s - norm for s in similarity]


def contrastive(
    z: Sequence[Vector],
    ids: Sequence[int],
    labels: Sequence[int] | None,
    own: Sequence[Sequence[Vector]],
    extra: Sequence[Sequence[Vector]],
    extra_ids: Sequence[int],
    extra_labels: Sequence[int] | None,
    tau: float,
    normalization: str,
) -> tuple[float, float]:
    """(U, P) of section 2, under either normalisation."""
    results = []
    for supervised in (False, True):
        row_means: list[float] = []  # of the anchors that have a positive
        n_positives = 0
        for i in range(len(z)):
            found = candidates_of(i, z, ids, labels, own, extra, extra_ids, extra_labels)
            logp = log_probabilities(z[i], found, tau)
            positive = []
            for value, (_, example, label) in zip(logp, found, strict=True):
                if (supervised and labels is not None and label == labels[i]) or (not supervised and example == ids[i]):
                    positive.append(value)
            if positive:
                row_means.append(math.fsum(positive) / len(positive))
                n_positives += len(positive)
        if not row_means:
            results.append(0.0)
        elif normalization == "mean":
            results.append(-math.fsum(row_means) / len(row_means))
        else:  # each row's sum over |P(i)|, and then the total over the sum of all |P(i)|
            results.append(-math.fsum(row_means) / n_positives)
    return results[0], results[1]


def softmax(logits: Vector, temperature: float = 1.0) -> list[float]:
    top = max(logits)
    powers = [math.exp((x - top) / temperature) for x in logits]
    return [p / math.fsum(powers) for p in powers]


def distillation(student: Sequence[Vector], teacher: Sequence[Vector], temperature: float) -> float:
    """KD of section 1: T² · KL(teacher ‖ student), batch mean."""
    total = 0.0
    for ours, theirs in zip(student, teacher, strict=True):
        p, q = softmax(theirs, temperature), softmax(ours, temperature)
        total += math.fsum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True))
    return temperature**2 * total / len(student)


def cross_entropy(logits: Sequence[Vector], labels: Sequence[int]) -> float:
    return -math.fsum(math.log(softmax(row)[label]) for row, label in zip(logits, labels, strict=True)) / len(labels)


def scheduled(step: int, total: int, final: float, dense_share: float, final_share: float) -> float:
    """Sparsity of section 4: kept fraction v_f + (v_0 − v_f)·(1 − progress)³, v_0 = 1, between the held parts."""
    final_from = min(total - 1, math.ceil(round((1 - final_share) * total, 6)))  # the last step is at the target
    dense_until = min(final_from, math.floor(round(dense_share * total, 6)))
    if step >= final_from:
        return final
    if step < dense_until:
        return 0.0
    progress = (step - dense_until) / (final_from - dense_until)
    kept_final = 1 - final
    return 1 - (kept_final + (1 - kept_final) * (1 - progress) ** 3)


def topk(scores: Sequence[float], keep: int) -> list[bool]:
    """The `keep` largest; among equal scores the lower index wins (section 3)."""
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    chosen = set(order[:keep])
    return [i in chosen for i in range(len(scores))]


def kept_count(sparsity: float, n: int) -> int:
    """round((1 − s)·n) with the half rounded up, in exact arithmetic on the float's own value."""
    return math.floor((1 - Fraction(sparsity)) * n + Fraction(1, 2))


class Gate(nn.Module):
    """Multiplies groups of a linear layer's input by gates, ones unless there are other values."""

    def __init__(self, linear: nn.Linear, group_size: int, values: Tensor | None = None) -> None:
        super().__init__()
        self.linear = linear
        self.group_size = group_size
        ones = torch.ones(linear.in_features // group_size, dtype=linear.weight.dtype)
        self.gate = nn.Parameter(ones if values is None else values.to(ones))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x * self.gate.repeat_interleave(self.group_size))


def gate_gradients(
    net: nn.Module,
    places: Sequence[tuple[str, int]],
    loss: Callable[[nn.Module], Tensor],
    values: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """abs(dL/dgate) per place (name of a linear, group size), measured by really inserting gates before it.

    values: of the gates of each place; 0 for a group that is removed.
    """
    gates = []
    for i, (name, size) in enumerate(places):
        parent: Any = net.get_submodule(name.rpartition(".")[0])
        gate = Gate(net.get_submodule(name), size, None if values is None else values[i])  # type: ignore[arg-type]
        setattr(parent, name.rpartition(".")[2], gate)
        gates.append(gate)
    loss(net).backward()
    return [gate.gate.grad.abs() for gate in gates]  # type: ignore[union-attr]


def select_units(
    importance: Sequence[float],
    alive: Sequence[bool],
    weights: Sequence[int],
    head: Sequence[int],
    value: Sequence[bool],
    keep: int,
) -> list[bool]:
    """GRAIN's selection, as docs/explanation has it: the best units by importance per weight, nearest to `keep`."""
    everyone = range(len(importance))

    def values_of(number: int, among: Sequence[bool]) -> int:
        return sum(1 for i in everyone if head[i] == number and value[i] and among[i])

    def score(i: int) -> float:
        bent = 1.0
        if value[i]:
            bent = math.tanh(values_of(head[i], alive) / values_of(head[i], [True] * len(alive)) / 0.3)
        return importance[i] * bent / weights[i]

    def nearest(order: Sequence[int]) -> list[bool]:
        chosen, held = [False] * len(importance), 0
        for i in order:
            if abs(held + weights[i] - keep) > abs(held - keep):
                break
            chosen[i], held = True, held + weights[i]
        return chosen

    order = sorted((i for i in everyone if alive[i]), key=lambda i: (-score(i), i))
    first = nearest(order)
    empty = {number for number in set(head) - {-1} if values_of(number, first) == 0}
    last = [i for i in order if head[i] in empty and value[i]] + [i for i in order if head[i] in empty and not value[i]]
    return nearest([i for i in order if head[i] not in empty] + last)


def hidden_distillation(
    states: Sequence[Any], teacher: Sequence[Any], projections: Sequence[Any], mask: Sequence[Sequence[int]]
) -> float:
    """Sum over layers of the mean over real tokens and dimensions of (h P - h_teacher)², nested lists [B][S][H]."""
    layers = []
    for ours, theirs, projection in zip(states, teacher, projections, strict=True):
        squares = []
        for b, row in enumerate(mask):
            for s, real in enumerate(row):
                for j in range(len(projection) if real else 0):
                    mapped = math.fsum(ours[b][s][i] * projection[i][j] for i in range(len(projection)))
                    squares.append((mapped - theirs[b][s][j]) ** 2)
        layers.append(math.fsum(squares) / len(squares))
    return math.fsum(layers)


def output_gate_gradients(net: nn.Module, places: Sequence[str], loss: Callable[[nn.Module], Tensor]) -> list[Tensor]:
    """abs(dL/dgate) per linear, of gates really put on each of its outputs."""
    gates = []
    for name in places:
        gate = OutputGate(net.get_submodule(name))  # type: ignore[arg-type]
        setattr(net.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], gate)
        gates.append(gate)
    loss(net).backward()
    return [gate.gate.grad.abs() for gate in gates]  # type: ignore[union-attr]


class OutputGate(nn.Module):
    """Multiplies the outputs of a linear layer by gates, which are ones."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear
        self.gate = nn.Parameter(torch.ones(linear.out_features, dtype=linear.weight.dtype))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.gate


def fisher(net: nn.Module, names: Sequence[str], batches: Sequence[tuple[dict[str, Tensor], Tensor]]) -> Tensor:
    """Mean over batches of the squared gradient of the cross-entropy, one batch and one matrix after another."""
    sums = [torch.zeros_like(net.get_submodule(name).weight) for name in names]  # type: ignore[arg-type]
    for inputs, labels in batches:
        net.zero_grad()
        logits = net(**inputs).logits
        (-logits.log_softmax(dim=1)[range(len(labels)), labels].sum() / len(labels)).backward()
        for total, name in zip(sums, names, strict=True):
            total += net.get_submodule(name).weight.grad ** 2  # type: ignore[operator, union-attr]
    return torch.cat([total.flatten() / len(batches) for total in sums])


def alone_in_block(gradients: Any, block: int, damping: float) -> list[float]:
    """1 / [F⁻¹]_ii of each weight, from the gradients [G, n] of its matrix, by inverting one block after another."""
    size = gradients.shape[1]
    ridge = damping * sum((gradients**2).mean(axis=0)) / (-(-size // block) * block)
    found: list[float] = []
    for begin in range(0, size, block):
        some = gradients[:, begin : begin + block]
        fisher = sum(np.outer(row, row) for row in some) / len(some) + ridge * np.eye(some.shape[1])
        found += [1 / value for value in np.linalg.inv(fisher).diagonal()]
    return found


def refitted_row(
    x: Sequence[Vector],
    y: Vector,
    weight: Vector,
    kept: Sequence[bool],
    damping: float,
    rounding: float,
    bias: bool,
) -> tuple[list[float], float]:
    """Weights of one output by ridge regression towards `weight` over the kept inputs, and its bias, by Gauss."""
    tokens, inputs = range(len(x)), range(len(weight))
    means = [math.fsum(x[t][i] for t in tokens) / len(x) if bias else 0.0 for i in inputs]
    mean = math.fsum(y) / len(y) if bias else 0.0
    centred = [[x[t][i] - means[i] for i in inputs] for t in tokens]
    ridge = damping * math.fsum(centred[t][i] ** 2 for t in tokens for i in inputs) / len(weight)
    ridge += rounding * math.fsum(x[t][i] ** 2 for t in tokens for i in inputs) / len(weight)
    columns = [i for i in inputs if kept[i]]
    rows = []
    for i in columns:
        gram = [math.fsum(centred[t][i] * centred[t][j] for t in tokens) + (ridge if i == j else 0) for j in columns]
        rows.append([*gram, math.fsum(centred[t][i] * (y[t] - mean) for t in tokens) + ridge * weight[i]])
    for a in range(len(rows)):  # to the identity
        rows[a] = [value / rows[a][a] for value in rows[a]]
        for b in range(len(rows)):
            if b != a:
                rows[b] = [u - rows[b][a] * v for u, v in zip(rows[b], rows[a], strict=True)]
    found = [0.0] * len(weight)
    for row, i in zip(rows, columns, strict=True):
        found[i] = row[-1]
    return found, mean - dot(found, means) if bias else 0.0


def second_moments(x: Sequence[Vector]) -> list[list[float]]:
    """C = XᵀX / T of inputs x [T][I]."""
    return [[sum(row[i] * row[j] for row in x) / len(x) for j in range(len(x[0]))] for i in range(len(x[0]))]


def wanda(weight: Sequence[Vector], x: Sequence[Vector]) -> list[list[float]]:
    """abs(w_ij) times the root mean square of input j."""
    reach = [math.sqrt(sum(row[j] ** 2 for row in x) / len(x)) for j in range(len(x[0]))]
    return [[abs(w) * reach[j] for j, w in enumerate(row)] for row in weight]


def multiflow(weight: Sequence[Vector], x: Sequence[Vector]) -> list[list[float]]:
    """What flows into output i, times abs(w_ij), times what flows out of input j."""
    flow = wanda(weight, x)
    out = [sum(row) / len(row) for row in flow]
    into = [sum(row[j] for row in flow) / len(flow) for j in range(len(flow[0]))]
    return [[out[i] * abs(w) * into[j] for j, w in enumerate(row)] for i, row in enumerate(weight)]


def sparsegpt(
    weight: Sequence[Vector], x: Sequence[Vector], counts: Sequence[int], width: int, damping: float
) -> tuple[Any, Any]:
    """Optimal brain surgeon on columns from left to right, the inverse of what is left taken anew for each of them.

    Of the blocks of `width` columns, `counts` weights stay each. Returns the mask and the weights."""
    second = np.array(second_moments(x))
    second += damping * second.diagonal().mean() * np.eye(len(second))
    w, kept = np.array(weight), np.zeros_like(weight)
    left = [np.linalg.inv(second[j:, j:]) for j in range(len(second))]
    for block, count in enumerate(counts):
        columns = range(block * width, min(len(second), (block + 1) * width))
        places = [(i, j) for i in range(len(w)) for j in columns]
        for i, j in sorted(places, key=lambda place: -(w[place] ** 2) / left[place[1]][0, 0])[:count]:
            kept[i, j] = 1
        for j in columns:
            for i in range(len(w)):
                if not kept[i, j]:
                    w[i, j + 1 :] -= w[i, j] / left[j][0, 0] * left[j][0, 1:]
    return kept.tolist(), w.tolist()


def sparse_dense_sparse(
    weight: Sequence[Vector],
    x: Sequence[Vector],
    y: Sequence[Vector],
    count: int,
    damping: float,
    rounding: float,
    shrunk: float,
) -> tuple[list[list[bool]], list[list[float]]]:
    """Cut by wanda and fit; let all come back, drawn to zero; what is to stay is then chosen by wanda again.

    Returns the mask, and the weights before the second cut."""

    def best(matrix: Sequence[Vector]) -> list[list[bool]]:
        scores = wanda(matrix, x)
        flat = topk([score for row in scores for score in row], count)
        return [flat[i * len(row) : (i + 1) * len(row)] for i, row in enumerate(scores)]

    first, least = best(weight), shrunk * sum(abs(w) for row in weight for w in row) / (len(weight) * len(weight[0]))
    dense = []
    for i, row in enumerate(weight):
        outputs = [one[i] for one in y]
        sparse, _ = refitted_row(x, outputs, row, first[i], damping, rounding, True)
        free, _ = refitted_row(x, outputs, sparse, [True] * len(row), damping, rounding, True)
        drawn = [math.copysign(max(0.0, abs(w) - least), w) for w in free]
        dense.append([w if kept else d for w, d, kept in zip(free, drawn, first[i], strict=True)])
    return best(dense), dense


def best_split(
    importance: Sequence[float],
    alive: Sequence[bool],
    costs: Sequence[int],
    groups: Sequence[Sequence[int]],
    budget: int,
) -> float:
    """The largest summed importance of living units whose costs are within the budget, by trying all subsets.

    groups: of each of them, at least one unit must be chosen.
    """
    best = -math.inf
    for code in range(2 ** len(importance)):
        chosen = [i for i in range(len(importance)) if code >> i & 1]
        fits = sum(costs[i] for i in chosen) <= budget and all(alive[i] for i in chosen)
        if fits and all(any(i in group for i in chosen) for group in groups):
            best = max(best, math.fsum(importance[i] for i in chosen))
    return best


def rearranged(vectors: Sequence[Vector], keep: int) -> set[int]:
    """Which units are removed after the greedy search of Kwon et al. (arXiv 2204.09656, section 4.2), as their public
    code has it: from the least important ones, each of the others joins the removed, and one of all these leaves."""
    by_norm = sorted(range(len(vectors)), key=lambda i: (dot(vectors[i], vectors[i]), i))
    removed = by_norm[: len(vectors) - keep]
    for unit in by_norm[len(vectors) - keep :] if removed else []:
        removed.append(unit)
        rests = [lost_together([vectors[i] for i in removed if i != one]) for one in removed]
        least = min(rests)
        removed.remove(min(one for one, rest in zip(removed, rests, strict=True) if rest <= least + 1e-12))
    return set(removed)


def lost_together(vectors: Sequence[Vector]) -> float:
    """|Σ v|² of some vectors."""
    return math.fsum(math.fsum(part) ** 2 for part in zip(*vectors, strict=True))


def turned_head(q: Any, k: Any, v: Any) -> tuple[Any, Any, Any]:
    """A, B and Uᵀ [D, D] of a head whose queries, keys and values are q, k and v [D, T], by the SVD of each."""
    (uq, sq, _), (uk, sk, _), (u, _, _) = (np.linalg.svd(y, full_matrices=False) for y in (q, k, v))
    p, sizes, r = np.linalg.svd(np.diag(sq) @ uq.T @ uk @ np.diag(sk))
    root = np.diag(np.sqrt(sizes))
    return root @ p.T @ np.diag(1 / sq) @ uq.T, root @ r @ np.diag(1 / sk) @ uk.T, u.T


# Factors in place of matrices ----------------------------------------------------------------------------------------


def slow_factors(weight: Tensor, second: Tensor, ridge: float, rank: int) -> tuple[Tensor, list[float]]:
    """The product of LPAF's factors of W [O, I] whitened by the inputs, and all squares of singular values: with
    C = second + ridge·1 and W·C^½ = U·S·Vᵀ, A = U_k·S_k^½ and B = S_k^½·V_kᵀ·C^-½, C^½ symmetric."""
    values, vectors = np.linalg.eigh(second.double().numpy() + ridge * np.eye(len(second)))
    root = vectors @ np.diag(np.sqrt(values)) @ vectors.T
    u, s, vt = np.linalg.svd(weight.double().numpy() @ root, full_matrices=False)
    product = np.zeros(weight.shape)
    for k in range(rank):
        a, b = u[:, k] * math.sqrt(s[k]), math.sqrt(s[k]) * vt[k] @ np.linalg.inv(root)
        product += np.outer(a, b)
    return torch.from_numpy(product), [float(value) ** 2 for value in s]


def slow_ranks(matrices: Sequence[Sequence[tuple[float, int]]], budget: int) -> list[int]:
    """How many steps (spared, weights) each matrix takes: one, then over and over the best by spared / weights that
    fits into what is left of the budget."""
    taken = [1 for _ in matrices]
    while True:
        left = budget - sum(found[i][1] for found, n in zip(matrices, taken, strict=True) for i in range(n))
        best = None
        for i, found in enumerate(matrices):
            if taken[i] == len(found) or found[taken[i]][1] > left or found[taken[i]][0] <= 0:
                continue
            gain = found[taken[i]][0] / found[taken[i]][1]
            if best is None or gain > best[0]:
                best = gain, i
        if best is None:
            return taken
        taken[best[1]] += 1


def kept_by_kind(worths: Sequence[float], sizes: Sequence[int], keep: int) -> list[int]:
    """SMP-S inside one kind: L·v·R_l / ΣR of a matrix, clipped, the excess in proportion to the others, one at a time.

    Then whole numbers, by the largest remainder.
    """
    share: list[float] = [0.0] * len(sizes)
    full: set[int] = set()
    while True:
        others = [i for i in range(len(sizes)) if i not in full]
        total = sum(worths[i] * sizes[i] for i in others)
        left = keep - sum(sizes[i] for i in full)
        for i in others:
            share[i] = left * worths[i] * sizes[i] / total
        over = {i for i in others if share[i] >= sizes[i]}
        if not over:
            break
        for i in over:
            share[i] = sizes[i]
        full |= over
        if len(full) == len(sizes):
            break
    found = [int(one) for one in share]
    for i in sorted(range(len(sizes)), key=lambda i: (found[i] - share[i], i))[: keep - sum(found)]:
        found[i] += 1
    return found


def mean_sigmoid(scores: Sequence[float], p: float) -> float:
    """R of a matrix: the mean of σ(S / p)."""
    return sum(1 / (1 + math.exp(-score / p)) for score in scores) / len(scores)
