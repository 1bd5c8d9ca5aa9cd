"""Tars as users have them: odd names, formats, sizes and captions; and everything that can be wrong with a sample."""

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

WORDS_2000 = " ".join(f"Sentence {number} names a thing e.g. a cup of 3.5 cm." for number in range(200))
CAPTIONS = {
    "emoji": "A dog 🐶 runs. The sky is blue 🌤️!",
    "chinese": "一只红色的狗。它在草地上跑。",
    "decimal": "The cup, e.g. a mug, holds 3.5 l. It stands left.",
    "long": WORDS_2000,
}


def picture(form="PNG", size=(40, 30), mode="RGB", seed=0, colour=None, orientation=None) -> bytes:
    """An encoded picture of noise, or of one colour."""
    width, height = size
    rgb = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image = Image.fromarray(rgb).convert(mode) if colour is None else Image.new(mode, size, colour)
    exif = Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    stream = io.BytesIO()
    image.save(stream, form, exif=exif)
    return stream.getvalue()


def write_members(path: Path, members: list[tuple[str, bytes | None]]) -> None:
    """Writes a tar; a member without bytes is a folder. Headers carry a time and an owner, as real ones do."""
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.type = tarfile.DIRTYPE if data is None else tarfile.REGTYPE
            info.size, info.mtime, info.uname, info.mode = len(data or b""), 1_700_000_000.5, "someone", 0o600
            tar.addfile(info, io.BytesIO(data or b""))


def read_members(path: Path) -> list[tuple[str, bytes]]:
    """(name, bytes) of a tar's regular members, in order."""
    with tarfile.open(path) as tar:
        return [(info.name, tar.extractfile(info).read()) for info in tar if info.isreg()]


def good(key: str, seed: int = 0, caption: str = "A red ball. A blue box lies left.") -> list[tuple[str, bytes]]:
    """The members of a usable sample."""
    return [(f"{key}.png", picture(seed=seed)), (f"{key}.txt", caption.encode())]


ODD_NAME = "caf\udce9"  # the Latin-1 byte E9, as tarfile shows it
GOOD = {  # key -> size of the upright picture
    "folder.d/sub dir/IMG_1": (40, 30),
    "grey": (40, 30),
    "clear": (40, 30),
    "webp": (40, 30),
    "turned": (30, 40),
    "dot": (1, 1),
    "black": (40, 30),
    "wide": (12_000, 40),
    "thread": (12_000, 1),
    "größe-日本": (40, 30),
    "n" * 150: (40, 30),
    ODD_NAME: (40, 30),
}


def odd_but_good() -> list[tuple[str, bytes | None]]:
    """A tar of usable samples, GOOD, among members of no sample."""
    plain = b"A plain thing. Another one."
    return [
        ("folder.d", None),
        ("README", b"not a sample"),
        ("folder.d/sub dir/IMG_1.JPG", picture("JPEG")),
        ("folder.d/sub dir/IMG_1.Txt", CAPTIONS["emoji"].encode()),
        ("folder.d/sub dir/IMG_1.json", b'{"a": 1}'),
        ("folder.d/sub dir/IMG_1.mask.png", b"\x00\x01 any bytes"),
        ("grey.txt", CAPTIONS["chinese"].encode()),
        ("grey.cls", b""),
        ("grey.png", picture(mode="L")),
        ("clear.png", picture(mode="RGBA")),
        ("clear.txt", CAPTIONS["decimal"].encode()),
        ("webp.webp", picture("WEBP")),
        ("webp.txt", CAPTIONS["long"].encode()),
        ("turned.jpeg", picture("JPEG", orientation=6)),
        ("turned.txt", plain),
        ("dot.png", picture(size=(1, 1), colour="black")),
        ("dot.txt", plain),
        ("black.png", picture(colour="black")),
        ("black.txt", plain + b"\n\n"),
        ("wide.jpg", picture("JPEG", size=(12_000, 40))),
        ("wide.txt", plain),
        ("thread.png", picture(size=(12_000, 1))),
        ("thread.txt", plain),
        *good("größe-日本"),
        *good("n" * 150),
        *good(ODD_NAME),
        (".hidden", b"of no sample either"),
    ]


