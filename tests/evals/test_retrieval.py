"""Search: ranks, recalls and MRR by hand, BM25 beside, and the comparison of the two."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from jaxtune.config import base
from jaxtune.data import bm25
from jaxtune.data.formats import Example
from jaxtune.evals import measure, retrieval, tasks
from jaxtune.types import UserError
from tests.data.conftest import make_tokenizer

CORPUS = retrieval.Corpus([f"p{n}" for n in range(12)], [f"text {n}" for n in range(12)], [[n] for n in range(12)], 0)


def queries(*relevant):
    return [
        {"row_id": f"q{n}", "answer": f"p{own[0]}", "query": "", "prompt_ids": [n], "relevant": list(own)}
        for n, own in enumerate(relevant)
    ]


def test_ranks_by_hand():
    scores_MW = np.tile(-np.arange(12.0), (5, 1))  # p0, p1, … in this order
    scores_MW[4, [2, 7]] = 0.5  # equal scores keep the order of the corpus
    rows = queries([0], [3], [10], [11, 1], [7])
    result = retrieval.search(rows, CORPUS, lambda block: scores_MW[[int(r["row_id"][1:]) for r in block]])
    assert [row["rank"] for row in result.rows] == [1, 4, 11, 2, 2]
    assert result.metrics["recall_at_1"].value == pytest.approx(1 / 5)
    assert result.metrics["recall_at_5"].value == pytest.approx(4 / 5)
    assert result.metrics["mrr_at_10"].value == pytest.approx((1 + 1 / 4 + 0 + 1 / 2 + 1 / 2) / 5)
    assert result.rows[4]["top_5"] == ["p2", "p7", "p0", "p1", "p3"]
    assert result.rows[1]["prediction"] == "p0"
    again = tasks.from_json(tasks.to_json(result, "x"), "x")
    assert again.metrics == result.metrics
    assert again.rows == result.rows


def test_many_queries_are_scored_in_blocks():
    rows = queries(*([n % 12] for n in range(150)))
    vectors_WD = np.eye(12, dtype=np.float32)
    result = retrieval.by_embeddings(rows, CORPUS, lambda texts: vectors_WD[[ids[0] % 12 for ids in texts]])
    assert result.metrics["recall_at_1"].value == 1
    assert [row["prediction"] for row in result.rows] == [row["answer"] for row in rows]


def test_two_searches_are_compared_query_by_query():
    rows = queries(*([n % 12] for n in range(40)))
    worse = retrieval.search(rows, CORPUS, lambda block: np.tile(-np.arange(12.0), (len(block), 1)))
    better = retrieval.search(rows, CORPUS, lambda block: np.eye(12)[[r["relevant"][0] for r in block]])
    report = tasks.compare(worse, better)
    assert {name: gap["test"] for name, gap in report.items()} == {
        "recall_at_1": "exact McNemar", "recall_at_5": "exact McNemar", "mrr_at_10": "paired permutation",
    }  # fmt: skip
    assert report["recall_at_1"]["value"] == pytest.approx(36 / 40)
    assert all(gap["p"] < 0.001 and gap["higher_is_better"] for gap in report.values())


def example(number, query, passage):
    return Example(f"rows:{number}", prompt=query, answer=passage, is_pair=True)


ROWS = [
    example(1, "is a penguin a bird", "Penguin -- penguins are birds that swim, and a penguin cannot fly"),
    example(2, "can penguins fly", "Penguin -- penguins are birds that swim, and a penguin cannot fly"),
    example(3, "who invented the telephone", "Bell -- the telephone was invented by Bell"),
    example(4, "is a penguin a bird", "Bird -- a bird has feathers"),
    example(5, "zzz", "Moss -- moss grows on stones"),
]


def test_a_corpus_holds_each_passage_once_and_a_query_all_that_answer_it():
    data = base().data
    data.max_passage_length = 12
    rows, corpus = retrieval.collect(ROWS[:2], ROWS, make_tokenizer(None), data)
    assert corpus.ids == ["rows:1", "rows:3", "rows:4", "rows:5"]
    assert [row["relevant"] for row in rows] == [[0, 2], [0]]
    assert [row["answer"] for row in rows] == ["rows:1", "rows:1"]
    assert max(map(len, corpus.tokens)) == 12
    assert corpus.num_cut == 4
    with pytest.raises(UserError, match="needs a query and a passage"):
        retrieval.collect(ROWS, [*ROWS, Example("rows:6", text="moss")], make_tokenizer(None), data)


def test_bm25_ranks_by_the_words_that_are_rare():
    rows, corpus = retrieval.collect(ROWS, ROWS, make_tokenizer(None), base().data)
    result = retrieval.by_bm25(rows, corpus)
    assert [row["rank"] for row in result.rows[:4]] == [1, 1, 1, 1]
    assert result.rows[2]["prediction"] == "rows:3"
    assert result.rows[4]["rank"] == 4, "a query of unknown words finds the corpus in its order"


def test_bm25_stands_beside_a_search_where_it_is_installed(monkeypatch: pytest.MonkeyPatch):
    config = base()
    rows, corpus = retrieval.collect(ROWS, ROWS, make_tokenizer(None), config.data)
    held = measure.HeldOut("retrieval", ROWS, (), rows, corpus=corpus)
    assert measure.beside(config, held)["BM25"].metrics == retrieval.by_bm25(rows, corpus).metrics
    assert measure.beside(config, held._replace(corpus=None)) == {}
    monkeypatch.setitem(sys.modules, "bm25s", None)
    assert not bm25.is_installed()
    assert measure.beside(config, held) == {}
