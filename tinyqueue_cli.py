"""The command line: the group of commands, and those that submit, inspect, manage and diagnose.

worker.py adds the commands that start processes: `run`, `worker` and `web`. It is the program that
runs all of them.
"""

from __future__ import annotations

import codecs
import functools
import json
import signal
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from http import HTTPStatus
from io import TextIOWrapper
from typing import Any

import click
import msgspec

from tinyqueue import (
    ENDED,
    HANDLERS,
    SCANNED,
    STATUSES,
    AnyQueue,
    Filter,
    InvalidJob,
    Job,
    SettingsError,
    Status,
    TinyQueueError,
    Unavailable,
    UnknownType,
    WrongStatus,
    __version__,
    check_name,
    host_name,
)
from tinyqueue_config import Settings, error_line, load_handlers, open_queue, plural, set_up_logging
from tinyqueue_doctor import Finding, examine, local_workers, repair
from tinyqueue_json import from_json, to_json

# The group ------------------------------------------------------------------------------------------------------------

SECTIONS = {
    "Processes": ("web", "run", "worker"),
    "Submit jobs": ("enqueue",),
    "Inspect": ("stats", "workers", "list", "failed", "get"),
    "Manage jobs and queues": ("retry", "cancel", "pause", "resume", "purge"),
    "Diagnose": ("doctor", "check"),
}
WEB_TIMEOUT = 5.0  # seconds for a web process to answer /health
Command = Callable[..., None]


class Commands(click.Group):
    """The commands. A wrong setting, option or job exits with 2, and any other error with 1."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        is_run = not args or (args[0].startswith("-") and args[0] not in ("--help", "--version"))
        if is_run and not ctx.resilient_parsing:  # shell completion parses command lines that are not finished
            args = ["run", *args]
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        if isinstance(sys.stdout, TextIOWrapper):
            # A terminal in another encoding than UTF-8 gets an escape for what it cannot show.
            sys.stdout.reconfigure(errors="backslashreplace")
        try:
            return super().invoke(ctx)
        except (SettingsError, InvalidJob) as error:
            raise click.UsageError(str(error)) from None
        except TinyQueueError as error:
            raise click.ClickException(str(error)) from None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for title, names in SECTIONS.items():
            with formatter.section(title):
                formatter.write_dl([(name, self.commands[name].get_short_help_str(100)) for name in names])
        with formatter.section("Options of run"):
            records = (option.get_help_record(ctx) for option in self.commands["run"].params)
            formatter.write_dl([record for record in records if record])


@click.group(
    cls=Commands,
    epilog="\b\n" + Settings.help(),
    options_metavar="",
    subcommand_metavar="[COMMAND] [ARGS]...",
    context_settings={"max_content_width": 120},
)
@click.version_option(__version__)
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Run TinyQueue workers and manage jobs.

    Without a command, this runs a worker. For the options of a command, use COMMAND --help.
    """
    if ctx.invoked_subcommand != "web":  # `web` reads the settings itself, after its own options
        ctx.obj = Settings.read()


# What the commands share ----------------------------------------------------------------------------------------------


def require_queue(settings: Settings) -> AnyQueue:
    """Set up logging and open the queue. Raises SettingsError if no Redis is named."""
    if not settings.redis_url:
        raise SettingsError("REDIS_URL is not set; set it, or try TinyQueue with an embedded Redis: tinyqueue web")
    set_up_logging(settings)
    return open_queue(settings, settings.worker_connections)


def pass_queue(command: Command) -> Command:
    """Pass the queue that the settings name as the first argument of a command."""

    @click.pass_obj
    @functools.wraps(command)
    def with_queue(settings: Settings, /, *args: Any, **kwargs: Any) -> None:
        command(require_queue(settings), *args, **kwargs)

    return with_queue


def _require_job(job: Job | None, id: str) -> Job:
    if job is None:
        raise click.ClickException(f"no such job: {id}")
    return job


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
refresh_option = click.option("--watch", is_flag=True, help="Refresh every two seconds until Ctrl-C.")
limit_option = click.option(
    "--limit", type=click.IntRange(1, 1000), metavar="N", default=50, show_default=True, help="Maximum number of jobs."
)
yes_option = click.option("--yes", is_flag=True, help="Do not ask for confirmation.")


