"""The one decoder: every stage sees the same upright RGB pixels.

All coordinates of the project (`size`, boxes, regions) are pixels of this upright picture, after EXIF orientation,
which is what a viewer shows and not always how the file stores its rows.
"""

import io
import re
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from PIL import ExifTags, Image
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from goal_ray.errors import ImageError

# The readers are called directly, not through Image.open, which prints a warning for pictures above a limit that is
# global to the process; `decode_image` has a limit of its own, and may run in threads.
READERS: dict[str, tuple[Callable[[bytes], bool], type[ImageFile]]] = {
    "JPEG": (lambda data: data.startswith(b"\xff\xd8\xff"), JpegImageFile),
    "PNG": (lambda data: data.startswith(b"\x89PNG\r\n\x1a\n"), PngImageFile),
    "WebP": (lambda data: data.startswith(b"RIFF") and data[8:12] == b"WEBP", WebPImageFile),
}
EXTENSIONS = {"JPEG": "jpg", "PNG": "png", "WebP": "webp"}
MAX_SCANS = 100
# A JPEG's marker with a length behind it, or its end; a zero byte or a restart follows 0xFF inside a scan.
MARKER = re.compile(rb"\xff[\x01-\xcf\xd9-\xfe]")
# EXIF orientation -> what makes the picture upright (EXIF 2.32, tag 0x0112).
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def format_name(data: bytes) -> str | None:
    """The picture's format, a key of READERS, told by its first bytes; None for anything else."""
    return next((name for name, (matches, _) in READERS.items() if matches(data)), None)


def upright_size(data: bytes) -> tuple[int, int]:
    """(width, height) in pixels of the upright picture, from its header; the bytes behind that may be missing.

    But a WebP keeps EXIF behind its pixels: one that has any must be complete. A PNG that tells its orientation there
    is taken for upright. Raises ImageError where no header of these formats is found.
    """
    name = format_name(data)
    if name is None:
        raise ImageError(f"not a JPEG, PNG or WebP picture (it starts with {data[:8]!r}); convert it")
    if name == "WebP" and (size := webp_size(data)) is not None:
        return size
    try:
        image = READERS[name][1](io.BytesIO(data))
    # As in decode_image: PIL raises nearly any type.
    except Exception as error:
        raise ImageError(f"damaged or truncated {name} header: {error}; store it again") from error
    width, height = image.size
    return (height, width) if orientation(image) >= 5 else (width, height)


