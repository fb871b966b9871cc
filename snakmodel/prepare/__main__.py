"""Turns raw text into Arrow shards with the columns `text` and `source`.

input_files.py makes the plan: which bytes of which files make up a shard. readers.py reads the documents in them,
whatever the format. shard_writer.py decides which documents are kept, cleans them and writes them. The result is one
file per shard, with its counts beside it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from run_contract.entry_point import run_main
from snakmodel.prepare.byte_streams import UTF_8
from snakmodel.prepare.chunks import ERROR_POLICIES
from snakmodel.prepare.hf_dataset import write_datasets
from snakmodel.prepare.kept_columns import KeptColumn
from snakmodel.prepare.readers import DOCUMENT_MODES, Reading
from snakmodel.prepare.recognise import ENCODINGS
from snakmodel.prepare.shard import prepare, read_shard
from snakmodel.prepare.shard_writer import Cleaning, Columns
from snakmodel.shards.condition import Condition


def main() -> None:
    """python -m snakmodel.prepare --shards RUN/shards.json --shard 3 --output RUN/arrow/shard-00003

    Reads the byte ranges that the plan gives to one shard, writes `shard-00003.arrow` and its counts beside it. Or, as
    preprocess_to_hf.py: --data_path DIR --dataset_names "a b all" [--output hf_datasets_format] makes whole datasets.
    """
    parser = argparse.ArgumentParser(
        prog="snakmodel.prepare", description=main.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shards", type=Path, help="the plan, shards.json")
    parser.add_argument("--shard", type=int, help="which shard of the plan, from 0")
    parser.add_argument("--data_path", type=Path, help="folder of raw text, a file or a sub-folder a dataset")
    parser.add_argument("--dataset_names", help="datasets, separated by spaces; `all` puts them together")
    parser.add_argument("--output", type=Path, help="output path without .arrow, or the folder of the datasets")
    parser.add_argument("--document", choices=DOCUMENT_MODES, default="line", help="what one document of text is")
    parser.add_argument("--errors", choices=ERROR_POLICIES, default="error", help="what to do with what is not text")
    parser.add_argument("--key", default="text", help="JSON key or column with the text, where it is not raw text")
    parser.add_argument("--encoding", choices=ENCODINGS, default=UTF_8, help="encoding of text and JSON lines")
    parser.add_argument("--trim", action="store_true", help="take white space from both ends of documents")
    parser.add_argument("--nfc", action="store_true", help="compose characters (Unicode normal form C)")
    parser.add_argument("--min_characters", type=int, default=0, help="leave out documents shorter than this")
    parser.add_argument(
        "--keep", nargs="*", metavar="NAME=TYPE", help="JSON keys or columns to keep beside the text, and an `id`"
    )
    parser.add_argument("--where", help="a condition on the kept columns, such as 'score > 0.5'")
    parser.add_argument("--ids_below", type=Path, help="the folder below which files have their names in the ids")
    args = parser.parse_args()
    kept = tuple(map(KeptColumn.of, args.keep or ()))
    reading = Reading(args.document, args.errors, args.key, args.encoding, kept)
    cleaning = Cleaning(args.trim, args.nfc, args.min_characters)
    columns = None
    if args.keep is not None:
        where = args.where and Condition(args.where, "--where")
        columns = Columns(kept, args.ids_below or Path("/"), where or None)
    elif args.where:
        parser.error("--where needs --keep with the columns that it names")
    if None not in (args.data_path, args.dataset_names) and args.shards is args.shard is None:
        output = args.output or Path("hf_datasets_format")
        if columns:
            parser.error("--keep is for --shards; whole datasets have text and source")
        made = write_datasets(args.data_path, args.dataset_names.split(), output, reading, cleaning)
    elif None not in (args.shards, args.shard, args.output) and args.data_path is args.dataset_names is None:
        parts = read_shard(args.shards, args.shard)
        made = {f"{args.output}.arrow": prepare(parts, args.output, reading, cleaning, columns)}
    else:
        parser.error("give either --shards, --shard and --output, or --data_path and --dataset_names")
    for path, counts in made.items():
        print(f"{path}: {counts}")


if __name__ == "__main__":
    run_main(main)
