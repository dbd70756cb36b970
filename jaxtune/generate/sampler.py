"""Text from a model: prompts of any lengths prefilled together, then decoded a few tokens per call with a KV cache.

Prompts are padded on the left, so every row writes the same cache slot; padding has segment 0 and is never attended to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxtune.generate.logits import Sampling, draw
from jaxtune.models import layers
from jaxtune.sharding import to_host
from jaxtune.types import UserError

_BUCKET_TOKENS = 32  # prompt and cache lengths are rounded up to this, so that few shapes compile
_BLOCK_TOKENS = 8  # tokens decoded between two looks at stop strings


class _Decoding(NamedTuple):
    """What decoding carries: the cache, the last token and position of each row, and which rows are done."""

    cache: Any
    last_B: jax.Array
    position_B: jax.Array
    done_B: jax.Array
    step: jax.Array


class Sampler:
    """Decodes with one model (structure and parameters). Compiled functions are kept by shape.

    Args:
      graphdef, params: the model, as `models.layers.flatten` gives it.
      decode: token ids -> text, for stop strings and results.
      stop_ids: tokens that end an answer.
      pad_id: fills prompts up on the left.
      vocab_size: of the tokenizer; ids above it (padding rows of the embedding) are never drawn.
      max_positions: the longest sequence the model knows.
    """

    def __init__(
        self, graphdef: nnx.GraphDef, params: dict[str, jax.Array], decode: Callable[[Sequence[int]], str],
        stop_ids: Sequence[int], pad_id: int, vocab_size: int, max_positions: int,
    ):  # fmt: skip
        self._params, self._decode, self._stop_ids, self._pad_id = params, decode, tuple(stop_ids), pad_id
        self._max_positions = max_positions
        self._prefill = partial(_prefill, graphdef)
        self._step = partial(_decode_block, graphdef, self._stop_ids, pad_id, vocab_size)
        self._first = partial(_first_token, self._stop_ids, vocab_size)

    def stream(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, max_new_tokens: int, seed: int = 0, rows: Sequence[int] | None = None,
        block: int = _BLOCK_TOKENS,
    ) -> Iterator[np.ndarray]:  # fmt: skip
        """Yields blocks of new tokens (B, up to `block`), `pad_id` after a row's end, until every row is done.

        `rows` are the prompts' numbers: they and `seed` alone fix what is drawn, not the company a prompt is in.

        Raises:
          UserError: a prompt is empty, or prompt and answer exceed what the model knows.
        """
        longest = max(len(prompt) for prompt in prompts)
        if not all(len(prompt) for prompt in prompts):
            raise UserError("a prompt is empty: there is nothing to go on from")
        if longest + max_new_tokens > self._max_positions:
            raise UserError(
                f"a prompt of {longest} tokens and generate.max_new_tokens={max_new_tokens} exceed the model's "
                f"{self._max_positions} positions: shorten one of them"
            )
        width, slots = _rounded(longest), _rounded(_rounded(longest) + max_new_tokens)
        tokens_BT, lengths_B = left_padded(prompts, width, self._pad_id)
        keys_B = jax.vmap(partial(jax.random.fold_in, jax.random.key(seed)))(
            jnp.asarray(range(len(prompts)) if rows is None else rows)
        )
        cache, logits_BV = self._prefill(self._params, tokens_BT, lengths_B, slots=slots)
        token_B, done_B = self._first(logits_BV, keys_B, sampling=sampling)
        at = _Decoding(cache, token_B, jnp.asarray(lengths_B), done_B, jnp.int32(1))
        yield to_host(token_B)[:, None]
        made = 1
        while made < max_new_tokens and not to_host(at.done_B).all():
            at, tokens_BT = self._step(self._params, at, keys_B, sampling=sampling, count=block)
            yield to_host(tokens_BT)[:, : max_new_tokens - made]
            made += block

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, max_new_tokens: int, seed: int = 0, stop: Sequence[str] = (),
        rows: Sequence[int] | None = None,
    ) -> list[str]:  # fmt: skip
        """Returns one text per prompt, without the stop token, cut before the first stop string."""
        made: list[list[int]] = [[] for _ in prompts]
        done = [False] * len(prompts)
        for block_BT in self.stream(prompts, sampling, max_new_tokens, seed, rows):
            for row, tokens in enumerate(block_BT):
                if not done[row]:
                    kept, done[row] = self._until_stop(tokens)
                    made[row] += kept
                    done[row] |= bool(stop) and any(text in self._decode(made[row]) for text in stop)
            if all(done):
                break
        return [cut(self._decode(tokens), stop) for tokens in made]

    def _until_stop(self, tokens: np.ndarray) -> tuple[list[int], bool]:
        ends = np.flatnonzero(np.isin(tokens, self._stop_ids))
        return ([int(t) for t in tokens[: ends[0]]], True) if len(ends) else ([int(t) for t in tokens], False)

    def stream_text(
        self, prompt: Sequence[int], sampling: Sampling, max_new_tokens: int, seed: int = 0, stop: Sequence[str] = ()
    ) -> Iterator[str]:
        """Yields the answer to one prompt in pieces of whole characters, as it is made."""
        made: list[int] = []
        shown, ended = "", False
        for block_BT in self.stream([prompt], sampling, max_new_tokens, seed, block=2):
            kept, ended = self._until_stop(block_BT[0])
            made += kept
            text = cut(self._decode(made), stop)
            ended |= len(text) < len(self._decode(made))
            whole = text if ended else text.rstrip("\ufffd")  # half a character waits for its other bytes
            held = 0 if ended else max((n for s in stop for n in range(1, len(s)) if whole.endswith(s[:n])), default=0)
            whole = whole[: len(whole) - held]  # what may yet become a stop string waits, too
            if len(whole) > len(shown):
                yield whole[len(shown) :]
                shown = whole
            if ended:
                return
        rest = cut(self._decode(made), stop)[len(shown) :]
        if rest:
            yield rest


def cut(text: str, stop: Sequence[str]) -> str:
    """The text before the first of the stop strings."""
    return text[: min([text.find(s) for s in stop if s in text], default=len(text))]


def _rounded(tokens: int) -> int:
    return -(-tokens // _BUCKET_TOKENS) * _BUCKET_TOKENS


def left_padded(prompts: Sequence[Sequence[int]], width: int, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns (tokens (B, width) int32 with the prompts at the right edge, lengths (B,) int32)."""
    tokens_BT = np.full((len(prompts), width), pad_id, np.int32)
    for row, prompt in enumerate(prompts):
        tokens_BT[row, width - len(prompt) :] = prompt
    return tokens_BT, np.asarray([len(prompt) for prompt in prompts], np.int32)


