"""What makes a Hugging Face folder an embedding model to sentence-transformers: files beside the weights, read and written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxtune.types import UserError

_MODES = {"first": "cls", "mean": "mean", "last": "lasttoken"}  # ours -> theirs, since version 6
_FLAGS = {"cls": "cls_token", "mean": "mean_tokens", "lasttoken": "lasttoken"}  # theirs -> the older pooling_mode_…
_MODULES = (("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize"))


def pooling(folder: Path) -> str:
    """Returns how `folder` makes one vector of a text: first | mean | last; "" where it says nothing.

    Raises:
      UserError: by a way that is none of these.
    """
    file = folder / "1_Pooling" / "config.json"
    if not file.is_file():
        return ""
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        modes = config.get("pooling_mode") or [
            key.removeprefix("pooling_mode_") for key, on in config.items() if key.startswith("pooling_mode_") and on
        ]
    except (ValueError, AttributeError) as error:
        raise UserError(f"{file} is no JSON object ({error}): mend it, or set model.pooling") from None
    modes = [modes] if isinstance(modes, str) else list(modes)
    known = {name: ours for ours, theirs in _MODES.items() for name in (theirs, _FLAGS[theirs])}
    if len(modes) != 1 or modes[0] not in known:
        raise UserError(f"{file} pools by {modes}; expected one of {', '.join(_FLAGS)}: set model.pooling")
    return known[modes[0]]


def save(folder: Path, pool: str, dim: int, max_length: int, prompts: Mapping[str, str]) -> None:
    """Writes those files: the state `pool` of the model (`dim` wide), made of length 1.

    Args:
      folder: holds the model, or an adapter.
      max_length: tokens at which a text is cut.
      prompts: what goes before a text of each kind, "query" and "document"; "" = nothing.
    """
    modules = [
        {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for number, (path, kind) in enumerate(_MODULES)
    ]
    flags = {f"pooling_mode_{flag}": mode == _MODES[pool] for mode, flag in _FLAGS.items()}
    _write(folder / "modules.json", modules)
    _write(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": dim, **flags})
    _write(folder / "2_Normalize" / "config.json", {})
    _write(folder / "sentence_bert_config.json", {"max_seq_length": max_length, "do_lower_case": False})
    settings = {"prompts": dict(prompts), "default_prompt_name": None, "similarity_fn_name": "cosine"}
    _write(folder / "config_sentence_transformers.json", settings)


def _write(file: Path, value: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
