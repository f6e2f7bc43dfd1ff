"""Tests that run kernels in Triton's interpreter: in a process of its own, because TRITON_INTERPRET must be set before triton
is imported and turns every kernel of the process into an interpreted one.

    @interpreted
    def test_x(shape): ...      # a plain test, parametrised as usual; its body runs in the process

    interpreter.run("tests.kernels.cases:function", *args)      # the fixture, for what is not a whole test
"""

import functools
import inspect
import os
from collections.abc import Callable
from typing import Any

from tests.distributed import RankPool, _resolve

ENVIRONMENT = {"TRITON_INTERPRET": "1"}


class Interpreter:
    """One process with TRITON_INTERPRET=1, started when first needed and kept."""

    def __init__(self) -> None:
        self._pool = RankPool(1, ENVIRONMENT)

    def run(self, function: str, *args: Any, **kwargs: Any) -> Any:
        """Call `package.module:function` there; what it returned. An exception comes back with its traceback."""
        return self._pool.run(1, "tests.kernels.interpreter:call", function, *args, **kwargs)[0]

    def close(self) -> None:
        self._pool.close()


def interpreted(test: Callable[..., None]) -> Callable[..., None]:
    """Run a test function in the interpreter's process. It stands below the parametrize marks and takes no fixtures."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return test

    @functools.wraps(test)
    def run_there(interpreter: Interpreter, **arguments: Any) -> None:
        interpreter.run(f"tests.kernels.{test.__module__.rpartition('.')[2]}:{test.__name__}", **arguments)

    own = inspect.Parameter("interpreter", inspect.Parameter.KEYWORD_ONLY)
    run_there.__signature__ = inspect.Signature([*inspect.signature(test).parameters.values(), own])
    return run_there


def call(ranks: Any, function: str, *args: Any, **kwargs: Any) -> Any:
    """In the process: the world of one rank is of no interest."""
    return _resolve(function)(*args, **kwargs)


def remap_once() -> None:
    """Leave triton.language remapped from the first kernel on: Triton's interpreter searches and remaps it anew for each launch
    and each device function, two fifths of these tests' time. For a process in which all kernels are interpreted."""
    import triton.language as tl
    from triton.runtime import interpreter

    if not hasattr(interpreter, "_LangPatchScope"):  # triton 3.5, which restores nothing
        return
    remap = interpreter._patch_lang

    def remap_what_is_not(function: Callable[..., Any]) -> Any:
        modules = [value for value in function.__globals__.values() if value is tl or value is tl.core]
        if any(tl.core.is_builtin(module.load) for module in modules):
            remap(function)
        return interpreter._LangPatchScope()  # with nothing to restore

    interpreter._patch_lang = remap_what_is_not
