"""Errors of object stores as StorageErrors that name the bucket and the reason."""

from __future__ import annotations

import re

from cache_tools.errors import StorageError
from cache_tools.storage.aws import no_keys

_STATUS = re.compile(r"status(?: code)?:? ([1-5][0-9]{2})")
_REQUEST = re.compile(r"performing [A-Z]+ (https?://\S+)")
# Services of clouds that give a machine the keys of its role.
_METADATA_HOSTS = ("169.254.169.254", "169.254.170.2", "metadata.google.internal", "[fd00:ec2::254]")
_NOT_CONNECTED = re.compile(r"kind: Connect|dns error|tcp connect error|client error \(Connect\)")
_CAUSES = re.compile(r"(connection refused|dns error|network is unreachable|no route to host|timed out)", re.IGNORECASE)
_WRONG_KEYS = {"InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "ExpiredToken", "TokenRefreshRequired"}
_ANSWER = 600  # characters of an answer that is no XML


def status(error: BaseException) -> int | None:
    """The HTTP status that an error of obstore was caused by."""
    found = _STATUS.search(str(error))
    return int(found[1]) if found else None


def is_final(error: BaseException) -> bool:
    """Whether the same request would fail again: a client error other than a timeout or too many requests, a redirect,
    or no credentials."""
    code = status(error)
    if code is not None:
        return 400 <= code < 500 and code not in {408, 429}
    return _is_redirect(error) or _lacks_keys(error)


def is_not_connected(error: BaseException) -> bool:
    """Whether no connection was made at all: no such host, or nothing listens there."""
    return status(error) is None and _NOT_CONNECTED.search(str(error)) is not None


def is_missing_bucket(error: BaseException) -> bool:
    """Whether it is the bucket that is missing, not the file."""
    return _tag(error, "Code") in {"NoSuchBucket", "ContainerNotFound"} or (
        "The specified bucket does not exist" in str(error)
    )


def as_storage_error(error: BaseException, where: str, bucket: str, region: str, keys_from: str) -> StorageError:
    """The StorageError for an error of obstore.

    Args:
        where: the URL of the file or prefix.
        region, keys_from: of the settings in use; "" if obstore chose them.
    """
    code, reason = status(error), _reason(error)
    if _lacks_keys(error):
        if bucket.startswith("s3"):
            return no_keys(bucket, f"{keys_from}, and this machine has no role")
        return _no_cloud_keys(bucket)
    if is_missing_bucket(error):
        return StorageError(
            "no such bucket",
            where=bucket,
            found=reason,
            next_step="correct the URL or the endpoint (AWS_ENDPOINT_URL), or create the bucket",
        )
    if _is_redirect(error) or _tag(error, "Code") in {"PermanentRedirect", "AuthorizationHeaderMalformed"}:
        right = _tag(error, "Region")
        return StorageError(
            "the bucket is in another region",
            where=bucket,
            expected=right,
            found=f"{region or 'no region'} in the settings ({reason})",
            next_step=f"set AWS_REGION={right}" if right else "set AWS_REGION to the region of the bucket",
        )
    if code in {401, 403}:
        wrong = _tag(error, "Code") in _WRONG_KEYS
        return StorageError(
            "no permission",
            where=where,
            found=f"{reason}, with keys from {keys_from}" if keys_from else reason,
            next_step="correct or renew these keys" if wrong else f"use other keys, or get them access to {bucket}",
        )
    return StorageError(
        "the object store does not answer as it should",
        where=where,
        found=reason,
        next_step="check the URL, AWS_ENDPOINT_URL and the network, then run the same command: it continues",
    )


def _no_cloud_keys(bucket: str) -> StorageError:
    return StorageError(
        "no credentials for this object store",
        where=bucket,
        expected="GOOGLE_APPLICATION_CREDENTIALS or AZURE_STORAGE_ACCOUNT_NAME and its key, or a machine with a role",
        found="none in the environment, and this machine has no role",
        next_step="set the variables of your cloud",
    )


def _reason(error: BaseException) -> str:
    """What the store answered, in its own words; else why there is no answer."""
    text = str(error).strip()
    code, host = status(error), _REQUEST.search(text)
    message = ": ".join(part for part in (_tag(error, "Code"), _tag(error, "Message")) if part)
    if code is not None and message:
        return f"{code} {message}"
    if code is None and host is not None and (cause := _CAUSES.search(text)):
        return f"{cause[1].lower()}: {host[1].partition('?')[0]}"
    summary = text.partition("Debug source:")[0].split("\n")[0].strip()
    return summary[:_ANSWER] or type(error).__name__


def _lacks_keys(error: BaseException) -> bool:
    request = _REQUEST.search(str(error))
    return request is not None and any(host in request[1] for host in _METADATA_HOSTS)


def _is_redirect(error: BaseException) -> bool:
    return "redirect without LOCATION" in str(error)


def _tag(error: BaseException, name: str) -> str | None:
    found = re.search(rf"<{name}>(?:<!\[CDATA\[)?([^<]*?)(?:]]>)?</{name}>", str(error))
    return found[1] if found else None
