"""How good predictions are: point values and 95 % intervals. numpy and scipy only; nervaluate finds entities.

Letters: N examples, M examples that differ, C classes, B resamples of a block. But for correlations, which see the
pairs themselves, a metric is a function of counts [3, C] that are sums over examples: how often a class is hit, is
true, is predicted. A resample of N examples is therefore one multinomial draw of how often each of the M different
examples occurs.
"""

from __future__ import annotations

import math
import re
import statistics
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from capcli.data.entities import entities
from capcli.data.kinds import KINDS
from capcli.measuring import embeddings, ranking
from capcli.measuring.answers import answered
from capcli.measuring.correlations import (
    grouped_pairs,
    of_grouped,
    of_pairs,
    pairs,
    pearson,
    spearman,
    weighted_pearson,
    weighted_spearman,
)
from capcli.measuring.resampling import (
    Array,
    Counts,
    GroupedPairs,
    Pairs,
    Seed,
    bootstrap,
    draws,
    from_events,
    from_table,
)

# Values --------------------------------------------------------------------------------------------------------------


def hit_share(counts: Array) -> Array:
    """Share of what is true in [..., 3, C] that is hit: accuracy, recall, and the mean where each example is one."""
    hit, true, _ = _sums(counts)
    return _divide(hit, true, empty=np.nan)


def recall(counts: Array) -> Array:
    """Share of the true that is hit, over all classes of [..., 3, C]; 0 when nothing is true."""
    hit, true, _ = _sums(counts)
    return _divide(hit, true, empty=0)


def precision(counts: Array) -> Array:
    """Share of the predicted that is hit, over all classes of [..., 3, C]; 0 when nothing is predicted."""
    hit, _, predicted = _sums(counts)
    return _divide(hit, predicted, empty=0)


def micro_f1(counts: Array) -> Array:
    """F1 over all classes of [..., 3, C] together; 0 when nothing is true or predicted, as scikit-learn has it."""
    hit, true, predicted = _sums(counts)
    return _divide(2 * hit, true + predicted, empty=0)


def f1(counts: Array) -> Array:
    """F1 of class 1, the positive class of the GLUE pair tasks; 0 without any positive, as scikit-learn has it."""
    return _f1_by_class(counts)[..., 1]


def macro_f1(counts: Array) -> Array:
    """Mean F1 over the classes that occur in truth or prediction; NaN when none does."""
    _, true, predicted = _parts(counts)
    occurs = (true + predicted) > 0
    return _divide((_f1_by_class(counts) * occurs).sum(axis=-1), occurs.sum(axis=-1), empty=np.nan)


def matthews(counts: Array) -> Array:
    """Matthews correlation, multi-class form; 0 when truth or prediction is constant."""
    hit, true, predicted = _parts(counts)
    n = true.sum(axis=-1)
    covariance = hit.sum(axis=-1) * n - (true * predicted).sum(axis=-1)
    spread = (n**2 - (true**2).sum(axis=-1)) * (n**2 - (predicted**2).sum(axis=-1))
    return _divide(covariance, np.sqrt(np.maximum(spread, 0)), empty=0)


def _parts(counts: Array) -> tuple[Array, Array, Array]:
    return counts[..., 0, :], counts[..., 1, :], counts[..., 2, :]


def _sums(counts: Array) -> tuple[Array, Array, Array]:
    """Hit, true and predicted [...] of all classes together."""
    hit, true, predicted = _parts(counts)
    return hit.sum(axis=-1), true.sum(axis=-1), predicted.sum(axis=-1)


def _f1_by_class(counts: Array) -> Array:
    hit, true, predicted = _parts(counts)
    return _divide(2 * hit, true + predicted, empty=0)


def _divide(part: Array, whole: Array, *, empty: float) -> Array:
    """part / whole, and `empty` where the whole is zero."""
    return np.asarray(np.divide(part, whole, out=np.full(np.shape(part), empty, dtype=np.float64), where=whole > 0))


def count_gains(truth: Sequence[Array], outputs: Sequence[Array]) -> Counts:
    """Of relevances and scores by query: hit by `ranking.ndcg`."""
    return from_table([(ranking.ndcg(*query), 1, 1) for query in zip(truth, outputs, strict=True)])


def count_first_ranks(truth: Sequence[Array], outputs: Sequence[Array]) -> Counts:
    """Of relevances and scores by query: hit by `ranking.reciprocal_rank`."""
    return from_table([(ranking.reciprocal_rank(*query), 1, 1) for query in zip(truth, outputs, strict=True)])


