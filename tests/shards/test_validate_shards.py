"""`shards validate`: every way to break the contract is found and named; shards without fault are clean."""

import dataclasses
import gzip
import io
import json
import tarfile

import pytest
from shard_inputs import CAPTION, good, picture, put, write_members

from goal_ray.pairs import Pair, PairRecord, Region
from goal_ray.scenes.run import SceneSettings, draw_scenes
from goal_ray.shards.validate import Violation, validate_shards

RECORD = PairRecord((20, 16), ((0, 22), (23, 50)), (Region((0, 0, 9, 9), 1.0, "grid"),), (Pair(0, 0, 0.5),), {})


def violations(shards, headers_only=False, max_pixels=10_000, workers=1) -> list[Violation]:
    """All violations, in the order in which they are found."""
    found = validate_shards(str(shards), headers_only, max_pixels, workers)
    return [violation for checked in found for violation in checked.violations]


def pairs(**changes) -> bytes:
    """A pairs.json, spoilt after it was written."""
    tree = json.loads(RECORD.to_bytes())
    return json.dumps({**tree, **changes}).encode()


def test_shards_without_fault_are_clean(tmp_path):
    draw_scenes(tmp_path / "scenes", 6, 0, SceneSettings(size=48, shard_size=3, paired=True))
    turned = dataclasses.replace(RECORD, size=(16, 20), regions=(Region((0, 0, 16, 20), 1.0, "image"),))
    members = [
        ("sub/.hidden-folder/a.jpeg", picture("JPEG", orientation=6)),
        ("sub/.hidden-folder/a.txt", CAPTION.encode()),
        ("sub/.hidden-folder/a.pairs.json", turned.to_bytes()),
        ("sub/.hidden-folder/a.json", b"not even json"),
        ("sub/.hidden-folder/a.mask.png", b"anything"),
    ]
    write_members(tmp_path / "scenes" / "x.tar", members)
    checked = list(validate_shards(str(tmp_path / "scenes"), False, 10_000, 1))
    assert [(one.shards, one.samples, one.violations) for one in checked] == [(1, 3, []), (1, 3, []), (1, 1, [])]
    assert violations(tmp_path / "scenes", headers_only=True) == []


# What is wrong, the members of a sample, parts of the problem, and whether headers show it.
BAD_SAMPLES = {
    "no picture": ([("k.txt", b"x")], ["no picture", "add one"], True),
    "two pictures": (
        [("k.png", picture()), ("k.jpg", picture("JPEG")), ("k.txt", b"x")],
        ["more than one picture"],
        True,
    ),
    "a picture twice": ([("k.png", picture()), ("k.png", picture()), ("k.txt", b"x")], ["more than one picture"], True),
    "empty picture": ([("k.png", b""), ("k.txt", b"x")], ["0 bytes"], False),
    "no image": ([("k.png", b"<html>"), ("k.txt", b"x")], ["not a JPEG, PNG or WebP", "convert it"], False),
    "cut image": (
        [("k.png", picture()[:-300]), ("k.txt", b"x")],
        ["damaged or truncated PNG", "store it again"],
        False,
    ),
    "oversized": ([("k.png", picture(size=(200, 100))), ("k.txt", b"x")], ["20000 pixels", "max_pixels=10000"], False),
    "misnamed": ([("k.jpg", picture()), ("k.txt", b"x")], ["the .jpg holds a picture in PNG", "make"], False),
    "no caption": ([("k.png", picture())], ["no .txt caption", "add one"], True),
    "empty caption": ([("k.png", picture()), ("k.txt", b"")], ["is empty", "write one"], True),
    "blank caption": ([("k.png", picture()), ("k.txt", b"\xef\xbb\xbf \n")], ["is empty"], False),
    "latin caption": ([("k.png", picture()), ("k.txt", b"caf\xe9")], ["not UTF-8", "re-encode it"], False),
    "two captions": ([("k.png", picture()), ("k.txt", b"x"), ("k.TXT", b"y")], [".TXT is not in lower case"], True),
    "upper case": ([("k.PNG", picture()), ("k.txt", b"x")], [".PNG is not in lower case", "make"], True),
    "json twice": ([*good("k"), ("k.json", b"{}"), ("k.json", b"{}")], ["more than one .json", "keep one"], True),
    "pairs not JSON": ([*good("k"), ("k.pairs.json", b"{")], ["the pairs are not JSON", "goal-ray lism"], False),
    "pairs of the future": ([*good("k"), ("k.pairs.json", pairs(version=9))], ["version = 9"], False),
    "pairs incomplete": (
        [*good("k"), ("k.pairs.json", pairs(pairs=[{"sentence": 0, "region": 0}]))],
        ["pairs[0].similarity = nothing"],
        False,
    ),
    "pairs beyond": ([*good("k"), ("k.pairs.json", pairs(sentences=[[0, 99]]))], ["sentences[0]", "beyond"], False),
    "pairs of another picture": ([*good("k"), ("k.pairs.json", pairs(size=[21, 16]))], ["(21, 16)", "(20, 16)"], False),
}