# key -> members beside the key's own, stage and a part of the reason
BAD: dict[str, tuple[dict[str, bytes], str, str]] = {
    "no-caption": ({"png": picture(), "json": b"{}"}, "decode", "no .txt caption"),
    "empty-caption": ({"png": picture(), "txt": b" \n"}, "decode", "is empty"),
    "no-sentence": ({"png": picture(), "txt": b"... !"}, "decode", "holds no sentence"),
    "latin-1": ({"png": picture(), "txt": b"caf\xe9 noir."}, "decode", "not UTF-8"),
    "no-picture": ({"txt": b"A dog.", "json": b"{}"}, "decode", "no picture"),
    "two-pictures": ({"png": picture(), "jpg": picture("JPEG"), "txt": b"A dog."}, "decode", "more than one picture"),
    "no-image": ({"jpg": b"<html>404</html>", "txt": b"A dog."}, "decode", "not a JPEG, PNG or WebP"),
    "cut-image": ({"png": picture(size=(300, 200))[:5000], "txt": b"A dog."}, "decode", "damaged or truncated PNG"),
    "bomb": ({"png": picture(size=(2000, 1000), colour="red"), "txt": b"A dog."}, "decode", "max_pixels"),
}


def bad_members() -> list[tuple[str, bytes | None]]:
    """The members of BAD."""
    return [(f"{key}.{name}", data) for key, (members, _, _) in BAD.items() for name, data in members.items()]


def write_mixed(folder: Path) -> None:
    """A folder of tars in which everything happens; MIXED tells what must come of it."""
    write_members(folder / "odd näme 1.tar", odd_but_good())
    write_members(folder / "mixed.tar", [*good("first"), *bad_members(), *good("last"), *good("first", seed=1)])
    write_members(folder / "all-bad.tar", bad_members())
    write_members(folder / "many.tar", [member for n in range(11) for member in good(f"{n:04}", seed=n)])
    write_members(folder / "cut.tar", [member for n in range(3) for member in good(f"c{n}", seed=n)])
    with tarfile.open(folder / "cut.tar") as tar:
        inside_last = tar.getmembers()[-1].offset_data + 5
    (folder / "cut.tar").write_bytes((folder / "cut.tar").read_bytes()[:inside_last])
    write_members(folder / "empty.tar", [])
    write_members(folder / "no-sample.tar", [("README", b"nothing here")])
    (folder / "zero.tar").write_bytes(b"")
    (folder / "garbage.tar").write_bytes(np.random.default_rng(0).bytes(5000))


READ_FAILURE = ("read", "corrupt or truncated")
TWICE = ("decode", "the key stands at two places of the tar")
REASONS = {key: (stage, reason) for key, (_, stage, reason) in BAD.items()}
# tar -> (keys that must be paired, in order; key -> (stage, part of the reason) of what must be in the quarantine)
MIXED: dict[str, tuple[list[str], dict[str, tuple[str, str]]]] = {
    "odd näme 1.tar": (list(GOOD), {}),
    "mixed.tar": (["first", "last"], {**REASONS, "first": TWICE}),
    "all-bad.tar": ([], REASONS),
    "many.tar": ([f"{n:04}" for n in range(11)], {}),
    "cut.tar": (["c0", "c1"], {"c2": READ_FAILURE}),
    "empty.tar": ([], {"": ("read", "holds no sample")}),
    "no-sample.tar": ([], {"": ("read", "holds no sample")}),
    "zero.tar": ([], {"": READ_FAILURE}),
    "garbage.tar": ([], {"": READ_FAILURE}),
}
