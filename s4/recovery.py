"""After a crash: remove what the run before left unfinished, so that files and index agree again."""

import logging
from functools import partial

from s4.errors import FullDiskError, S4Error
from s4.index import Database, JobIndex, KeyIndex, Underway
from s4.keys import SCHEME, is_key
from s4.storage import Storage

log = logging.getLogger("s4.recovery")


def recover(storage: Storage, database: Database, *, adopting: bool = False) -> list[str]:
    """Remove half-written files, and files without a row where the index says that something went on.

    `adopting`: the index is in doubt, and files without a row, which are whole, are to become keys; then only
    those go that were being removed. Returns the ids of jobs that ran and of which it could not be recorded
    that they are over, for want of disk space.
    """
    keys, underway, jobs = KeyIndex(database, storage.unlink), Underway(database), JobIndex(database)
    storage.empty_temporary()
    paths, prefixes = underway.left_by_crash()
    if adopting:
        paths = []
    else:
        prefixes += [outdir.removeprefix(SCHEME) for outdir in jobs.running_outdirs()]
    doomed = [path for path in paths if not keys.exists(path)]
    for prefix in prefixes:
        folder = prefix[: prefix.rfind("/")]
        doomed += [p for p in storage.walk(folder) if p.startswith(prefix) and _is_left(p, keys)]
    for path in doomed:
        try:
            storage.unlink([path])
        except S4Error as e:
            log.warning("an unfinished file stays: %s", e)
    for prefix in prefixes:  # the last file of a folder may have been removed, but not the folder
        storage.remove_empty_folders(prefix[: prefix.rfind("/")])
    if doomed:
        log.info("removed up to %d files that the last run left unfinished", len(doomed))
    lost = jobs.running()
    try:
        database.making_room(underway.forget_crash)
        while lost:
            database.making_room(partial(jobs.interrupt, lost[-1]))
            lost.pop()
    except FullDiskError as e:  # the node has to start all the same: nothing else could make room
        log.error("what the last run left is not recorded as over: %s", e)
    return lost


def _is_left(path: str, keys: KeyIndex) -> bool:
    """Whether a file is one of ours without a row; one whose name can be no key was put there by somebody."""
    return is_key(path) and not keys.exists(path)
