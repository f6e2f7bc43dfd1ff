"""What a run starts from, `init_from`: a folder in Hugging Face's form, or a run's checkpoint. Torch-free."""

import re
from dataclasses import dataclass
from pathlib import Path

from officina.trainer.config import DecoderConfig
from officina.trainer.errors import OfficinaError
from officina.trainer.hf.config_file import CONFIG_FILE, load_raw, read_config
from officina.trainer.hf.family import Family
from officina.trainer.hf.files import ITEM_BYTES, Stored, find_tensors
from officina.trainer.run_dir import CONFIG, load_config, split_step

ADAPTER_FILE = "adapter_config.json"
"""What a folder with an adapter in PEFT's form has."""
BASE_DIR = "base"
"""Folder in a run directory with the small files of the model it started from, so that an export can be written as it was."""
SMALL_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model",
               "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json", "vocab.json",
               "merges.txt", "tekken.json", "LICENSE", "LICENSE.txt", "NOTICE")
"""What is kept of a model besides its weights."""
_DERIVED = re.compile(r"(model\.layers\.\d+\.self_attn|model)\.rotary_emb\.inv_freq")
"""Tensors of old files that follow from config.json."""


@dataclass(frozen=True, slots=True)
class Base:
    """A model to start from, described; its weights are not read yet."""

    path: Path
    model: DecoderConfig
    step: int | None = None
    """Checkpoint of a run; None: the newest, or no run."""
    family: Family | None = None
    """None: an officina run."""
    tensors: dict[str, Stored] | None = None

    @property
    def name(self) -> str:
        """For records: the folder's own name, not where it lies."""
        step = "" if self.step is None else f"@{self.step}"
        return f"{self.path.resolve().name}{step}"

    @property
    def small_files(self) -> dict[str, Path]:
        """Configuration, tokenizer and licence, by name."""
        folders = [self.path] if self.family else [self.path / BASE_DIR]
        return {name: folder / name for folder in folders for name in SMALL_FILES if (folder / name).is_file()}


def card_licence(folder: Path) -> str:
    """`license` in the front matter of the folder's model card; empty if there is none."""
    path = Path(folder) / "README.md"
    if not path.is_file():
        return ""
    front = re.match(r"---\s*\n(.*?)\n---", path.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    found = {key: match[1].strip().strip("'\"") for key in ("license", "license_name")
             if front and (match := re.search(rf"^{key}:\s*(\S.*)$", front[1], re.MULTILINE))}
    return found.get("license_name" if found.get("license") == "other" else "license", found.get("license", ""))


def open_base(text: str) -> Base:
    """FOLDER, RUN or RUN@STEP. OfficinaError says what is there instead."""
    path, step = split_step(text)
    if (path / CONFIG).is_file():
        model = load_config(path).model
        if not isinstance(model, DecoderConfig):
            raise OfficinaError(f"{path} is a run of a custom model; only the built-in decoder can start from another run's "
                                f"weights. Branch from it instead: officina train from={text}")
        return Base(path, model, step)
    if (path / CONFIG_FILE).is_file() and step is None:
        return _open_folder(path)
    if (path / ADAPTER_FILE).is_file() and step is None:
        raise OfficinaError(f"{path} is an adapter in PEFT's form, not a model. Make a run of it: "
                            f"officina convert import {path} --base FOLDER --to RUN")
    if not path.exists():
        raise OfficinaError(f"{path} does not exist. Name a folder that holds config.json and *.safetensors, or a run of "
                            "officina: runs/demo or runs/demo@200")
    raise OfficinaError(f"{path} has neither {CONFIG_FILE} (a model in Hugging Face's form) nor {CONFIG} (a run of officina). "
                        "Name a folder that holds one, for example init_from=runs/demo")


def _open_folder(path: Path) -> Base:
    raw, tensors = load_raw(path), find_tensors(path)
    family, model = read_config(raw, str(path / CONFIG_FILE), has_head="lm_head.weight" in tensors)
    tensors = {name: stored for name, stored in tensors.items() if not _DERIVED.fullmatch(name)}
    for name, stored in tensors.items():
        if stored.dtype not in ITEM_BYTES:
            raise OfficinaError(f"{stored.file}: {name} is stored as {stored.dtype}, and weights are read as "
                                f"{', '.join(ITEM_BYTES)}. Take the files that are not quantized")
    return Base(path, model, family=family, tensors=tensors)
