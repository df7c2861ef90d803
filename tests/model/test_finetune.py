"""Heads against scikit-learn on the same vectors."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score
from sklearn.model_selection import StratifiedKFold, cross_val_predict

from model import finetune
from model.finetune import accuracy, confusion_of, fit, macro_f1
from model.vectors import normalize


def blobs(counts, seed=0, width=16):
    random = np.random.default_rng(seed)
    centres = random.normal(size=(len(counts), width))
    codes = random.permutation(np.repeat(np.arange(len(counts)), counts))
    vectors = normalize((centres[codes] + 1.5 * random.normal(size=(len(codes), width))).astype(np.float32))
    return vectors, codes


def reference(balanced):
    return LogisticRegression(C=finetune._INVERSE_PENALTY, class_weight="balanced" if balanced else None, max_iter=1000)


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("counts", [(30, 20), (5, 60), (20, 30, 10), (40, 4, 9, 7, 15)])
def test_probabilities_and_judgement_are_those_of_scikit_learn(counts, balanced):
    vectors, codes = blobs(counts)
    fitted = fit(vectors, codes, balanced)
    unseen, _ = blobs(counts, seed=1)
    wanted = reference(balanced).fit(vectors.astype(np.float64), codes)
    np.testing.assert_allclose(fitted.head.probabilities(unseen), wanted.predict_proba(unseen), rtol=0, atol=1e-5)
    assert fitted.folds == min(5, *counts)
    folds = StratifiedKFold(fitted.folds, shuffle=True, random_state=0)
    held_out = cross_val_predict(reference(balanced), vectors.astype(np.float64), codes, cv=folds)
    np.testing.assert_array_equal(fitted.confusion, confusion_matrix(codes, held_out))
    assert accuracy(fitted.confusion) == pytest.approx(accuracy_score(codes, held_out))
    assert macro_f1(fitted.confusion) == pytest.approx(f1_score(codes, held_out, average="macro"))


def test_balanced_favours_the_rare_label():
    vectors, codes = blobs((100, 6))
    plain, balanced = (fit(vectors, codes, weigh).head.probabilities(vectors)[:, 1].mean() for weigh in (False, True))
    assert balanced > 2 * plain


def test_the_same_examples_give_the_same_bytes():
    one, other = (fit(*blobs((20, 30, 10))).head for _ in range(2))
    assert one.weights.tobytes() == other.weights.tobytes()
    assert one.bias.tobytes() == other.bias.tobytes()


def test_a_label_with_one_example_is_fitted_but_not_judged():
    fitted = fit(*blobs((10, 1)))
    assert (fitted.folds, fitted.confusion) == (0, None)
    assert fitted.head.weights.shape == (2, 16)


def test_a_label_that_is_never_predicted_has_an_f1_of_zero():
    table = confusion_of(np.array([0, 0, 1, 1]), np.array([0, 0, 0, 0]))
    np.testing.assert_array_equal(table, [[2, 0], [2, 0]])
    assert accuracy(table) == 0.5
    assert macro_f1(table) == pytest.approx((4 / 6 + 0) / 2)
