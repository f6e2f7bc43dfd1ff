"""Rules between the keys of a run: everything that can be known to be wrong before a rank is started. Torch-free.

Each rule is a few lines that yield Problems whose remedy, where it is `key=value`, makes the problem go away.
"""

import math
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from officina.trainer.config import (
    CustomModelConfig,
    DecoderConfig,
    FSDP2Config,
    HSDPConfig,
    MuonConfig,
    RopeConfig,
    RunConfig,
    SingleConfig,
    ZeroConfig,
)
from officina.trainer.data.gate import use_problems
from officina.trainer.data.manifest import MANIFEST, open_dataset
from officina.trainer.data.order import sources_in_use
from officina.trainer.data.policy import AREAS, purpose_word
from officina.trainer.data.policy import country as known_country
from officina.trainer.data.register import Going
from officina.trainer.environment import lacking
from officina.trainer.errors import DataError, Problem
from officina.trainer.keys import flat
from officina.trainer.model.targets import adapter_problems
from officina.trainer.schema import dump_run

DOTTED_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_FLEX_HEAD_DIM, _FLASH_HEAD_DIM = 16, 256
"""Narrowest head that flex attention takes, and widest that our own kernels take."""


def problems(run: RunConfig, world_size: int | None = None, *, devices: int | None = None,
             read_data: bool = True, going: Going | None = None) -> list[Problem]:
    """Every rule between keys that `run` breaks; empty if it can start.

    Args:
        world_size: number of ranks; None where a later launcher decides (then `run.ranks`, if it is set, is taken).
        devices: accelerators on this machine; None if nobody has looked.
        read_data: look into the data sets' manifests; False where their file system is not at hand.
        going: where the run stands, for data sets with a maximum of use; None = a new run.
    """
    world_size = world_size or run.ranks or None
    found = [*_numbers(run), *_run(run, devices), *_model(run), *adapter_problems(run), *_batch(run), *_engine(run, world_size),
             *_schedule(run), *_objective(run), *_life(run, world_size), *_data(run), *_use(run)]
    if read_data:
        data = list(_data_sets(run, going.position if going else 0))
        found += data or use_problems(run, going)
    return found


def missing_packages(run: RunConfig) -> list[Problem]:
    """Optional packages that the run needs and this machine's Python lacks, or has in a version that will not do; asked
    where ranks start."""
    wanted = [("engine", run.engine.kind, isinstance(run.engine, ZeroConfig), "deepspeed", "engine=fsdp2"),
              ("logging.wandb", True, run.logging.wandb, "wandb", "logging.wandb=false"),
              ("logging.mlflow", True, run.logging.mlflow, "mlflow", "logging.mlflow=false")]
    found = [Problem(key, value, f"{lack} (pip install 'officina[{extra}]')", remedy)
             for key, value, needed, extra, remedy in wanted if needed and (lack := lacking(extra))]
    if run.engine.compile and run.device == "cpu" and not (shutil.which("g++") or shutil.which("clang++")):
        found.append(Problem("engine.compile", True, "needs a C++ compiler on the CPU, and there is no g++ here",
                             "engine.compile=false"))
    return found


def _numbers(run: RunConfig) -> Iterator[Problem]:
    defaults = flat(dump_run(RunConfig()))
    for key, value in flat(dump_run(run)).items():
        if isinstance(value, float) and not math.isfinite(value):
            default = defaults.get(key)
            yield Problem(key, value, "must be a finite number", f"{key}={1.0 if default is None else default}")


