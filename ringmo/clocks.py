"""By how much a server's clock is apart from this machine's, as its answers say."""

import time
from email.utils import parsedate_to_datetime
from urllib.error import HTTPError
from urllib.request import Request, urlopen

ANSWER_S = 5.0
S3_REFUSES_S = 900.0  # a request that was signed longer ago, or so far ahead


def asked(request: str | Request) -> tuple[int | None, float | None]:
    """Status of a server's answer, and by how many seconds its clock is ahead of ours.

    Both are None where nobody answers, the second where the answer says no time.
    """
    before = time.time()
    try:
        with urlopen(request, timeout=ANSWER_S) as answer:
            status, date = answer.status, answer.headers.get("Date")
    except HTTPError as error:
        status, date = error.code, error.headers.get("Date")
    except (OSError, ValueError):
        return None, None
    return status, ahead_s(date, before, time.time())


def ahead_s(date: str | None, before: float, after: float) -> float | None:
    """From an answer's Date and the Unix seconds before and after it; None where it has no date."""
    try:
        there = parsedate_to_datetime(date or "").timestamp()
    except ValueError:
        return None
    # The header has whole seconds: somewhere from `there` to `there` + 1.
    return there - after if there > after else min(0.0, there + 1 - before)


def said(ahead_s: float) -> str:
    return f"{abs(ahead_s):.0f} s {'ahead of' if ahead_s > 0 else 'behind'} this machine's"


def why_refused(ahead_s: float | None) -> str | None:
    """What to say where an S3 server refuses everything for its clock; None: it does not."""
    if ahead_s is None or abs(ahead_s) < S3_REFUSES_S:
        return None
    return f"its clock is {said(ahead_s)}, and so it refuses: let NTP set both"
