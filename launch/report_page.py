"""report.html from the facts of a run: one file, no network, readable without script."""

import math
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from html import escape
from typing import Any

from officina.launch.report_charts import Chart, Mark, Series, Span, draw
from officina.launch.report_facts import ACCURACIES, FINAL_STEPS, Facts, Life
from officina.launch.report_gather import pooled
from officina.launch.report_style import CSS, LOGO, SCRIPT
from officina.launch.report_words import clock, count, date, loss, number, seconds, shares, shown, size
from officina.trainer.keys import flat
from officina.trainer.metrics import RunMetrics, bits_per_byte

WIDE, NARROW = (1036, 340), (480, 300)
SMALL = (490, 200)
ENGINE_NAMES = {"single": "one process", "ddp": "DDP", "fsdp2": "FSDP2", "hsdp": "HSDP", "zero1": "ZeRO-1",
                "zero2": "ZeRO-2", "zero3": "ZeRO-3"}
_PILLS = {"done": "good", "to be continued": "warn", "stopped": "bad", "no stop recorded": "bad", "not started": "warn"}


def page(facts: Facts, metrics: RunMetrics) -> str:
    """The whole page."""
    body = "".join([
        _header(facts), _tiles(facts), _loss(facts, metrics), _small_charts(facts, metrics), _sample(facts), _lives(facts),
        _checkpoints(facts), _events(facts), _data(facts), _config(facts), _environment(facts), _footer(facts)])
    return ('<!doctype html><html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width">'
            f"<title>{escape(facts.name)} · officina</title><style>{CSS}</style></head><body><main>{body}</main>"
            f'<div id="tip" role="status"></div><script>{SCRIPT}</script></body></html>\n')


# ---- head ----------------------------------------------------------------------------------------------------------
def _header(f: Facts) -> str:
    written = datetime.now(UTC).strftime("%-d %B %Y, %H:%M UTC")
    ways = " → ".join(dict.fromkeys(where(life) for life in f.lives)) or "not started"
    model = f"<b>{counted}</b>, " if (counted := parameters(f)) else ""
    return (f'<header><div class="brand"><b>{LOGO}officina</b><span>run report · {written}</span></div>'
            f'<div class="headline"><h1>{escape(f.name)}</h1><span class="pill {_PILLS[f.status]}">'
            f"{escape(f.status)}</span></div>"
            f'<p class="sub">{model}{escape(f.model["summary"])}<br>Trained with <b>{escape(ways)}</b></p></header>')


def parameters(f: Facts) -> str:
    """`1.2M parameters, 131k of them trained`; empty where the number is not known."""
    total, trained = f.model.get("parameters"), f.model.get("trained_parameters")
    part = f", {count(trained)} of them trained" if trained and trained != total else ""
    return f"{count(total)} parameters{part}" if total else ""


def speed(f: Facts) -> tuple[str, str, str]:
    """`8.4 k`, `tokens/s` that are no padding, and `3.1 k of them/s carry loss` where those are fewer."""
    if f.filled_tokens_per_s is None or f.tokens_per_s is None:
        return count(f.tokens_per_s), f"{f.items}/s", ""
    of = "of them" if f.items == "tokens" else f.items
    same = f.items == "tokens" and f.tokens_per_s > 0.9 * f.filled_tokens_per_s
    return count(f.filled_tokens_per_s), "tokens/s", "" if same else f"{count(f.tokens_per_s)} {of}/s carry loss"


def where(life: Life) -> str:
    """`FSDP2 on 2 ranks`."""
    if life.engine == "single":
        return "one process"
    ranks = "1 rank" if life.world_size == 1 else f"{life.world_size} ranks"
    return f"{ENGINE_NAMES.get(life.engine, life.engine)} on {ranks}"


