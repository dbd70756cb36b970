"""Sampling: what each restriction keeps, and that neither company nor padding changes a row's text."""

from __future__ import annotations

import io
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from jaxtune import run, sharding
from jaxtune.data.tokenizer import Tokenizer
from jaxtune.generate.logits import Sampling, draw, restrict
from jaxtune.generate.sampler import Sampler, cut
from jaxtune.train import start, state
from jaxtune.types import UserError
from jaxtune.weights import source

PROBS = np.asarray([[0.5, 0.25, 0.15, 0.07, 0.03]])
LOGITS = jnp.asarray(np.log(PROBS), jnp.float32)


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [
        (Sampling(1.0), 5),
        (Sampling(1.0, top_k=2), 2),
        (Sampling(1.0, top_k=99), 5),
        (Sampling(1.0, top_p=0.5), 1),
        (Sampling(1.0, top_p=0.51), 2),
        (Sampling(1.0, top_p=0.9), 3),
        (Sampling(1.0, min_p=0.2), 3),
        (Sampling(1.0, top_k=4, top_p=0.8, min_p=0.4), 2),
        (Sampling(1.0, top_p=1e-6), 1),
    ],
)
def test_what_is_kept(sampling: Sampling, kept: int) -> None:
    assert (np.asarray(restrict(LOGITS, sampling)) > -1e29).sum() == kept


def test_draws_follow_the_distribution() -> None:
    keys = jax.random.split(jax.random.key(0), 20_000)
    drawn = draw(jnp.repeat(LOGITS, 20_000, axis=0), Sampling(1.0), keys)
    np.testing.assert_allclose(np.bincount(drawn, minlength=5) / 20_000, PROBS[0], atol=0.012)
    cold = draw(jnp.repeat(LOGITS, 20_000, axis=0), Sampling(0.5), keys)
    np.testing.assert_allclose(np.bincount(cold, minlength=5) / 20_000, PROBS[0] ** 2 / (PROBS**2).sum(), atol=0.012)


@pytest.fixture(scope="module")
def sampler(tiny_model: Path) -> Sampler:
    from jaxtune import config as config_lib
    from jaxtune.evals import measure

    config = config_lib.base()
    config.model.source = str(tiny_model)
    model = source.find(config)
    program = state.abstract(config, model.hf_config, sharding.make_mesh(config), 1)
    current, frozen = start.load(config, model, program, None, lambda items, *_: items)
    return measure.sampler(Tokenizer.load(tiny_model), program, {**frozen, **current.params})


PROMPTS = [[5, 9, 60, 31], [77] * 11, [100, 20]]


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.9, top_k=40, top_p=0.95)], ids=["greedy", "sampled"])
def test_a_row_does_not_depend_on_its_company(sampler: Sampler, sampling: Sampling) -> None:
    together = sampler.generate(PROMPTS, sampling, 12, seed=3)
    alone = [sampler.generate([prompt], sampling, 12, seed=3, rows=[row])[0] for row, prompt in enumerate(PROMPTS)]
    assert together == alone
    assert len(set(together)) == 3


def test_seeds_differ(sampler: Sampler) -> None:
    hot = Sampling(1.5)
    assert sampler.generate(PROMPTS, hot, 12, seed=0) == sampler.generate(PROMPTS, hot, 12, seed=0)
    assert sampler.generate(PROMPTS, hot, 12, seed=0) != sampler.generate(PROMPTS, hot, 12, seed=1)


def test_stop_strings_and_streaming(sampler: Sampler) -> None:
    text = sampler.generate([PROMPTS[0]], Sampling(), 24)[0]
    assert "".join(sampler.stream_text(PROMPTS[0], Sampling(), 24)) == text
    stop = text[len(text) // 2 : len(text) // 2 + 3]
    stopped = sampler.generate([PROMPTS[0]], Sampling(), 24, stop=(stop,))[0]
    assert stopped == cut(text, [stop])
    assert "".join(sampler.stream_text(PROMPTS[0], Sampling(), 24, stop=(stop,))) == stopped


def test_refusals(sampler: Sampler) -> None:
    with pytest.raises(UserError, match="empty"):
        sampler.generate([[]], Sampling(), 4)
    with pytest.raises(UserError, match="exceed the model's 256 positions"):
        sampler.generate([[5] * 200], Sampling(), 100)


def test_chat_in_the_terminal(tiny_config: ConfigDict, monkeypatch, capsys) -> None:
    tiny_config.generate.max_new_tokens = 8
    monkeypatch.setattr("sys.stdin", io.StringIO("the cat\n/reset\nthe cat\n/quit\n"))
    run.chat(tiny_config, Path(tiny_config.workdir))
    lines = capsys.readouterr().out.split("> ")
    assert "/quit leaves" in lines[0]
    assert lines[1] == lines[3]  # after /reset the same question gets the same greedy answer
    asked, render = [], Tokenizer.render
    monkeypatch.setattr(Tokenizer, "render", lambda self, m, *a, **k: asked.append(list(m)) or render(self, m, *a, **k))
    for system in ("Say {word}.", "Be kind."):
        tiny_config.data.system = system
        monkeypatch.setattr("sys.stdin", io.StringIO("the cat\n/reset\nthe cat\n"))
        run.chat(tiny_config, Path(tiny_config.workdir))
    user = {"role": "user", "content": "the cat"}
    assert [messages for messages in asked if user in messages] == [[user]] * 2 + [
        [{"role": "system", "content": "Be kind."}, user]
    ] * 2


def test_generate_answers_a_file(tiny_config: ConfigDict, chats: Path) -> None:
    import json

    tiny_config.generate.input, tiny_config.generate.max_new_tokens = str(chats), 4
    run.generate(tiny_config, Path(tiny_config.workdir))
    lines = [json.loads(x) for x in (Path(tiny_config.workdir) / "generations.jsonl").read_text().splitlines()]
    assert [line["row_id"] for line in lines] == [f"chats.jsonl:{n}" for n in range(1, 97)]
    assert all("<|im_start|>assistant" in line["prompt"] for line in lines)
