"""Tables that turn the errors of S3 servers and botocore into store errors.

The class of an error decides what happens next: the video fails, the job fails, the request is retried, or the result
is checked. Its message says what to do. A server may echo secrets, so only the error code and the message are kept, the
message without anything that looks like a key, a token or a signature. All errors pickle.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from botocore import exceptions as boto
from botocore.exceptions import BotoCoreError, ClientError
from urllib3.exceptions import HTTPError

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

BUSY_PATIENCE_S = 30.0  # how long a busy server is retried
GONE_PATIENCE_S = 5.0  # how long a server that cannot be reached is retried
MESSAGE_CHARS = 200
SECRETIVE = re.compile(  # presigned links, access keys, and anything long enough to be a token or a signature
    r"[?&]?(X-Amz-[\w-]+|Signature|AWSAccessKeyId|Credential)=[^\s&,]+|\b(AKIA|ASIA)\w+|[A-Za-z0-9+/=_-]{40,}",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class RequestError:
    """An error to raise, and what to try before: wait up to `patience_s` seconds, or read the credentials again."""

    error: JobError
    patience_s: float = 0.0
    renew: bool = False


_CREDENTIALS = "the credentials have expired or are not valid; renew them where botocore finds them, then resume"
_REFUSED = "access denied; check the credentials that botocore finds, and their permissions"
_BUSY = "the server is overloaded or failing"
_FULL = "the storage is full or its quota is used up; free some space and resume"
_REGION = "the bucket is in another region"
_KMS = "the encryption key cannot be used; check its state and its permissions"

# error code -> class and message. Other codes are mapped by the HTTP status below.
_CODES: dict[str, tuple[type[StoreError], str]] = {
    "NoSuchBucket": (StoreNoBucket, "there is no such bucket"),
    "NoSuchKey": (StoreMissing, "no such object"),
    "NotFound": (StoreMissing, "no such object"),
    "PreconditionFailed": (StoreChanged, "no longer the same object"),
    "InvalidRange": (StoreChanged, "shorter than it was"),
    "PermanentRedirect": (StoreDenied, _REGION),
    "TemporaryRedirect": (StoreDenied, _REGION),
    "AuthorizationHeaderMalformed": (StoreDenied, _REGION),
    "IllegalLocationConstraintException": (StoreDenied, _REGION),
    "NotImplemented": (
        StoreUnsafe,
        "the server does not support this request; without If-None-Match, results could be lost on it. If it supports "
        "that and only lacks the newer checksums, use --checksums when_required",
    ),
    "InvalidObjectState": (StoreDenied, "the object is archived (Glacier); restore it first"),
    "RequestTimeTooSkewed": (StoreDenied, "the clock of this machine is wrong; set it, then resume"),
} | {
    code: (kind, words)
    for kind, words, codes in (
        (
            StoreDenied,
            _CREDENTIALS,
            "ExpiredToken ExpiredTokenException TokenRefreshRequired RequestExpired InvalidToken InvalidAccessKeyId "
            "InvalidClientTokenId UnrecognizedClientException SignatureDoesNotMatch AuthFailure InvalidSecurity",
        ),
        (
            StoreDenied,
            _REFUSED,
            "AccessDenied AccessDeniedException AllAccessDisabled AccountProblem AccountSuspended Forbidden "
            "MethodNotAllowed NotSignedUp Unauthorized UnauthorizedAccess InvalidPayer",
        ),
        (
            StoreFull,
            _FULL,
            "InsufficientStorage QuotaExceeded StorageFull XMinioStorageFull XMinioAdminBucketQuotaExceeded",
        ),
        (
            StoreUnknown,
            _BUSY,
            "SlowDown SlowDownRead SlowDownWrite Throttling ThrottlingException TooManyRequests RequestThrottled "
            "TooManyRequestsException RequestLimitExceeded BandwidthLimitExceeded ServiceUnavailable InternalError "
            "RequestTimeout RequestTimeoutException XMinioServerNotInitialized",
        ),
        (StoreUnknown, "other writers use this object", "ConditionalRequestConflict OperationAborted Conflict"),
        (
            StoreUnknown,
            "the bytes were damaged or lost on the way to the server",
            "BadDigest IncompleteBody XAmzContentSHA256Mismatch XAmzContentChecksumMismatch",
        ),
    )
    for code in codes.split()
}
_STATUSES: dict[int, tuple[type[StoreError], str]] = {
    301: (StoreDenied, _REGION),
    307: (StoreDenied, _REGION),
    401: (StoreDenied, _REFUSED),
    403: (StoreDenied, _REFUSED),
    404: (StoreMissing, "no such object"),
    405: (StoreDenied, _REFUSED),
    408: (StoreUnknown, _BUSY),
    409: (StoreUnknown, "other writers use this object"),
    412: (StoreChanged, "no longer the same object"),
    416: (StoreChanged, "shorter than it was"),
    429: (StoreUnknown, _BUSY),
    501: _CODES["NotImplemented"],
    507: (StoreFull, _FULL),
}
_UNEXPLAINED = {  # a reply to HEAD has no body, so its error code is only the status
    400: (StoreDenied, f"denied without a reason, as is usual when {_CREDENTIALS.removeprefix('the ')}"),
    403: (StoreDenied, _REFUSED),
}
# botocore's own errors -> class and message; the first match is used
_BOTO: tuple[tuple[tuple[type[BotoCoreError], ...], type[JobError], str], ...] = (
    (
        (boto.NoCredentialsError,),
        StoreDenied,
        "botocore finds no credentials; run `aws configure`, or give --profile",
    ),
    ((boto.ProfileNotFound,), StoreDenied, "there is no such profile; see --profile and ~/.aws/config"),
    (
        (boto.PartialCredentialsError, boto.CredentialRetrievalError, boto.TokenRetrievalError, boto.SSOError),
        StoreDenied,
        "botocore could not get credentials; renew them (`aws sso login`?), then resume",
    ),
    ((boto.NoRegionError,), InputError, "no region is set; use --region"),
    (
        (boto.ParamValidationError, boto.InvalidRegionError, boto.InvalidDNSNameError, boto.UnsupportedS3ArnError),
        InputError,
        "not a valid bucket, key or region of S3",
    ),
    ((boto.ConfigParseError, boto.InvalidConfigError), InputError, "botocore cannot read its configuration file"),
    ((boto.SSLError,), StoreUnknown, "no secure connection; is the certificate trusted here (AWS_CA_BUNDLE)?"),
)


def from_reply(error: ClientError, place: str) -> RequestError:
    """The error for an error reply of the server. Never raises: any reply is mapped to a store error."""
    said = error.response.get("Error") or {}
    meta = error.response.get("ResponseMetadata") or {}
    status, code = int(meta.get("HTTPStatusCode") or 0), str(said.get("Code") or "")
    message = _clean(str(said.get("Message") or ""))
    headers = meta.get("HTTPHeaders") or {}
    if code in _CODES:
        kind, words = _CODES[code]
    elif code.startswith("KMS."):
        kind, words = StoreDenied, _KMS
    elif code == str(status) and status in _UNEXPLAINED:
        kind, words = _UNEXPLAINED[status]
    elif status in _STATUSES:
        kind, words = _STATUSES[status]
    elif status >= 500 or not status:
        kind, words = StoreUnknown, _BUSY
    else:  # a request that this server never accepts: neither denied nor unknown
        kind, words = (
            StoreError,
            (
                f"the server does not accept this request{f' ({message})' if message else ''}; if it is not AWS, "
                "--checksums when_required or --addressing-style path may help"
            ),
        )
    if words is _REGION:
        region = headers.get("x-amz-bucket-region") or said.get("Region")
        words += f": launch with --region {_clean(str(region))}" if region else "; set the right --region"
    if words is _REFUSED and message:
        words = f"{words} ({message})"
    shown = str(status) if code in ("", str(status)) else f"{status} {_clean(code)}"
    return RequestError(
        kind(f"{place}: {words} [{shown}]"),
        patience_s=BUSY_PATIENCE_S if kind is StoreUnknown else 0.0,
        renew=kind is StoreDenied and _CREDENTIALS.removeprefix("the ") in words,
    )


def from_botocore(error: BotoCoreError | HTTPError, place: str) -> RequestError:
    """The error for an error that botocore raises itself: no credentials, no connection, no reply.

    Of an error's text that does not arrive it raises urllib3's own error.
    """
    for kinds, kind, words in _BOTO:
        if isinstance(error, kinds):
            return RequestError(kind(f"{place}: {words}"))
    silent = isinstance(error, (boto.HTTPClientError, boto.ConnectionError, HTTPError))
    words = "no reply, or a very slow one; is the S3 server running?" if silent else "the reply cannot be read"
    return RequestError(StoreUnknown(f"{place}: {words} ({type(error).__name__})"), GONE_PATIENCE_S)


def cut_off(place: str) -> RequestError:
    """The error for a successful reply whose content did not arrive."""
    return RequestError(StoreUnknown(f"{place}: the reply was cut off"), GONE_PATIENCE_S)


def _clean(text: str) -> str:
    """A server's text on one line, without anything that could be a secret."""
    return re.sub(r"\s+", " ", SECRETIVE.sub("...", text)).strip()[:MESSAGE_CHARS]
