"""Classifiers that cost nothing, which a model must beat: the commonest label, and logistic regression on hashed
n-grams of characters (which need no words, so any script). Shape suffixes: N texts, L labels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

MOST_TEXTS = 20_000
"""Texts that the regression learns from, at most: a minute of it."""
NGRAMS, FEATURES = (1, 4), 1 << 18
Given = NDArray[np.bool_]


def commonest(train: Given, count: int) -> Given:
    """Give each of ``count`` texts the labels that most texts have."""
    [(labels, _)] = Counter(map(tuple, train.tolist())).most_common(1)
    return np.tile(np.asarray(labels), (count, 1))


def regression(texts: Sequence[str], labels_NL: Given, held_out: Sequence[str], *, balanced: bool) -> Given:
    """Give texts labels by logistic regression (L2, scikit-learn's) on the hashed, TF-IDF weighed n-grams."""
    from sklearn.feature_extraction.text import HashingVectorizer, TfidfTransformer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    features = make_pipeline(
        HashingVectorizer(analyzer="char", ngram_range=NGRAMS, n_features=FEATURES, alternate_sign=False),
        TfidfTransformer(sublinear_tf=True),
    )
    x, held_out_x = features.fit_transform(texts[:MOST_TEXTS]), features.transform(held_out)
    weight = "balanced" if balanced else None
    labels_NL = labels_NL[:MOST_TEXTS]
    if (labels_NL.sum(axis=1) == 1).all():
        model = LogisticRegression(C=10.0, max_iter=1000, class_weight=weight)
        classes_N = labels_NL.argmax(axis=1)
        if (classes_N == classes_N[0]).all():
            return commonest(labels_NL, len(held_out))
        best_N = model.fit(x, classes_N).predict(held_out_x)
        return np.asarray(np.arange(labels_NL.shape[1]) == best_N[:, None])
    columns = []
    for has_N in labels_NL.T:
        if has_N.all() or not has_N.any():
            columns.append(np.full(len(held_out), bool(has_N[0])))
            continue
        columns.append(LogisticRegression(C=10.0, max_iter=1000).fit(x, has_N).predict(held_out_x))
    return np.column_stack(columns)
