"""Expansion of file patterns: a path, braces `{0000..2175}` and `{a,b}`, globs, `hf://` on the Hub, or an address.

What exists is itself: only the part of a pattern after its last existing folder has braces and globs.

Other forms are refused: a `pipe:` would run a shell. Only what the user names is read elsewhere: nothing inside a data
set is taken as an address.
"""

import glob
import itertools
import math
import os
import re
from pathlib import Path, PurePosixPath

from spar.common.errors import InputError, first_line
from spar.common.limits import MAX_SHARDS
from spar.data.remote import SCHEMES, DataFile, check_address, find_remote, is_remote, normal, shown

_HUB = re.compile(r"hf://(?:(datasets|spaces)/)?([\w.-]+/[\w.-]+?)(?:@([^/]+))?/(.+)")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


def expand_braces(pattern: str) -> list[str]:
    """Expand the braces of a pattern; numbers are padded like the first of their range.

    Raises:
        InputError: unclosed or nested braces, or more than MAX_SHARDS results.
    """
    if re.search(r"\{[^}]*\{", pattern):
        raise InputError(f"expected braces that close before the next open, got {pattern!r}")
    parts = re.split(r"\{([^{}]*)\}", pattern)  # text, contents of braces, text, ...
    if any("{" in text or "}" in text for text in parts[::2]):
        raise InputError(f"expected braces that close, got {pattern!r}")
    choices = [_choices(part, pattern) if place % 2 else [part] for place, part in enumerate(parts)]
    if math.prod(map(len, choices)) > MAX_SHARDS:
        raise InputError(f"expected a pattern of at most {MAX_SHARDS} files, got {pattern!r}")
    return ["".join(chosen) for chosen in itertools.product(*choices)]


def _choices(inner: str, pattern: str) -> list[str]:
    if not (ends := _RANGE.fullmatch(inner)):
        return inner.split(",")
    low, high = int(ends[1]), int(ends[2])
    if not 0 <= high - low < MAX_SHARDS:
        raise InputError(f"expected a rising range of at most {MAX_SHARDS} numbers in {pattern!r}, got {inner!r}")
    return [f"{number:0{len(ends[1])}}" for number in range(low, high + 1)]


def find_files(pattern: str) -> list[DataFile]:
    """The files of a pattern, braces in order and globs by name; those of `hf://` are fetched first, and those of
    `remote.SCHEMES` stay where they are.

    Raises:
        InputError: the pattern matches nothing, a file is missing, or it is `pipe:` or another URL.
    """
    refuse_addresses(pattern)
    if is_remote(pattern):
        files = find_remote(expand_braces(pattern))
        if len(files) > MAX_SHARDS:
            raise InputError(f"expected a pattern of at most {MAX_SHARDS} files, got {len(files)} of {pattern!r}")
        return [*files]
    if pattern.startswith("hf://"):
        return [*_from_hub(expand_braces(pattern))]
    folder, rest = _existing(pattern)
    found: list[Path] = []
    for text in expand_braces(rest) if rest else [""]:
        matches = [folder + text] if os.path.exists(folder + text) else _globbed(folder, text)
        if not matches:
            raise InputError(f"expected files that {pattern!r} names, but there is no {folder + text!r}")
        found += map(Path, matches)
    for path in found:
        if not path.is_file():
            kind = "a folder" if path.is_dir() else "a pipe or a device" if path.exists() else "a link to nothing"
            raise InputError(f"expected files that {pattern!r} names, but {str(path)!r} is {kind}")
    if len(found) > MAX_SHARDS:
        raise InputError(f"expected a pattern of at most {MAX_SHARDS} files, got {len(found)} of {pattern!r}")
    return [*found]


def _existing(pattern: str) -> tuple[str, str]:
    """A path in two: the longest beginning that exists, as whole names, and the rest, which is a pattern."""
    if os.path.exists(pattern):
        return pattern, ""
    ends = [match.end() for match in re.finditer("/", pattern)]
    end = next((end for end in reversed(ends) if os.path.isdir(pattern[:end])), 0)
    return pattern[:end], pattern[end:]


def _globbed(folder: str, pattern: str) -> list[str]:
    return sorted(glob.glob(glob.escape(folder) + pattern, recursive=True))


def refuse_addresses(pattern: str) -> None:
    """Refuse a pattern that is neither a local path, nor `hf://`, nor an address that is read by ranges."""
    scheme = re.match(r"(pipe:|[A-Za-z][\w+.-]*://)", pattern)
    if scheme and scheme[1] != "hf://" and not is_remote(pattern):
        known = ", ".join(f"{name}://" for name in SCHEMES)
        raise InputError(
            f"expected a local path, hf://datasets/NAME/REPOSITORY/FILES or one of {known}, got {shown(pattern)!r}"
        )
    if is_remote(pattern):
        check_address(normal(pattern))


def _from_hub(patterns: list[str]) -> list[Path]:
    """Fetch files of one repository of the Hub, all of one commit, into the Hub's own cache."""
    from huggingface_hub import HfApi, hf_hub_download

    parsed = [match for pattern in patterns if (match := _HUB.fullmatch(pattern))]
    if len(parsed) < len(patterns):
        raise InputError(f"expected hf://datasets/NAME/REPOSITORY/FILES, got {patterns[0]!r}")
    kind, repository, revision = {match.groups()[:3] for match in parsed}.pop()
    kind, wanted = (kind or "models").removesuffix("s"), [match[4] for match in parsed]
    try:
        if any(re.search(r"[*?[]", name) for name in wanted):
            info = HfApi().repo_info(repository, repo_type=kind, revision=revision)
            revision = info.sha
            names = sorted(file.rfilename for file in getattr(info, "siblings", None) or ())
            wanted = [name for pattern in wanted for name in names if _matches(name, pattern)]
        found = [Path(hf_hub_download(repository, name, repo_type=kind, revision=revision)) for name in wanted]
    except Exception as error:  # of the network, the Hub or its client
        reason = first_line(error)
        raise InputError(f"{patterns[0]!r} cannot be fetched: {reason}") from error
    if not found:
        raise InputError(f"expected files that {patterns[0]!r} names, but the repository has none")
    return found


def _matches(name: str, pattern: str) -> bool:
    """Match a glob whose `*` stays within one folder."""
    return len(PurePosixPath(name).parts) == len(PurePosixPath(pattern).parts) and PurePosixPath(name).match(pattern)
