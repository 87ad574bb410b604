"""Places in code have numbers, which the compiled look at the frames and the one in Python tell apart alike."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from types import FrameType

import pytest

from deadcheck import frames

Find = Callable[[set[str], int, FrameType], int]


@pytest.fixture(params=["compiled", "python"])
def find(request: pytest.FixtureRequest) -> Find:
    """Return each of the two functions, called in a way that Python never makes another instruction of."""
    if request.param == "python":
        return partial(frames._place_of)
    if frames._find is frames._place_of:
        pytest.skip("it was not built here")
    return partial(frames._find)


def test_a_place_is_told_from_others_by_the_lines_on_the_way_there(find: Find) -> None:
    caller = sys._getframe()

    def asked(number: int = 0) -> int:
        return find(set(), number, caller)

    def one_way() -> int:
        return asked()

    def another_way() -> int:
        return asked()

    first, again = (asked() for _ in range(2))
    assert first == again
    ways = {first, asked(), one_way(), another_way(), asked(1)}
    assert len(ways) == 5


BETWEEN = """
def near():
    return find(files, 0, caller)

def far():
    return near()
"""


def test_frames_outside_the_model_say_nothing(find: Find) -> None:
    space = {"find": find, "caller": sys._getframe(), "files": {"between.py"}}
    exec(compile(BETWEEN, "between.py", "exec"), space)
    near, far = (space[name] for name in ("near", "far"))

    assert len({ask() for ask in (near, far)}) == 1
    space["files"] = set()
    assert len({ask() for ask in (near, far)}) == 2


def test_what_is_given_wrong_is_said() -> None:
    if frames._find is frames._place_of:
        pytest.skip("it was not built here")
    with pytest.raises(TypeError, match="a set of files, a number and a frame"):
        frames._find([], 0, sys._getframe())  # type: ignore[arg-type]
