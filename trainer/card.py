"""The model card of an export, README.md: base, data, languages, licences, compute, evaluation, from the run's records.

What the records do not say is said to be missing; nothing is guessed.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from officina.trainer.config import RunConfig
from officina.trainer.data.carried import Known, is_recorded, of_run
from officina.trainer.data.manifest import open_dataset
from officina.trainer.data.policy import Policy, policy_of
from officina.trainer.errors import DataError
from officina.trainer.initial import read_weights_record
from officina.trainer.metrics import RunMetrics, perplexity, read_metrics
from officina.trainer.model.flops import parameter_count
from officina.trainer.run_dir import read_history, read_run_id

_USE = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # where this file lies
model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
{prompt}
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=100)[0]))
```"""
_TEXT = 'prompt = tokenizer("Once upon a time", return_tensors="pt")'
_CHAT = """\
chat = [{"role": "user", "content": "What can you do?"}]
prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)"""


def model_card(run_dir: Path, run: RunConfig, export: Mapping[str, Any]) -> str:
    """Markdown with the front matter that hubs read. export: the result of `export_run`."""
    metrics, record = _until(read_metrics(run_dir), export["step"]), read_weights_record(run_dir)
    trained = bool(metrics.steps)
    data = _data(run)
    languages = sorted({code for _, facts in data for code in facts.get("languages", [])})
    parts = [
        _front_matter(record, trained, languages),
        f"# {run.name}\n\n{_first_words(record, trained)}",
        "## Base\n\n" + (_base(record) if record else "None: trained from random weights."),
        "## Model\n\n" + _model(run, export),
        "## Use\n\n" + _use(export),
        "## Data\n\n" + _data_table(data, export["rows"]),
        "## Licence\n\n" + _licence(record, data, of_run(run_dir, export["step"]), is_recorded(run_dir)),
        "## Compute\n\n" + (_compute(run_dir, run, metrics) if trained else "No training was done here."),
        "## Evaluation\n\n" + _evaluation(run, metrics),
        "## Origin\n\n" + _origin(run_dir, export),
    ]
    return "\n\n".join(parts) + "\n"


def _until(metrics: RunMetrics, step: int) -> RunMetrics:
    """What had been recorded when the checkpoint of `step` was written."""
    return replace(metrics, steps=[s for s in metrics.steps if s.step <= step],
                   evals=[e for e in metrics.evals if e.step <= step],
                   generations=[g for g in metrics.generations if g.start.step < step])


def _use(export: Mapping[str, Any]) -> str:
    if not export["tokenizer"]:
        return "By token ids: the records have no tokenizer."
    return _USE.replace("{prompt}", _CHAT if export["chat"] else _TEXT)


def _front_matter(record: Mapping[str, Any], trained: bool, languages: list[str]) -> str:
    lines = ["library_name: transformers", "pipeline_tag: text-generation"]
    lines += [f"base_model: {json.dumps(record['name'])}"] if record.get("name") else []
    if record.get("licence") and not trained:  # weights that were trained have none until somebody gives them one
        lines.append(f"license: {json.dumps(record['licence'])}")
    codes = sorted({code.partition("_")[0] for code in languages})  # hubs take ISO 639 alone, without the script
    lines += ["language:", *(f"- {json.dumps(code)}" for code in codes)] if codes else []
    return "\n".join(["---", *lines, "---"])


def _first_words(record: Mapping[str, Any], trained: bool) -> str:
    if not record:
        return "A language model trained with officina."
    return f"{record['name']}, trained further with officina." if trained else f"{record['name']}, as it was imported."


def _base(record: Mapping[str, Any]) -> str:
    lines = [f"- {record['name']} ({record['parameters']:,} parameters), hash of the weights `{record['hash']}`"]
    before = record.get("base")
    while before:
        lines.append(f"- which came from {before['name']}, hash of the weights `{before['hash']}`")
        before = before.get("base")
    return "\n".join(lines)


def _model(run: RunConfig, export: Mapping[str, Any]) -> str:
    model, counts = run.model, parameter_count(run.model)
    rows = [("architecture", export["family"]), ("parameters", f"{counts.total:,}"),
            ("layers, width, MLP", f"{model.n_layers}, {model.d_model}, {model.d_ff}"),
            ("heads, key-value heads, head width", f"{model.n_heads}, {model.kv_heads}, {model.head_size}"),
            ("vocabulary", f"{model.vocab_size:,}"), ("stored as", export["dtype"])]
    return _table(("", ""), rows)


def _data(run: RunConfig) -> list[tuple[str, dict[str, Any]]]:
    found = []
    for name, source in run.data.sources.items():
        facts: dict[str, Any] = {"weight": source.weight}
        try:
            dataset = open_dataset(source.path)
            manifest, policy = dataset.manifest, policy_of(dataset)
            facts |= {"title": f"{manifest.name} {manifest.version}", "licence": policy.licences,
                      "languages": list(manifest.languages), "creators": list(manifest.creators), "url": manifest.url,
                      "personal_data": policy.personal_data, "conditions": _conditions(policy)}
        except DataError:
            facts["title"] = "not at hand when this was written"
        found.append((name, facts))
    return found


