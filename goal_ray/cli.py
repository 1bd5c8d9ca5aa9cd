"""What all command lines share: parsing with `key=value` overrides, and errors without tracebacks."""

import argparse
import io
import re
import sys
from collections.abc import Callable, Mapping, Sequence

from goal_ray.config import describe, fill
from goal_ray.errors import GoalRayError

SETTINGS_HELP = """settings, with their defaults (null is nothing). Below, `a.b = 1` stands for `a: {b: 1}` in a YAML
file and for a.b=1 on the command line."""


def parser(
    stage: str,
    description: str,
    example: str,
    positionals: Mapping[str, str],
    config: type | None = None,
    prog: str | None = None,
) -> argparse.ArgumentParser:
    """A stage's parser; with a config class, its keys and defaults stand at the end of --help.

    description  paragraphs and lists, which are broken anew for the terminal
    positionals  name -> help, in order; `key=value` settings may follow them. Parse with `parse_intermixed_args`.
    prog         how to call it, where that is not `goal-ray STAGE`
    """
    epilog = f"example:\n  {example}"
    if config is not None:
        epilog += f"\n\n{reflow(SETTINGS_HELP)}\n{describe(config)}"
    made = argparse.ArgumentParser(
        prog=prog or f"goal-ray {stage}",
        description=reflow(description),
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for name, text in positionals.items():
        made.add_argument(name.lower(), metavar=name, help=text)
    if config is not None:
        # The default keeps argparse from calling them required where another positional is missing.
        made.add_argument(
            "settings", nargs="*", default=[], metavar="key=value", help="settings; they override the file's"
        )
    return made


def reflow(text: str) -> str:
    """A help text for the terminal's width. Paragraphs stand between empty lines; one with indented lines is a list.

    An item of a list goes on in lines that stand further right than its first one, or than the next item.
    """
    return "\n\n".join(map(reflow_paragraph, text.split("\n\n")))


def reflow_paragraph(text: str) -> str:
    """As `reflow`, of one paragraph."""
    if not re.search("^ ", text, re.MULTILINE):
        return fill(text, 0)
    indent = len(text) - len(text.lstrip(" "))
    lines = []
    for item in re.split(rf"\n(?= {{{indent}}}\S)", text):
        name = re.match(r" *\S+  +", item)  # in a column of its own, left of the item's text
        lines.append(fill(re.sub("\n *", " ", item), name.end() if name else indent + 2))
    return "\n".join(lines)


def printable(text: str) -> str:
    """The text on one line, what no terminal shows as an escape."""
    return text if text.isprintable() else repr(text)[1:-1]


def run_main(main: Callable[[Sequence[str] | None], None], arguments: Sequence[str] | None = None) -> None:
    """Runs a stage's main; a user's error, or the system's, becomes one message on stderr and exit status 2."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a key may hold what the terminal's encoding lacks
            stream.reconfigure(errors="backslashreplace")
    try:
        main(arguments)
    except (GoalRayError, OSError) as error:  # OSError: no rights, no room, no such place; it names the file
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except Exception as error:
        from goal_ray.patience import is_storage_error

        if not is_storage_error(error):
            raise
        print(
            f"error: {type(error).__name__}: {error}; is the address right, and are its credentials?", file=sys.stderr
        )
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
