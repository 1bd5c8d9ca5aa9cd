"""What came out of shards, added up and printed."""

import numpy as np
import pytest

from goal_ray.lism.counts import MOST_BARS, ShardCounts, histogram_bars, print_summary, summary
from goal_ray.lism.picks import Pick

BAD = {"shard": "in.tar", "key": "k", "stage": "decode", "reason": "torn"}


def test_the_summary_adds_up_shards_and_shows_similarities_and_first_reasons(capsys):
    first, second = ShardCounts(), ShardCounts()
    first.add_pairs(10, 2, [-1.0, 0.26, 1.0], whole_image=1, paired_sentences=2)
    second.add_pairs(20, 3, [0.26], whole_image=0, paired_sentences=1)
    for number in range(7):
        second.add_bad({**BAD, "key": f"k{number}"})
    result = summary([first, second], seconds=2.0, images=6)
    assert (result["samples"], result["paired"], result["quarantined"]) == (9, 2, 7)
    each = ("regions_per_image", "sentences_per_image", "pairs_per_image", "whole_image_share")
    assert [result[name] for name in each] == [15, 2.5, 2, 0.25]
    assert [result[name] for name in ("paired_sentence_share", "seconds", "images", "images_per_s")] == [0.6, 2, 6, 3]
    histogram = result["similarity_histogram"]
    assert {number: count for number, count in enumerate(histogram) if count} == {0: 1, 126: 2, 199: 1}
    print_summary(result)
    printed = capsys.readouterr().out
    assert "similarity +0.20..+0.30           2 █" in printed
    assert "in.tar: 'k0' (decode): torn" in printed
    assert "2 more" in printed


def test_reasons_are_counted_by_kind():
    counts = ShardCounts()
    counts.add_bad({**BAD, "key": "one", "reason": "3 bytes of 'one'"})
    counts.add_bad({**BAD, "key": "other", "reason": "12 bytes of 'other'"})
    assert counts.reasons == {"decode: N bytes of …": 2}


def test_the_summary_tells_seconds_rate_and_share_of_every_phase_over_all_shards(capsys):
    first, second = ShardCounts(), ShardCounts()
    first.add_work("match", 6.0, 30)
    first.add_work("read", 1.0, 40)
    second.add_work("match", 3.0, 15)
    result = summary([first, second], seconds=1.0, images=0)
    assert list(result["work"]) == ["read", "match"]
    assert result["work"]["match"] == {"seconds": 9.0, "images": 45, "images_per_s": 5.0, "share": 0.9}
    print_summary(result)
    assert "match              9.0                   5.0  90.0 %" in capsys.readouterr().out


def counted(*similarities: float) -> ShardCounts:
    counts = ShardCounts()
    counts.add_pairs(1, len(similarities), similarities, 0, len(similarities))
    return counts


def test_the_similarities_of_a_pretrained_clip_fill_many_bars():
    histogram = counted(*np.random.default_rng(0).normal(0.235, 0.028, 10_000)).similarity_histogram
    bars = histogram_bars(histogram)
    assert 20 <= len(bars) <= MOST_BARS
    assert max(bar.count for bar in bars) < 0.2 * sum(histogram)


@pytest.mark.parametrize(
    ("similarities", "widths", "bars"),
    [
        ([0.0, 0.299], 0.01, 30),
        ([0.0, 0.301], 0.02, 16),
        ([-0.005, 0.29], 0.02, 16),
        ([-0.5, 0.9], 0.05, 29),
        ([-1.0, 1.0], 0.1, 20),
        ([0.5], 0.01, 1),
        ([], None, 0),
    ],
)
def test_bars_are_few_of_one_width_that_counts_from_0_and_hold_every_pair(similarities, widths, bars):
    found = histogram_bars(counted(*similarities).similarity_histogram)
    assert len(found) == bars
    assert sum(bar.count for bar in found) == len(similarities)
    assert [bar.high - bar.low for bar in found] == pytest.approx([widths] * bars)
    assert [bar.low / widths for bar in found] == pytest.approx([round(bar.low / widths) for bar in found])
    assert all(found[0].low <= value <= found[-1].high for value in similarities)


def test_a_similarity_on_an_edge_belongs_to_the_bar_that_begins_there():
    for hundredth in range(-100, 100):
        (bar,) = histogram_bars(counted(hundredth / 100).similarity_histogram)
        assert bar.low == hundredth / 100


def test_zero_is_printed_without_a_minus_and_large_numbers_in_groups(capsys):
    counts = counted(*[-0.001] * 9)
    counts.similarity_histogram[100] = 1_234_567
    print_summary(summary([counts], seconds=1.0, images=1))
    printed = capsys.readouterr().out
    assert "similarity -0.01..+0.00           9 █\n" in printed
    assert "similarity +0.00..+0.01   1,234,567 █" in printed
    print_summary(summary([counted(*[-0.001] * 9)], seconds=1.0, images=1))
    assert "95 % below 0.00" in capsys.readouterr().out


def test_quantiles_tell_what_a_least_similarity_would_leave_out(capsys):
    similarities = np.random.default_rng(0).normal(0.235, 0.028, 10_000)
    result = summary([counted(*similarities)], seconds=1.0, images=1)
    told = {int(percent): value for percent, value in result["similarity_quantiles"].items()}
    assert list(told) == [5, 25, 50, 75, 95]
    assert list(told.values()) == pytest.approx(np.percentile(similarities, list(told)), abs=0.01)
    print_summary(result)
    assert "of the pairs, 5 % lie below 0.19, 25 % below 0.22, 50 % below 0.23" in capsys.readouterr().out


def test_without_a_pair_there_is_no_quantile(capsys):
    result = summary([ShardCounts()], seconds=1.0, images=0)
    assert result["similarity_quantiles"] == {}
    print_summary(result)
    assert "of the pairs," not in capsys.readouterr().out


def test_a_picture_with_many_sentences_is_shown_twice_among_the_best_and_twice_among_the_worst():
    first, second = ShardCounts(), ShardCounts()
    first.add_picks([Pick("a.tar", 0, "many", n, n, n / 100) for n in range(40)])
    for number in range(1, 9):
        second.add_picks([Pick("b.tar", number, "few", 0, 0, 0.2)])
    first.merge(second)
    for picks, sentences in ((first.picks.best, [39, 38]), (first.picks.worst, [0, 1])):
        assert [pick.sentence for pick in picks if pick.key == "many"] == sentences
        assert len(picks) == 10
    assert len(first.picks.random) == 12
