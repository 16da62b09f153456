"""Embedded data sets against their digests; downloads against a local server that truncates, corrupts and refuses."""
import gzip
import hashlib
import io
import json
import pickle
import runpy
import struct
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch

from advcourse import data, download
from advcourse.files import cache_folder, replace

DATASETS = Path(data.__file__).parent / "datasets"


# ---------------------------------------------------------------- embedded

@pytest.mark.parametrize("file", sorted(DATASETS.glob("*/*.npz")), ids=lambda f: f.stem)
def test_embedded_arrays_have_the_recorded_digests(file):
    digest = runpy.run_path(str(DATASETS / "make_data.py"))["digest"]
    with np.load(file, allow_pickle=False) as arrays:
        assert digest(dict(arrays)) == json.loads((DATASETS / "digests.json").read_text())[file.parent.name]


@pytest.mark.parametrize("load, split, size", [(data.mnist, "train", 10_000), (data.mnist, "test", 2_000),
                                               (data.fashion_mnist, "train", 2_000), (data.fashion_mnist, "test", 500)])
def test_images_are_batches_in_the_box(load, split, size):
    x, y = load(split)
    assert x.shape == (size, 1, 28, 28) and x.dtype == torch.float32 and y.shape == (size,) and y.dtype == torch.int64
    assert x.min() == 0 and x.max() == 1 and sorted(y.unique().tolist()) == list(range(10))
    few_x, few_y = load(split, 7)
    assert torch.equal(few_x, x[:7]) and torch.equal(few_y, y[:7])


def test_first_test_digits_are_the_official_ones():
    assert data.mnist("test", 10)[1].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]
    assert data.mnist("train", 5)[1].tolist() == [5, 0, 4, 1, 9]
    assert [data.fashion_classes()[k] for k in data.fashion_mnist("train", 2)[1]] == ["Ankle boot", "T-shirt/top"]


@pytest.mark.parametrize("n", [0, -1, 2_001, 3.0, "5"])
def test_n_out_of_range_is_named(n):
    with pytest.raises(ValueError, match="n="):
        data.mnist("test", n)


@pytest.mark.parametrize("load", [data.mnist, data.fashion_mnist, data.reviews, data.cifar10])
def test_unknown_split_is_named(load):
    with pytest.raises(ValueError, match="split='tset'"):
        load("tset")


def test_cifar10_is_not_embedded():
    with pytest.raises(ValueError, match="full=False"):
        data.cifar10("test", full=False)


def test_reviews_are_balanced_sentences_and_no_sentence_is_in_two_splits():
    splits = {s: data.reviews(s) for s in ("train", "validation", "test")}
    assert [len(text) for text, _ in splits.values()] == [8_057, 991, 1_024]
    for text, y in splits.values():
        assert y.shape == (len(text),) and y.dtype == torch.int64 and 0.45 < y.float().mean() < 0.55
    lowered = [{t.lower() for t in text} for text, _ in splits.values()]
    assert not (lowered[0] & lowered[1] or lowered[0] & lowered[2] or lowered[1] & lowered[2])
    text, y = data.reviews("train", 3)
    assert text == splits["train"][0][:3] and torch.equal(y, splits["train"][1][:3])


@pytest.mark.parametrize("pra, tau", [(0, 0), (0, 5), (3, 20), (4, 60)])
def test_hcas_computes_what_its_file_says(pra, tau):
    model, box = data.hcas(pra, tau)
    with np.load(DATASETS / "hcas/hcas_nets.npz") as d:
        i, j = d["pra"].tolist().index(pra), d["tau"].tolist().index(tau)
        x = np.random.default_rng(0).uniform(d["input_min"], d["input_max"], (1_000, 3))
        h = (x - d["input_mean"]) / d["input_range"]
        for k in range(6):
            h = h @ d[f"W{k}"][i, j].T + d[f"b{k}"][i, j]
            h = np.maximum(h, 0) if k < 5 else h
    np.testing.assert_allclose(model.double()(torch.from_numpy(x)).numpy(), h, atol=1e-5)
    assert bool((box.lower < box.upper).all()) and not model.training


def test_hcas_has_the_island_of_strong_left():
    model, _ = data.hcas(0, 5)
    assert data.HCAS_ADVISORIES[model(torch.tensor([[8_025.0, 12_600.0, -1.57]])).argmax()] == "strong left"


def test_hcas_unknown_network_is_named():
    with pytest.raises(ValueError, match="pra=5"):
        data.hcas(5, 5)
    with pytest.raises(ValueError, match="tau=7"):
        data.hcas(0, 7)


def test_photos_and_class_names():
    photos = data.photos()
    assert set(photos) == {"cat", "espresso", "rocket", "astronaut"} and len(data.imagenet_classes()) == 1_000
    assert all(p.shape == (3, 224, 224) and p.dtype == torch.float32 and 0 <= p.min() < p.max() <= 1 for p in photos.values())
    assert data.imagenet_classes()[967] == "espresso"


# ---------------------------------------------------------------- downloads

