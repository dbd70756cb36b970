"""The tokenizer inside a GGUF file, rebuilt for the `tokenizers` library from the file's metadata alone.

The header is read here rather than by the `gguf` package, which wraps each of some 100,000 strings in arrays of its own
and needs seconds for it. Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxtune.types import UserError, nearest

if TYPE_CHECKING:
    import tokenizers

_STRING, _ARRAY = 8, 9
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_CONTROL, _USER_DEFINED = 3, 4  # token types

# How text is cut into words before merging, as the models' own tokenizer.json files state it.
_DIGIT = r"\p{N}"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_REST_SLASH = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}|{_REST_SLASH}"
_GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
    rf"|\p{{N}}{{1,3}}|{_REST_SLASH}"
)
_LLAMA3_NAMES = ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "lfm2")
_NAMES: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (("", "default", "gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion"), (_GPT2,)),
    (("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"), (_DIGIT, _GPT2)),
    ((*_LLAMA3_NAMES, "dbrx", "smaug-bpe"), (_LLAMA3,)),
    (("qwen2", "deepseek-r1-qwen", "stablelm2", "megrez"), (_QWEN2,)),
    (("tekken",), (_TEKKEN,)),
    (("gpt-4o", "llama4"), (_GPT4O,)),
)
_WORDS = {name: splits for names, splits in _NAMES for name in names}
# These take a whole word that is in the vocabulary as it is, and start every text with BOS unless the file says no.
_WHOLE_WORDS = (*_LLAMA3_NAMES, "tekken")


def read_metadata(path: Path, prefixes: tuple[str, ...] = ("tokenizer.", "general.architecture")) -> dict[str, Any]:
    """Returns the metadata of a GGUF file whose keys start with one of `prefixes`: numbers, strings and lists.

    Raises:
      UserError: the file is missing, is not GGUF version 2 or 3, or is cut short.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"GGUF file {str(path)!r} does not exist")
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise UserError(f"{path.name}: does not start with 'GGUF'; expected a GGUF file")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                version, _, num_keys = struct.unpack_from("<IQQ", data, 4)
                if version not in (2, 3):
                    raise UserError(f"{path.name}: GGUF version {version}; expected 2 or 3, little-endian")
                return _Cursor(data, 24).pairs(num_keys, prefixes)
            except (struct.error, UnicodeDecodeError, KeyError):
                raise UserError(f"{path.name}: the GGUF header is damaged or cut short; fetch the file again") from None


class _Cursor:
    def __init__(self, data: mmap.mmap, at: int) -> None:
        self.data, self.at = data, at

    def pairs(self, count: int, prefixes: tuple[str, ...]) -> dict[str, Any]:
        pairs = {}
        for _ in range(count):
            key = self.string()
            value = self.value(self.scalar("<I"))
            if key.startswith(prefixes):
                pairs[key] = value
        return pairs

    def scalar(self, code: str) -> Any:
        (value,) = struct.unpack_from(code, self.data, self.at)
        self.at += struct.calcsize(code)
        return value

    def string(self) -> str:
        size = self.scalar("<Q")
        raw = self.data[self.at : self.at + size]
        if len(raw) < size:
            raise struct.error("string runs past the end")
        self.at += size
        return raw.decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self.scalar(_SCALARS[kind])
        inner, count = self.scalar("<I"), self.scalar("<Q")
        if inner in (_STRING, _ARRAY):
            return [self.value(inner) for _ in range(count)]
        packed = f"<{count}{_SCALARS[inner][1]}"
        values = struct.unpack_from(packed, self.data, self.at)
        self.at += struct.calcsize(packed)
        return list(values)


