"""What all command lines share: parsing with `key=value` overrides, and errors without tracebacks."""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence

from goal_ray.config import describe
from goal_ray.errors import GoalRayError


def parser(
    stage: str, description: str, example: str, positionals: Mapping[str, str], config: type | None = None
) -> argparse.ArgumentParser:
    """A stage's parser; with a config class, its keys and defaults stand at the end of --help.

    positionals  name -> help, in order; `key=value` settings may follow them. Parse with `parse_intermixed_args`.
    """
    epilog = f"example:\n  {example}"
    if config is not None:
        epilog += f"\n\nsettings (YAML keys, or key=value on the command line):\n{describe(config)}"
    made = argparse.ArgumentParser(
        prog=f"goal-ray {stage}",
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for name, text in positionals.items():
        made.add_argument(name.lower(), metavar=name, help=text)
    if config is not None:
        made.add_argument("settings", nargs="*", metavar="key=value", help="settings that override the config file")
    return made


def run_main(main: Callable[[Sequence[str] | None], None], arguments: Sequence[str] | None = None) -> None:
    """Runs a stage's main; a user's error becomes one message on stderr and exit status 2."""
    try:
        main(arguments)
    except GoalRayError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        raise SystemExit(130) from None
