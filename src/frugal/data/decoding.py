"""From whatever an image file holds to square pixels of one kind."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from frugal.data.images import Picture


class Unreadable(Exception):
    """An image that cannot be used; the message is the reason, in a few words."""


def decode(picture: Picture, channels: int, size: int, max_pixels: int) -> np.ndarray:
    """Pixels of one image, uint8 [channels, size, size].

    Any mode becomes grey or colour: palettes and CMYK are converted, transparency is laid on white, 16-bit grey is
    divided by 257. The image is turned as its EXIF tag says, its middle square cut out and resized. Of an animation the
    first picture counts.

    Args:
        picture: the image as its source has it.
        channels: 1 for grey, 3 for colour.
        size: height and width of the result.
        max_pixels: larger images are refused before their pixels are read (a small file can expand to gigabytes).

    Raises:
        Unreadable: it is corrupt, truncated, too large, or has pixels that mean nothing here.
    """
    from PIL import Image, ImageOps

    source = picture.image
    if isinstance(source, np.ndarray):
        image = Image.fromarray(source)
    elif isinstance(source, Image.Image):
        image = source
    else:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is lower
                image = Image.open(source if isinstance(source, str | Path) else io.BytesIO(source))
        except Image.DecompressionBombError:
            raise Unreadable(f"more than {max_pixels:,} pixels") from None
        except Exception:  # each format's reader fails in ways of its own
            raise Unreadable("no image, or a damaged one") from None
    if image.width * image.height > max_pixels:
        raise Unreadable(f"more than {max_pixels:,} pixels")
    try:
        image.load()
        image = ImageOps.exif_transpose(image)
        image = ImageOps.fit(_to_mode(image, channels), (size, size), Image.Resampling.BILINEAR)
    except Unreadable:
        raise
    except Exception:
        raise Unreadable("truncated or damaged") from None
    pixels = np.asarray(image, dtype=np.uint8)
    return pixels[None] if channels == 1 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _to_mode(image: Any, channels: int) -> Any:
    from PIL import Image

    if image.mode.startswith("I"):  # 16 bits, which PIL's own conversion would cut off at 255
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise Unreadable("32-bit pixels")
        image = Image.fromarray((values // 257).astype(np.uint8))
    elif image.mode == "F":
        raise Unreadable("floating-point pixels")
    elif image.mode in ("LA", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("L" if channels == 1 else "RGB")
