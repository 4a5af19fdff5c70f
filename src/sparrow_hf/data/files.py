"""Files of videos and images: by path, by web address, or as bytes."""

import shutil
import tempfile
from http.client import HTTPException
from io import BytesIO
from os import PathLike, fspath
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote
from urllib.request import urlopen

DOWNLOAD_TIMEOUT = 60.0
"""Seconds a server may stay silent."""


def is_url(source: Any) -> bool:
    """Whether a video or image is given by a web address."""
    return isinstance(source, str) and source.startswith(("http://", "https://"))


def find_file(
    source: str | PathLike[str] | bytes, kind: str, error_class: type[ValueError]
) -> tuple[str, Path | BinaryIO]:
    """What to call a file in an error, and the file: its absolute path, or an open file that was downloaded or given.

    Args:
        kind: What the file should be, "video" or "image".

    Raises:
        error_class: There is no such file, it is empty, or it cannot be downloaded.
    """
    if is_url(source):
        return str(source), download(str(source), error_class)
    if isinstance(source, bytes):
        name = f"The {kind} of {len(source)} bytes"
        if not source:
            raise error_class(f"{name} is an empty file. Record or download the {kind} again.")
        return name, BytesIO(source)
    path = Path(fspath(source))
    name = str(path) if len(str(path)) <= 200 else f"{str(path)[:100]}…{str(path)[-80:]}"
    try:
        if path.is_dir():
            raise error_class(f"{name} is a folder, not a {kind} file. Give the path of one file.")
        if not path.is_file():
            raise error_class(f"There is no {kind} file at {name}. Check the path.")
        if path.stat().st_size == 0:
            raise error_class(f"{name} is an empty file. Record or download the {kind} again.")
    except OSError as error:
        raise error_class(f"{name} cannot be the path of a {kind} file ({error.strerror}). Check the path.") from error
    return name, path.absolute()


def download(url: str, error_class: type[ValueError]) -> BinaryIO:
    """The file at an address, in a temporary file that is gone when it is closed.

    Raises:
        error_class: The server does not answer, or sends less than it announced.
    """
    file = tempfile.TemporaryFile()  # noqa: SIM115, it is handed on
    try:
        # Spaces and letters beyond ASCII as servers expect them; what is written so already stays as it is.
        with urlopen(quote(url, safe="%/:=&?~#+!$,;'@()*[]"), timeout=DOWNLOAD_TIMEOUT) as response:
            shutil.copyfileobj(response, file)
            announced = response.headers.get("Content-Length")
        if announced is not None and file.tell() < int(announced):
            raise OSError(f"{file.tell()} of {announced} bytes arrived")
    except (OSError, ValueError, HTTPException) as error:
        file.close()
        raise error_class(
            f"{url} cannot be downloaded ({type(error).__name__}: {error}). Check the address, or fetch it yourself."
        ) from error
    file.seek(0)
    return file
