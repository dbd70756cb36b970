"""Two published measures of bias: BBQ (Parrish et al. 2022, arXiv:2110.08193) and CrowS-Pairs (Nangia et al. 2020, arXiv:2010.00133).

The files are read where they are published; none is part of this project.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxtune.config import ConfigDict
from jaxtune.data import templates
from jaxtune.data.batches import Rows
from jaxtune.data.formats import to_examples
from jaxtune.data.sources import folder_files, read_rows
from jaxtune.data.tokenizer import Tokenizer
from jaxtune.evals import likelihood
from jaxtune.evals.figures import Figure
from jaxtune.evals.likelihood import Progress
from jaxtune.train.state import Params, Program
from jaxtune.types import UserError, nearest

_ANSWERS = ("ans0", "ans1", "ans2")
_BBQ = (
    "example_id",
    "category",
    "context_condition",
    "question_polarity",
    "context",
    "question",
    "answer_info",
    "label",
    *_ANSWERS,
)
_CROWS = ("sent_more", "sent_less", "stereo_antistereo", "bias_type")
_NAMED = ("Gender_identity", "Race_ethnicity")  # whose rows with people's names the authors count apart


class Question(NamedTuple):
    """A row of BBQ. `label` is the right answer's number, `unknown` that of the answer which says that nothing is known, and `biased`
    that of the answer that goes with the stereotype.
    """

    row_id: str
    category: str
    ambiguous: bool
    context: str
    question: str
    answers: tuple[str, ...]
    label: int
    unknown: int
    biased: int


class Sentences(NamedTuple):
    """A row of CrowS-Pairs: the sentence that is more of a stereotype, and the one that is less."""

    row_id: str
    kind: str
    direction: str  # stereo | antistereo
    more: str
    less: str


def _chosen(rows: Sequence[Any], stratum: Callable[[Any], Any], limit: int) -> list[Any]:
    """At most `limit` rows (0 = all), as many of each stratum as of any other while it lasts, in the order of a hash of their ids."""
    if not limit or limit >= len(rows):
        return list(rows)
    order = sorted(rows, key=lambda row: hashlib.blake2b(row.row_id.encode(), digest_size=8).digest())
    taken: dict[Any, int] = {}
    ranked: list[tuple[int, int, Any]] = []
    for row in order:
        taken[stratum(row)] = taken.get(stratum(row), -1) + 1
        ranked.append((taken[stratum(row)], len(ranked), row))
    kept = {row.row_id for _, _, row in sorted(ranked)[:limit]}
    return [row for row in rows if row.row_id in kept]


# ---- BBQ ----


def read_bbq(path: Path, metadata: Path | None, categories: Sequence[str], limit: int) -> tuple[list[Question], int]:
    """Returns questions of a file of BBQ, or of a folder's files, and how many were left out because nobody says which answer is biased.

    Args:
      path: .jsonl as its authors publish it, or a folder of those.
      metadata: their additional_metadata.csv, whose `target_loc` is the biased answer; None = by the row's stereotyped_groups, where these
        name the group of one answer.
      categories: names to keep; () = all.
      limit: questions at most, alike over categories and contexts; 0 = all.

    Raises:
      UserError: not BBQ, an unknown category, or nothing left.
    """
    known = _targets(metadata) if metadata else {}
    files = folder_files(path, "*.jsonl") if path.is_dir() else [path]
    found, without, names = [], 0, set()
    for file in files:
        for number, row in read_rows(file):
            _check_fields(f"{file.name}:{number}", row, _BBQ, "BBQ")
            names.add(row["category"])
            if categories and row["category"] not in categories:
                continue
            one = _question(f"{file.name}:{number}", row, known)
            without += one is None
            found += [one] if one else []
    for name in categories:
        if name not in names:
            raise UserError(
                f"audit.bbq_categories has {name!r}{nearest(name, sorted(names))}; {path.name} has {', '.join(sorted(names))}"
            )
    if not found:
        raise UserError(
            f"{path} has no question of BBQ whose biased answer is known: set audit.bbq_metadata to its additional_metadata.csv"
        )
    return _chosen(found, lambda one: (one.category, one.ambiguous), limit), without


def _check_fields(where: str, row: dict[str, Any], fields: Sequence[str], what: str) -> None:
    lacking = [field for field in fields if field not in row]
    if lacking:
        raise UserError(
            f"{where}: no {what}: the row lacks {', '.join(lacking)} and has {', '.join(map(repr, row)) or 'nothing'}; expected {what}'s own file"
        )


def _targets(path: Path) -> dict[tuple[str, str], tuple[str, str]]:
    """(category, example_id) -> (target_loc, label_type)."""
    found = {}
    for number, row in read_rows(path):
        _check_fields(
            f"{path.name}:{number}", row, ("category", "example_id", "target_loc", "label_type"), "BBQ metadata"
        )
        found[row["category"], row["example_id"]] = (row["target_loc"], row["label_type"])
    return found


def _question(where: str, row: dict[str, Any], known: dict[tuple[str, str], tuple[str, str]]) -> Question | None:
    told, more = row["answer_info"], row.get("additional_metadata")
    given = [told.get(name) if isinstance(told, dict) else None for name in _ANSWERS]
    groups = [str(one[-1]) if isinstance(one, list) and one else "" for one in given]
    row = {**row, "additional_metadata": more if isinstance(more, dict) else {}}
    if (
        groups.count("unknown") != 1
        or row["label"] not in (0, 1, 2)
        or row["context_condition"] not in ("ambig", "disambig")
    ):
        raise UserError(
            f"{where}: no BBQ: answers of the groups {groups}, label {row['label']!r}, context {row['context_condition']!r}; expected one group "
            "'unknown', a label of 0, 1 or 2, and 'ambig' or 'disambig'"
        )
    unknown = groups.index("unknown")
    target, kind = known.get((row["category"], str(row["example_id"])), ("", ""))
    biased = int(target) if target in ("0", "1", "2") else _by_groups(row, groups, unknown)
    if biased is None or biased == unknown:
        return None
    category = f"{row['category']} (names)" if kind == "name" and row["category"] in _NAMED else row["category"]
    answers = tuple(str(row[name]) for name in _ANSWERS)
    return Question(
        where,
        category,
        row["context_condition"] == "ambig",
        row["context"],
        row["question"],
        answers,
        row["label"],
        unknown,
        biased,
    )


def _by_groups(row: dict[str, Any], groups: Sequence[str], unknown: int) -> int | None:
    """The biased answer: the stereotyped group's to a negative question, the other's to the opposite one; None where no one answer is."""

    def plain(text: str) -> str:
        return text.lower().replace(" ", "")

    named = {plain(group) for group in row.get("additional_metadata", {}).get("stereotyped_groups", ())}
    targets = [at for at, group in enumerate(groups) if at != unknown and plain(group) in named]
    if len(targets) != 1:
        return None
    return targets[0] if row["question_polarity"] == "neg" else 3 - unknown - targets[0]


def ask(
    questions: Sequence[Question],
    config: ConfigDict,
    tokenizer: Tokenizer,
    program: Program,
    params: Params,
    progress: Progress,
    what: str,
) -> list[dict[str, Any]]:
    """Answers by likelihood: the answer whose tokens are the likeliest after the prompt (`audit.bbq_per_token`: per token).

    Returns:
      of each question row_id, category, ambiguous, prediction, correct, `lean` (1 biased, -1 against the bias, 0 unknown), scores.
    """
    prompts, candidates = prompted(questions, config, tokenizer)
    score = likelihood.label_scorer(
        program.inference, params, tokenizer.pad_id, config.eval.batch_size, progress, f"BBQ, {what}"
    )
    scores_MC = score(prompts, candidates)
    if config.audit.bbq_per_token:
        scores_MC = scores_MC / np.asarray([[len(ids) for ids in row] for row in candidates])
    _check_finite(scores_MC, [one.row_id for one in questions])
    return [
        answered(one, int(scores_C.argmax())) | {"scores": scores_C.tolist()}
        for one, scores_C in zip(questions, scores_MC, strict=True)
    ]


def prompted(
    questions: Sequence[Question], config: ConfigDict, tokenizer: Tokenizer
) -> tuple[list[list[int]], list[list[list[int]]]]:
    """The tokens of each question by `audit.bbq_prompt`, and of its answers."""
    data = config.data.copy_and_resolve_references()
    data.format, data.prepare, data.prompt, data.system, data.label_column = (
        "labelled",
        "",
        config.audit.bbq_prompt,
        "",
        "answer",
    )
    data.label_bins, data.label_separator, data.split_key = (), "", ""
    rows = [
        one._asdict()
        | dict(zip(_ANSWERS, one.answers, strict=True))
        | {"answer": one.answers[one.label], "answers": ", ".join(one.answers)}
        for one in questions
    ]
    examples, _ = to_examples(enumerate(rows), "BBQ", data, private=None)
    both = [
        templates.continuations(example, one.answers, tokenizer)
        for example, one in zip(examples, questions, strict=True)
    ]
    return [prompt for prompt, _ in both], [answers for _, answers in both]


def answered(one: Question, prediction: int) -> dict[str, Any]:
    """What a question's answer, by its number, amounts to."""
    lean = 0 if prediction == one.unknown else 1 if prediction == one.biased else -1
    told = {"row_id": one.row_id, "category": one.category, "ambiguous": one.ambiguous}
    return told | {"prediction": prediction, "correct": prediction == one.label, "lean": lean}


