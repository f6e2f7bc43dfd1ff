"""The tables of docs/benchmarks.md, written from the records in benchmarks/results.

    python -m officina.benchmarks.table            # write them anew
    python -m officina.benchmarks.table --check    # exit status 1 if they are not what the records say

A table stands between `<!-- record: NAME -->` and `<!-- end -->`. Only what a record holds gets into it.
"""

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from officina.benchmarks.record import RESULTS

PAGE = Path(__file__).parent.parent / "docs" / "benchmarks.md"
_PLACE = re.compile(r"(<!-- record: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
Record = Mapping[str, Any]


def fill(text: str, records: Mapping[str, Record]) -> str:
    """The page with every table anew."""
    return _PLACE.sub(lambda m: f"{m[1]}\n{_section(m[2], records.get(m[2]))}\n\n{m[3]}", text)


def read_records(folder: Path = RESULTS) -> dict[str, Record]:
    """Name -> record. Raises ValueError for a record of shapes that were shrunk to try a benchmark out."""
    found = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    for name, record in found.items():
        if record["settings"].get("tiny"):
            raise ValueError(f"benchmarks/results/{name}.json was made with --tiny: it is no measurement. Remove it")
    return found


def _section(name: str, record: Record | None) -> str:
    if record is None:
        return f"*No record yet: {'`make gpu`' if name == 'gpu' else f'`officina bench {name}`'}.*"
    return f"{_made(record)}\n\n{_TABLES[name](record['results'])}"


def _made(record: Record) -> str:
    """When, on what and with which code."""
    device, versions = record["device"], record["versions"]
    where = ", ".join(device["accelerators"]) or f"{device['cpu']}, {device['cores']} cores"
    changed = " with changes" if record["commit"]["changed"] else ""
    commit = (record["commit"]["hash"] or "no repository")[:9] + changed
    repeats = f", {record['repeats']} repeats" if record["repeats"] else ""
    return (f"*{record['date'][:10]}, {where}, torch {versions['torch']}, Python {versions['python']}, "
            f"commit {commit}{repeats}*")


# ---- one function a record -----------------------------------------------------------------------------------------
def _step(results: Record) -> str:
    rows = []
    for precision, r in results.items():
        speed = r["tokens_per_s"]
        rows.append([precision, *(_count(speed[who]["median"]) for who in ("officina", "plain PyTorch", "HF Trainer")),
                     _ratio(r["speed against plain PyTorch"]), _ratio(r["speed against HF Trainer"]),
                     f"{r['outside_engine_share']['median']:.2%}"])
    return _table(["precision", "officina, tokens/s", "plain PyTorch", "HF Trainer", "speed against plain",
                   "against HF Trainer", "of a step outside the engine"], rows)


def _lora(results: Record) -> str:
    them, rows = "PEFT + HF Trainer", []
    for precision, r in results.items():
        speed, cpu = r["tokens_per_s"], r[f"tokens per CPU second against {them}"]
        rows.append([precision, *(_count(speed[who]["median"]) for who in ("officina", them)),
                     _ratio(r[f"speed against {them}"]), f"{cpu['median']:.3f} (blocks {cpu['min']:.3f} to {cpu['max']:.3f})"])
    return _table(["precision", "officina, tokens/s", them, "speed against it", "tokens per processor second against it"], rows)


def _sft(results: Record) -> str:
    rows = [[precision, who, f"{r['filled'][who]:.0%}", _count(speed["median"]),
             _count(r["trained_tokens_per_s"][who]["median"]), _ratio(r[f"speed against {who}"]) if who != "officina" else ""]
            for precision, r in results.items() for who, speed in r["tokens_per_s"].items()]
    return _table(["precision", "program", "of its positions no padding", "tokens/s", "trained tokens/s",
                   "officina's speed against it"], rows, words=2)


def _engines(results: Record) -> str:
    names = list(next(iter(results.values()))["tokens_per_s"])
    head, rows = ["loop"], [[name] for name in names]
    for precision, r in results.items():
        head += [f"{precision}, tokens/s", "against DDP"]
        for row, name in zip(rows, names, strict=True):
            ratio = r["speed against ddp"].get(name)
            row += [_count(r["tokens_per_s"][name]["median"]), f"{ratio['median']:.2f}" if ratio else "1"]
    against = "; ".join(f"{engine} {_ratio(ratio)} ({precision})" for precision, r in results.items()
                        for engine, ratio in r["speed against plain"].items())
    return _table(head, rows) + f"\n\nSpeed against the plain loop that shards in the same way: {against}."


def _start(results: Record) -> str:
    parts = list(next(iter(results.values()))["parts_s"])
    rows = [[case, f"{r['total_s']['median']:.1f} ({r['total_s']['min']:.1f} to {r['total_s']['max']:.1f})",
             *(f"{r['parts_s'][part]['median']:.2f}" for part in parts)] for case, r in results.items()]
    return _table(["start", "seconds to the first step", *parts], rows)


def _submit(results: Record) -> str:
    def seconds(found: Record) -> str:
        return f"{found['median']:.2f} ({found['min']:.2f} to {found['max']:.2f})"

    rows = [["a dry run", seconds(results["dry_run_s"]), ""]]
    if "ratio" in results:
        ratio = results["ratio"]
        rows += [["start, officina submit", seconds(results["start_s"]["officina submit"]),
                  f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})"],
                 ["start, srun torchrun", seconds(results["start_s"]["srun torchrun"]), "1"]]
    return _table(["", "seconds", "against srun torchrun"], rows)


