"""Prices are exact; a roofline is what its numbers say; chips are data that a user edits."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from jaxtune import chips, launch, validation
from jaxtune import config as config_lib
from jaxtune.plan import cost, cpu, flops
from jaxtune.types import UserError


@pytest.fixture
def config() -> ConfigDict:
    return config_lib.base()


def priced(config: ConfigDict, **changes: object) -> dict:
    for key, value in changes.items():
        config.plan[key] = value
    validation.validate(config)
    return cost.api(config, None)


def test_half_a_million_tokens_cost_twenty_dollars(config: ConfigDict) -> None:
    found = priced(config, api_training_usd_per_1k_tokens=(0.04,), api_training_tokens=(500_000,))
    assert found == {"training_tokens": 500_000, "training_usd": 20}


def test_a_month_costs_two_hundred_dollars(config: ConfigDict) -> None:
    given = {"monthly_requests": (100_000,), "tokens_per_request": (50,)}
    found = priced(config, api_inference_usd_per_1k_tokens=(0.04,), **given)
    assert found == {"monthly_tokens": 5_000_000, "monthly_inference_usd": 200}


def test_ranges_are_exact_at_both_ends(config: ConfigDict) -> None:
    found = priced(
        config, api_training_usd_per_1k_tokens=(0.008, 0.04), api_training_tokens=(100_000, 500_000),
        api_inference_usd_per_1k_tokens=("0.012", "0.04"), monthly_requests=(10_000, 100_000), tokens_per_request=(50, 70),
    )  # fmt: skip
    assert found["training_usd"] == [0.8, 20]
    assert found["monthly_inference_usd"] == [6, 280]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"tokens_per_request": (70, 50)}, "low, high"),
        ({"monthly_requests": ("many",)}, "monthly_requests"),
        ({"api_training_usd_per_1k_tokens": (0.04,)}, "api_training_tokens"),
        ({"api_inference_usd_per_1k_tokens": (0.04,)}, "monthly_requests"),
        ({"api_training_tokens": (500_000,)}, "has no price"),
    ],
)
def test_what_cannot_be_priced_is_said(config: ConfigDict, changes: dict, says: str) -> None:
    with pytest.raises(UserError, match=says):
        priced(config, **changes)


def test_a_service_needs_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "c.py"
    path.write_text("from jaxtune import config\ndef get_config():\n  return config.base()\n")
    flags = [
        "api_training_usd_per_1k_tokens=0.04",
        "api_training_tokens=500000",
        "api_inference_usd_per_1k_tokens=0.04",
    ]
    flags += ["monthly_requests=100000", "tokens_per_request=50"]
    given = [f"--config.plan.{flag}" for flag in flags]
    assert launch.main(["plan", f"--config={path}", f"--workdir={tmp_path / 'w'}", *given]) == 0
    found = json.loads((tmp_path / "w" / "plan.json").read_text())
    assert (found["training_usd"], found["monthly_inference_usd"]) == (20, 200)
    assert "20" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--config.plan.monthly_requests=5"], "a month of inference needs all of"),
        (["--config.plan.api_training_tokens=5"], "has no price"),
        (["--search", "--config.plan.api_training_usd_per_1k_tokens=1", "--config.plan.api_training_tokens=5"], "model.source is empty"),
        (["--topologies=cpu", "--config.model.source=preset:llama_tiny"], "ranks slices of TPUs"),
        (["--config.plan.topology=v5e:2x2", "--config.train.objective=reward", "--config.model.source=preset:llama_tiny"], "what goes together"),
        (["--topologies=v5e:2x2,nope", "--config.model.source=preset:llama_tiny"], "plan.topology='nope'"),
    ],
)  # fmt: skip
def test_half_a_question_is_not_taken_for_another(
    flags: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "c.py"
    path.write_text(
        "from jaxtune import config\ndef get_config():\n  c = config.base()\n  c.plan.topology = ''\n  return c\n"
    )
    assert launch.main(["plan", f"--config={path}", f"--workdir={tmp_path / 'w'}", *flags]) == 2
    assert says in capsys.readouterr().err


def test_inference_alone_asks_nothing_of_the_training_rows(tmp_path: Path) -> None:
    path = tmp_path / "c.py"
    path.write_text(
        "from jaxtune import config\ndef get_config():\n  c = config.base()\n  c.data.train = 'rows.jsonl'\n  return c\n"
    )
    given = ["api_inference_usd_per_1k_tokens=0.04", "monthly_requests=100000", "tokens_per_request=50"]
    flags = [f"--config.plan.{flag}" for flag in given]
    assert launch.main(["plan", f"--config={path}", f"--workdir={tmp_path / 'w'}", *flags]) == 0
    assert json.loads((tmp_path / "w" / "plan.json").read_text())["monthly_inference_usd"] == 200


def test_tokens_of_all_steps_where_no_number_is_given(config: ConfigDict) -> None:
    config.plan.api_training_usd_per_1k_tokens = (0.04,)
    assert cost.api(config, 2_000)["training_usd"] == 0.08


# ---- the roofline ----


def work(**changes: float) -> cost.Work:
    given = {"flops_by_dtype": {"bfloat16": 16 * 197e12}, "model_flops": 8 * 197e12, "hbm_bytes": 0.0, "ici_bytes": 0.0}
    return cost.Work(**{**given, "dcn_bytes": 0.0, "tokens": 1000, **changes})


def test_a_step_takes_as_long_as_its_slowest_resource() -> None:
    place = chips.slice_of("v5e:4x4", chips.table())
    made = cost.forecast(work(), place, steps=3600, efficiency=0.5)
    assert made.limited_by == "compute"
    assert made.step_seconds == pytest.approx(2.0)  # 197e12 FLOPs a chip at half its peak
    assert made.model_flops_utilisation == pytest.approx(0.25)
    assert made.training_usd == pytest.approx(2 * 16 * 1.20)
    assert made.usd_per_million_tokens == pytest.approx(2 / 3600 * 16 * 1.20 * 1000)
    assert cost.forecast(work(hbm_bytes=819e9 * 3), place, 1, 1.0).seconds_by_resource["hbm"] == pytest.approx(3)
    slow = cost.forecast(
        work(ici_bytes=100e9 * 4), place, 1, 1.0
    )  # 4 x 4 closes no ring: one link a side, 50e9 bytes/s each
    assert (slow.limited_by, slow.step_seconds) == ("ici", pytest.approx(4))


def test_what_is_sent_at_an_unknown_speed_is_said() -> None:
    table = chips.table()
    v4, v5p = (chips.slice_of(name, table, num_slices=2) for name in ("v4:2x2x2", "v5p:2x2x2"))
    made = cost.forecast(work(dcn_bytes=1e9), v4, 1, 1.0)
    assert (made.not_counted, made.seconds_by_resource["dcn"]) == (("dcn",), 0.0)
    assert cost.forecast(work(dcn_bytes=1e9), v5p, 1, 1.0).not_counted == ()
    assert cost.forecast(work(), v4, 1, 1.0).not_counted == ()


def test_eight_bits_are_faster_where_the_chip_says_so() -> None:
    table = chips.table()
    for name, ratio in (("v6e", 2.0), ("v4", 1.0)):
        place = chips.slice_of(f"{name}:2x2" + "x1" * (name == "v4"), table)
        seconds = [
            cost.forecast(work(flops_by_dtype={dtype: 1e15}), place, 1, 1.0).step_seconds
            for dtype in ("bfloat16", "int8")
        ]
        assert seconds[0] / seconds[1] == pytest.approx(ratio)


def test_a_chip_of_two_devices_has_the_same_peak() -> None:
    place = chips.slice_of("tpu7x:2x2x1", chips.table())
    made = cost.forecast(work(flops_by_dtype={"bfloat16": 4 * 2307e12}, model_flops=4 * 2307e12), place, 1, 1.0)
    assert (place.num_chips, place.num_devices) == (4, 8)
    assert made.step_seconds == pytest.approx(1)
    assert made.model_flops_utilisation == pytest.approx(1)


# ---- chips ----


def test_every_figure_has_its_source() -> None:
    for chip in chips.table().values():
        assert chip.spec_source
        assert chip.price_source
        assert chip.hbm_bytes_per_second > 5e11
        assert chip.peak("bfloat16") > 1e14


def test_a_users_prices_win(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('[v5e]\nusd_per_chip_hour = 0.54\nprice_source = "our contract"\n[new]\nhbm_gib = 8\nhbm_gb_per_second = 100\ntflops = { bfloat16 = 1 }\n')  # fmt: skip
    table = chips.table(str(path))
    assert (table["v5e"].usd_per_chip_hour, table["v5e"].price_source) == (0.54, "our contract")
    assert table["v5e"].hbm_bytes == chips.table()["v5e"].hbm_bytes
    assert table["new"].usd_per_chip_hour is None
    for text, says in (
        ("[v5e]\nusd = 1\n", "'usd'"),
        ("price = 1\n", "outside a table"),
        ("[x]\nhbm_gib = 1\n", "lacks"),
        ("[", "TOML"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=says):
            chips.table(str(path))
    with pytest.raises(UserError, match="expected a TOML"):
        chips.table(str(tmp_path / "none.toml"))


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("usd_per_chip_hour = -3", "usd_per_chip_hour = -3; expected a number of 0 or more"),
        ("usd_per_chip_hour = nan", "usd_per_chip_hour = nan; expected"),
        ('usd_per_chip_hour = "1.2"', "usd_per_chip_hour = '1.2'; expected a number"),
        ("hbm_gib = inf", "hbm_gib = inf; expected a number above 0"),
        ("hbm_gib = true", "hbm_gib = True; expected a number"),
        ("tflops = { bfloat16 = nan }", "tflops.bfloat16 = nan; expected a number above 0"),
        ("devices = 0", "devices = 0; expected a number of 1 or more"),
        ("ici_gb_per_second = -1", "ici_gb_per_second = -1"),
        ('slices = ["4xx4"]', "a slice '4xx4'; expected shapes"),
        ('slices = "4x4"', "expected a list"),
        ('device_kinds = "TPU v5e"', "expected a list"),
    ],
)
def test_figures_that_no_chip_has(line: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(f"[v5e]\n{line}\n")
    with pytest.raises(UserError, match=f"mine.toml.*v5e.*{re.escape(says)}"):
        chips.table(str(path))


@pytest.mark.parametrize(("name", "shape"), [("v5e-64", "v5e:8x8"), ("v5p-8", "v5p:2x2x1"), ("tpu7x-16", "tpu7x:2x2x2"), ("v4:2x2x4", "v4:2x2x4")])  # fmt: skip
def test_names_of_slices(name: str, shape: str) -> None:
    assert chips.slice_of(name, chips.table()).name == shape


@pytest.mark.parametrize("name", ["v5e-63", "v9-8", "v5e:0x4", "v5e", "v5e:4"])
def test_names_of_no_slice(name: str) -> None:
    with pytest.raises(UserError, match="plan.topology"):
        chips.slice_of(name, chips.table())


def test_a_wrong_shape_is_not_called_a_wrong_generation() -> None:
    for name, hint in (("v5e:0x4", False), ("V5E:4x4", True)):
        with pytest.raises(UserError) as error:
            chips.slice_of(name, chips.table())
        assert ("did you mean 'v5e'" in str(error.value)) == hint


def test_this_machine_is_measured() -> None:
    place = cpu.machine("cpu:8")
    assert place.num_devices == 8
    assert place.chip.peak("float32") > 1e9
    dots = flops.Dots({flops.Dot("dot", 1, 256, 256, 256, "float32"): 10, flops.Dot("dot", 4, 32, 8, 32, "float32"): 1})
    alone = cpu.dot_seconds(flops.Dots({flops.Dot("dot", 1, 256, 256, 256, "float32"): 10}))
    assert 0.3 * alone < cpu.dot_seconds(dots) < 30 * alone
    for wrong in ("cpu:x", "cpu:0", "cpu:4096"):
        with pytest.raises(UserError, match="cpu"):
            cpu.machine(wrong)
