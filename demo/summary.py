"""python demo/summary.py RUN

Prints the results of a finished run: documents, tokens, losses, the exported model, and a sample that it generates.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from run_contract.entry_point import run_main
from run_contract.errors import InputsMissing
from snakmodel.run.markers import Marker

PROMPT = "Der var engang en"


def counts(run: Path, stage: str) -> list[dict[str, Any]]:
    """What the tasks of a stage counted, from their done markers. Raises InputsMissing if the stage is not done."""
    markers = [Marker.read(path) for path in sorted((run / "markers" / stage).glob("*.json"))]
    if not markers:
        raise InputsMissing(f"{run}: stage {stage} is not done. Run jobs/submit_all.py to the end first.")
    return [marker.counts for marker in markers if marker]


def total(run: Path, stage: str, name: str) -> int:
    """The sum of one count over a stage's tasks."""
    return sum(int(one[name]) for one in counts(run, stage))


def generate(folder: Path) -> str:
    """A continuation of PROMPT that the exported model generates."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(1)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    inputs = tokenizer(PROMPT, return_tensors="pt", return_token_type_ids=False)
    output = model.generate(**inputs, max_new_tokens=40, do_sample=True, temperature=0.7, top_k=40, pad_token_id=2)
    return str(tokenizer.decode(output[0], skip_special_tokens=True))


def main() -> int:
    """The command: prints what the module's docstring lists, and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="the run's folder")
    run = parser.parse_args().run
    counts(run, "push")
    metrics = [json.loads(line) for line in (run / "checkpoints" / "metrics.jsonl").read_text().splitlines()]
    losses = [one["lm_loss"] for one in metrics if "lm_loss" in one]
    validation = [one["validation_loss"] for one in metrics if "validation_loss" in one]
    exported = sorted((run / "hf").glob("iter_*"))[-1]
    before, after = total(run, "prepare", "documents"), total(run, "dedup-filter", "documents")
    print(f"documents        {before} before deduplication, {after} after")
    print(f"tokens           {total(run, 'merge-tokens', 'tokens')}")
    print(f"training loss    {losses[0]:.3f} at first, {losses[-1]:.3f} at last")
    print(f"validation loss  {validation[-1]:.3f}")
    print(f"exported model   {exported}")
    print(f"a sample         {generate(exported)!r}")
    return 0


if __name__ == "__main__":
    run_main(main)
