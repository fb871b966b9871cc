"""python -m snakmodel.collect fetch --sources recipes/sources/danish.yaml --source bookshop --output DATA
python -m snakmodel.collect list --sources recipes/sources/danish.yaml --output DATA

Collects raw corpora into a data folder. `fetch` downloads one source of a file, converts it to DATA/NAME/, and records
its terms, downloads and checksums in DATA/.collected/NAME.json. It can be killed at any time and typed again. `list`
says what is there, what is missing, and how each source is had.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from run_contract.entry_point import run_main
from run_contract.errors import EXIT_AGAIN
from run_contract.output import say
from run_contract.publish import publishing, write_json
from snakmodel.collect.download import NotNow
from snakmodel.collect.fetch import fetch
from snakmodel.collect.listing import offline, plan, table
from snakmodel.collect.places import Place
from snakmodel.collect.sources import chosen, read_sources

_FETCH = """Collects one source: downloads its files, converts them, and writes its record.

example: python -m snakmodel.collect fetch --sources recipes/sources/danish.yaml --source bookshop --output data"""
_LIST = """Prints a table of the sources: what is there, what is missing, and how each is had.

example: python -m snakmodel.collect list --sources recipes/sources/danish.yaml --output data --offline"""


def make_parser() -> argparse.ArgumentParser:
    """The parser of the commands and their flags."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m snakmodel.collect", description=__doc__, formatter_class=form, allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (("fetch", _FETCH), ("list", _LIST)):
        command = commands.add_parser(
            name, help=text.splitlines()[0], description=text, formatter_class=form, allow_abbrev=False
        )
        command.add_argument("--sources", type=Path, required=True, help="the file of sources, in YAML")
        command.add_argument("--output", type=Path, required=True, metavar="DATA_FOLDER", help="the data folder")
        if name == "fetch":
            command.add_argument("--source", required=True, metavar="NAME", help="which source of the file")
            command.add_argument("--copy_record", type=Path, metavar="FILE", help="write the record there too")
            command.add_argument("--dry_run", action="store_true", help="only print what would be done")
            text = "open no connection, and convert the files that have been put in place"
        else:
            text = "print which files are missing, and what to type where there is a network"
        command.add_argument("--offline", action="store_true", help=text)
    return parser


def main() -> int:
    """Fetch one source, or list all of them. Returns the exit code: 75 if typing the command again later may help."""
    args = make_parser().parse_args()
    sources = read_sources(args.sources)
    if args.command == "list":
        if args.offline:
            print("\n".join(offline(args.output, sources, args.sources)))
        else:
            Console().print(table(args.output, sources))
        return 0
    place, source = Place(args.output, args.source), chosen(sources, args.source, args.sources)
    if args.dry_run:
        print("\n".join(plan(place, source)))
        return 0
    try:
        record = fetch(place, source, offline=args.offline)
        if args.copy_record:
            with publishing(args.copy_record) as (copy,):
                write_json(copy, record)
    except NotNow as error:
        say(f"error: {error}", error=True)
        return EXIT_AGAIN
    return 0


if __name__ == "__main__":
    run_main(main)
