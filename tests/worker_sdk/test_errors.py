from gpu_worker import Cancelled, TaskError


def test_task_error_carries_its_code_and_message() -> None:
    """The code that an author chose stays beside the message."""
    error = TaskError("no_such_voice", "there is no voice called Ada")
    assert (error.code, error.message) == ("no_such_voice", "there is no voice called Ada")
    assert str(error) == error.message


def test_cancelled_is_not_the_authors_failure() -> None:
    """`Cancelled` is no TaskError, so code that handles its own failures does not swallow it."""
    assert not issubclass(Cancelled, TaskError)
