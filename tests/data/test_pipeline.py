"""The whole way: stable splits, honest counts, and batches that depend on the step alone."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ml_collections import ConfigDict

from jaxtune.data import pipeline
from jaxtune.data.formats import Example
from jaxtune.data.pipeline import BatchSource, Rows
from jaxtune.data.tokenizer import Tokenizer
from jaxtune.types import BATCH_FIELDS, Batch, UserError


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def qa(count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"question {i}", "completion": f"answer {i}", "id": f"{i // 10}_{i}"} for i in range(count)]


def prompts(examples: list[Example]) -> list[str]:
    return [example.messages[0]["content"] for example in examples if example.messages]


def load(data: ConfigDict, tokenizer: Tokenizer, **paths: Path) -> pipeline.Splits:
    return pipeline.load(data, paths, tokenizer)


def test_split_does_not_depend_on_the_order_of_rows(tmp_path: Path, chatml: Tokenizer, data: ConfigDict) -> None:
    data.validation_fraction, data.test_fraction = 0.2, 0.1
    rows = qa(600)
    first = load(data, chatml, train=write(tmp_path / "a.jsonl", rows))
    random.Random(0).shuffle(rows)
    second = load(data, chatml, train=write(tmp_path / "b.jsonl", rows))
    for one, other in zip(first[:3], second[:3], strict=True):
        assert sorted(prompts(one)) == sorted(prompts(other))
    assert sum(map(len, first[:3])) == 600
    assert 0.15 < len(first.validation) / 600 < 0.25
    assert 0.06 < len(first.test) / 600 < 0.14
    assert first.counts["validation"] == len(first.validation)
    more = load(data, chatml, train=write(tmp_path / "c.jsonl", rows + qa(700)[600:]))
    assert set(prompts(first.validation)) <= set(prompts(more.validation))  # new rows move no old one


def test_the_hash_is_fixed(tmp_path: Path, chatml: Tokenizer, data: ConfigDict) -> None:
    data.validation_fraction = 0.3
    splits = load(data, chatml, train=write(tmp_path / "a.jsonl", qa(12)))
    # Written down, so that a change of Python, NumPy or jaxtune cannot move rows between splits unseen.
    assert prompts(splits.validation) == FIXED_VALIDATION


FIXED_VALIDATION = ["question 3", "question 4", "question 9"]


def test_groups_stay_on_one_side(tmp_path: Path, chatml: Tokenizer, data: ConfigDict) -> None:
    data.split_key, data.split_regex, data.validation_fraction = "id", r"^[^_]+", 0.4
    splits = load(data, chatml, train=write(tmp_path / "a.jsonl", qa(300)))
    groups = [{e.split_key.split("_")[0] for e in part} for part in (splits.train, splits.validation)]
    assert groups[0]
    assert groups[1]
    assert not groups[0] & groups[1]


def test_files_of_their_own_replace_shares(tmp_path: Path, chatml: Tokenizer, data: ConfigDict) -> None:
    data.test_fraction = 0.5
    train, held = write(tmp_path / "a.jsonl", qa(50)), write(tmp_path / "b.jsonl", qa(3))
    splits = load(data, chatml, train=train, eval=held, test=held)
    assert [len(part) for part in splits[:3]] == [50, 3, 3]
    assert splits.validation[0].row_id == "b.jsonl:1"


def test_limit_is_a_stable_choice(tmp_path: Path, chatml: Tokenizer, data: ConfigDict) -> None:
    rows = qa(200)
    chosen = {}
    for limit in (20, 40):
        data.limit = limit
        chosen[limit] = set(prompts(load(data, chatml, train=write(tmp_path / "a.jsonl", rows)).train))
        random.Random(limit).shuffle(rows)
    assert len(chosen[20]) == 20
    assert chosen[20] < chosen[40]


def test_load_errors(tmp_path: Path, chatml: Tokenizer, tokenizers: Any, data: ConfigDict) -> None:
    path = write(tmp_path / "a.jsonl", qa(1))
    data.split_key, data.split_regex = "id", "x+"
    with pytest.raises(UserError, match=r"^a\.jsonl:1: data\.split_regex 'x\+' matches nothing in '0_0'"):
        load(data, chatml, train=path)
    data.split_regex = "("
    with pytest.raises(UserError, match=r"data\.split_regex '\(' is not a regular expression"):
        load(data, chatml, train=path)
    data.split_regex, data.validation_fraction, data.test_fraction = "", 0.5, 0.4999999
    with pytest.raises(UserError, match="no training rows left of 1 read"):
        load(data, chatml, train=path)
    data.format = "messages"
    with pytest.raises(UserError, match="no chat template"):
        load(data, tokenizers["plain"], train=path)


def text_rows(tokenizer: Tokenizer, data: ConfigDict, texts: list[str]) -> Rows:
    return pipeline.tokenize([Example(f"f:{i}", text=text) for i, text in enumerate(texts, 1)], tokenizer, data)


def test_counts_are_honest(chatml: Tokenizer, data: ConfigDict) -> None:
    def chat(answer: str, weight: int = 1) -> tuple[dict[str, Any], ...]:
        return ({"role": "user", "content": "a"}, {"role": "assistant", "content": answer, "weight": weight})

    data.max_length = 60
    examples = [Example("f:1", chat("b")), Example("f:2", chat("b", 0)), Example("f:3", chat("the cat " * 30))]
    rows = pipeline.tokenize(examples, chatml, data)
    assert rows.row_ids == ["f:1", "f:3"]
    assert (rows.counts["rows"], rows.counts["nothing_to_train"], rows.counts["truncated"]) == (2, 1, 1)
    assert rows.counts["without_trained_stop"] == 1  # the cut row lost its end
    assert rows.counts["tokens"] == rows.offsets[-1] == len(rows.tokens)
    assert rows.lengths.max() == 60
    assert rows.counts["trained_tokens"] == (rows.weights > 0).sum()
    data.too_long = "drop"
    rows = pipeline.tokenize(examples, chatml, data)
    assert rows.row_ids == ["f:1"]
    assert rows.counts["too_long"] == 1
    data.too_long = "error"
    with pytest.raises(UserError, match=r"^f:3: \d+ tokens; expected at most data\.max_length=60"):
        pipeline.tokenize(examples, chatml, data)


def test_trained_tokens_leave_out_what_is_never_a_target(tokenizers: Any, data: ConfigDict) -> None:
    rows = text_rows(tokenizers["plain"], data, ["the cat", "a film"])
    source = BatchSource(rows, 32, True, False, 0, 1, 0)
    assert rows.counts["trained_tokens"] == source[0]["weights_BT"].sum() == rows.counts["tokens"] - 2


def test_a_first_token_alone_is_nothing_to_train(tokenizers: Any, data: ConfigDict) -> None:
    data.end_of_turn = "none"
    examples = [Example("f:1", prompt="", answer="a"), Example("f:2", prompt="a", answer="a film")]
    rows = pipeline.tokenize(examples, tokenizers["plain"], data)
    assert rows.row_ids == ["f:2"]
    assert rows.counts["nothing_to_train"] == 1


def test_nothing_left_says_why(chatml: Tokenizer, data: ConfigDict) -> None:
    silent = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0})
    with pytest.raises(UserError, match=r"of 2 rows of f, nothing_to_train 2 .*check the messages' weight"):
        pipeline.tokenize([Example("f:1", silent)] * 2, chatml, data)
    data.max_length, data.too_long = 4, "drop"
    with pytest.raises(UserError, match=r"of 1 rows of f, too_long 1 .*raise data\.max_length"):
        pipeline.tokenize([Example("f:1", silent)], chatml, data)
    with pytest.raises(UserError, match="the data set is empty"):
        pipeline.tokenize([], chatml, data)


def test_progress_sees_every_row(chatml: Tokenizer, data: ConfigDict) -> None:
    seen: list[Any] = []

    def progress(items: Any, total: int, label: str) -> Any:
        for item in items:
            seen.append((total, label))
            yield item

    pipeline.tokenize([Example("f:1", text="a b c")] * 3, chatml, data, progress)
    assert seen == [(3, "tokenising")] * 3


@pytest.fixture
def rows() -> Rows:
    lengths = np.random.default_rng(0).integers(2, 20, 57)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens = np.arange(1, offsets[-1] + 1, dtype=np.int32)
    return Rows(tokens, np.ones(len(tokens), np.float32), offsets, [f"f:{i}" for i in range(57)])


def make(rows: Rows, packing: bool = True, shuffle: bool = True, seed: int = 0, batch_size: int = 4) -> BatchSource:
    return BatchSource(rows, 24, packing, shuffle, seed, batch_size, pad_id=0)


def same(a: Batch, b: Batch) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def rows_seen(batches: list[Batch]) -> list[int]:
    """Returns each data row as often as it starts a segment."""
    return sorted(
        int(row) for b in batches for row in b["row_ids_BT"][(b["segment_ids_BT"] > 0) & (b["positions_BT"] == 0)]
    )


@pytest.mark.parametrize("packing", [False, True])
def test_batches_have_every_field_and_every_token(rows: Rows, packing: bool) -> None:
    source = make(rows, packing, batch_size=1)
    batches = [source[step] for step in range(source.num_bins)]
    for name, dtype in BATCH_FIELDS.items():
        if not name.endswith("_BT"):
            continue  # of other kinds of rows
        if name.startswith(("reference_", "old_", "advantages_", "returns_", "values_", "gold_", "teacher_")):
            continue  # of rows that another model, or the one that sampled them, has read
        assert batches[0][name].shape == (1, 24)
        assert batches[0][name].dtype == dtype
    assert rows_seen(batches) == list(range(57))
    real = np.concatenate([b["tokens_BT"][b["segment_ids_BT"] > 0] for b in batches])
    assert sorted(real) == rows.tokens.tolist()
    targets = np.concatenate([b["targets_BT"][b["weights_BT"] > 0] for b in batches])
    assert sorted(targets) == sorted(set(rows.tokens.tolist()) - set(rows.tokens[rows.offsets[:-1]].tolist()))
    assert (source.num_bins < 57) == packing


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("packing", [False, True])
def test_pure_function_of_seed_and_step(rows: Rows, packing: bool, shuffle: bool) -> None:
    one, other = make(rows, packing, shuffle), make(rows, packing, shuffle)
    steps = list(range(40))
    forward = {step: one[step] for step in steps}
    backward = {step: other[step] for step in reversed(steps)}
    assert all(same(forward[step], backward[step]) for step in steps)
    changed = make(rows, packing, shuffle, seed=1)
    assert same(forward[0], changed[0]) is not shuffle


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_hosts_together_hold_the_global_batch(rows: Rows, hosts: int) -> None:
    source = make(rows)
    for step in (0, 5, 17):
        shares = np.split(np.arange(make(rows).batch_size), hosts)
        parts = [make(rows).local(step, share) for share in shares]
        assert same(source[step], {name: np.concatenate([p[name] for p in parts]) for name in parts[0]})


def test_epochs_flow_on_and_differ(rows: Rows) -> None:
    source = make(rows, packing=False, batch_size=3)
    assert source.steps_per_epoch == 19
    epochs = [[source[step] for step in range(19 * e, 19 * e + 19)] for e in range(3)]
    assert all(rows_seen(batches) == list(range(57)) for batches in epochs)
    assert not same(epochs[0][0], epochs[1][0])
    assert not same(epochs[1][0], epochs[2][0])
    straddling = make(rows, packing=False, batch_size=5)  # 57 is no multiple of 5
    first = [straddling[step] for step in range(23)]
    assert sorted(set(rows_seen(first))) == list(range(57))
    assert len(rows_seen(first)) == 115


def test_order_of_an_epoch_is_fixed(rows: Rows) -> None:
    source = BatchSource(rows, 24, False, True, 7, 57, pad_id=0)
    assert source[0]["row_ids_BT"][:6, 0].tolist() == FIXED_ORDER  # a resumed run must see it again after any upgrade


FIXED_ORDER = [34, 37, 8, 29, 48, 16]


def test_without_shuffle_the_file_s_order_is_kept(rows: Rows) -> None:
    plain = make(rows, packing=False, shuffle=False)
    assert plain[0]["row_ids_BT"][:, 0].tolist() == [0, 1, 2, 3]
    packed = make(rows, packing=True, shuffle=False)
    firsts = [int(packed[step]["row_ids_BT"][r, 0]) for step in range(3) for r in range(4)]
    assert firsts == sorted(firsts)
    assert firsts[0] == 0


@pytest.mark.parametrize("hosts", [1, 2])
def test_iterate_resumes_at_any_step(rows: Rows, hosts: int) -> None:
    source = make(rows)
    mine = np.split(np.arange(source.batch_size), hosts)[-1]
    whole = list(pipeline.iterate(source, 0, 25, mine))
    tail = list(pipeline.iterate(source, 11, 14, mine, prefetch=1))
    assert len(whole) == 25
    assert all(same(a, b) for a, b in zip(whole[11:], tail, strict=True))
    assert same(whole[3], source.local(3, mine))
    assert list(pipeline.iterate(source, 5, 0)) == []


@pytest.mark.parametrize("error", [ValueError, StopIteration, IndexError])
def test_errors_of_reader_threads_surface(rows: Rows, error: type[Exception]) -> None:
    class Broken(BatchSource):
        def local(self, step: int, batch_rows: np.ndarray) -> Batch:
            if step == 3:
                raise error("broken row")
            return super().local(step, batch_rows)

    batches = pipeline.iterate(Broken(rows, 24, True, True, 0, 4, 0), 1, 9)
    assert [next(batches) is not None for _ in range(2)] == [True, True]
    with pytest.raises(RuntimeError, match="batch of step 3 could not be made") as caught:
        next(batches)
    assert isinstance(caught.value.__cause__, error)


def test_steps_outside_the_run_are_refused(rows: Rows) -> None:
    source = BatchSource(rows, 24, True, True, 0, 4, 0, num_steps=2)
    with pytest.raises(ValueError, match="step 2 is outside 0 to 2"):
        source[2]


@pytest.mark.parametrize("packing", [False, True])
def test_evaluation_sees_every_row_once(rows: Rows, packing: bool) -> None:
    batches = list(pipeline.eval_batches(rows, 24, packing, 4, pad_id=0))
    assert rows_seen(batches) == list(range(57))
    assert {b["tokens_BT"].shape for b in batches} == {(4, 24)}
    assert sum(float(b["weights_BT"].sum()) for b in batches) == len(rows.tokens) - 57
    assert len(list(pipeline.eval_batches(rows, 24, packing, 4, 0, num_batches=2))) == 2


def test_padding_share(rows: Rows) -> None:
    batch = make(rows, packing=False, shuffle=False, batch_size=57)[0]
    assert pipeline.padding_share(batch) == pytest.approx(1 - len(rows.tokens) / (57 * 24))
    packed = make(rows, packing=True, shuffle=False)[0]
    assert pipeline.padding_share(packed) < pipeline.padding_share(batch) / 2
