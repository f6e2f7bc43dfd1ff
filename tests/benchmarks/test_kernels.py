"""The kernel benchmark: at tiny shapes, with references in the kernels' place, it measures, records and draws."""

import json

import pytest
import torch

from officina.benchmarks import kernel_timing, kernels, suite, table, tune
from officina.benchmarks.kernel_cases import (
    LIGER,
    OURS,
    PLAIN,
    SLOW_STARTERS,
    Case,
    Floor,
    _overwriting,
    cases,
    compiled,
    flex,
)
from officina.benchmarks.kernel_goals import AT_MOST, GOALS, judged
from officina.benchmarks.kernel_timing import ROUNDS, Timing, Work, measure
from officina.kernels import cross_entropy
from officina.kernels.flash_attention import flash_attention_reference
from officina.kernels.masks import dense_mask, document_spans
from officina.kernels.tables import INTERPRETER, SAFE, Config
from officina.trainer.errors import EXIT_BUG, EXIT_DONE, EXIT_USER
from tests.kernels.interpreter import Interpreter

CPU = torch.device("cpu")
ONE_PHASE = {"AdamW", "X X^T"}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A whole tiny run: its record and its page."""
    path = tmp_path_factory.mktemp("out") / "kernels.json"
    assert kernels.main(["--tiny", "--out", str(path)]) == EXIT_DONE
    return json.loads(path.read_text()), path.with_suffix(".html")


def test_every_phase_of_every_case_is_measured(tiny):
    found = tiny[0]["results"]["cases"]
    assert [(case["kernel"], case["shape"]) for case in found] == [(case.kernel, case.shape) for case in cases(True)]
    for case in found:
        assert {"forward", "both"} <= set(case["phases"]) or case["kernel"] in ONE_PHASE
        for phase, value in case["phases"].items():
            ours, plain = value["entrants"][OURS], value["entrants"][PLAIN]
            assert 0 < ours["p20_s"] <= ours["median_s"] <= ours["p80_s"] and ours["calls"] >= 2 * ROUNDS
            assert ours["of_floor"] == value["floor_s"] / ours["median_s"] > 0 and plain["median_s"] > 0
            assert not SLOW_STARTERS & set(value["entrants"])
            if phase == "forward":
                assert value["difference"]["from"] == PLAIN and value["difference"]["relative"] < 1e-2
    assert tiny[0]["settings"]["tiny"] and tiny[0]["results"]["left_out"] == []


def test_who_cannot_do_a_case_is_named_and_keeps_nobody_from_it(tiny):
    failed = {(name, value["failed"]) for case in tiny[0]["results"]["cases"] for phase in case["phases"].values()
              for name, value in phase["entrants"].items() if "failed" in value}
    assert ("SDPA cuDNN" in {name for name, _ in failed}) or torch.cuda.is_available()
    try:
        import liger_kernel  # noqa: F401
    except ImportError:
        assert (LIGER, "not installed: pip install liger-kernel") in failed


def test_the_page_shows_every_figure_and_is_drawn_again_from_the_record(tiny, tmp_path):
    record, page = tiny
    text = page.read_text()
    assert "this is no measurement" in text and text.count("<svg") >= 10 and "http" not in text.replace("http://www.w3.org", "")
    for case in record["results"]["cases"]:
        for phase, value in case["phases"].items():
            for name, figures in value["entrants"].items():
                assert f"{case['shape']}, {phase}, {name}</td>" in text
                assert "failed" in figures or f"<td>{figures['median_s'] * 1e3:.3f}</td>" in text
    (tmp_path / "k.json").write_text(json.dumps(record))
    assert kernels.main(["--page", str(tmp_path / "k.json")]) == EXIT_DONE
    assert (tmp_path / "k.html").read_text() == text


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("documents", [None, torch.tensor([[0] * 5 + [1] * 20 + [2] * 7])], ids=["whole", "documents"])
def test_those_that_compile_for_long_compute_the_same(monkeypatch, causal, documents):
    """Without the compiler: what they are asked to compute is tried, not its speed."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    q, k, v = torch.randn(3, 1, 2, 32, 16).unbind()
    spans = None if documents is None else document_spans(documents)
    wanted, _ = flash_attention_reference(q, k, v, mask=dense_mask(32, 32, causal, 0, spans, CPU), scale=16**-0.5)
    torch.testing.assert_close(flex(32, causal, documents, CPU)(q, k, v), wanted)
    assert torch.equal(compiled(torch.sin)(q), q.sin())