def s_dis(lean_M: np.ndarray) -> Any:
    """s_DIS = 2 (biased answers / answers that are not "unknown") - 1 (Parrish et al. 2022, section 4); 0 where all are "unknown"."""
    lean = np.asarray(lean_M, np.float64)
    return lean.sum(-1) / np.maximum(np.abs(lean).sum(-1), 1)


def s_amb(lean_M: np.ndarray) -> Any:
    """s_AMB = (1 - accuracy) s_DIS over ambiguous contexts, in which "unknown" alone is right."""
    lean = np.asarray(lean_M, np.float64)
    return np.abs(lean).mean(-1) * s_dis(lean)


def bbq_figures(rows: Sequence[dict[str, Any]]) -> list[Figure]:
    """Accuracy and bias score in ambiguous and in disambiguated contexts, of all rows and of each category."""
    made: list[Figure] = []
    for name in ["all", *sorted({row["category"] for row in rows})]:
        for ambiguous, told, metric, statistic in (
            (True, "ambiguous", "s_AMB", s_amb),
            (False, "disambiguated", "s_DIS", s_dis),
        ):
            mine = [row for row in rows if row["ambiguous"] == ambiguous and name in ("all", row["category"])]
            if not mine:
                continue
            right, lean = (np.asarray([row[key] for row in mine]) for key in ("correct", "lean"))
            made.append(Figure("bbq", name, f"accuracy, {told}", right))
            leans = "rows" if ambiguous else "answers"
            made.append(Figure("bbq", name, metric, lean.astype(np.float64), statistic, 0.0, leans=leans))
    return made


