"""BM25, by the library bm25s (extra: retrieval): how well each of many texts answers a query, by the words they share."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Sequence

import numpy as np

from jaxtune.types import UserError


def is_installed() -> bool:
    """Whether bm25s is there."""
    return importlib.util.find_spec("bm25s") is not None


def scorer(texts: Sequence[str]) -> Callable[[str], np.ndarray]:
    """Returns `score(query) -> (W,)`, float32, of each text (Robertson & Zaragoza 2009, doi:10.1561/1500000019).

    Lucene's form with k1 = 1.5 and b = 0.75; words are lower-cased, without English stop words, not stemmed.

    Raises:
      UserError: bm25s is not installed.
    """
    if not is_installed():
        raise UserError("BM25 needs bm25s: pip install 'jaxtune[retrieval]'")
    import bm25s

    logging.getLogger("bm25s").setLevel(logging.WARNING)  # it tells of its every step

    def words(texts: Sequence[str]) -> list[list[str]]:
        return list(bm25s.tokenize(list(texts), stopwords="en", return_ids=False, show_progress=False))

    index, nothing = bm25s.BM25(method="lucene", k1=1.5, b=0.75), np.zeros(len(texts), np.float32)
    tokens = words(texts)
    if not any(tokens):
        return lambda query: nothing  # a corpus of stop words alone
    index.index(tokens, show_progress=False)

    def score(query: str) -> np.ndarray:
        known = [word for word in words([query])[0] if word in index.vocab_dict]
        return np.asarray(index.get_scores(known), np.float32) if known else nothing

    return score
