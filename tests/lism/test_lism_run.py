"""Whole LISM runs on Ray, over tars in which everything happens, and runs that are refused before any work."""

import json
import os
import shutil
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import webdataset
from html_page import read_page, section
from odd_tars import GOOD, MIXED, good, read_members, write_members, write_mixed
from scraping import scraped
from tiny_sam import tiny_sam
from torch import save

from goal_ray.config import load_config
from goal_ray.errors import ConfigError, ModelError, ShardError, StageError
from goal_ray.lism.__main__ import main
from goal_ray.lism.config import LismConfig
from goal_ray.lism.run import check_settings, run_lism
from goal_ray.pairs import PairRecord
from goal_ray.tar_index import read_index
from goal_ray.tar_places import member_places
from goal_ray.tars import stream_samples

PAIRED = [name for name, (keys, _) in MIXED.items() if keys]


def settings(tiny_clip: str, *overrides: str) -> LismConfig:
    fixed = ("proposer.name=grid", f"matcher.model.name={tiny_clip}", "max_pixels=1_000_000", "images_per_batch=4")
    return load_config(LismConfig, overrides=(*fixed, *overrides))


def outputs(folder: Path) -> dict[str, bytes]:
    """Every file of an output folder but the summary and the gallery, and without seconds of work in `done`."""
    files = {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in ("lism.json", "config.yaml", "gallery.html")
    }
    for name in files:
        if name.startswith("done/"):
            files[name] = json.dumps({**json.loads(files[name]), "work": None}).encode()
    return files


