"""Models split over several files, as ``llama-gguf-split`` and gguf-py write them.

Shard ``i`` of ``n``, counted from 1, is named ``PREFIX-0000i-of-0000n.gguf``. Each has the keys ``split.count`` (n),
``split.no`` (i - 1) and ``split.tensors.count`` (of all shards together); the model's own keys are in the first.
"""

from __future__ import annotations

import re
from pathlib import Path

from qmm.errors import GGUFError
from qmm.loaders.gguf.metadata import Metadata

__all__ = ["check_shard", "check_total", "is_whole", "shard_paths", "split_count"]

SHARD_NAME = re.compile(r"(?P<prefix>.*)-(?P<number>[0-9]{5})-of-(?P<count>[0-9]{5})\.gguf", re.DOTALL)


def split_count(path: Path, metadata: Metadata) -> int:
    """The number of files that the model in ``path`` is split over; 1 for a whole file.

    Raises:
        GGUFError: ``split.count`` is negative or no integer.
    """
    count = metadata.integer("split.count", default=1)
    if count < 0:
        raise GGUFError(f"{path}: metadata key 'split.count' is {count}. The file is damaged: fetch it again.")
    return max(1, count)  # merged shards say 0


def is_whole(path: Path, metadata: Metadata, count: int, total: int) -> bool:
    """Whether a file of ``total`` tensors holds a whole model, though its keys name ``count`` shards.

    A file that was merged or requantized from shards keeps their keys. Then ``split.tensors.count`` is its own number
    of tensors, and the other shards are not beside it.
    """
    if metadata.integer("split.tensors.count", default=-1) != total:
        return False
    try:
        shard_paths(path, count)
    except GGUFError:
        return True
    return False


def shard_paths(path: Path, count: int) -> tuple[Path, ...]:
    """The paths of all ``count`` shards, in order, from that of any one.

    Raises:
        GGUFError: ``path`` has not the name of one of ``count`` shards, or shards are missing.
    """
    match = SHARD_NAME.fullmatch(path.name)
    if match is None:
        raise GGUFError(
            f"{path}: is one of {count} shards (split.count), but is not named like NAME-00001-of-{count:05d}.gguf, so "
            "the others cannot be found. Give all shards their first names, or join them (llama-gguf-split --merge)."
        )
    if int(match["count"]) != count:
        raise GGUFError(
            f"{path}: its name says {int(match['count'])} shards, but split.count is {count}. "
            "Give the file its original name, or fetch it again."
        )
    if not 1 <= int(match["number"]) <= count:
        raise GGUFError(
            f"{path}: its name says shard {int(match['number'])} of {count}, and they are counted from 1. "
            "Give the file its original name, or fetch it again."
        )
    # A wrong count is bounded by its five digits, and by the first shard that is missing.
    paths = []
    for number in range(1, count + 1):
        paths.append(path.with_name(f"{match['prefix']}-{number:05d}-of-{count:05d}.gguf"))
        if not paths[-1].exists():
            raise GGUFError(
                f"{path}: shard {number} of {count} is missing: {paths[-1]}. Put all shards into one folder."
            )
    return tuple(paths)


def check_shard(path: Path, metadata: Metadata, index: int, count: int) -> None:
    """Check that the keys of ``path`` say that it is shard ``index`` (from 0) of ``count``.

    Raises:
        GGUFError: They say something else.
    """
    theirs = split_count(path, metadata)
    number = metadata.integer("split.no", default=-1)
    if (theirs, number) != (count, index):
        raise GGUFError(
            f"{path}: should be shard {index} of {count} (split.no, split.count), but says {number} of {theirs}. "
            "The files of different models were mixed, or a shard was renamed."
        )


def check_total(path: Path, metadata: Metadata, count: int, total: int) -> None:
    """Check the number of tensors in all ``count`` shards against ``split.tensors.count`` of ``path``, if it is there.

    Raises:
        GGUFError: They differ.
    """
    expected = metadata.integer("split.tensors.count", default=total)
    if expected != total:
        raise GGUFError(
            f"{path}: split.tensors.count is {expected}, but the {count} shards hold {total} tensors. "
            "One of them comes from another version of the model: fetch them again."
        )
