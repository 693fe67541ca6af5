"""Keys: their rules, placement on the ring, prefixes and globs; and the ids of jobs. No input or output.

A key is written `s4://BUCKET/PATH/NAME`. Inside s4 it is its *path*, `BUCKET/PATH/NAME`: the row in the
index and the file below the data folder have the same name.
"""

import os
import time
from collections.abc import Callable, Iterable

try:
    from _blake2 import blake2s  # what hashlib has too, without OpenSSL, which takes 3 ms to load
except ImportError:
    from hashlib import blake2s

from s4.errors import BadKeyError, BadRequestError

SCHEME = "s4://"
MAX_SEGMENT_BYTES = 255
MAX_KEY_BYTES = 1024
MAX_NUMERIC_PREFIX = 2**63

_ID_DIGITS = "0123456789abcdefghjkmnpqrstvwxyz"  # Crockford's base 32: none looks like another

# Advice by which the end of a job is told: of a key that exists already, of one that another input of a
# map-to-n has made, and where trying again what failed would not do.
REMOVE_FIRST = "keys are immutable, remove it first"
DIFFERENT_NAMES = "inputs of a map-to-n need different NAMEs"
START_AGAIN = "start the job again"


def url(path: str) -> str:
    """The key or prefix as users write it."""
    return SCHEME + path


def with_scheme(text: str) -> str:
    """The text, which begins with s4://. Raises BadRequestError if it does not."""
    if not text.startswith(SCHEME):
        raise BadRequestError(f"{text!r} is not an s4 path: write {SCHEME}BUCKET/…")
    return text


def parse_key(text: str) -> str:
    """The path of a key, `s4://` optional. Raises BadKeyError with the rule that the key breaks."""
    path = _checked_path(text)
    if not path:
        raise BadKeyError(text, "it is empty; a key is s4://BUCKET/NAME")
    segments = path.split("/")
    if not segments[-1]:
        raise BadKeyError(text, "it ends in '/', as folders do; a key is needed, or -r where there is one")
    if len(segments) < 2:
        raise BadKeyError(text, "it names a bucket only; a key is s4://BUCKET/NAME")
    _check_segments(text, segments)
    return path


def is_key(path: str) -> bool:
    """Whether a path below the data folder can be that of a key."""
    try:
        parse_key(path)
    except BadKeyError:
        return False
    return True


def parse_folder(text: str) -> str:
    """The path of a folder, which must end in `/`: `s4://b/x/` gives `b/x/`. Raises BadRequestError."""
    path = _checked_path(text)
    if not path.endswith("/"):
        raise BadRequestError(f"{text}: a folder is needed here, it must end in '/'")
    _check_segments(text, path[:-1].split("/"))
    return path


def parse_prefix(text: str) -> str:
    """The path of a prefix: any beginning of a key. Empty and `s4://` mean everything. Raises BadKeyError."""
    path = _checked_path(text)
    if path:
        *whole, _last = path.split("/")
        _check_segments(text, whole)
        if path.startswith("_"):
            raise BadKeyError(text, "bucket names do not start with '_'")
    return path


def _checked_path(text: str) -> str:
    path = text.removeprefix(SCHEME)
    try:
        size = len(path.encode())
    except UnicodeEncodeError:
        raise BadKeyError(text, "it is not valid UTF-8") from None
    # Most keys are printable and without a blank. (`re` takes 1.5 ms of each start of the client.)
    if (" " in path or not path.isprintable()) and any(map(_is_forbidden, path)):
        raise BadKeyError(text, "white space and control characters are not allowed")
    if size > MAX_KEY_BYTES:
        raise BadKeyError(text, f"it is longer than {MAX_KEY_BYTES} bytes")
    return path


def _is_forbidden(character: str) -> bool:
    return character.isspace() or character <= "\x1f" or "\x7f" <= character <= "\x9f"


def _check_segments(text: str, segments: list[str]) -> None:
    for segment in segments:
        if segment in ("", ".", ".."):
            other = "://" in text and not text.startswith(SCHEME)
            rule = "empty, '.' and '..' segments are not allowed"
            raise BadKeyError(text, f"a key begins with {SCHEME}" if other else rule)
        if len(segment.encode()) > MAX_SEGMENT_BYTES:
            raise BadKeyError(text, f"a segment is longer than {MAX_SEGMENT_BYTES} bytes")
    if segments and segments[0].startswith("_"):
        raise BadKeyError(text, "bucket names do not start with '_'")


def name_of(path: str) -> str:
    """NAME, the last segment of a path."""
    return path[path.rfind("/") + 1 :]


def prefix_of(name: str) -> str:
    """What decides placement and groups for map-from-n: the numeric prefix of NAME, else NAME."""
    head = name.partition("_")[0]
    return head if _is_number(head) else name


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and int(text) < MAX_NUMERIC_PREFIX


