import json
import math
import random
import re
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
from data_sets import write_tokens

from officina.launch.report import main, summary, write_report
from officina.launch.report_charts import Chart, Mark, Series, _columns, _smooth, draw
from officina.launch.report_gather import gather
from officina.launch.report_words import count, number, size
from officina.trainer.config import (
    BatchConfig,
    CustomModelConfig,
    DataConfig,
    DecoderConfig,
    ObjectiveConfig,
    RunConfig,
    SourceConfig,
    TimelineStage,
)
from officina.trainer.data.describe import change
from officina.trainer.data.policy import Policy
from officina.trainer.environment import describe, rank_facts, write_environment
from officina.trainer.errors import OfficinaError
from officina.trainer.metrics import (
    EvalMetrics,
    MetricsWriter,
    SaveMetrics,
    StartMetrics,
    StepMetrics,
    StopMetrics,
)
from officina.trainer.run_dir import Start, append_history, load_config, save_config

SAMPLE = '''class Queue:
    def __init__(self, maxsize=0):
        self.maxsize = maxsize
        self.queue = []

    def put(self, item, block=True, timeout=None):
        """Put an item into the queue & <wait>."""
        with self.not_full:
            self.queue.append(item)'''
BEGUN = 1_795_000_000.0


def make_run(folder: Path, *, steps: int = 600, gpu: bool = False, personal: bool = False) -> Path:
    """A run directory as the training loop leaves it: FSDP2 killed at 263, ZeRO-2 from 200 until a time limit at 420,
    DDP to the end; two sources, a step left out, a spike, a save that failed."""
    run_dir, noise = folder / "first-run", random.Random(0)
    run_dir.mkdir(parents=True)
    for name, about in (("stdlib", {"personal_data": "present" if personal else "none"}), ("docs", {})):
        write_tokens(folder / f"python-{name}", {"train": [60 * 16 * 256]}, licence="PSF-2.0", **about)
    run = RunConfig(
        name="first-run", steps=steps,
        model=DecoderConfig(vocab_size=4096, n_layers=6, d_model=256, n_heads=8, n_kv_heads=2),
        batch=BatchConfig(global_tokens=16384, seq_len=256),
        data=DataConfig(sources={"stdlib": SourceConfig(path=str(folder / "python-stdlib"), weight=3.0),
                                 "docs": SourceConfig(path=str(folder / "python-docs"))}))
    save_config(run, run_dir / "config.yaml")
    at = {share: round(steps * share) for share in (1 / 3, 0.4383, 0.7, 1.0)}
    first, killed, stopped, end = at.values()
    lives = [("start", "fsdp2", 2, 0, killed, None), ("resume", "zero2", 3, first, stopped, ("time limit", 75)),
             ("resume", "ddp", 1, stopped, end, ("done", 0))]
    clock, left_out, spiked = BEGUN, round(steps * 0.23), round(steps * 0.55)
    changes = [(), [{"key": "engine.kind", "old": "fsdp2", "new": "zero"}, {"key": "ranks", "old": 2, "new": 3}],
               [{"key": "engine.kind", "old": "zero", "new": "ddp"}, {"key": "optim.lr", "old": 0.003, "new": 0.002}]]
    words = [["experiment=demo", "name=first-run", "optim.lr=3e-3"], ["engine=zero2", "ranks=3"],
             ["engine=ddp", "ranks=1", "optim.lr=2e-3"]]
    with MetricsWriter(run_dir) as writer, open(run_dir / "ledger.jsonl", "w") as ledger:
        for (action, engine, ranks, begin, stop, ended), life_words, life_changes in zip(
                lives, words, changes, strict=True):
            clock += 300
            append_history(run_dir, Start(
                run_id="0123456789abcdef", action=action, words=life_words, changes=life_changes, step=begin, world_size=ranks,
                engine=engine, commit="f877cbc", time=datetime.fromtimestamp(clock - 5, UTC).isoformat(timespec="seconds")))
            device = "NVIDIA H200" if gpu else "cpu"
            writer.write(StartMetrics(
                step=begin, action=action, engine=engine, world_size=ranks, device=device, precision="bf16",
                parameters=5_123_456, flops_per_token_causal=3.1e7, flops_per_token_full=3.3e7, time=clock,
                peak_flops=989.4e12 if gpu else None,
                problems=("step-00000250: rank-00001.bin: chunk 7 differs",) if engine == "zero2" else ()))
            ledger.write(json.dumps({"start": begin}) + "\n")
            for n in range(begin + 1, stop + 1):
                slow = 9.0 if n == begin + 1 else 1.0
                step_s = slow * (0.52 / ranks**0.8) * noise.uniform(0.95, 1.1)
                clock += step_s
                where = n / steps
                loss = 1.3 + 7.0 * (1 + 60 * where) ** -0.62 + noise.gauss(0, 0.05)
                norm = (0.35 + 3 * math.exp(-where * 20)) * noise.uniform(0.8, 1.25)
                bad = n == left_out
                spike = n == spiked
                lr = 3e-3 * min(1, n / 40) * (0.55 + 0.45 * math.cos(math.pi * where))
                writer.write(StepMetrics(
                    step=n, tokens=16256, loss_nats=loss + 1.4 * spike, grad_norm=math.inf if bad else norm + 6 * spike,
                    lr=lr, step_time_s=step_s, data_wait_s=step_s * noise.uniform(0.002, 0.02),
                    tokens_per_s=16256 / step_s, applied=not bad, spike=spike, time=clock,
                    mfu_causal=0.45 / slow if gpu else None, mfu_full=0.48 / slow if gpu else None,
                    peak_memory_bytes=int((0.9 + 0.9 / ranks) * 2**30)))
                ledger.write(json.dumps({"step": n, "source_rows": {"stdlib": 48, "docs": 16}}) + "\n")
                if n % max(1, steps // 12) == 0:
                    for source, shift in (("stdlib", 0.06), ("docs", 0.35)):
                        clock += 0.8
                        writer.write(EvalMetrics(step=n, source=source, loss_nats=loss + shift + noise.gauss(0, 0.01),
                                                 tokens=65_000 if source == "stdlib" else 20_000, time=clock))
                if n % max(1, steps // 6) == 0:
                    failed = n == steps // 6 * 5
                    name = f"checkpoints/step-{n:08d}"
                    if not failed and n >= steps // 6 * 4:
                        (run_dir / name).mkdir(parents=True, exist_ok=True)
                        (run_dir / name / "COMMIT").write_text("{}")
                    clock += 0.3
                    writer.write(SaveMetrics(
                        step=n, path=name, bytes=61_481_472, stall_s=0.21, durable_s=0.34, time=clock,
                        problem="no space left: 58.6 MiB needed, 12 MiB free" if failed else None))
            if ended:
                writer.write(StopMetrics(step=stop, reason=ended[0], exit_status=ended[1], time=clock + 0.5))
    write_environment(run_dir, describe(launcher="officina", threads=1, device={"kind": "cpu", "capability": "AVX512"},
                                        ranks=[rank_facts(0, 0)]))
    (run_dir / "samples.txt").write_text(SAMPLE)
    return run_dir


# ---- the page -------------------------------------------------------------------------------------------------------
class Page(HTMLParser):
    """Checks that elements are closed in order, and collects what a reader and a browser see."""

    VOID = frozenset({"meta", "input", "br"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.text, self.charts, self.outside = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.outside += [v for k, v in attributes if k in ("src", "href") and v]
        if tag == "svg" and "data-chart" in found:
            self.charts.append(json.loads(found["data-chart"]) | {"label": found["aria-label"]})
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] not in (["style"], ["script"]):
            self.text.append(data)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    path = make_run(tmp_path_factory.mktemp("runs"))
    write_report(path)
    return path


@pytest.fixture(scope="module")
def found(run_dir):
    return Page((run_dir / "report.html").read_text())


def test_the_page_needs_no_network_and_tells_everything(run_dir, found):
    page = (run_dir / "report.html").read_text()
    assert found.outside == [] and "@import" not in page
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "")
    text = " ".join(" ".join(found.text).split())
    for expected in (
            "first-run", "done", "5.12 M parameters", "FSDP2 on 2 ranks → ZeRO-2 on 3 ranks → DDP on 1 rank",
            "Held-out loss", "perplexity", "600", "that carried loss", "waiting for data", "no stop recorded",
            "time limit", "63 done again", "rank-00001.bin: chunk 7 differs", "optim.lr=3e-3", "python-stdlib 1.0.0",
            "PSF-2.0", "Step 138 was left out: gradient norm inf", "Step 330 was a spike",
            "no space left: 58.6 MiB needed, 12 MiB free", "torch 2.", "Put an item into the queue & <wait>"):
        assert expected in text, expected
    assert "MFU is given only for devices" in text and "MFU 4" not in text, "a CPU has no MFU"
    assert "Step time step of it waiting for data longest" in text, "two lines have a legend"
    assert "nan" not in text.split(), "nothing that is unknown is printed as a number"


def test_the_curves_hold_the_runs_numbers(run_dir, found):
    charts = {c["label"]: c for c in found.charts}
    assert {"Loss over the steps", "Learning rate over the steps", "Gradient norm over the steps",
            "Throughput over the steps", "Step time over the steps", "Peak memory over the steps"} <= charts.keys()
    _, metrics = gather(run_dir)
    training, together, docs, stdlib = charts["Loss over the steps"]["s"]
    assert training["x"] == [s.step for s in metrics.steps]
    assert all(math.isclose(shown, s.loss_nats, rel_tol=1e-4)
               for shown, s in zip(training["y"], metrics.steps, strict=True))
    assert (together["n"], docs["n"], stdlib["n"]) == ("held-out, all", "held-out docs", "held-out stdlib")
    assert stdlib["x"] == list(range(50, 601, 50)) and len(set(together["y"])) == 12
    norms = charts["Gradient norm over the steps"]["s"][0]
    assert norms["y"][137] is None and norms["t"][137] == "nan", "a step left out is a gap"


def test_report_json_is_strict_and_true(run_dir):
    facts = json.loads((run_dir / "report.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    metrics = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    last = {m["step"]: m for m in metrics if "event" not in m}
    assert facts["steps_done"] == 600 == len(last) and facts["status"] == "done"
    assert facts["useful_tokens"] == 599 * 16256, "redone steps count once, the one left out not at all"
    final = [last[n]["loss_nats"] for n in range(581, 601)]
    assert math.isclose(facts["final_loss_nats"], sum(final) / 20, rel_tol=1e-12)
    assert math.isclose(facts["final_perplexity"], math.exp(sum(final) / 20), rel_tol=1e-12)
    overall, *each = facts["held_out"]
    assert overall["source"] == "all" and {h["source"] for h in each} == {"docs", "stdlib"}
    weighted = sum(h["loss_nats"] * h["tokens"] for h in each) / 85_000
    assert math.isclose(overall["loss_nats"], weighted) and overall["tokens"] == 85_000
    assert [(life["from_step"], life["to_step"], life["engine"], life["ended"]) for life in facts["lives"]] == [
        (0, 263, "fsdp2", "no stop recorded"), (200, 420, "zero2", "time limit"), (420, 600, "ddp", "done")]
    assert facts["lives"][2]["changes"][1] == {"key": "optim.lr", "old": 0.003, "new": 0.002}
    assert facts["overrides"]["optim.lr"] == ["optim.lr=3e-3", "optim.lr=2e-3"]
    assert [(c["step"], c["state"]) for c in facts["checkpoints"]] == [
        (100, "removed"), (200, "removed"), (300, "removed"), (400, "kept"), (500, "failed"), (600, "kept")]
    assert facts["repeated_steps"] == 63 and facts["left_out"][0]["grad_norm"] == "inf"
    by_name = {s["name"]: s for s in facts["sources"]}
    assert by_name["stdlib"]["rows"] == 600 * 48 and by_name["stdlib"]["tokens"] == 600 * 48 * 256
    assert facts["mfu_causal"] is None
    assert facts["wall_s"] < sum(m["step_time_s"] for m in metrics if "event" not in m) * 1.3, "pauses are left out"


def test_a_known_device_has_mfu_and_a_long_run_a_bounded_page(tmp_path):
    run_dir = make_run(tmp_path, steps=6000, gpu=True)
    page = Page(write_report(run_dir).read_text())
    assert (run_dir / "report.html").stat().st_size < 700_000
    assert max(len(s["x"]) for c in page.charts for s in c["s"]) <= 600
    facts, _ = gather(run_dir)
    assert math.isclose(facts.mfu_causal, 0.45) and math.isclose(facts.mfu_full, 0.48)
    text = " ".join(page.text)
    assert "45.0%" in text and "48.0% by full attention" in text and "MFU over the steps" in {
        c["label"] for c in page.charts}


def test_text_is_shown_only_where_every_source_allows_it(tmp_path):
    run_dir = make_run(tmp_path, steps=60, personal=True)
    page = write_report(run_dir).read_text()
    assert "class Queue" not in page and "class Queue" not in (run_dir / "report.json").read_text()
    assert "samples.txt: not shown" in page
    (tmp_path / "python-stdlib/dataset.json").unlink()  # not known is not allowed
    assert "class Queue" not in write_report(run_dir).read_text()


def test_the_policy_says_too_what_may_be_shown_and_under_which_licence(tmp_path):
    run_dir, docs = make_run(tmp_path, steps=60), tmp_path / "python-docs"
    change(docs, policy=Policy(licence=("Terms of ACME",)))
    page = write_report(run_dir).read_text()
    assert "class Queue" in page and "PSF-2.0 AND Terms of ACME" in page
    for hidden in (Policy(sensitive=True), Policy(personal_data="present")):
        change(docs, policy=hidden)
        page = write_report(run_dir).read_text()
        assert "class Queue" not in page and "samples.txt: not shown" in page
    (docs / "policy.json").write_text("{}")  # not the one that is named
    page = write_report(run_dir).read_text()
    assert "class Queue" not in page and "data set of docs: conditions of use cannot be read (DataError)" in page


def test_held_out_losses_are_those_of_the_sources_that_are_still_read(tmp_path):
    run_dir = make_run(tmp_path, steps=60)
    run = load_config(run_dir)
    left = [TimelineStage(from_sample=0, weights={"stdlib": 3.0, "docs": 1.0}),
            TimelineStage(from_sample=60 * 64, weights={"stdlib": 3.0})]
    save_config(replace(run, steps=62, data=replace(run.data, timeline=left)), run_dir / "config.yaml")
    with MetricsWriter(run_dir) as writer:
        writer.write(StartMetrics(step=60, action="resume", engine="ddp", world_size=1, device="cpu", precision="bf16"))
        for n, found in ((61, 9.0), (62, 9.5)):
            writer.write(StepMetrics(step=n, tokens=10, loss_nats=1.0, grad_norm=1.0, lr=1.0, step_time_s=0.1, data_wait_s=0.0,
                                     tokens_per_s=100.0))
            writer.write(EvalMetrics(step=n, source="stdlib", loss_nats=found, tokens=10))
    text = " ".join(Page(write_report(run_dir).read_text()).text)
    facts, metrics = gather(run_dir)
    assert [(h.source, h.step, h.loss_nats) for h in facts.held_out] == [("stdlib", 62, 9.5)] and "Held-out loss 9.500" in text
    best = min((e for e in metrics.evals if e.source == "stdlib"), key=lambda e: e.loss_nats)
    assert (facts.best_held_out.step, facts.best_held_out.loss_nats) == (best.step, best.loss_nats)
    save_config(replace(run, data=replace(run.data, sources={"new": SourceConfig(path="new")})), run_dir / "config.yaml")
    facts, _ = gather(run_dir)  # what is read now was never evaluated
    assert [h.source for h in facts.held_out] == ["all", "docs", "stdlib"] and facts.held_out[0].step == 60


@pytest.mark.parametrize(("packing", "epochs"), [("cut", "1.00"), ("best_fit", "–")])
def test_epochs_are_told_where_rows_hold_no_padding(tmp_path, packing, epochs):
    run_dir = make_run(tmp_path, steps=60)
    run = load_config(run_dir)
    save_config(replace(run, data=replace(run.data, packing=packing)), run_dir / "config.yaml")
    text = " ".join(" ".join(Page(write_report(run_dir).read_text()).text).split())
    assert re.search(f"246 k 25.0% {epochs} ", text), text
    assert ("officina data audit tells their epochs" in text) == (packing == "best_fit")
    assert "2 kept of 5 written" in text, "a save that failed was not written"


@pytest.mark.parametrize(("words", "value", "told"), [
    (number, 9.99949, "9.999"), (number, 15_000.0, "15,000"), (number, 99_999.6, "100,000"), (number, 2.5e6, "2.50e+06"),
    (number, 999.7, "1,000"), (number, 123.4, "123"), (count, 999_700, "1 M"), (count, 999.6, "1 k"), (count, 998_000, "998 k"),
    (size, 1016 * 2**20, "1016 MiB"), (size, 1.5 * 2**30, "1.5 GiB"), (size, 1023.9, "1024 B")])
def test_numbers_just_below_the_next_unit_have_no_exponent(words, value, told):
    assert words(value) == told


@pytest.mark.parametrize(("kind", "told"), [("next_token", "300 of them/s carry loss"), ("dpo", "300 pairs/s carry loss")])
def test_speed_counts_all_tokens_and_what_is_trained_is_told(tmp_path, kind, told):
    save_config(RunConfig(objective=ObjectiveConfig(kind=kind)), tmp_path / "config.yaml")
    with MetricsWriter(tmp_path) as writer:
        writer.write(StartMetrics(step=0, action="start", engine="single", world_size=1, device="cpu", precision="fp32",
                                  parameters=2_000_000, trained_parameters=30_000, time=BEGUN))
        for n in range(1, 4):
            writer.write(StepMetrics(step=n, tokens=30, loss_nats=1.0, grad_norm=1.0, lr=1.0, step_time_s=0.1, data_wait_s=0.0,
                                     tokens_per_s=300.0, filled_tokens=90, filled_tokens_per_s=900.0, time=BEGUN + n))
        writer.write(EvalMetrics(step=3, source="a", loss_nats=0.5, tokens=9, time=BEGUN + 3, **(
            {"reward_accuracy": 0.625} if kind == "dpo" else {"token_accuracy": 0.375, "sample_accuracy": 0.125})))
    page = Page(write_report(tmp_path).read_text())
    facts, _ = gather(tmp_path)
    for text in (" ".join(page.text), summary(facts)):
        assert "2 M parameters, 30 k of them trained" in text and told in text and "900" in text
        assert ("perplexity 1.649" in text) == (kind == "next_token")  # a DPO loss is no loss of tokens
        shares = ["62.5% of pairs with the chosen"] if kind == "dpo" else ["37.5% of tokens right", "12.5% of samples right"]
        assert all(share in text for share in shares)
    one = "pair" if kind == "dpo" else "token"
    read = " ".join(page.text)
    assert f"Loss in nats per {one}" in read and f"Loss is in nats per {one}; the" in read and f"Only {one}s that" in read
    assert f"repeated steps in it: 30 {one}s/s." in read
    assert json.loads((tmp_path / "report.json").read_text())["model"]["trained_parameters"] == 30_000
    assert {900.0} == {y for c in page.charts if c["label"].startswith("Throughput") for s in c["s"] for y in s["y"]}


def test_a_run_that_did_nothing_yet_still_has_a_report(tmp_path):
    save_config(RunConfig(name="<b>new & empty"), tmp_path / "config.yaml")
    text = " ".join(Page(write_report(tmp_path).read_text()).text)
    assert "not started" in text and "No step was recorded" in text and "<b>new & empty" in text
    assert "environment.json: not there" in text
    assert json.loads((tmp_path / "report.json").read_text())["steps_done"] == 0


def test_a_run_that_diverged_from_its_first_step_has_a_report(tmp_path):
    save_config(RunConfig(), tmp_path / "config.yaml")
    with MetricsWriter(tmp_path) as writer:
        writer.write(StartMetrics(
            step=0, action="start", engine="single", world_size=1, device="cpu", precision="fp32"))
        for n in range(1, 4):
            writer.write(StepMetrics(step=n, tokens=10, loss_nats=math.nan, grad_norm=math.inf, lr=1.0, step_time_s=0.1,
                                     data_wait_s=0.0, tokens_per_s=100.0, applied=False))
        writer.write(EvalMetrics(step=3, source="a", loss_nats=math.inf, tokens=1))
        writer.write(StopMetrics(step=3, reason="no progress", exit_status=76))
    text = " ".join(Page(write_report(tmp_path).read_text()).text)
    assert "stopped" in text and "Step 3 was left out: gradient norm inf" in text
    facts = json.loads((tmp_path / "report.json").read_text())
    assert facts["final_loss_nats"] is None and facts["useful_tokens"] == 0
    assert facts["held_out"][0]["loss_nats"] == "inf" == facts["held_out"][0]["perplexity"]


def test_a_custom_model_counts_records_and_has_no_perplexity(tmp_path):
    model = CustomModelConfig(factory="mymodels.vit:build", loss="mymodels.vit:loss", decoder="mymodels.vit:decode")
    save_config(RunConfig(model=model, batch=BatchConfig(global_tokens=32, seq_len=1),
                          data=DataConfig(sources={"tiles": SourceConfig(path="tiles")})), tmp_path / "config.yaml")
    with MetricsWriter(tmp_path) as writer:
        writer.write(StartMetrics(step=0, action="start", engine="ddp", world_size=2, device="cpu", precision="fp32",
                                  parameters=1_000))
        writer.write(StepMetrics(step=1, tokens=32, loss_nats=0.7, grad_norm=1.0, lr=1.0, step_time_s=0.1,
                                 data_wait_s=0.0, tokens_per_s=320.0))
    text = " ".join(Page(write_report(tmp_path).read_text()).text)
    assert "Records" in text and "records/s" in text and "nats" not in text and "perplexity" not in text
    assert "Loss per record" in text and "Tokens" not in text
    assert "mymodels.vit:build" in text


def test_the_command_prints_a_summary_and_the_path(tmp_path, capsys):
    run_dir = make_run(tmp_path, steps=60)
    assert main(run_dir) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("first-run: done\n") and printed.rstrip().endswith(str(run_dir / "report.html"))
    assert re.search(r"events +1 step left out, 1 spike, 1 failed save, 6 steps done again or given up", printed)
    assert re.search(r"loss +\d\.\d{3} nats, perplexity", printed)


def test_what_is_no_run_directory_is_said(tmp_path):
    with pytest.raises(OfficinaError, match="is no run directory"):
        write_report(tmp_path)


def test_a_directory_that_takes_no_file_is_said(tmp_path, monkeypatch):
    run_dir = make_run(tmp_path, steps=60)
    (run_dir / "report.html").mkdir()  # root may write anywhere, so the name is taken instead
    with pytest.raises(OfficinaError, match=r"report.html cannot be written: Is a directory. Free space"):
        write_report(run_dir)
    assert not list(run_dir.glob(".report*"))


def test_a_report_needs_no_torch(run_dir):
    code = (f"import sys; from pathlib import Path; from officina.launch.report import write_report; "
            f"write_report(Path({str(run_dir)!r})); sys.exit('torch' in sys.modules)")
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# ---- charts ---------------------------------------------------------------------------------------------------------
def test_a_column_keeps_the_extremes_of_a_long_series():
    n = 100_000
    y = [1.0] * n
    y[50_000] = 9.0
    y[70_000] = math.nan
    svg = draw(Chart(label="c", series=[Series(name="s", x=range(n), y=y, smooth=5)], number=str), 800, 300)
    band = re.search(r'class="band a" d="([^"]+)"', svg)[1]
    heights = {round(float(y)) for y in re.findall(r"[ML][\d.]+ (-?[\d.]+)", band)}
    assert len(heights) >= 2, "the one high value stands out of the band"
    assert "nan" not in svg


@pytest.mark.parametrize("x_log", [False, True])
@pytest.mark.parametrize(("x", "y", "dots"), [
    ([1], [2.0], 1), ([7, 8, 9, 10], [3.0, math.nan, 2.0, 1.0], 1), ([1, 2], [3.0, 2.0], 0)])
def test_a_point_that_no_line_reaches_is_drawn(x, y, dots, x_log):
    chart = draw(Chart(label="a", series=[Series(name="a", x=x, y=y)], number=str, x_log=x_log), 490, 200)
    assert chart.count("<circle") == dots
    low, high, *_ = json.loads(re.search("data-chart='(.*?)'", chart)[1])["x"]
    assert low < high == x[-1], "no step is shown that was not made"


def test_the_report_of_a_branch_says_of_what(tmp_path):
    run_dir = make_run(tmp_path, steps=3)
    lines = (run_dir / "history.jsonl").read_text().splitlines()
    branch = json.loads(lines[1]) | {"action": "branch", "words": ["from=runs/first@1", "ranks=3"]}
    (run_dir / "history.jsonl").write_text("\n".join([lines[0], json.dumps(branch), lines[2]]) + "\n")
    text = write_report(run_dir).read_text()
    assert text.count(">from=runs/first@1<") == 1 and ">ranks=3<" not in text, "the others are told as changes"


def test_a_run_of_three_steps_has_each_of_them_once_at_its_axis():
    svg = draw(Chart(label="c", series=[Series(name="s", x=[1, 2, 3], y=[3.0, 2.0, 1.0])], number=str), 800, 300)
    assert re.findall(r'text-anchor="middle">([\d.,]+)<', svg) == ["1", "2", "3"]


@pytest.mark.parametrize("y", [[], [math.nan, math.inf], [0.0, 0.0], [5.0], [1e-300, 1e300], [-3.0, 4.0]])
@pytest.mark.parametrize(("y_log", "x_log"), [(False, False), (True, True)])
def test_strange_values_draw_or_leave_out_but_never_fail(y, y_log, x_log):
    series = Series(name="s", x=range(len(y)), y=y, smooth=3, fill=True, dots=True)
    chart = Chart(label="c", series=[series], number=str, y_log=y_log, x_log=x_log, marks=[Mark(x=0, label="m")])
    svg = draw(chart, 400, 200)
    assert (svg == "") == (not y)
    assert "NaN" not in svg and "nan " not in svg and " inf" not in svg


@pytest.mark.parametrize("n", [601, 640, 900, 1199, 1200, 1201, 100_000])
def test_columns_take_as_many_points_each(n):
    xs, _, lows, highs = _columns(Series(name="s", x=range(1, n + 1), y=[i % 2 for i in range(n)]))
    assert 300 <= len(xs) <= 600 and xs[-1] == n
    assert set(zip(lows[1:], highs[1:], strict=True)) == {(0, 1)}, "the band of even noise is as wide everywhere"
    assert {b - a for a, b in pairwise(xs)} == {-(-n // 600)}


def test_a_smoothed_line_starts_where_the_run_does_and_ends_where_it_has_got_to():
    smooth = _smooth([9.0, *[1.0] * 98, 5.0], 13)
    assert smooth[0] == 9.0 and set(smooth[-7:]) == {1.0}
    assert _smooth([3.0, 2.0, 1.0], 13) == [3.0, 2.0, 1.0], "of three values none is smoothed away"


def test_what_begins_above_the_plot_is_said():
    falls = Series(name="s", x=range(1, 501), y=[2 + 6 * math.exp(-n / 5) for n in range(500)], smooth=9)
    assert "begins at 8.0" in draw(Chart(label="c", series=[falls], number=lambda v: f"{v:.1f}", settled=0.04), 800, 300)
    assert "begins" not in draw(Chart(label="c", series=[falls], number=str, x_log=True), 800, 300)


def test_a_run_of_seconds_has_each_time_once_at_its_clock(tmp_path):
    save_config(RunConfig(steps=3), tmp_path / "config.yaml")
    with MetricsWriter(tmp_path) as writer:
        writer.write(StartMetrics(step=0, action="start", engine="single", world_size=1, device="cpu", precision="fp32",
                                  time=BEGUN))
        for n in range(1, 4):
            writer.write(StepMetrics(step=n, tokens=10, loss_nats=1.0, grad_norm=1.0, lr=1.0, step_time_s=0.5, data_wait_s=0.0,
                                     tokens_per_s=20.0, peak_memory_bytes=1, time=BEGUN + n / 2))
    page = write_report(tmp_path).read_text()
    clock = page[page.index("Wall clock over the steps"):]
    labels = re.findall(r'text-anchor="end">([^<]+)<', clock[:clock.index("</svg>")])
    assert labels == ["0", "500 ms", "1 s", "1.5 s", "step"]


def test_labels_are_escaped():
    chart = Chart(label="a'b<c>", series=[Series(name="it's <x>", x=[1, 2], y=[1, 2])], number=str)
    assert Page(draw(chart, 400, 200)).charts[0]["s"][0]["n"] == "it's <x>"
