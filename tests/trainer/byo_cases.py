"""What the tests of users' own models run in ranks, and the small models they need."""

import sys
from pathlib import Path

import torch
from torch import nn

from officina.trainer import loop
from officina.trainer.config import (
    AdamWConfig,
    BatchConfig,
    CustomModelConfig,
    DataConfig,
    DDPConfig,
    FSDP2Config,
    HSDPConfig,
    RunConfig,
    SingleConfig,
    SourceConfig,
    ZeroConfig,
)
from officina.trainer.data.loader import Loader
from officina.trainer.model.build import build_model
from officina.trainer.parallel.engine import Parts, build_engine

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
ENGINES = {
    "single": SingleConfig(), "ddp": DDPConfig(), "fsdp2": FSDP2Config(recompute="full"), "hsdp": HSDPConfig(),
    "zero1": ZeroConfig(stage=1), "zero2": ZeroConfig(stage=2), "zero3": ZeroConfig(stage=3, persistence_threshold=0)}
ROWS = 12


def run_of(example: str, folder: str, engine: str = "single") -> RunConfig:
    """A few steps of one of the examples on a small data set."""
    return RunConfig(
        seed=3, precision="fp32", engine=ENGINES[engine],
        model=CustomModelConfig(factory=f"{example}:build", loss=f"{example}:loss", decoder=f"{example}:decode",
                                args={"d_model": 32}),
        optim=AdamWConfig(lr=1e-3, eps=1e-6), batch=BatchConfig(global_tokens=ROWS, seq_len=1, micro_rows=2),
        data=DataConfig(sources={"mine": SourceConfig(path=folder)}))


def train(ranks, example: str, folder: str, engine: str, steps: int):
    """Losses and gradient norms of `steps` steps, and what this rank holds at the end: (name, slot, start, values)."""
    if str(EXAMPLES) not in sys.path:
        sys.path.insert(0, str(EXAMPLES))
    run = run_of(example, folder, engine)
    built = build_model(run)
    made = build_engine(Parts(run, ranks, built.module, built.loss_fn, "fp32"))
    made.import_state(built.source, optimizer_steps=None)
    losses, norms = [], []
    with Loader(run, rank=ranks.rank, world_size=ranks.world_size, position=0) as loader:
        for _ in range(steps):
            micros = loader.next_step().micros
            loss = sum(float(made.forward_backward(m, step_tokens=ROWS, last=m is micros[-1])) for m in micros)
            losses.append(ranks.sum([loss])[0] / ROWS)
            norms.append(made.step(1.0).grad_norm)
    held = [(p.name, p.slot, p.start, p.values.detach().cpu().clone().numpy()) for p in made.export_state()]
    made.close()
    return losses, norms, held


def live(ranks, run_dir: str) -> int:
    """The whole loop on one of the examples."""
    if str(EXAMPLES) not in sys.path:
        sys.path.insert(0, str(EXAMPLES))
    return loop.train(Path(run_dir), ranks)


class Tied(nn.Module):
    """One weight and one saved buffer that two modules share, a buffer that is not saved."""

    def __init__(self, width: int = 4):
        super().__init__()
        self.embed = nn.Embedding(8, width)
        self.head = nn.Linear(width, 8, bias=False)
        self.head.weight = self.embed.weight
        self.blocks = nn.ModuleList([nn.Linear(width, width)])
        self.register_buffer("seen", torch.arange(3))
        self.head.register_buffer("also_seen", self.seen)
        self.register_buffer("scale", torch.tensor([2.5]), persistent=False)

    def forward(self, tokens):
        return self.head(self.blocks[0](self.embed(tokens)) * self.scale)


def tied(width: int = 4) -> nn.Module:
    return Tied(width)


def no_module():
    return {"not": "a module"}


def complex_one():
    module = nn.Linear(2, 2)
    module.turn = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    return module


def on_meta():
    with torch.device("meta"):
        return nn.Linear(2, 2)


def scalar_loss(module, fields):
    return module(fields["tokens"]).sum()


def whole_loss(module, fields):
    return fields["tokens"]


def list_loss(module, fields):
    return [1.0]


NOT_CALLABLE = 3