def owner(path: str, servers: int) -> int:
    """The position in the ring (0 to `servers` - 1) of the node that owns a key. NAME alone decides."""
    prefix = prefix_of(name_of(path))
    return (int(prefix) if _is_number(prefix) else name_hash(prefix)) % servers


def name_hash(name: str) -> int:
    """The first 8 bytes of BLAKE2s (RFC 7693) of NAME, as a little-endian number."""
    return int.from_bytes(blake2s(name.encode()).digest()[:8], "little")


def group_name(prefix: str, names: Iterable[str]) -> str:
    """The NAME of a merged group: its prefix, and the `_suffix` if all members have the same one."""
    suffixes = {name[len(prefix) :] for name in names}
    return prefix + suffixes.pop() if len(suffixes) == 1 else prefix


def range_end(prefix: str) -> str | None:
    """The smallest text above every text that starts with `prefix`, or None if there is no such text.

    Code point order, which is also the byte order of UTF-8 and so SQLite's.
    """
    while prefix:
        last = ord(prefix[-1])
        prefix = prefix[:-1]
        if last < 0x10FFFF:
            following = last + 1
            if 0xD800 <= following <= 0xDFFF:  # surrogates are not characters
                following = 0xE000
            return prefix + chr(following)
    return None


def parse_indir(text: str) -> tuple[str, str]:
    """INDIR of a job, as (folder, pattern): the pattern is empty for a plain folder.

    `s4://b/dir/` gives `("b/dir/", "")`; `s4://b/dir/*/*_2` gives `("b/dir/", "*/*_2")`: the folder is
    what stands before the first segment with a wildcard. Raises BadRequestError for anything else.
    """
    if text.endswith("/"):
        return parse_folder(text), ""
    if not _has_wildcard(text):
        raise BadRequestError(f"{text}: INDIR must end in '/' or hold a glob of '*', '?' or '[…]'")
    if "[:" in text and _has_class(text):
        raise BadRequestError(f"{text}: classes such as [[:digit:]] are not known here, write [0-9]")
    segments = parse_key(text).split("/")
    first = next(i for i, segment in enumerate(segments) if _has_wildcard(segment))
    if first == 0:
        raise BadRequestError(f"{text}: the bucket must be whole, without wildcards")
    return "/".join(segments[:first]) + "/", "/".join(segments[first:])


def _has_wildcard(text: str) -> bool:
    return any(wildcard in text for wildcard in "*?[")


def _has_class(text: str) -> bool:
    import re

    return re.search(r"\[[^/\]]*\[:[a-z]+:\]", text) is not None


def matcher(pattern: str) -> Callable[[str], bool]:
    """A test whether a path below the folder matches the pattern whole; no wildcard crosses `/`."""
    if not pattern:
        return lambda below: True
    tests = [_segment_matcher(segment) for segment in pattern.split("/")]

    def matches(below: str) -> bool:
        segments = below.split("/")
        return len(segments) == len(tests) and all(
            test(segment) for test, segment in zip(tests, segments, strict=True)
        )

    return matches


def _segment_matcher(pattern: str) -> Callable[[str], bool]:
    import re
    from fnmatch import translate  # only jobs with a glob need them

    # At the beginning of a set, bash takes `^` for what fnmatch spells `!`. A `[` that begins none is itself.
    pattern = re.sub(
        r"\[(?:([!^]?+)(\]?+[^]]*\]))?",
        lambda s: f"[{'!' if s[1] else ''}{s[2]}" if s[2] else "[[]",
        pattern,
    )
    compiled = re.compile(translate(pattern))
    return lambda segment: compiled.match(segment) is not None


def new_job_id() -> str:
    """An id that sorts by time and is short enough to type: 8 digits of 1/32 seconds, 4 at random."""
    number = int(time.time() * 32) << 20 | int.from_bytes(os.urandom(3)) >> 4
    return "".join(_ID_DIGITS[number >> shift & 31] for shift in range(55, -1, -5))


def check_job_folders(indir: str, outdir: str) -> tuple[str, str, str]:
    """(folder, pattern, outdir) of a job as paths. Raises BadRequestError for what a job refuses.

    An OUTDIR whose keys would be inputs of the same job is refused: for a plain INDIR one inside it, for
    a glob one below which a key could match.
    """
    folder, pattern = parse_indir(indir)
    target = parse_folder(outdir)
    if target.startswith(folder):
        below = target[len(folder) :].split("/")[:-1]
        wanted = pattern.split("/") if pattern else []
        could_match = not pattern or (
            len(below) < len(wanted)
            and all(_segment_matcher(want)(have) for want, have in zip(wanted, below, strict=False))
        )
        if could_match:
            how = "could hold keys that match" if pattern else "is inside"
            raise BadRequestError(f"OUTDIR {outdir} {how} INDIR {indir}: choose another folder")
    return folder, pattern, target
