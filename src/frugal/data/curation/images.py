"""Curation of labelled images: blank ones, copies, near-copies and wrong labels.

Shape letters: N images, C channels, H = W pixels of a side, K classes.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from frugal.data.curation.base import Drop
from frugal.data.curation.pipeline import Account
from frugal.data.documents import Document
from frugal.errors import UserError, require


@dataclass(frozen=True)
class LabelNoise:
    """Find wrong labels by confident learning (Northcutt et al. 2021, arXiv 1911.00068).

    Args:
        folds: parts of the cross-validation; each image is judged by a model that has not seen it.
        neighbours: the model is this many nearest neighbours, by pixels of the image shrunk to 14 x 14.
    """

    folds: int = 5
    neighbours: int = 10

    def __post_init__(self) -> None:
        for name, least in (("folds", 2), ("neighbours", 1)):
            value = getattr(self, name)
            require(value >= least, f"data.curation.label_noise.{name}: must be at least {least}, got {value}")


@dataclass(frozen=True)
class ImageCuration:
    """What training images go through; validation and test images never do. Unreadable ones are left out, too.

    Args:
        blank: leave out images whose pixels (0 to 255) have a smaller standard deviation.
        duplicates: leave out copies, among themselves and of held-out images; of copies with different labels all.
        near_duplicates: leave out images whose 64-bit difference hash is within so many bits of an earlier or held-out
            one's; 2 to 4 suits photographs, and drawings or digits are too alike for it; null is off.
        label_noise: leave out images whose label is likely wrong; null is off.
        examples: images that the report names per reason.
    """

    blank: float = 1.0
    duplicates: bool = True
    near_duplicates: int | None = None
    label_noise: LabelNoise | None = None
    examples: int = 5

    def __post_init__(self) -> None:
        require(self.blank >= 0, f"data.curation.blank: must not be negative, got {self.blank}")
        near = self.near_duplicates
        require(near is None or 0 <= near <= 16, f"data.curation.near_duplicates: must lie in [0, 16], got {near}")


def difference_hash(images_NCHW: np.ndarray) -> np.ndarray:
    """64 bits per image, uint64 [N]: on an 8 x 9 grid of grey means, whether each cell is darker than the next."""
    grey_NHW = images_NCHW.mean(axis=1)
    n, height, width = grey_NHW.shape
    rows = np.linspace(0, height, 9).astype(int)
    columns = np.linspace(0, width, 10).astype(int)
    cells = np.empty((n, 8, 9))
    for i in range(8):
        for j in range(9):
            top, left = rows[i], columns[j]
            block = grey_NHW[:, top : max(rows[i + 1], top + 1), left : max(columns[j + 1], left + 1)]
            cells[:, i, j] = block.mean(axis=(1, 2))
    bits = (cells[:, :, :-1] < cells[:, :, 1:]).reshape(n, 64)
    return (bits.astype(np.uint64) << np.arange(64, dtype=np.uint64)).sum(axis=1, dtype=np.uint64)


def near_pairs(hashes_N: np.ndarray, distance: int) -> list[tuple[int, int]]:
    """Every pair (i, j), i < j, whose hashes differ in at most `distance` bits.

    Hashes are cut into distance + 1 pieces: a near pair agrees in one of them (Manku et al. 2007), so only images that
    share a piece are compared.
    """
    pieces = distance + 1
    edges = np.linspace(0, 64, pieces + 1).astype(int)
    found: set[tuple[int, int]] = set()
    for low, high in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        mask = np.uint64(((1 << (high - low)) - 1) << low)
        buckets: dict[int, list[int]] = defaultdict(list)
        for i, key in enumerate((hashes_N & mask).tolist()):
            buckets[key].append(i)
        for members in buckets.values():
            own = hashes_N[members]
            for place, i in enumerate(members[:-1]):
                apart = np.bitwise_count(own[place + 1 :] ^ own[place])
                found.update((i, members[place + 1 + j]) for j in np.nonzero(apart <= distance)[0].tolist())
    return sorted(found)


def neighbour_probabilities(
    images_NCHW: np.ndarray, labels_N: np.ndarray, n_classes: int, folds: int, neighbours: int
) -> np.ndarray:
    """Each image's class probabilities from its nearest neighbours in the other folds, float64 [N, K].

    Neighbours count by the inverse of their distance; every class has one hundredth of a neighbour for itself.

    Raises:
        UserError: fewer images than folds, or scikit-learn is missing.
    """
    try:
        from sklearn.neighbors import NearestNeighbors
    except ModuleNotFoundError:
        raise UserError("data: scikit-learn is missing; run `pip install -e '.[vision]'`") from None
    n = len(labels_N)
    require(n >= 2 * folds, f"data.curation.label_noise.folds: {folds} folds need at least {2 * folds} images, got {n}")
    features = _shrunk(images_NCHW)
    fold_N = np.empty(n, dtype=np.int64)
    for label in np.unique(labels_N):  # each class spread over the folds, in a fixed order
        mine = np.nonzero(labels_N == label)[0]
        order = np.random.Generator(np.random.Philox(key=[0, int(label)])).permutation(len(mine))
        fold_N[mine[order]] = np.arange(len(mine)) % folds
    weights_NK = np.full((n, n_classes), 0.01)
    for fold in range(folds):
        inside, outside = np.nonzero(fold_N == fold)[0], np.nonzero(fold_N != fold)[0]
        if not len(inside):
            continue
        model = NearestNeighbors(n_neighbors=min(neighbours, len(outside))).fit(features[outside])
        distances, places = model.kneighbors(features[inside])
        closeness = distances.mean() / np.maximum(distances, 1e-6 * max(distances.mean(), 1e-12))
        closeness = np.minimum(closeness, 1e6)
        np.add.at(weights_NK, (inside[:, None], labels_N[outside][places]), closeness)
    return weights_NK / weights_NK.sum(axis=1, keepdims=True)


def _shrunk(images_NCHW: np.ndarray, side: int = 14) -> np.ndarray:
    import torch

    pixels = torch.from_numpy(np.ascontiguousarray(images_NCHW)).float() / 255
    if pixels.shape[-1] > side:
        pixels = torch.nn.functional.adaptive_avg_pool2d(pixels, side)
    return pixels.flatten(1).numpy()


def likely_wrong(probabilities_NK: np.ndarray, labels_N: np.ndarray) -> np.ndarray:
    """Whether each label is likely wrong, bool [N]: the off-diagonal of the confident joint.

    A class's threshold is the mean probability that images labelled so have for it; an image is confidently of the
    likeliest class among those whose threshold it reaches, and its label is wrong if that is another one (Northcutt et
    al. 2021, section 3.1 and method 2 of 3.2).

    Args:
        probabilities_NK: from a model that has not seen the image.
        labels_N: as given.
    """
    n_classes = probabilities_NK.shape[1]
    thresholds_K = np.array(
        [
            probabilities_NK[labels_N == k, k].mean() if (labels_N == k).any() else np.inf  # a class without images
            for k in range(n_classes)
        ]
    )
    reached_NK = np.where(probabilities_NK >= thresholds_K, probabilities_NK, -1.0)
    confident = reached_NK.max(axis=1) >= 0
    return confident & (reached_NK.argmax(axis=1) != labels_N)


class _Sieve:
    """Verdicts, filter by filter, and their accounts."""

    def __init__(self, labels_N: np.ndarray, names: list[str], classes: list[str], bytes_each: int, examples: int):
        self.labels, self.names, self.classes = labels_N, names, classes
        self.bytes, self.examples = bytes_each, examples
        self.kept = list(range(len(labels_N)))
        self.accounts: list[Account] = []

    def drop(self, name: str, reasons: dict[int, str], seconds: float) -> None:
        account = Account(name, seconds=seconds)
        for i in self.kept:
            picture = Document(self.names[i], self.classes[self.labels[i]])
            verdict = Drop(reasons[i]) if i in reasons else picture.text
            account.note(picture, self.bytes, verdict, self.examples)
        self.kept = [i for i in self.kept if i not in reasons]
        self.accounts.append(account)


def curate_images(
    images_NCHW: np.ndarray,
    labels_N: np.ndarray,
    held_out_MCHW: np.ndarray,
    names: list[str],
    classes: list[str],
    config: ImageCuration,
) -> tuple[list[int], list[Account]]:
    """Which training images are kept, by position, and what each filter did.

    Args:
        images_NCHW: training images, uint8.
        labels_N: their classes.
        held_out_MCHW: validation and test images, which are only looked at.
        names: how the report calls each training image.
        classes: how it calls each class.

    Raises:
        UserError: nothing is left of a class that had images.
    """
    sieve = _Sieve(labels_N, names, classes, int(np.prod(images_NCHW.shape[1:])), config.examples)
    if config.blank > 0:
        start = time.process_time()
        deviation_N = images_NCHW.reshape(len(images_NCHW), -1).std(axis=1)
        blank = {i: "blank" for i in np.nonzero(deviation_N < config.blank)[0].tolist()}
        sieve.drop("Blank", blank, time.process_time() - start)
    if config.duplicates:
        start = time.process_time()
        sieve.drop("Copies", _copies(images_NCHW, labels_N, held_out_MCHW, sieve.kept), time.process_time() - start)
    if config.near_duplicates is not None:
        start = time.process_time()
        near = _near_copies(images_NCHW, held_out_MCHW, sieve.kept, config.near_duplicates)
        sieve.drop("NearCopies", near, time.process_time() - start)
    if config.label_noise is not None:
        start = time.process_time()
        kept, noise = np.array(sieve.kept), config.label_noise
        given = labels_N[kept]
        probabilities = neighbour_probabilities(images_NCHW[kept], given, len(classes), noise.folds, noise.neighbours)
        wrong = kept[likely_wrong(probabilities, given)]
        sieve.drop("LabelNoise", {int(i): "label likely wrong" for i in wrong}, time.process_time() - start)
    for label in np.unique(labels_N).tolist():
        if not any(labels_N[i] == label for i in sieve.kept):
            raise UserError(f"data.curation: nothing is left of class {classes[label]}")
    return sieve.kept, sieve.accounts


def _copies(images: np.ndarray, labels: np.ndarray, held_out: np.ndarray, kept: list[int]) -> dict[int, str]:
    there = {image.tobytes() for image in held_out}
    groups: dict[bytes, list[int]] = defaultdict(list)
    reasons: dict[int, str] = {}
    for i in kept:
        content = images[i].tobytes()
        if content in there:
            reasons[i] = "copy of a held-out image"
        else:
            groups[content].append(i)
    for members in groups.values():
        if len({int(labels[i]) for i in members}) > 1:
            reasons |= {i: "copies with different labels" for i in members}
        else:
            reasons |= {i: "copy" for i in members[1:]}
    return reasons


def _near_copies(images: np.ndarray, held_out: np.ndarray, kept: list[int], distance: int) -> dict[int, str]:
    hashes = np.concatenate((difference_hash(held_out), difference_hash(images[kept])))
    reasons: dict[int, str] = {}
    for i, j in near_pairs(hashes, distance):  # ascending, so what an earlier image dropped drops nothing itself
        first, second = i - len(held_out), j - len(held_out)
        if second < 0 or (first >= 0 and kept[first] in reasons):
            continue
        reasons.setdefault(kept[second], "near-copy of a held-out image" if first < 0 else "near-copy")
    return reasons


def image_report(
    labels_N: np.ndarray, kept: list[int], classes: list[str], accounts: list[Account], seconds: float
) -> dict[str, Any]:
    """The same account as that of text, as plain values: counts are of images, coverage is by class."""
    after = np.bincount(labels_N[kept], minlength=len(classes)).tolist()
    lost = sum((account.dropped_by_source for account in accounts), Counter[str]())

    def share(left: int, gone: int) -> dict[str, float]:
        return {"documents": left + gone, "dropped": gone, "share": round(gone / max(left + gone, 1), 4)}

    filters = []
    for account in accounts:
        row = asdict(account) | {"filter": account.name, "seconds": round(account.seconds, 4)}
        row["mb_per_second"] = round(account.bytes_in / 1e6 / account.seconds, 2) if account.seconds else None
        for key in ("reasons", "dropped_by_source"):
            row[key] = dict(getattr(account, key).most_common())
        filters.append({key: value for key, value in row.items() if key != "name"})
    core_seconds, size = sum(account.seconds for account in accounts), sum(account.bytes_in for account in accounts[:1])
    return {
        "unit": "images",
        "documents_in": len(kept) + lost.total(),
        "documents_out": len(kept),
        "bytes_in": size,
        "bytes_out": accounts[-1].bytes_out if accounts else size,
        "seconds": round(seconds, 3),
        "core_seconds": round(core_seconds, 3),
        "mb_per_second_and_core": round(size / 1e6 / core_seconds, 2) if core_seconds else None,
        "filters": filters,
        "coverage": {
            "all": {"all": share(len(kept), lost.total())},
            "class": {name: share(after[i], lost[name]) for i, name in enumerate(classes)},
        },
    }