CONTENT = np.random.default_rng(0).integers(0, 255, 300_000, dtype=np.uint8).tobytes()
ZIPPED = gzip.compress(CONTENT)
SHA = hashlib.sha256(CONTENT).hexdigest()


class Server(BaseHTTPRequestHandler):
    """Serves `files`; the first path element says how: good, plain (ignores Range), cut (sends half of what it promised,
    each time), cut-once, corrupt, empty, refuse (404), busy (503)."""

    files = {"x.gz": ZIPPED, "x": CONTENT}
    seen: list[tuple[str, str | None]] = []

    def do_GET(self):
        how, name = self.path.strip("/").split("/", 1)
        wanted = self.headers.get("Range")
        type(self).seen.append((self.path, wanted))
        if how in ("refuse", "busy"):
            return self.send_error(404 if how == "refuse" else 503)
        body = self.files[name]
        if how == "corrupt":
            body = body[:1_000] + bytes([body[1_000] ^ 1]) + body[1_001:]
        if how == "empty":
            body = b""
        start = 0
        if wanted and how != "plain":
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            if start >= len(body):
                return self.send_error(416)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        else:
            self.send_response(200)
        body = body[start:]
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        cut = how == "cut" or (how == "cut-once" and not wanted)
        self.wfile.write(body[:len(body) // 2] if cut else body)

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def address():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ADVCOURSE_CACHE", str(tmp_path / "cache"))
    Server.seen.clear()
    return tmp_path / "cache"


def left(cache):
    return sorted(str(p.relative_to(cache)) for p in cache.rglob("*") if p.is_file())


@pytest.mark.parametrize("how", ["good", "plain", "cut-once"])
@pytest.mark.parametrize("gunzip", [True, False])
def test_download_arrives_whole_and_is_kept(address, cache, how, gunzip):
    urls = [f"{address}/{how}/x{'.gz' if gunzip else ''}"]
    path = download.fetch("set/x", urls, SHA, gunzip=gunzip)
    assert path.read_bytes() == CONTENT and left(cache) == ["set/x"]
    requests = len(Server.seen)
    assert download.fetch("set/x", urls, SHA, gunzip=gunzip) == path and len(Server.seen) == requests  # not asked again


def test_interrupted_download_goes_on_where_it_stopped(address, cache, monkeypatch):
    monkeypatch.setattr(download, "TRIES", 1)
    with pytest.raises(OSError, match="ended after 150,000 of 300,000 bytes"):
        download.fetch("x", [f"{address}/cut/x"], SHA)
    (part,) = left(cache)
    (cache / part).rename(cache / part.replace(part.split(".")[1], _mark(f"{address}/good/x")))
    assert download.fetch("x", [f"{address}/good/x"], SHA).read_bytes() == CONTENT
    assert Server.seen[-1] == ("/good/x", "bytes=150000-") and left(cache) == ["x"]


def _mark(url):
    return hashlib.sha256(url.encode()).hexdigest()[:8]


def test_server_that_ignores_range_starts_again(address, cache):
    cache.mkdir()
    (cache / f"x.{_mark(address + '/plain/x')}.part").write_bytes(CONTENT[:1_000])
    assert download.fetch("x", [f"{address}/plain/x"], SHA).read_bytes() == CONTENT
    assert Server.seen == [("/plain/x", "bytes=1000-")]


def test_complete_part_needs_no_more_bytes(address, cache):
    cache.mkdir()
    (cache / f"x.{_mark(address + '/good/x')}.part").write_bytes(CONTENT)
    assert download.fetch("x", [f"{address}/good/x"], SHA).read_bytes() == CONTENT and left(cache) == ["x"]


def test_every_cut_connection_brings_a_part_and_the_last_failure_is_told(address, cache):
    with pytest.raises(OSError, match=r"x could not be downloaded.*ended after 262,500 of 300,000"):
        download.fetch("x", [f"{address}/cut/x"], SHA)  # three tries, half of the rest each
    assert len(left(cache)) == 1 and left(cache)[0].endswith(".part")


@pytest.mark.parametrize("how", ["corrupt", "empty"])
@pytest.mark.parametrize("gunzip", [True, False])
def test_corrupted_download_is_refused_and_leaves_nothing(address, cache, how, gunzip):
    with pytest.raises(OSError, match="x could not be downloaded"):
        download.fetch("x", [f"{address}/{how}/x{'.gz' if gunzip else ''}"], SHA, gunzip=gunzip)
    assert left(cache) == []


def test_corrupted_part_is_not_resumed_twice(address, cache):
    cache.mkdir()
    (cache / f"x.{_mark(address + '/good/x')}.part").write_bytes(b"\0" * 1_000)
    with pytest.raises(OSError, match="SHA-256"):
        download.fetch("x", [f"{address}/good/x"], SHA)
    assert download.fetch("x", [f"{address}/good/x"], SHA).read_bytes() == CONTENT


@pytest.mark.parametrize("how, code", [("refuse", "404"), ("busy", "503")])
def test_refused_download_names_the_mirror(address, cache, how, code):
    with pytest.raises(OSError, match=f"{address}/{how}/x: HTTP Error {code}"):
        download.fetch("x", [f"{address}/{how}/x"], SHA)
    assert left(cache) == []


def test_no_server_at_all(cache):
    with pytest.raises(OSError, match="http://127.0.0.1:9/x"):
        download.fetch("x", ["http://127.0.0.1:9/x"], SHA)
    assert left(cache) == []


def test_next_mirror_is_tried(address, cache):
    urls = [f"{address}/{how}/x.gz" for how in ("refuse", "corrupt", "cut", "good")]
    assert download.fetch("x", urls, SHA, gunzip=True).read_bytes() == CONTENT


def test_damaged_cache_is_downloaded_again(address, cache):
    path = download.fetch("x", [f"{address}/good/x"], SHA)
    path.write_bytes(CONTENT[:-1])
    assert download.fetch("x", [f"{address}/good/x"], SHA).read_bytes() == CONTENT


@pytest.mark.parametrize("place", ["/proc/advcourse", "file/below"])
def test_cache_folder_that_cannot_be_written(place, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("a file, not a folder")
    monkeypatch.setenv("ADVCOURSE_CACHE", str(tmp_path / place))
    with pytest.raises(OSError, match="cache folder .* cannot be written"):
        cache_folder()
    with pytest.raises(OSError, match="ADVCOURSE_CACHE"):
        data.mnist("test", full=True)


def test_replace_leaves_the_old_file_when_writing_fails(tmp_path):
    path = tmp_path / "kept"
    path.write_text("old")

    def write(part):
        part.write_text("half")
        raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError):
        replace(path, write)
    assert path.read_text() == "old" and left(tmp_path) == ["kept"]


def _serve(monkeypatch, address, name, files):
    """The server holds these official file names, and the loader's checksums are theirs."""
    monkeypatch.setattr(Server, "files", {f: gzip.compress(b) if name != "cifar10" else b for f, b in files.items()})
    monkeypatch.setitem(download.MIRRORS, name, [f"{address}/good/"])
    sums = {f.removesuffix(".gz"): hashlib.sha256(b).hexdigest() for f, b in files.items()}
    monkeypatch.setitem(download.SHA256, name, sums if name != "cifar10" else {f: hashlib.sha256(b).hexdigest()
                                                                            for f, b in files.items()})


@pytest.mark.parametrize("name, load", [("mnist", data.mnist), ("fashion_mnist", data.fashion_mnist)])
def test_full_set_is_read_from_official_idx_files(address, cache, monkeypatch, name, load):
    x, y = load("test", 100)
    files = {"t10k-images-idx3-ubyte.gz": struct.pack(">IIII", 2051, 100, 28, 28) + (x * 255).byte().numpy().tobytes(),
             "t10k-labels-idx1-ubyte.gz": struct.pack(">II", 2049, 100) + y.byte().numpy().tobytes()}
    _serve(monkeypatch, address, name, files)
    full_x, full_y = load("test", full=True)
    assert torch.equal(full_x, x) and torch.equal(full_y, y)
    with pytest.raises(ValueError, match="n=101"):
        load("test", 101, full=True)


def _cifar_archive(payload):
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w:gz") as tar:
        for batch in [f"data_batch_{k}" for k in range(1, 6)] + ["test_batch"]:
            blob = payload(batch)
            info = tarfile.TarInfo(f"cifar-10-batches-py/{batch}")
            info.size = len(blob)
            tar.addfile(info, io.BytesIO(blob))
    return raw.getvalue()


def _python2_pickle(pixels, labels):
    """The batch as Python 2 wrote it: protocol 2, byte strings as str, numpy's old module names."""
    string = lambda b: b"T" + struct.pack("<i", len(b)) + b  # noqa: E731 - the opcode BINSTRING
    array = (b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + string(b"b") + b"\x87R(K\x01K"
             + bytes([len(pixels)]) + b"M" + struct.pack("<H", pixels.shape[1]) + b"\x86cnumpy\ndtype\n" + string(b"u1")
             + b"K\x00K\x01\x87R(K\x03" + string(b"|") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
             + string(pixels.tobytes()) + b"tb")
    return (b"\x80\x02}(" + string(b"data") + array + string(b"labels") + b"](" + b"".join(b"K" + bytes([k]) for k in labels)
            + b"eu.")


def test_full_cifar10_is_read_without_running_what_is_pickled(address, cache, monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 3072), dtype=np.uint8)
    archive = _cifar_archive(lambda b: _python2_pickle(pixels, [3, 1, 4, 1]))
    _serve(monkeypatch, address, "cifar10", {"cifar-10-python.tar.gz": archive})
    x, y = data.cifar10("train")
    assert x.shape == (20, 3, 32, 32) and y.tolist() == [3, 1, 4, 1] * 5
    np.testing.assert_array_equal((x[:4] * 255).round().byte().numpy().reshape(4, -1), pixels)
    bad = pickle.dumps({b"data": print}, protocol=2)
    _serve(monkeypatch, address, "cifar10", {"cifar-10-python.tar.gz": _cifar_archive(lambda b: bad)})
    with pytest.raises(pickle.UnpicklingError, match="not allowed"):
        data.cifar10("test")
