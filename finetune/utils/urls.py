"""URLs of files that lie elsewhere: what they name, which can be read, and what must not stand in them."""

import posixpath
import re
from pathlib import Path, PurePath, PurePosixPath
from typing import Any, TypeGuard
from urllib.parse import parse_qsl, quote, unquote

from finetune.utils.errors import RecipeError

PACKAGES = {  # what reads each protocol, as pip names it; "" for what is there already
    "s3": "s3fs",
    "s3a": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "az": "adlfs",
    "abfs": "adlfs",
    "https": '"finetune-recipes[remote]"',
    "http": '"finetune-recipes[remote]"',
    "hf": "",
    "zip": "",
    "memory": "fsspec",
}
WEB = ("http", "https")
URL = re.compile(r"[a-z][a-z0-9+.-]+://", re.I)  # of two letters or more: one is a drive of Windows
SECRET = re.compile(  # names in a query
    r"(signature|token|secret|passw(or)?d|credentials?|api_?key|access_?key(_?id)?)$|(^|[-_])(sig|key|pwd|auth|authorization)$",
    re.I,
)
HIDDEN = "***"


class Unreachable(OSError):
    """A file elsewhere can't be had: why, in words without a URL. `lasting`: it is the file's own fault, not a server's."""

    def __init__(self, why: str, lasting: bool = True):
        super().__init__(why)
        self.lasting = lasting


def is_url(item: Any) -> TypeGuard[str]:
    """Whether an item is a URL, and no path."""
    return isinstance(item, str) and "://" in item and URL.match(item) is not None


def split_url(url: str) -> tuple[str, str, str]:
    """(protocol, path, archive): ("zip", "photos/1.jpg", "https://host/a.zip") of zip://photos/1.jpg::https://host/a.zip."""
    protocol, _, path = url.partition("://")
    if protocol.lower() != "zip":
        return protocol.lower(), path, ""
    inside, _, archive = path.rpartition("::") if "::" in path else (path, "", "")
    return "zip", inside.strip("/"), tidy_file(archive) if is_url(archive) else archive


def join_url(protocol: str, path: str, archive: str = "") -> str:
    return f"{protocol}://{path}" + (f"::{archive}" if protocol == "zip" else "")


def tidy(source: str) -> str:
    """A URL in one form, and a .zip as the folder that it is; a path as it is."""
    if is_url(source):
        protocol, path, archive = split_url(source)
        source = join_url(protocol, path if protocol in WEB else path.rstrip("/"), archive)
    return f"zip://::{source}" if is_archive(source) else source


def is_archive(source: str | Path) -> bool:
    """Whether a source is a .zip, here or elsewhere."""
    return not str(source).lower().startswith("zip://") and as_path(str(source).partition("?")[0]).suffix.lower() == ".zip"


def is_table(source: str | Path) -> bool:
    """Whether a source is a .csv, here or elsewhere."""
    url = is_url(source) and split_url(str(source))[0] in WEB
    return as_path(str(source).partition("?")[0] if url else source).suffix.lower() == ".csv"


def as_path(item: str | Path) -> PurePath:
    """An item's path, to take a name or an ending of: of a URL without protocol and archive, without %20 on the web."""
    if not is_url(item):
        return Path(item)
    protocol, path, _ = split_url(str(item))
    if protocol in WEB:
        place, _, query = path.partition("?")
        path = unquote(place) + (f"?{query}" if query else "")
    return PurePosixPath(path)


def stem_of(source: str | Path) -> str:
    """A name for what is made of a source."""
    return (is_url(source) and as_path(source).stem) or Path(source).resolve().stem


def beside(table: str | Path, name: str) -> str | Path:
    """What a table calls `name`: a URL, a path on this machine, or one relative to the table's folder."""
    name = name.strip()
    if is_url(name):
        return tidy_file(name)
    if not is_url(table) or name.startswith("/"):
        return Path(table).parent / name if not is_url(table) else Path(name)
    protocol, path, archive = split_url(str(table))
    folder = posixpath.dirname(path.partition("?")[0] if protocol in WEB else path)
    return join_url(protocol, posixpath.normpath(posixpath.join(folder, quote(name) if protocol in WEB else name)), archive)


def tidy_file(url: str) -> str:
    """A file's URL, with its protocol in lower case."""
    return join_url(*split_url(url))


def relative_to(item: str | Path, source: str | Path) -> str:
    """An item's path below a folder, or beside a table, that lies elsewhere; all of its URL where it does not lie there."""
    source = tidy(str(source))
    root = as_path(source).parent if is_table(source) else as_path(source)
    same = is_url(item) and split_url(str(item))[::2] == split_url(str(source))[::2]
    return as_path(item).relative_to(root).as_posix() if same and as_path(item).is_relative_to(root) else str(item)


def url_fault(url: str) -> str:
    """What is wrong with a URL, by its text alone; "" if nothing is.

    A password or a signature is refused, as a run's folder, results and model card name what was trained on.
    """
    protocol, path, archive = split_url(url)
    shown = masked(url)
    if protocol not in PACKAGES:
        return f"'{shown}': of URLs those of {', '.join(PACKAGES)} are read; of a file on this machine the path alone"
    if protocol == "zip" and (not archive or archive.lower().startswith("zip://")):
        return f"'{shown}' names no archive: zip://FOLDER::FILE.zip, or zip://FOLDER::https://HOST/FILE.zip"
    if protocol == "zip":
        return url_fault(archive) if is_url(archive) else ""
    if shown != url:
        web = "in ~/.netrc (machine HOST login NAME password SECRET)" if protocol in WEB else "in the environment"
        return (
            f"'{shown}' has a password or a signature in it, which would be written into the run's folder. Put it {web}, or "
            "name the object itself, s3://BUCKET/KEY or gs://BUCKET/KEY, with its keys where s3fs and gcsfs look for them"
        )
    return ""


def check_url(item: Any) -> bool:
    """Whether an item is a URL; raises RecipeError for one that can't be read, or must not be written down."""
    if is_url(item) and (fault := url_fault(item)):
        raise RecipeError(fault)
    return is_url(item)


def masked(url: str) -> str:
    """A URL with stars in place of what may be a password, a key or a signature."""
    protocol, path, archive = split_url(url)
    if protocol == "zip":
        return join_url(protocol, path, masked(archive) if is_url(archive) else archive)
    host, slash, rest = path.partition("/")
    if "@" in host and (protocol in WEB or ":" in host):
        host = f"{HIDDEN}@{host.rpartition('@')[2]}"
    place, question, query = rest.partition("?")
    names = [name for name, _ in parse_qsl(query, keep_blank_values=True)] if protocol in WEB else []
    if any(SECRET.search(name) for name in names):
        query = "&".join(f"{name}={HIDDEN}" for name in names)
    return f"{url.partition('://')[0]}://{host}{slash}{place}{question}{query}"
