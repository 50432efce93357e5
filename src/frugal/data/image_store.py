"""Images decoded once: uint8 pixels of one size on a memory map, cached by everything they depend on.

Shape letters: N images, C channels, S pixels of a side.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from frugal.data.cache import new_folder
from frugal.data.curation.base import Drop
from frugal.data.curation.images import Account, ImageCuration, curate_images, image_report
from frugal.data.curation.report import write_report
from frugal.data.decoding import Unreadable, decode
from frugal.data.documents import Document
from frugal.data.images import ImageSource, Picture
from frugal.data.progress import progress_bar
from frugal.errors import UserError, require

log = logging.getLogger(__name__)
VERSION = 1  # part of the cache's key: raise it when the pixels change
TRAIN, VAL, TEST = 0, 1, 2


@dataclass(frozen=True)
class PreparedImages:
    """A prepared set of images.

    Args:
        images: uint8 [N, C, S, S], on a memory map.
        labels: int64 [N].
        splits: which images train, validate and test, by position: 0, 1, 2, [N]; -1 for those that curation left out.
        class_names: by number.
        folder: where all of it lies.
        fingerprint: of source and settings.
        meta: seconds by stage, and counts.
    """

    images: np.ndarray
    labels: np.ndarray
    splits: np.ndarray
    class_names: list[str]
    folder: Path
    fingerprint: str
    meta: dict[str, Any]

    def of(self, split: int) -> np.ndarray:
        """The positions of a split's images."""
        return np.nonzero(self.splits == split)[0]


def prepare_images(
    source: ImageSource,
    image_size: int,
    channels: int,
    n_classes: int,
    val_fraction: float,
    cache_dir: str,
    max_pixels: int,
    curation: ImageCuration | None,
) -> PreparedImages:
    """Decode, split, curate; or find it in the cache.

    Which training images are held out for validation follows from the hash of their pixels, so copies lie on one side.
    Where the source has no test split, the validation images are it.

    Raises:
        UserError: an image that cannot be read (with curation it is left out instead), a label out of range, a split
            without images.
    """
    facts = [VERSION, source.fingerprint(), image_size, channels, n_classes, val_fraction, max_pixels]
    facts.append(asdict(curation) if curation else None)
    fingerprint = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    folder = Path(cache_dir).expanduser() / f"images-{fingerprint[:16]}"
    if not (folder / "meta.json").is_file():
        with new_folder(folder, "meta.json") as temporary:
            _prepare(source, image_size, channels, n_classes, val_fraction, max_pixels, curation, temporary)
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8")) | {"fingerprint": fingerprint}
    pixels = np.memmap(folder / "images.bin", np.uint8, "r", shape=tuple(meta["shape"]))
    labels, splits = np.load(folder / "labels.npy"), np.load(folder / "splits.npy")
    return PreparedImages(pixels, labels, splits, meta["class_names"], folder, fingerprint, meta)


def _decoded(
    source: ImageSource, channels: int, size: int, max_pixels: int
) -> Iterator[tuple[Picture, np.ndarray | str]]:
    """Each picture with its pixels, or why there are none; a few threads decode ahead."""

    def one(picture: Picture) -> np.ndarray | str:
        try:
            return decode(picture, channels, size, max_pixels)
        except Unreadable as error:
            return str(error)

    pictures = source.pictures()
    with ThreadPoolExecutor(4) as pool:
        while chunk := list(itertools.islice(pictures, 256)):
            yield from zip(chunk, pool.map(one, chunk), strict=True)


def _prepare(
    source: ImageSource,
    image_size: int,
    channels: int,
    n_classes: int,
    val_fraction: float,
    max_pixels: int,
    curation: ImageCuration | None,
    folder: Path,
) -> None:
    start = time.perf_counter()
    classes = source.class_names() or [str(i) for i in range(n_classes)]
    require(
        len(classes) == n_classes,
        f"data.n_classes: {source.name} has {len(classes)} classes ({', '.join(classes[:5])}, ...), not {n_classes}",
    )
    labels, splits, names = [], [], []
    readable = Account("Readable")
    with (folder / "images.bin").open("wb") as file, progress_bar() as progress:
        for n, (picture, pixels) in enumerate(_decoded(source, channels, image_size, max_pixels)):
            if n % 256 == 0:
                progress(f"decoding: {n:,} images", None)
            if not 0 <= picture.label < n_classes:
                raise UserError(
                    f"data.n_classes: {picture.name} has the label {picture.label}; with {n_classes} classes labels go "
                    f"from 0 to {n_classes - 1}"
                )
            known = Document(picture.name, classes[picture.label])
            if isinstance(pixels, str):
                # An unreadable image cannot be scored: only of training images may some be left out.
                if curation is None or picture.split == "test":
                    raise UserError(
                        f"data.source: {picture.name}: {pixels}; mend or remove it"
                        + (", or let data.curation leave it out" if picture.split == "train" else "")
                    )
                readable.note(known, channels * image_size**2, Drop(pixels), curation.examples)
                continue
            file.write(pixels.tobytes())
            labels.append(picture.label)
            names.append(picture.name)
            splits.append(TEST if picture.split == "test" else _train_or_val(pixels, val_fraction))
            if splits[-1] == TRAIN:
                readable.note(known, pixels.size, known.text, 0)
    require(bool(labels), f"data.source: {source.name} holds no readable image")
    split_N, label_N = np.array(splits, dtype=np.int8), np.array(labels, dtype=np.int64)
    shape = (len(labels), channels, image_size, image_size)
    pixels_N = np.memmap(folder / "images.bin", np.uint8, "r", shape=shape)
    seconds = {"decoding": time.perf_counter() - start}
    if curation is not None:
        start = time.perf_counter()
        train = np.nonzero(split_N == TRAIN)[0]
        require(len(train) > 0, f"data.curation: {source.name} has no training images")
        held_out = np.asarray(pixels_N[split_N != TRAIN])
        chosen = np.asarray(pixels_N[train])
        kept, accounts = curate_images(chosen, label_N[train], held_out, [names[i] for i in train], classes, curation)
        seconds["curation"] = time.perf_counter() - start
        report = image_report(label_N[train], kept, classes, [readable, *accounts], seconds["curation"])
        write_report(report, folder)
        left_out = np.setdiff1d(np.arange(len(train)), kept)
        split_N[train[left_out]] = -1
        log.info("curated: %s of %s training images are kept", f"{len(kept):,}", f"{len(train):,}")
    for split, key in ((TRAIN, "training"), (VAL, "validation")):
        require(
            bool((split_N == split).any()),
            f"data.val_fraction: {val_fraction} of {len(labels)} images leaves no {key} image",
        )
    np.save(folder / "labels.npy", label_N)
    np.save(folder / "splits.npy", split_N)
    meta = {"shape": shape, "class_names": classes, "source": source.name, "seconds_by_stage": seconds}
    (folder / "meta.json").write_text(json.dumps(meta) + "\n", encoding="utf-8")


def _train_or_val(pixels: np.ndarray, val_fraction: float) -> int:
    digest = hashlib.blake2b(pixels.tobytes(), digest_size=8).digest()
    return VAL if int.from_bytes(digest, "big") < val_fraction * 2**64 else TRAIN