@pytest.mark.parametrize("name", BAD_SAMPLES)
def test_a_bad_sample_is_named_with_the_remedy(tmp_path, name):
    members, words, in_headers = BAD_SAMPLES[name]
    write_members(tmp_path / "x.tar", [*good("first"), *members, *good("last")])
    found = violations(tmp_path)
    assert {violation.key for violation in found} == {"k"}
    lines = [str(violation) for violation in found]
    assert any(all(word in line for word in words) and line.startswith(f"{tmp_path}/x.tar: k: ") for line in lines)
    if name != "two captions":
        assert len(lines) == 1
    assert bool(violations(tmp_path, headers_only=True)) == in_headers


def test_all_that_is_wrong_with_one_sample_is_told(tmp_path):
    spoilt = pairs(
        sentences=[[5, 2], [0, 99]], regions=[{"box": [9, 0, 0, 9], "score": 1.0, "source": "grid"}], size=[7, 7]
    )
    write_members(tmp_path / "x.tar", [("k.jpg", picture()), ("k.txt", b"\xff"), ("k.pairs.json", spoilt)])
    text = "\n".join(map(str, violations(tmp_path)))
    for words in ("not UTF-8", ".jpg holds a picture in PNG", "sentences[0]", "sentences[1]", "regions[0].box", "size"):
        assert words in text


