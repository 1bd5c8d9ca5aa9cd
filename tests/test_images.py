"""Decoding, on bytes that real encoders wrote."""

import io
import struct
import warnings
import zlib
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngImageFile

from goal_ray.errors import ImageError
from goal_ray.images import MAX_SCANS, decode_image, format_name, open_picture, shrink, upright_size

FORMATS = ("PNG", "JPEG", "WEBP")
# Upright, so that every flip and turn shows: red | green over blue | white, each 40 × 24 px.
QUADRANTS = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [255, 255, 255]]], np.uint8)
PICTURE = Image.fromarray(QUADRANTS.repeat(24, 0).repeat(40, 1))
# How the stored rows of each EXIF orientation come from the upright picture: the inverse of what a viewer does.
STORED = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def encode(image, format, **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def png_claiming(width, height):
    """A PNG of some hundred bytes whose header claims any size."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def webp_claiming(width, height):
    extended = struct.pack("<I", 0) + struct.pack("<I", width - 1)[:3] + struct.pack("<I", height - 1)[:3]
    body = b"WEBPVP8X" + struct.pack("<I", len(extended)) + extended
    return b"RIFF" + struct.pack("<I", len(body)) + body


def jpeg_claiming(width, height):
    data = bytearray(encode(PICTURE, "JPEG"))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", height, width)
    return bytes(data)


def assert_shows_quadrants(image, tolerance):
    assert image.mode == "RGB"
    assert image.size == PICTURE.size
    found = np.asarray(image, int)[12::24, 20::40]
    assert np.abs(found - QUADRANTS).max() <= tolerance


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_gives_the_same_rgb_picture(format):
    # Lossy formats keep flat colours to within a few levels.
    assert_shows_quadrants(decode_image(encode(PICTURE, format)), tolerance=0 if format == "PNG" else 6)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("orientation", STORED)
def test_every_exif_orientation_comes_out_upright(format, orientation):
    turn = STORED[orientation]
    stored = PICTURE if turn is None else PICTURE.transpose(turn)
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert_shows_quadrants(decode_image(encode(stored, format, exif=exif)), tolerance=6)


@pytest.mark.parametrize("factor", [1, 2, 4, 8])
@pytest.mark.parametrize("orientation", STORED)
def test_a_jpeg_decoded_smaller_is_upright_too_and_its_size_is_the_stored_one(orientation, factor):
    turn = STORED[orientation]
    upright = PICTURE.crop((0, 0, 79, 47))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = upright if turn is None else upright.transpose(turn)
    picture = open_picture(encode(stored, "JPEG", exif=exif, subsampling=0))
    assert picture.size == (79, 47)
    small = picture.decode(factor)
    assert small.size == (-(-79 // factor), -(-47 // factor))
    corners = np.asarray(small, int)[[0, 0, -1, -1], [0, -1, 0, -1]]
    # The last blocks of 8 are not whole, and the encoder chooses what fills them.
    assert np.abs(corners - QUADRANTS.reshape(4, 3)).max() <= 20


@pytest.mark.parametrize("format", ["PNG", "WEBP"])
def test_other_formats_are_decoded_whole_whatever_is_asked_for(format):
    assert_shows_quadrants(open_picture(encode(PICTURE, format)).decode(4), tolerance=6)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_pixels_are_kept_when_the_exif_block_is_damaged():
    data = encode(PICTURE, "JPEG", exif=b"Exif\x00\x00MM\x00*\xff\xff\xff\xff")
    assert_shows_quadrants(decode_image(data), tolerance=6)


@pytest.mark.parametrize("value", [0, 77, 255])
@pytest.mark.parametrize("format", FORMATS)
def test_grey_becomes_equal_channels(format, value):
    image = decode_image(encode(Image.new("L", (9, 5), value), format))
    assert image.getpixel((4, 2)) == pytest.approx((value,) * 3, abs=1)


def test_sixteen_bit_grey_is_scaled_not_clipped():
    values = np.array([[0, 257, 128 * 257, 65535]], np.uint16)
    image = decode_image(encode(Image.fromarray(values), "PNG"))
    assert [image.getpixel((x, 0)) for x in range(4)] == [(0,) * 3, (1,) * 3, (128,) * 3, (255,) * 3]


def test_one_bit_pictures_become_black_and_white():
    image = decode_image(encode(Image.new("1", (3, 3), 1), "PNG"))
    assert image.getpixel((1, 1)) == (255, 255, 255)


def test_cmyk_becomes_rgb():
    image = decode_image(encode(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=100))
    assert image.getpixel((8, 8)) == pytest.approx((255, 0, 0), abs=3)


@pytest.mark.parametrize("format", ["PNG", "WEBP"])
def test_transparency_is_laid_on_white(format):
    pixels = np.array([[[0, 0, 0, 0], [200, 0, 0, 255], [0, 0, 0, 128]]], np.uint8)
    image = decode_image(encode(Image.fromarray(pixels), format, **({"lossless": True} if format == "WEBP" else {})))
    assert [image.getpixel((x, 0)) for x in range(3)] == [(255, 255, 255), (200, 0, 0), (127, 127, 127)]


def test_grey_with_alpha_is_laid_on_white():
    pixels = np.array([[[0, 0], [90, 255], [0, 128]]], np.uint8)
    image = decode_image(encode(Image.fromarray(pixels), "PNG"))
    assert [image.getpixel((x, 0))[0] for x in range(3)] == [255, 90, 127]


@pytest.mark.parametrize("transparency", [1, bytes([255, 0, 128])])
def test_transparent_palette_entries_are_laid_on_white(transparency):
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "L")
    image.putpalette([10, 20, 30, 40, 50, 60, 0, 0, 0])
    found = decode_image(encode(image, "PNG", transparency=transparency))
    last = (0, 0, 0) if transparency == 1 else (127, 127, 127)
    assert [found.getpixel((x, 0)) for x in range(3)] == [(10, 20, 30), (255, 255, 255), last]


@pytest.mark.parametrize("mode", ["L", "I;16", "RGB"])
def test_a_transparent_colour_becomes_white(mode):
    pixels = np.array([[7, 200]], np.uint16 if mode == "I;16" else np.uint8)
    image = Image.fromarray(pixels).convert(mode)
    data = encode(image, "PNG", transparency=(7, 7, 7) if mode == "RGB" else 7)
    assert decode_image(data).getpixel((0, 0)) == (255, 255, 255)
    assert decode_image(data).getpixel((1, 0)) != (255, 255, 255)


@pytest.mark.parametrize("format", ["PNG", "WEBP"])
def test_an_animation_gives_its_first_frame(format):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    data = encode(frames[0], format, save_all=True, append_images=frames[1:])
    assert decode_image(data).getpixel((4, 4)) == pytest.approx((255, 0, 0), abs=3)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("size", [(1, 1), (12000, 100), (1, 300)])
def test_extreme_sizes_are_decoded(format, size):
    assert decode_image(encode(Image.new("RGB", size, "red"), format)).size == size


@pytest.mark.parametrize("format", FORMATS)
def test_size_limit_is_inclusive(format):
    data = encode(PICTURE, format)
    pixels = PICTURE.width * PICTURE.height
    assert decode_image(data, max_pixels=pixels).size == PICTURE.size
    with pytest.raises(ImageError, match=r"80×48 = 3840 pixels.*max_pixels=3839"):
        decode_image(data, max_pixels=pixels - 1)


@pytest.mark.parametrize(
    "data",
    [
        # Above this project's limit; then above the one at which PIL gives up by itself.
        *[
            claiming(*size)
            for claiming in (png_claiming, jpeg_claiming)
            for size in [(13_000, 12_000), (60_000, 60_000)]
        ],
        webp_claiming(16_384, 16_384),
    ],
    ids=["png", "png beyond PIL", "jpeg", "jpeg beyond PIL", "webp beyond PIL"],
)
def test_huge_claims_are_refused_before_decoding_and_without_warnings(data):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ImageError, match=r"too large|max_pixels"):
            decode_image(data)


def test_no_warning_is_printed_for_a_large_picture_within_the_limit():
    # 90 million pixels: PIL would warn.
    data = encode(Image.new("1", (9_500, 9_500)), "PNG")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode_image(data).size == (9_500, 9_500)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_truncated_pictures_are_refused(format, share):
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    data = encode(Image.fromarray(noise), format)
    with pytest.raises(ImageError, match="damaged or truncated"):
        decode_image(data[: int(len(data) * share)])


def test_an_empty_file_is_named_as_such():
    with pytest.raises(ImageError, match="empty"):
        decode_image(b"")


@pytest.mark.parametrize("format", ["GIF", "BMP", "TIFF", "PPM"])
def test_other_formats_are_refused(format):
    with pytest.raises(ImageError, match="not a JPEG, PNG or WebP"):
        decode_image(encode(PICTURE, format))


STARTS = [b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF\x24\x00\x00\x00WEBPVP8 "]


@given(st.sampled_from(STARTS), st.binary(max_size=300))
def test_random_bytes_raise_nothing_but_image_errors(start, data):
    with pytest.raises(ImageError):
        decode_image(start + data)


@settings(max_examples=300)
@given(st.sampled_from(FORMATS), st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1))
@example("PNG", [(16, 255)])
@pytest.mark.filterwarnings("ignore")
def test_damaged_pictures_decode_or_raise_an_image_error(format, changes):
    exif = Image.Exif()
    exif[0x0112] = 6
    data = bytearray(encode(PICTURE, format, exif=exif))
    for place, value in changes:
        data[place % len(data)] = value
    try:
        image = decode_image(bytes(data), max_pixels=10_000_000)
    except ImageError:
        return
    assert image.mode == "RGB"


@given(st.integers(1, 400), st.integers(1, 400), st.integers(1, 300))
def test_shrunk_pictures_fit_and_keep_their_shape(width, height, side):
    image = shrink(Image.new("RGB", (width, height)), side)
    if max(width, height) <= side:
        assert image.size == (width, height)
        return
    assert max(image.size) == side
    assert min(image.size) >= 1
    factor = side / max(width, height)
    assert image.width == pytest.approx(width * factor, abs=1)
    assert image.height == pytest.approx(height * factor, abs=1)


@pytest.mark.parametrize("orientation", [0, *range(1, 10), 256])
def test_the_upright_size_is_told_by_the_header_alone(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(Image.effect_noise((300, 200), 90).convert("RGB"), "JPEG", exif=exif)
    assert upright_size(data[:1000]) == open_picture(data).size == decode_image(data).size


@pytest.mark.parametrize("orientation", [None, 1, 6])
def test_the_upright_size_of_a_png_is_told_by_its_header_alone(orientation):
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    data = encode(Image.effect_noise((300, 200), 90), "PNG", exif=exif)
    with patch.object(PngImageFile, "load", side_effect=AssertionError("pixels were decoded")):
        found = upright_size(data[:1000])
    assert found == decode_image(data).size


def test_a_png_with_its_orientation_behind_its_pixels_is_decoded_upright():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(PICTURE.transpose(STORED[6]), "PNG", exif=exif)
    start = data.index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(data[start : start + 4], "big")
    last = data.rindex(b"IEND") - 4
    assert_shows_quadrants(decode_image(data[:start] + data[end:last] + data[start:end] + data[last:]), tolerance=0)


WEBP = {
    "lossy": {},
    "lossless": {"lossless": True},
    "with a colour profile": {"icc_profile": ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()},
    "animated": {"save_all": True},
}


@given(st.integers(1, 700), st.integers(1, 700), st.booleans())
@settings(max_examples=20)
@pytest.mark.parametrize("kind", WEBP)
def test_the_size_of_a_webp_is_told_by_its_header_alone(kind, width, height, transparent):
    picture = Image.new("RGBA", (width, height), (200, 30, 40, 100 if transparent else 255))
    options = dict(WEBP[kind])
    if kind == "animated":
        options["append_images"] = [Image.new("RGB", picture.size)]
    data = encode(picture, "WEBP", **options)
    assert upright_size(data[:30]) == decode_image(data).size == (width, height)


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_a_webp_with_exif_is_turned_and_must_be_complete(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(PICTURE, "WEBP", exif=exif)
    assert upright_size(data) == decode_image(data).size
    with pytest.raises(ImageError, match="damaged or truncated"):
        upright_size(data[:-40])


@pytest.mark.parametrize(("format", "name"), [("JPEG", "JPEG"), ("PNG", "PNG"), ("WEBP", "WebP"), ("GIF", None)])
def test_the_format_is_told_by_the_first_bytes(format, name):
    data = encode(Image.new("RGB", (3, 2)), format)
    assert format_name(data) == name
    if name is None:
        with pytest.raises(ImageError, match="not a JPEG, PNG or WebP"):
            upright_size(data)
    else:
        assert upright_size(data) == (3, 2)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_a_header_that_is_cut_has_no_size(format):
    with pytest.raises(ImageError, match="damaged or truncated"):
        upright_size(encode(Image.new("RGB", (3, 2)), format)[:14])


def jpeg_of_scans(count: int) -> bytes:
    """A progressive JPEG whose last scan, and pixels, come again until it has so many, behind harmless metadata."""
    data = encode(PICTURE, "JPEG", progressive=True, comment=b"\xff\xda" * 200)
    start = data.rindex(b"\xff\xda")
    own = data.count(b"\xff\xda") - 200
    return data[:-2] + data[start:-2] * (count - own) + b"\xff\xd9"


def test_a_jpeg_of_more_scans_than_any_encoder_makes_is_refused():
    assert decode_image(jpeg_of_scans(MAX_SCANS)).size == PICTURE.size
    with pytest.raises(ImageError, match=f"more than {MAX_SCANS} scans"):
        decode_image(jpeg_of_scans(MAX_SCANS + 1))


def test_what_follows_the_end_of_a_jpeg_is_no_scan():
    assert decode_image(encode(PICTURE, "JPEG") + b"\xff\xda" * 200).size == PICTURE.size
