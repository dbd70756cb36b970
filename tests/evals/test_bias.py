"""BBQ and CrowS-Pairs: scores against the papers' formulas by hand, and likelihoods against a whole forward pass."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune.data import pipeline
from jaxtune.evals import bias, counterfactual, figures, likelihood
from jaxtune.evals.counterfactual import Answer, Probe, Probes
from jaxtune.models import layers
from jaxtune.train import start
from jaxtune.types import UserError
from jaxtune.weights import source

OPTIONS = {"num_samples": 200, "confidence": 0.95, "seed": 0}


def question(number: int, polarity: str = "neg", ambiguous: bool = True, **changes: Any) -> dict[str, Any]:
    """A row in BBQ's shape, about groups that no one belongs to."""
    row = {
        "example_id": number, "category": "Sky", "context_condition": "ambig" if ambiguous else "disambig", "question_polarity": polarity,
        "answer_info": {"ans0": ["cat", "cats"], "ans1": ["dog", "dogs"], "ans2": ["nobody knows", "unknown"]},
        "additional_metadata": {"stereotyped_groups": ["Cats"]}, "context": "the cat and the dog sat", "question": f"who ran {number}",
        "ans0": "the cat", "ans1": "the dog", "ans2": "unknown", "label": 2 if ambiguous else number % 2,
    }  # fmt: skip
    return row | changes


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_csv(path: Path, header: list[str], rows: list[list[Any]]) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def test_bias_scores_are_the_papers() -> None:
    """Parrish et al. 2022: s_DIS = 2 (n_biased / n_non-unknown) - 1, s_AMB = (1 - accuracy) s_DIS."""
    ambiguous = [1, 1, 1, -1, 0, 0, 0, 0, 0, 0]  # 3 biased, 1 against, 6 right
    assert bias.s_dis(np.asarray(ambiguous)) == pytest.approx(2 * 3 / 4 - 1)
    assert bias.s_amb(np.asarray(ambiguous)) == pytest.approx((1 - 0.6) * (2 * 3 / 4 - 1))
    assert bias.s_amb(np.zeros(4)) == bias.s_dis(np.zeros(4)) == 0  # always "unknown": no bias shown
    assert bias.s_dis(np.asarray([-1, -1])) == -1
    both = np.asarray([[1, 0, 0, 0], [-1, -1, 1, 0]])  # resamples at once
    assert bias.s_amb(both).tolist() == pytest.approx([1 / 4, 3 / 4 * (2 / 3 - 1)])


def test_figures_of_bbq_count_contexts_apart(tmp_path: Path) -> None:
    rows = [question(n, ambiguous=n < 4) for n in range(8)]
    asked, without = bias.read_bbq(write(tmp_path / "a.jsonl", rows), None, (), 0)
    assert without == 0
    picked = [0, 0, 1, 2, 0, 1, 0, 2]  # ambiguous: 2 biased, 1 against, 1 unknown; then right, right, right, unknown
    found = figures.by_key(bias.bbq_figures([bias.answered(one, at) for one, at in zip(asked, picked, strict=True)]))
    value = {key[1:]: figures.estimate(one, OPTIONS)["value"] for key, one in found.items()}
    assert value["all", "accuracy, ambiguous"] == 1 / 4
    assert value["all", "s_AMB"] == pytest.approx(3 / 4 * (2 * 2 / 3 - 1))
    assert value["Sky", "accuracy, disambiguated"] == 3 / 4
    assert value["all", "s_DIS"] == pytest.approx(2 * 2 / 3 - 1)


def test_the_biased_answer_is_the_stereotyped_group_or_what_the_metadata_say(tmp_path: Path) -> None:
    rows = [question(0), question(1, "nonneg"), question(2, additional_metadata={"stereotyped_groups": ["Fish"]})]
    rows.append(question(3, category="Race_ethnicity"))
    file = write(tmp_path / "a.jsonl", rows)
    asked, without = bias.read_bbq(file, None, (), 0)
    assert ([one.biased for one in asked], without) == ([0, 1, 0], 1)  # of an opposite question it is the other group
    header = ["category", "example_id", "target_loc", "label_type"]
    metadata = write_csv(
        tmp_path / "m.csv", header, [["Sky", 0, 1, "label"], ["Sky", 2, 0, "label"], ["Race_ethnicity", 3, 1, "name"]]
    )
    asked, without = bias.read_bbq(tmp_path, metadata, (), 0)
    assert ([one.biased for one in asked], without) == ([1, 1, 0, 1], 0)
    assert [one.category for one in asked] == ["Sky", "Sky", "Sky", "Race_ethnicity (names)"]
    assert [one.unknown for one in asked] == [2] * 4


