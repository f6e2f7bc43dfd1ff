"""A model that is not the decoder: a convolution, frozen and tied parameters, persistent and other buffers, float inputs."""

import io
import subprocess
from contextlib import redirect_stdout
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from officina.trainer.batch import Batch
from officina.trainer.config import AdamWConfig, BatchConfig, CustomModelConfig, RunConfig
from officina.trainer.errors import OfficinaError
from officina.trainer.model.build import build_model
from officina.trainer.parallel.engine import Parts, build_engine
from officina.trainer.state import PARAM
from tests.trainer.parallel.cases import ENGINES, Values, join

HERE = "tests.trainer.parallel.custom"
ROWS, STEPS = 8, 6


class Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.nn.functional.gelu(self.up(self.norm(x))))


class Net(nn.Module):
    """kind: `spare` has a linear map that no forward uses, `repeated` the same layer twice, `across` a weight of two layers."""

    def __init__(self, width: int, kind: str = "") -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.place = nn.Parameter(0.1 * torch.randn(1, 4, width), requires_grad=False)
        self.fixed = nn.Dropout(0.5).eval()  # a part that its user keeps in evaluation mode
        layers = [Layer(width), Layer(width)]
        if kind == "across":
            layers[1].up.weight = layers[0].up.weight
        self.layers = nn.ModuleList([layers[0]] * 2 if kind == "repeated" else layers)
        if kind == "spare":
            self.spare = nn.Linear(width, 2)
        self.head = nn.Linear(width, 5)
        self.again = nn.Linear(width, 5, bias=False)
        self.again.weight = self.head.weight
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("replaced", torch.zeros((), dtype=torch.int64))
        self.register_buffer("scale", torch.tensor([0.5, 2.0]))
        self.register_buffer("ramp", torch.linspace(0, 1, width), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen += 1
            self.replaced = self.replaced + 1  # another tensor each time
        x = self.fixed(self.patches(x)).flatten(2).transpose(1, 2) + self.place + self.ramp * self.scale[0]
        for layer in self.layers:
            x = layer(x)
        x = x.mean(1)
        return self.head(x) + self.again(x * self.scale[1])


def factory(width: int, kind: str = "") -> nn.Module:
    return Net(width, kind)


def losses(module: nn.Module, fields: dict[str, Tensor]) -> Tensor:
    return torch.nn.functional.cross_entropy(module(fields["x"]), fields["y"], reduction="none") + fields["more"]


def decode(record: bytes) -> dict[str, Tensor]:
    return {"x": torch.frombuffer(bytearray(record), dtype=torch.float32).view(3, 8, 8), "y": torch.tensor(0)}


def run_of(engine: str, kind: str = "") -> RunConfig:
    model = CustomModelConfig(factory=f"{HERE}:factory", loss=f"{HERE}:losses", decoder=f"{HERE}:decode", blocks="layers",
                              args={"width": 16, "kind": kind})
    return RunConfig(model=model, engine=ENGINES[engine], optim=AdamWConfig(lr=1e-3, eps=1e-6),
                     batch=BatchConfig(global_tokens=ROWS, seq_len=1))


def batch_of(step: int) -> dict[str, Tensor]:
    random = np.random.default_rng(step)
    x = random.standard_normal((ROWS, 3, 8, 8), dtype=np.float32)
    return {"x": torch.from_numpy(x), "y": torch.from_numpy(random.integers(0, 5, ROWS)),
            "valid": torch.from_numpy(random.random(ROWS) < 0.8), "more": torch.zeros(ROWS)}


def train(ranks, engine: str, precision: str = "fp32", first: int = 0, steps: int = STEPS, begin=None, kind: str = "",
          infinite: int = -1, evaluate: bool = False) -> dict:
    """Train the model; this rank's part of a Trace. infinite: step whose loss is, on the last rank, with a finite gradient.
    evaluate: after each step."""
    run = run_of(engine, kind)
    built = build_model(run)
    engine = build_engine(Parts(run, ranks, built.module, built.loss_fn, precision))
    try:
        return _trace(engine, ranks, built, first, steps, begin, infinite, evaluate)
    finally:
        engine.close()


def _trace(engine, ranks, built, first: int, steps: int, begin, infinite: int, evaluate: bool) -> dict:
    source, done = (built.source, None) if begin is None else (Values(begin, keep=("seen", "replaced", "scale")), first)
    engine.import_state(source, optimizer_steps=done)
    losses_, norms, applied = [], [], []
    for step in range(first, first + steps):
        fields = batch_of(step)
        if step == infinite:
            fields["more"][-1], fields["valid"][-1] = torch.inf, True
        mine = slice(ranks.rank * ROWS // ranks.world_size, (ranks.rank + 1) * ROWS // ranks.world_size)
        part = {name: values[mine] for name, values in fields.items()}
        total = int(fields["valid"].sum())
        loss = engine.forward_backward(Batch(part, int(part["valid"].sum())), step_tokens=total, last=True)
        losses_.append(ranks.sum([loss.item()])[0] / total)
        outcome = engine.step(1.0)
        norms.append(outcome.grad_norm)
        applied.append(outcome.applied)
        if evaluate:
            engine.evaluate(Batch(part, 0))
    pieces = [(p.name, p.slot, p.shape, p.start, p.stop, p.values.detach().cpu().double().numpy())
              for p in engine.export_state()]
    # What the forward uses must be the same for everyone, also where it is a copy of what was exported.
    last = batch_of(99)
    evals = [engine.evaluate(Batch(last, int(last["valid"].sum()))).item()]
    return {"losses": losses_, "norms": norms, "applied": applied, "pieces": pieces, "evals": evals,
            "optimizer_steps": engine.optimizer_steps}


def printed(ranks, engine: str, precision: str) -> str:
    """What a step writes to stdout."""
    with redirect_stdout(io.StringIO()) as found:
        train(ranks, engine, precision, steps=1)
    return found.getvalue()


def started(ranks, engine: str, program: str) -> int:
    """How often the program is started while training."""
    with mock.patch.object(subprocess, "Popen", side_effect=FileNotFoundError) as found:
        train(ranks, engine, steps=1)
    return sum(program in str(call.args[0]) for call in found.call_args_list)


def refuses(ranks, engine: str, kind: str, message: str) -> None:
    """Training this kind of model ends with this OfficinaError."""
    with pytest.raises(OfficinaError, match=message):
        train(ranks, engine, kind=kind)


def reference(kind: str = ""):
    """The same in plain torch, one process."""
    run = run_of("single", kind)
    built = build_model(run)
    with torch.random.fork_rng():
        torch.manual_seed(run.seed)
        module = Net(16, kind)
    named = dict(module.named_parameters())
    for name, parameter in named.items():
        assert torch.equal(parameter.detach().flatten(), built.source.read(name, PARAM, 0, parameter.numel()))
    matrices = [p for n, p in named.items() if p.ndim >= 2 and n.endswith("weight")]
    rest = [p for n, p in named.items() if p.ndim < 2]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}],
                                  lr=1e-3, betas=(0.9, 0.95), eps=1e-6, foreach=False, fused=False)
    losses_, norms = [], []
    for step in range(STEPS):
        fields = batch_of(step)
        loss = built.loss_fn(module, fields) / int(fields["valid"].sum())
        optimizer.zero_grad()
        loss.backward()
        losses_.append(loss.item())
        norms.append(torch.nn.utils.clip_grad_norm_(named.values(), 1.0).item())
        optimizer.step()
    pieces = [(n, PARAM, tuple(p.shape), 0, p.numel(), p.detach().double().numpy().reshape(-1)) for n, p in named.items()]
    module.eval()
    evals = [built.loss_fn(module, batch_of(99)).item()]
    return join([{"losses": losses_, "norms": norms, "applied": [True] * STEPS, "pieces": pieces, "evals": evals,
                  "optimizer_steps": STEPS}])
