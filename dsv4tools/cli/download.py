"""``dsv4tools download``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from dsv4tools.cli.output import EPILOG, json_option, progress_bar, say, shell_words, show, show_json, show_table
from dsv4tools.cli.sources import output_argument, tame_loggers
from dsv4tools.errors import UsageError
from dsv4tools.hub import download as run_download
from dsv4tools.hub import is_reference, parse_reference, plan_download
from dsv4tools.sizes import format_bytes

if TYPE_CHECKING:
    from pathlib import Path

    from dsv4tools.hub import DownloadPlan


@click.command(epilog=EPILOG)
@click.argument("repository", metavar="REPO")
@click.argument("directory", metavar="[DIR]", type=output_argument, required=False)
@click.option("--revision", metavar="R", help="Branch, tag or commit; the main branch by default.")
@click.option("--include", multiple=True, metavar="GLOB", help="Only these files; repeatable.")
@click.option("--exclude", multiple=True, metavar="GLOB", help="Not these files; repeatable.")
@click.option("--dry-run", is_flag=True, help="Say what would be fetched, its size and the free space.")
@json_option
def download(repository: str, directory: Path | None, revision: str | None, include: tuple[str, ...],
             exclude: tuple[str, ...], dry_run: bool, as_json: bool) -> None:
    """Fetch the repository REPO (OWNER/NAME) of the Hugging Face Hub into DIR, and check every file.

    Without DIR it goes to a directory of the repository's name. Files that are there already stay; run the same command
    again after an interruption. Every file is compared with the hash that the Hub states, those that were there
    too; what differs is fetched again.

    Private and gated repositories: log in with `hf auth login`, or set HF_TOKEN. HF_ENDPOINT names another Hub.

    \b
    Examples:
      dsv4tools download deepseek-ai/DeepSeek-V4-Flash --dry-run
      dsv4tools download deepseek-ai/DeepSeek-V4-Flash /data/flash
      dsv4tools download deepseek-ai/DeepSeek-V4-Flash --include '*.json' --include README.md
    """
    tame_loggers()
    if is_reference(repository):
        reference = parse_reference(repository)
        if revision and reference.revision:
            raise UsageError("--revision", f"is {revision!r}, {repository} names one too", hint="give one of them")
        repository, revision = reference.repository, revision or reference.revision
    plan = plan_download(repository, directory, revision=revision, include=include, exclude=exclude)
    if dry_run:
        if as_json:
            show_json(_as_data(plan))
        else:
            _show_plan(plan)
        return
    snapshot = plan.snapshot
    say(f"{repository} at commit {snapshot.revision}: {len(plan.files)} files, {format_bytes(plan.n_bytes)}, "
        f"{format_bytes(plan.n_bytes_to_fetch)} to fetch")
    with progress_bar(plan.n_bytes, snapshot.repository) as advance:
        done = run_download(plan, progress=advance)
    if as_json:
        show_json(_as_data(plan) | {"fetched": list(done.fetched), "replaced": list(done.replaced),
                                    "verified": done.n_verified, "orphans_removed": done.n_orphans})
        return
    n_lfs = sum(f.sha256 is not None for f in plan.files)
    show(f"{plan.directory}: {done.n_verified} files, {format_bytes(plan.n_bytes)}; {len(done.fetched)} fetched")
    show(f"checked        sha256 of {n_lfs} files, git hash of {done.n_verified - n_lfs}: all as the Hub states them")
    for name in done.replaced:
        show(f"replaced       {name}: its hash was wrong")
    if done.n_orphans:
        show(f"removed        {done.n_orphans} incomplete files of killed downloads")
    show(f"next: {shell_words('dsv4tools', 'inspect', plan.directory)}")


def _as_data(plan: DownloadPlan) -> dict[str, object]:
    return {
        "repository": plan.snapshot.repository, "revision": plan.snapshot.revision, "directory": str(plan.directory),
        "n_bytes": plan.n_bytes, "n_bytes_to_fetch": plan.n_bytes_to_fetch, "free_bytes": plan.free_bytes,
        "fits": plan.fits,
        "files": [{"name": f.name, "n_bytes": f.n_bytes, "sha256": f.sha256, "git_sha1": f.git_sha1,
                   "present": f.name in plan.present} for f in plan.files],
    }


def _show_plan(plan: DownloadPlan) -> None:
    rows = [("file", "bytes", "")]
    rows += [(f.name, str(f.n_bytes), "is there" if f.name in plan.present else "") for f in plan.files]
    show_table(rows, right="lr")
    show()
    show(f"repository     {plan.snapshot.repository} at commit {plan.snapshot.revision}")
    show(f"directory      {plan.directory}")
    show(f"in all         {len(plan.files)} files, {format_bytes(plan.n_bytes)}")
    show(f"to fetch       {len(plan.files) - len(plan.present)} files, {format_bytes(plan.n_bytes_to_fetch)}")
    show(f"free space     {format_bytes(plan.free_bytes)}{'' if plan.fits else ': NOT ENOUGH'}")