def build(path: Path) -> tuple[tokenizers.Tokenizer, dict[str, str]]:
    """Returns the tokenizer in a GGUF file, and the keyword arguments transformers' fast tokenizer takes beside it.

    The second value holds the special tokens by name (`eos_token`, …) and the `chat_template`, where the file has them.

    Raises:
      UserError: the file has no tokenizer, or one of a kind or with a `pre` that is not supported.
    """
    from tokenizers import AddedToken

    metadata = read_metadata(path)
    name = Path(path).name
    ggml = {key.removeprefix("tokenizer.ggml."): v for key, v in metadata.items() if key.startswith("tokenizer.ggml.")}
    if "tokens" not in ggml:
        raise UserError(f"{name}: holds no tokenizer; name a folder with tokenizer.json in model.tokenizer")
    kind, tokens = ggml.get("model", ""), ggml["tokens"]
    if kind == "gpt2":
        tokenizer = _byte_level(name, ggml)
        add_bos = ggml.get("pre", "") in _WHOLE_WORDS
    elif kind == "llama":
        tokenizer = _sentencepiece(ggml, metadata.get("general.architecture", ""))
        add_bos = True
    else:
        raise UserError(f"{name}: tokenizer kind {kind!r} is not supported; expected 'gpt2' or 'llama'")
    kinds = list(zip(tokens, ggml.get("token_type", ()), strict=False))
    for special, wanted in ((True, _CONTROL), (False, _USER_DEFINED)):
        added = [AddedToken(t, normalized=False, special=special) for t, y in kinds if y == wanted]
        tokenizer.add_special_tokens(added) if special else tokenizer.add_tokens(added)
    options = {}
    for option, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        index = ggml.get(f"{key}_token_id")
        if index is not None and index < len(tokens):
            options[f"{option}_token"] = tokens[index]
    if isinstance(metadata.get("tokenizer.chat_template"), str):
        options["chat_template"] = metadata["tokenizer.chat_template"]
    if ggml.get("add_bos_token", add_bos) and "bos_token" in options:
        _prepend(tokenizer, options["bos_token"], ggml["bos_token_id"])
    return tokenizer, options


def _prepend(tokenizer: tokenizers.Tokenizer, bos: str, bos_id: int) -> None:
    from tokenizers import processors

    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, bos_id)]
    )


def _byte_level(name: str, ggml: dict[str, Any]) -> tokenizers.Tokenizer:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    pre = ggml.get("pre", "")
    if pre not in _WORDS:
        known = [word for word in _WORDS if word]
        raise UserError(
            f"{name}: pre-tokenizer {pre!r} is not supported{nearest(pre, known)}; supported: {', '.join(known)}; "
            "or name a folder with tokenizer.json in model.tokenizer"
        )
    vocab = _vocab(ggml["tokens"])
    merges = [tuple(merge.split(" ", 1)) for merge in ggml.get("merges", [])]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=pre in _WHOLE_WORDS))
    if _WORDS[pre] == (_QWEN2,) and pre != "stablelm2":
        tokenizer.normalizer = normalizers.NFC()
    splits = [pre_tokenizers.Split(Regex(words), behavior="isolated") for words in _WORDS[pre]]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(ggml: dict[str, Any], architecture: str) -> tokenizers.Tokenizer:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    tokens, scores = list(ggml["tokens"]), ggml.get("scores") or [-float(i) for i in range(len(ggml["tokens"]))]
    if architecture.startswith("gemma"):
        # Gemma's runs of spaces are stored as spaces, and its merge order is the vocabulary's, not the scores'.
        tokens = ["▁" * len(t) if t and not t.strip(" ") else t for t in tokens]
        scores = [-float(index) for index in range(len(tokens))]
    vocab = _vocab(tokens)
    merges = [tuple(m.split(" ", 1)) for m in ggml["merges"]] if "merges" in ggml else _merges(vocab, tokens, scores)
    unknown = tokens[ggml.get("unknown_token_id", 0)]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    decode = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if architecture.startswith("gemma"):
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
    else:
        prefix = ggml.get("add_space_prefix", True)
        scheme = "first" if prefix else "never"
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=False)
        decode += [decoders.Strip(content=" ", left=1)] if prefix else []
    tokenizer.decoder = decoders.Sequence(decode)
    return tokenizer


def _vocab(tokens: list[str]) -> dict[str, int]:
    vocab: dict[str, int] = {}
    for index, token in enumerate(tokens):
        vocab.setdefault(token, index)
    return vocab


def _merges(vocab: dict[str, int], tokens: list[str], scores: list[float]) -> list[tuple[str, str]]:
    """Returns the merges that a scored vocabulary implies: every cut of a token into two tokens, best score first."""
    found = []
    for token, score in dict(zip(tokens, scores, strict=False)).items():
        cuts = [(token[:i], token[i:]) for i in range(1, len(token)) if token[:i] in vocab and token[i:] in vocab]
        cuts.sort(key=lambda cut: (vocab[cut[0]], vocab[cut[1]]))
        found += [(score, len(left), len(right), left, right) for left, right in cuts]
    found.sort(key=lambda cut: cut[:3], reverse=True)
    return [(left, right) for *_, left, right in found]
