"""What the errors of file systems mean: is the file missing, is it refused, may it pass, who must act."""

from __future__ import annotations

import errno
from collections.abc import Iterator

from aiohttp import ClientError as HttpError
from aiohttp import ClientResponseError, InvalidURL
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    CredentialRetrievalError,
    FlexibleChecksumError,
    HTTPClientError,
    IncompleteReadError,
    LoginError,
    NoAuthTokenError,
    NoCredentialsError,
    PartialCredentialsError,
    ProfileNotFound,
    SSOError,
    TokenRetrievalError,
)
from botocore.exceptions import ConnectionError as BotoConnectionError
from botocore.parsers import ResponseParserError

from vkd.errors import StorageError

# s3fs and http raise these too, which are no OSError
UNREACHABLE = (OSError, BotoCoreError, ClientError, ResponseParserError, HttpError)
NO_BUCKET = "NoSuchBucket"
MISSING_STATUSES = (404, 410)
# beside those of servers in trouble: asked too slowly or too often, or changed while it was read
PASSING_STATUSES = (408, 409, 412, 425, 429)
PASSING_CODES = ("RequestTimeout", "IncompleteBody", "BadDigest", "XAmzContentSHA256Mismatch", "SlowDown", "Throttling", "OperationAborted")
FINAL_STATUSES = (501, 507)  # of 5xx: not implemented, full
FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT)
# what a remote store says without a status when asking again cannot help
FINAL_ERRNOS = (*FULL_ERRNOS, errno.EINVAL, errno.EPERM, errno.EACCES, errno.ENOSYS, errno.EROFS, errno.ENAMETOOLONG)
PASSING_BOTO = (HTTPClientError, BotoConnectionError, IncompleteReadError, FlexibleChecksumError)
# without valid keys every request is refused, so one refusal says it of all
BAD_KEYS = (
    "ExpiredToken",
    "InvalidAccessKeyId",
    "InvalidToken",
    "NotSignedUp",
    "RequestExpired",
    "RequestTimeTooSkewed",
    "SignatureDoesNotMatch",
    "TokenRefreshRequired",
)
NO_KEYS = (
    NoCredentialsError,
    PartialCredentialsError,
    CredentialRetrievalError,
    LoginError,
    NoAuthTokenError,
    ProfileNotFound,
    SSOError,
    TokenRetrievalError,
)
KEYS_ACTION = "set valid, unexpired credentials (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile) and the right clock"


def is_missing(error: BaseException) -> bool:
    """Whether the file is not there, though the store is. A lost bucket, or a server that failed, is no missing file."""
    status, code = _answer(error)
    if status is not None:
        return status in MISSING_STATUSES and code != NO_BUCKET
    return isinstance(_root(error), FileNotFoundError | InvalidURL)


def is_refused(error: BaseException) -> bool:
    """Whether this one file may not be read; other files may be. Refused keys are another matter."""
    status, code = _answer(error)
    if status is None:
        return any(isinstance(each, PermissionError) for each in _chain(error))
    by_web = isinstance(_root(error), ClientResponseError)  # which has no keys: what it says of an address is about that address
    refuses = 400 <= status < 500 if by_web else status in (401, 403)
    return refuses and status not in MISSING_STATUSES and code not in BAD_KEYS and not _passes(error)


def hides_its_reason(error: BaseException) -> bool:
    """Whether the answer came without a code, as that to S3's HEAD does; the answer to a GET has one."""
    status, code = _answer(error)
    return status in (400, 401, 403) and code == str(status)


def is_out_of_range(error: BaseException) -> bool:
    """Whether bytes were asked for that the file does not have."""
    return _answer(error)[0] == 416


def told(uri: str, error: BaseException) -> StorageError:
    """What a file system raised about a uri, as the error of the storage that says who must act."""
    status, code = _answer(error)
    root = _root(error)
    number = getattr(root, "errno", None)
    if code == NO_BUCKET:
        what, action = "there is no such bucket", "make the bucket, or name another place"
    elif code in BAD_KEYS or isinstance(root, NO_KEYS):
        what, action = f"the credentials are not valid: {_words(root)}", KEYS_ACTION
    elif is_refused(error) or status in (401, 403):
        what, action = f"access denied: {_words(root)}", "check the credentials and what they permit"
    elif number in FULL_ERRNOS or status == 507:
        what, action = _words(root), "free space or name another place"
    else:
        what, action = _words(root), "check that the place can be reached and written"
    return StorageError(what, where=uri, action=f"{action}, then run the same command again", passing=passes(uri, error))


def passes(uri: str, error: BaseException) -> bool:
    """Whether what a file system raised may pass: a remote store that does not answer, is busy, or cut its answer short."""
    remote = "://" in uri and not uri.startswith(("file://", "memory://"))
    return remote and _passes(error)


def _passes(error: BaseException) -> bool:
    status, code = _answer(error)
    if status is not None:
        return status in PASSING_STATUSES or code in PASSING_CODES or (status >= 500 and status not in FINAL_STATUSES)
    root = _root(error)
    if isinstance(root, BotoCoreError):
        return isinstance(root, PASSING_BOTO)
    final = isinstance(root, FileNotFoundError | PermissionError | IsADirectoryError | NotADirectoryError)
    return not final and getattr(root, "errno", None) not in FINAL_ERRNOS


def _answer(error: BaseException) -> tuple[int | None, str]:
    """Status and code of the server's answer; (None, "") when there was none."""
    root = _root(error)
    if isinstance(root, ClientError):
        code = str(root.response.get("Error", {}).get("Code", ""))
        status = root.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        return (int(status) if status else 500), code
    if isinstance(root, ClientResponseError):
        return root.status, ""
    return None, ""


def _root(error: BaseException) -> BaseException:
    """What the server or the network said, under what the file system made of it (http's says "not found" of every failure)."""
    return next((each for each in _chain(error) if isinstance(each, ClientError | ClientResponseError)), _under(error))


def _under(error: BaseException) -> BaseException:
    cause = error.__cause__
    hidden = isinstance(error, FileNotFoundError) and isinstance(cause, UNREACHABLE)
    return cause if hidden and cause is not None else error


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _words(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