def _tiles(f: Facts) -> str:
    unit = "nats" if _in_nats(f) else ""
    final = [("Training loss", loss(f.final_loss_nats), unit, _perplexity(f.final_perplexity))]
    if f.held_out:
        h = f.held_out[0]
        best = f.best_held_out
        notes = [_perplexity(h.perplexity), "" if h.bits_per_byte is None else f"{h.bits_per_byte:.3f} bits per byte",
                 *shares(h.accuracies, ACCURACIES)]
        if best and best.step != h.step:
            notes.append(f"best {loss(best.loss_nats)} at step {best.step:,}")
        final.append(("Held-out loss", loss(h.loss_nats), unit, "<br>".join(filter(None, notes))))
    else:
        final.append(("Held-out loss", "–", "", "never evaluated"))
    planned = f" of {f.steps_planned:,}" if f.steps_planned else ""
    final.append(("Steps", f"{f.steps_done:,}", "", planned.strip() or "&nbsp;"))
    final.append((f.items.capitalize(), count(f.useful_tokens), "", "that carried loss" + (
        f"<br>in {clock(f.wall_s)}" if f.mfu_causal is not None else "")))
    waits = "" if f.data_wait_share is None else f"{f.data_wait_share:.1%} waiting for data"
    value, rate, beside = speed(f)
    final.append(("Throughput", value, rate, "<br>".join(filter(None, [beside, waits]))))
    if f.mfu_causal is not None:
        full = f"{f.mfu_full:.1%} by full attention" if f.mfu_full is not None else ""
        final.append(("MFU", f"{f.mfu_causal:.1%}", "", full))
    else:
        final.append(("Wall time", clock(f.wall_s), "", "pauses not counted"))
    return '<div class="tiles">' + "".join(
        f'<div class="tile"><div class="k">{k}</div><div class="v">{v}{f"<small>{unit}</small>" if unit else ""}</div>'
        f'<div class="n">{note}</div></div>' for k, v, unit, note in final) + "</div>"


def _in_nats(f: Facts) -> bool:
    """The loss of a custom model is whatever the user's function gives."""
    return f.model["kind"] == "decoder"


def _per_item(f: Facts) -> str:
    """What a loss is: `in nats per token`, `in nats per pair`, `per record`."""
    return f"{'in nats ' if _in_nats(f) else ''}per {f.items.removesuffix('s')}"


def _perplexity(value: float | None) -> str:
    return "" if value is None else f"perplexity {number(value)}"


