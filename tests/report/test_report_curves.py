"""Curves over the steps: the log's, and those of the evaluations beside the training."""

import math

import numpy as np
import pytest
from html_page import read_page, section
from report_inputs import add_history, log_record

from goal_ray.pages.colours import colour
from goal_ray.report.curves import MAX_POINTS, Line, thin
from goal_ray.report.run import write_report

GLOBAL_ONLY = ("loss.weight_local=0", "loss.weight_tsl_image=0", "loss.weight_tsl_text=0")
NO_LOCAL_TERMS = {"loss_local": 0.0, "loss_tsl_image": 0.0, "loss_tsl_text": 0.0}


def curves_of(page):
    """The drawings by their titles."""
    figures = section(page, "curves").find("figure")
    return {figure.find("svg")[0].attributes["aria-label"].split(",")[0]: figure for figure in figures}


def held_out_of(page):
    """The drawings of the evaluations beside the training, by their titles."""
    figures = section(page, "held-out").find("figure")
    return {figure.find("svg")[0].attributes["aria-label"]: figure for figure in figures}


def bands(figure):
    """The styles of the bands from the least to the greatest value."""
    styles = [use.attributes.get("style", "") for use in figure.find("use")]
    return [style for style in styles if "fill-opacity" in style]


def notes_of(figure):
    return [note.text for note in figure.find("span", "soft")]


def colour_of(element):
    return element.attributes["style"].removeprefix("--c: ")


def run_colours(page):
    names = section(page, "settings").find("thead")[0].find("span", "run")
    return {name.text: colour_of(name) for name in names}


def strokes(figure):
    return [path.attributes.get("style", "") for path in figure.find("path")]


def test_runs_are_drawn_over_each_other_each_in_its_colour(make_run):
    page = read_page(write_report([str(make_run("a")), str(make_run("b")), str(make_run("c"))], images=0).url)
    colours = run_colours(page)
    assert len(set(colours.values())) == 3
    for figure in curves_of(page).values():
        assert all(any(colour in style for style in strokes(figure)) for colour in colours.values())


def test_a_term_is_drawn_for_the_runs_that_have_it(make_run):
    records = [log_record(step, **NO_LOCAL_TERMS) for step in (10, 20)]
    page = read_page(write_report([str(make_run("global", GLOBAL_ONLY, records)), str(make_run())], images=0).url)
    figures, colours = curves_of(page), run_colours(page)
    for title, drawn in (("global term", True), ("local term", False), ("TSL image term", False)):
        assert any(colours["global"] in style for style in strokes(figures[title])) == drawn
        assert any(colours["goal"] in style for style in strokes(figures[title]))


def test_a_term_that_no_run_has_is_not_drawn(make_run):
    records = [log_record(step, **NO_LOCAL_TERMS) for step in (10, 20)]
    page = read_page(write_report([str(make_run("global", GLOBAL_ONLY, records))], images=0).url)
    assert list(curves_of(page)) == ["loss", "global term", "learning rate", "images per second"]


def test_lines_and_letters_take_the_colours_of_light_and_dark(make_run):
    page = read_page(write_report([str(make_run())], images=0).url)
    figure = curves_of(page)["loss"]
    assert any("currentColor" in style for style in strokes(figure))
    assert all("currentColor" in text.attributes["style"] for text in figure.find("text"))
    assert "prefers-color-scheme: dark" in page.find("style")[0].text


def test_a_run_that_diverged_is_still_drawn(make_run):
    records = [log_record(10), log_record(20, loss=math.nan), log_record(30, loss=math.inf)]
    page = read_page(write_report([str(make_run(records=records))], images=0).url)
    figure = curves_of(page)["loss"]
    assert "inf" in figure.find("figcaption")[0].text
    assert notes_of(figure) == ["2 of 3 values are NaN or infinite, and not drawn."]


def test_a_single_log_line_is_a_visible_point(make_run):
    page = read_page(write_report([str(make_run(records=[log_record(10)]))], images=0).url)
    markers = [
        e for e in curves_of(page)["loss"].find("use") if run_colours(page)["goal"] in e.attributes.get("style", "")
    ]
    assert len(markers) == 1


def test_a_long_run_keeps_the_page_small(make_run):
    noisy = [log_record(step, loss=2 + math.sin(step**2)) for step in range(1, 20_001)]
    page = write_report([str(make_run(records=noisy))], images=0)
    assert max(path.attributes["d"].count("L") for path in read_page(page.url).find("path")) <= 2 * MAX_POINTS + 2
    assert page.size_bytes < 200_000


def test_a_spike_of_one_step_shows_in_a_long_run(make_run):
    records = [log_record(step, loss=90.0 if step == 10_000 else 1.0) for step in range(1, 20_001)]
    figure = curves_of(read_page(write_report([str(make_run(records=records))], images=0).url))["loss"]
    assert "80" in [text.text for text in figure.find("text")]
    (band,) = bands(figure)
    assert f"fill: {colour(0)}" in band
    assert f"stroke: {colour(0)}" in band


