"""The processes of Ray's workers, found by what Ray calls their work."""

from contextlib import suppress

import psutil


def workers_below(parent: psutil.Process, title: str) -> list[psutil.Process]:
    """The processes below another whose title holds a text; what ends meanwhile is left out."""
    found = []
    for process in parent.children(recursive=True):
        with suppress(psutil.Error):
            if title in " ".join(process.cmdline()):
                found.append(process)
    return found
