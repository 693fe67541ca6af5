"""The schema of a node's index, step by step. Append only: a step that was released is never changed.

Applied by the node at start; `sqlite-utils migrate s4_data/_index/node.db migrations/` does the same by hand.
Times are seconds since 1970 (UTC) in columns that end in `_s`; sizes are bytes.
"""

from sqlite_utils import Database, Migrations

migrations = Migrations("s4")


@migrations()
def m0001_keys(db: Database) -> None:
    """Keys, and per bucket their number and bytes, kept by triggers so that `ls` need not count."""
    db.executescript(
        """
        CREATE TABLE keys (
            path      TEXT    NOT NULL PRIMARY KEY,  -- BUCKET/DIR/NAME, also the file's path below s4_data
            size      INTEGER NOT NULL,              -- bytes
            checksum  TEXT    NOT NULL,              -- xxh64, lower-case hex without leading zeros
            created_s INTEGER NOT NULL               -- seconds since 1970, UTC
        ) WITHOUT ROWID;

        CREATE TABLE buckets (
            bucket    TEXT    NOT NULL PRIMARY KEY,
            keys      INTEGER NOT NULL,              -- number of keys on this node
            bytes     INTEGER NOT NULL,              -- sum of their sizes
            created_s INTEGER NOT NULL               -- when its first key was made
        ) WITHOUT ROWID;

        CREATE TRIGGER key_added AFTER INSERT ON keys BEGIN
            INSERT INTO buckets VALUES
                (substr(new.path, 1, instr(new.path, '/') - 1), 1, new.size, new.created_s)
            ON CONFLICT (bucket) DO UPDATE SET keys = keys + 1, bytes = bytes + excluded.bytes;
        END;

        CREATE TRIGGER key_removed AFTER DELETE ON keys BEGIN
            UPDATE buckets SET keys = keys - 1, bytes = bytes - old.size
                WHERE bucket = substr(old.path, 1, instr(old.path, '/') - 1);
            DELETE FROM buckets
                WHERE bucket = substr(old.path, 1, instr(old.path, '/') - 1) AND keys = 0;
        END;

        CREATE VIEW recent_keys AS
            SELECT datetime(created_s, 'unixepoch') AS created, size, 's4://' || path AS key, checksum
            FROM keys ORDER BY created_s DESC;
        """
    )


@migrations()
def m0002_transfers_and_removals(db: Database) -> None:
    """What is under way, so that a restart after a crash knows where to clean up."""
    db.executescript(
        """
        CREATE TABLE transfers (
            uuid      TEXT    NOT NULL PRIMARY KEY,
            direction TEXT    NOT NULL,              -- put or get
            keys      INTEGER NOT NULL,              -- number of keys that travel together
            bytes     INTEGER,                       -- null: not known beforehand
            peer      TEXT    NOT NULL,              -- address of the other side
            started_s REAL    NOT NULL,
            paths     TEXT    NOT NULL               -- of the keys, a JSON list
        ) WITHOUT ROWID;

        CREATE TABLE removals (
            prefix    TEXT    NOT NULL PRIMARY KEY   -- rows are gone, files may not be yet
        ) WITHOUT ROWID;
        """
    )


@migrations()
def m0003_jobs(db: Database) -> None:
    """This node's share of each job."""
    db.executescript(
        """
        CREATE TABLE jobs (
            id         TEXT    NOT NULL PRIMARY KEY, -- the same on every node of the cluster
            kind       TEXT    NOT NULL,             -- map, map-to-n, map-from-n or eval
            indir      TEXT    NOT NULL,             -- INDIR, or the key of an eval
            outdir     TEXT    NOT NULL,
            command    TEXT    NOT NULL,
            state      TEXT    NOT NULL,             -- running, done, failed, cancelled or interrupted
            tasks      INTEGER NOT NULL DEFAULT 0,   -- commands that this node has to run
            done       INTEGER NOT NULL DEFAULT 0,   -- commands whose outputs are stored
            started_s  REAL    NOT NULL,
            finished_s REAL,
            error      TEXT                          -- what failed, one line
        ) WITHOUT ROWID;

        CREATE INDEX jobs_by_start ON jobs (started_s);

        CREATE VIEW recent_jobs AS
            SELECT id, kind, state, done || '/' || tasks AS progress,
                   datetime(started_s, 'unixepoch') AS started,
                   round(coalesce(finished_s, unixepoch()) - started_s, 3) AS seconds,
                   indir, outdir, command, error
            FROM jobs ORDER BY started_s DESC;
        """
    )


