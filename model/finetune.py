"""Heads fitted on finished vectors: multinomial logistic regression, judged on examples that it has not seen."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from model.vectors import FloatArray, softmax

Codes = NDArray[np.int64]
"""The label of each example, as its place in the list of labels."""

# Vectors of length 1 want a weaker penalty than scikit-learn's default of 1. Held-out log loss of
# docs/examples/tickets.csv: 0.34 at 10, 0.65 at 1; with nine of its 60 labels shuffled 0.59 and 0.77.
_INVERSE_PENALTY = 10.0
_MAX_ITERATIONS = 1000
_FOLDS = 5


@dataclass(frozen=True, eq=False)
class Head:
    """Weights [C, out] and bias [C], float32."""

    weights: FloatArray
    bias: FloatArray

    def probabilities(self, vectors: FloatArray) -> FloatArray:
        """One row per vector, a number per label: [N, out] -> [N, C]."""
        return softmax(vectors @ self.weights.T + self.bias)


@dataclass(frozen=True, eq=False)
class Fitted:
    """A head on all examples, and how heads did on examples that were held out.

    confusion [C, C]: held-out examples of label i (row) that were taken for label j (column); None where a label has
    one example, so that none can be held out.
    """

    head: Head
    folds: int
    confusion: Codes | None


def fit(vectors: FloatArray, codes: Codes, balanced: bool = False) -> Fitted:
    """Fit a head on vectors [N, out] and cross-validate it in stratified folds. Every label must occur in `codes`."""
    folds = min(_FOLDS, int(np.bincount(codes).min()))
    confusion = None
    if folds > 1:
        confusion = confusion_of(codes, _predict_held_out(vectors, codes, balanced, folds))
    return Fitted(fit_head(vectors, codes, balanced), folds if folds > 1 else 0, confusion)


def fit_head(vectors: FloatArray, codes: Codes, balanced: bool) -> Head:
    """Logistic regression with an L2 penalty, by L-BFGS in float64: the same examples give the same head.

    `balanced` weighs each example by N / (C · examples of its label).
    """
    from sklearn.linear_model import LogisticRegression  # slow to import, and needed by a fit only

    weighting = "balanced" if balanced else None
    model = LogisticRegression(C=_INVERSE_PENALTY, class_weight=weighting, max_iter=_MAX_ITERATIONS)
    model.fit(vectors.astype(np.float64), codes)
    weights, bias = model.coef_, model.intercept_
    if len(weights) == 1:  # two labels: scikit-learn keeps the second's logit, with the first's at zero
        weights, bias = np.vstack([np.zeros_like(weights), weights]), np.append(0.0, bias)
    return Head(weights.astype(np.float32), bias.astype(np.float32))


def _predict_held_out(vectors: FloatArray, codes: Codes, balanced: bool, folds: int) -> Codes:
    """The label of each example, by a head that was fitted on the other folds: [N]."""
    from sklearn.model_selection import StratifiedKFold

    predicted = np.empty_like(codes)
    for seen, held_out in StratifiedKFold(folds, shuffle=True, random_state=0).split(vectors, codes):
        head = fit_head(vectors[seen], codes[seen], balanced)
        predicted[held_out] = head.probabilities(vectors[held_out]).argmax(axis=1)
    return predicted


def confusion_of(codes: Codes, predicted: Codes) -> Codes:
    """How often label i (row) was taken for label j (column): [C, C]."""
    table = np.zeros((codes.max() + 1,) * 2, dtype=np.int64)
    np.add.at(table, (codes, predicted), 1)
    return table


def accuracy(confusion: Codes) -> float:
    return float(confusion.trace() / confusion.sum())


def macro_f1(confusion: Codes) -> float:
    """The mean over labels of 2 · hits / (examples + predictions)."""
    return float(np.mean(2 * confusion.diagonal() / (confusion.sum(axis=0) + confusion.sum(axis=1))))