def webp_size(data: bytes) -> tuple[int, int] | None:
    """(width, height) in a WebP's header; None where that is not whole, or EXIF or XMP behind the pixels may turn them.

    Source: RFC 9649, sections 2.5 to 2.7.
    """
    kind, header = data[12:16], data[20:30]
    if len(header) < 10:
        return None
    if kind == b"VP8 " and header[3:6] == b"\x9d\x01\x2a":
        width, height = struct.unpack("<HH", header[6:])
        return width & 0x3FFF, height & 0x3FFF
    if kind == b"VP8L" and header[0] == 0x2F:
        bits = int.from_bytes(header[1:5], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if kind == b"VP8X" and not header[0] & 0b1100:
        return 1 + int.from_bytes(header[4:7], "little"), 1 + int.from_bytes(header[7:10], "little")
    return None


@dataclass(frozen=True)
class StoredPicture:
    """A picture of which only the header is read.

    size  (width, height) of the upright picture as stored, pixels
    """

    size: tuple[int, int]
    _name: str
    _image: ImageFile
    _bytes: int

    def decode(self, factor: int = 1) -> Image.Image:
        """The upright RGB picture. To be called once.

        factor  1, 2, 4 or 8: a JPEG is decoded to 1/factor of its size, rounded up to whole pixels, for less work than
                all of it takes; other formats come whole. Coordinates scale by the size that came over `size`, and are
                then less than one decoded pixel off.

        Raises ImageError for anything but a complete picture.
        """
        with decoding(self._name, self._bytes):
            if factor > 1 and isinstance(self._image, JpegImageFile):
                width, height = self._image.size
                self._image.draft(None, (max(1, width // factor), max(1, height // factor)))
            self._image.load()
            upright = UPRIGHT.get(orientation(self._image))
            rgb = to_rgb(self._image)
            return rgb if upright is None else rgb.transpose(upright)


def open_picture(data: bytes, max_pixels: int = 150_000_000) -> StoredPicture:
    """Reads the header of a JPEG, PNG or WebP; the size is checked before any pixel of a JPEG or PNG is decoded.

    Raises ImageError for other bytes, a damaged header, or more than `max_pixels`.
    """
    if not data:
        raise ImageError("the picture is empty (0 bytes); store it again")
    name = format_name(data)
    if name is None:
        raise ImageError(f"not a JPEG, PNG or WebP picture (it starts with {data[:8]!r}); convert it")
    with decoding(name, len(data)):
        image = READERS[name][1](io.BytesIO(data))
        width, height = image.size
        if width * height > max_pixels:
            raise ImageError(
                f"{name} of {width}×{height} = {width * height} pixels, more than max_pixels={max_pixels}; "
                "shrink the picture or raise max_pixels"
            )
        if name != "JPEG":
            image.load()  # a PNG may tell its orientation behind its pixels
        elif scans(data) > MAX_SCANS:
            raise ImageError(f"JPEG of more than {MAX_SCANS} scans, each of which takes as long as a picture")
        size = (height, width) if orientation(image) >= 5 else (width, height)
    return StoredPicture(size, name, image, len(data))


def decode_image(data: bytes, max_pixels: int = 150_000_000) -> Image.Image:
    """The upright RGB picture in JPEG, PNG or WebP bytes; of an animation, the first frame.

    Transparency is laid on white; 16-bit values are scaled to 8 bits; colour profiles are ignored. The size is checked
    in the header, before any pixel is decoded. Raises ImageError for anything but a complete picture of these formats
    with at most `max_pixels`.
    """
    return open_picture(data, max_pixels).decode()


@contextmanager
def decoding(name: str, data_bytes: int) -> Iterator[None]:
    """Makes an ImageError of whatever PIL raises inside the block."""
    try:
        yield
    except ImageError:
        raise
    except Image.DecompressionBombError as error:
        raise ImageError(f"{name} too large to decode safely: {error}; shrink the picture") from None
    # Damaged bytes make PIL raise nearly any type: OSError, SyntaxError, struct.error, zlib.error, EOFError, ...
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise ImageError(f"damaged or truncated {name} ({data_bytes} bytes): {reason}; store it again") from error


def scans(data: bytes) -> int:
    """How many scans a JPEG of more than MAX_SCANS has; of others, at least so many.

    A progressive JPEG refines its pixels scan by scan, ten times as a rule; a few bytes are enough for a scan.
    """
    count, at = data.count(b"\xff\xda"), 2
    if count <= MAX_SCANS:
        return count
    count = 0
    while (marker := MARKER.search(data, at)) and marker[0] != b"\xff\xd9":
        count += marker[0] == b"\xff\xda"
        at = marker.end() + int.from_bytes(data[marker.end() : marker.end() + 2], "big")
    return count


def orientation(image: ImageFile) -> int:
    """The EXIF orientation, 1-8; 1, which is upright, where the EXIF block is missing, unreadable or says another.

    Of a PNG that is not loaded, only EXIF before the pixels is seen.
    """
    try:
        found = int(Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1))  # a PNG's own would load it
    # A damaged EXIF block says nothing against the pixels.
    except Exception:
        return 1
    return found if 1 <= found <= 8 else 1


def to_rgb(image: Image.Image) -> Image.Image:
    """Any decoded picture as RGB, transparent parts on white."""
    if image.mode.startswith("I"):
        grey_HW = np.asarray(image)
        shown_HW = np.round(np.clip(grey_HW, 0, 65535) / 257).astype(np.uint8)
        shown_HW[grey_HW == image.info.get("transparency", -1)] = 255
        return Image.fromarray(shown_HW).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=image.getchannel("A"))
        return white
    return image if image.mode == "RGB" else image.convert("RGB")


def shrink(image: Image.Image, max_side_px: int) -> Image.Image:
    """The picture with its longer side at most `max_side_px`, aspect ratio kept and sides at least 1; never enlarged.

    Rounding may scale the two axes a little differently: map coordinates back by `image.width / shrunk.width` and
    `image.height / shrunk.height`.
    """
    longest = max(image.size)
    if longest <= max_side_px:
        return image
    width, height = (max(1, round(side * max_side_px / longest)) for side in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)