def test_a_wrong_kernel_is_seen_beside_its_time():
    def build(device, phase, on_gpu):
        return {OURS: Work(lambda: torch.full((4,), 3.0)), PLAIN: Work(lambda: torch.full((4,), 2.0))}

    found = kernels.run(CPU, [Case("k", "4", {"forward": Floor(8.0)}, build)], kernels=False, without=set(), seconds=60,
                        tiny=True)
    assert found["results"]["cases"][0]["phases"]["forward"]["difference"]["relative"] == 0.5


def test_what_does_not_fit_into_the_time_is_named():
    found = kernels.run(CPU, cases(True)[:2], kernels=False, without=set(), seconds=-1, tiny=True)["results"]
    assert found["cases"] == [] and len(found["left_out"]) == 2
    assert all(goal["found"] is goal["met"] is None for goal in found["goals"])
    assert "Left out for want of time: attention, head 16, causal, T 32" in table._kernels(found)


def test_inputs_that_do_not_fit_fail_their_case_only():
    def build(device, phase, on_gpu):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmuch")

    found = kernels.run(CPU, [Case("k", "4", {"forward": Floor(8.0)}, build)], kernels=False, without=set(), seconds=60,
                        tiny=True)
    assert found["results"]["cases"][0]["phases"]["forward"]["failed"] == "CUDA out of memory. Tried to allocate"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("words", [[], ["--goals"], ["--only", "attention"]])
def test_without_a_gpu_it_refuses(words, capsys, tmp_path):
    assert kernels.main([*words, "--out", str(tmp_path / "k.json")]) == EXIT_USER
    assert "torch sees no GPU here. To try the program out: officina bench kernels --quick" in capsys.readouterr().err
    assert tune.main(["all", "--out", str(tmp_path)]) == EXIT_USER
    assert "tuning needs a GPU" in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize(("words", "left_out"), [([], set()), (["--goals"], SLOW_STARTERS), (["--goals", "--compiled"], set())])
def test_who_is_measured_on_a_gpu(words, left_out, monkeypatch):
    class Asked(Exception):
        pass

    def run(device, chosen, *, without, **_):
        raise Asked(without)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(kernels, "compile_ahead", lambda *_: None)
    monkeypatch.setattr(kernels, "run", run)
    with pytest.raises(Asked) as asked:
        kernels.main(words)
    assert asked.value.args == (left_out,)


def test_an_unknown_kernel_is_refused_with_the_known_ones(capsys, monkeypatch, tmp_path):
    assert kernels.main(["--tiny", "--only", "atention"]) == EXIT_USER
    assert "there is no kernel atention; there are attention, RMSNorm" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(tune, "arch_of", lambda device: "sm_90")
    assert tune.main(["atention", "--out", str(tmp_path)]) == EXIT_USER
    assert "there is no table of atention; there are attention, attention_hopper, cross_entropy" in capsys.readouterr().err


# ---- goals ---------------------------------------------------------------------------------------------------------
def test_every_goal_is_measured_by_a_case_and_every_case_with_a_goal_has_one():
    chosen = {(case.kernel, case.shape): case for case in cases(False) if case.goal}
    entrants: dict = {}
    for case in cases(True):
        for phase in case.floors:
            entrants.setdefault((case.kernel, phase), set()).update(case.build(CPU, phase, False))
    for goal in GOALS:
        assert goal.phase in chosen[goal.kernel, goal.shape].floors
        assert goal.entrant in entrants[goal.kernel, goal.phase]
        if goal.measure == "times the speed of":
            assert goal.against in entrants[goal.kernel, goal.phase]
        if goal.measure == "times the rate of":
            assert (goal.kernel, goal.against) in chosen
    assert {"attention", "RMSNorm", "SwiGLU", "cross-entropy", "linear cross-entropy"} <= {kernel for kernel, _ in chosen}


