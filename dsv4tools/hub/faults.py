"""What can go wrong with the Hub, in one line each; and what is worth another try.

huggingface_hub lets errors of three families through: its own by HTTP status, those of its transport (httpx) as they
are, and OSError for disks and for bodies of the wrong size.
"""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING, TypeVar

from dsv4tools.errors import Dsv4Error, InputError, ResourceError, UsageError
from dsv4tools.outfile import WHY

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable

Result = TypeVar("Result")

LONGEST_WAIT_SECONDS = 60.0   # what the Hub may ask us to wait before we ask the user instead
_KEPT = "complete files are kept: run the same command again"
_SECRETS = re.compile(r"hf_[A-Za-z0-9]+|(?<=\?)[^\s'\"<>]+|(?i:(?<=bearer )\S+)")


class Cancelled(Exception):  # noqa: N818  - nothing went wrong
    """The caller stopped the work; raised in worker threads only."""


def mask(text: str) -> str:
    """`text` on one line, without tokens and without the query strings of signed addresses."""
    from huggingface_hub import get_token  # noqa: PLC0415  - takes a quarter of a second

    token = get_token()
    if token:
        text = text.replace(token, "***")
    return _SECRETS.sub("***", " ".join(text.split()))


def explain(error: BaseException, repository: str, revision: str | None = None) -> Dsv4Error:  # noqa: C901, PLR0911, PLR0912  - one line per kind of fault
    """`error` as one of ours: where, what, and what to do."""
    from huggingface_hub import constants, errors  # noqa: PLC0415  - takes a quarter of a second

    endpoint = constants.ENDPOINT
    log_in = "log in with `hf auth login` or set HF_TOKEN"
    cause = _root(error)
    match cause:
        case Dsv4Error():
            return cause
        case errors.OfflineModeIsEnabled():
            return ResourceError(repository, "the Hub is switched off by HF_HUB_OFFLINE", hint="unset it")
        case errors.GatedRepoError():
            return ResourceError(repository, "is gated: access must be granted to you",
                                 hint=f"ask for it at {endpoint}/{repository}, then {log_in}")
        case errors.DisabledRepoError():
            return ResourceError(repository, "was disabled on the Hub")
        case errors.RevisionNotFoundError():
            return ResourceError(repository, f"has no revision {revision or 'main'!r}",
                                 hint=f"{endpoint}/{repository} lists its branches and commits")
        case errors.RemoteEntryNotFoundError():
            return ResourceError(repository, "a file that it lists is not there", hint="try again")
        case errors.RepositoryNotFoundError():
            return ResourceError(repository, "does not exist on the Hub, or is private",
                                 hint=f"check the name; if it is private, {log_in}")
        case errors.HFValidationError():
            return UsageError(repository, "is no name of a repository", hint="expected OWNER/NAME")
        case errors.FileMetadataError():
            return ResourceError(endpoint, "does not answer as a Hub does", hint="check HF_ENDPOINT and any proxy")
        case errors.HfHubHTTPError():
            return _explain_status(cause, repository, endpoint, log_in)
        case _ if is_transport_error(cause):
            return ResourceError(endpoint, f"no connection, or it broke: {mask(str(cause)) or type(cause).__name__}",
                                 hint=f"check the network (and HF_ENDPOINT); {_KEPT}")
        case OSError() if cause.errno is not None:
            return ResourceError(cause.filename or repository,
                                 f"cannot be written: {WHY.get(cause.errno, cause.strerror)}", hint=_KEPT)
        case OSError():
            return ResourceError(repository, "the Hub sent a file of another size than it announced", hint=_KEPT)
        case ValueError() if "hf_xet" in str(cause):
            return ResourceError(repository, "has files of more than 50 GB, which need hf_xet",
                                 hint="pip install hf_xet")
        case ValueError():
            return InputError(repository, mask(str(cause)))
    return Dsv4Error(repository, mask(f"{type(cause).__name__}: {cause}"), hint="please report this")


def _explain_status(error: BaseException, repository: str, endpoint: str, log_in: str) -> Dsv4Error:
    status = _status(error)
    if status == 429:
        wait = _retry_after(error)
        when = f", and asks to wait {wait:.0f} s" if wait else ""
        return ResourceError(endpoint, f"answers too many requests (429){when}", hint=f"wait; {_KEPT}; {log_in} "
                             f"for a higher limit")
    if status in {401, 403}:
        return ResourceError(repository, f"access denied ({status})", hint=f"is the token valid, and may it read this "
                             f"repository? {log_in}")
    if status is not None and status >= 500:
        return ResourceError(endpoint, f"has a fault of its own ({status})", hint=f"try later; {_KEPT}")
    return ResourceError(repository, f"the Hub answers with status {status}",
                         hint=f"check the name, HF_ENDPOINT and any proxy; {_KEPT}")


def _root(error: BaseException) -> BaseException:
    """What is behind errors that only say that the file is not at hand either."""
    from huggingface_hub.errors import LocalEntryNotFoundError  # noqa: PLC0415  - takes a quarter of a second

    vague = isinstance(error, LocalEntryNotFoundError) or str(error).startswith("Force download failed")
    return error.__cause__ if vague and error.__cause__ is not None else error


def is_transport_error(error: BaseException) -> bool:
    """Whether httpx failed without an answer: no connection, reset, time-out, redirects without end.

    By name: the library has been renamed once.
    """
    return any(c.__name__ in {"TransportError", "RequestError"} for c in type(error).__mro__)


def _status(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _retry_after(error: BaseException) -> float | None:
    """The seconds that a 429 asks to wait, by either of the headers in use."""
    headers = getattr(getattr(error, "response", None), "headers", {})
    text = str(headers.get("retry-after", ""))
    if text.isdecimal():
        return float(text)
    match = re.search(r";\s*t=(\d+)", str(headers.get("ratelimit", "")))
    return float(match[1]) if match else None


def seconds_to_wait(error: BaseException, attempt: int) -> float | None:
    """How long to wait before trying again after failure number `attempt` (from 0); None if it is of no use."""
    cause = _root(error)
    backoff = float(2**attempt)
    status = _status(cause)
    if status == 429:
        wait = _retry_after(cause)
        return None if wait is not None and wait > LONGEST_WAIT_SECONDS else max(wait or 0, backoff)
    if is_transport_error(cause) or status in {408, 500, 502, 503, 504}:
        return backoff
    wrong_size = isinstance(cause, OSError) and cause.errno is None and status is None
    return backoff if wrong_size else None


def persist(
    call: Callable[[], Result], repository: str, revision: str | None, *, attempts: int,
    stop: threading.Event | None = None,
) -> Result:
    """``call()``, tried again where that may help; the last failure is raised as one of ours, Cancelled as it is."""
    for attempt in range(attempts):
        try:
            return call()
        except Cancelled:
            raise
        except Exception as e:  # noqa: BLE001  - three families of errors without a common base; explain() sorts them
            wait = seconds_to_wait(e, attempt) if attempt + 1 < attempts else None
            if wait is None:
                raise explain(e, repository, revision) from None
        _sleep(wait, stop)
    raise UsageError("attempts", f"is {attempts}, expected at least 1")


def _sleep(seconds: float, stop: threading.Event | None) -> None:
    if stop is None:
        time.sleep(seconds)
    elif stop.wait(seconds):
        raise Cancelled
