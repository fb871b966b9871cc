"""python Megatron-LLM/tools/check_run.py < REQUEST.json

Would the commands of a run be refused? This checks, before anything runs, what the engine's own checks can determine
without tokens and without weights: the flags of every command, whether ranks, batch and model fit together, the
learning-rate schedule, the architecture, files and tensor shapes of the base model, and the tokenizer. It prints a JSON
object. `problems` lists one sentence for everything that would be refused (the exit code is then 2, otherwise 0), and
`facts` says how large the training is.

REQUEST is a JSON object. `commands` maps the name of a stage to its command line, which begins with the script, such as
`["Megatron-LLM/finetune.py", "--lr", "0.1"]`; `base` is the folder of the base model; `ranks` is the number of training
processes; `device` is the name of the GPU, such as `a100`. If `base` is null, no model is checked.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from megatron_llm.data import gpt_dataset
from megatron_llm.flags import parser as flags_parser
from megatron_llm.model import flops
from megatron_llm.model.config import ModelConfig
from megatron_llm.parallel import layout_checks
from megatron_llm.training import resume
from megatron_llm.weights import hf as hf_weights
from megatron_llm.weights import megatron_layout
from megatron_llm.weights import meta as meta_weights
from run_contract.entry_point import run_main
from run_contract.errors import EXIT_USER_ERROR, UserError

PROJECT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Request:
    """The request: which commands are to be checked, and for what."""

    commands: Mapping[str, Sequence[str]]
    """Stage -> command line, beginning with the script."""
    base: Path | None
    """Folder of the base model; None if no command needs it."""
    ranks: int
    """Number of training processes."""
    device: str
    """Name of the GPU that trains, or part of its name."""

    @classmethod
    def read(cls, text: str) -> Request:
        """Parse a request. Raises UserError."""
        try:
            raw = json.loads(text)
            base = None if raw["base"] is None else Path(raw["base"])
            return cls(dict(raw["commands"]), base, int(raw["ranks"]), str(raw["device"]))
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"standard input is not a request ({error!r}); its form is described by --help") from error


def main() -> int:
    """Check every command, and print the problems."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    request = Request.read(sys.stdin.read())
    problems: list[str] = []
    config = None
    try:
        config = describe(request.base) if request.base else None
    except UserError as error:
        problems.append(f"model.base: {error}")
    problems += find_problems(request, config)
    facts = find_facts(request, config) if config and not problems else {}
    print(json.dumps({"problems": problems, "facts": facts}, ensure_ascii=False))
    return EXIT_USER_ERROR if problems else 0


def find_problems(request: Request, config: ModelConfig | None) -> Iterator[str]:
    """Yield a sentence for each command that would be refused; without `config` the model is not checked."""
    for stage, command in request.commands.items():
        check = CHECKS.get(Path(command[0]).name, check_flags)
        try:
            check(list(command), request, config)
        except UserError as error:
            yield f"{stage}: {error}"


def find_facts(request: Request, config: ModelConfig) -> dict[str, float | None]:
    """Number of parameters, FLOPs of the whole training (0 without one), and the GPU's peak in TFLOP/s if it is
    known."""
    total = 0
    if command := request.commands.get("train"):
        args = flags_parser.parse(command[1:])
        batch, _ = layout_checks.batch_layout(args.parallel, args.training, request.ranks)
        total = args.training.train_iters * flops.training_flops(config, args.model.seq_length, batch)
    return {
        "parameters": flops.parameter_count(config),
        "training_flops": total,
        "peak_tflops": flops.peak_tflops(request.device),
    }


def describe(base: Path) -> ModelConfig:
    """The geometry of the base model, after a check of all its files; no weight is read. Raises UserError."""
    if meta_weights.is_meta(base):
        return meta_weights.load(base, "llama2")[0]
    config, _ = hf_weights.load(base, values=False)
    return config


def parse(command: Sequence[str]) -> tuple[ModuleType, argparse.Namespace]:
    """Load one of the engine's scripts, and parse its flags with its own parser. Raises UserError."""
    script, *words = command
    module = load_script(PROJECT / script)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return module, module.make_parser().parse_args(words)
    except SystemExit as error:  # argparse has printed its usage, and the error in the last line
        raise UserError(said.getvalue().strip().splitlines()[-1].partition("error: ")[2]) from error


def load_script(path: Path) -> ModuleType:
    """Load a script of the engine as a module; scripts lie outside the package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def check_flags(command: list[str], request: Request, config: ModelConfig | None) -> None:
    """Check the flags of a script that has no further check here."""
    parse(command)


def check_conversion(command: list[str], request: Request, config: ModelConfig | None) -> None:
    """Check for hf_to_megatron.py that the model has the family and size that its flags name."""
    module, args = parse(command)
    if config is None or request.base is None:
        return
    module.check_family(request.base, args.model)
    if args.size is not None:
        module.check_size(config, args.size)


def check_layout(command: list[str], request: Request, config: ModelConfig | None) -> None:
    """Check for checkpoint_util.py that the model can be cut over the parallel ranks."""
    _, args = parse(command)
    if config is not None and args.saver == "megatron":
        megatron_layout.check_sizes(
            config, args.target_tensor_parallel_size or 1, args.target_pipeline_parallel_size or 1
        )


def check_tokenizer(command: list[str], request: Request, config: ModelConfig | None) -> None:
    """Check for preprocess_data.py that the tokenizer can be opened, has the requested tokens, and fits the model."""
    module, args = parse(command)
    vocabulary = module.open_vocabulary(args)
    if config is not None and vocabulary.vocab_size > config.vocab_size:
        raise UserError(
            f"{args.vocab_file} makes {vocabulary.vocab_size} kinds of tokens, but the model's embedding has only "
            f"{config.vocab_size}; give the model's own tokenizer"
        )


def check_samples(command: list[str], request: Request, config: ModelConfig | None) -> None:
    """Check for build_index.py finetune.py's flags, of which it needs fewer."""
    script = load_script(PROJECT / command[0])
    flags_parser.parse(command[1:], optional=script.NOT_NEEDED)


def check_training(command: list[str], request: Request, config: ModelConfig | None) -> None:
    """Check for finetune.py flags, ranks, batch, schedule, and how the model is spread."""
    args = flags_parser.parse(command[1:])
    batch, _ = layout_checks.batch_layout(args.parallel, args.training, request.ranks)
    resume.schedule(args, batch, {})
    if split := args.data.paths().split:
        gpt_dataset.split_boundaries(split, 1000)
    if config is None:
        return
    layout_checks.check(config, args.parallel, args.model.seq_length, request.ranks)
    if args.model.seq_length > config.max_position_embeddings:
        raise UserError(
            f"--seq_length {args.model.seq_length} is more than the model's max_position_embeddings "
            f"{config.max_position_embeddings}; use at most that"
        )


def check_push(command: list[str], request: Request, config: ModelConfig | None) -> None:
    """Check for push_to_hub.py its flags and the size of a shard."""
    _, args = parse(command)
    hf_weights.parse_size(args.max_shard_size)


CHECKS: dict[str, Callable[[list[str], Request, ModelConfig | None], None]] = {
    "hf_to_megatron.py": check_conversion,
    "checkpoint_util.py": check_layout,
    "preprocess_data.py": check_tokenizer,
    "build_index.py": check_samples,
    "finetune.py": check_training,
    "push_to_hub.py": check_push,
}
"""Script -> the check of its command line; for all other scripts only the flags are checked."""


if __name__ == "__main__":
    run_main(main)
