"""`goal-ray shards COMMAND ...`, or `python -m goal_ray.shards COMMAND ...`."""

import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict

from tqdm import tqdm

from goal_ray.atomic import open_atomic, remove_abandoned
from goal_ray.cli import parser, run_main
from goal_ray.shard_urls import expand_shards
from goal_ray.shards.inspect import inspect_shards, print_contents
from goal_ray.shards.make import SKIPPED_FILE, ShardSize, make_shards
from goal_ray.shards.reshard import Balance, reshard
from goal_ray.shards.sources.detect import KINDS, SourceSettings
from goal_ray.shards.sources.lists import CAPTION_COLUMNS, PICTURE_COLUMNS
from goal_ray.shards.validate import validate_shards
from goal_ray.shards.workers import map_shards
from goal_ray.storage import join
from goal_ray.tar_index import index_url, make_index

COMMANDS = {
    "make": "make shards of a folder, COCO JSON, CSV/TSV/JSONL/Parquet list, or img2dataset output",
    "inspect": "show what is in shards, quickly",
    "validate": "check shards against the contract, and list all that breaks it",
    "index": "write beside each tar where its samples lie: trainings then start without reading the tars",
    "reshard": "spread samples over another number of shards, equally, also shuffled",
}
DESCRIPTION = """Tools for shards: WebDataset tars of KEY.jpg|jpeg|png|webp, KEY.txt and maybe other members.

""" + "\n".join(f"  {name:<10}{text}" for name, text in COMMANDS.items())

MAKE = """Make shards of pictures and captions. SOURCE is one of these, told by what is there:

  folder       pictures (also in folders inside), each with its caption beside it: a/x.jpg and a/x.txt, maybe a/x.json
  coco         a COCO file.json with images (id, file_name) and annotations (image_id, caption)
  list         .csv, .tsv, .jsonl or .parquet with a row per picture: its path and its caption; a folder, glob or brace
               pattern of such lists; Parquet may hold the pictures themselves
  img2dataset  its output: tars, or folders of files, with their .parquet tables; tars of other tools too

OUT gets NAME-000000.tar, … with KEY.jpg, .png or .webp, KEY.txt, and KEY.json with the record's other fields. Pictures
are copied byte for byte, and named for what they hold. KEY is the picture's path without suffix, with %2E for a dot in
its last part; tars and img2dataset keep theirs. What cannot be a sample is skipped and listed in OUT/skipped.jsonl with
key, place and reason: no caption, not JPEG/PNG/WebP, unreadable, a key for the second time, a failed download, … No
picture is decoded: `goal-ray shards validate` does that.

The same command gives the same bytes. Interrupted and begun again, it goes on behind the last complete shard; a changed
SOURCE needs another OUT. SOURCE and OUT may be on any storage that fsspec reaches (s3://…). Memory does not grow with
SOURCE but for 16 bytes per sample; a COCO file is held whole."""

INSPECT = """Show what is in shards: samples, bytes and members of each, how many are paired (KEY.pairs.json), the
lengths of captions, the sizes of pictures, and some examples. Reads the tars' headers, and of 300 samples drawn at
random the captions and the pictures' headers. A damaged tar is named."""

VALIDATE = """Check shards against the contract, and print every violation on a line: `shard: key: what; remedy`.

Found are: damaged or truncated tars, and data behind a tar's end; members of no sample; keys at two places, also in two
shards; no picture or more than one; pictures that cannot be decoded, are too large, or are named for another format;
captions that are missing, empty or not UTF-8; any other member twice; extensions not in lower case; and all that is
wrong in KEY.pairs.json, its size against the picture's too. Folders in a tar are no violation.

Exit status: 0 without violations, 1 with some, 2 where shards cannot be read at all. Memory: 8 bytes per sample, twice
that at the end, and a shard's keys per worker."""

INDEX = """Write FOLDER/index/NAME.tar.parquet for every FOLDER/NAME.tar: the key, extension, place and size of members.

A training looks for the samples of its tars when it starts and when it goes on. Without an index it reads the tars'
headers, for which it reads remote tars (s3://…) whole; with one, some kilobytes of each. `goal-ray lism` writes indexes
itself; this is for other tars. An index that fits its tar stays; one of a tar that has changed is written anew, and
where nobody does so, a training reads the headers after all."""

