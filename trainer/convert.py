"""Models in Hugging Face's form in and out: `officina convert import` and `officina convert export`.

Both stream: a few MiB of one tensor at a time, whatever the size of the model.
"""

import argparse
import json
import math
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from officina.trainer.card import model_card
from officina.trainer.checkpoint.layout import TrainState, checkpoints_dir, parse_step_dir
from officina.trainer.checkpoint.read import open_checkpoint
from officina.trainer.checkpoint.verify import Alone
from officina.trainer.checkpoint.write import Saver
from officina.trainer.config import CheckpointConfig, DecoderConfig, LoraConfig, RunConfig
from officina.trainer.data import carried
from officina.trainer.data.chat import CHAT_TEMPLATE
from officina.trainer.data.order import Mixture, timeline_of
from officina.trainer.environment import describe
from officina.trainer.errors import CheckpointError, OfficinaError
from officina.trainer.generate import answer_ends, as_list, stop_ids
from officina.trainer.hf import peft
from officina.trainer.hf.base import BASE_DIR, SMALL_FILES, open_base
from officina.trainer.hf.config_file import CONFIG_FILE, FAMILIES, describes, family_for, load_raw, write_config
from officina.trainer.hf.family import Family
from officina.trainer.hf.files import ToWrite, Writer
from officina.trainer.hf.peft import peft_name
from officina.trainer.hf.source import DTYPES, FolderSource
from officina.trainer.import_adapter import import_adapter, words_to_go_on
from officina.trainer.initial import keep_base, keep_tokenizer, plain_weights, read_weights_record, weights_hash
from officina.trainer.metrics import read_metrics
from officina.trainer.model.shapes import parameter_shapes
from officina.trainer.model.targets import choose
from officina.trainer.run_dir import Start, append_history, load_config, new_run_id, save_config, split_step
from officina.trainer.state import PARAM, Piece, Source

PART = 1 << 22
"""Elements in memory at a time: 16 MiB in fp32."""
_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
EXAMPLES = """examples:
  officina convert import models/EuroLLM-1.7B --to runs/eurollm
  officina convert import adapters/mine --base models/EuroLLM-1.7B --to runs/mine
  officina convert export runs/demo --to exported/demo
  officina convert export runs/demo@600 --to exported/demo-600 --dtype float32
  officina convert export runs/lora --to exported/merged
  officina convert export runs/lora --to exported/adapter --adapter
  officina train init_from=models/EuroLLM-1.7B model=from_init data.sources.x.path=DATASET   needs no import
"""


# ---- in ------------------------------------------------------------------------------------------------------------
def name_of_import(run_dir: Path) -> str:
    """The run's name, after its directory. Raises OfficinaError for one that is not empty."""
    if run_dir.exists() and any(run_dir.iterdir()):
        raise OfficinaError(f"--to {run_dir}: is not empty, and an import makes a new run directory. Try: --to {run_dir}-2")
    return re.sub(r"[^A-Za-z0-9._-]+", "-", run_dir.resolve().name).lstrip("._-") or "imported"


def import_model(folder: Path, run_dir: Path, words: Sequence[str] = ()) -> str:
    """Make `run_dir` a run whose checkpoint of step 0 holds the folder's weights. Returns their hash."""
    base = open_base(str(folder))
    if base.family is None:
        raise OfficinaError(f"{folder} is a run of officina already: officina generate {folder} PROMPT, or start from it: "
                            f"officina train init_from={folder} model=from_init")
    name = name_of_import(run_dir)
    shapes = parameter_shapes(base.model)
    source = FolderSource(base, shapes)
    run_dir.mkdir(parents=True, exist_ok=True)
    about, run_id = describe(), new_run_id()
    append_history(run_dir, Start(
        run_id=run_id, action="import", words=words, step=0, world_size=1, engine="single",
        commit=about["code"]["officina"]["commit"], origin={"name": base.name},
        versions={"officina": about["officina"], "python": about["python"], **about["packages"]},
        carried=carried.record(carried.read_file(folder))))
    hash_ = weights_hash(source, shapes, Alone())
    keep_base(base, run_dir, {"name": base.name, "kind": "folder", "hash": hash_,
                              "parameters": sum(map(math.prod, shapes.values()))})
    if problem := keep_tokenizer(run_dir):
        print(f"officina convert: imported without a tokenizer: {problem}", file=sys.stderr)
    saver = Saver(run_dir, Alone(), CheckpointConfig(), run_id)
    saver.prepare(_pieces(_Nothing(), shapes))
    outcome = saver.save(0, _pieces(source, shapes), TrainState(step=0))
    if outcome.problem:
        raise CheckpointError(outcome.problem)
    save_config(RunConfig(name=name, model=base.model), run_dir)  # last: without it the directory is no run
    return hash_


