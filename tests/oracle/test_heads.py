"""Masked words, labels, numbers and tags, from rows to a folder: what was trained and measured here is the same in torch."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from jaxtune import run
from jaxtune.train import rows as rows_lib
from jaxtune.train import start
from jaxtune.weights import source
from tests.conftest import WORDS
from tests.families import TASKS

pytestmark = [
    pytest.mark.oracle,
    pytest.mark.usefixtures("quick_compile"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings(
        "ignore:.*fan_in_fan_out:UserWarning"
    ),  # PEFT finds GPT-2's layout by itself, and says so
]
TAGS = ("O", "B-PET", "I-PET")
PETS = ("cat", "dog", "bird")


@pytest.fixture(scope="module")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT for masked words, with a WordPiece tokenizer that splits some words."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = sorted({letter for word in WORDS for letter in word})
    whole = [word for word in WORDS if word not in ("bird", "answer")]
    names = dict.fromkeys([*special, *letters, *(f"##{letter}" for letter in letters), *whole])
    backend = Tokenizer(models.WordPiece({name: i for i, name in enumerate(names)}, unk_token="[UNK]"))
    backend.normalizer, backend.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    folder = tmp_path_factory.mktemp("bert")
    PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    ).save_pretrained(folder)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    BertForMaskedLM(BertConfig(vocab_size=len(names), max_position_embeddings=64, **shape)).save_pretrained(folder)
    return folder


def texts(seed: int = 0, num: int = 160) -> list[list[str]]:
    rng = np.random.default_rng(seed)
    return [
        list(rng.choice(["the", "cat", "bird", "dog", "red", "sat", "on", "hill"], rng.integers(2, 9)))
        for _ in range(num)
    ]


def tags_of(words: list[str]) -> list[str]:
    """A pet's name goes on through `red`s."""
    tags: list[str] = []
    for word in words:
        goes_on = word == "red" and bool(tags) and tags[-1] != "O"
        tags.append("B-PET" if word in PETS else "I-PET" if goes_on else "O")
    return tags


@pytest.fixture
def prepared(tiny_config: ConfigDict, tiny_bert: Path, tmp_path: Path) -> Callable[..., ConfigDict]:
    """A config of a run on these rows: of the encoder tuned whole, or of the decoder by an adapter."""

    def make(rows: list[dict[str, Any]], method: str, **changes: Any) -> ConfigDict:
        config, path = tiny_config, tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        config.data.train, config.tune.method, config.data.chat = str(path), method, False
        config.model.source = str(tiny_bert) if method == "full" else config.model.source
        config.data.validation_fraction, config.eval.split, config.eval.limit = 0.2, "validation", 0
        config.train.steps, config.data.max_length, config.optim.learning_rate = 40, 48, 1e-2
        config.tracking.report, config.eval.before_after, config.eval.bootstrap_samples = True, True, 50
        config.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
        return config

    return make


def trained_in_torch(config: ConfigDict, auto: str, **base: Any) -> tuple[Any, Any]:
    """Runs `train`; returns transformers' model of what was exported, which fits to the last weight, and its tokenizer."""
    import transformers
    from peft import PeftModel

    workdir = Path(config.workdir)
    run.train(config, workdir)
    folder, auto_class = workdir / ("model" if config.tune.method == "full" else "adapter"), getattr(transformers, auto)
    if config.tune.method == "full":
        model, info = auto_class.from_pretrained(folder, output_loading_info=True)
        assert not any(info.values()), info
    else:
        model = PeftModel.from_pretrained(auto_class.from_pretrained(config.model.source, **base), folder)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(folder)


def report(config: ConfigDict) -> dict[str, Any]:
    return json.loads((Path(config.workdir) / "report.json").read_text())


def predictions(config: ConfigDict) -> list[dict[str, Any]]:
    """The held-out rows' lines, each with its own row of the data under "row"."""
    data = [json.loads(line) for line in Path(config.data.train).read_text().splitlines()]
    lines = [json.loads(line) for line in (Path(config.workdir) / "predictions.jsonl").read_text().splitlines()]
    return [{**line, "row": data[int(line["row_id"].rsplit(":", 1)[1]) - 1]} for line in lines]


