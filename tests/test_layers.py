"""Imports go one way; what computes runs without Ray and DeepSpeed, and what reads without torch."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from goal_ray.__main__ import STAGES
from goal_ray.batches import ExampleBuilder
from goal_ray.geometry import PixelGeometry
from goal_ray.model import load_model
from goal_ray.settings import ModelConfig, ResizeConfig
from goal_ray.text import CaptionEncoder
from goal_ray.train.ingest import pickled

ROOT = Path(__file__).parents[1]
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in ("goal_ray", "kernels")
    for path in sorted((ROOT / package).rglob("*.py"))
}
OUTSIDE_CORE = tuple(f"goal_ray.{part}" for part in (*STAGES, "cli", "ray_session", "__main__"))
CORE = [
    name
    for name in MODULES
    if name.startswith("goal_ray.") and not f"{name}.".startswith(tuple(f"{part}." for part in OUTSIDE_CORE))
]


def imports_of(name: str, nodes: Iterator[ast.AST]) -> set[str]:
    """Full names of the modules (or of the things in them) that the import statements among `nodes` name."""
    package = name if MODULES[name].name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] if node.level else ""
            source = ".".join(filter(None, [base, node.module]))
            found |= {f"{source}.{alias.name}" for alias in node.names}
    return found


def all_imports(name: str) -> set[str]:
    """Every import of a module, those inside functions too."""
    return imports_of(name, ast.walk(ast.parse(MODULES[name].read_text())))


def import_time_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """Everything that runs when the module is imported: all but the bodies of functions."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield child
            yield from import_time_nodes(child)


def within(imported: set[str], *packages: str) -> set[str]:
    """The imports that are one of the packages or lie inside one."""
    return {name for name in imported if any(f"{name}.".startswith(f"{package}.") for package in packages)}


@pytest.mark.parametrize("name", [name for name in MODULES if name.startswith("kernels")])
def test_kernels_import_torch_and_triton_only(name):
    imported = all_imports(name)
    drawing = ["matplotlib"] if name == "kernels.benchmark.plot" else []
    allowed = within(imported, "torch", "triton", "kernels", *drawing, *sys.stdlib_module_names)
    assert imported - allowed == set()


@pytest.mark.parametrize("name", CORE)
def test_the_core_imports_no_stage(name):
    assert within(all_imports(name), *OUTSIDE_CORE) == set()


@pytest.mark.parametrize("name", CORE)
def test_the_core_imports_neither_ray_nor_deepspeed_anywhere(name):
    assert within(all_imports(name), "ray", "deepspeed") == set()


@pytest.mark.parametrize("name", list(MODULES))
def test_no_module_imports_ray_or_deepspeed_when_it_is_imported(name):
    tree = ast.parse(MODULES[name].read_text())
    assert within(imports_of(name, import_time_nodes(tree)), "ray", "deepspeed") == set()


def test_imports_go_in_no_circle():
    def uses(name: str) -> set[str]:
        parts = [imported.split(".") for imported in within(all_imports(name), "goal_ray", "kernels")]
        prefixes = {".".join(words[:length]) for words in parts for length in (len(words) - 1, len(words))}
        return prefixes & set(MODULES) - {name}

    waiting = {name: uses(name) for name in MODULES}
    while free := {name for name, needed in waiting.items() if not needed & set(waiting)}:
        waiting = {name: needed for name, needed in waiting.items() if name not in free}
    assert waiting == {}


def test_stages_import_each_other_in_no_circle():
    package_of = {name: ".".join(name.split(".")[:2]) for name in MODULES if name.startswith("goal_ray.")}
    stages = {f"goal_ray.{stage}" for stage in STAGES}
    waiting: dict[str, set[str]] = {stage: set() for stage in stages}
    for name, package in package_of.items():
        if package in stages:
            waiting[package] |= {".".join(used.split(".")[:2]) for used in all_imports(name)} & stages - {package}
    while free := {stage for stage, needed in waiting.items() if not needed & set(waiting)}:
        waiting = {stage: needed for stage, needed in waiting.items() if stage not in free}
    assert waiting == {}