def count_classes(truth: NDArray[np.generic], outputs: Array) -> Counts:
    """Of class indices [N] and logits [N, C], the highest of which is the prediction."""
    n_classes = outputs.shape[1]
    pairs = truth.astype(np.int64) * n_classes + outputs.argmax(axis=1)
    cells, index, times = np.unique(pairs, return_inverse=True, return_counts=True)
    true, predicted = np.divmod(cells, n_classes)
    rows = np.arange(len(cells))
    right = true == predicted
    return from_events((rows[right], true[right]), (rows, true), (rows, predicted), n_classes, index, times)


def count_labels(truth: NDArray[np.generic], outputs: Array) -> Counts:
    """Of labels [N, C] (0 or 1) and logits [N, C]; a label with a logit above 0 is predicted."""
    true, predicted = truth.astype(bool), outputs > 0
    bits = np.packbits(np.hstack([true, predicted]), axis=1)
    _, first, index, times = np.unique(bits, axis=0, return_index=True, return_inverse=True, return_counts=True)
    true, predicted = true[first], predicted[first]
    events = np.nonzero(true & predicted), np.nonzero(true), np.nonzero(predicted)
    return from_events(*events, truth.shape[1], index.ravel(), times)


def count_label_sets(truth: NDArray[np.generic], outputs: Array) -> Counts:
    """As `count_labels`, but an example is hit when all of its labels are right."""
    right = (truth.astype(bool) == (outputs > 0)).all(axis=1)
    return from_table([(hit, 1, 1) for hit in right])


def count_words(truth: Sequence[Sequence[str]], outputs: Sequence[Sequence[str]]) -> Counts:
    """Of the tags of words, by sentence."""
    names = sorted({tag for tags in (*truth, *outputs) for tag in tags}) or [""]
    codes = {name: i for i, name in enumerate(names)}
    rows = np.repeat(np.arange(len(truth)), [len(tags) for tags in truth])
    true, predicted = (
        np.asarray([codes[tag] for tags in sentences for tag in tags], dtype=np.int64) for sentences in (truth, outputs)
    )
    right = true == predicted
    index, once = np.arange(len(truth)), np.ones(len(truth), dtype=np.int64)
    return from_events((rows[right], true[right]), (rows, true), (rows, predicted), len(names), index, once)


def count_entities(truth: Sequence[Sequence[str]], outputs: Sequence[Sequence[str]]) -> Counts:
    """Of the entities that the tags of words mark, by sentence; hit when the type and both ends are right."""
    found = ((entities(true), entities(predicted)) for true, predicted in zip(truth, outputs, strict=True))
    return from_table([(len(true & predicted), len(true), len(predicted)) for true, predicted in found])


def count_matches(truth: Sequence[Sequence[str]], outputs: Sequence[str]) -> Counts:
    """Of answers to questions, hit when one gold answer is the predicted one after `normalised`."""
    return _answers(_matches, truth, outputs)


def count_overlaps(truth: Sequence[Sequence[str]], outputs: Sequence[str]) -> Counts:
    """Of answers to questions, hit by the F1 of their words after `normalised`, that of the best gold answer."""
    return _answers(_overlap, truth, outputs)


def _answers(score: Callable[[str, str], float], truth: Sequence[Sequence[str]], outputs: Sequence[str]) -> Counts:
    """SQuAD's rule: gold answers of which nothing is left do not count; without any, no answer is the right one."""
    golds = ([text for text in map(normalised, answers) if text] or [""] for answers in truth)
    given = map(normalised, outputs)
    return from_table([(max(score(a, b) for a in gold), 1, 1) for gold, b in zip(golds, given, strict=True)])