def filter_options(*statuses: str, required: bool = False, default: str | None = None) -> Callable[[Command], Command]:
    """Add the options that select jobs, --status only with `statuses`; pass them as `filter`."""

    def add(command: Command) -> Command:
        @functools.wraps(command)
        def with_filter(*args: Any, **options: Any) -> None:
            command(*args, filter=Filter(*(options.pop(field, None) for field in Filter._fields)), **options)

        options = [
            click.option("--type", metavar="TYPE", help="Only jobs of this type."),
            click.option("--queue", metavar="NAME", help="Only jobs in this queue."),
            click.option("--error-type", metavar="NAME", help="Only jobs whose last error has this type."),
        ]
        if statuses:
            about = partial(click.option, "--status", type=click.Choice(statuses), help="Only jobs with this status.")
            options.insert(0, about(required=required, show_default=default))
        return functools.reduce(lambda command, option: option(command), reversed(options), with_filter)

    return add


# Submit jobs ----------------------------------------------------------------------------------------------------------


@cli.command()
@click.argument("type")
@click.argument("payload")
@click.option("--max-attempts", type=int, metavar="N", help="Maximum number of attempts.  [default: the handler's]")
@click.option("--queue", metavar="NAME", help="Queue to submit to.  [default: the handler's]")
@click.option("--delay", type=float, metavar="SECONDS", help="Seconds to wait before the job may start.")
@click.option("--run-at", metavar="TIME", help="Earliest start time: ISO 8601 with a time zone.")
@click.option(
    "--expires-in",
    type=float,
    metavar="SECONDS",
    help="Seconds until the job expires. An expired job is not run; it fails when a worker takes it.",
)
@click.option("--unique-key", metavar="KEY", help="If a job with this key has not ended, print its id instead.")
@click.pass_obj
def enqueue(settings: Settings, /, type: str, payload: str, **options: Any) -> None:
    """Submit a job and print its id. PAYLOAD is JSON, or - to read it from standard input."""
    queue = require_queue(settings)
    load_handlers(settings.handlers)
    if type not in HANDLERS:
        raise UnknownType(type, sorted(HANDLERS))
    try:
        value = from_json(sys.stdin.buffer.read() if payload == "-" else payload.encode("utf-8", "surrogateescape"))
    except ValueError as error:
        raise click.UsageError(f"PAYLOAD is not JSON: {error}") from None
    click.echo(queue.enqueue(type, value, **options).id)


# Inspect --------------------------------------------------------------------------------------------------------------


@cli.command()
@refresh_option
@json_option
@pass_queue
def stats(queue: AnyQueue, watch: bool, as_json: bool) -> None:
    """Count the jobs in each queue and status."""
    _show(queue.stats, _print_stats, as_json, watch)


def _print_stats(stats: dict[str, Any]) -> None:
    rows = [["queue", "pending", "processing", "oldest waiting", ""]]
    for name, counts in {**stats["queues"], "all": stats | {"paused": False}}.items():
        oldest = f"{counts['oldestWaitingMs'] / 1000:,.1f} s" if counts["oldestWaitingMs"] else "-"
        rows.append([name, counts["pending"], counts["processing"], oldest, "paused" if counts["paused"] else ""])
    _print_table(rows)
    click.echo(f"\ndelayed (included in pending): {stats['delayed']}\nlive workers: {stats['workers']}\n")
    ended = [[status, stats[status], stats["lastMinute"][status], stats["total"][status]] for status in ENDED]
    _print_table([["ended", "kept", "last minute", "total"], *ended])


@cli.command()
@refresh_option
@json_option
@pass_queue
def workers(queue: AnyQueue, watch: bool, as_json: bool) -> None:
    """List the workers and the jobs they run."""
    _show(queue.workers, _print_workers, as_json, watch)


def _print_workers(workers: list[dict[str, Any]]) -> None:
    rows = [["worker", "alive", "busy", "queues", "jobs"]]
    for worker in workers:
        busy = f"{len(worker['jobs'])}/{worker['concurrency']}"
        alive = "yes" if worker["alive"] else "no"
        rows.append([worker["id"], alive, busy, ",".join(worker["queues"]), " ".join(worker["jobs"])])
    _print_table(rows, empty="no workers; start one with: tinyqueue worker")