def test_a_short_run_is_drawn_without_a_band(make_run):
    figure = curves_of(read_page(write_report([str(make_run())], images=0).url))["loss"]
    assert bands(figure) == []


def test_neighbouring_points_become_their_mean_with_their_range_without_nan_and_infinity():
    values = np.tile([1.0, 5.0, math.nan, math.inf], MAX_POINTS)
    values[:4] = math.nan
    steps, mean, low, high = thin(Line(np.arange(4.0 * MAX_POINTS), values))
    assert (steps[0], len(steps)) == (1.5, MAX_POINTS)
    for found, expected in ((mean, 3.0), (low, 1.0), (high, 5.0)):
        assert math.isnan(found[0])
        assert (found[1:] == expected).all()


def test_gradient_norm_and_waiting_have_curves_where_they_are_logged(make_run):
    records = [log_record(step, grad_norm=75.25, data_wait_share=0.125) for step in (10, 20)]
    figures = curves_of(read_page(write_report([str(make_run(records=records))], images=0).url))
    assert "75.25" in figures["gradient norm"].find("figcaption")[0].text
    assert "0.125" in figures["share of time waiting for data"].find("figcaption")[0].text


def test_losses_with_other_weights_are_not_to_be_compared(make_run):
    runs = [str(make_run("a")), str(make_run("b"))]
    assert notes_of(curves_of(read_page(write_report(runs, images=0).url))["loss"]) == []
    runs.append(str(make_run("global", GLOBAL_ONLY)))
    figures = curves_of(read_page(write_report(runs, images=0).url))
    assert notes_of(figures["loss"]) == ["The runs weigh the terms differently: compare the terms instead."]
    assert notes_of(figures["global term"]) == []


HELD_OUT = ("evaluation.shards=held-out/", "evaluation.pairs=1")


def evaluated(step: int, **shares: float) -> dict[str, float]:
    """A record of the history, with names of metrics that Python takes for keywords."""
    return {"step": step, **{name.replace("__", ".") + ".R@1": share for name, share in shares.items()}}


def test_a_run_without_evaluations_beside_it_has_no_curves_of_them(make_run):
    page = read_page(write_report([str(make_run())], images=0).url)
    assert "held-out" not in [each.attributes["id"] for each in page.find("section")]


def test_held_out_metrics_are_drawn_over_the_steps_with_the_best_step_marked(make_run):
    run = make_run(settings=HELD_OUT)
    add_history(
        run, *(evaluated(step, text_to_image=r, local__image_to_text=0.0) for step, r in ((8, 2), (16, 7), (24, 5)))
    )
    figures = held_out_of(read_page(write_report([str(run)], images=0).url))
    assert list(figures) == ["text → image R@1", "region → sentence R@1"]
    for figure in figures.values():
        points = [use.attributes for use in figure.find("use") if colour(0) in use.attributes.get("style", "")]
        assert len(points) == 3
        # The ring's path begins below its centre, at the same x.
        curved = [path.attributes for path in figure.find("path") if "C" in path.attributes["d"]]
        (ring,) = (path for path in curved if "clip-path" in path)
        assert colour(0) in ring["style"]
        assert float(ring["d"].split()[1]) == pytest.approx(float(points[1]["x"]), abs=0.01)


def test_the_metric_that_chooses_the_best_comes_first(make_run):
    run = make_run(settings=(*HELD_OUT, "evaluation.metric=joint.image_to_text.mAP"))
    add_history(run, {"step": 8, "text_to_image.R@1": 1.0, "joint.image_to_text.mAP": 12.345})
    figures = held_out_of(read_page(write_report([str(run)], images=0).url))
    assert list(figures) == ["joint, image → text mAP", "text → image R@1"]
    assert "12.35" in figures["joint, image → text mAP"].find("figcaption")[0].text


def test_held_out_curves_of_different_shards_or_pairs_are_not_to_be_compared(make_run):
    runs = [make_run("a", HELD_OUT), make_run("b", (*HELD_OUT[:1], "evaluation.pairs=4"))]
    for run in runs:
        add_history(run, evaluated(8, text_to_image=1.0, local__text_to_image=1.0))
    figures = held_out_of(read_page(write_report(list(map(str, runs)), images=0).url))
    warning = ["The runs were evaluated on different shards or pairs."]
    assert [notes_of(figure) for figure in figures.values()] == [[], warning]
    runs.append(make_run("c", ("evaluation.shards=others/", "evaluation.pairs=1")))
    add_history(runs[-1], evaluated(8, text_to_image=1.0))
    figures = held_out_of(read_page(write_report(list(map(str, runs)), images=0).url))
    assert [notes_of(figure) for figure in figures.values()] == [warning, warning]


def test_a_run_without_a_log_line_says_so(make_run):
    page = read_page(write_report([str(make_run(records=[]))], images=0).url)
    assert "No step has been logged yet" in section(page, "curves").text
