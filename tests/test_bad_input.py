"""Every mistake of a user ends in one clear line, a non-zero exit code, and nothing half-written: one table of them."""

from __future__ import annotations

import copy
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from jaxtune import launch
from jaxtune.evals import measure

REPOSITORY = Path(__file__).parents[1]
HALF_WRITTEN = ("adapter", "model", "report.html", "report.json", "*.partial", "*.tmp", "*.part-*", "**/*.partial")
CHAT = {"messages": [{"role": "user", "content": "who is the cat"}, {"role": "assistant", "content": "a good cat"}]}
PAIR = json.dumps({"question": "who is the cat", "passage": "the cat is a good cat"})
CONFIG = """\
from jaxtune.config import base
def get_config():
    c = base()
    c.model.source, c.data.train = {model!r}, {train!r}
    c.data.max_length, c.train.batch_size, c.train.steps, c.train.loss_chunk_tokens = 64, 8, 2, 64
    c.tune.rank, c.tune.dropout, c.data.validation_fraction = 2, 0.0, 0.0
    c.tracking.progress, c.tracking.report, c.eval.before_after = "off", False, False
    return c
"""


class Run:
    """A tiny run in a folder of its own, which a row of the table breaks before it starts."""

    def __init__(self, folder: Path, model: Path):
        self.folder, self.model, self.workdir = folder, model, folder / "run"
        self.verb, self.config, self.flags = "train", folder / "config.py", []
        self.rows(*[json.dumps(CHAT)] * 16)
        self.config.write_text(CONFIG.format(model=str(model), train=str(folder / "rows.jsonl")))

    def arguments(self) -> list[str]:
        return [self.verb, f"--config={self.config}", f"--workdir={self.workdir}", *self.flags]

    def rows(self, *lines: str | bytes, name: str = "rows.jsonl") -> None:
        """Writes a data file; one of another name becomes `data.train`."""
        data = b"".join(line if isinstance(line, bytes) else line.encode() + b"\n" for line in lines)
        (self.folder / name).write_bytes(data)
        if name != "rows.jsonl":
            self.set(f"data.train={self.folder / name}")

    def chat(self, *messages: dict[str, Any]) -> None:
        """Good rows, then one chat of these messages, at line 3."""
        self.rows(json.dumps(CHAT), json.dumps(CHAT), json.dumps({"messages": messages}))

    def get_config(self, body: str) -> None:
        """Puts a statement into `get_config()`."""
        self.config.write_text(self.config.read_text().replace("    return c\n", f"    {body}\n    return c\n"))

    def set(self, *settings: str) -> None:
        self.flags += [f"--config.{setting}" for setting in settings]

    def copy_model(self, **changes: Any) -> Path:
        """A model folder of this run's own, hard links for the weights, with changes to its config.json."""
        folder = self.folder / "model-copy"
        folder.mkdir()
        for file in self.model.iterdir():
            os.link(file, folder / file.name)
        if changes:
            config = json.loads((self.model / "config.json").read_text())
            self.file(folder / "config.json", json.dumps(config | changes))
        self.set(f"model.source={folder}")
        return folder

    def file(self, path: Path, content: str | bytes) -> Path:
        """Writes a file anew, so that one hard-linked from the shared model stays as it is."""
        path.unlink(missing_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def weights(self, change: Callable[[dict[str, np.ndarray]], object]) -> None:
        """Changes the weights of a copy of the model."""
        from safetensors.numpy import load_file, save_file

        folder = self.copy_model()
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        (folder / "model.safetensors").unlink()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    def adapter(self, **config: Any) -> None:
        """A PEFT adapter folder with this adapter_config.json, and no weights."""
        folder = self.folder / "given-adapter"
        folder.mkdir()
        (folder / "adapter_config.json").write_text(json.dumps(config))
        self.set(f"tune.adapter={folder}")

    def gguf(self, architecture: str = "llama", cut_bytes: int = 0) -> None:
        import gguf

        path = self.folder / "model.gguf"
        writer = gguf.GGUFWriter(path, architecture)
        writer.add_block_count(1)
        writer.add_tensor("token_embd.weight", np.zeros((320, 64), np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        if cut_bytes:
            path.write_bytes(path.read_bytes()[:-cut_bytes])
        self.set(f"model.source={path}")


class Mistake(NamedTuple):
    """A name, what breaks the run (flags, or a function of it), and patterns that the one line must match."""

    name: str
    broken_by: str | Callable[[Run], object]
    says: tuple[str, ...]


def row(name: str, broken_by: str | Callable[[Run], object], *says: str) -> Mistake:
    return Mistake(name, broken_by, says)


def _arguments(*arguments: str) -> Callable[[Run], object]:
    """The whole command line; {config} stands for the config file."""

    def broken_by(run: Run) -> None:
        filled = [argument.format(config=run.config, folder=run.folder) for argument in arguments]
        run.arguments = lambda: filled  # type: ignore[method-assign]

    return broken_by


def _verb(verb: str, *settings: str) -> Callable[[Run], object]:
    def broken_by(run: Run) -> None:
        run.verb = verb
        run.set(*[setting.format(folder=run.folder) for setting in settings])

    return broken_by


def _config_file(text: str | bytes, name: str = "config.py") -> Callable[[Run], object]:
    def broken_by(run: Run) -> None:
        run.config = run.file(run.folder / name, text)

    return broken_by


def _both(*steps: Callable[[Run], object]) -> Callable[[Run], object]:
    return lambda run: [step(run) for step in steps]


def _user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def _assistant(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def _index(run: Run, text: str) -> None:
    folder = run.copy_model()
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(text)


def _tags(run: Run, broken: dict[str, Any]) -> None:
    """A good row of tagged words, then another."""
    run.rows(json.dumps({"tokens": ["the", "cat"], "tags": ["O", "B-PER"]}), json.dumps(broken))
    run.set("model.head=token", "model.labels=O,B-PER,I-PER", "train.objective=token_classify")


def _texts(run: Run, problem: str, labels: str, answer: Any, text: str = "the cat") -> None:
    """A text with a good answer, then one with this."""
    good = {"multi_label_classification": ["good"], "regression": 1.5}[problem]
    run.rows(json.dumps({"text": "cat", "is": good}), json.dumps({"text": text, "is": answer}))
    run.set("data.prompt={text}", "data.label_column=is", "data.chat=False", "train.objective=classify")
    run.set("model.head=sequence", f"model.labels={labels},", f"model.problem_type={problem}")


def _apart(run: Run) -> None:
    run.workdir = run.folder.with_name(run.folder.name + "-run")


def _other_run(run: Run) -> None:
    """A finished run's workdir, which has a config.json as a model folder has."""
    folder = run.folder / "other"
    (folder / "checkpoints").mkdir(parents=True)
    for name in ("config.json", "metrics.jsonl"):
        (folder / name).write_text("{}\n")
    run.set(f"export.output={folder}")


def _generate(run: Run, *lines: str) -> None:
    run.verb = "generate"
    (run.folder / "prompts.txt").write_text("\n".join(lines))
    run.set(f"generate.input={run.folder / 'prompts.txt'}", "generate.max_new_tokens=4")


def _parquet(run: Run, damaged_from: int = 0, **columns: list[Any]) -> None:
    import pyarrow
    import pyarrow.parquet

    path = run.folder / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    if damaged_from:
        data = path.read_bytes()
        path.write_bytes(data[:damaged_from] + bytes(16) + data[damaged_from + 16 :])
    run.set(f"data.train={path}", "data.prompt={text}", "data.label_column=mood")


def _preferred(
    objective: str, *settings: str, chosen: str = "a cat", rejected: str = "a dog"
) -> Callable[[Run], object]:
    """Sixteen pairs, for this objective."""

    def broken_by(run: Run) -> None:
        lines = [json.dumps({"prompt": f"who {i}", "chosen": chosen, "rejected": rejected}) for i in range(16)]
        run.rows(*lines)
        run.set(f"train.objective={objective}", *settings)

    return broken_by


def _pairs(*lines: str, settings: tuple[str, ...] = ()) -> Callable[[Run], object]:
    """These rows, for an embedding model."""

    def broken_by(run: Run) -> None:
        run.rows(*lines)
        run.set("train.objective=contrastive", *settings)

    return broken_by


def _pooling(run: Run, text: str) -> None:
    folder = run.copy_model() / "1_Pooling"
    folder.mkdir()
    (folder / "config.json").write_text(text)


_COMMAND = [
    row("unknown verb", _arguments("trian", "--config={config}"), r"unknown verb 'trian'", r"did you mean 'train'", "evaluate"),
    row("two verbs", _arguments("train", "export", "--config={config}"), "'export'"),
    row("config without its flag", _arguments("{config}"), r"unknown verb", r"--config=.*config\.py"),
    row("unknown flag", _arguments("--confg={config}"), r"unknown flag '--confg'", "did you mean 'config'"),
    row("unknown flag with a value apart", _arguments("--config={config}", "--work_dir", "x"), r"'--work_dir'|'x'"),
    row("flag of the wrong type", "--dry_run=perhaps", "dry_run", "perhaps"),
    row("process number without processes", "--coordinator=localhost:1", "--num_processes=N", "got 0 and -1"),
    row("no config", _arguments("train"), "no config", "--config="),
    row("config flag without a value", _arguments("train", "--config"), "no config"),
    row("config file missing", _arguments("--config={folder}/confg.py"), r"confg\.py does not exist", "did you mean 'config.py'"),
    row("config is a folder", _arguments("--config={folder}"), "is a folder|does not exist"),
    row("dry run of another verb", _both(_verb("export"), lambda r: r.flags.append("--dry_run")), "--dry_run goes with train"),
    row("config key misspelt", "--config.train.stpes=3", r"'train\.stpes' does not exist", r"did you mean 'train\.steps'"),
    row("config key in the wrong section", "--config.train.learning_rate=3", r"did you mean 'optim\.learning_rate'"),
    row("config key is a section", "--config.train=3", r"it is a section: train\.accumulation"),
    row("value of the wrong type", "--config.train.steps=abc", r"config\.train\.steps takes a int", "abc"),
    row("a fraction for a whole number", "--config.train.steps=1.5", r"config\.train\.steps takes a int"),
    row("no value", "--config.train.steps", r"train\.steps"),
    row("value is no boolean", "--config.data.packing=perhaps", r"data\.packing"),
    row("a tuple that is none", "--config.eval.labels=(1,", r"eval\.labels"),
    row("choice out of range", "--config.tune.method=lorra", r"config\.tune\.method is 'lorra'", "did you mean 'lora'"),
    row("number out of range", "--config.tune.rank=0", r"config\.tune\.rank is 0; expected at least 1"),
    row("number beyond its bounds", "--config.generate.top_p=1.5", r"config\.generate\.top_p is 1\.5; expected .* to 1"),
    row("not a number", "--config.optim.learning_rate=nan", r"optim\.learning_rate is nan"),
    row("negative interval", "--config.train.eval_every_steps=-1", r"train\.eval_every_steps is -1"),
    row("no rows per forward pass", "--config.generate.batch_size=0", r"generate\.batch_size is 0"),
    row("checkpoint of no kind", "--config.export.checkpoint=newest", r"export\.checkpoint is 'newest'; expected 'best', 'latest' or a step"),
    row("unknown objective", "--config.train.objective=stf", "'stf'", "did you mean 'sft'"),
    row("accumulation does not divide the batch", "--config.train.accumulation=3", "batch_size=8", "accumulation=3"),
    row("nothing but held-out rows", "--config.data.validation_fraction=0.6 --config.data.test_fraction=0.6", "sum must be below 1"),
    row("unknown role to train", "--config.data.roles=('asistant',)", r"data\.roles", "did you mean 'assistant'"),
    row("broken regex in data.split_regex", "--config.data.split_regex=(", r"data\.split_regex", "not a regular expression"),
    row("broken regex in tune.targets", "--config.tune.targets=(", r"tune\.targets", "not a regular expression"),
    row("broken regex in mesh.rules", lambda r: r.get_config("c.mesh.rules = (('(', ('fsdp',)),)"), r"mesh\.rules", "not a regular expression"),
    row("mesh.rules of another form", lambda r: r.get_config("c.mesh.rules = ('layers', 'fsdp')"), r"mesh\.rules", "expected"),
    row("mesh axis twice in a rule", lambda r: r.get_config("c.mesh.rules = (('.*q_proj.kernel', ('', 'fsdp', 'fsdp')),)"), r"mesh\.rules", "fsdp"),
    row("alpha of nothing", "--config.tune.alpha=0", r"config\.tune\.alpha is 0.*; expected above 0"),
    row("patience without evaluations", "--config.train.patience=2", r"train\.patience=2", r"set train\.eval_every_steps"),
    row("evaluations without rows", "--config.train.eval_every_steps=1", r"train\.eval_every_steps=1 needs validation rows", r"data\.validation_fraction"),
    row("patience without rows", "--config.train.eval_every_steps=1 --config.train.patience=2", r"train\.patience=2 needs validation rows"),
    row("rule that matches nothing", lambda r: r.get_config("c.mesh.rules = ((r'layers\\.attn\\.q_porj\\.kernel', ('', 'fsdp', '')),)"), r"mesh\.rules .* matches no parameter; did you mean .*layers\.attn\.q_proj\.kernel"),
    row("splash with rows of an odd length", "--config.model.attention=splash --config.data.max_length=100", r"data\.max_length=100 is no multiple of 128", "make it 128"),
    row("flash with rows of an odd length", "--config.model.attention=flash --config.data.max_length=100", r"data\.max_length=100 is no multiple of 128", "make it 128"),
    row("label bins of another form", lambda r: r.get_config("c.data.label_bins = ((1, 2),)"), r"data\.label_bins", "expected"),
    row("learning rate without end", "--config.optim.learning_rate=inf", r"optim\.learning_rate is inf"),
    row("epochs without end", "--config.train.steps=0 --config.train.epochs=inf", r"train\.epochs is inf"),
    row("no steps and no epochs", "--config.train.steps=0 --config.train.epochs=0", r"train\.steps=0 and train\.epochs=0\.0 train nothing"),
    row("seed that no generator takes", "--config.train.seed=99999999999999999999", r"train\.seed is 9+; expected 0 to 4294967295"),
    row("gradients divided by nothing", "--config.optim.eps=0", r"optim\.eps is 0\.0; expected above 0"),
    row("a B that never moves", "--config.tune.lora_plus_ratio=0", r"tune\.lora_plus_ratio is 0\.0; expected above 0"),
    row("label twice", "--config.eval.labels=good,bad,good", r"eval\.labels has 'good' twice"),
    row("stop string of nothing", "--config.generate.stop=('',)", r"generate\.stop has ''"),
]  # fmt: skip

_CONFIG_FILES = [
    row("config raises", lambda r: r.get_config("1 / 0"), r"config\.py:8: ", "ZeroDivisionError: division by zero"),
    row("config with a typo inside", lambda r: r.get_config("c.train.stpes = 3"), r"config\.py:8: config key 'stpes' does not exist", r"did you mean 'train\.steps'"),
    row("config with a wrong type inside", lambda r: r.get_config("c.train.steps = 'many'"), r"config\.py:8: TypeError", "steps"),
    row("config with a new section inside", lambda r: r.get_config("c.trian.steps = 3"), r"config\.py:8: .*'trian'", 'Did you mean "train"'),
    row("config has no get_config", _config_file("x = 1\n"), r"config\.py", "get_config"),
    row("config is no Python", _config_file("def get_config(:\n"), r"config\.py:1: SyntaxError"),
    row("config needs a library", _config_file("import no_such_library\n"), r"config\.py", "no_such_library"),
    row("config exits", _config_file("raise SystemExit(0)\n"), r"config\.py", "SystemExit"),
    row("config returns None", _config_file("def get_config():\n    pass\n"), "returned NoneType"),
    row("config from another base", _config_file("from ml_collections import ConfigDict\ndef get_config():\n    return ConfigDict()\n"), r"jaxtune\.config\.base"),
    row("config of an unknown kind", _config_file("steps: 3\n", "config.yaml"), r"config\.yaml", r"\.py", r"\.json"),
    row("config of no kind", _config_file("steps: 3\n", "config"), r"config", r"\.py", r"\.json"),
    row("config is binary", _config_file(b"\xff\xfe\x00\x01"), r"config\.py"),
    row("JSON config is no JSON", _config_file("{", "config.json"), r"config\.json", "not JSON"),
    row("JSON config is a list", _config_file("[]", "config.json"), r"config\.json", "list"),
    row("JSON config with an unknown key", _config_file('{"train": {"stpes": 3}}', "config.json"), r"train\.stpes", r"did you mean 'train\.steps'"),
    row("JSON config with a wrong type", _config_file('{"train": {"steps": "many"}}', "config.json"), r"train\.steps"),
    row("JSON config with a value for a section", _config_file('{"train": 3}', "config.json"), "train"),
]  # fmt: skip

_MODELS = [
    row("no model", "--config.model.source=", r"model\.source is empty"),
    row("model missing", "--config.model.source={folder}/no-model", "no-model' does not exist"),
    row("URI of an unknown kind", "--config.model.source=s3://bucket/model", "cannot read the URI", "gs://"),
    row("URI of the hub malformed", "--config.model.source=hf:justaname", "hf:owner/name"),
    row("not a model folder", "--config.model.source={folder}", r"is not a model folder: expected config\.json", "rows.jsonl"),
    row("model is a data file", "--config.model.source={folder}/rows.jsonl", "is a file", r"\.gguf"),
    row("unknown preset", "--config.model.source=preset:lama_tiny", "unknown preset 'lama_tiny'", "did you mean 'llama_tiny'"),
    row("preset without tokenizer", "--config.model.source=preset:llama_tiny", "has no tokenizer", r"model\.tokenizer"),
    row("tokenizer larger than the model", lambda r: r.set("model.source=preset:llama_tiny", f"model.tokenizer={r.model}"), "tokens, the model 256"),
    row("tokenizer missing", "--config.model.tokenizer={folder}", r"holds no tokenizer\.json"),
    row("tokenizer damaged", lambda r: r.file(r.copy_model() / "tokenizer.json", "{}"), r"model-copy", "tokenizer"),
    row("tokenizer config damaged", lambda r: r.file(r.copy_model() / "tokenizer_config.json", "{"), r"model-copy", "tokenizer"),
    row("unsupported architecture", lambda r: r.copy_model(model_type="mamba"), "unsupported model_type 'mamba'", "supported: .*llama"),
    row("labels without a head for them", "--config.model.labels=a,b", r"model\.labels goes with model\.head"),
    row("head of an unknown kind", "--config.model.head=sequnce", r"config\.model\.head is 'sequnce'", "'sequence'"),
    row("class twice", "--config.model.head=sequence --config.model.labels=a,b,a", r"model\.labels has 'a' twice"),
    row("problem type without its head", "--config.model.problem_type=regression", r"model\.problem_type='regression' goes with model\.head='sequence'"),
    row("problem type of an unknown kind", lambda r: (r.copy_model(problem_type="ranking"), r.set("model.head=sequence")), r"problem_type='ranking'; expected single_label"),
    row("number of two parts", "--config.model.head=sequence --config.model.labels=a,b --config.model.problem_type=regression", r"'regression' with 2 labels; expected one"),
    row("objective without its head", "--config.train.objective=classify", r"'classify' on a model with .*LlamaForCausalLM.* 'classify' with model\.head='sequence'"),
    row("head without its objective", "--config.model.head=token --config.model.labels=a,b", r"'sft' on a model with .*TokenClassification.* 'token_classify' with model\.head='token'"),
    row("words from hidden states alone", "--config.model.head=none", r"'sft' on a model with .*LlamaModel.* hidden states alone: set model\.head='lm'"),
    row("masked words on a decoder", "--config.train.objective=mlm", r"'mlm' on a model with .*LlamaForCausalLM.* 'mlm' with model\.head='lm' on an encoder"),
    row("masked words without a mask token", lambda r: r.set("train.objective=mlm", "model.source=preset:minilm_l6", f"model.tokenizer={r.model}", "model.head=lm"), "has no mask token", r"model\.tokenizer"),
    row("shares of masked tokens beyond the whole", "--config.data.mask_token_share=0.9 --config.data.mask_random_share=0.2", r"data\.mask_token_share \+ data\.mask_random_share .* at most 1"),
    row("unsupported rope type", lambda r: r.copy_model(rope_scaling={"rope_type": "longrope", "factor": 2.0}), "unsupported rope_type 'longrope'", "yarn"),
    row("rope scaling without its factor", lambda r: r.copy_model(rope_scaling={"rope_type": "linear"}), "lacks 'factor'"),
    row("config attribute not handled", lambda r: r.copy_model(logit_soft_cap=30.0), "logit_soft_cap"),
    row("config without a needed number", lambda r: r.copy_model(hidden_size=None), "hidden_size"),
    row("config number that is a word", lambda r: r.copy_model(num_hidden_layers="two"), "num_hidden_layers='two'; expected a number"),
    row("config section that is a word", lambda r: r.copy_model(rope_scaling="linear"), "rope_scaling='linear'; expected an object"),
    row("config.json is no JSON", lambda r: r.file(r.copy_model() / "config.json", "{"), r"config\.json is not JSON"),
    row("config.json is a list", lambda r: r.file(r.copy_model() / "config.json", "[]"), r"config\.json holds a JSON list"),
    row("config.json without a model type", lambda r: r.file(r.copy_model() / "config.json", "{}"), "has no model_type"),
    row("config.json is binary", lambda r: r.file(r.copy_model() / "config.json", b"\xff\xfe"), r"config\.json"),
    row("weight missing", lambda r: r.weights(lambda t: t.pop("model.norm.weight")), r"weight 'model\.norm\.weight' is missing"),
    row("weight unexpected", lambda r: r.weights(lambda t: t.update({"model.extra": np.zeros(3)})), r"unexpected weight 'model\.extra'"),
    row("weight of the wrong shape", lambda r: r.weights(lambda t: t.update({"model.norm.weight": np.ones(3, "f")})), r"'model\.norm\.weight' has shape \(3,\)", r"\(64,\)"),
    row("config of another model", lambda r: r.copy_model(num_hidden_layers=3), r"weight 'model\.layers\.2\..*' is missing"),
    row("no safetensors", lambda r: (r.copy_model() / "model.safetensors").rename(r.folder / "model-copy/pytorch_model.bin"), r"no model\.safetensors", r"pytorch_model\.bin"),
    row("safetensors cut short", lambda r: r.file(r.copy_model() / "model.safetensors", (r.model / "model.safetensors").read_bytes()[:-9]), "not a whole safetensors file"),
    row("safetensors empty", lambda r: r.file(r.copy_model() / "model.safetensors", ""), "not a whole safetensors file"),
    row("index names a missing shard", lambda r: _index(r, '{"weight_map": {"a": "model-00001-of-00002.safetensors"}}'), "names the shard model-00001-of-00002", "not in"),
    row("index is no JSON", lambda r: _index(r, "{"), r"index\.json", "not JSON"),
    row("index without a weight map", lambda r: _index(r, "{}"), r"index\.json", "weight_map"),
    row("GGUF cut short", lambda r: r.gguf(cut_bytes=1000), r"model\.gguf is cut short or damaged"),
    row("GGUF header cut short", lambda r: r.gguf(cut_bytes=320 * 64 * 4 + 40), r"model\.gguf is cut short or damaged"),
    row("GGUF of an unsupported architecture", lambda r: r.gguf("bloom"), "architecture 'bloom' is unsupported; supported: llama"),
    row("GGUF without its numbers", lambda r: r.gguf(), "lacks the metadata"),
    row("GGUF by name only", lambda r: r.set(f"model.source={r.file(r.folder / 'x.gguf', 'hello')}"), "is not a GGUF file"),
    row("head of a tied model", lambda r: (r.copy_model(tie_word_embeddings=True), r.set("tune.method=head")), r"tune\.method='head'", "tied"),
    row("LoRA target that matches nothing", r"--config.tune.targets=layers\.attn\.q_porj", "matches no linear layer", r"did you mean.*layers\.attn\.q_proj"),
    row("adapter missing", "--config.tune.adapter={folder}/none", "none' does not exist"),
    row("adapter folder without a config", "--config.tune.adapter={folder}", "not a PEFT adapter folder"),
    row("adapter of another kind", lambda r: r.adapter(peft_type="IA3"), "peft_type='IA3'", "LORA"),
    row("adapter without weights", lambda r: r.adapter(peft_type="LORA", r=2, target_modules=["q_proj"]), "adapter_model.safetensors cannot be read"),
    row("adapter with full tuning", lambda r: (r.adapter(peft_type="LORA"), r.set("tune.method=full")), r"tune\.adapter goes with"),
    row("adapter with an alpha of words", lambda r: r.adapter(peft_type="LORA", r=2, target_modules=["q_proj"], alpha_pattern={"q_proj": "x"}), r"alpha_pattern for 'q_proj'='x'; expected a number"),
    row("adapter with a pattern that is a list", lambda r: r.adapter(peft_type="LORA", r=2, target_modules=["q_proj"], rank_pattern=[2]), r"rank_pattern=\[2\]; expected an object"),
    row("adapter with a broken pattern", lambda r: r.adapter(peft_type="LORA", r=2, target_modules=["q_proj"], alpha_pattern={"(": 2}), r"alpha_pattern for '\(', which is not a regular expression"),
    row("adapter of a negative rank", lambda r: r.adapter(peft_type="LORA", r=-2, target_modules=["q_proj"]), "r=-2; expected a whole number above 0"),
    row("adapter on what PiSSA left of the base", lambda r: r.adapter(peft_type="LORA", r=2, target_modules=["q_proj"], init_lora_weights="pissa"), "init_lora_weights='pissa', which jaxtune does not read"),
    row("adapter config that is not UTF-8", lambda r: (r.adapter(), r.file(r.folder / "given-adapter/adapter_config.json", b'{"a": "\xe9"}')), r"adapter_config\.json is not JSON"),
    row("mesh that does not divide the devices", "--config.mesh.fsdp=3", "fsdp=3", "8 devices"),
    row("mesh of two unknowns", "--config.mesh.data=-1", "at most one may be -1"),
    row("mesh that does not divide the heads", "--config.mesh.tensor=8", r"mesh\.tensor=8 does not divide the model's 4 kv_heads"),
    row("mesh that does not divide a dim", lambda r: (r.copy_model(intermediate_size=98), r.set("mesh.tensor=4")), "mesh axis tensor=4 does not divide dim", r"mesh\.rules"),
    row("rule that does not divide a dim", lambda r: r.get_config(r"c.mesh.rules = (('norm\\.scale', ('data', 'fsdp')),)"), r"mesh\.rules", r"norm\.scale"),
    row("batch that does not divide", "--config.train.batch_size=12 --config.mesh.fsdp=8", r"train\.batch_size=12 does not divide", "e.g. 16"),
]  # fmt: skip

_DATA = [
    row("no data", "--config.data.train=", r"data\.train is empty"),
    row("data file missing", "--config.data.train={folder}/rwos.jsonl", "does not exist", r"rows\.jsonl"),
    row("data file in a missing folder", "--config.data.train={folder}/none/rows.jsonl", "nor does its folder"),
    row("data is a folder without such rows", "--config.data.train={folder} --config.data.files=*.csv", r"has no file that matches data\.files='\*\.csv'", r"rows\.jsonl"),
    row("data of an unknown kind", lambda r: r.rows("{}", name="rows.xlsx"), r"rows\.xlsx: unknown kind of data file '\.xlsx'", r"\.jsonl"),
    row("empty data set", lambda r: r.rows(), r"rows\.jsonl: holds no rows"),
    row("blank lines alone", lambda r: r.rows("", "  ", ""), r"rows\.jsonl: holds no rows"),
    row("table with a header alone", lambda r: r.rows("text", name="rows.csv"), r"rows\.csv: holds no rows"),
    row("malformed JSON line", lambda r: r.rows(json.dumps(CHAT), '{"messages": ['), r"rows\.jsonl:2: not JSON"),
    row("JSON line cut by Windows line ends", lambda r: r.rows(json.dumps(CHAT) + "\r", '{"messages": \r'), r"rows\.jsonl:2: not JSON"),
    row("JSON line of another kind", lambda r: r.rows("[1]"), r"rows\.jsonl:1: is a JSON list; expected an object"),
    row("JSON nested without end", lambda r: r.rows(json.dumps(CHAT), "[" * 100_000), r"rows\.jsonl:2: "),
    row("JSON number without end", lambda r: r.rows(json.dumps(CHAT), '{"text": ' + "1" * 5000 + "}"), r"rows\.jsonl:2: "),
    row("half a character in JSON", lambda r: r.rows(json.dumps(CHAT), json.dumps({"messages": [_user("a"), _assistant("b\ud83d")]})), r"rows\.jsonl:2: .*'\\ud83d' is half of a character"),
    row("JSON list file with lines", lambda r: r.rows("{}", "{}", name="rows.json"), r"rows\.json:2: not JSON", r"\.jsonl"),
    row("not UTF-8", lambda r: r.rows(json.dumps(CHAT), b'{"text": "\xe9"}\n'), r"rows\.jsonl:2: byte 0xe9 is not UTF-8"),
    row("UTF-16", lambda r: r.rows(json.dumps(CHAT).encode("utf-16")), r"rows\.jsonl:1: .*not UTF-8"),
    row("not gzip", lambda r: r.rows("{}", name="rows.jsonl.gz"), r"rows\.jsonl\.gz: not a whole gzip file"),
    row("not Parquet", lambda r: r.rows("{}", name="rows.parquet"), r"rows\.parquet: not a Parquet file"),
    row("quote left open", lambda r: r.rows("text", '"a', name="rows.csv"), r"rows\.csv:2: not CSV"),
    row("line ends of old Macs", lambda r: r.rows(b"text\ra\rb\r", name="rows.csv"), r"rows\.csv: lines end in \\r alone"),
    row("line ends of old Macs in the middle", lambda r: r.rows("text", b"a\rb\n", name="rows.csv"), r"rows\.csv:2: not CSV .*lines end in \\r alone"),
    row("answer missing, its prompt there", lambda r: r.rows('{"prompt": "a"}'), r"rows\.jsonl:1: fields 'prompt' fit no known format; known"),
    row("column too many", lambda r: r.rows("a,b", "1,2,3", name="rows.csv"), r"rows\.csv:2: 3 columns; expected 2"),
    row("fields of no known format", lambda r: r.rows('{"mesages": []}'), r"rows\.jsonl:1: fields 'mesages' fit no known format", "did you mean 'messages'"),
    row("missing field", lambda r: r.rows(json.dumps(CHAT), '{"massages": []}'), r"rows\.jsonl:2: no field 'messages'", "'massages'"),
    row("field of another type", lambda r: r.rows('{"messages": "hello"}'), r"rows\.jsonl:1: field 'messages' is 'hello'; expected a list"),
    row("unknown role", lambda r: r.chat(_user("a"), {"role": "asistant", "content": "b"}), r"rows\.jsonl:3: message 2: unknown role 'asistant'", "did you mean 'assistant'"),
    row("role that is a list", lambda r: r.chat({"role": ["user"], "content": "b"}), r"rows\.jsonl:3: message 1: unknown role"),
    row("role missing", lambda r: r.chat({"content": "b"}), r"rows\.jsonl:3: message 1: "),
    row("speaker that is a list", lambda r: r.rows('{"conversations": [{"from": ["human"], "value": "a"}]}'), r"rows\.jsonl:1: turn 1: unknown role"),
    row("content missing", lambda r: r.chat(_user("a"), {"role": "assistant", "text": "b"}), r"rows\.jsonl:3: message 2: no field 'content'"),
    row("content is a number", lambda r: r.chat(_user("a"), _assistant(3)), r"rows\.jsonl:3: message 2: content is 3; expected a string"),
    row("picture in a content", lambda r: r.chat(_user([{"type": "image_url"}]), _assistant("a")), r"rows\.jsonl:3: message 1: .*'image_url'; only text"),
    row("assistant-less chat", lambda r: r.chat(_user("a")), r"rows\.jsonl:3: no assistant message"),
    row("chat without messages", lambda r: r.chat(), r"rows\.jsonl:3: the list of messages is empty"),
    row("weight that is no weight", lambda r: r.chat(_user("a"), _assistant("b", weight=2)), r"rows\.jsonl:3: message 2: weight is 2"),
    row("answer that is a number", lambda r: r.rows('{"instruction": "a", "output": 3}'), r"rows\.jsonl:1: field 'output' is 3; expected a string"),
    row("instruction input that is a list", lambda r: r.rows('{"instruction": "a", "input": [1], "output": "b"}'), r"rows\.jsonl:1: field 'input' is \[1\]; expected a string"),
    row("nothing left to train after masking", lambda r: r.rows(*[json.dumps({"messages": [_user("a"), _assistant("b", weight=0)]})] * 4), "nothing is left to train on", "nothing_to_train 4"),
    row("everything cut off", "--config.data.max_length=4", "nothing is left to train on", "truncated 16", r"raise data\.max_length"),
    row("everything dropped", "--config.data.max_length=4 --config.data.too_long=drop", "nothing is left to train on", "too_long 16"),
    row("row longer than max_length", "--config.data.max_length=4 --config.data.too_long=error", r"rows\.jsonl:1: \d+ tokens; expected at most data\.max_length=4"),
    row("nothing left after the split", "--config.data.validation_fraction=0.5 --config.data.test_fraction=0.45", "no training rows left of 16"),
    row("tokenizer without a chat template", lambda r: (r.copy_model() / "chat_template.jinja").unlink(), "has no chat template", r"model\.chat_template"),
    row("chat template missing", "--config.model.chat_template={folder}/none.jinja", r"none\.jinja' does not exist"),
    row("chat template broken", lambda r: r.set(f"model.chat_template={r.file(r.folder / 'x.jinja', '{% for %}')}"), "chat template"),
    row("chat template that refuses", lambda r: r.set(f"model.chat_template={r.file(r.folder / 'x.jinja', '{{ raise_exception(1) }}')}"), "chat template refuses"),
    row("chat template that hides the answers", lambda r: r.set(f"model.chat_template={r.file(r.folder / 'x.jinja', 'hello')}"), r"rows\.jsonl:\d+: message 2", "chat template"),
    row("chat template that is binary", lambda r: r.set(f"model.chat_template={r.file(r.folder / 'x.jinja', bytes([255, 254]))}"), r"x\.jinja", "UTF-8"),
    row("label column missing", lambda r: (r.rows("text,mood", "a,b", name="rows.csv"), r.set("data.prompt={text}", "data.label_column=mod")), r"rows\.csv:2: no field 'mod'", "did you mean 'mood'"),
    row("label empty", lambda r: (r.rows("text,mood", "a,", name="rows.csv"), r.set("data.prompt={text}", "data.label_column=mood")), r"rows\.csv:2: label column 'mood' is empty"),
    row("prompt names no column", lambda r: (r.rows("text,mood", "a,b", name="rows.csv"), r.set("data.prompt={txt}", "data.label_column=mood")), r"rows\.csv:2: data\.prompt names column 'txt'", "did you mean 'text'"),
    row("prompt with an open brace", lambda r: (r.rows("text,mood", "a,b", name="rows.csv"), r.set("data.prompt={text", "data.label_column=mood")), r"data\.prompt is not a template"),
    row("prompt with a format", lambda r: (r.rows("text,mood", "a,b", name="rows.csv"), r.set("data.prompt={text!r}", "data.label_column=mood")), r"data\.prompt has a format in \{text"),
    row("label that is no number", lambda r: (r.rows('{"text": "a", "mood": NaN}'), r.set("data.prompt={text}", "data.label_column=mood")), r"rows\.jsonl:1: label column 'mood' is empty"),
    row("label that is an object", lambda r: (r.rows('{"text": "a", "mood": {"b": 1}}'), r.set("data.prompt={text}", "data.label_column=mood")), r"rows\.jsonl:1: column 'mood' is \{'b': 1\}, an object"),
    row("Parquet of bytes", lambda r: _parquet(r, text=[b"a"], mood=["b"]), r"rows\.parquet:1: column 'text' is b'a', bytes"),
    row("Parquet damaged inside", lambda r: _parquet(r, 4, text=["a"], mood=["b"]), r"rows\.parquet: not a Parquet file"),
    row("test rows that train nothing", lambda r: r.set(f"data.test={r.file(r.folder / 'masked.jsonl', json.dumps({'messages': [_user('a'), _assistant('b', weight=0)]}))}"), r"eval\.split='test' cannot be measured", r"1 rows of masked\.jsonl"),
    row("test row longer than the model, whatever its metric", lambda r: (r.rows("text,mood", *["a,b", "b,c"] * 9, name="rows.csv"), r.rows("text,mood", f"{'cat ' * 300},b", name="long.csv"), r.set(f"data.train={r.folder}/rows.csv", f"data.test={r.folder}/long.csv", "data.prompt={text}", "data.label_column=mood", "eval.labels=b,c")), r"long\.csv:2: \d+ tokens with the answer exceed the model's 256 positions"),
    row("test prompt without room for its answer", lambda r: (r.rows("text,mood", f"{'cat ' * 300},b", name="long.csv"), r.set(f"data.train={r.folder}/rows.jsonl", f"data.test={r.folder}/long.csv", "data.prompt={text}", "data.label_column=mood", "eval.metric=exact_match"), r.rows(*['{"text": "a", "mood": "b"}'] * 9)), r"long\.csv:2: a prompt of \d+ tokens"),
    row("split key missing", "--config.data.split_key=patient", r"rows\.jsonl:1: data\.split_key names column 'patient'"),
    row("split regex that matches nothing", r"--config.data.split_regex=^\d+", r"rows\.jsonl:1: data\.split_regex .* matches nothing"),
    row("validation file broken", lambda r: r.set(f"data.eval={r.file(r.folder / 'val.jsonl', '{')}"), r"val\.jsonl:1: not JSON"),
    row("label not among eval.labels", lambda r: (r.rows("text,mood", *["a,b", "b,c", "c,d"] * 9, name="rows.csv"), r.get_config("c.eval.labels = ('b', 'c')"), r.set("data.prompt={text}", "data.label_column=mood", "eval.split=train", "eval.before_after=True")), r"rows\.csv:\d+ has answer 'd'", "'b', 'c'"),
    row("one label alone", lambda r: (r.rows("text,mood", *["a,b", "b,b"] * 9, name="rows.csv"), r.set("data.prompt={text}", "data.label_column=mood", "eval.split=train")), "found 1 different answers", r"eval\.labels"),
]  # fmt: skip

_PAIRS = [
    row("preferences of another objective", _preferred("sft"), r"rows\.jsonl:1: the row compares two answers", r"'dpo'"),
    row("no preferences for dpo", "--config.train.objective=dpo", r"rows\.jsonl:\d+: .*compares answers, and the row has one", "'chosen'"),
    row("chosen is rejected", _preferred("dpo", rejected="a cat"), "no training rows left of", r"chosen_equals_rejected 16", "were dropped, for the reason counted"),
    row("an empty answer", _preferred("dpo", chosen=" "), r"empty_completion 16"),
    row("no reference", _preferred("dpo", "tune.method=full", "preference.reference=adapter_off"), "there is no adapter to switch off", "set 'start'"),
    row("reference none", _preferred("kto", "preference.reference=none"), "needs a reference", "'simpo', 'cpo', 'orpo'"),
    row("smoothed to nothing", _preferred("dpo", "preference.loss_type=robust", "preference.label_smoothing=0.5"), "as often wrong as right", r"below 0\.5"),
    row("smoothing of ipo", _preferred("dpo", "preference.loss_type=ipo", "preference.label_smoothing=0.1"), "does nothing with preference.loss_type='ipo'"),
    row("shared prompts over a context axis", _preferred("dpo", "preference.share_prompts=always", "mesh.context=2"), "context axis", "'auto' or 'never'"),
    row("a reward without its head", _preferred("reward"), "what goes together", "'reward' with model.head='sequence'"),
    row("a reward of two labels", _preferred("reward", "model.head=sequence", "model.labels=a,b"), "learns one score", "2 labels"),
    row("judged answers without a judgement", lambda r: (r.rows(json.dumps({"prompt": "who", "completion": "a cat"})), r.set("train.objective=kto")), r"rows\.jsonl:1: .*'kto' needs to know of each answer", "'label'"),
    row("kto accumulated", _preferred("kto", "train.accumulation=2"), "compares all rows of a batch"),
    row("pairs of another objective", lambda r: r.rows(PAIR), r"rows\.jsonl:1: the row is a query and a passage", "'contrastive'"),
    row("no pairs for contrastive", "--config.train.objective=contrastive", r"rows\.jsonl:1: .*'contrastive' needs a query and a passage", r"data\.prompt and data\.passage"),
    row("half a pair", _pairs('{"question": "who"}'), r"rows\.jsonl:1: fields 'question' fit no known format", r"passage\|context"),
    row("pair with an empty text", _pairs(PAIR, '{"question": "who", "passage": " "}'), r"rows\.jsonl:2: the passage is empty"),
    row("pair with a number", _pairs(PAIR, '{"question": "who", "passage": 3}'), r"rows\.jsonl:2: field 'passage' is 3; expected a string"),
    row("negative that nothing uses", _pairs('{"anchor": "a", "positive": "b", "negative": "c"}'), r"rows\.jsonl:1: .*set data\.negative='\{negative\}'"),
    row("passage template of another column", _pairs(PAIR, settings=("data.passage={pasage}",)), r"rows\.jsonl:1: data\.passage names column 'pasage'", "did you mean 'passage'"),
    row("passage too long", _pairs(PAIR, settings=("data.max_passage_length=2", "data.too_long=error")), r"rows\.jsonl:1: a text is longer", r"data\.max_passage_length=2"),
    row("every passage too long", _pairs(PAIR, settings=("data.max_passage_length=2", "data.too_long=drop")), "all 1 rows are longer", r"data\.max_passage_length=2"),
    row("passages beyond the model's positions", _pairs(PAIR, settings=("data.max_passage_length=1000",)), r"data\.max_passage_length=1000 exceeds the model's 256 positions"),
    row("contrastive accumulation", _pairs(PAIR, settings=("train.accumulation=2",)), "compares all rows of a batch", r"set train\.accumulation=1"),
    row("contrastive batch of one", _pairs(PAIR, settings=("train.batch_size=1",)), r"expected train\.batch_size of 2 or more"),
    row("contrastive head", _pairs(PAIR, settings=("tune.method=head",)), r"tune\.method='head'", "reads no head"),
    row("pooling of no kind", "--config.model.pooling=max", r"config\.model\.pooling is 'max'; expected one of .*'mean'"),
    row("temperature of nothing", "--config.train.temperature=0", r"train\.temperature is 0"),
    row("folder that pools otherwise", _both(_pairs(PAIR), lambda r: _pooling(r, '{"pooling_mode": "max"}')), r"1_Pooling/config\.json pools by \['max'\]", r"set model\.pooling"),
    row("folder with a broken pooling", _both(_pairs(PAIR), lambda r: _pooling(r, "[]")), r"1_Pooling/config\.json", r"set model\.pooling"),
    row("search without an embedding model", _verb("evaluate", "eval.metric=retrieval", "data.test={folder}/rows.jsonl"), r"eval\.metric='retrieval' with train\.objective='sft'"),
    row("labels of an embedding model", _both(_pairs(*[PAIR.replace("who", str(n)) for n in range(16)]), _verb("evaluate", "eval.metric=labels", "data.test_fraction=0.5")), "'retrieval' goes with 'contrastive'"),
]  # fmt: skip

_VERBS = [
    row("generate without input", _verb("generate"), r"--config\.generate\.input="),
    row("generate from nothing", _verb("generate", "generate.input={folder}/none.txt"), r"none\.txt' does not exist"),
    row("generate from an empty file", lambda r: _generate(r, ""), r"prompts\.txt: holds no rows"),
    row("prompt longer than the model's positions", lambda r: (_generate(r, "cat " * 300), r.set("data.split_key=messages")), "exceed the model's 256 positions", r"max_new_tokens"),
    row("answers into a folder", lambda r: (_generate(r, "the cat"), r.set(f"generate.output={r.folder}")), r"generate\.output=.* is a folder"),
    row("export of an empty workdir", _verb("export"), "holds no checkpoint", "--workdir"),
    row("evaluate without test rows", _verb("evaluate"), r"eval\.split='test' has no rows", r"data\.test_fraction"),
    row("answers over the prompts", lambda r: (_generate(r, "the cat"), r.set(f"generate.output={r.folder}/prompts.txt")), r"generate\.input=.* is where the answers go"),
    row("prompt too long, by its row", lambda r: (_generate(r, "the cat", "cat " * 300), r.set("data.split_key=messages")), r"prompts\.txt:2: a prompt of \d+ tokens"),
    row("prompt that is empty", lambda r: (_generate(r), r.rows('{"prompt": "a"}', '{"prompt": ""}', name="asked.jsonl"), r.set(f"generate.input={r.folder}/asked.jsonl", "data.chat=False")), r"asked\.jsonl:2: the prompt is empty"),
    row("plan for an unknown chip", _verb("plan", "plan.topology=v9:4x4"), r"plan\.topology='v9:4x4'", "v5e"),
    row("plan for no slice", _verb("plan", "plan.topology=v5e"), "expected GENERATION:SHAPE"),
    row("plan for a slice of no chips", _verb("plan", "plan.topology=v5e:0x0"), "expected GENERATION:SHAPE"),
    row("plan without a model", _verb("plan", "model.source="), r"model\.source is empty"),
    row("workdir is a file", lambda r: r.file(r.workdir, "mine"), "run", "is a file"),
    row("workdir inside a file", lambda r: setattr(r, "workdir", r.folder / "rows.jsonl" / "run"), r"rows\.jsonl"),
    row("workdir whose checkpoints could not be read back", lambda r: setattr(r, "workdir", r.folder / "lr[1]" / "run"), r"workdir=.* has '\['", "choose another folder"),
    row("export into a file", lambda r: r.set(f"export.output={r.folder / 'rows.jsonl'}"), r"export\.output", "is a file"),
    row("export over a folder of other things", lambda r: (_apart(r), r.set(f"export.output={r.folder}")), r"export\.output=.* is a folder of other things \(config\.py, rows\.jsonl\)"),
    row("export over the base", lambda r: r.set(f"export.output={r.copy_model()}"), r"export\.output=.* is what the run starts from"),
    row("export over what holds the base", lambda r: (_apart(r), r.set(f"export.output={r.copy_model().parent}")), r"export\.output=.* is what the run starts from"),
    row("export over the workdir", lambda r: (setattr(r, "verb", "export"), r.set(f"export.output={r.workdir}")), r"export\.output=.* holds the workdir"),
    row("export into the checkpoints", lambda r: r.set(f"export.output={r.workdir}/checkpoints"), r"lies in the workdir's checkpoints"),
    row("export over a run of somebody's", lambda r: _other_run(r), r"export\.output=.* is a folder of other things \(checkpoints, metrics\.jsonl\)"),
    row("result over the base, by the workdir's name", lambda r: (r.copy_model().rename(r.folder / "model"), setattr(r, "workdir", r.folder), r.set(f"model.source={r.folder}/model", "export.merge=True")), r"export\.output=.*/model' is what the run starts from"),
    row("training in the base's folder", lambda r: setattr(r, "workdir", r.copy_model()), r"workdir=.*model-copy' is what the run starts from"),
    row("training in the adapter's folder", lambda r: (r.adapter(), setattr(r, "workdir", r.folder / "given-adapter")), r"workdir=.*given-adapter' is what the run starts from"),
    row("training in another model's folder", lambda r: (r.workdir.mkdir(), r.file(r.workdir / "config.json", '{"model_type": "llama"}')), r"holds a config\.json that is not a run's"),
]  # fmt: skip

_LABELS = [  # (rows, what else is set) of heads for labels
    row("words without tags", lambda r: _tags(r, {"tokens": ["a", "b"], "tags": ["O"]}), r"rows\.jsonl:2: 2 words and 1 tags; expected a tag for each"),
    row("tag that is none", lambda r: _tags(r, {"tokens": ["a"], "tags": ["B-PRE"]}), r"rows\.jsonl:2: word 1: tag 'B-PRE' is no tag; did you mean 'B-PER'"),
    row("tag by a number too large", lambda r: _tags(r, {"words": ["a"], "ner_tags": [7]}), r"rows\.jsonl:2: word 1: tag '7' is no tag; tags: O, B-PER, I-PER"),
    row("word that is empty", lambda r: _tags(r, {"tokens": ["a", " "], "tags": ["O", "O"]}), r"rows\.jsonl:2: word 2 is empty"),
    row("words that are a number", lambda r: _tags(r, {"tokens": 3, "tags": ["O"]}), r"rows\.jsonl:2: field 'tokens' is 3; expected a list of words"),
    row("texts to be tagged", lambda r: (_tags(r, {"tokens": ["a"], "tags": ["O"]}), r.rows(json.dumps(CHAT))), r"rows\.jsonl:1: has no words with tags"),
    row("label of several that is none", lambda r: _texts(r, "multi_label_classification", "good,bad", ["good", "baad"]), r"rows\.jsonl:2: answer 'baad' is no label; did you mean 'bad'"),
    row("number that is a word", lambda r: _texts(r, "regression", "stars", "five"), r"rows\.jsonl:2: answer 'five' is no number"),
    row("text that is empty", lambda r: _texts(r, "regression", "stars", 1, ""), r"rows\.jsonl:2: the text is empty"),
    row("metric of language models for a head", lambda r: (_texts(r, "regression", "stars", 1), r.set("eval.metric=perplexity", "eval.split=train")), r"eval\.metric='perplexity' measures language models", "'auto'"),
    row("words from a classifier", lambda r: (_texts(r, "regression", "stars", 1), _generate(r, "the cat"), r.set("data.split_key=", "data.format=auto")), "writes no text", "language model"),
    row("a weight too many for the labels", lambda r: (_tags(r, {"tokens": ["the"], "tags": ["O"]}), r.set("train.class_weights=(1.0,2.0)")), r"train\.class_weights has 2 numbers; expected one for each label: O, B-PER, I-PER"),
    row("weights of labels in a chat", "--config.train.class_weights=(1.0,2.0)", r"train\.class_weights=\(1\.0, 2\.0\) is nothing that train\.objective='sft' takes"),
    row("a focal loss that is smoothed", "--config.train.focal_gamma=2.0 --config.train.label_smoothing=0.1", r"train\.focal_gamma=2\.0 and train\.label_smoothing=0\.1", "set one to 0"),
    row("an objective beside that is none", "--config.train.beside=(('stf',0.1),)", "unsupported objective 'stf'; did you mean 'sft'"),
    row("an objective beside without a weight", "--config.train.beside=('sft',)", r"config\.train\.beside has 'sft'; expected \(objective, weight above 0\)"),
    row("a span outside its answer", lambda r: r.chat(_user("who"), _assistant("cat", spans=[[1, 9, 2]])), r"rows\.jsonl:3: message 2: span .* not inside the content, of 3 characters"),
    row("a decay that never ends", "--config.optim.schedule=wsd --config.optim.decay_shape=exponential", r"optim\.decay_shape='exponential' never reaches optim\.final_ratio=0\.0"),
    row("an optimizer by half its name", "--config.optim.name=adam", r"config\.optim\.name is 'adam'; expected one of .*'adam8bit'"),
    row("a sweep of nothing", _verb("sweep"), r"sweep needs config\.sweep\.axes"),
    row("a ramp that goes down", _verb("lr_find", "lr_find.high=1e-9"), r"lr_find\.high=1e-09 is not above lr_find\.low=1e-07"),
]  # fmt: skip

TABLE = _COMMAND + _CONFIG_FILES + _MODELS + _DATA + _PAIRS + _VERBS + _LABELS


def _break(run: Run, mistake: Mistake) -> None:
    if callable(mistake.broken_by):
        mistake.broken_by(run)
    else:
        run.flags += mistake.broken_by.replace("{folder}", str(run.folder)).split()


def _refused(run: Run, capsys: pytest.CaptureFixture[str]) -> str:
    """Runs what must fail by a user's mistake; returns its one line."""
    capsys.readouterr()
    code = launch.main(run.arguments())
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("compiling ")]  # plan's first
    assert code == 2, lines
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    assert "Traceback" not in lines[0]
    return lines[0]


def _half_written(folder: Path) -> list[Path]:
    return [path for pattern in HALF_WRITTEN for path in folder.glob(pattern)] if folder.is_dir() else []


def _assert_nothing_half_written(folder: Path) -> None:
    assert not _half_written(folder)


@pytest.mark.parametrize("mistake", TABLE, ids=lambda mistake: mistake.name)
def test_a_mistake_ends_in_one_clear_line(
    mistake: Mistake, tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(tmp_path, tiny_model)
    _break(run, mistake)
    there = _half_written(run.workdir)
    line = _refused(run, capsys)
    for pattern in mistake.says:
        assert re.search(pattern, line), line
    assert _half_written(run.workdir) == there


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Run:
    """A run that went well: of files with Windows line ends and byte order marks, with nothing there yet to resume."""
    run = Run(tmp_path_factory.mktemp("finished"), tiny_model)
    run.config.write_bytes(b"\xef\xbb\xbf" + run.config.read_text().replace("\n", "\r\n").encode())
    run.rows(b"\xef\xbb\xbf", *[json.dumps(CHAT) + "\r"] * 16)
    run.set("train.steps=0", "train.epochs=0.5")  # epochs decide, which the other verbs cannot know
    assert launch.main([*run.arguments(), "--config.checkpoint.resume=True"]) == 0
    assert (run.workdir / "adapter" / "adapter_config.json").is_file()
    return run


_AFTER = [
    row("second run into a used workdir", "", "holds an earlier run", r"--config\.checkpoint\.resume=True", "--workdir"),
    row("resume after the config changed", "--config.checkpoint.resume=True --config.tune.rank=4", r"checkpoint .* is of another config: tune\.rank was 2 and is now 4"),
    row("export of a step that is not there", _verb("export", "export.checkpoint=99"), r"has no checkpoint of step 99; it has \[\d+\]"),
]  # fmt: skip


@pytest.mark.parametrize("mistake", _AFTER, ids=lambda mistake: mistake.name)
def test_a_mistake_after_a_finished_run_leaves_it_as_it_was(
    mistake: Mistake, finished: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copy.copy(finished)
    run.flags, run.workdir = list(finished.flags), tmp_path / "run"
    shutil.copytree(finished.workdir, run.workdir)
    before = _contents(run.workdir)
    _break(run, mistake)
    line = _refused(run, capsys)
    for pattern in mistake.says:
        assert re.search(pattern, line), line
    assert _contents(run.workdir) == before


def _without_b(tensors: dict[str, np.ndarray]) -> None:
    for name in [name for name in tensors if "q_proj.lora_B" in name]:
        del tensors[name]


_ADAPTERS: dict[str, tuple[dict[str, Any], Callable[[dict[str, np.ndarray]], None], str]] = {
    "alpha of one layer": ({"alpha_pattern": {"layers.1.self_attn.q_proj": 9}}, lambda t: None, r"different alphas in different layers: \[9\.0, 32\.0\]"),
    "without a factor": ({}, _without_b, r"has lora_A\.weight for layers\.attn\.q_proj; expected lora_A\.weight and lora_B\.weight"),
    "DoRA without magnitudes": ({"use_dora": True}, lambda t: None, "expected .* lora_magnitude_vector .use_dora=True"),
}  # fmt: skip


@pytest.mark.parametrize("case", _ADAPTERS)
def test_an_adapter_is_taken_whole_or_not_at_all(
    case: str, finished: Run, tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.numpy import load_file, save_file

    changes, change, says = _ADAPTERS[case]
    folder = tmp_path / "adapter"
    shutil.copytree(finished.workdir / "adapter", folder)
    config = json.loads((folder / "adapter_config.json").read_text()) | changes
    (folder / "adapter_config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    run = Run(tmp_path, tiny_model)
    run.set(f"tune.adapter={folder}")
    assert re.search(says, _refused(run, capsys))


def _contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_a_finished_run_is_exported_by_its_own_config_file(
    finished: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(finished.workdir)
    arguments = ["export", "--config=config.json", f"--config.export.output={tmp_path / 'out'}"]
    assert launch.main(arguments) == 0, capsys.readouterr().err
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    assert launch.main(arguments) == 0, "an export may replace an export"


def test_an_export_follows_a_link_and_takes_nobodys_folder(finished: Run, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "real.tmp").mkdir()  # somebody's own
    arguments = ["export", f"--config={finished.workdir}/config.json", f"--config.export.output={tmp_path / 'link'}"]
    assert launch.main(arguments) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real", "real.tmp"]
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "real").stat().st_mode == (tmp_path / "real.tmp").stat().st_mode


def test_a_loss_that_is_not_finite_stops_with_the_step_and_the_rows(
    tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(tmp_path, tiny_model)
    run.weights(lambda tensors: tensors["model.norm.weight"].fill(np.inf))
    line = _refused(run, capsys)
    assert re.search(r"step 0: loss (nan|inf)", line), line
    assert "rows.jsonl:1" in line
    dump = run.workdir / "bad_step_000000"
    assert json.loads(dump.with_suffix(".json").read_text())["rows"][0] == "rows.jsonl:1"
    with np.load(dump.with_suffix(".npz")) as batch:
        assert batch["tokens_BT"].shape == (8, 64)
    _assert_nothing_half_written(run.workdir)


def test_a_loss_that_is_not_finite_can_be_skipped(tmp_path: Path, tiny_model: Path) -> None:
    run = Run(tmp_path, tiny_model)
    run.weights(lambda tensors: tensors["model.norm.weight"].fill(np.inf))
    run.set("train.on_nonfinite=skip")
    assert launch.main(run.arguments()) == 0
    lines = [json.loads(line) for line in (run.workdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["skipped"] for line in lines if "loss" in line] == [1, 1]
    assert lines[-1]["goodput/share"] == 0
    assert lines[-1]["goodput/skipped_seconds"] > 0
    assert lines[0]["learning_rate"] == lines[1]["learning_rate"], "a skipped step moves no schedule"


def test_too_many_steps_skipped_in_a_row_stop(
    tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(tmp_path, tiny_model)
    run.weights(lambda tensors: tensors["model.norm.weight"].fill(np.inf))
    run.set("train.on_nonfinite=skip", "train.max_skipped_steps=2", "train.steps=9")
    assert re.search(r"step 1: .* the last of 2 in a row .* another --workdir", _refused(run, capsys))
    assert len((run.workdir / "metrics.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize(("choice", "said"), [("truncate", "1 truncated"), ("drop", "1 too long")])
def test_a_row_too_long_is_counted_and_said(
    choice: str, said: str, tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(tmp_path, tiny_model)
    run.rows(*[json.dumps(CHAT)] * 8, json.dumps({"messages": [_user("who"), _assistant("cat " * 100)]}))
    run.weights(lambda tensors: tensors.pop("model.norm.weight"))  # ends the run once the data has been summed up
    run.set("tracking.progress=lines", f"data.too_long={choice}")
    assert launch.main(run.arguments()) == 2
    assert said in capsys.readouterr().err


# A limit on the size of files stands for a full disk: it needs no root, and meets C++ and Rust as well as Python.
_LIMITED = """\
import resource, sys
from jaxtune.launch import main
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
sys.exit(main(sys.argv[2:]))
"""


def test_a_full_disk_while_saving_a_checkpoint(tmp_path: Path, tiny_model: Path) -> None:
    run = Run(tmp_path, tiny_model)
    run.set("train.steps=1")
    done = _python("-c", _LIMITED, "15000", *run.arguments())  # config.json has less
    lines = done.stderr.splitlines()
    assert (done.returncode, len(lines)) == (2, 1), done.stderr[-2000:]
    assert re.match("error: disk full while saving to .*checkpoints", lines[0]), lines
    _assert_nothing_half_written(run.workdir)


@pytest.mark.parametrize("merge", [False, True])
def test_a_full_disk_while_exporting(
    merge: bool, finished: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copy.copy(finished)
    run.verb, run.flags = "export", [*finished.flags, f"--config.export.output={tmp_path / 'out'}"]
    run.set(f"export.merge={merge}")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))
    try:
        assert re.match("error: disk full", _refused(run, capsys))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


def _python(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, check=False)


def test_without_arguments_or_with_help_it_says_how_it_is_used(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["--help"], ["train", "-h"]):
        assert launch.main(arguments) == 0
        said = capsys.readouterr()
        assert said.out.startswith("usage: python -m jaxtune.launch")
        assert not said.err
    done = _python("-m", "jaxtune.launch")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: python -m jaxtune.launch")


def test_a_value_may_stand_apart_or_be_a_list_with_commas(tmp_path: Path, tiny_model: Path) -> None:
    config = Run(tmp_path, tiny_model).config
    verb, options, _ = launch._parse(["evaluate", "--config", str(config), "--config.eval.split", "train"])
    assert (verb, options.eval.split) == ("evaluate", "train")
    assert launch._parse(["--config", str(config), "evaluate"])[0] == "evaluate"
    for given, read in (("a,b", ("a", "b")), ("a", ("a",)), ("('a,b', 'c')", ("a,b", "c")), ("1,2", ("1", "2"))):
        _, options, _ = launch._parse([f"--config={config}", f"--config.generate.stop={given}"])
        assert options.generate.stop == read


def test_a_tilde_is_the_home_folder_and_a_reader_may_leave(tmp_path: Path, tiny_model: Path) -> None:
    run = Run(tmp_path, tiny_model)
    (tmp_path / "kept").mkdir()
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "HOME": str(tmp_path)}
    command = [sys.executable, "-m", "jaxtune.launch", "--config=~/config.py", "--workdir=~/run"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path / "kept", check=False)
    assert done.returncode == 0, done.stderr
    assert (run.workdir / "adapter" / "adapter_config.json").is_file()
    assert not list((tmp_path / "kept").iterdir())
    command = [*command[:-1], "--workdir=~/other", "--dry_run"]
    environment["PYTHONIOENCODING"] = "ascii"  # a terminal that lacks characters
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as shown:
        assert shown.stdout
        assert shown.stderr
        shown.stdout.close()
        assert (shown.stderr.read(), shown.wait()) == ("", 141)


def test_what_was_measured_of_another_model_is_measured_again(finished: Run, tmp_path: Path) -> None:
    config = launch.config_lib.from_json((finished.workdir / "config.json").read_text())
    held = measure.HeldOut("perplexity", [], (), [])
    before = measure.asked(config, held)
    config.model.source = str(tmp_path)
    assert measure.asked(config, held) != before
