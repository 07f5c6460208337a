"""SQL over the files of a run with DuckDB, which is the extra `sql` and imported here only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mpipipe.errors import ConfigError, EnvironmentSetupError

if TYPE_CHECKING:
    from mpipipe.logs.reading import RunFiles

__all__ = ["TABLES", "SqlResult", "query"]

# Table → the files that it reads. `boot` is a view of `run_log`.
TABLES: Mapping[str, str] = {
    "run_log": "rank_*.log",
    "steps": "steps_rank_*.jsonl",
    "samples": "samples_rank_*.jsonl",
    "requests": "requests.jsonl",
    "messages": "messages_rank_*.jsonl",
    "clock": "clock.jsonl",
}
SqlResult = tuple[Sequence[str], list[tuple[Any, ...]]]
_BOOT = (
    "CREATE VIEW boot AS SELECT rank, attempt, name, start_s, end_s, end_s - start_s AS seconds, "
    "{bytes} FROM run_log WHERE event = 'boot' ORDER BY rank, start_s"
)


def query(files: RunFiles, statement: str) -> SqlResult:
    """The columns and rows of a statement over the tables of a run.

    Raises:
        EnvironmentSetupError: DuckDB is not installed.
        ConfigError: DuckDB refuses the statement.
    """
    try:
        import duckdb
    except ImportError as error:
        raise EnvironmentSetupError(
            "mpipipe logs sql needs DuckDB, which is not installed: pip install 'mpipipe[sql]'; "
            "the other `mpipipe logs` commands need nothing more"
        ) from error
    connection = duckdb.connect()
    try:
        for table, pattern in TABLES.items():
            if sorted(files.folder.glob(pattern)):
                _create(connection, table, str(files.folder / pattern))
        if any(files.folder.glob(TABLES["run_log"])):
            _create_boot(connection)
        result = connection.execute(statement)
        return [column[0] for column in result.description or ()], result.fetchall()
    except duckdb.Error as error:
        tables = ", ".join([*TABLES, "boot"])
        raise ConfigError(
            f"DuckDB refuses the statement: {error}; the tables are {tables} (those whose files "
            "the run has), their columns are in `mpipipe logs files`"
        ) from error
    finally:
        connection.close()


def _create_boot(connection: Any) -> None:
    """The view of boot events; a run that logged none, or read no bytes, lacks their columns."""
    columns = {row[0] for row in connection.execute("DESCRIBE run_log").fetchall()}
    if {"rank", "attempt", "event", "name", "start_s", "end_s"} <= columns:
        connection.execute(_BOOT.format(bytes="bytes" if "bytes" in columns else "NULL AS bytes"))


def _create(connection: Any, table: str, pattern: str) -> None:
    escaped = pattern.replace("'", "''")
    connection.execute(
        f"CREATE VIEW {table} AS SELECT * FROM read_json('{escaped}', format='newline_delimited', "
        "ignore_errors=true, union_by_name=true, maximum_object_size=67108864)"
    )