def _run(run: RunConfig, devices: int | None) -> Iterator[Problem]:
    if not _NAME.fullmatch(run.name):
        clean = re.sub(r"[^A-Za-z0-9._-]+", "-", run.name).lstrip("._-") or "run"
        yield Problem("name", run.name, "names a directory: letters, digits, '.', '_' and '-', a letter or digit first",
                      f"name={clean}")
    if run.device == "cuda" and devices is not None and run.ranks > devices:
        remedy = f"ranks={devices}" if devices else "device=cpu"
        yield Problem("ranks", run.ranks, f"each rank needs a GPU of its own and {devices} are visible", remedy)
    if run.time_limit is not None and run.time_limit <= 0:
        yield Problem("time_limit", f"{run.time_limit:g}s", "is the time after which the run stops and saves", "time_limit=8h")
    if run.site.grace < 0:
        yield Problem("site.grace", run.site.grace, "is a time and cannot be negative", "site.grace=60s")


# ---- model -------------------------------------------------------------------------------------------------
def _model(run: RunConfig) -> Iterator[Problem]:
    model = run.model
    if isinstance(model, CustomModelConfig):
        yield from _custom_model(run, model)
        return
    if not model.head_dim and model.d_model % model.n_heads:
        yield Problem("model.n_heads", model.n_heads, f"must divide model.d_model={model.d_model}, or model.head_dim be given",
                      f"model.n_heads={_nearest_divisor(model.d_model, model.n_heads)}")
    elif model.head_size % 2 and any(model.rope_pattern):
        yield Problem("model.head_dim", model.head_size, "must be even, since RoPE rotates pairs",
                      f"model.head_dim={model.head_size + 1}")
    if model.n_heads % model.kv_heads:
        yield Problem("model.n_kv_heads", model.n_kv_heads, f"must divide model.n_heads={model.n_heads}",
                      f"model.n_kv_heads={_nearest_divisor(model.n_heads, model.kv_heads)}")
    for key, pattern in (("rope_pattern", model.rope_pattern), ("window_pattern", model.window_pattern)):
        if not pattern:
            yield Problem(f"model.{key}", "[]", "is repeated over the layers and needs at least one entry",
                          f"model.{key}=[true]")
    yield from _rope("model.rope", model.rope)
    if model.local_rope is not None:
        yield from _rope("model.local_rope", model.local_rope)
        if not model.window:
            yield Problem("model.local_rope", "given", "is for windowed layers, and model.window=0 leaves none",
                          "model.window=1024")
    if model.attn_scale is not None and model.attn_scale <= 0:
        yield Problem("model.attn_scale", model.attn_scale, "must be greater than 0", "model.attn_scale=null")
    if model.embed_scale <= 0:
        yield Problem("model.embed_scale", model.embed_scale, "must be greater than 0", "model.embed_scale=1")
    yield from _attention_impl(run, model)
    if model.kernels == "triton" and run.device == "cpu":
        yield Problem("model.kernels", "triton", "needs a GPU, and device=cpu", "model.kernels=auto")
    elif model.kernels == "triton" and run.optim.kind == "muon" and getattr(run.engine, "cpu_offload", False):
        yield Problem("model.kernels", "triton", "needs a GPU, and engine.cpu_offload=true has Muon work on the CPU",
                      "model.kernels=auto")


def _rope(key: str, rope: RopeConfig) -> Iterator[Problem]:
    if rope.scaling == "none":
        if rope.factor != 1:
            yield Problem(f"{key}.factor", rope.factor, f"does nothing with {key}.scaling=none", f"{key}.scaling=linear")
        return
    if rope.factor < 1:
        yield Problem(f"{key}.factor", rope.factor, "extends the context, so it must be at least 1", f"{key}.factor=1")
    if rope.scaling in ("llama3", "yarn") and not rope.original_seq_len:
        yield Problem(f"{key}.original_seq_len", 0, f"{rope.scaling} must know the length the unscaled model was trained for",
                      f"{key}.original_seq_len=8192")
    if rope.scaling == "llama3" and not 0 < rope.low_freq_factor < rope.high_freq_factor:
        yield Problem(f"{key}.low_freq_factor", rope.low_freq_factor,
                      f"must be between 0 and high_freq_factor={rope.high_freq_factor}",
                      f"{key}.low_freq_factor={min(1.0, abs(rope.high_freq_factor) / 4 or 1.0):g}")
    if rope.scaling == "yarn" and not 0 < rope.beta_slow < rope.beta_fast:
        yield Problem(f"{key}.beta_slow", rope.beta_slow, f"must be between 0 and beta_fast={rope.beta_fast}",
                      f"{key}.beta_slow={min(1.0, abs(rope.beta_fast) / 32 or 1.0):g}")