RESHARD = """Spread the samples of shards over other shards, equally many in each: NAME-000000.tar, … in OUT.

Members stay as they are, byte for byte, with their headers. Their order stays too, or --shuffle mixes all samples of
all shards. A shuffle reads each sample at a random place: cheap on a local SSD, a request per sample on an object
store. Where samples lie is read from the headers first and held in memory, about 50 bytes per sample.

Damaged tars and keys that stand twice are refused. Interrupted and begun again, it goes on behind the last complete
shard; SHARDS that were changed, or only copied or touched meanwhile, need another OUT."""

SHARDS = {"SHARDS": "folder, file, glob or brace pattern of tars; any storage fsspec reaches"}
KNOWN_COLUMNS = {
    "picture": f"the only one named {', '.join(PICTURE_COLUMNS)}",
    "caption": f"the only one named {', '.join(CAPTION_COLUMNS)}",
    "key": "the pictures' paths without suffix",
}
WORKERS = "processes (default: one per CPU)"


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses the command's name and runs it."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    command = parser("shards", DESCRIPTION, "goal-ray shards make --help", {})
    command.add_argument(
        "command", metavar="COMMAND", choices=COMMANDS, help=f"{', '.join(COMMANDS)}; each has a --help"
    )
    name = command.parse_args(given[:1]).command
    RUN[name](given[1:])


def run_make(arguments: Sequence[str]) -> None:
    """`goal-ray shards make`."""
    positionals = {"SOURCE": "folder, file, glob or brace pattern", "OUT": "folder for the tars"}
    example = "goal-ray shards make captions.csv shards/train --images photos/ --caption-column text"
    command = parser("shards make", MAKE, example, positionals)
    command.add_argument("--from", dest="kind", choices=KINDS, help="the kind of SOURCE, where what is there misleads")
    command.add_argument(
        "--images",
        metavar="DIR",
        help="folder that paths in SOURCE start from (default: that of the list or COCO file)",
    )
    for what in ("picture", "caption", "key"):
        default = KNOWN_COLUMNS[what]
        text = f"column of a list with the {what}s (default: {default})"
        command.add_argument(f"--{what}-column", metavar="C", help=text)
    command.add_argument(
        "--captions",
        choices=("join", "first"),
        default="join",
        help="of several captions of one picture, make one long caption, for GOAL learns from the sentences of long "
        "captions, or take the first (default: %(default)s)",
    )
    command.add_argument(
        "--no-quotes",
        dest="quotes",
        action="store_false",
        help="take quotation marks in CSV and TSV as they stand; else they enclose fields",
    )
    size = ShardSize()
    command.add_argument(
        "--samples-per-shard",
        metavar="N",
        type=int,
        default=size.samples,
        help="a shard is what `goal-ray lism` does at a time, and does again after an interruption "
        "(default: %(default)s)",
    )
    command.add_argument(
        "--max-shard-bytes",
        metavar="N",
        type=int,
        default=size.size_bytes,
        help="no tar is larger, unless by a single sample (default: %(default)s)",
    )
    command.add_argument("--name", help="what the tars are called (default: the last part of OUT)")
    options = vars(command.parse_args(arguments))
    out, name = options.pop("out"), options.pop("name")
    size = ShardSize(options.pop("samples_per_shard"), options.pop("max_shard_bytes"))
    made, tars = make_shards(SourceSettings(options.pop("source"), **options), out, name, size)
    print(
        f"{made.samples} samples in {tars} tars under {out}; {made.skipped.total()} skipped{':' * bool(made.skipped)}"
    )
    for kind, count in made.skipped.most_common():
        print(f"  {kind} {count}")
    if made.skipped:
        print(f"listed in {join(out, SKIPPED_FILE)}")


