"""Files that are whole or absent: the cache folder, and writing through a temporary file that is renamed when complete."""
import os
from collections.abc import Callable
from pathlib import Path


def cache_folder() -> Path:
    """Where downloads and checkpoints go: the environment variable ADVCOURSE_CACHE, else ~/.cache/advcourse.

    Created when missing; OSError naming the folder when it cannot be created or written to.
    """
    folder = Path(os.environ.get("ADVCOURSE_CACHE") or Path.home() / ".cache" / "advcourse")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe.{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OSError(f"cache folder {folder} cannot be written ({error.strerror}): set ADVCOURSE_CACHE to one that can") \
            from error
    return folder


def replace(path: Path, write: Callable[[Path], object]) -> None:
    """Have `write` fill a temporary file beside path, then rename it: path is never half-written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        write(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
