"""Retrieval ranks and metrics, against a plain sort of all similarities."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from goal_ray.errors import ModelError
from goal_ray.retrieval import ranks, retrieval_metrics


def naive_ranks(query_NE: np.ndarray, target_NE: np.ndarray, right: np.ndarray) -> list[int]:
    """Place of the right target after sorting all by falling cosine, behind those it ties with."""

    def unit(rows: np.ndarray) -> np.ndarray:
        return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)

    similarity = np.round(unit(query_NE.astype(np.float64)) @ unit(target_NE.astype(np.float64)).T, 9)
    is_right = np.arange(len(target_NE)) == right[:, None]
    order = [np.lexsort((mark, -row)) for row, mark in zip(similarity, is_right, strict=True)]
    return [int(np.argwhere(places == index).item()) + 1 for places, index in zip(order, right, strict=True)]


def random_pair(dtype: torch.dtype) -> torch.Tensor:
    """301 unrelated queries and targets, (2, 301, 64)."""
    return torch.randn(2, 301, 64, generator=torch.Generator().manual_seed(0)).to(dtype)


# Small whole numbers make exact ties common, and keep unequal cosines far apart.
def whole_numbers(rows: int, columns: int) -> st.SearchStrategy[np.ndarray]:
    return arrays(np.float32, (rows, columns), elements=st.integers(-2, 2).map(float))


@given(st.data())
@settings(max_examples=200)
def test_ranks_equal_a_full_sort(data):
    count, columns = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 4))
    query, target = data.draw(whole_numbers(count, columns)), data.draw(whole_numbers(count, columns))
    chunk = data.draw(st.integers(1, 14))
    found = ranks(torch.from_numpy(query), torch.from_numpy(target), chunk)
    assert found.tolist() == naive_ranks(query, target, np.arange(count))
    assert found.dtype == torch.int64


@given(st.data())
@settings(max_examples=100)
def test_several_captions_may_share_a_picture(data):
    queries, targets = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 6))
    query, target = data.draw(whole_numbers(queries, 3)), data.draw(whole_numbers(targets, 3))
    right = np.array(data.draw(st.lists(st.integers(0, targets - 1), min_size=queries, max_size=queries)))
    found = ranks(torch.from_numpy(query), torch.from_numpy(target), 5, torch.from_numpy(right))
    assert found.tolist() == naive_ranks(query, target, right)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_chunk_changes_nothing(dtype):
    query, target = random_pair(dtype)
    whole = ranks(query, target, chunk=301)
    for chunk in (1, 7, 100, 1024):
        assert torch.equal(ranks(query, target, chunk), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_calling_near_ties_ties_costs_next_to_nothing(dtype):
    query, target = random_pair(dtype)
    exact = torch.tensor(naive_ranks(query.double().numpy(), target.double().numpy(), np.arange(301)))
    lost = ranks(query, target) - exact
    assert lost.min() >= 0
    assert lost.sum() <= 2  # of 90 000 comparisons


@pytest.mark.parametrize(("count", "columns"), [(7, 1), (60, 32), (257, 511), (1031, 768)])
def test_embeddings_that_are_all_alike_rank_last(count, columns):
    # A float32 matrix product gives equal columns unequal sums here; that must not pass for a ranking.
    row = torch.randn(1, columns, generator=torch.Generator().manual_seed(count))
    alike = row.repeat(count, 1)
    assert (ranks(alike, alike, chunk=33) == count).all()
    metrics = retrieval_metrics(alike, alike, at=(1, 5))
    assert (
        metrics["text_to_image"]
        == metrics["image_to_text"]
        == {
            "R@1": 0,
            "R@5": 0,
            "mAP": pytest.approx(100 / count),
            "median_rank": count,
        }
    )


def test_a_zero_embedding_ties_with_everything():
    zero = torch.zeros(4, 8)
    assert ranks(zero, torch.eye(4, 8)).tolist() == [4] * 4


def test_metrics_of_a_known_ranking_come_out():
    image = torch.eye(4)
    text = torch.tensor([[1.0, 0, 0, 0], [0.9, 0.8, 0, 0], [0.9, 0.8, 0.7, 0], [0.4, 0.3, 0.2, 0.1]])
    metrics = retrieval_metrics(image, text, at=(1, 2, 3, 4, 50))
    assert metrics["text_to_image"] == {
        "R@1": 25,
        "R@2": 50,
        "R@3": 75,
        "mAP": pytest.approx(100 * (1 + 1 / 2 + 1 / 3 + 1 / 4) / 4),
        "median_rank": 2.5,
    }
    assert metrics["count"] == 4


def test_the_two_directions_are_not_mixed_up():
    # Caption 1 lies nearest to picture 0, yet each picture's nearest caption is its own.
    image = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    text = torch.tensor([[1.0, 0.0], [0.8, 0.6]])
    metrics = retrieval_metrics(image, text, at=(1,))
    assert metrics["text_to_image"]["R@1"] == 50
    assert metrics["image_to_text"]["R@1"] == 100


def test_recall_that_any_model_would_reach_is_left_out():
    few = torch.eye(5)
    assert list(retrieval_metrics(few, few)["text_to_image"]) == ["R@1", "mAP", "median_rank"]
    assert retrieval_metrics(few[:1], few[:1])["image_to_text"] == {"mAP": 100, "median_rank": 1}


def test_of_several_right_answers_the_best_counts():
    # Picture 0 has captions 0 and 1, of which caption 1 is not like it; caption 2 belongs to pictures 1 and 2.
    image = torch.eye(3)
    text = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0.1, 1]])
    metrics = retrieval_metrics(image, text, at=(1, 2), pairs_P2=torch.tensor([[0, 0], [0, 1], [1, 2], [2, 2]]))
    # Picture 0 finds caption 0 first and caption 1, which ties with 2, last: precision 1 and 2 / 3. Picture 1 finds its
    # caption second. Caption 1 finds its picture last; caption 2 finds picture 2 first, and 1 second.
    image_map, text_map = (100 * sum(each) / 3 for each in ([(1 + 2 / 3) / 2, 1 / 2, 1], [1, 1 / 3, 1]))
    assert metrics["image_to_text"] == {
        "R@1": 100 * 2 / 3,
        "R@2": 100,
        "mAP": pytest.approx(image_map),
        "median_rank": 1,
    }
    assert metrics["text_to_image"] == {
        "R@1": 100 * 2 / 3,
        "R@2": 100 * 2 / 3,
        "mAP": pytest.approx(text_map),
        "median_rank": 1,
    }
    assert metrics["count"] == 4


@pytest.mark.parametrize("seed", range(5))
def test_average_precision_of_random_pairs_is_that_of_its_definition(seed):
    generator = torch.Generator().manual_seed(seed)
    image, text = torch.randn(2, 12, 6, generator=generator)
    belongs_TI = torch.rand(12, 12, generator=generator) < 0.2
    belongs_TI.fill_diagonal_(True)
    pairs = belongs_TI.T.nonzero()
    similarity = (F.normalize(text) @ F.normalize(image).T).numpy()
    metrics = retrieval_metrics(image, text, pairs_P2=pairs[torch.randperm(len(pairs), generator=generator)])

    def mean_precision(scores: np.ndarray, right: np.ndarray) -> float:
        values = []
        for row, wanted in zip(scores, right, strict=True):
            found = wanted[np.argsort(-row)]
            precision = np.cumsum(found) / np.arange(1, len(found) + 1)
            values.append(precision[found].mean())
        return 100 * float(np.mean(values))

    assert metrics["text_to_image"]["mAP"] == pytest.approx(mean_precision(similarity, belongs_TI.numpy()))
    assert metrics["image_to_text"]["mAP"] == pytest.approx(mean_precision(similarity.T, belongs_TI.T.numpy()))


@given(st.data())
@settings(max_examples=200)
def test_metrics_are_those_of_their_definition_whatever_ties(data):
    pictures, captions = data.draw(st.integers(1, 8)), data.draw(st.integers(1, 8))
    image, text = data.draw(whole_numbers(pictures, 3)), data.draw(whole_numbers(captions, 3))
    belongs_IT = data.draw(arrays(np.bool_, (pictures, captions)))
    belongs_IT[:, 0] |= ~belongs_IT.any(1)
    belongs_IT[0] |= ~belongs_IT.any(0)

    def unit(rows: np.ndarray) -> np.ndarray:
        return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)

    similarity_IT = np.round(unit(image.astype(np.float64)) @ unit(text.astype(np.float64)).T, 9)
    pairs = torch.from_numpy(np.argwhere(belongs_IT))
    found = retrieval_metrics(torch.from_numpy(image), torch.from_numpy(text), (1, 2, 3), pairs)
    directions = {
        "image_to_text": (similarity_IT, belongs_IT),
        "text_to_image": (similarity_IT.T, belongs_IT.T),
    }
    for name, (similarity, belongs) in directions.items():
        best, precision = [], []
        for row, right in zip(similarity, belongs, strict=True):
            best.append(1 + (row[~right] >= row[right].max()).sum())
            precision.append(np.mean([(row[right] >= value).sum() / (row >= value).sum() for value in row[right]]))
        expected = {f"R@{k}": 100 * np.mean(np.array(best) <= k) for k in (1, 2, 3) if k < similarity.shape[1]}
        expected |= {"mAP": 100 * np.mean(precision), "median_rank": np.median(best)}
        assert found[name] == pytest.approx(expected)


def test_rows_in_no_pair_are_neither_question_nor_answer():
    image, text = torch.randn(2, 9, 5, generator=torch.Generator().manual_seed(3))
    few = torch.tensor([[1, 4], [3, 2], [8, 8]])
    apart = retrieval_metrics(image[[1, 3, 8]], text[[4, 2, 8]])
    assert retrieval_metrics(image, text, pairs_P2=few) == apart


def test_length_of_the_rows_does_not_matter():
    query, target = torch.randn(2, 20, 8, generator=torch.Generator().manual_seed(1))
    scale = torch.arange(1.0, 21.0)[:, None]
    assert torch.equal(ranks(query * scale, target * scale.flip(0)), ranks(query, target))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["query", "target"])
def test_embeddings_that_are_not_finite_are_refused(value, name):
    good, bad = torch.eye(5), torch.eye(5)
    bad[3, 1] = value
    pair = (bad, good) if name == "query" else (good, bad)
    with pytest.raises(ModelError, match=rf"1 of 5 {name} embeddings .* row 3\); the model has diverged"):
        ranks(*pair)


@pytest.mark.parametrize(
    ("query", "target", "index", "message"),
    [
        ((4, 3), (4, 2), None, "of one E"),
        ((4, 3), (5, 3), None, "need a target_index"),
        ((4, 3), (5, 3), [0, 1], "must have shape"),
        ((2, 3), (5, 3), [0, 5], r"0\.\.4"),
        ((2, 3), (5, 3), [0, -1], r"0\.\.4"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(query, target, index, message):
    with pytest.raises(ValueError, match=message):
        ranks(torch.ones(query), torch.ones(target), target_index=None if index is None else torch.tensor(index))


def test_pictures_and_captions_of_different_number_need_to_be_told_apart():
    with pytest.raises(ValueError, match="4 pictures and 5 captions need pairs_P2"):
        retrieval_metrics(torch.ones(4, 3), torch.ones(5, 3))


def test_nothing_to_rank_is_refused():
    with pytest.raises(ValueError, match="no pairs"):
        retrieval_metrics(torch.ones(0, 4), torch.ones(0, 4))
