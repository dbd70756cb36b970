"""One step of distillation, jaxtune's and torch's with TRL's `generalized_jsd_loss`: the same loss and the same gradient norm."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict

from jaxtune import run
from jaxtune.data.batches import stack
from jaxtune.train import rows as rows_lib
from jaxtune.weights import source

pytestmark = [
    pytest.mark.oracle,
    pytest.mark.usefixtures("quick_compile"),
    pytest.mark.filterwarnings("ignore::trl.import_utils.TRLExperimentalWarning"),
    pytest.mark.filterwarnings("ignore:You are importing from 'rollout_func':UserWarning"),
]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory, make_model: Callable[..., Path]) -> Path:
    return make_model(tmp_path_factory.mktemp("teacher") / "deep", seed=5, num_hidden_layers=3)


def by_trl(config: ConfigDict, teacher: Path, beta: float) -> tuple[float, float]:
    """(loss, norm of the gradient of all weights) of the first batch, each text alone in its row."""
    import torch
    from transformers import AutoModelForCausalLM
    from trl.experimental.gkd import GKDTrainer

    tokenizer = source.find_tokenizer(config, source.find(config))
    rows = rows_lib.read(config, tokenizer, lambda items, *_: items).train
    size = config.train.batch_size
    batch = stack(rows, [(row,) for row in range(size)], config.data.max_length, tokenizer.pad_id)
    student, other = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (config.model.source, teacher)
    )
    ids = torch.tensor(batch["tokens_BT"].astype(np.int64))
    seen = torch.tensor((batch["segment_ids_BT"] != 0).astype(np.int64))
    labels = torch.tensor(np.where(batch["weights_BT"] != 0, batch["targets_BT"], -100).astype(np.int64))
    ours = student(input_ids=ids, attention_mask=seen).logits
    with torch.no_grad():
        theirs = other(input_ids=ids, attention_mask=seen).logits
    loss = GKDTrainer.generalized_jsd_loss(ours, theirs, labels, beta=beta, temperature=config.distill.temperature)
    loss.backward()
    norm = torch.sqrt(sum(torch.sum(p.grad.double() ** 2) for p in student.parameters() if p.grad is not None))
    return float(loss.detach()), float(norm)


@pytest.mark.parametrize(("beta", "temperature"), [(0.5, 1.0), (0.1, 2.0), (0.0, 1.0), (1.0, 1.0)])
def test_a_step_is_trls(tiny_config: ConfigDict, teacher: Path, beta: float, temperature: float) -> None:
    """TRL leaves out the squared temperature, by which the divergence is multiplied here."""
    config = tiny_config
    config.train.objective, config.distill.teacher, config.tune.method = "distill", str(teacher), "full"
    config.distill.alpha, config.distill.divergence, config.distill.mix = 1.0, "js", beta
    config.distill.temperature, config.train.steps, config.optim.clip_norm = temperature, 1, 0.0
    config.data.shuffle, config.data.packing, config.data.validation_fraction = False, False, 0.0
    loss, norm = by_trl(config, teacher, beta)
    run.train(config, Path(config.workdir))
    first = json.loads((Path(config.workdir) / "metrics.jsonl").read_text().splitlines()[0])
    np.testing.assert_allclose(first["loss"], loss * temperature**2, rtol=1e-4)
    np.testing.assert_allclose(first["grad_norm"], norm * temperature**2, rtol=1e-4)


def test_layers_are_those_of_transformers(tiny_config: ConfigDict) -> None:
    """Hidden states after each layer, and its attention, of a padded batch."""
    import jax
    import torch
    from transformers import AutoModelForCausalLM

    from jaxtune.models import layers
    from jaxtune.train import start

    model = source.find(tiny_config)
    program, values = start.program(tiny_config, model)
    state, frozen = start.load(tiny_config, model, program, values, lambda items, *_: iter(items))
    ids = np.random.default_rng(0).integers(4, 300, (8, 12)).astype(np.int32)
    seen = np.ones_like(ids)
    seen[:, 9:] = 0
    ours = layers.bind(program.graphdef, {**frozen, **state.params})
    places = np.repeat(np.arange(12, dtype=np.int32)[None], 8, 0)

    def made(*given: jax.Array) -> dict[int, tuple[jax.Array, jax.Array]]:
        found = ours.tapped(*given, None, (0, 1))[2]
        return {number: (one.hidden_BTD, jax.numpy.exp(one.attention())) for number, one in found.items()}

    found = jax.jit(made)(ids, places, seen)
    theirs = AutoModelForCausalLM.from_pretrained(
        tiny_config.model.source, dtype=torch.float32, attn_implementation="eager"
    )
    asked = torch.tensor(ids, dtype=torch.long), torch.tensor(seen, dtype=torch.long)
    with torch.no_grad():
        out = theirs(*asked, output_attentions=True, output_hidden_states=True)
    np.testing.assert_allclose(found[0][0][:, :9], out.hidden_states[1].numpy()[:, :9], rtol=2e-4, atol=2e-5)
    for layer in (0, 1):
        np.testing.assert_allclose(
            found[layer][1][:, :, :9, :9], out.attentions[layer].numpy()[:, :, :9, :9], rtol=2e-4, atol=2e-5
        )
