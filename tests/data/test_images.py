"""Labelled images: what each file format becomes, and what is said of files that cannot be used."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from frugal.data.curation.images import ImageCuration
from frugal.data.decoding import Unreadable, decode
from frugal.data.image_store import TEST, TRAIN, VAL, PreparedImages, prepare_images
from frugal.data.images import HubImages, ImageFolder, ImageSource, MnistDigits, Picture, SklearnDigits
from frugal.errors import UserError

LIMIT = 1_000_000
RAMP = np.linspace(0, 255, 16 * 16).reshape(16, 16).astype(np.uint8)


def as_file(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pixels(content: Any, channels: int = 1, size: int = 16) -> np.ndarray:
    return decode(Picture(content, 0, "it"), channels, size, LIMIT)


def test_grey_pixels_stay_as_they_are() -> None:
    assert np.array_equal(pixels(as_file(Image.fromarray(RAMP), "PNG"))[0], RAMP)
    assert np.array_equal(pixels(RAMP, channels=3), np.stack([RAMP] * 3))


def test_every_mode_becomes_grey_or_colour() -> None:
    colour = np.zeros((16, 16, 3), np.uint8)
    colour[..., 0] = 255  # red
    red = Image.fromarray(colour)
    expected = np.array([255, 0, 0])
    files = {
        "palette": as_file(red.convert("P"), "PNG"),
        "cmyk": as_file(red.convert("CMYK"), "TIFF"),
        "rgba": as_file(red.convert("RGBA"), "PNG"),
        "gif": as_file(red, "GIF"),
    }
    for name, content in files.items():
        assert np.abs(pixels(content, channels=3)[:, 8, 8].astype(int) - expected).max() <= 2, name
        assert abs(int(pixels(content)[0, 8, 8]) - 76) <= 2, name  # 0.299 of red (ITU-R 601)
    sixteen_bits = Image.fromarray(RAMP.astype(np.uint16) * 257)
    assert np.array_equal(pixels(as_file(sixteen_bits, "PNG"))[0], RAMP)
    black_or_white = Image.fromarray(RAMP > 127)
    assert set(np.unique(pixels(as_file(black_or_white, "PNG")))) == {0, 255}


def test_what_is_transparent_is_white() -> None:
    image = Image.fromarray(RAMP).convert("RGBA")
    image.putalpha(0)
    assert (pixels(as_file(image, "PNG"), channels=3) == 255).all()
    palette = Image.fromarray(np.zeros((16, 16), np.uint8), "P")
    assert (pixels(as_file(palette, "PNG", transparency=0)) == 255).all()


def test_the_middle_square_is_cut_out_and_turned_upright() -> None:
    wide = np.zeros((10, 30), np.uint8)
    wide[:, 10:20] = 200
    assert (pixels(wide, size=10) == 200).all()
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by a quarter
    content = as_file(Image.fromarray(RAMP), "TIFF", exif=exif)
    assert np.array_equal(pixels(content)[0], np.rot90(RAMP, -1))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"no picture at all", "no image, or a damaged one"),
        (as_file(Image.fromarray(RAMP), "PNG")[:-30], "truncated or damaged"),
        (as_file(Image.effect_noise((64, 64), 99), "JPEG")[:900], "truncated or damaged"),
        (as_file(Image.new("1", (4000, 4000)), "PNG"), "more than 1,000,000 pixels"),
        (as_file(Image.new("1", (20000, 20000)), "PNG"), "more than 1,000,000 pixels"),  # a decompression bomb
        (as_file(Image.fromarray(RAMP.astype(np.float32)), "TIFF"), "floating-point pixels"),
        (as_file(Image.fromarray(RAMP.astype(np.int32) * 100_000), "TIFF"), "32-bit pixels"),
    ],
    ids=["text", "truncated png", "truncated jpeg", "large", "bomb", "float", "int32"],
)
def test_unusable_files_are_refused_with_a_reason(content: bytes, reason: str) -> None:
    with pytest.raises(Unreadable, match=reason):
        pixels(content)


def test_the_packaged_digits() -> None:
    for source, counts in ((MnistDigits(), (4000, 1000)), (SklearnDigits(), (1437, 360))):
        found = list(source.pictures())
        assert tuple(sum(p.split == split for p in found) for split in ("train", "test")) == counts
        assert {p.label for p in found} == set(range(10)) and source.class_names() == list("0123456789")
        top = max(int(p.image.max()) for p in found[:100])
        assert top == 255
    by_class = np.bincount([p.label for p in MnistDigits().pictures() if p.split == "test"])
    assert by_class.tolist() == [100] * 10


def folder(root: Path, classes: str = "ab", n: int = 20, seed: int = 0) -> Path:
    rng = np.random.default_rng(seed)
    for name in classes:
        (root / name).mkdir(parents=True)
        for i in range(n):
            Image.fromarray(rng.integers(0, 255, (9, 9), np.uint8)).save(root / name / f"{i:02}.png")
    return root


def prepared(source: ImageSource, tmp_path: Path, **changes: Any) -> PreparedImages:
    values: dict[str, Any] = {
        "image_size": 8,
        "channels": 1,
        "n_classes": 2,
        "val_fraction": 0.2,
        "cache_dir": str(tmp_path / "cache"),
        "max_pixels": LIMIT,
        "curation": None,
    }
    return prepare_images(source, **(values | changes))


def test_a_folder_of_images(tmp_path: Path) -> None:
    root = folder(tmp_path / "shapes")
    found = prepared(ImageFolder(str(root)), tmp_path)
    assert found.class_names == ["a", "b"] and found.images.shape == (40, 1, 8, 8)
    assert found.labels.tolist() == [0] * 20 + [1] * 20
    assert len(found.of(TRAIN)) + len(found.of(VAL)) == 40 and 0 < len(found.of(VAL)) < 20 and not len(found.of(TEST))
    expected = decode(Picture(root / "b" / "03.png", 1, ""), 1, 8, LIMIT)
    assert np.array_equal(found.images[23], expected)
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(root / "b" / "99.png")  # changed content is found
    assert len(prepared(ImageFolder(str(root)), tmp_path).labels) == 41


def test_copies_lie_on_one_side(tmp_path: Path) -> None:
    root = folder(tmp_path / "shapes", n=30)
    for file in sorted((root / "a").iterdir()):
        (root / "a" / f"copy{file.name}").write_bytes(file.read_bytes())
    found = prepared(ImageFolder(str(root)), tmp_path)
    side = {image.tobytes(): split for image, split in zip(found.images, found.splits, strict=True)}
    assert all(side[image.tobytes()] == split for image, split in zip(found.images, found.splits, strict=True))


def test_a_test_folder_is_only_for_testing(tmp_path: Path) -> None:
    train, test = folder(tmp_path / "train"), folder(tmp_path / "test", n=5, seed=1)
    found = prepared(ImageFolder(str(train), str(test)), tmp_path)
    assert found.labels[found.of(TEST)].tolist() == [0] * 5 + [1] * 5
    (test / "c").mkdir()
    with pytest.raises(UserError, match=r"data\.source\.test_path: .* has a class 'c' that .*train has not"):
        prepared(ImageFolder(str(train), str(test)), tmp_path)


def test_a_local_dataset_of_the_datasets_library(tmp_path: Path) -> None:
    import datasets

    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 255, (8, 8), np.uint8)) for _ in range(30)]
    features = datasets.Features({"picture": datasets.Image(), "kind": datasets.ClassLabel(names=["cat", "dog"])})
    rows = {"picture": images, "kind": [i % 2 for i in range(30)]}
    (tmp_path / "pets").mkdir()
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / "pets" / "train.parquet"))
    source = HubImages(str(tmp_path / "pets"), image="picture", label="kind")
    found = prepared(source, tmp_path)
    assert found.class_names == ["cat", "dog"] and found.labels.tolist() == [i % 2 for i in range(30)]
    assert np.array_equal(found.images[7, 0], np.asarray(images[7]))
    with pytest.raises(UserError, match=r"data\.source\.image: .* has no column 'image'; it has picture, kind"):
        prepared(HubImages(str(tmp_path / "pets")), tmp_path)
    with pytest.raises(UserError, match=r"data\.source\.path: cannot load .*nowhere"):
        prepared(HubImages(str(tmp_path / "nowhere")), tmp_path)


class Pictures(ImageSource):
    name = "pictures"

    def __init__(self, pictures: list[Picture]) -> None:
        self.all = pictures

    def class_names(self) -> list[str]:
        return []

    def pictures(self) -> Any:
        return iter(self.all)

    def fingerprint(self) -> str:
        return str(id(self))


def test_faults_of_a_source_are_one_line(tmp_path: Path) -> None:
    root = folder(tmp_path / "shapes")
    with pytest.raises(UserError, match=r"data\.n_classes: shapes has 2 classes \(a, b, \.\.\.\), not 10"):
        prepared(ImageFolder(str(root)), tmp_path, n_classes=10)
    (root / "empty").mkdir()
    with pytest.raises(UserError, match=r"data\.source\.path: the class folder .*empty holds no images"):
        prepared(ImageFolder(str(root)), tmp_path, n_classes=3)
    with pytest.raises(UserError, match=r"needs one sub-folder of images per class; found 0"):
        prepared(ImageFolder(str(root / "a")), tmp_path)
    with pytest.raises(UserError, match=r"data\.source\.path: no folder"):
        prepared(ImageFolder(str(root / "none")), tmp_path)
    for label in (-1, 2):
        with pytest.raises(UserError, match=rf"data\.n_classes: it has the label {label}; with 2 classes .* 0 to 1"):
            prepared(Pictures([Picture(RAMP, label, "it")]), tmp_path)
    with pytest.raises(UserError, match="holds no readable image"):
        prepared(Pictures([]), tmp_path)
    assert not list((tmp_path / "cache").glob("images-*"))  # nothing half-made is left


def test_an_unreadable_image_stops_or_is_left_out(tmp_path: Path) -> None:
    root = folder(tmp_path / "shapes")
    (root / "a" / "05.png").write_bytes((root / "a" / "05.png").read_bytes()[:60])
    with pytest.raises(UserError, match=r"data\.source: .*a/05\.png: .*; mend or remove it, or let data\.curation"):
        prepared(ImageFolder(str(root)), tmp_path)
    found = prepared(ImageFolder(str(root)), tmp_path, curation=ImageCuration())
    assert len(found.labels) == 39 and (found.folder / "curation.png").is_file()
    report = (found.folder / "curation.md").read_text()
    kept = len(found.of(TRAIN))
    assert f"{kept + 1} images" in report and f"{kept} images" in report and "truncated or damaged 1" in report
    test = folder(tmp_path / "test", n=2, seed=1)
    (test / "b" / "00.png").write_bytes(b"x")
    with pytest.raises(UserError, match=r"test/b/00\.png: no image, or a damaged one; mend or remove it$"):
        prepared(ImageFolder(str(root), str(test)), tmp_path, curation=ImageCuration())