def _attention_impl(run: RunConfig, model: DecoderConfig) -> Iterator[Problem]:
    why = None
    if model.attention_impl == "sdpa" and model.attn_softcap:
        why = f"has no softcap, and model.attn_softcap={model.attn_softcap}"
    elif model.attention_impl == "triton" and run.device == "cpu":
        why = "needs a GPU, and device=cpu"
    elif model.attention_impl == "triton" and model.head_size > _FLASH_HEAD_DIM:
        why = f"takes heads up to {_FLASH_HEAD_DIM} wide, and these are {model.head_size}"
    elif model.attention_impl == "flex" and run.device == "cpu":
        why = "has no backward on the CPU"
    elif model.attention_impl == "flex" and model.head_size < _FLEX_HEAD_DIM:
        why = f"needs heads at least {_FLEX_HEAD_DIM} wide, and these are {model.head_size}"
    if why:
        yield Problem("model.attention_impl", model.attention_impl, why, "model.attention_impl=auto")


def _custom_model(run: RunConfig, model: CustomModelConfig) -> Iterator[Problem]:
    for name, example in (("factory", "build"), ("loss", "loss"), ("decoder", "decode")):
        path = getattr(model, name)
        if not DOTTED_PATH.fullmatch(path):
            yield Problem(f"model.{name}", path, "must name a Python object as package.module:name",
                          f"model.{name}={_as_dotted_path(path) or f'my_package.model:{example}'}")
    if not all(part.isidentifier() for part in model.blocks.split(".")):
        yield Problem("model.blocks", model.blocks, "must name an attribute of the module, such as blocks or encoder.layers",
                      "model.blocks=blocks")
    if run.batch.seq_len != 1:
        yield Problem("batch.seq_len", run.batch.seq_len, "is 1 for a custom model, where a row is a record", "batch.seq_len=1")
    if run.objective.z_loss:
        yield Problem("objective.z_loss", run.objective.z_loss, "belongs to the decoder's loss; a custom model has its own",
                      "objective.z_loss=0")


def _as_dotted_path(path: str) -> str | None:
    """`a.b.c` -> `a.b:c`, the usual slip."""
    module, _, name = path.strip().replace(":", ".").rpartition(".")
    fixed = f"{module}:{name}"
    return fixed if DOTTED_PATH.fullmatch(fixed) else None


# ---- batch, engine -----------------------------------------------------------------------------------------
def _batch(run: RunConfig) -> Iterator[Problem]:
    seq_len = run.batch.seq_len
    if run.batch.global_tokens % seq_len and not isinstance(run.model, CustomModelConfig):
        rows = max(1, round(run.batch.global_tokens / seq_len))
        yield Problem("batch.global_tokens", run.batch.global_tokens, f"must be a multiple of batch.seq_len={seq_len} "
                      "(rows x seq_len)", f"batch.global_tokens={rows * seq_len}")