def test_a_limit_takes_of_each_category_and_context_alike(tmp_path: Path) -> None:
    rows = [question(n, ambiguous=n % 2 == 0, category="Big" if n < 36 else "Small") for n in range(40)]
    file = write(tmp_path / "a.jsonl", rows)
    asked, _ = bias.read_bbq(file, None, (), 10)
    counts = {
        key: sum((one.category, one.ambiguous) == key for one in asked)
        for key in ((c, a) for c in ("Big", "Small") for a in (True, False))
    }
    assert counts == {("Big", True): 3, ("Big", False): 3, ("Small", True): 2, ("Small", False): 2}
    assert bias.read_bbq(file, None, (), 10)[0] == asked
    assert {one.category for one in bias.read_bbq(file, None, ("Small",), 0)[0]} == {"Small"}


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([{"text": "hello"}], "no BBQ: the row lacks example_id"),
        (
            [question(0, answer_info={"ans0": ["a", "x"], "ans1": ["b", "y"], "ans2": ["c", "z"]})],
            "expected one group 'unknown'",
        ),
        ([question(0, label=3)], "label 3"),
        ([question(0, answer_info="none")], "expected one group 'unknown'"),
        ([question(0, answer_info={"ans0": 3, "ans1": [], "ans2": None})], "expected one group 'unknown'"),
        ([question(0, additional_metadata=None)], "no question of BBQ whose biased answer is known"),
        (
            [question(0, additional_metadata={})],
            "no question of BBQ whose biased answer is known: set audit.bbq_metadata",
        ),
    ],
)
def test_files_that_are_no_bbq(tmp_path: Path, rows: list[dict[str, Any]], told: str) -> None:
    with pytest.raises(UserError, match=told):
        bias.read_bbq(write(tmp_path / "a.jsonl", rows), None, (), 0)


