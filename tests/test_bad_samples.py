"""Bad samples: on a line, by kind, and the kind that is the most frequent."""

import pytest

from goal_ray.bad_samples import bad_record, describe_bad, kind_of, most_frequent


@pytest.mark.parametrize(
    ("reason", "kind"),
    [
        ("PNG of 2000×1000 = 2000000 pixels, more than max_pixels=9", "PNG of N = N pixels, more than max_pixels=N"),
        (
            "caption of sample 'a 7' is not UTF-8: byte 0xe9 in position 3",
            "caption of sample … is not UTF-8: byte N in position N",
        ),
        (
            "s3://b/x 1/in.tar: corrupt or truncated tar: bad checksum",
            "s3://b/x ….tar: corrupt or truncated tar: bad checksum",
        ),
        ("sample 'k' has no picture (jpg/png; members: ['a', 'b'])", "sample … has no picture (jpg/png; members: …)"),
        ('sample "b\'s" has no picture', "sample … has no picture"),
        ("damaged PNG (50 bytes): <BytesIO at 0x7f3a>", "damaged PNG (N bytes): <BytesIO at N>"),
        ("in.tar: 'x': no pairs", "….tar: …: no pairs"),
    ],
)
def test_a_kind_is_without_what_is_of_one_sample(reason, kind):
    assert kind_of(bad_record("in.tar", "k", "decode", reason)) == f"decode: {kind}"


@pytest.mark.parametrize(
    ("record", "line"),
    [
        (bad_record("in.tar", "k", "decode", "torn"), "in.tar: 'k' (decode): torn"),
        (bad_record("in.tar", "", "read", "torn"), "in.tar (read): torn"),
        (bad_record("in.tar", "k", "decode", "in.tar: 'k': no pairs"), "in.tar: 'k': no pairs"),
    ],
)
def test_a_line_tells_shard_and_key_once(record, line):
    assert describe_bad(record) == line


def test_the_most_frequent_kind_is_told_by_its_first_example():
    records = [bad_record("in.tar", key, "decode", f"{key!r} is torn") for key in "ab"]
    told = most_frequent([bad_record("in.tar", "c", "decode", "empty"), *records])
    assert told == "the most frequent problem (2 of 3), for example in.tar: 'a' (decode): 'a' is torn"


def test_of_a_very_long_reason_the_start_makes_the_kind():
    kinds = {kind_of(bad_record("in.tar", "k", "decode", "x" * 100_000 + end)) for end in ("a", "b")}
    assert len(kinds) == 1
    assert len(kinds.pop()) < 2000