def normalised(text: str) -> str:
    """An answer as SQuAD compares it: lower case, no ASCII punctuation, no English article, single spaces."""
    text = text.lower().translate(_NO_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", text).split())


_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def _matches(gold: str, predicted: str) -> float:
    return float(gold == predicted)


def _overlap(gold: str, predicted: str) -> float:
    """F1 of the words of two normalised answers, repeated words as often as in both; 1 when both are empty."""
    a, b = gold.split(), predicted.split()
    if not a or not b:
        return float(a == b)
    return 2 * (Counter(a) & Counter(b)).total() / (len(a) + len(b))


# Metrics by kind of task ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A function of counts or pairs, how to make them, and whether it is a share of independent examples (Wilson's
    interval)."""

    count: Count
    value: Callable[[Array], Array]
    wilson: bool = False


Count = Callable[[Any, Any], Counts | Pairs | GroupedPairs]
METRICS: dict[str, dict[str, Metric]] = {
    "classification": {
        "accuracy": Metric(count=count_classes, value=hit_share, wilson=True),
        "f1": Metric(count=count_classes, value=f1),
        "macro_f1": Metric(count=count_classes, value=macro_f1),
        "matthews": Metric(count=count_classes, value=matthews),
        "agreement": Metric(count=count_classes, value=hit_share, wilson=True),
    },
    "regression": {
        "pearson": Metric(count=pairs, value=of_pairs(pearson)),
        "spearman": Metric(count=pairs, value=of_pairs(spearman)),
        "agreement_pearson": Metric(count=pairs, value=of_pairs(pearson)),
        "agreement_spearman": Metric(count=pairs, value=of_pairs(spearman)),
    },
    "ranking": {
        "ndcg": Metric(count=count_gains, value=hit_share),
        "mrr": Metric(count=count_first_ranks, value=hit_share),
        "pearson": Metric(count=grouped_pairs, value=of_grouped(weighted_pearson)),
        "spearman": Metric(count=grouped_pairs, value=of_grouped(weighted_spearman)),
    },
    "multilabel": {
        "micro_f1": Metric(count=count_labels, value=micro_f1),
        "macro_f1": Metric(count=count_labels, value=macro_f1),
        "subset_accuracy": Metric(count=count_label_sets, value=hit_share, wilson=True),
        "agreement": Metric(count=count_label_sets, value=hit_share, wilson=True),
        "agreement_f1": Metric(count=count_labels, value=micro_f1),
    },
    "tokens": {
        "f1": Metric(count=count_entities, value=micro_f1),
        "precision": Metric(count=count_entities, value=precision),
        "recall": Metric(count=count_entities, value=recall),
        "accuracy": Metric(count=count_words, value=hit_share),
        "macro_f1": Metric(count=count_words, value=macro_f1),
        "agreement": Metric(count=count_words, value=hit_share),
        "agreement_f1": Metric(count=count_entities, value=micro_f1),
    },
    "spans": {
        "f1": Metric(count=count_overlaps, value=hit_share),
        "exact_match": Metric(count=count_matches, value=hit_share, wilson=True),
        "agreement": Metric(count=count_matches, value=hit_share, wilson=True),
        "agreement_f1": Metric(count=count_overlaps, value=hit_share),
    },
    "embedding": {
        "spearman": Metric(count=embeddings.scored_pairs, value=of_pairs(spearman)),
        "pearson": Metric(count=embeddings.scored_pairs, value=of_pairs(pearson)),
        "cosine": Metric(count=embeddings.count_cosines, value=hit_share),
        "recall_at_10": Metric(count=embeddings.count_neighbours, value=hit_share),
    },
}
CALIBRATION, AGREEMENT = "ece", "agreement"  # of `calibration_error` and `agreement`
CORRELATIONS = ("matthews", "pearson", "spearman", "agreement_pearson", "agreement_spearman")
COSINE = "cosine"
SHARES = {name for table in METRICS.values() for name in table}.difference(CORRELATIONS, {COSINE}) | {CALIBRATION}


def bounds(name: str) -> tuple[float, float]:
    """The lowest and the highest value that a metric can have; infinite for names that are not of this module."""
    if name in (*CORRELATIONS, COSINE):
        return -1.0, 1.0
    return (0.0, 1.0) if name in SHARES else (-math.inf, math.inf)


def measure(kind: str, names: Sequence[str], truth: Any, outputs: Any) -> dict[str, float]:
    """Point values of the metrics `names`; NaN where a value cannot be computed, as of no examples.

    By kind of task, `truth` and `outputs` are: classification: class indices [N], logits [N, C]; regression: numbers
    [N], [N, 1]; ranking: lists of the relevances and of the scores of N queries, each of the same length in both;
    multilabel: 0 or 1 [N, C], logits [N, C]; tokens: lists of the tag names of N sentences, each of the same length in
    both; spans: N tuples of gold answers (empty: unanswerable), N predicted answers ("": no answer); embedding:
    `embeddings.Wanted`, vectors [N, K, H] of the K texts of each example.
    """
    if len(truth) == 0:
        return dict.fromkeys(names, float("nan"))
    totals = {count: counts.total() for count, counts in _counted(kind, names, truth, outputs).items()}
    chosen = {name: METRICS[kind][name] for name in names}
    return {name: float(metric.value(totals[metric.count])) for name, metric in chosen.items()}


def intervals(
    kind: str, names: Sequence[str], truth: Any, outputs: Any, seed: int, level: float = 0.95
) -> dict[str, list[float]]:
    """Intervals [low, high] of `measure`'s values at a confidence level.

    Wilson's for shares of independent examples; for the others the percentiles of a bootstrap over examples (sentences
    of tokens, questions of spans), a pure function of the seed.
    """
    if len(truth) == 0:
        return {name: [float("nan")] * 2 for name in names}
    found: dict[str, list[float]] = {}
    for count, counts in _counted(kind, names, truth, outputs).items():
        same = {name: METRICS[kind][name] for name in names if METRICS[kind][name].count is count}
        values = {name: metric.value for name, metric in same.items() if not metric.wilson}
        found |= {name: _wilson_of(counts, level) for name, metric in same.items() if metric.wilson}
        found |= bootstrap(values, counts.resamples(seed), level) if values else {}
    return {name: found[name] for name in names}


def resampled(kind: str, names: Sequence[str], truth: Any, outputs: Sequence[Any], seed: Seed) -> dict[str, Array]:
    """Values [S, B] of each metric of S outputs on the same resamples of the examples, B of them.

    What differs between two rows is therefore the difference of the outputs, not of the examples. `truth` and each of
    `outputs` are as in `measure`; a pure function of the seed.
    """
    n, blocks = len(truth), []
    counted = [_counted(kind, names, truth, one) for one in outputs]
    width = max([n, *(counts.width for table in counted for counts in table.values())])
    for times in draws(np.ones(n, dtype=np.int64), width, seed):
        totals = [{count: counts.of_examples(times) for count, counts in table.items()} for table in counted]
        chosen = {name: METRICS[kind][name] for name in names}
        blocks.append({name: np.stack([m.value(table[m.count]) for table in totals]) for name, m in chosen.items()})
    return {name: np.concatenate([block[name] for block in blocks], axis=1) for name in names}


def _counted(kind: str, names: Sequence[str], truth: Any, outputs: Any) -> dict[Count, Counts | Pairs | GroupedPairs]:
    """Each way to count that the metrics need, once."""
    return {count: count(truth, outputs) for count in {METRICS[kind][name].count for name in names}}


def _wilson_of(counts: Counts | Pairs | GroupedPairs, level: float) -> list[float]:
    hit, true, _ = _sums(counts.total())
    return wilson(float(hit), int(true), level)


def wilson(hits: float, n: int, level: float = 0.95) -> list[float]:
    """Wilson's interval of a share."""
    z = normal_quantile((1 + level) / 2)
    share, spread = hits / n, z**2 / n
    centre = (share + spread / 2) / (1 + spread)
    half = z * np.sqrt(share * (1 - share) / n + spread / (4 * n)) / (1 + spread)
    return [float(max(0.0, min(share, centre - half))), float(min(1.0, max(share, centre + half)))]


