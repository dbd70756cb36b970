"""The tokenizer: a thin face on Hugging Face's fast tokenizers, from a folder or from inside a GGUF file.

A special token written out in someone's content (`<|im_end|>` typed by a user) becomes that special token, as in every
Hugging Face pipeline; strip such text from untrusted data.
"""

from __future__ import annotations

import copy
import json
import re
from bisect import bisect_right
from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxtune.types import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Stands for a message's content while a template is probed: private-use characters that no template strips.
MARK = "\ue000content\ue001"


class Tokenizer:
    """Text to token ids and back, and chats to text by the model's own Jinja template."""

    def __init__(self, wrapped: PreTrainedTokenizerFast) -> None:
        """Wraps a transformers fast tokenizer; see `load` for files."""
        self._wrapped = wrapped
        # Without a post-processor: it would add special tokens, and its byte-level kind trims spaces off the offsets.
        self._bare = copy.deepcopy(wrapped.backend_tokenizer)
        self._bare.post_processor = None
        self._bare.no_padding()
        self._bare.no_truncation()
        special = {i: token.content for i, token in self._bare.get_added_tokens_decoder().items() if token.special}
        self._special = list(special.values())
        self.special_ids: tuple[int, ...] = tuple(special)  # tokens that `decode` leaves out
        self.vocab_size: int = len(wrapped)
        self.bos_id: int | None = wrapped.bos_token_id
        self.eos_id: int | None = wrapped.eos_token_id
        self.mask_id: int | None = wrapped.mask_token_id
        self.pad_id: int = self._find_pad()
        probe = wrapped.backend_tokenizer.encode("a", add_special_tokens=True).ids
        self.virtual_ids: tuple[
            int, ...
        ] = ()  # in front of every text, for vectors that are no token's (a soft prompt)
        self.adds_bos: bool = self.bos_id is not None and probe[:1] == [self.bos_id]

    @property
    def vocabulary(self) -> dict[str, int]:
        """Each token's number."""
        return dict(self._bare.get_vocab(with_added_tokens=True))

    @classmethod
    def load(cls, path: str | Path, chat_template: str | Path = "") -> Tokenizer:
        """Returns the tokenizer of a folder (tokenizer.json and its companions) or of a `.gguf` file.

        Args:
          path: the folder or file.
          chat_template: path of a Jinja file that replaces the tokenizer's own template; "" = its own.

        Raises:
          UserError: there is no tokenizer at `path`, or no file at `chat_template`.
        """
        from transformers import PreTrainedTokenizerFast

        path = Path(path)
        if path.suffix.lower() == ".gguf":
            from jaxtune.data import gguf_tokenizer

            built, options = gguf_tokenizer.build(path)
            wrapped = PreTrainedTokenizerFast(tokenizer_object=built, clean_up_tokenization_spaces=False, **options)
        else:
            if not (path / "tokenizer.json").is_file():
                raise UserError(_no_tokenizer(path))
            try:
                wrapped = PreTrainedTokenizerFast.from_pretrained(str(path), local_files_only=True)
            except Exception as error:  # whatever a broken file raises, in tokenizers, transformers or JSON
                what = f"{type(error).__name__}: {error}".splitlines()[0]
                raise UserError(f"the tokenizer of {str(path)!r} cannot be read ({what}); fetch it again") from None
        if chat_template:
            if not Path(chat_template).is_file():
                raise UserError(f"model.chat_template names {str(chat_template)!r}, which is not a file")
            try:
                wrapped.chat_template = Path(chat_template).read_text(encoding="utf-8-sig")
            except UnicodeDecodeError:
                raise UserError(f"model.chat_template={str(chat_template)!r} is not UTF-8 text") from None
        return cls(wrapped)

    def _find_pad(self) -> int:
        # Padding is masked by segment ids, so any id will do; a token made for it reads best.
        if self._wrapped.pad_token_id is not None:
            return int(self._wrapped.pad_token_id)
        for name in ("<pad>", "<|pad|>", "[PAD]", "<|finetune_right_pad_id|>", "<|endoftext|>"):
            index = self._bare.token_to_id(name)
            if index is not None:
                return int(index)
        return self.eos_id if self.eos_id is not None else 0

    @property
    def chat_template(self) -> str | None:
        """The Jinja source of the chat template (the one named "default" where there are several), or None."""
        template = self._wrapped.chat_template
        return template.get("default") if isinstance(template, dict) else template

    def encode(self, text: str) -> list[int]:
        """Returns the token ids of `text`; nothing is added, special tokens written in it are recognised."""
        return list(self._bare.encode(text, add_special_tokens=False).ids)

    def encode_whole(self, text: str) -> list[int]:
        """Returns the token ids of a text with the special tokens that the tokenizer puts around one."""
        return list(self._wrapped(text, truncation=False, verbose=False)["input_ids"])

    def encode_words(self, words: Sequence[str]) -> tuple[list[int], list[int]]:
        """Returns the token ids of words as one text, a space between them, with the special tokens around a text; and of
        each token the number of the word that it is part of, -1 for none, by the characters that it covers.
        """
        found = self._wrapped(" ".join(words), truncation=False, verbose=False, return_offsets_mapping=True)
        ends = list(accumulate((len(word) + 1 for word in words), initial=-1))[1:]

        def word_of(start: int, end: int) -> int:
            word = bisect_right(ends, start)  # a space in front belongs to the word that follows
            return word if start < end and word < len(words) and end > ends[word] - len(words[word]) else -1

        return list(found["input_ids"]), [word_of(*span) for span in found["offset_mapping"]]

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Returns the token ids of `text`, and of each the characters [start, end) it covers, spaces included."""
        encoding = self._bare.encode(text, add_special_tokens=False)
        return list(encoding.ids), list(encoding.offsets)

    def decode(self, ids: Any, skip_special: bool = True) -> str:
        """Returns the text of token ids; virtual ones have none."""
        known = [int(i) for i in ids if not self.virtual_ids or i < self.virtual_ids[0]]
        return str(self._bare.decode(known, skip_special_tokens=skip_special))

    def decode_token(self, index: int) -> str:
        """Returns one token, readable on its own: its text, or its raw piece when it is part of a character."""
        text = self.decode([index], skip_special=False)
        piece = self._bare.id_to_token(int(index))
        if piece is None:
            return f"<{index}>"
        if piece.startswith("▁"):
            return piece.replace("▁", " ")  # decoding one token alone would lose the space in front
        return piece if "�" in text or not text else text

    def render(self, messages: Any, tools: list[Any] | None = None, add_generation_prompt: bool = False) -> str:
        """Returns a chat as text, by the chat template; `add_generation_prompt` opens the assistant's turn at the end.

        Raises:
          UserError: there is no chat template, or it refuses these messages.
        """
        from jinja2 import TemplateError

        if not self._wrapped.chat_template:
            raise UserError(
                "the tokenizer has no chat template; set model.chat_template to a Jinja file, or train plain text "
                "(data.chat=False)"
            )
        try:
            return str(
                self._wrapped.apply_chat_template(
                    list(messages), tools=tools, tokenize=False, add_generation_prompt=add_generation_prompt
                )
            )
        except (TemplateError, TypeError, KeyError) as error:
            raise UserError(f"the chat template refuses these messages: {error}") from None

    @cached_property
    def end_of_turn(self) -> str:
        """What the template writes to end an assistant's turn, e.g. "<|im_end|>"; "" when it writes nothing."""
        turns = [{"role": "user", "content": "user"}, {"role": "assistant", "content": MARK}]
        core = self.render(turns).partition(MARK)[2].strip()
        specials = sorted((t for t in self._special if t in core), key=lambda t: (core.index(t), -len(t)))
        # Where more follows the first special token (an end of text, say), generation has already stopped there.
        return core[: core.index(specials[0]) + len(specials[0])] if specials else core

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end an answer: EOS, and the token that ends the template's assistant turn."""
        ids = [self.eos_id] if self.eos_id is not None else []
        if self._wrapped.chat_template:
            end = self.encode(self.end_of_turn) if self.end_of_turn else []
            if len(end) == 1:
                ids.append(end[0])
            elif end and self._bare.id_to_token(end[-1]) in self._special:
                ids.append(end[-1])
        return tuple(dict.fromkeys(ids))

    def save(self, folder: str | Path) -> None:
        """Writes tokenizer.json, tokenizer_config.json and chat_template.jinja, for transformers' AutoTokenizer."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._wrapped.save_pretrained(str(folder))
        config_path = folder / "tokenizer_config.json"
        config = json.loads(config_path.read_text(encoding="utf-8"))
        # transformers 5 writes a class name that version 4 does not know; both know this one.
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        text = json.dumps(config, indent=2, ensure_ascii=False, sort_keys=True)
        config_path.write_text(text + "\n", encoding="utf-8")


def _no_tokenizer(path: Path) -> str:
    if not path.is_dir():
        return f"no tokenizer at {str(path)!r}; expected a folder with tokenizer.json, or a .gguf file"
    names = sorted(p.name for p in path.iterdir())
    if "tokenizer.model" in names:
        return f"{str(path)!r} holds only a SentencePiece tokenizer.model; convert it to tokenizer.json first"
    ggufs = [name for name in names if re.search(r"\.gguf$", name, re.IGNORECASE)]
    hint = f"; did you mean the file {ggufs[0]!r} in it?" if ggufs else ""
    return f"{str(path)!r} holds no tokenizer.json; set model.tokenizer to a folder that does{hint}"
