"""Generation against the plain way (the whole prefix through the model for every token), and the command."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from officina.trainer.checkpoint.layout import TrainState
from officina.trainer.checkpoint.verify import Alone
from officina.trainer.checkpoint.write import Saver
from officina.trainer.config import CheckpointConfig, CustomModelConfig, DecoderConfig, RunConfig
from officina.trainer.errors import OfficinaError
from officina.trainer.generate import generate, main, stream_text
from officina.trainer.model.build import build_model, build_transformer
from officina.trainer.run_dir import save_config
from officina.trainer.state import PARAM, Piece

CONFIGS = {
    "plain": DecoderConfig(vocab_size=61, n_layers=3, d_model=24, n_heads=4, n_kv_heads=2, d_ff=40),
    "windows, NoPE, softcaps": DecoderConfig(
        vocab_size=61, n_layers=4, d_model=24, n_heads=4, n_kv_heads=1, d_ff=40, window=5, window_pattern=[True, False],
        rope_pattern=[True, True, False], attn_softcap=20, logit_softcap=10, tie_embeddings=True),
}


@pytest.fixture(params=CONFIGS)
def module(request):
    module = build_transformer(CONFIGS[request.param]).to_empty(device="cpu")
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=random) * 0.4 + ("norm" in name))
    return module


def plain_way(module, tokens, n):
    tokens = list(tokens)
    for _ in range(n):
        with torch.no_grad():
            tokens.append(int(module(torch.tensor([tokens]))[0, -1].argmax()))
    return tokens[-n:]


def test_greedy_tokens_are_those_of_the_full_forward(module):
    prompt = [3, 14, 15, 9, 2, 6, 5]
    assert list(generate(module, prompt, max_new_tokens=40, temperature=0)) == plain_way(module, prompt, 40)


def test_the_seed_decides_what_is_drawn(module):
    draws = [list(generate(module, [1, 2, 3], max_new_tokens=30, temperature=2.0, seed=seed)) for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]
    assert all(0 <= token < 61 for token in draws[0])


def test_draws_follow_the_models_distribution():
    module = build_transformer(DecoderConfig(vocab_size=5, n_layers=1, d_model=8, n_heads=1, d_ff=8)).to_empty(device="cpu")
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(len(name)))
    with torch.no_grad():
        probability = (module(torch.tensor([[1]]))[0, -1] / 3).softmax(-1)
    counts = torch.zeros(5)
    for seed in range(500):
        counts[next(generate(module, [1], max_new_tokens=1, temperature=3.0, seed=seed))] += 1
    error = (counts / 500 - probability).abs() / (probability * (1 - probability) / 500).sqrt()
    assert error.max() < 4.5


def test_top_p_draws_only_from_the_likeliest(module):
    with torch.no_grad():
        probability, order = module(torch.tensor([[1, 2]]))[0, -1].double().softmax(-1).sort(descending=True)
    allowed = set(order[:int((probability.cumsum(0) < 0.5).sum()) + 1].tolist())
    drawn = {next(generate(module, [1, 2], max_new_tokens=1, top_p=0.5, seed=seed)) for seed in range(300)}
    assert drawn <= allowed and len(allowed) < 61
    greedy = next(generate(module, [1, 2], max_new_tokens=1, temperature=0))
    assert next(generate(module, [1, 2], max_new_tokens=1, top_p=1e-9, seed=5)) == greedy


def test_the_smallest_temperature_takes_the_likeliest(module):
    greedy, coldest = (list(generate(module, [1, 2], max_new_tokens=9, temperature=t)) for t in (0, 1e-320))
    assert coldest == greedy


def test_it_stops_before_the_stop_token(module):
    tokens = list(generate(module, [5], max_new_tokens=60, temperature=3.0, seed=4))
    stop = tokens[20]
    got = list(generate(module, [5], max_new_tokens=60, temperature=3.0, seed=4, stop_id=stop))
    assert got == tokens[:tokens.index(stop)]


@pytest.mark.parametrize("arguments,message", [
    (dict(tokens=[]), "prompt has no tokens"),
    (dict(tokens=[61]), "token 61, but model.vocab_size=61"),
    (dict(max_new_tokens=0), "--max-new-tokens 0 must be at least 1"),
    (dict(temperature=-1.0), "--temperature -1.0 must be 0"),
    (dict(top_p=0.0), "--top-p 0.0 must be above 0"),
    (dict(top_p=1.5), "--top-p 1.5 must be above 0 and at most 1"),
    (dict(seed=2**63), f"--seed {2**63} must be a number of 64 bits"),
])
def test_values_without_sense_are_refused(module, arguments, message):
    with pytest.raises(OfficinaError, match=message):
        generate(module, **{"tokens": [1], "max_new_tokens": 3, **arguments})


def test_characters_of_several_tokens_come_whole():
    def decode(tokens):
        return bytes(tokens).decode(errors="replace")

    new = list("né €!".encode())
    parts = list(stream_text(decode, list(b"ca"), iter(new)))
    assert parts == ["n", "é", " ", "€", "!"]


def write_run(folder: Path, steps=(1, 2)) -> RunConfig:
    """A run directory as the loop leaves it: config, tokenizer, checkpoints."""
    text = "\n".join(f"def test_{i}(value):\n    return value * {i}" for i in range(200))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.train_from_iterator([text], trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    run = RunConfig(model=DecoderConfig(vocab_size=400, n_layers=2, d_model=32, n_heads=2, d_ff=64, init_std=0.2), device="cpu")
    folder.mkdir(exist_ok=True)
    save_config(run, folder / "config.yaml")
    tokenizer.save(str(folder / "tokenizer.json"))
    built = build_model(run)
    saver = Saver(folder, Alone(), CheckpointConfig(), "run")
    for step in steps:
        saver.save(step, (Piece(n, PARAM, tuple(p.shape), 0, p.numel(), built.source.read(n, PARAM, 0, p.numel()) * step)
                          for n, p in built.module.named_parameters()), TrainState(step=step))
    return run


def test_the_command_writes_prompt_and_continuation(tmp_path, capsys):
    write_run(tmp_path)
    words = [str(tmp_path), "def test(", "--max-new-tokens", "20", "--temperature", "0"]
    assert main(words) == 0
    newest = capsys.readouterr().out
    assert newest.startswith("def test(") and len(newest) > len("def test(\n") + 5
    main([*words, "--step", "1"])
    first = capsys.readouterr().out
    main([*words, "--step", "2"])
    assert capsys.readouterr().out == newest != first
    main([f"{tmp_path}@1", *words[1:]])
    assert capsys.readouterr().out == first
    with pytest.raises(OfficinaError, match="@1 --step 2 names two steps"):
        main([f"{tmp_path}@1", *words[1:], "--step", "2"])


def test_the_command_as_a_person_calls_it(tmp_path):
    write_run(tmp_path)
    call = [sys.executable, "-m", "officina.launch.cli", "generate", str(tmp_path)]
    done = subprocess.run([*call, "import ", "--max-new-tokens", "5"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("import "), done.stderr
    refused = subprocess.run([*call, "import ", "--top-p", "2"], capture_output=True, text=True)
    assert refused.returncode == 2 and "--top-p 2.0" in refused.stderr and "Traceback" not in refused.stderr


def test_a_damaged_newest_checkpoint_is_passed_over_and_named(tmp_path, capsys):
    write_run(tmp_path)
    data = next(p for p in sorted((tmp_path / "checkpoints/step-00000002").iterdir()) if p.stat().st_size > 5000)
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    main([str(tmp_path), "def ", "--max-new-tokens", "3"])
    assert "step-00000002" in capsys.readouterr().err


def test_refusals_of_the_command(tmp_path):
    write_run(tmp_path)
    with pytest.raises(OfficinaError, match="prompt is not UTF-8 at character 3"):
        main([str(tmp_path), "caf\udce9"])
    with pytest.raises(OfficinaError, match=r"step-00000007 does not exist. Step 2 is whole: \S+@2, step=2 or --step 2"):
        main([str(tmp_path), "x", "--step", "7"])
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(OfficinaError, match=r"tokenizer.json is no tokenizer that can be read \(.*cp DATASET/tokenizer.json"):
        main([str(tmp_path), "x"])
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(OfficinaError, match=r"tokenizer.json does not exist.*cp DATASET/tokenizer.json"):
        main([str(tmp_path), "x"])
    custom = CustomModelConfig(factory="a:b", loss="a:b", decoder="a:b")
    save_config(RunConfig(model=custom), tmp_path)
    with pytest.raises(OfficinaError, match="model.kind=custom"):  # and not that it has no tokenizer
        main([str(tmp_path), "x"])
