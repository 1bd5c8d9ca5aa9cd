"""A paired tar: the members of an input tar as they were, and KEY.pairs.json behind those of every sample."""

import io
import tarfile
from collections.abc import Mapping
from contextlib import suppress
from copy import copy
from typing import NamedTuple

from goal_ray.atomic import open_atomic
from goal_ray.errors import ShardError
from goal_ray.lism.groups import storable_key
from goal_ray.storage import open_read
from goal_ray.tar_places import MemberPlace
from goal_ray.tars import (
    DAMAGE,
    LARGEST_MEMBER_BYTES,
    PAIRS_EXTENSION,
    Member,
    NotOneTar,
    end_mark,
    forget_members,
    iter_members,
    member_info,
    open_tar,
    padded_bytes,
    read_member,
)


class PairedTar(NamedTuple):
    """What was written.

    parts       sample number in the input tar -> (offset, size) in bytes of the part that holds the sample's members
    places      of the members of all samples
    size_bytes  of the tar
    """

    parts: dict[int, tuple[int, int]]
    places: list[MemberPlace]
    size_bytes: int


def write_paired_tar(
    source: str, target: str, pairs: Mapping[int, bytes], keys: Mapping[int, str] | None = None
) -> PairedTar:
    """Copies a tar member by member, adding each sample's pairs.json behind its members; no tar is held in memory.

    keys  sample number -> the sample's `storable_key` when its pairs were made. Raises ShardError for another one.

    Samples that are not in `pairs` are left out; members of no sample are kept, unless they have more than
    LARGEST_MEMBER_BYTES; an earlier pairs.json is replaced.
    Reads up to the damage of a truncated tar, whose samples beyond it cannot be in `pairs`.
    """
    starts: dict[int, int] = {}
    parts: dict[int, tuple[int, int]] = {}
    places: list[MemberPlace] = []
    with (
        open_read(source) as input_file,
        open_atomic(target) as output_file,
        tarfile.open(fileobj=output_file, mode="w", format=tarfile.PAX_FORMAT) as output,
    ):

        def add(header: tarfile.TarInfo, data: bytes, key: str, extension: str) -> None:
            """Adds a member, of a sample where it has a key."""
            output.addfile(header, io.BytesIO(data))
            forget_members(output)
            if key:
                # As a reader counts them: two samples of one key are one where what stood between them is left out.
                sample = places[-1].sample + (places[-1].key != key) if places else 0
                place = output.offset - padded_bytes(len(data))
                places.append(MemberPlace(sample, key, extension, place, len(data)))

        def end_sample(member: Member) -> None:
            """Adds the pairs.json of the sample that `member` belongs to."""
            if member.sample in pairs:
                data = pairs[member.sample]
                name = f"{member.key}.{PAIRS_EXTENSION}"
                add(member_info(name, len(data)), data, member.key, PAIRS_EXTENSION)
                start = starts[member.sample]
                parts[member.sample] = (start, output.offset - start)

        last: Member | None = None
        try:
            with suppress(NotOneTar), open_tar(input_file, "r|") as tar:  # the first of two tars is whole
                for member in iter_members(tar):
                    if last is not None and member.sample != last.sample and member.sample >= 0:
                        end_sample(last)
                    if member.sample >= 0:
                        if keys and member.sample in keys and keys[member.sample] != storable_key(member.key):
                            raise ShardError(
                                f"{source}: {member.key!r} stands where {keys[member.sample]!r} stood when it was "
                                "read; the tar was changed meanwhile: run the same command again",
                                member.key,
                            )
                        last = member
                        starts.setdefault(member.sample, output.offset)
                        if member.sample not in pairs or member.extension == PAIRS_EXTENSION:
                            continue
                    if member.info.size > LARGEST_MEMBER_BYTES:  # of no sample, or it would not be in `pairs`
                        continue
                    # Links and folders, too, may give a size, but only what tarfile does not know has that much data.
                    holds = member.info.isreg() or member.info.type not in tarfile.SUPPORTED_TYPES
                    data = read_member(tar, member.info) if holds else b""
                    add(resized(member.info, len(data)), data, member.key, member.extension)
        except DAMAGE:
            if last is not None and last.sample in pairs:
                raise
        else:
            if last is not None:
                end_sample(last)
        lost = keys.keys() & pairs.keys() - parts.keys() if keys else ()
        if lost:
            raise ShardError(f"{source}: lacks {len(lost)} samples that it held before; run the same command again")
        content_bytes = output.offset
    return PairedTar(parts, places, content_bytes + len(end_mark(content_bytes)))


def resized(info: tarfile.TarInfo, size_bytes: int) -> tarfile.TarInfo:
    """A member's header for so many bytes of data: the same, where it tells of them, and of no holes between them."""
    if info.issparse():
        return member_info(info.name, size_bytes)
    if info.size == size_bytes:
        return info
    other = copy(info)
    other.size = size_bytes
    other.pax_headers = {name: value for name, value in info.pax_headers.items() if name != "size"}
    return other
