"""Every error of an S3 server and of botocore becomes one of our errors, which pickles and contains no secret."""

from __future__ import annotations

import pickle

import pytest
from botocore import exceptions as boto
from botocore.exceptions import BotoCoreError, ClientError

from p3d.pipeline.errors import (
    InputError,
    JobError,
    StoreChanged,
    StoreDenied,
    StoreError,
    StoreFull,
    StoreMissing,
    StoreNoBucket,
    StoreUnknown,
    StoreUnsafe,
)
from p3d.pipeline.storage.s3 import errors as s3_errors
from p3d.pipeline.storage.s3.errors import SECRETIVE, RequestError, from_botocore, from_reply

PLACE = "s3://bucket/key"
SECRETS = (
    "AKIAIOSFODNN7EXAMPLE",
    "ASIAIOSFODNN7EXAMPLE",
    "wJalrXUtnFEMIK7MDENGbPxRfiCYzEXAMPLEKEYwJalr",
    "IQoJb3JpZ2luX2VjEJ//////////wEaCXVzLWVhc3QtMSJHMEUCIQDZ",
    "https://b.s3.amazonaws.com/k?X-Amz-Signature=0123abcd&X-Amz-Credential=AKIAX",
    "http://b/k?AWSAccessKeyId=little&Signature=abc%3D",
)


def reply(code: str, status: int, message: str = "", **headers: str) -> ClientError:
    meta = {"HTTPStatusCode": status, "HTTPHeaders": headers}
    return ClientError({"Error": {"Code": code, "Message": message}, "ResponseMetadata": meta}, "GetObject")


def assert_plain(trouble: RequestError) -> None:
    """Check that it is one of our errors and does not change when pickled."""
    again = pickle.loads(pickle.dumps(trouble.error))
    assert isinstance(trouble.error, JobError)
    assert (type(again), str(again)) == (type(trouble.error), str(trouble.error))
    assert str(again).startswith(PLACE) and "\n" not in str(again)


@pytest.mark.parametrize("code", sorted(s3_errors._CODES))
def test_every_code_has_its_class(code: str) -> None:
    """The code decides, whatever the status. Only temporary errors are waited for, only credentials are renewed."""
    kind, words = s3_errors._CODES[code]
    for status in (200, 400, 403, 404, 503):
        trouble = from_reply(reply(code, status, "why"), PLACE)
        assert (
            type(trouble.error) is kind and words in str(trouble.error) and f"[{status} {code}]" in str(trouble.error)
        )
        assert (trouble.patience_s > 0) == (kind is StoreUnknown)
        assert trouble.renew == (words is s3_errors._CREDENTIALS)
        assert_plain(trouble)


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("ExpiredToken", StoreDenied),
        ("InvalidToken", StoreDenied),
        ("AccessDenied", StoreDenied),
        ("SlowDown", StoreUnknown),
        ("InternalError", StoreUnknown),
        ("ConditionalRequestConflict", StoreUnknown),
        ("PreconditionFailed", StoreChanged),
        ("NoSuchKey", StoreMissing),
        ("NoSuchBucket", StoreNoBucket),
        ("QuotaExceeded", StoreFull),
        ("NotImplemented", StoreUnsafe),
    ],
)
def test_the_codes_that_decide_what_happens_next(code: str, kind: type[StoreError]) -> None:
    """The classes that the rest of the program depends on, one by one."""
    assert type(from_reply(reply(code, 400), PLACE).error) is kind


def test_any_status_is_an_error_of_the_store() -> None:
    """An unknown code is mapped by its status, and an unknown status does not raise another error."""
    for status in [0, *range(300, 600)]:
        for code in ("Odd", str(status), ""):
            trouble = from_reply(reply(code, status, "why"), PLACE)
            assert isinstance(trouble.error, StoreError), (status, code)
            assert_plain(trouble)
            if status >= 500 and status not in (501, 507):
                assert type(trouble.error) is StoreUnknown and trouble.patience_s > 0, (status, code)
    assert type(from_reply(ClientError({}, "GetObject"), PLACE).error) is StoreUnknown


def test_the_region_of_the_bucket_is_told() -> None:
    """The error for a bucket in another region names the option to use."""
    told = from_reply(reply("PermanentRedirect", 301, **{"x-amz-bucket-region": "eu-west-3"}), PLACE)
    assert "--region eu-west-3" in str(told.error) and isinstance(told.error, StoreDenied)
    assert "set the right --region" in str(from_reply(reply("301", 301), PLACE).error)


def _boto_errors() -> list[BotoCoreError]:
    """One error of each class of botocore, with fake details that look like secrets."""
    found, todo = [], [BotoCoreError]
    while todo:
        kind = todo.pop()
        todo += kind.__subclasses__()
        words = dict.fromkeys("".join(c if c.isalnum() or c in "{}_" else " " for c in kind.fmt).split(), "")
        fields = {word.strip("{}"): SECRETS[0] for word in words if word.startswith("{")}
        for more in ({}, {"error": SECRETS[0], "name": "n", "endpoint_url": "http://h"}, {"provider": "p"}):
            try:
                found.append(kind(**{**fields, **more}))
                break
            except (KeyError, TypeError, ValueError):
                continue
    return found


def test_every_error_of_botocore_is_one_of_ours() -> None:
    """Any error of botocore becomes a store error or an input error, pickles, and keeps nothing of its text."""
    errors = _boto_errors()
    assert len(errors) > 60  # of about 90 classes
    kinds = set()
    for error in errors:
        trouble = from_botocore(error, PLACE)
        kinds.add(type(trouble.error))
        assert isinstance(trouble.error, StoreError | InputError), type(error)
        assert_plain(trouble)
        assert not any(secret in str(trouble.error) for secret in SECRETS), type(error)
        assert trouble.patience_s <= s3_errors.GONE_PATIENCE_S
    assert kinds == {StoreDenied, StoreUnknown, InputError}


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (boto.NoCredentialsError(), StoreDenied),
        (boto.ProfileNotFound(profile="none"), StoreDenied),
        (boto.CredentialRetrievalError(provider="p", error_msg="e"), StoreDenied),
        (boto.EndpointConnectionError(endpoint_url="http://h"), StoreUnknown),
        (boto.ReadTimeoutError(endpoint_url="http://h"), StoreUnknown),
        (boto.SSLError(endpoint_url="http://h", error="e"), StoreUnknown),
        (boto.NoRegionError(), InputError),
        (boto.ParamValidationError(report="r"), InputError),
    ],
)
def test_the_errors_of_botocore_that_decide_what_happens_next(error: BotoCoreError, kind: type[JobError]) -> None:
    """No credentials are StoreDenied, no reply is StoreUnknown, and invalid parameters are InputError."""
    assert type(from_botocore(error, PLACE).error) is kind


@pytest.mark.fault(47)
@pytest.mark.parametrize("secret", SECRETS)
def test_no_secret_survives(secret: str) -> None:
    """Keys, tokens and signatures that a server echoes are removed from every message."""
    assert SECRETIVE.search(secret)
    for code, status in [(code, 400) for code in s3_errors._CODES] + [("Odd", 400), ("Odd", 403), (secret, 400)]:
        said = str(from_reply(reply(code, status, f"The key {secret} is not good", Region=secret), PLACE).error)
        assert not any(part in said for part in (secret, "EXAMPLE", "0123abcd", "AKIAX", "abc%3D", "little")), said