class _Stored:
    """A source's values as the files hold them: rounded to their dtypes. Their hash is the one that is read there."""

    def __init__(self, source: Source, plan: Sequence[ToWrite], ours: Mapping[str, str]) -> None:
        self._source = source
        self._dtypes = {ours[tensor.name]: DTYPES[tensor.dtype] for tensor in plan if tensor.name in ours}

    def read(self, name: str, slot: str, start: int, stop: int) -> torch.Tensor:
        return self._source.read(name, slot, start, stop).to(self._dtypes[name])


class _Nothing:
    """Sizes without values."""

    def read(self, name: str, slot: str, start: int, stop: int) -> torch.Tensor:
        return torch.empty(stop - start, device="meta")


def _pieces(source: Source, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[Piece]:
    for name, shape in shapes.items():
        for start, stop in _parts(math.prod(shape)):
            yield Piece(name, PARAM, shape, start, stop, source.read(name, PARAM, start, stop))


def _parts(numel: int) -> Iterator[tuple[int, int]]:
    return ((start, min(numel, start + PART)) for start in range(0, numel, PART))


# ---- out -----------------------------------------------------------------------------------------------------------
def export_run(text: str, folder: Path, *, dtype: str | None = None, max_shard_bytes: int = 5 * 10**9) -> dict[str, Any]:
    """Write RUN, RUN@STEP or the directory of a checkpoint to `folder` in Hugging Face's form.

    dtype: float32, bfloat16 or float16; None = that of the model the run started from, else the one it computed in.
    Returns what was written: `family`, `dtype`, `hash` (of the values as stored), `files` (name -> SHA-256), `step`, `bytes`,
    and `rows` (data source -> rows read until then).
    """
    run_dir, step = _which(text)
    run = load_config(run_dir)
    if not isinstance(run.model, DecoderConfig):
        raise OfficinaError("model.kind=custom: Hugging Face's form is for the built-in decoder. Your own module saves itself: "
                            "see docs/bring_your_own_model.md")
    record, raw = read_weights_record(run_dir), _base_config(run_dir)
    family = family_for(run.model, raw)
    folder = _new_folder(folder)
    shapes = parameter_shapes(run.model)
    common = _NAMES[dtype] if dtype else record.get("dtype") or _computed_in(run_dir)
    others = {} if dtype else record.get("other_dtypes", {})
    plan = [ToWrite(theirs, others.get(theirs, common), shape)
            for theirs, shape in _tensors(family, run.model, shapes)]
    writer = Writer(folder, plan, max_shard_bytes)
    ours = {family.their_name(name): name for name in shapes}
    with open_checkpoint(run_dir, step=step) as opened:
        for problem in opened.passed_over:
            print(f"officina convert: not taken: {problem}", file=sys.stderr)
        with plain_weights(run_dir, opened, Alone()) as source:
            if source is opened:
                opened.check_fits(shapes)
            hash_ = weights_hash(_Stored(source, plan, ours), shapes, Alone())
            for name, tensors in writer.shards.items():
                writer.write(name, _bytes_of(tensors, ours, source, family))
        step, position = opened.step, opened.train_state.position
    rows = Mixture(timeline_of(run.data)).rows_given(position) if position else {}
    writer.finish()
    result = {"family": family.architecture, "dtype": common, "hash": hash_, "step": step,
              "bytes": sum(tensor.bytes for tensor in plan), "files": dict(writer.sha256), "rows": rows}
    _write_small_files(run_dir, run, folder)
    result |= {"tokenizer": (folder / "tokenizer.json").exists(), "chat": (folder / CHAT_TEMPLATE).exists()}
    (folder / "README.md").write_text(model_card(run_dir, run, result), encoding="utf-8")
    carried.write_file(folder, run_dir, step)
    config = write_config(run.model, family, base=raw, dtype=_torch_name(common), max_seq_len=run.batch.seq_len)
    if raw and common != record.get("dtype"):
        config |= {key: _torch_name(common) for key in ("torch_dtype", "dtype") if key in config}
    config |= _stops(run_dir, raw)
    _write_json(folder / CONFIG_FILE, config)  # last: without it the folder is no model
    return result


def export_adapter(text: str, folder: Path) -> dict[str, Any]:
    """Write the adapter of a run's checkpoint to `folder` in PEFT's form, in fp32.

    Returns `base` (its name), `init_from` (where it lies, if it is a folder), `hash` (of its weights), `nf4` (was it held in 4
    bits?), `changed` (is the run's model another than the base's config.json says?), `step` and `bytes`.
    """
    run_dir, step = _which(text)
    run = load_config(run_dir)
    if not isinstance(run.adapter, LoraConfig):
        raise OfficinaError(f"{run_dir} has no adapter (adapter=none); its whole model: officina convert export {text} --to "
                            f"{folder}")
    folder = _new_folder(folder)
    record, raw = read_weights_record(run_dir), _base_config(run_dir)
    family = FAMILIES[raw["model_type"]] if raw else family_for(run.model)
    chosen = choose(run.model, run.adapter)
    shapes = parameter_shapes(run.model)
    wanted = {**chosen.adapter_shapes(run.adapter.rank), **{name: shapes[name] for name in chosen.whole}}
    with open_checkpoint(run_dir, step=step) as opened:
        for problem in opened.passed_over:
            print(f"officina convert: not taken: {problem}", file=sys.stderr)
        opened.check_fits(wanted)
        tensors = {peft_name(name, family): opened.read(name, PARAM, 0, math.prod(shape)).view(shape)
                   for name, shape in wanted.items()}
        step = opened.step
    if run.model.tie_embeddings and "embed.weight" in chosen.whole:  # PEFT looks for a tied matrix at both ends
        tensors[f"{peft.PREFIX}lm_head.weight"] = tensors[peft_name("embed.weight", family)].clone()
    save_file(tensors, folder / peft.WEIGHTS_FILE, {"format": "pt"})
    _write_small_files(run_dir, run, folder)
    carried.write_file(folder, run_dir, step)
    base = str(record.get("name", ""))
    config = peft.peft_config(run.model, run.adapter, chosen, family, base)
    _write_json(folder / peft.CONFIG_FILE, config)  # last: without it the folder is no adapter
    return {"base": base, "init_from": run.init_from if raw and record.get("kind") == "folder" else "",
            "hash": record.get("hash"), "nf4": run.adapter.base == "nf4", "step": step,
            "changed": bool(raw) and not describes(raw, run.model),
            "bytes": (folder / peft.WEIGHTS_FILE).stat().st_size}


def _tensors(family: Family, model: DecoderConfig,
             shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes as the family's files have them, layer by layer."""
    yield from ((family.their_name(name), shape) for name, shape in shapes.items())
    yield from ((f"model.layers.{layer}.{name}", ()) for layer in range(model.n_layers) for name in family.constants)


def _bytes_of(tensors: Sequence[ToWrite], ours: Mapping[str, str], source: Source, family: Family) -> Iterator[bytes]:
    for tensor in tensors:
        dtype = DTYPES[tensor.dtype]
        if tensor.name not in ours:
            value = family.constants[tensor.name.split(".", 3)[3]]
            yield torch.tensor([value], dtype=dtype).view(torch.uint8).numpy().tobytes()
            continue
        for start, stop in _parts(math.prod(tensor.shape)):
            values = source.read(ours[tensor.name], PARAM, start, stop).to(dtype)
            if not torch.isfinite(values).all():
                raise OfficinaError(f"{ours[tensor.name]} holds numbers that are not finite as {_torch_name(tensor.dtype)}. "
                                    "Export another checkpoint (RUN@STEP), or with --dtype float32")
            yield values.view(torch.uint8).numpy().tobytes()


def _which(text: str) -> tuple[Path, int | None]:
    """RUN, RUN@STEP, or RUN/checkpoints/step-N."""
    path = Path(text)
    found = parse_step_dir(path.name)
    if found and path.parent.name == "checkpoints":
        return path.parent.parent, found[0]
    if path.is_dir() and not (path / "config.yaml").exists() and (path / CONFIG_FILE).exists():
        raise OfficinaError(f"{path} is in Hugging Face's form already; export is for runs of officina")
    return split_step(text)


def _new_folder(folder: Path) -> Path:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OfficinaError(f"--to {folder}: there is something there already, and an export is never written over another. "
                            f"Try: --to {folder}-2")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _base_config(run_dir: Path) -> dict[str, Any] | None:
    return load_raw(run_dir / BASE_DIR) if (run_dir / BASE_DIR / CONFIG_FILE).exists() else None


def _computed_in(run_dir: Path) -> str:
    """The dtype the model was computed in, which is what its weights are good for."""
    starts = read_metrics(run_dir).generations
    return "BF16" if starts and starts[-1].start.precision.startswith("bf16") else "F32"


def _torch_name(dtype: str) -> str:
    return next(name for name, other in _NAMES.items() if other == dtype)


def _write_small_files(run_dir: Path, run: RunConfig, folder: Path) -> None:
    """Tokenizer, chat template, generation settings and licence: those the run started from, else made from its own."""
    for name in SMALL_FILES:
        if (run_dir / BASE_DIR / name).is_file() and name != CONFIG_FILE:
            shutil.copyfile(run_dir / BASE_DIR / name, folder / name)
    own = run_dir / "tokenizer.json"
    if own.exists():  # what the data were encoded with: the same file, unless tokens were added
        shutil.copyfile(own, folder / "tokenizer.json")
    if (run_dir / CHAT_TEMPLATE).exists():  # what its samples were written with
        shutil.copyfile(run_dir / CHAT_TEMPLATE, folder / CHAT_TEMPLATE)
    stops = _stops(run_dir, None)
    if own.exists() and not (folder / "tokenizer_config.json").exists():
        from tokenizers import Tokenizer

        settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": run.batch.seq_len}
        if stops:
            settings["eos_token"] = Tokenizer.from_file(str(own)).id_to_token(as_list(stops["eos_token_id"])[0])
        _write_json(folder / "tokenizer_config.json", settings)
    generation = folder / "generation_config.json"
    if generation.exists():
        found = json.loads(generation.read_text(encoding="utf-8"))
        if more := _stops(run_dir, found):
            _write_json(generation, found | more)
    elif not (run_dir / BASE_DIR / CONFIG_FILE).exists():
        _write_json(generation, {"_from_model_config": True, **stops})


def _stops(run_dir: Path, base: Mapping[str, Any] | None) -> dict[str, Any]:
    """`eos_token_id` that is to be written: a list if there are several, as transformers takes it.

    base: settings of the model the run started from, which stay as they are unless they lack the end of an answer that was
    trained on; None: there are none.
    """
    from tokenizers import Tokenizer

    path = run_dir / "tokenizer.json"
    if not path.exists():
        return {}
    tokenizer = Tokenizer.from_file(str(path))
    there = as_list((base or {}).get("eos_token_id"))
    wanted = stop_ids(run_dir, tokenizer) if base is None else list(dict.fromkeys([*there, *answer_ends(run_dir, tokenizer)]))
    return {} if wanted == there else {"eos_token_id": wanted if len(wanted) > 1 else wanted[0]}


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# ---- command line --------------------------------------------------------------------------------------------------
def main(argv: Sequence[str]) -> int:
    """`officina convert ...`."""
    args = _parser().parse_args(argv)
    with _nothing_left(Path(args.to)):
        return _convert(args, argv)


@contextmanager
def _nothing_left(folder: Path) -> Iterator[None]:
    """What stops before its end leaves nothing in a folder that was not there or empty."""
    new = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
    try:
        yield
    except BaseException:
        if new:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def _convert(args: argparse.Namespace, argv: Sequence[str]) -> int:
    if args.way == "import" and (Path(args.path) / peft.CONFIG_FILE).is_file():
        run_dir = Path(args.to)
        run = import_adapter(Path(args.path), run_dir, name_of_import(run_dir), base=args.base, nf4=args.nf4,
                             words=["convert", *argv])
        print(f"{run_dir}: adapter of rank {run.adapter.rank} beside {run.init_from}\n"
              f"  officina generate {run_dir} \"Once upon a time\"\n"
              f"  officina convert export {run_dir} --to MERGED\n"
              f"  officina train {' '.join(words_to_go_on(run, run_dir))} data.sources.NAME.path=DATASET")
        return 0
    if args.way == "import":
        if args.base or args.nf4:
            raise OfficinaError(f"--base and --nf4 are for an adapter in PEFT's form, and {args.path} has no "
                                f"{peft.CONFIG_FILE}. Try: officina convert import {args.path} --to {args.to}")
        hash_ = import_model(Path(args.path), Path(args.to), ["convert", *argv])
        size = sum(f.stat().st_size for f in checkpoints_dir(Path(args.to)).rglob("*.bin"))
        print(f"{args.to}: checkpoint of step 0 ({_human(size)} in fp32), weights {hash_}\n"
              f"  officina generate {args.to} \"Once upon a time\"\n"
              f"  officina train init_from={args.to} model=from_init data.sources.NAME.path=DATASET")
        return 0
    if args.adapter:
        told = export_adapter(args.checkpoint, Path(args.to))
        base = repr(told["init_from"] or "BASE")
        classes = "AutoModelForCausalLM as M"
        if told["nf4"]:
            classes, base = f"{classes}, BitsAndBytesConfig as C", f"{base}, quantization_config=C(load_in_4bit=True, " \
                "bnb_4bit_quant_type='nf4')"
        print(f"{args.to}: adapter of step {told['step']}, {_human(told['bytes'])}, for {told['base'] or 'random weights'}"
              + (f" (weights {told['hash']})" if told["hash"] else "") +
              f"\n  python -c \"from transformers import {classes}; from peft import PeftModel as P; "
              f"P.from_pretrained(M.from_pretrained({base}), '{args.to}')\"")
        if told["changed"]:
            print("  It was trained with other positions, windows or tokens than the base's config.json says, and an adapter "
                  f"cannot say which. The merged model does: officina convert export {args.checkpoint} --to MERGED")
        if not told["init_from"]:
            print("  BASE is the folder of what the run started from; of a run: officina convert export RUN --to BASE")
        return 0
    limit = _size(args.max_shard)
    found = export_run(args.checkpoint, Path(args.to), dtype=args.dtype, max_shard_bytes=limit)
    n = len(found["files"])
    print(f"{args.to}: {found['family']}, step {found['step']}, {_human(found['bytes'])} in {n} file{'s' * (n > 1)} "
          f"({_torch_name(found['dtype'])}), weights {found['hash']}\n"
          f"  python -c \"from transformers import AutoModelForCausalLM as M; M.from_pretrained('{args.to}')\"")
    return 0


def _human(size: float) -> str:
    unit, name = next(((u, n) for u, n in ((1e9, "GB"), (1e6, "MB")) if size >= 0.9995 * u), (1e3, "kB"))
    return f"{size / unit:.3g} {name}"


def _size(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", text.strip(), re.IGNORECASE)
    if not match or float(match[1]) <= 0:
        raise OfficinaError(f"--max-shard {text}: has to be a size. Try: --max-shard 5GB")
    unit = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}[match[2].upper()]
    return int(float(match[1]) * (1024 if match[3] else 1000)**unit)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="officina convert", description="Models in Hugging Face's form (config.json and safetensors), in and out.",
        epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter)
    ways = parser.add_subparsers(dest="way", metavar="import|export", required=True)
    into = ways.add_parser("import", help="make a run directory whose checkpoint holds the weights of a folder, or an adapter",
                           epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter)
    into.add_argument("path", metavar="FOLDER", help="a model (config.json and *.safetensors), or an adapter in PEFT's form "
                      "(adapter_config.json and adapter_model.safetensors)")
    into.add_argument("--to", required=True, metavar="RUN", help="run directory to make")
    into.add_argument("--base", default="", metavar="MODEL", help="of an adapter: folder or run of the model it was trained "
                      "on; default: what adapter_config.json names, if it is a folder here")
    into.add_argument("--nf4", action="store_true", help="of an adapter: it was trained beside a base in 4 bits (QLoRA)")
    out = ways.add_parser("export", help="write a run's checkpoint as a model that transformers loads",
                          epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter)
    out.add_argument("checkpoint", metavar="RUN", help="RUN, RUN@STEP or RUN/checkpoints/step-N; of a run its newest")
    out.add_argument("--to", required=True, metavar="DIR", help="new folder")
    out.add_argument("--dtype", choices=sorted(_NAMES), help="default: of the model the run started from, else the one it "
                     "computed in")
    out.add_argument("--adapter", action="store_true", help="only the adapter, in PEFT's form; else it is merged")
    out.add_argument("--max-shard", default="5GB", metavar="SIZE", help="largest file; default: %(default)s")
    return parser