@cli.command("list")
@filter_options(*STATUSES)
@limit_option
@json_option
@pass_queue
def list_jobs(queue: AnyQueue, filter: Filter, limit: int, as_json: bool) -> None:
    """List jobs, newest first."""
    _list(queue, filter, limit, as_json)


@cli.command()
@filter_options()
@limit_option
@json_option
@pass_queue
def failed(queue: AnyQueue, filter: Filter, limit: int, as_json: bool) -> None:
    """List failed jobs, most recent failure first, with their errors."""
    _list(queue, filter._replace(status="failed"), limit, as_json)


def _list(queue: AnyQueue, filter: Filter, limit: int, as_json: bool) -> None:
    cut = None if as_json else 0  # a table shows neither payloads nor results
    jobs, cursor = queue.page(filter, limit=limit, cut=cut)
    while cursor and len(jobs) < limit:  # a page may hold fewer jobs than `limit`
        more, cursor = queue.page(filter, limit=limit - len(jobs), cursor=cursor, cut=cut)
        jobs += more
    if as_json:
        _print_json([job.answer() for job in jobs])
    else:
        _print_jobs(jobs)


def _print_jobs(jobs: Sequence[Job]) -> None:
    rows = [["time", "id", "type", "queue", "status", "attempts", "error"]]
    for job in jobs:
        when = _format_time(job.place()[0])
        attempts = f"{job.attempts}/{job.max_attempts}"
        rows.append([when, job.id, job.type, job.queue, job.status, attempts, error_line(job.error)[:100]])
    _print_table(rows, empty="no matching jobs")


@cli.command()
@click.argument("id")
@click.option("--watch", is_flag=True, help="Wait until the job has ended. Exit with 1 unless it completed.")
@json_option
@click.pass_context
def get(ctx: click.Context, id: str, watch: bool, as_json: bool) -> None:
    """Show a job, with its payload, result or error."""
    queue = require_queue(ctx.obj)
    job = _require_job(queue.get(id), id)
    last_line = ""
    while watch and job.status not in ENDED:
        line = f"{job.status}, attempt {job.attempts}/{job.max_attempts}, {job.progress:.0%}"
        if line != last_line:
            click.echo(line, err=True)
        last_line = line
        job = _require_job(queue.wait_for(id, 1.0), id)
    if as_json:
        _print_json(job.answer())
    else:
        _print_job(job)
    ctx.exit(int(watch and job.status != "completed"))


def _print_job(job: Job) -> None:
    answer = job.answer()
    payload = answer.pop("payload")
    error = answer.pop("error", None)
    for name, value in answer.items():
        shown = _format_time(value) if name.endswith("At") else to_json(value).decode() if name == "result" else value
        _print_safely(f"{name:<12} {shown}")
    _print_safely(f"payload\n{_format_json(payload)}")
    if error:
        _print_safely(f"error\n  {error_line(error)}\n{textwrap.indent(error.traceback, '  ')}".rstrip())


# Manage jobs and queues -----------------------------------------------------------------------------------------------


@cli.command()
@click.argument("ids", nargs=-1, metavar="[ID]...")
@filter_options("failed", "cancelled", default="failed")
@click.option("--all", "every", is_flag=True, help="All failed jobs. Needed if no ID and no other option selects jobs.")
@pass_queue
def retry(queue: AnyQueue, ids: tuple[str, ...], filter: Filter, every: bool) -> None:
    """Requeue failed or cancelled jobs with attempts reset, by ID or all that match the options."""
    filter = _bulk_filter("failed", ids, filter, every)
    _change_each(ids, queue.retry)
    if not ids:
        done = _run_in_steps(queue, "retry", filter, partial(queue.change_many, "retry", filter))
        click.echo(f"{done['retried']} retried, {done['skipped']} skipped (changed meanwhile)")


@cli.command()
@click.argument("ids", nargs=-1, metavar="[ID]...")
@filter_options()
@click.option(
    "--all", "every", is_flag=True, help="All pending jobs. Needed if no ID and no other option selects jobs."
)
@yes_option
@pass_queue
def cancel(queue: AnyQueue, ids: tuple[str, ...], filter: Filter, every: bool, yes: bool) -> None:
    """Cancel pending jobs, by ID or all that match. Running jobs given by ID are asked to stop."""
    filter = _bulk_filter("pending", ids, filter, every)
    _change_each(ids, queue.cancel)
    if not ids:
        _confirm("Cancel", filter, yes)
        done = _run_in_steps(queue, "cancel", filter, partial(queue.change_many, "cancel", filter))
        click.echo(f"{done['cancelled']} cancelled, {done['skipped']} skipped (changed meanwhile)")