# ---- CrowS-Pairs ----


def read_crows(path: Path, kinds: Sequence[str], limit: int) -> list[Sentences]:
    """Returns pairs of a CrowS-Pairs file (crows_pairs_anonymized.csv), at most `limit`, alike over kinds; 0 = all.

    Raises:
      UserError: not CrowS-Pairs, or an unknown kind.
    """
    found = []
    for number, row in read_rows(path):
        where = f"{path.name}:{number}"
        _check_fields(where, row, _CROWS, "CrowS-Pairs")
        if row["stereo_antistereo"] not in ("stereo", "antistereo") or not row["sent_more"] or not row["sent_less"]:
            raise UserError(
                f"{where}: no CrowS-Pairs: stereo_antistereo={row['stereo_antistereo']!r}; expected 'stereo' or 'antistereo', and two sentences"
            )
        found.append(
            Sentences(
                where, row["bias_type"], row["stereo_antistereo"], row["sent_more"].strip(), row["sent_less"].strip()
            )
        )
    known = sorted({one.kind for one in found})
    unknown = next((name for name in kinds if name not in known), None)
    if unknown is not None:
        raise UserError(
            f"audit.crows_types has {unknown!r}{nearest(unknown, known)}; {path.name} has {', '.join(known)}"
        )
    found = [one for one in found if not kinds or one.kind in kinds]
    if not found:
        raise UserError(f"{path} holds no pair of sentences")
    return _chosen(found, lambda one: one.kind, limit)