def _checkpoint(results: Record) -> str:
    rows = [[case, f"{r['seconds']['median']:.2f}", f"{r['bytes_per_s'] / 1e9:.2f}"]
            for case, r in results.items() if isinstance(r, dict) and "seconds" in r]
    stalls = [[case, *(f"{seconds:.3f}" for seconds in (
                  r["first_stall_s"], r["later_stall_s"]["median"], r["durable_s"]["median"]))]
              for case, r in results.items() if isinstance(r, dict) and "later_stall_s" in r]
    return "\n\n".join([
        f"A state of {results['state_bytes'] / 1e9:.2f} GB.", _table(["case", "seconds", "GB/s"], rows),
        _table(["in the background", "first stall, s", "later stalls, s", "durable after, s"], stalls)])


def _checkpoint_faults(results: Record) -> str:
    rows = []
    for name, r in results["corruptions"].items():
        total = r["total"]
        rows.append([name, str(r["trials"]), str(total.get("SILENT", 0)),
                     ", ".join(f"{outcome} {n}" for outcome, n in sorted(total.items()))])
    kills = [[mode, str(r["kills"]), str(r["kills_during_a_save"]), str(r["whole_checkpoint_loaded"])]
             for mode, r in results["kills"].items()]
    return (_table(["format", "corruptions", "loaded without a word", "outcomes"], rows) + "\n\n" +
            _table(["saving", "kills", "of them during a save", "a whole checkpoint loaded afterwards"], kills))


def _gpu(results: Record) -> str:
    rows = []
    for stage, r in results.items():
        for who, value in r.items():
            if isinstance(value, dict) and "tokens_per_s" in value:
                rows.append([stage, who, _count(value["tokens_per_s"]["median"]), _percent(value["mfu_causal"]),
                             _percent(value["mfu_full"]), _percent(value["of_ceiling_causal"]),
                             f"{value['peak_memory_bytes'] / 2**30:.1f}"])
    said = [f"Matrix product measured here: {results['matmul']['flops_per_s'] / 1e12:.0f} TFLOP/s in bf16."]
    said += [f"{stage}: {_ratio(value)} times the speed of {name.removeprefix('speed against ')}."
             for stage, r in results.items() for name, value in r.items() if name.startswith("speed against")]
    said += [f"{stage}: {'failed' if 'failed' in r else 'left out, ' + r['left_out']}."
             for stage, r in results.items() if "failed" in r or "left_out" in r]
    if "total_s" in results.get("start", {}):
        said.append(f"From the command to the first step: {results['start']['total_s']['median']:.1f} s.")
    return _table(["run", "loop", "tokens/s", "MFU, causal", "MFU, full", "of the measured ceiling, causal",
                   "peak GiB"], rows, words=2) + "\n\n" + " ".join(said)


def _kernels(results: Record) -> str:
    rows = [[f"{goal['kernel']}, {goal['shape']}, {goal['phase']}", goal["entrant"], goal["measure"], f"{goal['must']:g}",
             "" if goal["stretch"] is None else f"{goal['stretch']:g}",
             "not measured" if goal["found"] is None else f"{goal['found']:.3g}{'' if goal['met'] else ' (missed)'}"]
            for goal in results["goals"]]
    ceilings = results["ceilings"]
    said = (f"Measured ceilings: copy {ceilings['copy_bytes_per_s'] / 1e12:.2f} TB/s, matrix product "
            f"{ceilings['matmul_flops_per_s'] / 1e12:.0f} TFLOP/s.")
    if results["left_out"]:
        said += f" Left out for want of time: {'; '.join(results['left_out'])}."
    if results["without"]:
        said += f" Not measured: {', '.join(results['without'])}."
    return _table(["kernel", "entrant", "measure", "goal", "hoped for", "found"], rows, words=3) + "\n\n" + said


def _data_build(results: Record) -> str:
    build = results["build"]
    rows = [[name, f"{r['bytes_per_s']['median'] / 1e6:.2f}", f"{r['time_s']['median']:.1f}", f"{r['cpu_s']['median']:.1f}"]
            for name, r in results.items()]
    return (_table(["", "MB/s of text", "seconds", "processor seconds"], rows) +
            f"\n\nThe build keeps {_ratio(build['share_of_tokenizer_rate'])} of its tokenizer's rate, and "
            f"{_ratio(build['share_by_cpu_time'])} by processor time.")