@cli.command()
@click.argument("names", nargs=-1, required=True, metavar="QUEUE...")
@pass_queue
def pause(queue: AnyQueue, names: tuple[str, ...]) -> None:
    """Pause a queue: it still accepts jobs, but workers start none of them."""
    known = queue.queues()
    for name in [check_name("queue", name) for name in names]:
        queue.pause(name)
        click.echo(f"{name} paused" + ("" if name in known else "; this queue has no jobs yet"))


@cli.command()
@click.argument("names", nargs=-1, required=True, metavar="QUEUE...")
@pass_queue
def resume(queue: AnyQueue, names: tuple[str, ...]) -> None:
    """Resume a paused queue: workers start its jobs."""
    for name in [check_name("queue", name) for name in names]:
        queue.resume(name)
        click.echo(f"{name} resumed")


@cli.command()
@filter_options(*ENDED, required=True)
@yes_option
@pass_queue
def purge(queue: AnyQueue, filter: Filter, yes: bool) -> None:
    """Delete ended jobs now (asks for confirmation)."""
    _confirm("Delete", filter, yes)
    done = _run_in_steps(queue, "purge", filter, partial(queue.purge, filter))
    click.echo(f"{done['purged']} deleted")


def _bulk_filter(status: Status, ids: tuple[str, ...], filter: Filter, every: bool) -> Filter:
    """Fill in the status of a bulk change. Refuses to select no jobs, or by ids and by options."""
    if bool(ids) == (every or filter != Filter()):
        raise click.UsageError("give either the IDs of jobs or options that select jobs (--all for all)")
    return filter._replace(status=filter.status or status)


def _change_each(ids: Sequence[str], change: Callable[[str], Job | None]) -> None:
    """Change jobs by id and print the result of each. Exit with 1 if one could not be changed."""
    failed = 0
    for at, id in enumerate(ids):
        try:
            job = _require_job(change(id), id)
            requested = job.status == "processing" and job.cancel_requested
            click.echo(f"{id} {'cancellation requested' if requested else job.status}")
        except (WrongStatus, click.ClickException) as error:
            failed += 1
            click.echo(f"Error: {error}", err=True)
        except Unavailable as error:
            rest = f"; stopped at {id}, not tried: {' '.join(ids[at + 1 :])}" if ids[at + 1 :] else ""
            raise click.ClickException(f"{error}{rest}") from None
    if failed:
        click.get_current_context().exit(1)


def _confirm(verb: str, filter: Filter, yes: bool) -> None:
    parts = {"of type": filter.type, "in queue": filter.queue, "with error": filter.error_type}
    which = "".join(f" {words} {value}" for words, value in parts.items() if value)
    if not yes:
        click.confirm(f"{verb} all {filter.status} jobs{which}?", abort=True)


def _run_in_steps(queue: AnyQueue, verb: str, filter: Filter, step: Callable[[str], dict[str, Any]]) -> Counter[str]:
    """Repeat a bulk change until it has seen all jobs; show progress and add up the counts."""
    total: Counter[str] = Counter()
    with click.progressbar(length=queue.stats()[str(filter.status)], label=verb, file=sys.stderr) as bar:
        cursor = ""
        while cursor or not total:
            counts = step(cursor)
            cursor = counts.pop("cursor")
            total.update(counts)
            bar.update(SCANNED)
    return total


# Diagnose -------------------------------------------------------------------------------------------------------------


@cli.command()
@click.option("--repair", "repairs", is_flag=True, help="First restore what lost keys have broken.")
@json_option
@click.pass_context
def doctor(ctx: click.Context, repairs: bool, as_json: bool) -> None:
    """Check Redis, permissions, settings and workers. Exits with 1 if a check fails."""
    settings: Settings = ctx.obj
    connections = settings.shards * (settings.web_concurrency * settings.web_connections + settings.worker_connections)
    queue = require_queue(settings)
    repaired = (repair(queue.parts) or [Finding("ok", "repair", "nothing to repair")]) if repairs else []
    findings = repaired + examine(queue, connections)
    show = _print_json if as_json else _print_findings
    show(findings)
    ctx.exit(int(any(finding.level == "fail" for finding in findings)))


