"""Which pairs a gallery shows."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from goal_ray.lism.picks import SHOWN, Pick, Picks

PAIRS = st.lists(
    st.builds(
        Pick,
        shard=st.sampled_from("abc"),
        sample=st.integers(0, 9),
        key=st.just("k"),
        sentence=st.integers(0, 5),
        region=st.integers(0, 2),
        similarity=st.sampled_from([-0.5, 0.0, 0.25, 0.5]),
    ),
    unique_by=lambda pick: pick.place,
    max_size=80,
)


@given(PAIRS, st.data())
def test_picks_merged_in_any_order_are_those_among_all_pairs(pairs, data):
    parts: dict[int, list[Pick]] = {}
    for pair in data.draw(st.permutations(pairs)):
        parts.setdefault(data.draw(st.integers(0, 4)), []).append(pair)
    merged = Picks()
    for part in parts.values():
        merged = merged.merged(Picks.among(part))
    assert merged == Picks.among(pairs)
    by_similarity = sorted(pair.similarity for pair in pairs)
    assert [pick.similarity for pick in merged.worst] == by_similarity[:SHOWN]
    assert [pick.similarity for pick in merged.best] == by_similarity[::-1][:SHOWN]


def test_random_picks_know_nothing_of_similarity_and_come_from_everywhere():
    pairs = [Pick("a.tar", number, "k", 0, 0, number / 3000) for number in range(3000)]
    low = [Picks.among(pairs[start::100]) for start in range(100)]
    thirds = Counter(pick.sample // 1000 for picks in low for pick in picks.random)
    assert sum(thirds.values()) == 100 * SHOWN
    assert all(320 < thirds[third] < 480 for third in range(3))
