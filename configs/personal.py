"""A centre's and a person's defaults: files of YAML that say where and how a run is run, never what it computes."""

import re
from collections.abc import Iterator, Mapping

import yaml

from officina.configs.job import SUBMIT, flat
from officina.configs.sites import config_folders
from officina.trainer.errors import Problem
from officina.trainer.keys import as_text, optional

_PERSONAL = ("site", "use", "logging", "checkpoint", "profile", "device", "ranks", "threads", "time_limit",
             "stall_after")
"""What a person's or a centre's defaults may set, besides paths of data: where and how a run is run, not what it computes."""
SOURCE_PATH = re.compile(r"data\.sources\.([^.]+)\.path")


class _AsWritten(yaml.BaseLoader):
    """Keeps every scalar as the text that was written, null apart: an account 1e5 is no number."""


_AsWritten.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"(~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_AsWritten.add_constructor("tag:yaml.org,2002:null", lambda loader, node: None)


def personal_words(environ: Mapping[str, str], problems: list[Problem]) -> Iterator[tuple[str, str]]:
    """Words of a centre's (XDG_CONFIG_DIRS) and then the person's (XDG_CONFIG_HOME) `officina/*.yaml`, with their files."""
    for folder in config_folders(environ):
        for path in sorted(folder.glob("*.yaml")):
            try:
                values = yaml.load(path.read_text(encoding="utf-8"), _AsWritten) or {}
            except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
                problems.append(Problem(str(path), None, f"cannot be read: {' '.join(str(error).split())}",
                                        f"mend or remove {path}"))
                continue
            if not isinstance(values, dict):
                problems.append(Problem(str(path), values, "must hold keys and values", "site: {account: my_project}"))
                continue
            for key, value in flat({k: v for k, v in values.items() if k != SUBMIT}):
                if key.split(".")[0] in _PERSONAL or SOURCE_PATH.fullmatch(key):
                    taken = value is None and not optional(key)  # null is no value: what lies below is taken away
                    yield f"~{key}" if taken else f"{key}={as_text(value)}", str(path)
                else:
                    problems.append(Problem(key, value, f"stands in {path}, but defaults of a person or a centre may not "
                                            f"change what a run computes, only {', '.join(_PERSONAL)} and paths of data",
                                            "move it into a file of yours and say experiment=./my.yaml"))