def _conditions(policy: Policy) -> list[str]:
    """What a publisher of weights has to know of a data set beside its licence."""
    release = {"no": "weights trained on it must not be released",
               "weights-ask": "weights trained on it may be released by agreement with the provider alone"}
    personal = {"present": "holds personal data", "pseudonymised": "holds pseudonymised personal data"}
    told = [release.get(policy.export), personal.get(policy.personal_data), "sensitive" if policy.sensitive else "",
            f"attribution: {policy.attribution}" if policy.attribution else ""]
    return [text for text in told if text]


def _data_table(data: list[tuple[str, dict[str, Any]]], read: Mapping[str, int]) -> str:
    """read: rows that each source gave so far; empty if nothing was trained."""
    if not data:
        return "The records name none."
    parts = {name: read.get(name, 0) if read else facts["weight"] for name, facts in data}
    total = sum(parts.values()) or 1
    rows = [(name, facts["title"], f"{parts[name] / total:.1%}", facts.get("licence") or "not stated",
             ", ".join(facts.get("languages", [])) or "not stated", ", ".join(facts.get("creators", [])) or "not stated")
            for name, facts in data]
    return _table(("source", "data set", "share of rows", "licence", "languages", "creators"), rows)


def _licence(record: Mapping[str, Any], data: list[tuple[str, dict[str, Any]]], carried: Mapping[str, Known],
             recorded: bool) -> str:
    """carried: conditions of the data that the weights were trained on; recorded: did the run keep those of its base?"""
    lines = []
    while record:
        if record.get("kind") == "folder":
            lines.append(f"- {record['name']}: {record.get('licence') or 'its card was not beside the weights; look it up'}")
        elif not recorded:
            lines.append(f"- {record['name']}: a run whose data are not in the records; look them up")
        record = record.get("base")
    known = {name: (facts.get("licence"), facts.get("conditions", [])) for name, facts in data}
    known |= {label: (of.policy.licences, _conditions(of.policy)) for label, of in carried.items()}
    lines += ["; ".join([f"- {name}: {licence or 'not stated'}", *conditions]) for name, (licence, conditions) in known.items()]
    return "\n".join([*lines, "- these weights: to be decided by who publishes them, within what is said above"])


def _compute(run_dir: Path, run: RunConfig, metrics: RunMetrics) -> str:
    starts = [generation.start for generation in metrics.generations]
    seconds = sum(step.step_time_s for step in metrics.steps)
    processed = sum(step.filled_tokens or run.batch.rows * run.batch.seq_len for step in metrics.steps)
    items = "preference pairs" if run.objective.kind == "dpo" else "tokens with a loss"
    rows = [("optimizer steps", f"{metrics.steps[-1].step:,}"), (items, f"{metrics.tokens:,}"),
            ("tokens processed, no padding", f"{processed:,}"), ("time in steps", f"{seconds / 3600:.2f} h"),
            ("ranks", ", ".join(sorted({f"{s.world_size} x {s.device}" for s in starts}))),
            ("device hours", f"{_device_seconds(metrics) / 3600:.2f}"),
            ("engine, precision", ", ".join(sorted({f"{s.engine}, {s.precision}" for s in starts})))]
    if origin := next((start.get("origin") for start in read_history(run_dir)), None):
        rows.append(("counted from", f"step {origin['step']:,}, where it left the run {origin['name']}"))
    per_token = starts[-1].flops_per_token_causal
    if per_token:
        rows.append(("training FLOPs (architecture, attention causal, no recomputation)", f"{per_token * processed:.2e}"))
    return _table(("", ""), rows)


def _device_seconds(metrics: RunMetrics) -> float:
    """Time in steps, each by the ranks that made it: a run may go on with fewer or more."""
    total, starts = 0.0, [generation.start for generation in metrics.generations]
    for i, start in enumerate(starts):
        stop = min((later.step for later in starts[i + 1:]), default=metrics.steps[-1].step)
        total += start.world_size * sum(step.step_time_s for step in metrics.steps if start.step < step.step <= stop)
    return total


def _evaluation(run: RunConfig, metrics: RunMetrics) -> str:
    if not metrics.evals:
        return "None in the run's records."
    last = {record.source: record for record in metrics.evals}
    if run.objective.kind == "dpo":
        rows = [(name, f"{r.step:,}", f"{r.loss_nats:.4f}", f"{r.reward_accuracy or 0:.1%}", f"{r.tokens:,}")
                for name, r in last.items()]
        return "Preference pairs at the last evaluation of each source.\n\n" + _table(
            ("source", "step", "DPO loss", "chosen answer preferred", "pairs"), rows)
    rows = [(name, f"{r.step:,}", f"{r.loss_nats:.4f}", f"{perplexity(r.loss_nats):.3f}", f"{r.tokens:,}")
            for name, r in last.items()]
    return "Held-out loss at the last evaluation of each source.\n\n" + _table(
        ("source", "step", "loss (nats/token)", "perplexity", "tokens"), rows)


def _origin(run_dir: Path, export: Mapping[str, Any]) -> str:
    history = read_history(run_dir)
    versions = history[-1].get("versions", {}) if history else {}
    rows = [("run", read_run_id(run_dir) or "unknown"), ("step", f"{export['step']:,}"),
            ("hash of the weights", f"`{export['hash']}`"),
            ("officina", f"{versions.get('officina', 'unknown')}, commit {history[-1].get('commit') if history else None}"),
            *((f"SHA-256 of {name}", f"`{digest}`") for name, digest in export["files"].items())]
    return _table(("", ""), rows)


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)