def _engine(run: RunConfig, world_size: int | None) -> Iterator[Problem]:
    engine, zero = run.engine, isinstance(run.engine, ZeroConfig)
    if world_size is not None:
        if isinstance(engine, SingleConfig) and world_size > 1:
            yield Problem("engine", "single", f"is one process, and there are {world_size} ranks", "engine=fsdp2")
        if isinstance(engine, HSDPConfig) and world_size % engine.shard_size:
            yield Problem("engine.shard_size", engine.shard_size, f"must divide the number of ranks, {world_size}",
                          f"engine.shard_size={_nearest_divisor(world_size, engine.shard_size)}")
    if zero and isinstance(run.optim, MuonConfig):
        yield Problem("optim", "muon", "does not work under ZeRO: DeepSpeed hands the optimizer flat pieces, not matrices, "
                      "and its norm and clipping would see the orthogonalised update", "engine=fsdp2")
    if zero and run.precision == "bf16_pure" and engine.offload_optimizer:
        yield Problem("precision", "bf16_pure", "does not work with engine.offload_optimizer: "
                      "DeepSpeed then wants its own CPU Adam", "engine.offload_optimizer=false")
    if zero and engine.offload_params and engine.stage != 3:
        yield Problem("engine.offload_params", True, f"needs stage 3; stage {engine.stage} keeps whole parameters on each rank",
                      "engine.stage=3")
    offloads = isinstance(engine, FSDP2Config | HSDPConfig) and engine.cpu_offload
    if offloads and isinstance(run.optim, MuonConfig):
        yield Problem("engine.cpu_offload", True, "would run Muon's Newton-Schulz iterations on the host",
                      "engine.cpu_offload=false")


# ---- optimisation ------------------------------------------------------------------------------------------
def _schedule(run: RunConfig) -> Iterator[Problem]:
    schedule, steps = run.lr_schedule, run.steps
    if schedule.warmup_steps > steps:
        yield Problem("lr_schedule.warmup_steps", schedule.warmup_steps, f"is more than the run has steps, {steps}",
                      f"lr_schedule.warmup_steps={steps // 10}")
    if schedule.kind != "wsd":
        if schedule.decay_steps:
            yield Problem("lr_schedule.decay_steps", schedule.decay_steps, f"does nothing in a {schedule.kind} schedule",
                          "lr_schedule.kind=wsd")
    elif not schedule.decay_steps:
        yield Problem("lr_schedule.decay_steps", 0, "wsd must know how many steps at the end decay",
                      f"lr_schedule.decay_steps={max(1, min(steps // 5, steps - schedule.warmup_steps))}")
    elif schedule.warmup_steps <= steps < schedule.warmup_steps + schedule.decay_steps:
        room, wanted = steps - schedule.warmup_steps, schedule.warmup_steps + schedule.decay_steps
        remedy = f"lr_schedule.decay_steps={room}" if room else f"steps={wanted}"
        yield Problem("lr_schedule.decay_steps", schedule.decay_steps,
                      f"with warmup_steps={schedule.warmup_steps} is more than the run has steps, {steps}", remedy)


def _objective(run: RunConfig) -> Iterator[Problem]:
    objective = run.objective
    if objective.kind == "dpo":
        if isinstance(run.model, CustomModelConfig):
            yield Problem("objective.kind", "dpo", "compares answers of a language model, and model.kind=custom has a loss of "
                          "its own", "objective.kind=next_token")
        if not run.data.mask_documents:
            yield Problem("data.mask_documents", False, "lets the two answers of a pair see each other",
                          "data.mask_documents=true")
        if objective.z_loss:
            yield Problem("objective.z_loss", objective.z_loss, "is of next_token only", "objective.z_loss=0")
    if objective.on_spike != "flag" and not objective.spike_sigma:
        yield Problem("objective.on_spike", objective.on_spike, "nothing is a spike while objective.spike_sigma=0",
                      "objective.spike_sigma=6")
    if objective.spike_sigma and objective.spike_window < 8:
        yield Problem("objective.spike_window", objective.spike_window, "is too few steps for a standard deviation; at least 8",
                      "objective.spike_window=128")


