"""Each error of a file system is told apart: missing, refused, passing, final."""

from __future__ import annotations

import errno
import os

import pytest
from aiohttp import ClientPayloadError
from botocore.exceptions import (
    ClientError,
    EndpointConnectionError,
    NoCredentialsError,
    ParamValidationError,
    ReadTimeoutError,
)
from botocore.parsers import ResponseParserError
from s3fs.errors import translate_boto_error

from vkd.store import faults

URI = "s3://bucket/a.mp4"


def answered(status: int, code: str) -> BaseException:
    """What s3fs raises of an answer."""
    parsed = {"Error": {"Code": code, "Message": "as asked"}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return translate_boto_error(ClientError(parsed, "GetObject"))


def numbered(number: int) -> OSError:
    return OSError(number, os.strerror(number))


@pytest.mark.parametrize(
    "error",
    [
        answered(500, "InternalError"),
        answered(502, "502"),
        answered(503, "SlowDown"),
        answered(503, "ServiceUnavailable"),
        answered(504, "GatewayTimeout"),
        answered(429, "TooManyRequests"),
        answered(400, "RequestTimeout"),
        answered(400, "IncompleteBody"),
        answered(400, "BadDigest"),
        answered(409, "OperationAborted"),
        answered(412, "PreconditionFailed"),
        EndpointConnectionError(endpoint_url="http://host"),
        ReadTimeoutError(endpoint_url="http://host"),
        ResponseParserError("cut XML"),
        ClientPayloadError("cut body"),
        ConnectionResetError("reset"),
        TimeoutError("slow"),
        numbered(errno.EIO),
    ],
    ids=str,
)
def test_a_store_in_trouble_may_be_asked_again(error: BaseException) -> None:
    assert faults.told(URI, error).passing
    assert not faults.told("/local/a.mp4", error).passing
    assert not faults.is_missing(error)
    assert not faults.is_refused(error)


@pytest.mark.parametrize(
    ("error", "action"),
    [
        (answered(403, "InvalidAccessKeyId"), "credentials"),
        (answered(403, "SignatureDoesNotMatch"), "credentials"),
        (answered(400, "ExpiredToken"), "credentials"),
        (answered(400, "InvalidToken"), "credentials"),
        (answered(403, "RequestTimeTooSkewed"), "clock"),
        (NoCredentialsError(), "credentials"),
        (answered(404, "NoSuchBucket"), "make the bucket"),
        (answered(507, "XMinioStorageFull"), "free space"),
        (numbered(errno.ENOSPC), "free space"),
        (numbered(errno.EDQUOT), "free space"),
        (numbered(errno.EROFS), "reached and written"),
        (answered(501, "NotImplemented"), "reached and written"),
        (answered(301, "PermanentRedirect"), "reached and written"),
        (answered(400, "InvalidBucketName"), "reached and written"),
        (ParamValidationError(report="bucket"), "reached and written"),
    ],
    ids=str,
)
def test_what_does_not_pass_says_who_must_act(error: BaseException, action: str) -> None:
    told = faults.told(URI, error)
    assert not told.passing
    assert action in told.action
    assert not faults.is_missing(error)
    assert not faults.is_refused(error)


@pytest.mark.parametrize("error", [answered(404, "NoSuchKey"), answered(404, "404"), FileNotFoundError("a.mp4")], ids=str)
def test_a_missing_file_is_neither_refused_nor_the_storage(error: BaseException) -> None:
    assert faults.is_missing(error)
    assert not faults.is_refused(error)


@pytest.mark.parametrize("error", [answered(403, "AccessDenied"), answered(403, "403"), PermissionError("no")], ids=str)
def test_one_refused_file_is_told_apart(error: BaseException) -> None:
    assert faults.is_refused(error)
    assert not faults.is_missing(error)
    assert not faults.told(URI, error).passing
