"""What is timed: officina's own loop, the same model in a plain PyTorch loop, and Hugging Face's Trainer.

All take the same run directory, hence the same shapes, batch, precision and optimizer settings, and the same rows: ours
reads them as in any run, the others find the first ones in memory and go round in them.
"""

import os
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from officina.benchmarks.turns import Turns
from officina.trainer import assemble
from officina.trainer.batch import Batch
from officina.trainer.config import DecoderConfig, RunConfig
from officina.trainer.data.loader import Loader, StepData
from officina.trainer.loop import train
from officina.trainer.model.build import build_model
from officina.trainer.parallel.engine import Engine, resolve_precision
from officina.trainer.rank_env import RankEnv
from officina.trainer.ranks import Ranks, start_ranks
from officina.trainer.run_dir import load_config
from officina.trainer.schedule import lr_factor
from officina.trainer.state import PARAM

BATCHES_IN_MEMORY = 8


# ---- officina ------------------------------------------------------------------------------------------------------
def officina(turns: Turns, env: RankEnv, *, run_dir: Path, in_memory: bool = False) -> None:
    """`loop.train` as it is, loader, metrics, ledger and all; the blocks' borders come in where a profiler would.

    in_memory: without its loader, the first steps' batches again and again; its ledger tells of data that was not read.
    Its facts: `engine_s`, the time spent within forward_backward and step. What the loop adds is the rest of the block.
    """
    run = load_config(run_dir)
    ranks = start_ranks(env, device=run.device, threads=run.threads)
    with (mock.patch.object(assemble, "Profiler", lambda *_, **__: _Borders(turns)),
          mock.patch.object(assemble, "build_engine", lambda parts: _Timed(build_engine(parts), turns)),
          mock.patch.object(assemble, "Loader", _InMemory if in_memory else Loader)):
        train(run_dir, ranks)


class _InMemory(Loader):
    """Reads the first steps and gives them in turn from then on; its thread waits for room and reads no more."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._kept: list[StepData] = []

    def next_step(self) -> StepData:
        if len(self._kept) < BATCHES_IN_MEMORY:
            self._kept.append(super().next_step())
            return self._kept[-1]
        step = self._kept.pop(0)
        self._kept.append(step)
        first = self._position
        self._position += step.stop_sample - step.first_sample
        return replace(step, first_sample=first, stop_sample=self._position, wait_s=0.0)


build_engine = assemble.build_engine


class _Borders:
    """In the profiler's place: the loop calls `step` at the beginning of every step."""

    def __init__(self, turns: Turns) -> None:
        self._turns = turns

    def step(self, step: int) -> None:
        self._turns.at_step()

    def __enter__(self) -> "_Borders":
        return self

    def __exit__(self, *exc: object) -> None:
        pass


class _Timed:
    """The engine, with the time spent in it."""

    def __init__(self, engine: Engine, turns: Turns) -> None:
        self._engine, self._turns = engine, turns

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def forward_backward(self, batch: Batch, **kwargs: Any) -> torch.Tensor:
        return self._spend(partial(self._engine.forward_backward, batch, **kwargs))

    def step(self, *args: Any, **kwargs: Any) -> Any:
        return self._spend(partial(self._engine.step, *args, **kwargs))

    def _spend(self, work: Any) -> Any:
        began = time.perf_counter()
        result = work()
        self._turns.facts["engine_s"] = self._turns.facts.get("engine_s", 0.0) + time.perf_counter() - began
        return result


