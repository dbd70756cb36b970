"""Mixtures of experts against transformers and PEFT: adapters on experts in every format, merged and trained; routers' losses."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune import sharding
from jaxtune.models import layers
from jaxtune.train import start
from jaxtune.train import step as step_lib
from jaxtune.weights import peft_read
from tests.families import CASES, VOCAB

pytestmark = [
    pytest.mark.oracle,
    pytest.mark.usefixtures("quick_compile"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # PEFT looks for its own patterns of ranks among modules only; they hold for parameters too.
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning"),
]

TOLERANCE = 1e-4  # of float32 logits
TOKENS = np.random.default_rng(0).integers(3, VOCAB, (2, 24))


class Base(NamedTuple):
    case: str
    folder: Path
    torch: Any


@pytest.fixture(scope="module", params=["mixtral", "gpt_oss"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, from_folder: Any) -> Base:
    """A random mixture that transformers made and saved."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    settings = {k: v for k, v in CASES[request.param].items() if k != "model_type"}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(CASES[request.param]["model_type"], **settings))
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.normal_(1.0 if "norm" in name else 0.0, 0.15)
    folder = tmp_path_factory.mktemp("mixture") / "model"
    model.save_pretrained(folder)
    return Base(request.param, folder, from_folder(folder))


def peft_adapter(base: Base, folder: Path, from_folder: Any, **options: Any) -> Any:
    """Lets PEFT adapt attention, both parameters of experts and the routers, every tensor random; saves, returns its model."""
    import torch
    from peft import LoraConfig, get_peft_model

    router = "mlp.router.weight" if base.case == "gpt_oss" else "mlp.gate.weight"
    targets = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj", router]} | options
    torch.manual_seed(3)
    settings = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=6, target_modules=["q_proj", "o_proj"], **targets)
    model = get_peft_model(from_folder(base.folder), settings)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_" in name:
                value.normal_(0.0, 0.2)
    model.save_pretrained(folder)
    return model.eval()


def write(mine: Any, folder: Path, **export: Any) -> Path:
    mine.config.workdir, mine.config.export.merge = str(folder), export.get("merge", False)
    return start.write_result(mine.config, folder, mine.model, None, mine.program, mine.state.params, mine.frozen)


OPTIONS: dict[str, dict[str, Any]] = {
    "all": {},
    "down alone, rsLoRA, a rank of its own": {
        "target_parameters": ["experts.down_proj"], "use_rslora": True, "rank_pattern": {r".*\.experts\.down_proj": 3},
    },
}  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_peft_adapter_goes_in_and_out_and_merges(
    base: Base, tmp_path: Path, from_folder: Any, config_of: Any, ours: Any, theirs: Any, apart: Any, options: dict[str, Any]
) -> None:  # fmt: skip
    from peft import PeftModel

    model = peft_adapter(base, tmp_path / "made", from_folder, **options)
    mine = ours(config_of(base.folder, {"tune.adapter": str(tmp_path / "made")}))
    expected = theirs(model, TOKENS)
    assert np.abs(expected - theirs(base.torch, TOKENS)).max() > 100 * TOLERANCE
    assert apart(mine.logits(TOKENS), expected, f"{base.case}, PEFT's") <= TOLERANCE
    again = PeftModel.from_pretrained(from_folder(base.folder), write(mine, tmp_path / "run")).eval()
    assert apart(theirs(again, TOKENS), expected, "written again") <= TOLERANCE
    merged = from_folder(write(mine, tmp_path / "merged", merge=True)).state_dict()
    for name, value in model.merge_and_unload().state_dict().items():
        assert np.abs(value.numpy() - merged[name].numpy()).max() <= 1e-5 * np.abs(value.numpy()).max(), name


@pytest.mark.parametrize("base", ["mixtral"], indirect=True)
def test_experts_as_modules_of_their_own(
    base: Base, tmp_path: Path, from_folder: Any, config_of: Any, ours: Any, theirs: Any, apart: Any
) -> None:
    """The form of adapters made under transformers 4, which PEFT still reads: a pair of tensors for each expert."""
    from peft import PeftModel
    from safetensors.numpy import save_file

    names, rng, tensors = ["w1", "w2", "w3"], np.random.default_rng(4), {}
    num, dim, width = base.torch.model.layers[0].mlp.experts.down_proj.shape
    for layer, expert, name in itertools.product(range(len(base.torch.model.layers)), range(num), names):
        into, out = (width, dim) if name == "w2" else (dim, width)
        module = f"base_model.model.model.layers.{layer}.block_sparse_moe.experts.{expert}.{name}"
        tensors[f"{module}.lora_A.weight"] = rng.normal(0, 0.2, (2, into)).astype(np.float32)
        tensors[f"{module}.lora_B.weight"] = rng.normal(0, 0.2, (out, 2)).astype(np.float32)
    (tmp_path / "made").mkdir()
    save_file(tensors, tmp_path / "made" / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 3, "target_modules": names}
    (tmp_path / "made" / "adapter_config.json").write_text(json.dumps(settings))
    expected = theirs(PeftModel.from_pretrained(from_folder(base.folder), tmp_path / "made").eval(), TOKENS)
    mine = ours(config_of(base.folder, {"tune.adapter": str(tmp_path / "made")}))
    assert np.abs(expected - theirs(base.torch, TOKENS)).max() > 100 * TOLERANCE
    assert apart(mine.logits(TOKENS), expected, f"{base.case}, module by module") <= TOLERANCE