def prefill(model: Any, tokens_BT: jax.Array, lengths_B: jax.Array, slots: int) -> tuple[Any, jax.Array]:
    """Runs left-padded prompts through the model: returns the filled cache and the last hidden state (B, D)."""
    width = tokens_BT.shape[1]
    index_BT = jnp.arange(width)[None, :] - (width - lengths_B)[:, None]
    segments_BT = (index_BT >= 0).astype(jnp.int32)
    cache = model.empty_cache(tokens_BT.shape[0], slots)
    hidden_BTD, cache = model(tokens_BT, jnp.maximum(index_BT, 0), segments_BT, cache)
    return cache, hidden_BTD[:, -1]


# These are jitted here, by graphdef, so that samplers over one model's changing parameters share what was compiled.
@partial(jax.jit, static_argnames=("graphdef", "slots"))
def _prefill(
    graphdef: nnx.GraphDef, params: Any, tokens_BT: jax.Array, lengths_B: jax.Array, slots: int
) -> tuple[Any, jax.Array]:
    model = layers.bind(graphdef, params)
    cache, last_BD = prefill(model, tokens_BT, lengths_B, slots)
    return cache, model.head(last_BD)


def _next(
    stop_ids: tuple[int, ...],
    vocab_size: int,
    logits_BV: jax.Array,
    sampling: Sampling,
    keys_B: jax.Array,
    step: jax.Array,
) -> Any:
    real_V = jnp.arange(logits_BV.shape[-1]) < vocab_size
    logits_BV = jnp.where(real_V[None, :], logits_BV, -1e30)
    token_B = draw(logits_BV, sampling, jax.vmap(lambda key: jax.random.fold_in(key, step))(keys_B))
    return token_B, jnp.isin(token_B, jnp.asarray(stop_ids, jnp.int32))


@partial(jax.jit, static_argnames=("stop_ids", "vocab_size", "sampling"))
def _first_token(
    stop_ids: tuple[int, ...], vocab_size: int, logits_BV: jax.Array, keys_B: jax.Array, sampling: Sampling
) -> Any:
    return _next(stop_ids, vocab_size, logits_BV, sampling, keys_B, jnp.int32(0))


@partial(
    jax.jit, static_argnames=("graphdef", "stop_ids", "pad_id", "vocab_size", "sampling", "count"), donate_argnames="at"
)
def _decode_block(
    graphdef: nnx.GraphDef, stop_ids: tuple[int, ...], pad_id: int, vocab_size: int, params: Any, at: _Decoding, keys_B: jax.Array,
    sampling: Sampling, count: int,
) -> tuple[_Decoding, jax.Array]:  # fmt: skip
    """Decodes `count` tokens per row: returns the new state and tokens (B, count), `pad_id` after a row's end."""
    model = layers.bind(graphdef, params)
    ones_B1 = jnp.ones((at.last_B.shape[0], 1), jnp.int32)

    def one(at: _Decoding, _: None) -> tuple[_Decoding, jax.Array]:
        hidden_B1D, cache = model(at.last_B[:, None], at.position_B[:, None], ones_B1, at.cache)
        token_B, ends_B = _next(stop_ids, vocab_size, model.head(hidden_B1D[:, 0]), sampling, keys_B, at.step)
        token_B = jnp.where(at.done_B, pad_id, token_B)
        return _Decoding(cache, token_B, at.position_B + 1, at.done_B | ends_B, at.step + 1), token_B

    at, tokens_TB = jax.lax.scan(one, at, None, length=count)
    return at, tokens_TB.swapaxes(0, 1)
