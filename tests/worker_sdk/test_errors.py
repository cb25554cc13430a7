from typing import Any

import pytest
from gpu_worker import Cancelled, TaskError


def test_task_error_carries_its_code_and_message() -> None:
    """The code that an author chose stays beside the message."""
    error = TaskError("no_such_voice", "there is no voice called Ada")
    assert (error.code, error.message) == ("no_such_voice", "there is no voice called Ada")
    assert str(error) == error.message


def test_cancelled_is_not_the_authors_failure() -> None:
    """`Cancelled` is no TaskError, so code that handles its own failures does not swallow it."""
    assert not issubclass(Cancelled, TaskError)


@pytest.mark.parametrize("code", ["", "C", "1", "_a", "a-b", "a b", "a\n", "ä", "a" * 65, None, 5])
def test_words_are_no_code(code: Any) -> None:
    """A code that the service would replace is the author's mistake, and told where it is made."""
    with pytest.raises(ValueError, match="is no code"):
        TaskError(code, "message")


def test_the_longest_code() -> None:
    """A code may have 64 characters."""
    assert TaskError("a" + "_9" * 31 + "z", "message").code.endswith("9z")