# ---- plain PyTorch -------------------------------------------------------------------------------------------------
def plain(turns: Turns, env: RankEnv, *, run_dir: Path, how: str = "single") -> None:
    """The loop that one writes by hand: batches in memory, no loader, no metrics, no wait for the device in a step; the model
    in plain torch, with SDPA, the loss in the same chunks as ours.

    how: `single`, `ddp` (DistributedDataParallel) or `fsdp2` (fully_shard per block).
    Its facts: on the CPU `losses`, the sum of each step so far.
    """
    run = load_config(run_dir)
    run = replace(run, model=replace(run.model, kernels="reference", attention_impl="sdpa"))
    ranks = start_ranks(env, device=run.device, threads=run.threads)
    device, precision = ranks.device, resolve_precision(run.precision, ranks.device)
    steps, step_tokens = rows_in_memory(run, ranks)

    built = build_model(run)
    module = built.module.to_empty(device=device)
    if precision == "bf16_pure":
        module.to(torch.bfloat16)
    module.compute_dtype = None if precision == "fp32" else torch.bfloat16
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(built.source.read(name, PARAM, 0, parameter.numel()).view_as(parameter))
    for i, block in enumerate(module.blocks):
        if run.engine.recompute == "full":
            module.blocks[i] = block = checkpoint_wrapper(block, preserve_rng_state=False)
        if run.engine.compile:
            block.compile()
    called: nn.Module = module
    if how == "ddp":
        called = nn.parallel.DistributedDataParallel(module, gradient_as_bucket_view=True)
    elif how == "fsdp2":
        _fully_shard(module, device, precision)
    decayed = [p for n, p in module.named_parameters() if p.ndim >= 2 and not n.startswith("embed")]
    others = [p for n, p in module.named_parameters() if p.ndim < 2 or n.startswith("embed")]
    config = run.optim
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)

    step, losses = 0, []
    turns.facts["losses"] = losses
    while True:
        turns.at_step()
        turns.facts["losses"] = losses
        loss_sum = torch.zeros((), device=device)
        for group in optimizer.param_groups:
            group["lr"] = config.lr * lr_factor(run.lr_schedule, step, run.steps)
        micros = steps[step % len(steps)]
        for i, micro in enumerate(micros):
            if how == "ddp":
                called.require_backward_grad_sync = i == len(micros) - 1
            elif how == "fsdp2":
                module.set_requires_gradient_sync(i == len(micros) - 1)
            loss = called(micro["tokens"], labels_BT=micro["labels"])
            (loss * ((ranks.world_size if how == "ddp" else 1) / step_tokens)).backward()
            loss_sum += loss.detach()
        nn.utils.clip_grad_norm_(module.parameters(), config.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device.type == "cpu":  # on a GPU it would wait for the device
            losses.append(loss_sum.item())
        step += 1


def rows_in_memory(run: RunConfig, ranks: Ranks) -> tuple[list[list[dict[str, torch.Tensor]]], int]:
    """This rank's micro-batches of the first steps, on its device; and the loss-bearing tokens of a whole step."""
    with Loader(run, rank=ranks.rank, world_size=ranks.world_size, position=0) as loader:
        found = [loader.next_step() for _ in range(BATCHES_IN_MEMORY)]
    [step_tokens] = ranks.sum([found[0].loss_tokens])
    return [[micro.to(ranks.device).fields for micro in step.micros] for step in found], int(step_tokens)


def _fully_shard(module: nn.Module, device: torch.device, precision: str) -> None:
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    mixed = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    mesh = dist.init_device_mesh(device.type, (dist.get_world_size(),))
    for child in [*module.blocks, module]:
        fully_shard(child, mesh=mesh, mp_policy=mixed if precision == "bf16" else MixedPrecisionPolicy())
    for child in module.modules():
        if isinstance(child, FSDPModule):  # gloo has no averaging sum
            child.set_gradient_divide_factor(1.0)
            child.set_force_sum_reduction_for_comms(True)


# ---- Hugging Face Trainer ------------------------------------------------------------------------------------------
def hf_trainer(turns: Turns, env: RankEnv, *, run_dir: Path, scratch: Path, compile: bool = False) -> None:
    """transformers' Trainer with its own Llama of the same shapes, on the same rows held in memory; a run's adapter by PEFT.

    Nothing is logged, evaluated or saved. Raises ValueError if its model has another number of parameters than ours.
    """
    run, ranks = alone(run_dir, env)
    from transformers import LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

    precision = resolve_precision(run.precision, ranks.device)
    steps, _ = rows_in_memory(run, ranks)
    rows = torch.cat([micro["tokens"] for step in steps for micro in step]).cpu()

    model = LlamaForCausalLM(llama_config(run.model, run.batch.seq_len))
    if precision == "bf16_pure":
        model.to(torch.bfloat16)
    if run.adapter.kind != "none":
        from peft import LoraConfig, get_peft_model

        from officina.trainer.hf.config_file import FAMILIES
        from officina.trainer.hf.peft import peft_config
        from officina.trainer.model.targets import choose

        wanted = peft_config(run.model, run.adapter, choose(run.model, run.adapter), FAMILIES["llama"], "")
        options = {key: value for key, value in wanted.items() if key not in ("peft_type", "inference_mode")}
        model = get_peft_model(model, LoraConfig(**options))
    mine, theirs = ([sum(p.numel() for p in m.parameters() if p.requires_grad or not only) for only in (False, True)]
                    for m in (build_model(run).module, model))
    if mine != theirs:
        raise ValueError(f"transformers' Llama has (parameters, trained) {theirs}, ours has {mine}: not the same model")

    class Borders(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            turns.at_step()

    class Rows(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 1_000_000

        def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
            row = rows[i % len(rows)]
            return {"input_ids": row, "labels": row}

    settings = TrainingArguments(
        **trainer_settings(run, ranks, scratch), per_device_train_batch_size=run.batch.micro_rows,
        gradient_accumulation_steps=run.batch.micro_steps(1), torch_compile=compile, remove_unused_columns=False,
        logging_strategy="no")
    Trainer(model, settings, train_dataset=Rows(), callbacks=[Borders()]).train()


def alone(run_dir: Path, env: RankEnv) -> tuple[RunConfig, Ranks]:
    """The run and this process for a Trainer: as its users start it, but it shall not look for a hub."""
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")
    # `python -m` puts the folder it was called in first, where our kernels/ hides a package of transformers.
    sys.path[:] = [path for path in sys.path if path not in ("", os.getcwd())]
    run = load_config(run_dir)
    device = torch.device("cuda", 0) if run.device != "cpu" and torch.cuda.is_available() else torch.device("cpu")
    torch.set_num_threads(run.threads or len(os.sched_getaffinity(0)))
    return run, Ranks(env, device, torch.get_num_threads())


def trainer_settings(run: RunConfig, ranks: Ranks, scratch: Path) -> dict[str, Any]:
    """transformers' TrainingArguments of the run, without its batch: nothing is evaluated, saved or reported."""
    config = run.optim
    return {
        "output_dir": str(scratch), "max_steps": 100_000, "learning_rate": config.lr, "adam_beta1": config.beta1,
        "adam_beta2": config.beta2, "adam_epsilon": config.eps, "weight_decay": config.weight_decay,
        "max_grad_norm": config.clip_norm, "optim": "adamw_torch_fused", "lr_scheduler_type": "cosine", "warmup_steps": 100,
        "bf16": resolve_precision(run.precision, ranks.device) == "bf16", "use_cpu": ranks.device.type == "cpu",
        "gradient_checkpointing": run.engine.recompute == "full", "save_strategy": "no", "eval_strategy": "no",
        "report_to": "none", "disable_tqdm": True}


def llama_config(config: DecoderConfig, seq_len: int) -> Any:
    """transformers' configuration of the same shapes. Raises ValueError for a decoder that is no Llama."""
    from transformers import LlamaConfig

    switches = (config.mlp, config.qk_norm, config.norm_placement, config.window, config.qkv_bias, config.attn_softcap)
    if switches != ("swiglu", "none", "pre", 0, False, 0.0):
        raise ValueError(f"model: {switches} is no Llama; compare with one of plain Llama's shape")
    return LlamaConfig(
        vocab_size=config.vocab_size, hidden_size=config.d_model, intermediate_size=config.d_ff,
        num_hidden_layers=config.n_layers, num_attention_heads=config.n_heads, num_key_value_heads=config.kv_heads,
        head_dim=config.head_size, rms_norm_eps=config.norm_eps, tie_word_embeddings=config.tie_embeddings,
        max_position_embeddings=seq_len, rope_parameters={"rope_type": "default", "rope_theta": config.rope.theta},
        use_cache=False, attn_implementation="sdpa")
