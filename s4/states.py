"""Kinds and states of jobs and tasks, by the names that nodes record and clients show."""

MAP, MAP_TO_N, MAP_FROM_N = "map", "map-to-n", "map-from-n"
EVAL = "eval"  # recorded as a job, but it has no folders

# Of a job, and of its share on each node.
RUNNING, DONE, FAILED, CANCELLED, INTERRUPTED = "running", "done", "failed", "cancelled", "interrupted"
# Of a task, which is never interrupted.
WAITING, SKIPPED = "waiting", "skipped"
TASK_STATES = (WAITING, RUNNING, DONE, FAILED, CANCELLED, SKIPPED)
# As a client sees it: of a share whose node is down, or never had it; of a job that may not be done there.
LOST, MISSING = "lost", "missing"
UNKNOWN = "unknown"
