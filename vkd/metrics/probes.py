"""How much frozen features know of labels that they were not trained on."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

VOTE_TEMPERATURE = 0.07  # Wu et al. 2018
BLOCK_ROWS = 1024  # test rows compared at once: bounds memory


class LinearProbe(NamedTuple):
    """Accuracy on `num_test` rows of a linear classifier that was fitted on `num_train`."""

    accuracy: float
    num_train: int
    num_test: int


class LinearClassifier(NamedTuple):
    """Logits are `weight @ ((x - mean) / scale) + bias`."""

    weight: Float[np.ndarray, "c d"]
    bias: Float[np.ndarray, " c"]
    mean: Float[np.ndarray, " d"]
    scale: Float[np.ndarray, " d"]


def knn_accuracy(
    train_x: Float[np.ndarray, "n d"],
    train_y: Int[np.ndarray, " n"],
    test_x: Float[np.ndarray, "m d"],
    test_y: Int[np.ndarray, " m"],
    k: int = 20,
) -> float:
    """Accuracy of a vote of the k nearest train rows by cosine, each of weight exp(cosine / 0.07) (Wu et al. 2018).

    k is capped at the number of train rows.
    """
    _require_rows(train_x, test_x)
    classes, train_class = np.unique(train_y, return_inverse=True)
    k = min(k, len(train_x))
    train_unit = _unit(train_x)
    num_right = 0
    for start in range(0, len(test_x), BLOCK_ROWS):
        similarity = _unit(test_x[start : start + BLOCK_ROWS]) @ train_unit.T
        nearest = np.argsort(-similarity, axis=1, kind="stable")[:, :k]
        rows = np.arange(len(similarity))[:, None]
        votes = np.zeros((len(similarity), len(classes)))
        np.add.at(votes, (rows, train_class[nearest]), np.exp(similarity[rows, nearest] / VOTE_TEMPERATURE))
        num_right += int((classes[votes.argmax(axis=1)] == test_y[start : start + BLOCK_ROWS]).sum())
    return num_right / len(test_x)


def linear_probe(
    train_x: Float[np.ndarray, "n d"],
    train_y: Int[np.ndarray, " n"],
    test_x: Float[np.ndarray, "m d"],
    test_y: Int[np.ndarray, " m"],
) -> LinearProbe:
    """Logistic regression on standardised features: the same inputs give the same result. Needs two classes to fit."""
    _require_rows(train_x, test_x)
    probe = _unfitted().fit(train_x, train_y)
    return LinearProbe(float(probe.score(test_x, test_y)), len(train_x), len(test_x))


def fit_linear(x: Float[np.ndarray, "n d"], y: Int[np.ndarray, " n"]) -> LinearClassifier:
    """The classifier that `linear_probe` fits; `y` must hold every class from 0 to c - 1, and c must be 2 or more."""
    scaler, regression = _unfitted().fit(x, y)
    weight, bias = regression.coef_, regression.intercept_
    if len(bias) == 1:  # of two classes scikit-learn keeps the difference only
        weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    return LinearClassifier(weight, bias, scaler.mean_, scaler.scale_)


def _unfitted() -> Pipeline:
    return make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))


def _unit(x: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
    norm = np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True)
    unit: Float[np.ndarray, "n d"] = x / np.maximum(norm, 1e-12)
    return unit


def _require_rows(train_x: Float[np.ndarray, "n d"], test_x: Float[np.ndarray, "m d"]) -> None:
    if not len(train_x) or not len(test_x):
        raise ValueError(f"a probe needs train and test rows; there are {len(train_x)} and {len(test_x)}")
