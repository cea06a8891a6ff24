"""Errors that speak: each is one line a user can act on, and fixes the exit code."""


class RingmoError(Exception):
    """Something a user must hear of: one line saying what, where and what to do."""

    exit_code = 2
    retry = False


class BadInput(RingmoError):
    """Input or usage that cannot be worked with (exit code 2)."""


class AnswerIsNo(RingmoError):
    """The work was done and the answer is no: validation failed, gate refused (exit code 1)."""

    exit_code = 1


class Unreachable(RingmoError):
    """Something outside did not answer (exit code 3); trying again later can help."""

    exit_code = 3
    retry = True
