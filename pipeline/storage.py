"""Files on any fsspec URL, local or in the cloud: read, write and commit, with one policy for what fails.

What a second try may fix is tried again. What it cannot fix is one line at once, for the person who can. Drivers'
own messages are not passed on: they run over many lines, and may hold signed query strings.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import re
import uuid
from collections.abc import Callable, Iterator
from http.client import HTTPException
from typing import Any, TypeVar

import aiohttp
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import requests
from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_exponential, wait_random

from pipeline.dataset import InputError

TRIES = 5  # within each, drivers have rounds of their own: gcsfs six requests over 31 s, s3fs three, adlfs four in 7 s
FIRST_WAIT, LONGEST_WAIT = 1.0, 30.0  # seconds between tries: doubled each time, up to the longest, plus jitter

# Here an object appears only once its upload is finished, and folders are but parts of names. (To ask gcsfs for a
# folder in a bucket that is not there would make the bucket.)
OBJECT_STORES = {"gs", "gcs", "s3", "s3a", "abfs", "abfss", "az"}

# Drivers that are installed by an extra: pip install -e '.[s3]'
_EXTRAS = {"s3": "s3", "s3a": "s3", "abfs": "azure", "abfss": "azure", "az": "azure", "hf": "hf"}

# A server that hangs is given up after a minute.
_HTTP = {"client_kwargs": {"timeout": aiohttp.ClientTimeout(total=60, sock_connect=20)}}
_S3 = {"config_kwargs": {"connect_timeout": 20, "retries": {"mode": "standard"}}}
_PATIENCE: dict[str, dict[str, Any]] = {"http": _HTTP, "https": _HTTP, "s3": _S3, "s3a": _S3}
# Its client would wait 18, 24 and 42 s between four requests, also where there are no credentials to send.
_AZURE_WAITS = {"initial_backoff": 0, "increment_base": 1.5, "random_jitter_range": 0.5}

_TRANSIENT_STATUS = {408, 429, 500, 502, 503, 504}
_TRANSIENT_ERRNO = {errno.EIO, errno.EAGAIN, errno.EBUSY, errno.ESTALE, errno.ENETUNREACH, errno.EHOSTUNREACH}
_TRANSIENT_TYPES = (
    ConnectionError,
    TimeoutError,
    asyncio.TimeoutError,  # another class than TimeoutError until Python 3.11
    HTTPException,
    aiohttp.ClientError,
    requests.RequestException,
)
# Of packages that need not be installed: module and class.
_TRANSIENT_NAMES = {
    "botocore.exceptions.HTTPClientError",
    "botocore.exceptions.ConnectionError",
    "botocore.parsers.ResponseParserError",  # a busy server's answer may be no XML
    "azure.core.exceptions.ServiceRequestError",
    "azure.core.exceptions.ServiceResponseError",
    "httpx.TransportError",
    "httpx2.TransportError",  # huggingface_hub's from 2.0 on
}
_SET_AWS = "set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
_SET_AZURE = (
    "set AZURE_STORAGE_CONNECTION_STRING, or AZURE_STORAGE_ACCOUNT_NAME with AZURE_STORAGE_ACCOUNT_KEY or `az login`"
)
_NO_CREDENTIALS = {
    "botocore.exceptions.NoCredentialsError": _SET_AWS,
    "botocore.exceptions.PartialCredentialsError": _SET_AWS,
    "botocore.exceptions.ProfileNotFound": _SET_AWS,
    "botocore.exceptions.CredentialRetrievalError": _SET_AWS,
    "botocore.exceptions.TokenRetrievalError": "log in again: `aws sso login`",
    "botocore.exceptions.SSOError": "log in again: `aws sso login`",
    "azure.core.exceptions.ClientAuthenticationError": _SET_AZURE,  # without an answer: nobody was asked
}
_OFFLINE = "huggingface_hub.errors.OfflineModeIsEnabled"

Result = TypeVar("Result")


class LinkError(Exception):
    """Say why there is nothing at a link, in a few words."""


# Drivers log each failure that they raise, in many lines or with its URL: whoever catches it reports it once.
for _name in ("gcsfs", "botocore", "aiobotocore", "s3fs", "azure", "adlfs", "huggingface_hub.utils._http"):
    logging.getLogger(_name).setLevel(logging.CRITICAL)


def connect(url: str) -> tuple[Any, str]:
    """Return the fsspec filesystem of `url` (a local path or any fsspec URL), and the path in it, without a final
    slash.

    Raises InputError for an unknown scheme, a missing driver package, or credentials that cannot be used.
    """
    if not url:
        raise InputError("no path is given: give a local path or a URL such as gs://bucket/folder")
    protocol = url.partition("://")[0] if "://" in url else "file"
    try:
        # No cache of listings: other processes write here too.
        if "::" in protocol:
            fs, path = fsspec.core.url_to_fs(url, use_listings_cache=False)  # several, each within the next
        else:  # url_to_fs would take a name that holds "::" for such a chain
            kind = fsspec.get_filesystem_class(protocol)
            fs = kind(use_listings_cache=False, **kind._get_kwargs_from_urls(url), **_PATIENCE.get(protocol, {}))
            path = kind._strip_protocol(url)
    except ImportError as error:
        extra = _EXTRAS.get(protocol.rpartition("::")[2])
        cure = f"pip install -e '.[{extra}]'" if extra else str(error).splitlines()[0]
        raise InputError(f"cannot open {_shown(url)}, its driver is missing: {cure}") from None
    except Exception as error:  # drivers raise what they like
        raise InputError(f"cannot open {_shown(url)}{_unopened(error, protocol)}") from None
    _hasten(fs)
    if is_object_store(fs) and not path.strip("/"):
        raise InputError(f"{_shown(url)} names no bucket: give a URL such as gs://bucket/folder")
    return fs, path.rstrip("/") or path


def join(url: str, name: str) -> str:
    """Return the URL of `name` in the folder `url`."""
    return f"{url.rstrip('/')}/{name}"


def read(fs: Any, path: str, start: int | None = None, end: int | None = None) -> bytes:
    """Return the bytes of a file, or those from `start`, which counts from the end where it is negative, to before
    `end`. Raises as `attempt` does.
    """
    if start is not None and start < 0:  # adlfs takes no such number
        start = max(0, int(attempt(fs, path, lambda: fs.size(path))) + start)
    data: bytes = attempt(fs, path, lambda: fs.cat_file(path, start=start, end=end))
    if end is not None and len(data) > end - (start or 0):  # an HTTP server may take no notice of what was asked for
        raise InputError(f"{_shown(fs.unstrip_protocol(path))}: its server sends files only whole: copy it first")
    return data


def read_link(url: str) -> bytes:
    """Return what is at an http(s) URL. Raises LinkError where the last of several tries brings nothing."""
    fs, path = connect(url)
    try:
        return _again(lambda: bytes(fs.cat_file(path)))
    except FileNotFoundError:
        raise LinkError("missing") from None
    except Exception as error:  # drivers raise what they like
        raise LinkError(_reason(error)) from None


def exists(fs: Any, path: str) -> bool:
    """Return whether there is such a file or folder. Raises as `attempt` does, but for a file that is not there."""
    try:
        attempt(fs, path, lambda: fs.info(path))  # fs.exists says "no" to every failure, also to a forbidden one
    except FileNotFoundError:
        return False
    return True


def write(fs: Any, path: str, data: bytes) -> None:
    """Write `data` to `path`, making its folders; the name never holds a part of it. Raises as `attempt` does."""
    _land(fs, path, lambda place: fs.pipe_file(place, data))


def write_table(fs: Any, path: str, table: pa.Table, compression: str = "snappy") -> None:
    """Write `table` to `path` as Parquet, as `write` does."""
    file = pa.BufferOutputStream()
    pq.write_table(table, file, compression=compression)
    write(fs, path, file.getvalue().to_pybytes())


def commit(fs: Any, local_path: str, path: str) -> None:
    """Upload the finished local file to `path`; the name never holds a part of it. Raises as `attempt` does."""
    _land(fs, path, lambda place: fs.put_file(local_path, place))


def require_writable(url: str) -> None:
    """Raise InputError, at once and not after hours of work, where files cannot be written to the folder `url`."""
    fs, path = connect(url)
    marker = f"{path}/.writable-{uuid.uuid4().hex[:12]}"
    try:
        write(fs, marker, b"may be deleted")
        attempt(fs, marker, lambda: fs.rm_file(marker))
    except FileNotFoundError:  # what /proc says
        raise InputError(f"cannot write to {_shown(url)}: choose another folder") from None


def is_object_store(fs: Any) -> bool:
    """Return whether objects appear whole or not at all, and folders need not be made."""
    return not OBJECT_STORES.isdisjoint(_protocols(fs))


def attempt(fs: Any, path: str, act: Callable[[], Result]) -> Result:
    """Return what `act` returns, which uses `path` of `fs`; transient failures are tried again, a bounded number of
    times.

    Raises FileNotFoundError at once where the file is missing, InputError at once where no other try would help (no
    such bucket, no permission, a folder in place of a file, a full disk), and ConnectionError after the last try.
    """
    try:
        return _again(act)
    except InputError:
        raise
    except Exception as error:  # drivers raise what they like
        if isinstance(error, FileNotFoundError) or _status(error) == 404:
            if is_object_store(fs):
                _require_bucket(fs, path)
            if isinstance(error, FileNotFoundError):
                raise
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path) from None
        place = _shown(fs.unstrip_protocol(path))
        if _is_transient(error):
            raise ConnectionError(
                f"{place} could not be reached in {TRIES} tries ({_reason(error)}): check the network, then run again"
            ) from None
        raise InputError(f"cannot use {place} ({_reason(error)}): {_mend(error)}") from None


def _again(act: Callable[[], Result]) -> Result:
    again = Retrying(
        retry=retry_if_exception(_is_transient),
        stop=stop_after_attempt(TRIES),
        wait=wait_exponential(FIRST_WAIT, max=LONGEST_WAIT) + wait_random(0, FIRST_WAIT),
        reraise=True,
    )
    return again(act)


def _land(fs: Any, path: str, upload: Callable[[str], None]) -> None:
    # Have `upload` bring all bytes to a place, then give them their name: on object stores that is one act.
    if "hf" in _protocols(fs):  # each file would be a commit of its own, and these are rationed by the hour
        raise InputError(f"{fs.unstrip_protocol(path)} can only be read: write elsewhere, then send it by `hf upload`")
    if is_object_store(fs):
        attempt(fs, path, lambda: upload(path))
        return
    part = f"{path}.{uuid.uuid4().hex[:12]}.part"
    attempt(fs, path, lambda: fs.makedirs(fs._parent(path), exist_ok=True))
    try:
        attempt(fs, path, lambda: upload(part))
        attempt(fs, path, lambda: fs.mv(part, path))
    except BaseException:
        with contextlib.suppress(Exception):  # it may not be there, and the first failure is the one to tell
            fs.rm_file(part)
        raise


def _require_bucket(fs: Any, path: str) -> None:
    bucket = path.split("/", 1)[0]
    try:
        if path != bucket:
            attempt(fs, bucket, lambda: fs.info(bucket))
            return
    except FileNotFoundError:
        pass
    kind = "container" if "abfs" in _protocols(fs) else "bucket"
    raise InputError(f"there is no {kind} {_shown(fs.unstrip_protocol(bucket))}: check its name, or make it first")


def _protocols(fs: Any) -> tuple[str, ...]:
    return (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)


def _hasten(fs: Any) -> None:
    client = getattr(fs, "service_client", None)
    policy = getattr(getattr(client, "_config", None), "retry_policy", None)
    if policy is not None:
        vars(policy).update(_AZURE_WAITS)


# ---- what a failure means: all that is known of drivers' errors ------------------------------------------------------


def _unopened(error: Exception, protocol: str) -> str:
    if str(error).startswith("Protocol not known"):
        return ": its scheme is unknown: give a local path or a URL such as gs://bucket/folder"
    cure = _credentials_cure(error) or (_EXTRAS.get(protocol) == "azure" and _SET_AZURE)
    return f" ({type(error).__name__}): {cure or 'check the URL and the credentials of this machine'}"


def _is_transient(error: BaseException) -> bool:
    status = _status(error)
    if status is not None:
        return status in _TRANSIENT_STATUS
    if _OFFLINE in _names(error):
        return False
    return any(_may_pass(one) for one in _causes(error))


def _may_pass(error: BaseException) -> bool:
    if isinstance(error, ValueError):  # a wrong URL, which aiohttp and requests count among their failures too
        return False
    # `retryable` is google.auth's own word
    return (
        isinstance(error, _TRANSIENT_TYPES)
        or (isinstance(error, OSError) and error.errno in _TRANSIENT_ERRNO)
        or getattr(error, "retryable", False) is True
        or not _TRANSIENT_NAMES.isdisjoint(_names(error))
    )


def _is_denied(error: BaseException) -> bool:
    # gcsfs turns 403 into a plain OSError, of which only the text tells.
    return isinstance(error, PermissionError) or _status(error) in (401, 403) or str(error).startswith("Forbidden")


def _credentials_cure(error: BaseException) -> str | None:
    # What to do where a driver found no credentials, so that nobody was asked.
    if _status(error) is not None:
        return None
    return next((_NO_CREDENTIALS[name] for name in _names(error) if name in _NO_CREDENTIALS), None)


def _status(error: BaseException) -> int | None:
    # The HTTP status of an answer: `status` in aiohttp, `code` in gcsfs and google, `status_code` in azure, `response`
    # in requests and httpx, and a dict of that name in botocore, whose errors s3fs keeps as causes.
    for one in _causes(error):
        response = getattr(one, "response", None)
        if isinstance(response, dict):
            return response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        for holder, name in ((one, "status"), (one, "code"), (one, "status_code"), (response, "status_code")):
            value = getattr(holder, name, None)
            if str(value).isdecimal():
                return int(str(value))
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    # The error, and those that drivers made it from.
    while error is not None:
        yield error
        error = error.__cause__


def _names(error: BaseException) -> list[str]:
    # Module and class of the error and of all that it is a kind of.
    return [f"{kind.__module__}.{kind.__qualname__}" for kind in type(error).__mro__]


def _reason(error: BaseException) -> str:
    if _is_denied(error):
        return "permission denied"
    if _credentials_cure(error):
        return "no credentials"
    if (status := _status(error)) is not None:
        return f"HTTP {status}"
    if isinstance(error, OSError) and error.errno is not None and error.strerror and "://" not in error.strerror:
        return error.strerror.splitlines()[0]
    return type(error).__name__


def _mend(error: BaseException) -> str:
    if _is_denied(error):
        hub = any("huggingface_hub.errors.HfHubHTTPError" in _names(one) for one in _causes(error))
        return f"check its permissions and {'set HF_TOKEN' if hub else 'the credentials of this machine'}"
    if cure := _credentials_cure(error):
        return cure
    if _OFFLINE in _names(error):
        return "unset HF_HUB_OFFLINE"
    if isinstance(error, NotImplementedError):
        return "this kind of storage cannot do that; choose another"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "free some space there"
    if "requester pays" in str(error):
        return "its bucket bills the reader: copy the data to a bucket of yours"
    if _status(error) == 400:  # all that S3 says of an expired token where it is asked for a file's size
        return "check the path and the credentials of this machine"
    return "check the path"


def _shown(url: str) -> str:
    # The URL without what may be secret: user and password, signed query; a local path as it was given.
    if "://" not in url:
        return url
    return re.sub(r"//[^/@]*@", "//", url.split("?", 1)[0]).removeprefix("file://")