def quarantine(folder: Path, name: str) -> dict[str, tuple[str, str]]:
    """Key -> (stage, reason) of a tar's samples in the quarantine."""
    path = folder / "quarantine" / f"{name}.jsonl"
    records = [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []
    assert {record["shard"] for record in records} <= {name}
    assert len({record["key"] for record in records}) == len(records)
    return {record["key"]: (record["stage"], record["reason"]) for record in records}


@pytest.fixture(scope="module")
def mixed(cluster, tiny_clip, tmp_path_factory):  # noqa: ARG001 (the run uses the cluster that is there)
    """One run over all of MIXED: first with few bad samples allowed, which must fail, then with any number."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("target")
    write_mixed(source)
    with pytest.raises(StageError) as failure:
        run_lism(str(source), str(target), settings(tiny_clip, "max_bad_share=0.1"))
    after_failure, gallery_after_failure = outputs(target), (target / "gallery.html").exists()
    (target / "gallery.html").unlink()
    summary = run_lism(str(source), str(target), settings(tiny_clip, "max_bad_share=1"))
    return SimpleNamespace(
        source=source,
        target=target,
        failure=str(failure.value),
        after_failure=after_failure,
        gallery_after_failure=gallery_after_failure,
        summary=summary,
    )


@pytest.mark.parametrize("name", MIXED)
def test_every_sample_is_either_paired_or_in_the_quarantine_with_its_reason(mixed, name):
    keys, reasons = MIXED[name]
    paired = [sample.key for sample in stream_samples(f"{mixed.target}/{name}")] if keys else []
    assert paired == keys
    found = quarantine(mixed.target, name)
    assert list(found) == list(reasons)
    for key, (stage, part) in reasons.items():
        assert found[key][0] == stage
        assert part in found[key][1]


@pytest.mark.parametrize("name", MIXED)
def test_a_tar_is_there_if_and_only_if_it_has_a_usable_sample_and_every_shard_is_done(mixed, name):
    assert (mixed.target / name).exists() == bool(MIXED[name][0])
    assert (mixed.target / "done" / f"{name}.json").exists()


@pytest.mark.parametrize("name", [name for name, (keys, _) in MIXED.items() if keys])
def test_every_tar_has_an_index_of_its_members(mixed, name):
    tar = f"{mixed.target}/{name}"
    assert read_index(tar) == member_places(tar)


@pytest.mark.parametrize("name", ["odd näme 1.tar", "many.tar"])
def test_members_pass_through_byte_for_byte_and_in_order(mixed, name):
    after = [member for member in read_members(mixed.target / name) if not member[0].endswith(".pairs.json")]
    assert after == read_members(mixed.source / name)


def test_the_gallery_shows_the_best_and_worst_pairs_of_all_tars_also_of_a_run_that_failed(mixed):
    of_samples = [
        sorted(pair["similarity"] for pair in json.loads(sample.members["pairs.json"])["pairs"])
        for name in PAIRED
        for sample in stream_samples(f"{mixed.target}/{name}")
    ]
    best = sorted((each for similarities in of_samples for each in similarities[-2:]), reverse=True)
    worst = sorted(each for similarities in of_samples for each in similarities[:2])
    picks = mixed.summary["picks"]
    assert [pick["similarity"] for pick in picks["best"]] == best[:12]
    assert [pick["similarity"] for pick in picks["worst"]] == worst[:12]
    assert len({pick["shard"] for pick in picks["random"]}) > 1
    assert mixed.gallery_after_failure
    page = (mixed.target / mixed.summary["gallery"]).read_text("utf-8")
    assert page.count("<article") == 36
    assert "cannot be shown" not in page


@pytest.mark.parametrize("name", PAIRED)
def test_every_paired_sample_has_a_valid_record_with_a_pair_for_each_sentence(mixed, name):
    for sample in stream_samples(f"{mixed.target}/{name}"):
        record = PairRecord.from_bytes(sample.members["pairs.json"], sample.caption(), sample.key)
        assert [pair.sentence for pair in record.pairs] == list(range(len(record.sentences)))
        assert len(record.sentences) > 0
        assert record.regions[0].source == "image"
        assert record.provenance["matcher"]["model"]["name"]


def test_records_are_about_the_upright_picture(mixed):
    sizes = {
        sample.key: tuple(json.loads(sample.members["pairs.json"])["size"])
        for sample in stream_samples(f"{mixed.target}/odd näme 1.tar")
    }
    assert sizes == GOOD


def test_the_webdataset_library_reads_paired_tars(mixed):
    read = list(webdataset.WebDataset(str(mixed.target / "many.tar"), shardshuffle=False))
    assert [(sample["__key__"], "pairs.json" in sample) for sample in read] == [(f"{n:04}", True) for n in range(11)]


def test_a_run_with_too_many_bad_samples_says_so_after_doing_everything(mixed):
    assert mixed.failure.startswith(f"{mixed.summary['quarantined']} of {mixed.summary['samples']} samples")
    assert "max_bad_share=0.1" in mixed.failure
    assert f"{mixed.target}/quarantine" in mixed.failure
    assert mixed.after_failure == outputs(mixed.target)


def test_the_summary_counts_every_shard(mixed):
    keys = [key for keys, _ in MIXED.values() for key in keys]
    bad = [key for _, reasons in MIXED.values() for key in reasons]
    assert mixed.summary["paired"] == len(keys)
    assert mixed.summary["quarantined"] == len(bad)
    assert mixed.summary["samples"] == len(keys) + len(bad)
    assert mixed.summary["pairs"] == mixed.summary["sentences"] == sum(mixed.summary["similarity_histogram"])
    assert mixed.summary["paired_sentences"] == mixed.summary["sentences"]
    assert len(mixed.summary["first_bad"]) == 5
    assert json.loads((mixed.target / "lism.json").read_text("utf-8")) == mixed.summary


def images_by_phase(summary):
    assert sum(work["share"] for work in summary["work"].values()) == pytest.approx(1)
    assert all(work["seconds"] > 0 for work in summary["work"].values())
    return {phase: work["images"] for phase, work in summary["work"].items()}


def test_the_summary_tells_the_work_of_every_phase_that_was_ever_done_for_the_shards(mixed, resumed):
    for summary in (mixed.summary, resumed.summary):
        paired = summary["paired"]
        expected = {"read": summary["samples"], "propose": paired, "match": paired, "write": paired}
        assert images_by_phase(summary) == expected


def test_the_metrics_of_a_run_can_be_scraped_from_the_node_and_are_its_numbers(mixed):
    prefix, summary = "ray_goal_ray_lism_", mixed.summary
    found = scraped(
        "output",
        str(mixed.target),
        ("stage", "phase"),
        until=lambda found: found.get((f"{prefix}shards_done_total",)) == len(MIXED),
    )
    bad = Counter(stage for _, reasons in MIXED.values() for stage, _ in reasons.values())
    busy = {phase: work["seconds"] for phase, work in summary["work"].items()}
    # Ray forgets a gauge that is not set again.
    assert found.pop((f"{prefix}images_per_second",), 0) == 0
    assert found == {
        (f"{prefix}images_total",): summary["samples"],
        (f"{prefix}pairs_total",): summary["pairs"],
        (f"{prefix}shards_done_total",): len(MIXED),
        **{(f"{prefix}quarantined_total", stage): count for stage, count in bad.items()},
        **{(f"{prefix}busy_seconds_total", phase): pytest.approx(value, abs=0.01) for phase, value in busy.items()},
    }


@pytest.fixture(scope="module")
def resumed(mixed, tiny_clip, tmp_path_factory):
    """The same output after losses, another input tar, and a run with two matching actors instead of one."""
    source, target = (
        Path(shutil.copytree(folder, tmp_path_factory.mktemp("again"), dirs_exist_ok=True))
        for folder in (mixed.source, mixed.target)
    )
    for lost in ("many.tar", "done/many.tar.json", "done/mixed.tar.json", "quarantine/all-bad.tar.jsonl"):
        (target / lost).unlink()
    for part in ("", "done", "index", "quarantine"):
        left = target / part / f".many.tar.{'0' * 32}.1.{'0' * 32}.tmp"
        left.write_bytes(b"left by a kill")
        os.utime(left, (0, 0))
    write_members(source / "cut.tar", [member for n in range(3) for member in good(f"c{n}", seed=n)])
    times = {path: path.stat().st_mtime_ns for path in target.glob("*.tar")}
    more = ("max_bad_share=1", "matcher_actors=[2,2]")
    summary = run_lism(str(source), str(target), settings(tiny_clip, *more))
    return SimpleNamespace(target=target, summary=summary, times=times)


def test_a_run_after_losses_gives_the_same_bytes_with_any_number_of_actors(mixed, resumed):
    before, after = outputs(mixed.target), outputs(resumed.target)
    changed = {name for name in {*before, *after} if before.get(name) != after.get(name)}
    assert changed == {"cut.tar", "index/cut.tar.parquet", "done/cut.tar.json", "quarantine/cut.tar.jsonl"}


@pytest.mark.slow
def test_both_models_in_one_actor_give_the_same_bytes(mixed, tiny_clip, tmp_path):
    run_lism(str(mixed.source), str(tmp_path), settings(tiny_clip, "max_bad_share=1", "fused=true"))
    assert outputs(tmp_path) == outputs(mixed.target)


def test_a_run_does_only_what_is_missing_and_tells_the_speed_of_that(resumed):
    untouched = {path.name for path, time in resumed.times.items() if path.stat().st_mtime_ns == time}
    assert untouched == {"odd näme 1.tar"}
    kept = [parts for name, parts in MIXED.items() if name not in ("many.tar", "mixed.tar", "all-bad.tar", "cut.tar")]
    assert resumed.summary["images"] == resumed.summary["samples"] - sum(len(part) for parts in kept for part in parts)
    assert resumed.summary["images_per_s"] == pytest.approx(
        resumed.summary["images"] / resumed.summary["seconds"], rel=0.1
    )


def test_a_mended_input_tar_is_done_again_and_leaves_the_quarantine(resumed):
    assert [sample.key for sample in stream_samples(f"{resumed.target}/cut.tar")] == ["c0", "c1", "c2"]
    assert quarantine(resumed.target, "cut.tar") == {}


def test_outputs_of_tars_that_are_no_input_any_more_do_not_count(mixed, tiny_clip):
    result = run_lism(str(mixed.source / "many.tar"), str(mixed.target), settings(tiny_clip))
    assert (result["samples"], result["quarantined"]) == (11, 0)


def test_a_model_that_does_not_load_is_one_clear_error(mixed, tiny_clip, tmp_path):
    (tmp_path / "torn.pt").write_bytes(b"no weights")
    config = settings(tiny_clip, f"matcher.model.weights={tmp_path}/torn.pt")
    with pytest.raises(StageError, match=r"cannot start to match: .*torn\.pt.*run the same command again"):
        run_lism(str(mixed.source / "many.tar"), str(tmp_path / "out"), config)
    assert sorted(os.listdir(tmp_path / "out")) == ["config.yaml", "settings.json"]


@pytest.mark.usefixtures("cluster")
def test_sam_from_the_command_line_goes_on_after_a_failed_write(tiny_clip, tmp_path, capfd):
    save(tiny_sam().state_dict(), tmp_path / "sam.pth")
    (tmp_path / "in").mkdir()
    for name in "ab":
        write_members(tmp_path / "in" / f"{name}.tar", [*good("x"), *good("y", seed=1)])
    (tmp_path / "lism.yaml").write_text(
        f"proposer: {{name: sam, checkpoint: {tmp_path}/sam.pth, points_per_side: 4, pred_iou_thresh: -1.0e9,"
        " stability_score_thresh: 0}\n"
    )
    command = [str(tmp_path / "in"), str(tmp_path / "out"), "--config", str(tmp_path / "lism.yaml")]
    command.append(f"matcher.model.name={tiny_clip}")
    check_settings(str(tmp_path / "out"), load_config(LismConfig, tmp_path / "lism.yaml", command[4:]))
    (tmp_path / "out" / "b.tar").mkdir()
    with pytest.raises(StageError, match=r"pairs of b\.tar cannot be written: IsADirectoryError"):
        main(command)
    (tmp_path / "out" / "b.tar").rmdir()
    main(command)
    captured = capfd.readouterr()
    assert "samples 4: paired 4, quarantined 0" in captured.out
    assert "4 images, 2 shards, 0 bad" in captured.err or "2 images, 1 shards, 0 bad" in captured.err
    for name in "ab":
        for sample in stream_samples(f"{tmp_path}/out/{name}.tar"):
            regions = json.loads(sample.members["pairs.json"])["regions"]
            assert Counter(region["source"] for region in regions)["sam"] >= 1


@pytest.mark.usefixtures("cluster")
def test_gpus_that_the_cluster_lacks_are_refused(tiny_clip, tmp_path):
    write_members(tmp_path / "a.tar", good("x"))
    config = settings(tiny_clip, "device=cuda", "matcher_actors=[3,3]", "gpus_per_actor=1")
    with pytest.raises(StageError, match=r"need 3 GPUs.*gpus_per_actor or device"):
        run_lism(str(tmp_path / "a.tar"), str(tmp_path / "out"), config)


@pytest.mark.usefixtures("cluster")
def test_custom_resources_that_a_private_cluster_lacks_are_refused(tiny_clip, tmp_path):
    write_members(tmp_path / "a.tar", good("x"))
    config = settings(tiny_clip, "actor_resources={lism: 1}")
    with pytest.raises(StageError, match=r"need 2 lisms, and the cluster has 0; change actor_resources"):
        run_lism(str(tmp_path / "a.tar"), str(tmp_path / "out"), config)


@pytest.fixture
def no_ray(monkeypatch):
    """Any import of Ray fails."""
    monkeypatch.setitem(sys.modules, "ray", None)


@pytest.mark.usefixtures("no_ray")
class TestRefusedBeforeRayStarts:
    @pytest.mark.parametrize(
        ("setting", "error"),
        [
            ("proposer.name=watershed", "felzenszwalb.*grid.*sam"),
            ("proposer.nam=grid", "proposer.*nam: unknown key"),
            ("propose.name=grid", "unknown key"),
            ("min_area=0.9", "min_area < max_area"),
            ("matcher_actors=[2,1]", "matcher_actors must be"),
            ("images_per_batch=0", "images_per_batch must be at least 1"),
            ("gpus_per_actor=0", "gpus_per_actor must be"),
            ("gpus_per_actor=2", "gpus_per_actor must be more than 0 and at most 1"),
            ("max_bad_share=2", "max_bad_share"),
        ],
    )
    def test_impossible_settings(self, tmp_path, setting, error):
        write_members(tmp_path / "a.tar", good("x"))
        with pytest.raises(ConfigError, match=error):
            main([str(tmp_path), str(tmp_path / "out"), setting])
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        ("settings", "kind", "error"),
        [
            (["proposer.name=sam", "proposer.checkpoint=/none/sam.pth"], ModelError, r"no checkpoint at /none/sam"),
            (["language=English"], ConfigError, "'English' is not"),
        ],
    )
    def test_what_only_a_look_tells(self, tmp_path, settings, kind, error):
        write_members(tmp_path / "a.tar", good("x"))
        with pytest.raises(kind, match=error):
            main([str(tmp_path), str(tmp_path / "out"), *settings])
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(("name", "error"), [("none", "no such"), ("", "holds no .tar"), ("*.tar", "no file")])
    def test_missing_or_empty_input(self, tmp_path, name, error):
        with pytest.raises(ShardError, match=error):
            main([str(tmp_path / name), str(tmp_path / "out")])

    @pytest.mark.parametrize("out", ["in", "in/", "./in", "link", "other/../in"])
    def test_an_output_folder_that_is_the_input_folder(self, tmp_path, monkeypatch, out):
        (tmp_path / "in").mkdir()
        (tmp_path / "other").mkdir()
        (tmp_path / "link").symlink_to("in")
        write_members(tmp_path / "in" / "a.tar", good("x"))
        before = (tmp_path / "in" / "a.tar").read_bytes()
        monkeypatch.chdir(tmp_path)
        with pytest.raises(StageError, match="would replace the input"):
            main(["in", out])
        assert os.listdir("in") == ["a.tar"]
        assert (tmp_path / "in" / "a.tar").read_bytes() == before

    def test_other_settings_for_the_same_folder(self, mixed, tiny_clip):
        with pytest.raises(StageError, match=r"other settings \(proposer, min_area; see .*settings.json"):
            run_lism(str(mixed.source), str(mixed.target), settings(tiny_clip, "proposer.levels=[4]", "min_area=0.02"))

    def test_a_finished_folder_needs_no_ray_at_all(self, mixed, tiny_clip):
        again = run_lism(str(mixed.source), str(mixed.target), settings(tiny_clip, "max_bad_share=1"))
        assert {**again, "seconds": 0} == {**mixed.summary, "seconds": 0}

    def test_a_run_with_nothing_left_to_do_tells_what_made_the_pairs_and_not_what_it_would_have_made(
        self, mixed, tiny_clip
    ):
        run_lism(str(mixed.source), str(mixed.target), settings(tiny_clip, "max_bad_share=1", "max_pixels=2_000_000"))
        made_by = section(read_page(mixed.target / "gallery.html"), "made-by").text
        assert "1000000" in made_by
        assert "2000000" not in made_by