# ---- life of a run -----------------------------------------------------------------------------------------
def _life(run: RunConfig, world_size: int | None) -> Iterator[Problem]:
    every, keep = run.checkpoint.every_steps, run.checkpoint.keep_every
    if keep and not every:
        yield Problem("checkpoint.keep_every", keep, "keeps nothing while checkpoint.every_steps=0 writes none on the way",
                      f"checkpoint.every_steps={keep}")
    elif keep and keep % every:
        yield Problem("checkpoint.keep_every", keep, f"must be a multiple of checkpoint.every_steps={every}, "
                      "or steps fall between", f"checkpoint.keep_every={max(1, round(keep / every)) * every}")
    steps = run.profile.steps
    if steps and not (len(steps) == 2 and 1 <= steps[0] <= steps[1] <= run.steps):
        last = min(run.steps, 12)
        yield Problem("profile.steps", steps, f"must be the first and last step to record, within 1 and {run.steps}",
                      f"profile.steps=[{min(10, last)},{last}]")
    ranks = run.profile.ranks
    if any(rank < 0 or (world_size is not None and rank >= world_size) for rank in ranks):
        upper = f"0 to {world_size - 1}" if world_size else "0 and up"
        yield Problem("profile.ranks", ranks, f"must be ranks of this run, {upper}", "profile.ranks=[0]")


# ---- data --------------------------------------------------------------------------------------------------
def _data(run: RunConfig) -> Iterator[Problem]:
    data = run.data
    if not data.sources:
        yield Problem("data.sources", None, "is empty, and a run needs a data set (`officina data build DIR` makes one)",
                      "data.sources.main.path=demo/data")
    for name in data.sources:
        if not _NAME.fullmatch(name):
            yield Problem(f"data.sources.{name}", None, "a source's name has letters, digits, '.', '_' and '-'",
                          "data.sources.main.path=DIR")
    if data.split == data.validation_split:
        other = "validation" if data.split != "validation" else "test"
        yield Problem("data.validation_split", data.validation_split, "is the split that is trained on; "
                      "held-out loss on it would mean nothing", f"data.validation_split={other}")
    if data.packing == "best_fit" and not data.mask_documents:
        yield Problem("data.mask_documents", False, "lets documents that best_fit puts into one row see each other",
                      "data.mask_documents=true")
    if data.packing == "cut" and data.overlong != "auto":
        yield Problem("data.overlong", data.overlong, "does nothing with data.packing=cut, where nothing is longer than a row",
                      "data.packing=best_fit")
    for pair in data.skip:
        if len(pair) != 2 or not 0 <= pair[0] < pair[1]:
            yield Problem("data.skip", data.skip, f"{pair} is no range [a,b) of sample indices with 0 <= a < b", "data.skip=[]")
            break
    steps = [stage.from_step for stage in data.stages]
    if steps != sorted(set(steps)) or any(step >= run.steps for step in steps):
        yield Problem("data.stages", steps, f"must begin at steps that rise and are below the run's {run.steps}",
                      "data.stages=[]" if run.steps < 2 else f"from_step: {run.steps * 9 // 10}")
    if not all(stage.weights for stage in data.stages):
        yield Problem("data.stages", "weights: {}", "a stage without a source reads nothing", "weights: {NAME: 1}")
    named = {name for stage in [*data.timeline, *data.stages] for name in stage.weights}
    if steps[:1] == [0]:
        for name in sorted(set(data.sources) - named):
            yield Problem(f"data.sources.{name}.path", data.sources[name].path, "is in no stage, so it would never be read",
                          f"~data.sources.{name}")
    for name in sorted(named - set(data.sources)):
        yield Problem(f"data.sources.{name}.path", None, "is missing: a stage says that samples come from this data set",
                      f"data.sources.{name}.path=DIR, the folder of that data set")


def _use(run: RunConfig) -> Iterator[Problem]:
    """What is declared must be readable; whether it suffices is decided by `officina.trainer.data.gate`."""
    country = run.use.country
    if country and (country in AREAS or known_country(country) != country):
        yield Problem("use.country", country, "is no ISO 3166-1 alpha-2 code of a country", "use.country=FI")
    purpose, word = run.use.purpose, purpose_word(run.use.purpose)
    if purpose != word:
        yield Problem("use.purpose", purpose, "must be one lower-case word, with hyphens", f"use.purpose={word}")


