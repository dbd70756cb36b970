"""The learning-rate finder: a ramp on copies, read where the loss falls fastest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from jaxtune import lr_find
from jaxtune.train import start
from jaxtune.types import UserError

pytestmark = pytest.mark.usefixtures("quick_compile")


def test_a_ramp_is_read_where_it_falls_fastest() -> None:
    rates = np.geomspace(1e-6, 1, 61)
    falls = 3 - 2 / (1 + np.exp(-4 * np.log10(rates / 1e-3)))  # steepest at 1e-3
    losses = (falls + np.where(rates > 0.05, (np.log10(rates / 0.05)) * 3, 0)).tolist()
    found = lr_find.suggest(rates.tolist(), losses, losses, True)
    assert found.suggestion == pytest.approx(1e-3, rel=0.3)
    assert found.suggestion < found.lowest < 0.1
    assert lr_find.suggest(rates.tolist(), rates.tolist(), rates.tolist(), False).suggestion is None
    with pytest.raises(UserError, match="lr_find.low"):
        lr_find.suggest([1e-7], [1.0], [1.0], True)


def test_a_ramp_has_the_reference_that_is_computed_before(
    tiny_config: ConfigDict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, workdir = tmp_path / "pairs.jsonl", Path(tiny_config.workdir)
    rows.write_text(
        "".join(json.dumps({"prompt": f"who {i}", "chosen": "cat", "rejected": "dog"}) + "\n" for i in range(20))
    )
    tiny_config.data.train, tiny_config.train.objective, tiny_config.tune.method = str(rows), "dpo", "full"
    given: list[Any] = []

    def find(config: ConfigDict, program: Any, state: Any, frozen: Any, batches: Any) -> lr_find.Found:
        given.append(next(iter(batches)))
        return lr_find.Found([1e-3], [1.0], [1.0], None, 1e-3, False)

    monkeypatch.setattr(lr_find, "find", find)
    lr_find.lr_find(tiny_config, workdir)
    trained = given[0]["weights_BT"] != 0
    assert (given[0]["reference_logps_BT"][trained] < 0).all()
    assert not (workdir / "reference.npz").exists()


def test_the_verb_finds_a_rate_and_touches_nothing(
    tiny_config: ConfigDict, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_config.lr_find.update({"low": 1e-5, "high": 30.0, "num_steps": 40, "smoothing": 0.5, "stop_factor": 1.5})
    tiny_config.tune.method, tiny_config.mesh.fsdp, workdir = "full", 8, Path(tiny_config.workdir)
    held: list[Any] = []
    load = start.load

    def kept(*args: Any) -> Any:
        state, frozen = load(*args)
        held.extend([state, {path: np.asarray(value) for path, value in state.params.items()}])
        return state, frozen

    monkeypatch.setattr(start, "load", kept)
    lr_find.lr_find(tiny_config, workdir)
    told = json.loads((workdir / "lr_find.json").read_text())
    assert told["diverged"]
    assert 1e-5 < told["suggestion"] <= told["lowest"] < told["rates"][-1] < 30
    ratios = np.diff(np.log(told["rates"]))
    np.testing.assert_allclose(ratios, ratios[0], rtol=1e-3)
    assert min(told["smooth"]) < told["smooth"][0] - 0.1
    assert (workdir / "lr_find.png").read_bytes()[:4] == b"\x89PNG"
    assert "learning_rate=" in capsys.readouterr().out
    state, before = held
    jax.tree.map(np.testing.assert_array_equal, {path: np.asarray(x) for path, x in state.params.items()}, before)
    assert {path.name for path in workdir.iterdir()} == {"lr_find.json", "lr_find.png"}