def test_members_of_no_sample_are_violations_but_folders_are_not(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        kinds = {
            "README": tarfile.REGTYPE,
            "sub": tarfile.DIRTYPE,
            "l.png": tarfile.SYMTYPE,
            ".hidden": tarfile.REGTYPE,
        }
        for name, kind in kinds.items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "elsewhere"
            tar.addfile(info)
        for name, data in good("a"):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    for headers_only in (False, True):
        problems = [violation.problem for violation in violations(tmp_path, headers_only)]
        assert [word in problem for word, problem in zip(["README", "l.png", ".hidden"], problems, strict=True)] == [
            True
        ] * 3
        assert "a link" in problems[1]


def test_a_key_at_two_places_of_a_tar(tmp_path):
    split = [("a.png", picture()), *good("b"), ("a.txt", CAPTION.encode())]
    write_members(tmp_path / "x.tar", split)
    problems = [(violation.key, violation.problem) for violation in violations(tmp_path, headers_only=True)]
    assert [key for key, _ in problems] == ["a", "a", "a"]
    assert any("two places" in problem and "side by side" in problem for _, problem in problems)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_key_in_two_shards_names_both(tmp_path, workers):
    for name, keys in {"x": "abc", "y": "def", "z": "agd"}.items():
        write_members(tmp_path / f"{name}.tar", [member for key in keys for member in good(key)])
    found = [str(violation) for violation in violations(tmp_path, workers=workers)]
    folder = str(tmp_path)
    assert found == [
        f"{folder}/z.tar: a: the key stands in {folder}/x.tar too; rename one of the two samples",
        f"{folder}/z.tar: d: the key stands in {folder}/y.tar too; rename one of the two samples",
    ]


@pytest.mark.parametrize("headers_only", [False, True])
@pytest.mark.parametrize("damage", ["cut", "no end", "empty", "garbage", "flipped header"])
def test_a_damaged_tar_is_told_with_what_stands_before_the_damage(tmp_path, damage, headers_only):
    write_members(tmp_path / "x.tar", [*good("a"), ("a.JSON", b"{}"), *good("b")], tarfile.GNU_FORMAT)
    data = (tmp_path / "x.tar").read_bytes()
    with tarfile.open(tmp_path / "x.tar") as tar:
        last = tar.getmembers()[-1]
    spoilt = {
        "cut": data[: last.offset_data - 100],
        "no end": data[: last.offset_data + 512],
        "empty": b"",
        "garbage": bytes(range(256)) * 40,
        "flipped header": data[: last.offset] + b"\xff" * 512 + data[last.offset + 512 :],
    }
    (tmp_path / "x.tar").write_bytes(spoilt[damage])
    found = [violation.problem for violation in violations(tmp_path, headers_only)]
    assert "corrupt or truncated tar" in found[-1]
    assert "copy it again" in found[-1]
    before = damage not in ("empty", "garbage")
    assert [".JSON is not in lower case" in problem for problem in found[:-1]] == [True] * before
    assert f"{int(before)} samples stand complete" in found[-1]


@pytest.mark.parametrize("headers_only", [False, True])
def test_data_behind_the_end_mark_is_told_and_padding_is_not(tmp_path, headers_only):
    write_members(tmp_path / "x.tar", good("a"))
    write_members(tmp_path / "y.tar", good("b"))
    (tmp_path / "y.tar").write_bytes((tmp_path / "y.tar").read_bytes() + bytes(100_000))
    assert violations(tmp_path, headers_only) == []
    both = (tmp_path / "x.tar").read_bytes() + (tmp_path / "y.tar").read_bytes()
    (tmp_path / "x.tar").write_bytes(both)
    assert [
        "behind the end mark" in violation.problem for violation in violations(tmp_path / "x.tar", headers_only)
    ] == [True]


def test_other_data_behind_the_end_mark_is_told(tmp_path):
    write_members(tmp_path / "x.tar", good("a"))
    (tmp_path / "x.tar").write_bytes((tmp_path / "x.tar").read_bytes() + b"\xff" * 20_000)
    assert [violation.problem.partition(",")[0] for violation in violations(tmp_path)] == ["data behind the end mark"]


def test_a_compressed_tar_is_told_without_the_advice_to_copy_it_again(tmp_path):
    write_members(tmp_path / "x.tar", good("a"))
    (tmp_path / "x.tar").write_bytes(gzip.compress((tmp_path / "x.tar").read_bytes()))
    (problem,) = (violation.problem for violation in violations(tmp_path))
    assert problem.startswith("the tar is compressed; unpack it with gunzip")
    assert "again" not in problem


@pytest.mark.parametrize("headers_only", [False, True])
def test_a_sparse_member_is_told(tmp_path, headers_only):
    write_members(tmp_path / "x.tar", good("a"))
    info = tarfile.TarInfo("a.npy")
    info.size = 512
    info.pax_headers = {"GNU.sparse.size": "1024", "GNU.sparse.numblocks": "1", "GNU.sparse.map": "512,512"}
    with tarfile.open(tmp_path / "x.tar", "a", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(info, io.BytesIO(b"x" * 512))
    (violation,) = violations(tmp_path, headers_only)
    assert (violation.key, violation.problem.partition(";")[0]) == ("a", "the member 'a.npy' is sparse")


def test_a_tar_without_samples_is_told(tmp_path):
    write_members(tmp_path / "x.tar", [])
    assert [violation.problem for violation in violations(tmp_path)] == ["holds no sample; leave this tar out"]


def test_odd_keys_stay_on_one_line(tmp_path):
    write_members(tmp_path / "x.tar", [("new\nline.txt", b"x"), ("caf\udce9.txt", b"x")], tarfile.GNU_FORMAT)
    lines = [str(violation) for violation in violations(tmp_path)]
    assert [line.encode().count(b"\n") for line in lines] == [0, 0]
    assert r"new\nline" in lines[0]
    assert r"caf\udce9" in lines[1]


def test_a_failing_storage_is_no_violation(tmp_path):
    put(tmp_path / "x.tar", {"is": "a folder"})
    with pytest.raises(IsADirectoryError):
        violations(str(tmp_path / "*.tar"))


def test_a_member_that_is_too_large_is_a_violation_and_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr("goal_ray.tars.LARGEST_MEMBER_BYTES", 4000)
    write_members(tmp_path / "x.tar", [("k.png", picture()), ("k.txt", b"x" * 4001)])
    write_members(tmp_path / "y.tar", [*good("l"), ("l.npy", b"x" * 500), ("l.mp4", b"x" * 2500)])
    for headers_only in (False, True):
        large, together = violations(tmp_path, headers_only)
        assert "'k' takes more than 4000 bytes, up to and with its member .txt" in str(large)
        assert "'l' takes more than 4000 bytes, up to and with its member .mp4" in str(together)