def _print_findings(findings: Sequence[Finding]) -> None:
    for finding in findings:
        advice = f" -> {finding.advice}" if finding.advice else ""
        click.echo(f"{finding.level:<5} {finding.about:<13} {finding.seen}{advice}")


@cli.command()
@click.option("--web", is_flag=True, help="Check the web process that HOST and PORT name instead.")
@click.option("--any", "either", is_flag=True, help="Check the web process first, and the workers if that fails.")
@click.pass_obj
def check(settings: Settings, web: bool, either: bool) -> None:
    """Check that the workers of this host renew their leases. Exits with 1 if one does not."""
    checks = [_check_web] if web else [_check_workers]
    if either:
        checks = [_check_web, _check_workers]
    problems = []
    for passes in checks:
        try:
            click.echo(passes(settings))
            return
        except (click.ClickException, TinyQueueError) as error:
            if not either:
                raise
            problems.append(str(error))
    raise click.ClickException("; ".join(problems))


def _check_workers(settings: Settings) -> str:
    workers = local_workers(require_queue(settings))
    if not workers:
        raise click.ClickException(f"no worker is registered that runs on this host ({host_name()})")
    if lost := [about["id"] for about in workers if not about["alive"]]:
        raise click.ClickException(f"no lease within the last {settings.lease} s: {' '.join(lost)}; restart the worker")
    return f"{plural(len(workers), 'worker')} with a lease: {' '.join(about['id'] for about in workers)}"


def _check_web(settings: Settings) -> str:
    """Ask a web process for /health, which needs neither Redis nor an API key."""
    from http.client import HTTPConnection, HTTPException  # slow to import, and no other command needs it

    host = "localhost" if settings.host in ("", "*") else settings.host
    connection = HTTPConnection(host, settings.port, timeout=WEB_TIMEOUT)
    try:
        connection.request("GET", "/health")
        status = connection.getresponse().status
    except (OSError, HTTPException) as error:
        raise click.ClickException(f"the web process on port {settings.port} does not answer: {error}") from None
    if status != HTTPStatus.OK:
        raise click.ClickException(f"the web process on port {settings.port} answers with {status}")
    return f"the web process on port {settings.port} answers"


# Output ---------------------------------------------------------------------------------------------------------------


def _show(read: Callable[[], Any], show: Callable[[Any], None], as_json: bool, watch: bool) -> None:
    """Show what `read` returns; with `watch`, again every two seconds until Ctrl-C."""
    show = _print_json if as_json else show
    show(read())
    if watch:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts background jobs with SIGINT ignored
    with suppress(KeyboardInterrupt):
        while watch:
            time.sleep(2.0)
            click.clear()
            show(read())


def _print_table(rows: Sequence[Sequence[Any]], empty: str = "") -> None:
    """Print a header and rows with aligned columns, or `empty` if there is only the header."""
    if len(rows) == 1 and empty:
        click.echo(empty)
        return
    widths = [max(len(str(row[at])) for row in rows) for at in range(len(rows[0]))]
    for row in rows:
        cells = (
            str(cell).rjust(width) if isinstance(cell, int) else str(cell).ljust(width)
            for cell, width in zip(row, widths, strict=True)
        )
        _print_safely("  ".join(cells).rstrip())


def _print_safely(text: str) -> None:
    """Print text of clients and handlers; escape what could control the terminal."""
    click.echo("".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text))


def _format_time(milliseconds: int) -> str:
    return datetime.fromtimestamp(milliseconds / 1000, UTC).strftime("%Y-%m-%d %H:%M:%SZ")


def _format_json(value: Any) -> str:
    return msgspec.json.format(msgspec.json.encode(value), indent=2).decode()


def _print_json(value: Any) -> None:
    text = _format_json(value)
    if not _prints_unicode():  # JSON has its own escapes, which JSON parsers understand
        text = json.dumps(json.loads(text), indent=2)
    click.echo(text)


def _prints_unicode() -> bool:
    return codecs.lookup(sys.stdout.encoding or "utf-8").name.startswith("utf")