def last_loss(config: ConfigDict) -> float:
    lines = [json.loads(line) for line in (Path(config.workdir) / "metrics.jsonl").read_text().splitlines()]
    return [line["eval/loss"] for line in lines if "eval/loss" in line][-1]


@pytest.mark.parametrize(("problem", "method"), [("multi_label_classification", "lora"), ("regression", "full")])
def test_labels_and_numbers(prepared: Any, problem: str, method: str) -> None:
    import torch

    several = problem != "regression"
    labels = PETS if several else ("cats",)
    rows: list[dict[str, Any]] = [{"text": " ".join(words), "is": words.count("cat") - 0.5} for words in texts()]
    if several:
        rows = [{**row, "is": [pet for pet in PETS if pet in row["text"].split()]} for row in rows]
    changes = {"model__head": "sequence", "model__problem_type": problem, "model__labels": labels}
    changes |= {"train__objective": "classify", "data__label_column": "is"}
    config = prepared(rows, method, data__format="labelled", data__prompt="{text}", **changes)
    model, tokenizer = trained_in_torch(
        config, "AutoModelForSequenceClassification", num_labels=len(labels), problem_type=problem, pad_token_id=0
    )
    found = report(config)
    for metric in ("label_macro_f1", "label_micro_f1", "subset_accuracy") if several else ("pearson", "spearman"):
        assert found["after"][metric]["value"] > max(0.6, found["before"][metric]["value"]), metric
    if method == "full":
        assert model.config.problem_type == problem
        assert list(model.config.id2label.values()) == list(labels)
        assert json.loads((Path(config.workdir) / "model" / "config.json").read_text())["num_labels"] == len(labels)
    lines = predictions(config)
    wanted = [[label in line["answer"] for label in labels] if several else [line["answer"]] for line in lines]
    for side in ("right", "left") if method == "lora" else ("right",):
        tokenizer.padding_side = side
        batch = tokenizer([line["row"]["text"] for line in lines], padding=True, return_tensors="pt")
        mask = batch["attention_mask"]
        positions = torch.clamp(mask.cumsum(-1) - 1, min=0)
        with torch.no_grad():
            out = model(
                input_ids=batch["input_ids"], attention_mask=mask, labels=torch.tensor(wanted, dtype=torch.float32),
                **({"position_ids": positions} if method == "lora" else {}),
            )  # fmt: skip
        assert float(out.loss) == pytest.approx(last_loss(config), rel=1e-4)
        scores = (torch.sigmoid(out.logits) if several else out.logits).numpy()
        ours = [
            list(line["after"]["probabilities"].values()) if several else [line["after"]["prediction"]]
            for line in lines
        ]
        np.testing.assert_allclose(scores, ours, atol=1e-4)


def test_tags(prepared: Any) -> None:
    import torch

    rows = [{"tokens": words, "tags": tags_of(words)} for words in texts()]
    config = prepared(rows, "full", model__head="token", model__labels=TAGS, train__objective="token_classify")
    model, tokenizer = trained_in_torch(config, "AutoModelForTokenClassification", num_labels=len(TAGS))
    found = report(config)
    for metric in ("entity_micro_f1", "entity_macro_f1", "tag_accuracy"):
        assert found["after"][metric]["value"] > max(0.8, found["before"][metric]["value"]), metric
    assert any("bird" in line["row"]["tokens"] for line in predictions(config)), "a word of several sub-words"
    total, count = 0.0, 0
    for line in predictions(config):
        words = line["row"]["tokens"]
        batch = tokenizer(words, is_split_into_words=True, return_tensors="pt")
        of, ids = batch.word_ids(), batch["input_ids"]
        first = [of.index(word) for word in range(len(words))]  # by transformers' own alignment
        with torch.no_grad():
            scores = model(input_ids=ids).logits[0, first]
        assert [TAGS[i] for i in scores.argmax(-1)] == line["after"]["prediction"]
        targets = torch.tensor([TAGS.index(tag) for tag in line["answer"]])
        total += float(torch.nn.functional.cross_entropy(scores, targets, reduction="sum"))
        count += len(words)
    assert total / count == pytest.approx(last_loss(config), rel=1e-4)


