"""Servers: whether one answers, and what fsspec's file systems say of a URL."""

import asyncio
import hashlib
import os
import re
import time
import urllib.error
import urllib.request
from functools import cache
from typing import Any

from finetune.utils.errors import RecipeError, first_line
from finetune.utils.urls import PACKAGES, WEB, Unreachable, join_url, split_url

PAUSES = (1, 4)  # seconds before the second and the third try
TIMEOUT = 60  # seconds for one file
SILENCE = 20  # seconds without a byte from a web server
CHECKSUMS = ("Content-MD5", "md5Hash", "content_md5", "crc32c", "blob_id", "CRC", "ETag", "etag")  # a web server's ETag is none
TIMES = ("ETag", "etag", "Last-Modified", "LastModified", "last_modified", "mtime", "updated", "created", "date_time")
CREDENTIALS = {
    "s3": "; credentials are those of AWS's tools (AWS_ACCESS_KEY_ID, ...); a public bucket: FSSPEC_S3_ANON=true",
    "gs": "; credentials are those of Google's tools (GOOGLE_APPLICATION_CREDENTIALS, ...)",
    "https": "; a name and a password: in ~/.netrc",
    "hf": "; a private repository: HF_TOKEN",
}
OFFLINE = (
    "  weights you have as a file: --weights FILE.safetensors; none at all: --weights none\n"
    "  a recipe that needs no network: efficientnet_lite0_digits"
)


def reach(url: str, what: str, remedy: str = OFFLINE) -> None:
    """Raise RecipeError, within seconds, unless a server answers at `url`; honours proxy settings."""
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=8).close()
    except urllib.error.HTTPError:
        pass  # it answered
    except OSError as error:
        raise RecipeError(f"can't reach {what} ({getattr(error, 'reason', error)})\n{remedy}") from None


@cache
def reset_in_forks() -> None:
    """Have forked processes make a thread and a loop of their own, as older versions of fsspec do not."""
    from fsspec.asyn import reset_lock

    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=reset_lock)


def file_system(protocol: str) -> Any:
    """fsspec's own, which it makes anew in each process; a package that is missing is a RecipeError."""
    try:
        import fsspec

        reset_in_forks()
        options: dict[str, Any] = {}
        if protocol in WEB:
            import aiohttp

            timeout = aiohttp.ClientTimeout(total=None, sock_connect=SILENCE, sock_read=SILENCE)
            asked = fsspec.config.conf.get(protocol, {}).get("client_kwargs", {})
            options["client_kwargs"] = {"timeout": timeout, "trust_env": True} | asked  # proxies, and ~/.netrc
        return fsspec.filesystem(protocol, **options)
    except ImportError as error:
        package = PACKAGES[protocol] or first_line(error)
        raise RecipeError(f"{protocol}:// needs a package that is not installed: pip install {package}") from error


def ask(url: str, method: str, *values: Any, seconds: float | None = TIMEOUT, **options: Any) -> Any:
    """What a method of its file system says of a URL, at the third try at last; raises Unreachable."""
    protocol, path, _ = split_url(url)
    for pause in (*PAUSES, None):
        try:
            system = file_system(protocol)
            place = system._strip_protocol(join_url(protocol, path))
            if not system.async_impl:
                return getattr(system, method)(place, *values, **options)
            from fsspec.asyn import sync

            return sync(system.loop, getattr(system, f"_{method}"), place, *values, timeout=seconds, **options)
        except RecipeError:
            raise
        except Exception as error:  # of each library its own
            fault = why_not(error, protocol)
            if pause is None or fault.lasting:
                raise fault from None
            time.sleep(pause)
    raise AssertionError


def why_not(error: BaseException, protocol: str) -> Unreachable:
    """Why a file can't be had, without the URLs in which redirects and signatures stand."""
    if isinstance(error, FileNotFoundError) and error.__cause__:  # as fsspec says of whatever a web server answers
        error = error.__cause__
    response = getattr(error, "response", None)  # of botocore, and of requests
    known = response.get("ResponseMetadata", {}).get("HTTPStatusCode") if isinstance(response, dict) else None
    status = known or getattr(response, "status_code", None) or getattr(error, "status", None) or getattr(error, "code", None)
    name = {"http": "https", "s3a": "s3", "gcs": "gs"}.get(protocol, protocol)
    if isinstance(error, FileNotFoundError) or status in (404, 410):
        return Unreachable("it is not there")
    if isinstance(error, PermissionError) or status in (401, 403) or type(error).__name__ == "NoCredentialsError":
        return Unreachable(f"no permission{f' ({status})' if status else ''}{CREDENTIALS.get(name, '')}")
    if isinstance(status, int):
        return Unreachable(f"the server answers {status}", lasting=400 <= status < 500 and status not in (408, 425, 429))
    if isinstance(error, TimeoutError | asyncio.TimeoutError):
        return Unreachable("the server is silent", lasting=False)
    why = re.sub(r"\w+://\S+", "URL", first_line(error)).partition(": <")[0].partition(" ssl:")[0]
    return Unreachable(why, lasting=isinstance(error, NotImplementedError))


def version_in(about: dict[str, Any], url: str) -> str:
    """What changes with a file: of its size and checksum, or else of its URL, its size and time, as a listing has them."""
    web = split_url(url)[0] in WEB
    sums = [str(about[name]) for name in CHECKSUMS if about.get(name) and not (web and name == "ETag")]
    known = sums[:1] or [url, *(str(about[name]) for name in TIMES if about.get(name))]
    return hashlib.blake2b(repr((about.get("size"), *known)).encode(errors="surrogateescape"), digest_size=16).hexdigest()
