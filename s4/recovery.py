"""After a crash: remove what the run before left unfinished, so that files and index agree again."""

import logging
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import islice

from s4.errors import FullDiskError, S4Error
from s4.index import Database, JobIndex, KeyIndex, Underway
from s4.keys import SCHEME, is_key
from s4.storage import Storage

BATCH = 1000  # files of which the index is asked at once

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
    doomed = keys.missing(paths)
    for prefix in prefixes:
        doomed += _left(storage.walk(prefix), keys)
    for path in doomed:
        try:
            storage.unlink([path])
        except S4Error as e:
            log.warning("an unfinished file stays: %s", e)
    for prefix in prefixes:  # the last file of a folder may have been removed, but not the folder
        storage.remove_empty_folders(prefix)
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


def _left(files: Iterable[str], keys: KeyIndex) -> Iterator[str]:
    """Those of the files that are ours, without a row; one whose name can be no key was put there by
    somebody."""
    ours = filter(is_key, files)
    while batch := list(islice(ours, BATCH)):
        yield from keys.missing(batch)