def normal_quantile(share: float) -> float:
    """Below which this share of a standard normal distribution lies."""
    return statistics.NormalDist().inv_cdf(share)


# Probabilities -------------------------------------------------------------------------------------------------------


def calibration_error(truth: NDArray[np.generic], logits: Array, n_bins: int = 15) -> float:
    """Expected calibration error of class indices [N] and logits [N, C] (Guo et al. 2017, equation 3).

    Mean over `n_bins` bins of equal width in the highest probability, weighted by their examples, of the distance
    between the share that is right and the mean probability. NaN of no examples or of logits that are not finite.
    """
    from scipy.special import softmax

    if len(truth) == 0 or not np.isfinite(logits).all():
        return float("nan")
    chosen = softmax(logits, axis=1)
    confidence, right = chosen.max(axis=1), chosen.argmax(axis=1) == truth
    place = np.minimum((confidence * n_bins).astype(np.int64), n_bins - 1)
    gaps = np.bincount(place, weights=right - confidence, minlength=n_bins)
    return float(np.abs(gaps).sum() / len(truth))


def agreement(kind: str, ours: Any, theirs: Any) -> float:
    """Share of the examples that two outputs, as `measure` takes them, answer alike; NaN for regression, vectors, or no
    examples.

    Of tokens it is the share of the words, of multilabel tasks that of whole label sets, of spans that of answers that
    are the same after `normalised`.
    """
    if AGREEMENT not in KINDS[kind].agreements:
        return float("nan")
    return measure(kind, (AGREEMENT,), answered(kind, theirs), ours)[AGREEMENT]