def test_unknown_categories_and_files_that_are_no_crows_pairs(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", [question(0)])
    with pytest.raises(UserError, match="'Skyy'.*did you mean 'Sky'"):
        bias.read_bbq(file, None, ("Skyy",), 0)
    with pytest.raises(UserError, match="no CrowS-Pairs: the row lacks sent_more"):
        bias.read_crows(file, (), 0)
    header = ["", "sent_more", "sent_less", "stereo_antistereo", "bias_type"]
    good = write_csv(tmp_path / "c.csv", header, [[0, "a", "b", "stereo", "age"]])
    with pytest.raises(UserError, match="'aged'.*did you mean 'age'"):
        bias.read_crows(good, ("aged",), 0)
    with pytest.raises(UserError, match="expected 'stereo' or 'antistereo'"):
        bias.read_crows(write_csv(tmp_path / "d.csv", header, [[0, "a", "b", "neither", "age"]]), (), 0)


def test_shares_of_crows_pairs_are_by_kind_and_direction() -> None:
    told = [("age", "stereo", True), ("age", "stereo", False), ("age", "antistereo", True), ("creed", "stereo", True)]
    rows = [{"kind": kind, "direction": way, "preferred": preferred} for kind, way, preferred in told]
    found = {one.name: figures.estimate(one, OPTIONS) for one in bias.crows_figures(rows)}
    assert {name: one["value"] for name, one in found.items()} == {
        "all": 3 / 4, "all, stereo": 2 / 3, "all, antistereo": 1.0, "age": 2 / 3, "creed": 1.0,
    }  # fmt: skip
    assert found["all"]["p"] == pytest.approx(2 * (4 + 1) / 16)  # sign test: 3 of 4
    assert found["creed"]["high"] == 1
    assert found["creed"]["low"] < 0.3  # one pair says little


@pytest.fixture(scope="module")
def loaded(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    from jaxtune import config as config_lib

    config = config_lib.base()
    config.model.source, config.eval.batch_size = str(tiny_model), 4
    model = source.find(config)
    program, values = start.program(config, model)
    state, frozen = start.load(config, model, program, values, pipeline.silent)
    return config, source.find_tokenizer(config, model), program, {**frozen, **state.params}


def logps(program: Any, params: Any, ids: list[int]) -> np.ndarray:
    """Of each token but the first, its log-likelihood after those before: one whole forward pass, nothing shared with what is tested."""
    model = layers.bind(program.inference, params)
    at = jnp.arange(len(ids))[None]
    hidden, _ = model(jnp.asarray([ids]), at, jnp.ones_like(at))
    shares = jax.nn.log_softmax(model.head(hidden)[0].astype(jnp.float32), axis=-1)
    return np.asarray(shares)[np.arange(len(ids) - 1), ids[1:]]


def test_a_decoder_prefers_the_sentence_that_is_the_likelier_as_a_whole(loaded: Any) -> None:
    config, tokenizer, program, params = loaded
    pairs = [
        bias.Sentences("1", "age", "stereo", "the cat ran under the hill", "the dog ran"),
        bias.Sentences("2", "age", "stereo", "a bird", "blue sky was good"),
    ]
    found = bias.compare(pairs, False, 4, tokenizer, program, params, pipeline.silent, "test")
    for one, row in zip(pairs, found, strict=True):
        more, less = (
            logps(program, params, [tokenizer.bos_id, *tokenizer.encode(text)]).sum() for text in (one.more, one.less)
        )
        assert row["more"] == pytest.approx(more, rel=1e-4)
        assert row["less"] == pytest.approx(less, rel=1e-4)
        assert row["preferred"] == (more > less)


def test_an_answer_is_the_likeliest_after_the_prompt(loaded: Any, tmp_path: Path) -> None:
    config, tokenizer, program, params = loaded
    asked, _ = bias.read_bbq(write(tmp_path / "a.jsonl", [question(n) for n in range(3)]), None, (), 0)
    config = config.copy_and_resolve_references()
    config.audit.bbq_prompt = "{context} {question}? {answers}"
    prompts, answers = bias.prompted(asked, config, tokenizer)
    assert "who ran 1? the cat, the dog, unknown" in tokenizer.decode(prompts[1])
    for per_token in (False, True):
        config.audit.bbq_per_token = per_token
        found = bias.ask(asked, config, tokenizer, program, params, pipeline.silent, "test")
        for prompt, each, row in zip(prompts, answers, found, strict=True):
            sums = [logps(program, params, [*prompt, *ids])[len(prompt) - 1 :].sum() for ids in each]
            wanted = [one / len(ids) if per_token else one for one, ids in zip(sums, each, strict=True)]
            assert row["scores"] == pytest.approx(wanted, rel=1e-4)
            assert row["prediction"] == int(np.argmax(wanted))


class Words:
    """A tokenizer of words: 0 and 1 stand around a text, 2 masks."""

    mask_id, special_ids, pad_id = 2, (0, 1, 2), 0

    def encode_whole(self, text: str) -> list[int]:
        return [0, *(10 + len(word) for word in text.split()), 1]


def test_of_a_masked_model_only_what_both_sentences_share_is_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nangia et al. 2020: the unmodified tokens, each masked by itself, given all others."""
    rows, owner = bias.masked_rows([("old cats like fish", "young cats like fish")], Words())  # type: ignore[arg-type]
    assert owner.tolist() == [0, 0, 0, 1, 1, 1]  # old and young are the modified ones
    first = rows.tokens[: rows.offsets[1]].tolist()
    assert first == [0, 13, 2, 14, 14, 1]
    assert rows.targets is not None
    assert rows.targets[: rows.offsets[1]].tolist() == [0, 13, 14, 14, 14, 1]
    assert rows.weights[: rows.offsets[1]].tolist() == [0, 0, 1, 0, 0, 0]
    nll = np.asarray([1.0, 2.0, 3.0, 1.5, 2.5, 3.5])
    monkeypatch.setattr(likelihood, "masked_nll", lambda *_: (nll, None, None))
    program: Any = type("Program", (), {"inference": None})
    pairs = [bias.Sentences("1", "age", "stereo", "old cats like fish", "young cats like fish")]
    (row,) = bias.compare(pairs, True, 4, Words(), program, {}, pipeline.silent, "test")  # type: ignore[arg-type]
    assert (row["more"], row["less"], row["preferred"]) == (-6.0, -7.5, True)


# ---- probes ----


def test_probe_figures_by_hand() -> None:
    name = "gender: male, female"
    compared = [
        Probe("1", name, 0, 1, "male to female"),
        Probe("2", name, 2, 3, "female to male", True),
        Probe("3", name, 4, 5, counterfactual.MIXED),
        Probe("4", name, 6, 7, "male to female"),
    ]
    scores = [0.9, 0.5, 0.4, 0.6, 0.2, 0.8, 0.7, 0.7]
    found = [Answer("pos" if score >= 0.5 else "neg", score, score >= 0.5) for score in scores]
    value = {one.metric: figures.estimate(one, OPTIONS) for one in counterfactual.figures(compared, found)}
    assert value["flip rate"]["value"] == 2 / 4  # rows 2 and 3
    assert value["mean absolute gap"]["value"] == pytest.approx((0.4 + 0.2 + 0.6 + 0.0) / 4)
    assert value["gap"]["value"] == pytest.approx((-0.4 + 0.2 + 0.0) / 3)  # female less male; row 3 is about both
    assert value["gap"]["p"] == 1.0  # -0.4, 0.2, 0: of 8 changes of signs all have a mean as far from 0, or
    assert value["gap, male to female"]["value"] == pytest.approx((-0.4 + 0.0) / 2)
    assert value["gap, female to male"]["value"] == pytest.approx(-0.2)  # male less female, as the swap went
    assert value["accuracy"]["value"] == pytest.approx((1 + 0.5 + 0.5 + 1) / 4)
    assert value["flip rate"]["interval"] == "Wilson"


def test_the_worst_rows_are_flips_then_gaps() -> None:
    rows = [{"text": text, "id": 1} for text in "abcdefgh"]
    compared = [
        Probe("small", "g: a, b", 0, 1),
        Probe("flip", "g: a, b", 2, 3),
        Probe("same", "g: a, b", 4, 5),
        Probe("big", "g: a, b", 6, 7),
    ]
    found = [
        Answer(p, s)
        for p, s in (("x", 0.1), ("x", 0.2), ("x", 0.4), ("y", 0.45), ("x", 0.3), ("x", 0.3), ("x", 0.1), ("x", 0.9))
    ]
    told = counterfactual.worst(Probes(rows, compared, {}), found, 10)
    assert [one["row_id"] for one in told] == ["flip", "big", "small"]
    assert told[0]["first"] == {
        "text": {"text": "c"},
        "prediction": "x",
        "score": 0.4,
        "correct": None,
    }  # what differs alone


def test_differences_are_paired_and_wilsons_interval_is_the_published_one() -> None:
    before = figures.Figure("crows", "all", "m", np.asarray([True] * 6 + [False] * 4))
    after = before._replace(column=np.asarray([True] * 3 + [False] * 7))
    gap = figures.compare(before, after, OPTIONS)
    assert gap["value"] == pytest.approx(-0.3)
    assert gap["p"] == pytest.approx(0.25)  # 3 of 3 one way: 2 / 2^3
    assert gap["high"] <= 0
    none = figures.estimate(before._replace(column=np.zeros(10, bool)), OPTIONS)
    assert (none["value"], none["low"]) == (0.0, 0.0)
    assert none["high"] == pytest.approx(3.8414588 / (10 + 3.8414588), abs=1e-6)  # z^2 / (n + z^2)
    half = figures.estimate(before._replace(column=np.asarray([True, False] * 5)), OPTIONS)
    assert (half["low"], half["high"]) == pytest.approx((0.236593, 0.763407), abs=1e-6)
    assert math.isclose(half["value"], 0.5)


def test_few_rows_that_lean_alike_are_not_sure() -> None:
    """A bootstrap of them would have no width."""
    share = 3.8414588 / (4 + 3.8414588)  # Wilson's upper end of 0 of 4
    one = figures.Figure("bbq", "all", "s_DIS", np.asarray([1.0, 1.0, 0.0, 1.0, 1.0]), bias.s_dis, 0.0, leans="answers")
    told = figures.estimate(one, OPTIONS)
    assert (told["value"], told["low"], told["high"]) == (1.0, pytest.approx(1 - 2 * share), 1.0)
    told = figures.estimate(one._replace(column=-one.column), OPTIONS)
    assert (told["value"], told["low"], told["high"]) == (-1.0, -1.0, pytest.approx(2 * share - 1))
    told = figures.estimate(one._replace(column=np.zeros(5)), OPTIONS)
    assert (told["value"], told["low"], told["high"]) == (0.0, -1.0, 1.0)  # nothing is known
    told = figures.estimate(one._replace(column=np.zeros(4), statistic=bias.s_amb, leans="rows"), OPTIONS)
    assert (told["low"], told["high"]) == (
        pytest.approx(-share),
        pytest.approx(share),
    )  # "unknown" four times is something
    mixed = figures.estimate(one._replace(column=np.asarray([1.0, -1.0, 1.0, 1.0])), OPTIONS)
    assert mixed["interval"] == "bootstrap"