def _data_sets(run: RunConfig, position: int) -> Iterator[Problem]:
    """What the manifests say of what is still to be read; the shards themselves are verified when they are read."""
    kind = "records" if isinstance(run.model, CustomModelConfig) else "tokens"
    tokenizers: dict[str, str] = {}
    in_use = sources_in_use(run.data, position)
    for name, source in run.data.sources.items():
        if name not in in_use:
            continue
        key = f"data.sources.{name}.path"
        if not os.path.isfile(Path(source.path) / MANIFEST):  # also of a path that is too long for any
            yield Problem(key, source.path, f"is no data set: there is no {MANIFEST} in it, seen from "
                          "the folder of this command", _how_to_make(run, key, source.path))
            continue
        try:
            manifest = open_dataset(source.path).manifest
        except DataError as error:
            yield Problem(key, source.path, str(error).rstrip("."), f"officina data verify {source.path}")
            continue
        if manifest.sealed and not source.key:
            yield Problem(f"data.sources.{name}.key", "", f"{source.path} is sealed with the key {manifest.sealed}",
                          f"data.sources.{name}.key=FILE, or data.sources.{name}.key='command:PROGRAM ARGS'")
        if run.data.split not in manifest.splits:
            there = sorted(manifest.splits) or ["train"]
            yield Problem("data.split", run.data.split, f"{source.path} has no such split, only {', '.join(there)}",
                          f"data.split={there[0]}")
        if kind == "tokens" and manifest.kind != "tokens":
            yield Problem(key, source.path, "holds records, and a decoder reads tokens", "model=custom with your own decoder")
        wanted = "pairs" if run.objective.kind == "dpo" else "answers"
        if kind == "tokens" and (manifest.samples == "pairs") != (wanted == "pairs"):
            yield Problem("objective.kind", run.objective.kind, f"does not train on {source.path}, which holds "
                          f"{'preference pairs' if manifest.samples == 'pairs' else 'no preference pairs'}",
                          f"objective.kind={'dpo' if manifest.samples == 'pairs' else 'next_token'}")
        if manifest.tokenizer is None or kind == "records":
            continue
        size = manifest.tokenizer.vocab_size
        if size > run.model.vocab_size:
            yield Problem("model.vocab_size", run.model.vocab_size, f"{source.path} has a tokenizer of {size} tokens",
                          f"model.vocab_size={-(-size // 128) * 128}")
        tokenizers.setdefault(manifest.tokenizer.sha256, name)
    if len(tokenizers) > 1:
        one, other = list(tokenizers.values())[:2]
        paths = [run.data.sources[name].path for name in (one, other)]
        yield Problem(f"data.sources.{other}.path", paths[1], f"and data.sources.{one}.path={paths[0]}: each was tokenised "
                      "with another tokenizer than the other, and a token means one thing in a run",
                      f"officina data build NEW --tokenizer {paths[0]}/tokenizer.json for {other}, or the other way round")


def _how_to_make(run: RunConfig, key: str, path: str) -> str:
    if (whole := os.path.expanduser(path)) != path:
        return f"{key}={whole}, since a shell leaves ~ behind = as it is"
    if isinstance(run.model, CustomModelConfig):
        return f'write_records("{path}", ...), see docs/bring_your_own_model.md'
    if run.init_from:
        return f"officina data build {path} --tokenizer {run.init_from}"
    return f"officina data build {path} --vocab-size {run.model.vocab_size}"


def _nearest_divisor(number: int, wanted: int) -> int:
    """The divisor of `number` that is closest to `wanted`."""
    divisors = [d for i in range(1, math.isqrt(number) + 1) if number % i == 0 for d in (i, number // i)]
    return min(divisors, key=lambda d: (abs(d - wanted), d))