def run_inspect(arguments: Sequence[str]) -> None:
    """`goal-ray shards inspect`."""
    command = parser("shards inspect", INSPECT, "goal-ray shards inspect shards/train", SHARDS)
    command.add_argument("--json", action="store_true", help="print JSON instead of the table")
    command.add_argument("--workers", metavar="N", type=int, help=WORKERS)
    options = command.parse_args(arguments)
    found = inspect_shards(options.shards, options.workers)
    if options.json:
        print(json.dumps(found))
    else:
        print_contents(found)


def run_validate(arguments: Sequence[str]) -> None:
    """`goal-ray shards validate`."""
    command = parser("shards validate", VALIDATE, "goal-ray shards validate shards/train --json bad.jsonl", SHARDS)
    command.add_argument("--json", metavar="FILE", help="write the violations as JSON Lines too: shard, key, problem")
    command.add_argument(
        "--headers-only", action="store_true", help="read no member: fast, and sees nothing that is inside one"
    )
    command.add_argument(
        "--max-pixels", metavar="N", type=int, default=150_000_000, help="largest picture (default: %(default)s)"
    )
    command.add_argument("--workers", metavar="N", type=int, help=WORKERS)
    options = command.parse_args(arguments)
    shards = samples = violations = 0
    with ExitStack() as stack:
        file = stack.enter_context(open_atomic(options.json)) if options.json else None
        for checked in validate_shards(options.shards, options.headers_only, options.max_pixels, options.workers):
            shards, samples = shards + checked.shards, samples + checked.samples
            violations += len(checked.violations)
            for violation in checked.violations:
                tqdm.write(str(violation))
                if file is not None:
                    file.write(json.dumps(asdict(violation)).encode() + b"\n")
    print(f"{samples} samples in {shards} tars: {f'{violations} violations' if violations else 'clean'}")
    if violations:
        raise SystemExit(1)


def run_index(arguments: Sequence[str]) -> None:
    """`goal-ray shards index`."""
    command = parser("shards index", INDEX, "goal-ray shards index s3://bucket/captions/", SHARDS)
    command.add_argument("--workers", metavar="N", type=int, help=WORKERS)
    options = command.parse_args(arguments)
    tars = expand_shards(options.shards)
    for folder in {index_url(tar).rpartition("/")[0] for tar in tars}:
        remove_abandoned(folder)
    written = [new for _, new in map_shards(make_index, tars, options.workers, "index")]
    print(f"{sum(written)} indexes written, {len(written) - sum(written)} were there")


def run_reshard(arguments: Sequence[str]) -> None:
    """`goal-ray shards reshard`."""
    positionals = {**SHARDS, "OUT": "folder for the tars, another one than that of SHARDS"}
    example = "goal-ray shards reshard shards/train shards/mixed --samples-per-shard 500 --shuffle 1"
    command = parser("shards reshard", RESHARD, example, positionals)
    command.add_argument("--shards", metavar="N", type=int, dest="count", help="make so many tars")
    command.add_argument(
        "--samples-per-shard", metavar="N", type=int, help="or as many tars as hold at most N samples each, equally"
    )
    command.add_argument(
        "--equal",
        choices=("samples", "bytes"),
        default="samples",
        help="what is made equal: samples, which differ by at most one, or bytes, as far as whole samples allow; a tar "
        "may then hold more than --samples-per-shard (default: %(default)s)",
    )
    command.add_argument("--shuffle", metavar="SEED", type=int, help="mix all samples; another seed, another order")
    command.add_argument("--name", help="what the tars are called (default: the last part of OUT)")
    command.add_argument("--workers", metavar="N", type=int, help=WORKERS)
    options = command.parse_args(arguments)
    balance = Balance(options.count, options.samples_per_shard, options.equal, options.shuffle)
    counts = reshard(options.shards, options.out, options.name, balance, options.workers)
    print(f"{sum(counts)} samples in {len(counts)} tars of {min(counts)} to {max(counts)} under {options.out}")


RUN = {
    "make": run_make,
    "inspect": run_inspect,
    "validate": run_validate,
    "index": run_index,
    "reshard": run_reshard,
}

if __name__ == "__main__":
    run_main(main)