# ---- curves --------------------------------------------------------------------------------------------------------
def _loss(f: Facts, m: RunMetrics) -> str:
    steps = m.steps
    if not steps:
        return '<div class="card"><ul class="notes"><li>No step was recorded.</li></ul></div>'
    series = [Series(name="training", x=[s.step for s in steps], y=[s.loss_nats for s in steps], style="a",
                     smooth=max(5, min(len(steps), 400) // 30))]
    names = list(dict.fromkeys(e.source for e in m.evals))
    several = len(f.held_out) > 1
    if several:
        together = pooled(m, {h.source for h in f.held_out}, text=f.items == "tokens")
        series.append(Series(name="held-out, all", x=[h.step for h in together], y=[h.loss_nats for h in together],
                             style="b", dots=True))
    for name, style in zip(names, "cde" if several else "bcde", strict=False):
        of = [e for e in m.evals if e.source == name]
        series.append(Series(name=f"held-out {name}", x=[e.step for e in of], y=[e.loss_nats for e in of],
                             style=style, dots=True, thin=several))
    events = ([(e["step"], f"step {e['step']:,} left out: gradient norm {e['grad_norm']}") for e in f.left_out]
              + [(e["step"], f"step {e['step']:,}: spike") for e in f.spikes])
    chart = dict(label="Loss over the steps", series=series, number=loss, tick=number, ticks=events, marks=_marks(f),
                 spans=_spans(f), settled=0.04)
    linear = Chart(**chart)
    shown = (f'<div class="wide"><div class="linear">{draw(linear, *WIDE)}</div>'
             f'<div class="log">{draw(Chart(**chart, x_log=True), *WIDE)}</div></div>'
             f'<div class="narrow">{draw(linear, *NARROW)}</div>')
    legend = _legend(series)
    if events:
        legend += '<span class="bad"><i class="tri"></i>left out or spike</span>'
    return (f'<figure class="card"><figcaption><b>Loss {_per_item(f)}</b><span class="legend">{legend}</span>'
            '<span class="switch"><label><input type="radio" name="axis" value="linear" checked>steps</label>'
            f'<label><input type="radio" name="axis" value="log">log steps</label></span></figcaption>{shown}</figure>')


def _legend(series: Sequence[Series]) -> str:
    return "".join(f'<span class="{s.style}"><i{" class=round" if s.dots else ""}></i>{escape(s.name)}</span>' for s in series)


def _marks(f: Facts) -> list[Mark]:
    return [Mark(x=life.from_step, label=f"{life.action} after step {life.from_step:,}: {where(life)}")
            for life in f.lives[1:]]


def _spans(f: Facts) -> list[Span]:
    """What trained which steps; a life that a later one undid ends where that one begins."""
    spans = []
    for i, life in enumerate(f.lives):
        stop = min([life.to_step] + [later.from_step for later in f.lives[i + 1:]])
        if stop > life.from_step:
            spans.append((life.from_step, stop, where(life)))
    styles = {name: "acdeb"[i % 5] for i, name in enumerate(dict.fromkeys(name for _, _, name in spans))}
    return [Span(start=a, stop=b, label=name, style=styles[name]) for a, b, name in spans]


def _small_charts(f: Facts, m: RunMetrics) -> str:
    steps, figures = m.steps, []
    if not steps:
        return ""
    x = [s.step for s in steps]

    def add(title: str, note: str, series: Sequence[Series], **options: Any) -> None:
        svg = draw(Chart(label=f"{title} over the steps", series=series, marks=_marks(f), **options), *SMALL)
        if svg:
            legend = f'<span class="legend">{_legend(series)}</span>' if len(series) > 1 else ""
            figures.append(f'<figure class="card"><figcaption><b>{title}</b>{legend}<span>{note}</span></figcaption>'
                           f"{svg}</figure>")

    last = steps[-1]
    add("Learning rate", f"last <i>{last.lr:.2e}</i>",
        [Series(name="learning rate", x=x, y=[s.lr for s in steps], style="a", fill=True)],
        number=lambda v: f"{v:.2g}" if v else "0", from_zero=True)
    norms = [s.grad_norm for s in steps]
    known = sorted(v for v in norms if math.isfinite(v) and v > 0)
    wide = bool(known) and known[-1] > 20 * known[len(known) // 2]
    add("Gradient norm", f"before clipping, median <i>{number(known[len(known) // 2]) if known else '–'}</i>",
        [Series(name="gradient norm", x=x, y=norms, style="d", smooth=9)], number=number, y_log=wide,
        from_zero=not wide, ticks=[(e["step"], f"step {e['step']:,} left out") for e in f.left_out])
    filled = f.filled_tokens_per_s is not None
    rates = [s.filled_tokens_per_s if filled else s.tokens_per_s for s in steps]
    value, rate, _ = speed(f)
    add("Throughput", f"{rate}, median of the last start <i>{value}</i>",
        [Series(name=rate, x=x, y=[math.nan if y is None else y for y in rates], style="c", smooth=9)], number=count,
        from_zero=True)
    longest = max(s.step_time_s for s in steps)
    add("Step time", f"longest <i>{seconds(longest)}</i>",
        [Series(name="step", x=x, y=[s.step_time_s for s in steps], style="a", smooth=9),
         Series(name="of it waiting for data", x=x, y=[s.data_wait_s for s in steps], style="b", fill=True)],
        number=seconds, from_zero=True)
    if f.peak_memory_bytes:
        add("Peak memory", f"mean over the ranks, highest <i>{size(f.peak_memory_bytes)}</i>",
            [Series(name="memory", x=x, y=[s.peak_memory_bytes or math.nan for s in steps], style="e", fill=True)],
            number=size, from_zero=True, y_steps=(1, 2, 4, 8), y_base=16.0)
    if f.mfu_causal is not None:
        add("MFU", "of the device's peak",
            [Series(name=name, x=x, y=[math.nan if v is None else v for v in values], style=style)
             for name, values, style in (("causal attention", [s.mfu_causal for s in steps], "a"),
                                         ("full attention", [s.mfu_full for s in steps], "b"))],
            number=lambda v: f"{100 * v:.3g}%", from_zero=True)
    timed = [s for s in steps if s.time]
    if len(figures) % 2 and timed:
        begun = f.lives[0].time if f.lives else timed[0].time
        whole = {"number": clock, "y_steps": (1, 2, 5, 10, 20, 30), "y_base": 60.0}
        short = timed[-1].time - begun < 60
        add("Wall clock", "since the first start, pauses included",
            [Series(name="time", x=[s.step for s in timed], y=[s.time - begun for s in timed], style="d", fill=True)],
            from_zero=True, **({"number": seconds} if short else whole))
    return f'<div class="grid2">{"".join(figures)}</div>'


# ---- tables --------------------------------------------------------------------------------------------------------
def _section(title: str, lead: str, body: str) -> str:
    return f'<section><h2>{title}</h2><p class="lead">{lead}</p><div class="card">{body}</div></section>'


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Head cells that begin with `#` are numbers, right-aligned."""
    numeric = [h.startswith("#") for h in head]

    def cells(tag: str, row: Sequence[str]) -> str:
        return "".join(f'<{tag}{" class=num" if n else ""}>{cell}</{tag}>'
                       for cell, n in zip(row, numeric, strict=True))

    return (f'<div class="scroll"><table><thead><tr>{cells("th", [h.lstrip("#") for h in head])}</tr></thead><tbody>'
            + "".join(f"<tr>{cells('td', row)}</tr>" for row in rows) + "</tbody></table></div>")


def _lives(f: Facts) -> str:
    if not f.lives:
        return ""
    rows = []
    for life in f.lives:
        asked = "".join(f'<span class="chip mono">{escape(word)}</span>' for word in life.words
                        if "=" in word and (not life.changes or word.startswith("from=")))  # the others are changes
        changed = "".join(
            f'<div class="mono"><span class="muted">{escape(str(c.get("key")))}</span> '
            f'<span class="old">{escape(shown(c.get("old")))}</span> {escape(shown(c.get("new")))}</div>'
            for c in life.changes)
        problems = "".join(f'<div class="bad">{escape(p)}</div>' for p in life.checkpoint_problems)
        ended = escape(life.ended) if life.ended != "no stop recorded" else '<span class="bad">no stop recorded</span>'
        rows.append([
            f'<b>{escape(life.action)}</b><div class="muted nowrap">{date(life.time)}</div>',
            f"{life.from_step:,} → {life.to_step:,}" + (
                f'<div class="muted">{life.undone_steps} done again</div>' if life.undone_steps else ""),
            f'<span class="nowrap">{escape(where(life))}</span>'
            f'<div class="muted">{escape(life.device)}, {escape(life.precision)}</div>',
            (asked + changed or '<span class="muted">nothing changed</span>') + problems,
            clock(life.wall_s), f'<span class="nowrap">{ended}</span>'])
    return _section("Life of the run", "Every start of the ranks, what was asked for or changed, and how it ended.",
                    _table(["Start", "#Steps", "Ranks", "Asked for", "#Wall time", "End"], rows))


def _checkpoints(f: Facts) -> str:
    if not f.checkpoints:
        return ""
    colour = {"kept": "good", "removed": "muted", "failed": "bad"}
    rows = [[f"{c.step:,}", f'<span class="mono">{escape(c.path)}</span>' + (
                f'<div class="bad">{escape(c.problem)}</div>' if c.problem else ""),
             size(c.bytes), seconds(c.stall_s), seconds(c.durable_s),
             "–" if c.problem or c.durable_s <= 0 else f"{size(c.bytes / c.durable_s)}/s",
             f'<span class="{colour[c.state]}">{c.state}</span>'] for c in f.checkpoints]
    kept, written = sum(c.state == "kept" for c in f.checkpoints), sum(c.state != "failed" for c in f.checkpoints)
    return _section("Checkpoints", f"{kept} kept of {written} written. Training stood still for the stall only.",
                    _table(["#Step", "Directory", "#Size", "#Stall", "#Durable after", "#Rate", "State"], rows))


def _events(f: Facts) -> str:
    notes: list[tuple[str, str]] = []
    for e in f.left_out:
        notes.append(("bad", f"Step {e['step']:,} was left out: gradient norm {escape(str(e['grad_norm']))}. "
                             "Parameters and moments stayed as they were."))
    for e in f.spikes:
        notes.append(("warn", f"Step {e['step']:,} was a spike: loss {loss(e['loss_nats'])}, "
                              f"gradient norm {number(e['grad_norm'])}."))
    if f.repeated_steps:
        notes.append(("warn", f"{f.repeated_steps:,} steps were done again or given up, because a start fell back "
                              "to an earlier checkpoint. Each step counts once here."))
    if f.damaged_lines:
        notes.append(("warn", f"{f.damaged_lines} lines of metrics.jsonl could not be read and are left out."))
    for a, b in f.skipped_samples:
        notes.append(("warn", f"Samples {a:,} to {b - 1:,} were left out by data.skip."))
    for source, shards in f.damaged_blocks.items():
        for shard, blocks in shards.items():
            which = f"block{'s' * (len(blocks) > 1)} {', '.join(map(str, blocks))}"
            notes.append(("bad", f"{escape(source)}: {which} of {escape(shard)} did not match the checksums and gave no loss."))
    notes += [("warn", escape(text)) for text in f.missing]
    limit = 40
    if len(notes) > limit:
        notes = notes[:limit] + [("warn", f"... and {len(notes) - limit} more: see report.json")]
    if not notes:
        notes = [("good", "Nothing: no step was left out, no spike flagged, no step done twice.")]
    return _section("What was out of the ordinary", "Steps without an update, spikes, repetitions, unreadable parts.",
                    '<ul class="notes">' + "".join(f'<li class="{kind}">{text}</li>' for kind, text in notes) + "</ul>")


def _data(f: Facts) -> str:
    if not f.sources:
        return ""
    total = sum(s.rows or 0 for s in f.sources)
    held = {h.source: h for h in f.held_out}
    rows = []
    for s in f.sources:
        share = (s.rows or 0) / total if total else None
        epochs = s.tokens / s.available_tokens if s.tokens is not None and s.available_tokens and not s.packed else None
        bar = f'<div class="share"><i style="width:{share:.1%}"></i></div>' if share is not None else ""
        rows.append([
            f"<b>{escape(s.name)}</b>" + (f'<div class="muted">{escape(s.dataset)}</div>' if s.dataset else ""),
            "–" if s.tokens is None else count(s.tokens), "–" if share is None else f"{share:.1%}{bar}",
            "–" if epochs is None else f"{epochs:.2f}",
            loss(held[s.name].loss_nats) if s.name in held else "–", escape(s.licence or "not stated"),
            f'<span class="mono muted">{escape((s.fingerprint or "")[:12])}</span>' or "–"])
    unit = "Records" if f.items == "records" else "Tokens"
    tables = _table(["Source", f"#{unit} read", "#Share", "#Epochs", "#Held-out loss", "Licence", "Fingerprint"], rows)
    by_language = [[escape(h.source), escape(name), count(of["tokens"]), loss(of["loss_nats"]),
                    "–" if (bits := bits_per_byte(of["loss_nats"], of["tokens"], of["text_bytes"])) is None else f"{bits:.3f}"]
                   for h in f.held_out for name, of in sorted(h.languages.items(), key=lambda item: -item[1]["tokens"])]
    if by_language:
        tables += _table(["Source", "Language", "#Tokens held out", "#Loss", "#Bits per byte"], by_language)
    lead = "What each source gave (rows × row length, by the ledger), and under which terms."
    if any(s.packed for s in f.sources):
        lead += " Packed rows have padding: officina data audit tells their epochs."
    return _section("Data", lead, tables)


def _sample(f: Facts) -> str:
    if not f.sample:
        return ""
    return _section("What it writes", "Generated from the last checkpoint.", f'<pre class="sample">{escape(f.sample)}</pre>')


# ---- configuration and environment ---------------------------------------------------------------------------------
def _config(f: Facts) -> str:
    groups: dict[str, dict[str, Any]] = {"run": {}}
    for key, value in f.config.items():
        if isinstance(value, Mapping) and value:
            groups[key] = flat(value, f"{key}.")
        else:
            groups["run"][key] = value
    parts = []
    for group, values in groups.items():
        touched = sum(_overridden(key, f) for key in values)
        kind = values.get(f"{group}.kind")
        told = ", ".join(filter(None, [str(kind) if kind else "", f"{touched} set for this run" if touched else ""]))
        parts.append(_details(group, told, values, lambda key: _overridden(key, f)))
    return _section("Configuration", "Every key of the run. Coloured: set on the command line at a start or a resume.",
                    "".join(parts))


def _overridden(key: str, f: Facts) -> bool:
    return key in f.overrides or any(c.get("key") == key for life in f.lives for c in life.changes)


def _environment(f: Facts) -> str:
    if not f.environment:
        return ""
    parts = []
    for group, value in f.environment.items():
        if group == "ranks" and isinstance(value, list):
            hosts = dict.fromkeys(str(r.get("host")) for r in value if isinstance(r, Mapping))
            value = {"count": len(value), "hosts": ", ".join(hosts)} if value else {}
        if isinstance(value, Mapping) and value:
            parts.append(_details(group, _gist(group, value), flat(value), lambda key: False))
    plain = {k: v for k, v in f.environment.items() if not isinstance(v, (Mapping, list)) and v is not None}
    return _section("Environment", "Of the newest start.", _details("run", "", plain, lambda key: False) + "".join(parts))


def _gist(group: str, value: Mapping[str, Any]) -> str:
    """The one thing about a group that people look for."""
    if group == "packages":
        return f"torch {value.get('torch', 'unknown')}"
    if group == "cpu":
        return f"{value.get('model')}, {value.get('usable_cores')} cores"
    if group == "device":
        return ", ".join(dict.fromkeys(value.get("names") or [str(value.get("kind"))]))
    if group == "code":
        found = value.get("officina") or {}
        changed = ", changed since" if found.get("dirty") else ""
        return f"commit {str(found.get('commit') or 'unknown')[:10]}{changed}"
    return str(value.get("name") or value.get("hosts") or "")


def _details(title: str, note: str, values: Mapping[str, Any], marked: Callable[[str], bool]) -> str:
    rows = "".join(
        f'<div{" class=set" if marked(key) else ""}><span>{escape(key)}</span><b>{escape(shown(v))}</b></div>'
        for key, v in values.items())
    return (f"<details><summary>{escape(title)}<span>{escape(note)}</span></summary>"
            f'<div class="keys mono">{rows}</div></details>')


def _footer(f: Facts) -> str:
    rate = "" if f.tokens_per_wall_s is None else (
        " Over the whole wall time, with evaluation, saving and repeated steps in it: "
        f"{count(f.tokens_per_wall_s)} {f.items}/s.")
    return ("<footer>How it was counted. All numbers were measured in this run; none is predicted. "
            f"Loss is {_per_item(f)}; the training loss is the mean over the last {FINAL_STEPS} "
            f"steps. Only {f.items} that carried loss count: padding and masked ones do not.{rate} Wall time runs from each "
            "start to its last line in metrics.jsonl. MFU is given only for devices whose peak is known exactly. "
            f"officina {escape(str(f.officina or ''))}. The same facts for machines: report.json.</footer>")
