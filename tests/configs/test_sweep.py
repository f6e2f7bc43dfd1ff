"""Words of a sweep: what they stand for, against Hydra's own reading of them."""

import itertools

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from officina.configs.sweep import expand
from officina.trainer.errors import ConfigError


@pytest.mark.parametrize("words", [
    ["optim.lr=0.001,0.01"], ["seed=range(0,4)", "engine=choice(ddp,fsdp2)"], ["a=1", "b=x,y,z", "c=1,2"],
    ["seed=range(1,10,4)"], ["a=[1,2]"], ["a='x,y'"], ["seed=range(3)"]])
def test_sweeps_mean_what_hydra_means(words):
    def hydra(word):
        override = OverridesParser.create().parse_override(word)
        if override.is_sweep_override():
            return [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]
        return [word]

    expected = [list(one) for one in itertools.product(*map(hydra, words))]
    assert [one for one, _ in expand(words)] == expected


def test_what_varies_is_named():
    assert expand(["a=1", "b=x,y"]) == [(["a=1", "b=x"], ["b=x"]), (["a=1", "b=y"], ["b=y"])]
    assert expand(["a=1"]) == [(["a=1"], [])]
    assert [one for one, _ in expand(["x=range(0,0.3,0.1)"])] == [["x=0.0"], ["x=0.1"], ["x=0.2"]], "exact decimals"
    assert [one for one, _ in expand(["x=1e-3,1e-4"])] == [["x=1e-3"], ["x=1e-4"]], "as it was typed"
    assert [one for one, _ in expand(["x=range(3,0,-1)"])] == [["x=3"], ["x=2"], ["x=1"]]


@pytest.mark.parametrize(("word", "says"), [
    ("seed=range(a,b)", "no range of numbers"), ("seed=range(1,2,0)", "no range of numbers"),
    ("seed=choice()", "no value to choose"),
    ("seed=range(0,100000)", "1,000 is the most"), ("seed=range(4,4)", "no value to choose")])
def test_bad_sweeps(word, says):
    with pytest.raises(ConfigError, match=says):
        expand([word])