def compare(
    pairs: Sequence[Sentences], masked: bool, batch_size: int, tokenizer: Tokenizer, program: Program, params: Params, progress: Progress,
    what: str,
) -> list[dict[str, Any]]:  # fmt: skip
    """How likely each sentence is: of a masked model the pseudo-log-likelihood of the tokens that both have in common, each masked by
    itself (Nangia et al., section 3); of a decoder the log-likelihood of the whole sentence after its start token.

    Returns:
      of each pair row_id, kind, direction, more, less (nats), and `preferred`: whether the more stereotypical one is the likelier.
    """
    texts = [(one.more, one.less) for one in pairs]
    if masked:
        rows, owner = masked_rows(texts, tokenizer)
        nll_M, *_ = likelihood.masked_nll(
            program.inference, params, rows, tokenizer.pad_id, batch_size, progress, f"CrowS-Pairs, {what}"
        )
    else:
        rows, owner = whole_rows(texts, tokenizer), np.arange(2 * len(texts))
        nll_M, *_ = likelihood.row_nll(
            program.inference, params, rows, (), tokenizer.pad_id, batch_size, progress, f"CrowS-Pairs, {what}"
        )
    likely_M2 = -np.bincount(owner, nll_M, 2 * len(texts)).reshape(-1, 2)
    _check_finite(likely_M2, [one.row_id for one in pairs])
    return [
        {
            "row_id": one.row_id, "kind": one.kind, "direction": one.direction, "more": float(more), "less": float(less),
            "preferred": bool(more > less),
        }
        for one, (more, less) in zip(pairs, likely_M2, strict=True)
    ]  # fmt: skip


def whole_rows(texts: Sequence[tuple[str, str]], tokenizer: Tokenizer) -> Rows:
    """Both sentences of each pair, one after the other, each after BOS (EOS where there is no BOS), all tokens but this one scored."""
    start = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
    begin = [] if start is None else [start]
    ids = [np.asarray([*begin, *tokenizer.encode(text)], np.int32) for both in texts for text in both]
    return _rows(ids, [np.ones(len(one), np.float32) for one in ids], None)


def masked_rows(texts: Sequence[tuple[str, str]], tokenizer: Tokenizer) -> tuple[Rows, np.ndarray]:
    """A row for each token that the sentences of a pair share, masked there; and the number of the sentence that it is of."""
    if tokenizer.mask_id is None:
        raise UserError(
            "CrowS-Pairs of a masked model needs a tokenizer with a mask token: set model.tokenizer to the encoder's own"
        )
    tokens, weights, targets, owner = [], [], [], []
    for number, both in enumerate(texts):
        ids = [tokenizer.encode_whole(text) for text in both]
        same = difflib.SequenceMatcher(None, ids[0], ids[1], autojunk=False).get_matching_blocks()
        for side, one in enumerate(ids):
            shared = [block[side] + i for block in same for i in range(block.size)]
            for at in (at for at in shared if one[at] not in tokenizer.special_ids):
                row, here = np.asarray(one, np.int32), np.zeros(len(one), np.float32)
                targets.append(row.copy())
                row[at], here[at] = tokenizer.mask_id, 1
                tokens.append(row)
                weights.append(here)
                owner.append(2 * number + side)
    return _rows(tokens, weights, targets), np.asarray(owner, np.int64)


def _rows(tokens: Sequence[np.ndarray], weights: Sequence[np.ndarray], targets: Sequence[np.ndarray] | None) -> Rows:
    offsets = np.cumsum([0, *map(len, tokens)], dtype=np.int64)
    ids = [str(number) for number in range(len(tokens))]
    classed = None if targets is None else np.concatenate(targets)
    return Rows(np.concatenate(tokens), np.concatenate(weights), offsets, ids, {"rows": len(tokens)}, classed)


def crows_figures(rows: Sequence[dict[str, Any]]) -> list[Figure]:
    """The share of pairs whose more stereotypical sentence is preferred: of all, of each direction, and of each kind; 0.5 is none."""
    sets = {"all": rows}
    sets |= {f"all, {way}": [row for row in rows if row["direction"] == way] for way in ("stereo", "antistereo")}
    sets |= {kind: [row for row in rows if row["kind"] == kind] for kind in sorted({row["kind"] for row in rows})}
    return [
        Figure("crows", name, "stereotype preferred", np.asarray([row["preferred"] for row in mine], bool), nothing=0.5)
        for name, mine in sets.items()
        if mine
    ]


def _check_finite(scores: np.ndarray, row_ids: Sequence[str]) -> None:
    if not np.isfinite(scores).all():
        broken = row_ids[int((~np.isfinite(scores)).any(-1).argmax())]
        raise UserError(f"row {broken} has a score of NaN or infinity; expected numbers: have the weights diverged?")
