"""`officina demo --finetune`: the demo's model, adapted with LoRA to a task, merged, and loaded in transformers."""

import importlib.util
import shutil
import subprocess
import sys
import time

from rich.console import Console

from officina.launch.demo import FOLDER, RUN, make_way, run_step
from officina.launch.demo import main as pretrain
from officina.launch.demo_samples import DOCSTRING, SIGNATURE, write_samples
from officina.trainer.errors import EXIT_DONE, LaunchError
from officina.trainer.run_dir import committed_steps

PROMPTS = (SIGNATURE.format("Return the number of lines in a file."),
           DOCSTRING.format("def is_empty(self):\n    return len(self.items) == 0"))
_IN_TRANSFORMERS = """\
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
folder, *prompts = sys.argv[1:]
model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
set_seed(0)
for prompt in prompts:
    tokens = tokenizer(prompt, return_tensors="pt").input_ids
    written = model.generate(tokens, max_new_tokens=40, do_sample=True, temperature=0.5)[0]
    print(tokenizer.decode(written, skip_special_tokens=True))
"""


def main() -> int:
    """Pre-train if need be, make samples, evaluate, fine-tune on 2 ranks, evaluate, merge and export, load and generate."""
    console, started = Console(highlight=False), time.monotonic()
    data, tuned, exported = FOLDER / "samples", FOLDER / "finetuned", FOLDER / "finetuned-hf"
    if not committed_steps(RUN):
        console.print(f"{RUN} is not there yet: the demo comes first.")
        pretrain()
    make_way(tuned)
    for folder in (data, exported):
        shutil.rmtree(folder, ignore_errors=True)

    console.rule("[bold]1. Samples from the standard library: docstring to signature, function to docstring", align="left")
    rows = FOLDER / "samples.jsonl"
    console.print(f"{write_samples(rows):,} samples in {rows}")
    run_step(console, "2. Tokenise them: only the answers are trained on", RUN, "data", "build", str(data), str(rows),
             "--samples", "--tokenizer", str(RUN), "--source-field", "source", "--licence", "PSF-2.0")
    run_step(console, "3. Before: loss on answers it has not seen", RUN, "eval", str(RUN), f"data.sources.samples.path={data}",
             "~data.sources.python", "data.overlong=leave_out", "eval.max_rows=64", "ranks=1")
    run_step(console, "4. Fine-tune with LoRA on 2 ranks under FSDP2", tuned, "train", "experiment=demo_finetune",
             "name=finetuned", "--runs-dir", str(FOLDER))
    run_step(console, "5. After", tuned, "eval", str(tuned), "ranks=1")
    run_step(console, "6. Merge the adapters and export", tuned, "convert", "export", str(tuned), "--to", str(exported))
    console.rule("[bold]7. Load it in transformers and let it write", align="left")
    if importlib.util.find_spec("transformers") is None:
        console.print("transformers is not installed here (pip install transformers): the model lies in " + str(exported))
    elif subprocess.run([sys.executable, "-c", _IN_TRANSFORMERS, str(exported), *PROMPTS], check=False).returncode:
        raise LaunchError(f"transformers could not load {exported}; what it said stands above")
    console.print(f"\nDone in {time.monotonic() - started:.0f} s. The model, to be used anywhere: {exported}")
    return EXIT_DONE
