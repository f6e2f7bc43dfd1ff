"""The documents name what is there: options, keys, files and headings."""

import json
import re
import shlex
from pathlib import Path

import pytest

from officina.configs.compose import compose_all, options
from officina.configs.job import JobConfig
from officina.configs.sites import find_site
from officina.launch import cli
from officina.trainer.keys import GROUPS, fields_of, generic
from officina.trainer.validate import problems

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
BESIDE = {"from", "step", "tasks", "key"}
"""Words of commands that are keys of no run; `key=value` stands for any."""
COMMAND = re.compile(r"officina (?:train|resume|submit|plan|check|eval) [^`\n]*(?:\\\n[^`\n]*)*")


def wrong_words(text):
    """Words of the commands in a text whose key or option there is not; NAME and other capitals stand for anything."""
    for line in COMMAND.findall(text):
        for key, value in re.findall(r"(?<=[ '])([a-z_]+(?:\.\w+)*)=([^\s']*)", line.split(" # ")[0]):
            option = key in GROUPS and value.islower() and not value.startswith(("./", "{"))
            if not generic(key) and key not in (*GROUPS, *BESIDE) and key.split(".")[0] not in fields_of(JobConfig):
                yield f"{key}={value}"
            elif option and key != "site" and value not in options(key):
                yield f"{key}={value}"
            elif option and key == "site":
                find_site(value)


def test_commands_name_options_and_keys_that_are_there():
    helps = [command.epilog or "" for name in cli._COMMANDS
             for command in [cli._parser([name])._subparsers._group_actions[0].choices[name]]]
    found = {page.name: wrong for page in PAGES if (wrong := list(wrong_words(page.read_text(encoding="utf-8"))))}
    assert found == {} and [wrong for text in helps for wrong in wrong_words(text)] == []
    assert list(wrong_words("`officina train model=llama3-8b optim.lrr=1`")) == ["model=llama3-8b", "optim.lrr=1"]


@pytest.mark.parametrize("page", [page for page in PAGES if "officina train " in page.read_text(encoding="utf-8")],
                         ids=lambda page: page.name)
def test_runs_that_pages_start_are_taken(page):
    """Without the data and models that they name: those are not here."""
    absent = ("model", "init_from", "data.sources", "ranks")
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    for line in re.findall(r"^    (?:PYTHONPATH=\S+ )?officina train (.*)", text, re.MULTILINE):
        words = [word for word in shlex.split(line, comments=True) if "=" in word]
        if "..." not in line and not line.startswith("["):
            composed = compose_all(words, {})
            found = [*composed.problems, *problems(composed.run, read_data=False)]
            assert [str(p) for p in found if not p.key.startswith(absent)] == [], line


def test_figures_in_prose_are_those_of_the_records():
    results = json.loads((ROOT / "benchmarks/results/gpu.json").read_text())["results"]
    rates = {model: {f"{found['officina']['tokens_per_s']['median']:,.0f}" for name, found in results.items()
                     if re.match(r"\w+", name)[0] == model and "officina" in found} for model in ("h200_8b", "h200_1b8")}
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    [told] = re.findall(r"Llama-3 8B trains at ([\d,]+) tokens/s and a 1.8B model at ([\d,]+) ", readme)
    assert told[0] in rates["h200_8b"] and told[1] in rates["h200_1b8"], (told, rates)
    goals = json.loads((ROOT / "benchmarks/results/kernels.json").read_text())["results"]["goals"]
    page = (ROOT / "docs/benchmarks.md").read_text(encoding="utf-8")
    of_missed = page[page.index("Of the goals that were missed"):page.index("<!-- record: kernels -->")].lower()
    assert [goal["kernel"] for goal in goals if not goal["met"] and goal["kernel"].lower() not in of_missed] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    for path, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)(#[^)\s]*)?\)", page.read_text(encoding="utf-8")):
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), path
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor[1:] in {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in headings}, path + anchor
