"""Checks that the counts of a run's stages add up, and writes its data card and its description in Croissant."""

from __future__ import annotations

import argparse
from pathlib import Path

import yaml
from pydantic import ValidationError

from run_contract.entry_point import run_main
from run_contract.errors import InputsMissing, UserError
from run_contract.publish import publishing, write_json, write_text
from snakmodel.config.recipe import Recipe
from snakmodel.register.croissant import croissant
from snakmodel.register.data_card import data_card
from snakmodel.register.funnel import check, funnel_json, read_flows
from snakmodel.register.sources import source_facts
from snakmodel.run.paths import RunPaths, shard_name


def main() -> None:
    """python -m snakmodel.register --run_dir RUN --shards 16 --before filter --documents dedup/kept --output RUN/card

    Writes RUN/card/data-card.md, croissant.json and funnel.json from what the stages of a run have counted.
    """
    parser = argparse.ArgumentParser(
        prog="snakmodel.register", description=main.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run_dir", type=Path, required=True, help="the run's folder")
    parser.add_argument("--shards", type=int, required=True, help="the number of shards")
    parser.add_argument("--before", nargs="*", default=[], help="folders of filtered shards before deduplication")
    parser.add_argument("--after", nargs="*", default=[], help="folders of filtered shards after it")
    parser.add_argument("--documents", default="dedup/kept", help="folder of the shards that were tokenised")
    parser.add_argument("--output", type=Path, required=True, help="the folder for the card")
    args = parser.parse_args()
    recipe = frozen_recipe(args.run_dir)
    flows = read_flows(args.run_dir, args.shards, args.before, args.after)
    check(flows)
    facts = source_facts(recipe, flows[0].sources)
    shards = [args.run_dir / args.documents / f"{shard_name(index)}.arrow" for index in range(args.shards)]
    names = ("data-card.md", "croissant.json", "funnel.json")
    with publishing(*(args.output / name for name in names)) as (card, metadata, funnel):
        write_text(card, data_card(recipe, facts, flows))
        write_json(metadata, croissant(recipe, facts, flows, shards, args.run_dir))
        write_json(funnel, funnel_json(flows))
    last = flows[-1]
    print(f"{args.output / names[0]}: {flows[0].documents} documents were read, {last.kept} are tokenised")


def frozen_recipe(run: Path) -> Recipe:
    """The recipe in a run's folder. Raises InputsMissing if there is none, UserError if it cannot be read."""
    path = RunPaths(run).frozen
    try:
        return Recipe.model_validate(yaml.safe_load(path.read_text(encoding="utf-8"))["recipe"])
    except FileNotFoundError:
        raise InputsMissing(f"{path} does not exist; the launcher writes it when it submits the run") from None
    except (yaml.YAMLError, KeyError, TypeError, ValidationError) as error:
        raise UserError(f"{path} cannot be read as the record of a run ({error}); plan the run again") from error


if __name__ == "__main__":
    run_main(main)