def test_goals_are_judged_by_what_they_measure():
    def entrant(ms, tera):
        return {"median_s": ms / 1e3, "flops_per_s": tera * 1e12, "bytes_per_s": tera * 1e12, "peak_bytes": 2.2e9}

    names = {name for goal in GOALS for name in (goal.entrant, goal.against, OURS)}
    shapes = {(goal.kernel, shape) for goal in GOALS for shape in (goal.shape, goal.against)}
    found = [{"kernel": kernel, "shape": shape, "facts": {"gradient_bytes": 1.1e9},
              "phases": {phase: {"entrants": {name: entrant(2.0, 400.0) for name in names}}
                         for phase in ("forward", "backward", "both", "step")}} for kernel, shape in shapes]
    by_measure = {goal.measure: value for goal, value in zip(GOALS, judged(found), strict=True)}
    assert {measure: value["found"] for measure, value in by_measure.items()} == {
        "TFLOP/s": 400.0, "TB/s": 400.0, "ms": 2.0, "times the speed of": 1.0, "times the rate of": 1.0,
        "GB beyond the gradients": pytest.approx(1.1)}
    for goal, value in zip(GOALS, judged(found), strict=True):
        assert value["met"] == (value["found"] <= goal.must if goal.measure in AT_MOST else value["found"] >= goal.must)
    assert "| 400 |" in table._kernels({"goals": judged(found), "left_out": [], "without": [], "ceilings": {
        "copy_bytes_per_s": 4e12, "matmul_flops_per_s": 8e14}})


def test_floors_are_those_of_the_formulas():
    found = {(case.kernel, case.shape): case.floors for case in cases(False)}
    full, causal = (found["attention", f"head 128, {mask}, T 4096"]["forward"] for mask in ("full", "causal"))
    assert full.flops == 2 * causal.flops == 4 * 4 * 16 * 4096**2 * 128
    assert found["attention", "head 128, full, T 4096"]["backward"].flops == 2.5 * full.flops
    assert found["cross-entropy", "8192 x 131072"]["both"].bytes == 2 * 2 * 8192 * 131_072
    assert found["linear cross-entropy", "8192 x 4096 x 131072"]["both"].flops == 6 * 8192 * 4096 * 131_072
    packed = next(case for case in cases(False) if "documents" in case.shape)
    lengths = packed.facts["lengths"]
    assert sum(lengths) == 32_768 and 1000 < sum(lengths) / len(lengths) < 4000
    assert packed.floors["forward"].flops == sum(4 * 16 * n * n * 128 / 2 for n in lengths)


# ---- timing --------------------------------------------------------------------------------------------------------
def test_entrants_take_turns_and_inputs_are_restored_before_each_call():
    calls = []
    found = measure({name: Work(lambda name=name: calls.append(name), lambda name=name: calls.append(f"before {name}"))
                     for name in "ab"} | {"c": Work(lambda: 1 / 0)}, CPU, round_s=0)
    assert found["c"] == "division by zero" and found["a"].calls == 2 * ROUNDS and found["a"].peak_bytes is None
    assert all(before == f"before {name}" for before, name in zip(calls[::2], calls[1::2], strict=True))
    turns = calls[1::2][6:]  # after warming up: one call and two, of each
    assert turns == [name for turn in range(ROUNDS) for name in ("aabb", "bbaa")[turn % 2]]


def test_an_error_without_words_is_named():
    assert kernel_timing.failure(NotImplementedError()) == "NotImplementedError"


# ---- tuning --------------------------------------------------------------------------------------------------------
def tune_in_the_interpreter(out):
    """The real kernels, for the three launches of the cross-entropy; in a process with Triton's interpreter."""
    from pathlib import Path

    for sweep in tune._cross_entropy("sm_90", 3, 100, torch.float16):
        found = tune.tune(tune.Sweep(sweep.kernel, sweep.table_name, sweep.table, sweep.key, [
            Config(1, 64, 4, 1), Config(1, 128, 4, 1), Config(1, 100, 4, 1)], sweep.build), CPU, round_s=0)
        assert list(found["measured"]) == ["Config(1, 64, 4, 1)", "Config(1, 128, 4, 1)", "Config(1, 100, 4, 1)"]
        failed = [name for name, value in found["measured"].items() if "failed" in value]
        assert failed == ["Config(1, 100, 4, 1)"] and "power of 2" in found["measured"][failed[0]]["failed"], found
    sweep = tune.Sweep(sweep.kernel, "CONFIGS", sweep.table, sweep.key, [Config(1, 128, 4, 1)], sweep.build)
    tune.write([sweep], CPU, Path(out), 60.0, round_s=0)
    return cross_entropy.CONFIGS[INTERPRETER]["loss_and_gradient"].block_n