WITHOUT_RAY = """
import importlib, pkgutil, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("ray", "deepspeed"):
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocked())
for blocked in ("ray", "deepspeed"):
    try:
        importlib.import_module(blocked)
    except ImportError:
        continue
    sys.exit(f"{blocked} could be imported")

import goal_ray, kernels
for package in (goal_ray, kernels):
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        importlib.import_module(module.name)
        print(module.name)

from pathlib import Path
import numpy as np
import torch
from dataclasses import replace
from goal_ray.batches import ExampleBuilder, collate
from goal_ray.goal_batch import pack, unpack
from goal_ray.evaluate.run import evaluate
from goal_ray.geometry import PixelGeometry
from goal_ray.settings import ResizeConfig
from goal_ray.images import decode_image
from goal_ray.lism.config import MatcherConfig
from goal_ray.lism.matching import Matcher, MatchTask
from goal_ray.losses import GoalModel
from goal_ray.settings import LossConfig
from goal_ray.model import load_model, save_model
from goal_ray.settings import ModelConfig
from goal_ray.pairs import PairRecord, Region
from goal_ray.regions import FelzenszwalbConfig, build_proposer, usable
from goal_ray.scenes.run import SceneSettings, draw_scenes
from goal_ray.tars import stream_samples
from goal_ray.sentences import split_sentences
from goal_ray.text import CaptionEncoder

tiny, folder = ModelConfig(sys.argv[1]), Path(sys.argv[2])
tars = draw_scenes(folder / "scenes", 2, 0, SceneSettings(size=48))
loaded = load_model(tiny)
proposer, matcher = build_proposer(FelzenszwalbConfig(), "cpu"), Matcher(MatcherConfig(tiny), "cpu")
geometry = PixelGeometry(ResizeConfig(), loaded.size_px, loaded.grid_HW)
build = ExampleBuilder(geometry, geometry, CaptionEncoder(loaded.tokenizer), loaded.context_length, pairs=2)
examples = []
for sample in stream_samples(tars[0]):
    image = decode_image(sample.image_bytes())
    (proposed,) = proposer.propose([np.asarray(image)])
    boxes = np.array([(0, 0, *image.size), *usable(proposed, image.size).boxes_px], np.float32)
    spans = split_sentences(sample.caption())
    (pairs,) = matcher.match([MatchTask(np.asarray(image), boxes, [sample.caption()[a:b] for a, b in spans])])
    regions = tuple(Region(tuple(map(float, box)), 1.0, "felzenszwalb") for box in boxes)
    record = PairRecord(image.size, tuple(spans), regions, tuple(pairs), {})
    examples.append(build(replace(sample, members={**sample.members, "pairs.json": record.to_bytes()}), tars[0], 0))

model = GoalModel(loaded.clip, LossConfig(), loaded.preprocess["mean"], loaded.preprocess["std"])
terms = model(unpack(pack(collate(examples))))
terms.sum().backward()
assert terms.shape == (4,) and (terms > 0).all(), terms
assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())

save_model(folder / "model", loaded, loaded.clip.state_dict())
assert evaluate(str(folder / "model"), tars[0])["count"] == 2
assert not {"ray", "deepspeed"} & set(sys.modules)
print("done")
"""


def test_every_module_imports_and_the_core_runs_without_ray_and_deepspeed(tiny_clip, tmp_path):
    command = [sys.executable, "-c", WITHOUT_RAY, tiny_clip, str(tmp_path)]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    *imported, last = finished.stdout.splitlines()
    assert last == "done"
    assert set(imported) == set(MODULES) - {"goal_ray", "kernels"}


MODEL_LIBRARIES = {"torch", "torchvision", "open_clip", "timm", "transformers"}


def loaded_by(program: str, *arguments: str) -> set[str]:
    """The model libraries that a new process has loaded after a program."""
    command = [sys.executable, "-c", f"import sys; {program}\nprint(*sys.modules)", *arguments]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return MODEL_LIBRARIES & set(finished.stdout.split())


@pytest.mark.parametrize("name", ["goal_ray.lism.run", "goal_ray.lism.reading", "goal_ray.train.run"])
def test_drivers_and_the_readers_of_lism_load_no_model_library(name):
    # The imports of a reader of LISM, one for every CPU, would take 10 s and 800 MB instead of 0.4 s and 50 MB.
    assert loaded_by(f"import {name}") == set()


@pytest.mark.parametrize("proposer", ["grid", "felzenszwalb"])
def test_an_actor_of_a_proposer_loads_all_libraries_before_its_first_picture(proposer):
    """Else their seconds would count as its work, and against its limit."""
    program = """
import numpy as np
from goal_ray.config import load_config
from goal_ray.lism.config import LismConfig
from goal_ray.lism.groups import Item
from goal_ray.lism.stages import ProposeRegions
propose = ProposeRegions(load_config(LismConfig, overrides=("proposer.name=" + sys.argv[1],)), "cpu")
picture = np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)
before = {*sys.modules}
propose([Item(0, "a", size=(80, 60), picture_HW3=picture)])
for name in before:
    sys.modules.pop(name)
"""
    assert loaded_by(program, proposer) == set()


@pytest.mark.parametrize("stage", STAGES)
def test_a_command_teaches_without_loading_a_model_library(stage):
    assert loaded_by(f"import goal_ray.{stage}.__main__") == set()


def test_the_readers_of_a_training_load_torch_alone(tiny_clip, tmp_path):
    loaded = load_model(ModelConfig(tiny_clip))
    geometry = PixelGeometry(ResizeConfig(), loaded.size_px, loaded.grid_HW)
    builder = ExampleBuilder(geometry, geometry, CaptionEncoder(loaded.tokenizer), loaded.context_length, pairs=1)
    stored = tmp_path / "builder"
    stored.write_bytes(pickled(builder))
    program = "from goal_ray.train.ingest import unpickled; unpickled(open(sys.argv[1], 'rb').read())"
    assert loaded_by(program, str(stored)) == {"torch"}