@migrations()
def m0004_tasks(db: Database) -> None:
    """A record for each task of a job, what jobs were asked for, and which task made a key."""
    db.executescript(
        """
        ALTER TABLE keys ADD COLUMN job  TEXT;
        ALTER TABLE keys ADD COLUMN task INTEGER;

        ALTER TABLE jobs ADD COLUMN run           INTEGER NOT NULL DEFAULT 1;
        ALTER TABLE jobs ADD COLUMN listed        INTEGER NOT NULL DEFAULT 1;
        ALTER TABLE jobs ADD COLUMN failed        INTEGER NOT NULL DEFAULT 0;
        ALTER TABLE jobs ADD COLUMN cancelled     INTEGER NOT NULL DEFAULT 0;
        ALTER TABLE jobs ADD COLUMN skipped       INTEGER NOT NULL DEFAULT 0;
        ALTER TABLE jobs ADD COLUMN bytes_in      INTEGER NOT NULL DEFAULT 0;
        ALTER TABLE jobs ADD COLUMN bytes_out     INTEGER NOT NULL DEFAULT 0;
        ALTER TABLE jobs ADD COLUMN timeout_s     REAL    NOT NULL DEFAULT 300;
        ALTER TABLE jobs ADD COLUMN retries       INTEGER NOT NULL DEFAULT 0;
        ALTER TABLE jobs ADD COLUMN keep_going    INTEGER NOT NULL DEFAULT 0;
        ALTER TABLE jobs ADD COLUMN skip_existing INTEGER NOT NULL DEFAULT 0;
        ALTER TABLE jobs ADD COLUMN alone         INTEGER NOT NULL DEFAULT 0;

        CREATE TABLE tasks (
            job         TEXT    NOT NULL,
            task        INTEGER NOT NULL,
            input       TEXT    NOT NULL,
            inputs      INTEGER NOT NULL,
            bytes_in    INTEGER NOT NULL,
            state       TEXT    NOT NULL DEFAULT 'waiting',
            attempt     INTEGER NOT NULL DEFAULT 0,
            pid         INTEGER,
            started_s   REAL,
            seconds     REAL,
            cpu_seconds REAL,
            peak_memory INTEGER,
            bytes_out   INTEGER,
            exit_code   INTEGER,
            signal      INTEGER,
            error       TEXT,
            PRIMARY KEY (job, task)
        ) WITHOUT ROWID;

        CREATE TABLE stderrs (                       -- apart, so that the rows of tasks stay small
            job    TEXT    NOT NULL,
            task   INTEGER NOT NULL,
            stderr BLOB    NOT NULL,
            PRIMARY KEY (job, task)
        ) WITHOUT ROWID;

        DROP VIEW recent_keys;
        CREATE VIEW recent_keys AS
            SELECT datetime(created_s, 'unixepoch') AS created, size, 's4://' || path AS key, checksum,
                   job, task
            FROM keys ORDER BY created_s DESC;

        DROP VIEW recent_jobs;
        CREATE VIEW recent_jobs AS
            SELECT id, kind, state, done || '/' || tasks AS progress, failed, cancelled, skipped,
                   datetime(started_s, 'unixepoch') AS started,
                   round(coalesce(finished_s, unixepoch()) - started_s, 3) AS seconds,
                   indir, outdir, command, error
            FROM jobs ORDER BY started_s DESC;

        CREATE VIEW failed_tasks AS
            SELECT job, task, input, attempt, exit_code, signal, seconds, error,
                   CAST(stderr AS TEXT) AS stderr
            FROM tasks LEFT JOIN stderrs USING (job, task)
            WHERE state = 'failed';
        """
    )


@migrations()
def m0005_removals_one_by_one(db: Database) -> None:
    """Each removal has a row of its own: of two below one prefix, one may be over sooner."""
    db.executescript(
        """
        CREATE TABLE each_removal (
            id        INTEGER PRIMARY KEY,
            prefix    TEXT    NOT NULL               -- rows are gone, files may not be yet
        );
        INSERT INTO each_removal (prefix) SELECT prefix FROM removals;
        DROP TABLE removals;
        ALTER TABLE each_removal RENAME TO removals;
        """
    )


@migrations()
def m0006_half_made_and_running(db: Database) -> None:
    """What a shuffle left half-made is not taken for whole once the record of its job is pruned.

    And the jobs that run are found without a look at those that have ended.
    """
    db.executescript(
        """
        CREATE TABLE half_made (
            job       TEXT    NOT NULL,
            task      INTEGER NOT NULL,
            input     TEXT    NOT NULL,              -- path of the input key
            outdir    TEXT    NOT NULL,              -- path of the folder of the outputs, with '/'
            PRIMARY KEY (job, task)
        ) WITHOUT ROWID;

        CREATE INDEX jobs_running ON jobs (id) WHERE state = 'running';
        """
    )