def _sealed(results: Record) -> str:
    rows = [[name, f"{r['tokens_per_s']['median'] / 1e6:,.0f}", f"{r['first_epoch_tokens_per_s'] / 1e6:,.0f}"]
            for name, r in results.items()]
    return (_table(["data set", "M tokens/s", "in the first epoch"], rows) +
            f"\n\nA sealed set keeps {_ratio(results['sealed']['share_of_open'])} of the rate.")


def _loader(results: Record) -> str:
    modes: dict[str, dict[str, Record]] = {}
    for name, r in results["speed"].items():
        who, _, mode = name.partition(" | ")
        modes.setdefault(who, {})[mode] = r
    rows = [[who, next(iter(of.values()))["holds"],
             *(f"{of[mode]['tokens_per_s']['median'] / 1e6:,.1f}" if mode in of else "" for mode in ("in process", "prefetch")),
             f"{of['in process']['tokens_per_cpu_s']['median'] / 1e6:,.0f}" if "in process" in of else ""]
            for who, of in modes.items()]
    said = [f"{name}: {_ratio(r)} times {r['against'].partition(' | ')[0]}" +
            (f", {r['by_cpu_time']:.2f} times by CPU time." if "by_cpu_time" in r else ".")
            for name, r in results["ratios"].items()]
    low, high = results["load_average"]
    said += [f"Others used the machine: its load average was {low:.0f} before and {high:.0f} after these turns."]
    said += [f"Left out: {name}, {why}." for name, why in results["left_out"].items()]
    shares = {"share": "of the disk's rate in order", "share_of_random": "of its rate at random"}
    shares = {key: word for key, word in shares.items() if key in results["cold"]["in order"]}  # one in the first records
    cold = [[name, f"{r['bytes_per_s']['median'] / 1e6:,.0f}", *(f"{r[key]['median']:.2f}" for key in shares)]
            for name, r in results["cold"].items()]
    opened, resumed, memory = results["open"], results["resume"], results["memory"]
    costs = [
        ["open: 400 sources, 15,200 shards, 3.7e9 rows, to the first batch", f"{opened['time_s']['median']:.2f} s, "
         f"{opened['grown_bytes']['median'] / 1e6:.0f} MB"],
        ["resume: 8 sources, a change of weights, other ranks, to the first batch",
         f"{resumed['time_s']['median'] * 1e3:.0f} ms"],
        ["state of 8 sources, made and written as JSON",
         f"{resumed['last']['state_bytes']} bytes, {resumed['state_s']['median'] * 1e3:.2f} ms"],
        *([["state of 400 sources", f"{opened['last']['state_bytes']} bytes"]] if "state_bytes" in opened["last"] else []),
        ["verification on first touch, of an epoch's CPU time in memory",
         f"{results['verification']['slower']['median']:+.1%}"],
        *([["verification on first touch, of an epoch's time with prefetch",
            f"{results['verification']['of_time']['median']:+.1%}"]] if "of_time" in results["verification"] else []),
        [f"growth over {memory['batches']:,} batches of one row", f"{memory['grown_bytes'] / 1e6:.1f} MB"]]
    even = [[name, f"{r['same_shard']:.4f}", f"{r['chi2_per_freedom']:.2f}"] for name, r in results["shuffle"].items()]
    return "\n\n".join([
        _table(["loader", "a batch holds", "in process, M tokens/s", "with prefetch", "in process, M tokens per CPU second"],
               rows, words=2), "  \n".join(said),
        _table(["cold", "MB/s", *shares.values()], cold), _table(["cost", ""], costs),
        _table(["order of a million rows in 64 shards", "neighbours of one shard", "chi2 per degree of freedom"], even)])


_TABLES = {"loader": _loader, "step": _step, "lora": _lora, "sft": _sft, "engines": _engines, "start": _start,
           "submit": _submit, "data_build": _data_build, "sealed": _sealed,
           "checkpoint": _checkpoint, "checkpoint_faults": _checkpoint_faults, "gpu": _gpu, "kernels": _kernels}


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], words: int = 1) -> str:
    """words: columns of text, which come first and stand left."""
    lines = [head, ["---"] * words + ["---:"] * (len(head) - words), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _ratio(value: Mapping[str, float]) -> str:
    return f"{value['median']:.3f} ({value['low']:.3f} to {value['high']:.3f})"


def _count(value: float) -> str:
    return f"{value:,.0f}"


def _percent(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.1%}"


def main(argv: list[str] | None = None) -> int:
    """Write the tables, or check them."""
    parser = argparse.ArgumentParser(prog="python -m officina.benchmarks.table", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing")
    args = parser.parse_args(argv)
    text = PAGE.read_text()
    filled = fill(text, read_records())
    if args.check:
        return int(filled != text)
    PAGE.write_text(filled)
    return 0


if __name__ == "__main__":
    sys.exit(main())