def test_masked_words(prepared: Any) -> None:
    import torch

    rows = [{"text": " ".join(words + words)} for words in texts()]  # what is masked stands in the other half
    config = prepared(rows, "full", train__objective="mlm", data__mask_fraction=0.2)
    model, _ = trained_in_torch(config, "AutoModelForMaskedLM")
    found = report(config)
    assert found["after"]["masked_perplexity"]["value"] < 0.5 * found["before"]["masked_perplexity"]["value"]
    assert found["after"]["masked_accuracy"]["value"] > found["before"]["masked_accuracy"]["value"]
    found_model = source.find(config)
    tokenizer = source.find_tokenizer(config, found_model)
    reader = start.reader(config, found_model, tokenizer)
    held = rows_lib.read(config, tokenizer, lambda items, total, label: items, reader).validation
    lines = {line["row_id"]: line["after"] for line in predictions(config)}
    total, count = 0.0, 0
    for row, name in enumerate(held.row_ids):
        part = slice(held.offsets[row], held.offsets[row + 1])
        labels = np.where(held.weights[part] != 0, held.targets[part], -100)
        with torch.no_grad():
            out = model(
                input_ids=torch.tensor(held.tokens[part])[None], labels=torch.tensor(labels, dtype=torch.long)[None]
            )
        num = int((labels >= 0).sum())
        assert lines[name]["num_tokens"] == num
        assert lines[name]["nll_sum"] == pytest.approx(float(out.loss) * num, rel=1e-3, abs=1e-4)
        total, count = total + float(out.loss) * num, count + num
    assert total / count == pytest.approx(last_loss(config), rel=1e-4)


ADAPTED = [
    "BertForSequenceClassification", "RobertaForSequenceClassification", "DistilBertForSequenceClassification",
    "ModernBertForTokenClassification", "BertForMaskedLM", "GPT2ForSequenceClassification", "LlamaForTokenClassification",
    "LlamaModel",
]  # fmt: skip


@pytest.mark.parametrize("name", ADAPTED)
def test_an_adapter_and_its_head_go_out_to_peft_and_back(
    name: str, tmp_path: Path, ours: Any, config_of: Any, apart: Any
) -> None:
    import torch
    import transformers
    from peft import PeftModel

    torch.manual_seed(0)
    torch.set_num_threads(1)
    model_class, ids = getattr(transformers, name), np.random.default_rng(0).integers(5, 90, (2, 12))
    settings = {k: v for k, v in TASKS[name].items() if k not in ("model_type", "architectures")}
    model = model_class(model_class.config_class(**settings)).eval()
    model.save_pretrained(tmp_path / "model")
    objective = next((o for o, (task, _) in start.HEADS.items() if name.endswith(task)), "sft")
    head = {"model.head": "lm"} if objective == "mlm" else {}
    changes = {"tune.targets": r"layers\..*", "tune.rank": 3, "train.objective": objective, **head}
    mine, rng = ours(config_of(tmp_path / "model", changes)), np.random.default_rng(2)
    params = {p: jnp.asarray(rng.normal(0, 0.2, v.shape), v.dtype) for p, v in mine.program.state.params.items()}
    has_head = any(path.startswith("task_head.") for path in params)
    assert has_head == (not name.endswith("Model"))
    mine.config.workdir = str(tmp_path / "run")
    folder = start.write_result(mine.config, tmp_path / "run", mine.model, None, mine.program, params, mine.frozen)
    expected = mine.logits(ids, params={**mine.params, **params})
    theirs = PeftModel.from_pretrained(model, folder).eval()
    with torch.no_grad():
        out = theirs(input_ids=torch.as_tensor(ids))
    found = (out.logits if "logits" in out else out.last_hidden_state).numpy()
    pool = mine.program.model_config.head.pool if "logits" in out else ""
    assert apart(expected[:, 0 if pool == "first" else -1] if pool else expected, found, name) <= 1e-4
    again = ours(config_of(tmp_path / "model", {**changes, "tune.adapter": str(folder)}))
    for path, value in params.items():
        np.testing.assert_array_equal(again.state.params[path], value, err_msg=path)
    modules = json.loads((folder / "adapter_config.json").read_text())["modules_to_save"]
    assert bool(modules) == has_head
