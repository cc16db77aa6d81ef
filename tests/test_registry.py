import pytest

from medseg.errors import WorkflowError
from medseg.registry import Registry, check_arguments, did_you_mean


def test_a_mistyped_name_is_answered_with_the_closest_one():
    table = Registry("network", {"unet": 1, "vnet": 2, "transunet": 3})
    assert table["vnet"] == 2
    with pytest.raises(WorkflowError, match=r"no network is called 'unett'; did you mean 'unet'\?"):
        table["unett"]


def test_a_name_like_nothing_known_lists_what_is():
    assert did_you_mean("qqqq", ["vnet", "unet"]) == "; known: unet, vnet"


def test_an_unknown_argument_is_refused_with_a_suggestion():
    def network(channels, dropout=0.0): ...

    check_arguments("network 'x'", network, {"channels": 3})
    with pytest.raises(WorkflowError, match=r"network 'x' has no argument 'chanels'; did you mean 'channels'\?"):
        check_arguments("network 'x'", network, {"chanels": 3})


def test_an_argument_that_medseg_sets_is_refused():
    def network(in_channels): ...

    with pytest.raises(WorkflowError, match="set by medseg itself"):
        check_arguments("network 'x'", network, {"in_channels": 3}, given=["in_channels"])