def test_tuning_runs_up_to_the_launch_and_leaves_the_table_as_it_was(tmp_path):
    process = Interpreter()
    try:
        assert process.run("tests.benchmarks.test_kernels:tune_in_the_interpreter", str(tmp_path)) == 64
    finally:
        process.close()
    [found] = json.loads((tmp_path / "tune.json").read_text())["results"]["sweeps"]
    assert found["present"] == "Config(1, 64, 4, 1)" and found["arch"] == INTERPRETER and found["gain"] >= 1
    assert (tmp_path / "tables.txt").read_text() in ("", found["entry"] + "\n")


def test_the_fastest_is_taken_if_it_is_faster_by_more_than_noise(monkeypatch):
    slow, even, fast = Config(1, 64, 4, 1), Config(1, 128, 4, 1), Config(1, 256, 4, 1, {"waves_per_eu": 2})
    seconds = {slow: 1.0, even: 0.99, fast: 0.5}
    table = {SAFE: {"k": slow}}
    seen = []

    def fake(entrants, device, *, round_s):
        for work in entrants.values():
            work.run()
        return {name: Timing(seconds[config], 0, 0, 1, None) for name, config in zip(entrants, seen, strict=True)}

    monkeypatch.setattr(tune, "measure", fake)
    for tried, best in (([even, fast], fast), ([even], slow)):
        seen.clear()
        sweep = tune.Sweep("k", "T", table, "k", tried, lambda device: Work(lambda: seen.append(table[INTERPRETER]["k"])))
        found = tune.tune(sweep, CPU)
        assert found["best"] == tune._text(best) and table == {SAFE: {"k": slow}}
    assert tune._text(fast) == "Config(1, 256, 4, 1, {'waves_per_eu': 2})"
    monkeypatch.setattr(tune, "measure", lambda entrants, device, *, round_s: dict.fromkeys(entrants, "no"))
    with pytest.raises(RuntimeError, match="k, k: no configuration ran: no"):
        tune.tune(sweep, CPU)


@pytest.mark.parametrize("arch", ["sm_90", "gfx90a"])
def test_every_sweep_names_an_entry_of_a_table(arch):
    for sweep in tune.sweeps(arch):
        assert sweep.key in {**sweep.table.get(SAFE, {}), **sweep.table.get(arch, {})}, (sweep.kernel, sweep.key)
        assert all(config.num_stages == 1 for config in sweep.candidates) or arch == "sm_90"
    names = [sweep.table_name for sweep in tune.sweeps(arch)]
    for name in ("FORWARD_HOPPER", "BACKWARD_KEYS_HOPPER", "BACKWARD_QUERIES_HOPPER"):
        assert names.count(name) == (4 if arch == "sm_90" else 0)


# ---- the list of benchmarks ----------------------------------------------------------------------------------------
def test_all_leaves_out_what_needs_a_gpu_unless_it_is_quick(monkeypatch, tmp_path):
    ran = []
    monkeypatch.setattr(suite, "run", lambda names, out, quick=False: ran.append(names) or 0)
    suite.main(["all", "--out", str(tmp_path)])
    suite.main(["all", "--quick", "--out", str(tmp_path)])
    suite.main(["kernels", "--out", str(tmp_path)])
    assert "kernels" not in ran[0] and "kernels" in ran[1] and ran[2] == ["kernels"]


def test_what_the_user_can_mend_is_the_exit_status(monkeypatch, tmp_path):
    class Done:
        returncode = EXIT_USER

    monkeypatch.setattr(suite.subprocess, "run", lambda *args, **words: Done)
    assert suite.run(["kernels"], tmp_path) == EXIT_USER
    monkeypatch.setattr(Done, "returncode", 1)
    assert suite.run(["kernels"], tmp_path) == EXIT_BUG


class Spoiling(torch.autograd.Function):
    """x^2, whose backward pass leaves the gradient where x was."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, upper):
        x = ctx.saved_tensors[0].data
        return x.mul_(2 * upper).clone()


@pytest.mark.parametrize("phase", ["backward", "both"])
def test_an_entrant_that_writes_over_its_inputs_spoils_nobodys_and_begins_anew_each_time(phase):
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(1)).requires_grad_()
    before, work, seen = x.detach().clone(), _overwriting(Spoiling.apply, (x,), phase), []
    for _ in range(2):
        work.before()
        seen.append(work.run()[-1])
    assert torch.equal(x, before) and torch.equal(*seen)