def test_gradients_of_adapters_on_experts_agree(
    base: Base, tmp_path: Path, from_folder: Any, config_of: Any, ours: Any
) -> None:
    """One SGD step at learning rate 1 subtracts the gradient: that of PEFT's parameters, as autograd has it."""
    import torch

    model = peft_adapter(base, tmp_path / "made", from_folder)
    changes = {
        "tune.adapter": str(tmp_path / "made"), "optim.name": "sgd", "optim.learning_rate": 1.0, "train.steps": 1,
        "optim.schedule": "constant", "optim.warmup_steps": 0, "optim.clip_norm": 0.0, "data.max_length": 23,
    }  # fmt: skip
    mine = ours(config_of(base.folder, changes))
    tokens = np.repeat(TOKENS, 4, axis=0).astype(np.int32)
    ones = np.ones((8, 23), np.int32)
    batch = {
        "tokens_BT": tokens[:, :-1], "targets_BT": tokens[:, 1:], "weights_BT": ones.astype(np.float32),
        "segment_ids_BT": ones, "positions_BT": np.broadcast_to(np.arange(23, dtype=np.int32), (8, 23)),
    }  # fmt: skip
    before = {path: np.asarray(value) for path, value in mine.state.params.items()}
    arrays = sharding.to_global(batch, mine.program.mesh, 8)
    state, _ = step_lib.make(mine.config, mine.program)(mine.state, mine.frozen, arrays)
    moved = {path: before[path] - np.asarray(value) for path, value in state.params.items()}
    for name, value in model.named_parameters():
        value.requires_grad_("lora_" in name)
    ids = torch.as_tensor(tokens, dtype=torch.long)
    logits = model(input_ids=ids[:, :-1]).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
    # The gradients, read as if they were an adapter, by the reader that the values came through.
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_" in name:
                value.copy_(value.grad)
    model.save_pretrained(tmp_path / "gradients")
    program = mine.program
    _, expected = peft_read.load(tmp_path / "gradients", program.family, program.model_config)
    for path, value in expected.items():
        found = moved[path]
        if "gate_proj" in path and path.endswith("lora_a"):  # here gate and up have a copy each of PEFT's one A
            found = found + moved[path.replace("gate_proj", "up_proj")]
        if "up_proj" in path and "gate_up" not in path and path.endswith("lora_a"):
            continue
        assert np.abs(found - value).max() <= 1e-3 * np.abs(value).max(), path


def test_the_balance_loss_is_that_of_transformers(base: Base, config_of: Any, ours: Any) -> None:
    """Per layer and over top_k; its gradient, and the z-loss's, in the routers and in the embeddings; padding left out."""
    import torch
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    mine = ours(config_of(base.folder, {"tune.method": "full", "train.router_z_weight": 0.1}))
    tokens = np.random.default_rng(6).integers(3, VOCAB, (8, 24))  # a row for each device
    real = (np.arange(24) < np.arange(17, 25)[:, None]).astype(np.int32)
    settings = base.torch.config
    num, top_k = settings.num_local_experts, settings.num_experts_per_tok
    mask = torch.as_tensor(real)
    base.torch.zero_grad()
    found = base.torch(
        input_ids=torch.as_tensor(tokens), attention_mask=mask, output_router_logits=True
    ).router_logits  # a tensor for each mixture
    balance = sum(load_balancing_loss_func((one,), num, top_k, mask) for one in found) / len(found) / top_k
    z = sum(torch.logsumexp(one[mask.flatten() == 1], -1).square().mean() for one in found) / len(found)
    (balance + 0.1 * z).backward()

    def ours_of(params: Any) -> Any:
        model = layers.bind(mine.program.graphdef, {**mine.frozen, **params})
        report = model.run_all(jnp.asarray(tokens), np.broadcast_to(np.arange(24), tokens.shape), real)[2]
        means = [report[name] / report["layers"] for name in ("router_balance", "router_z")]
        return means[0] + 0.1 * means[1], means

    (_, means), grads = jax.jit(jax.value_and_grad(ours_of, has_aux=True))(mine.state.params)
    np.testing.assert_allclose(means, [balance.item(), z.item()], rtol=1e-4)
    name = "router" if base.case == "gpt_oss" else "gate"
    routers = [getattr(block.mlp, name).weight.grad.numpy().T for block in base.torch.model.layers]
    pairs = {
        "layers.mlp.router.kernel": np.stack(routers),
        "embed.table": base.torch.get_input_embeddings().weight.grad.numpy(),
    }
    for path, want in pairs.items():
        assert np.abs(want).max() > 1e-4
        assert np.abs(np.asarray(grads[path]) - want).max() <= 1e-3 * np.abs(want).max(), path
