"""The compile table of docs/kernels.md holds what is shipped."""

import re

import pytest

from officina.benchmarks import kernels_table
from officina.kernels.compiling import ARCHS, compile_for
from officina.kernels.dispatch import triton

PAGE = kernels_table.PAGE.read_text()


def rows(text):
    return {cells[0]: cells[1:] for line in re.search("<!-- compiled -->.*<!-- end -->", text, re.DOTALL)[0].splitlines()
            if line.startswith("|") and len(cells := [cell.strip() for cell in line.strip("|").split("|")]) == 5}


def test_the_table_names_all_that_is_shipped_and_nothing_spills():
    found = rows(PAGE)
    assert list(found)[2:] == list(dict.fromkeys(name for arch in ARCHS for name, *_ in kernels_table.shipped(arch)))
    assert all(cell == "" or cell.split(" / ")[1] == "0" for cells in list(found.values())[2:] for cell in cells)


@pytest.mark.skipif(f"*triton {triton.__version__}:" not in PAGE, reason="the page was made with another triton")
@pytest.mark.parametrize("arch", ARCHS)
def test_figures_of_the_table_are_what_the_compiler_says(arch):
    found = rows(PAGE)
    for name, kernel, arguments, config in kernels_table.shipped(arch):
        if name.startswith(("norms", "AdamW")):
            assert found[name][ARCHS.index(arch)] == kernels_table._cell(compile_for(kernel, arguments, config, arch)), name


@pytest.mark.slow
def test_the_whole_table_is_what_the_compiler_says():
    assert kernels_table.main(["--check"]) == 0


def test_only_the_table_of_a_page_is_written_anew(tmp_path, monkeypatch):
    page = tmp_path / "kernels.md"
    page.write_text("before\n<!-- compiled -->\nold\n<!-- end -->\nafter\n")
    monkeypatch.setattr(kernels_table, "PAGE", page)
    monkeypatch.setattr(kernels_table, "table", lambda: "new")
    assert kernels_table.main(["--check"]) == 1 and "old" in page.read_text()
    assert kernels_table.main([]) == 0
    assert page.read_text() == "before\n<!-- compiled -->\n\nnew\n\n<!-- end -->\nafter\n"
    assert kernels_table.main(["--check"]) == 0
