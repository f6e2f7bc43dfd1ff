"""Weights by temperature: those of the formula, written out when a run is planned, kept and renewed by resumes."""

from pathlib import Path

import numpy as np
import pytest
from data_sets import write_tokens

from officina.launch.start import describe_run, plan_resume, plan_train, write_start
from officina.trainer.checkpoint.layout import step_dir
from officina.trainer.data.order import Mixture, timeline_of
from officina.trainer.run_dir import load_config

SIZES = {"fi1": (900, "fin_Latn"), "fi2": (8100, "fin_Latn"), "sv": (4000, "swe_Latn"), "mt": (100, "mlt_Latn")}


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> list[str]:
    folder, out = tmp_path_factory.mktemp("sets"), ["batch.seq_len=8", "batch.global_tokens=64", "model.vocab_size=100000"]
    for name, (tokens, language) in SIZES.items():
        write_tokens(folder / name, {"train": [tokens]}, languages=[language])
        out.append(f"data.sources.{name}.path={folder / name}")
    return out


def weights(words: list[str], tmp_path: Path) -> dict[str, float]:
    plan = plan_train(words, tmp_path, world_size=1).checked()
    assert plan.run.data.temperature is None
    return {name: source.weight for name, source in plan.run.data.sources.items()}


@pytest.mark.parametrize("temperature", [1, 3.33, 1000, 0.5])
def test_weights_are_those_of_the_formula(words, tmp_path: Path, temperature: float) -> None:
    found = weights([*words, f"data.temperature={temperature}"], tmp_path)
    flat = {name: tokens ** (1 / temperature) for name, (tokens, _) in SIZES.items()}
    assert found == pytest.approx({name: value / sum(flat.values()) for name, value in flat.items()}, abs=1e-6)
    found = weights([*words, f"data.temperature={temperature}", "data.temperature_over=languages"], tmp_path)
    flat = {g: sum(n for n, of in SIZES.values() if of == g) ** (1 / temperature) for g in ("fin_Latn", "swe_Latn", "mlt_Latn")}
    for name, share in (("sv", "swe_Latn"), ("mt", "mlt_Latn")):
        assert found[name] == pytest.approx(flat[share] / sum(flat.values()), abs=1e-6)
    assert found["fi2"] == pytest.approx(9 * found["fi1"], abs=1e-5)
    assert found["fi1"] + found["fi2"] == pytest.approx(flat["fin_Latn"] / sum(flat.values()), abs=2e-6)


def test_the_order_has_these_shares_and_check_shows_them(words, tmp_path: Path) -> None:
    run = plan_train([*words, "data.temperature=2"], tmp_path, world_size=1).checked().run
    mixture = Mixture(timeline_of(run.data))
    shares = np.bincount(mixture.place(np.arange(100_000))[0]) / 100_000
    flat = np.sqrt([SIZES[name][0] for name in mixture.names])
    assert shares == pytest.approx(flat / flat.sum(), abs=1e-4)
    line = dict(describe_run(run, 1))["data"]
    assert f"fi2 ({run.data.sources['fi2'].path}) {90 / (30 + 90 + 63.2456 + 10):.2%}" in line


def test_a_resume_keeps_the_weights_and_renews_them_when_asked(words, tmp_path: Path, monkeypatch) -> None:
    plan = plan_train([*words[:5], "name=r", "data.temperature=2"], tmp_path, world_size=1).checked()
    write_start(plan, 1)
    assert "temperature: null" in (tmp_path / "r" / "config.yaml").read_text()
    assert load_config(tmp_path / "r").data.sources["fi1"].weight == pytest.approx(0.25)
    from officina.launch import start

    origin = start.Origin(tmp_path / "r", plan.run, 10, 80)
    monkeypatch.setattr(start, "read_origin", lambda *_, **__: origin)
    assert not step_dir(tmp_path / "r", 10).exists()
    kept = plan_resume(tmp_path / "r", ["optim.lr=1e-4"], world_size=1).checked().run
    assert kept.data.sources == plan.run.data.sources and not kept.data.timeline
    joined = plan_resume(tmp_path / "r", [words[5], "data.temperature=2"], world_size=1).checked().run
    past, now = joined.data.timeline
    assert (past.weights, now.from_sample) == ({"fi1": 0.25, "fi2": 0.75}, 80)
    flat = {name: SIZES[name][0] ** 0.5 for name in ("fi1", "fi2", "sv")}
    assert now.weights == pytest.approx({name: value / sum(flat.values()) for name, value in flat.items()}, abs=1e-6)


def test_what_does_not_go_together_is_said(words, tmp_path: Path) -> None:
    def problem(*more: str) -> str:
        [found] = plan_train([*words, *more], tmp_path, world_size=1).problems
        return str(found)

    assert "data.sources.sv.weight is given too" in problem("data.temperature=2", "data.sources.sv.weight=3")
    write_tokens(tmp_path / "two", {"train": [500]}, languages=["fin_Latn", "swe_Latn"])
    assert "has 2 languages" in problem(
        "data.temperature=2", "data.temperature_over=languages", f"data.sources.two.path={tmp_path / 'two'}")
    assert "data.temperature" in problem("data.temperature=0")
