"""python Megatron-LLM/tools/push_to_hub.py RUN/hf/iter_0000060 --hf_repo_name ORG/NAME --max_shard_size 2GB

A Hugging Face folder -> a copy (cast and sharded as asked, with a model card), read back and compared, renamed into
place -> the Hub. With --output_folder the copy stays there, and without --hf_repo_name nothing is uploaded. The token
comes from HF_TOKEN, from --token_file or from `hf auth login`; it is never printed.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import torch
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

from megatron_llm import hf_tokenizer, hf_weights
from megatron_llm.files import InputsMissing, UserError, publishing, remove, run_main
from megatron_llm.megatron_weights import DTYPES
from megatron_llm.model_config import ModelConfig
from megatron_llm.reshard import EMBEDDING, State

REFUSED = {
    "auth_token": "every user of the machine can read a token on the command line; use HF_TOKEN, --token_file FILE "
    "or `hf auth login`",
    "unsafe": "pickled weights can run code on whoever loads them; only safetensors are written",
}
DTYPE_NAMES = DTYPES | {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}
CARD = """---
library_name: transformers
pipeline_tag: text-generation
---

# {name}

A Llama-style language model ({parameters:,} parameters, {dtype}), continually pre-trained with the SnakModel Toolkit.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModelForCausalLM.from_pretrained("{name}")
```
"""


class Refuse(argparse.Action):
    """Stop at one of upstream's flags that must not be used, and say why; its value is not repeated."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        raise UserError(f"--{self.dest} is refused: {REFUSED[self.dest]}")


def parse_args() -> argparse.Namespace:
    """Upstream's flags, a token file and a revision."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("model_name", type=Path, help="Hugging Face folder")
    parser.add_argument("--hf_repo_name", help="ORG/NAME; created as a private repository if it does not exist")
    parser.add_argument("--output_folder", type=Path)
    parser.add_argument("--dtype", default="auto", choices=("auto", *DTYPE_NAMES), help="auto keeps what is stored")
    parser.add_argument("--max_shard_size", default="10GB")
    parser.add_argument("--revision", help="branch to upload to; created if it does not exist")
    parser.add_argument("--token_file", type=Path)
    parser.add_argument("--rope_scaling_type", default="linear", choices=("linear", "dynamic"))
    parser.add_argument("--rope_scaling_factor", type=float, help="write another rotary scaling into config.json")
    parser.add_argument("--auth_token", action=Refuse, help="refused: see --token_file")
    parser.add_argument("--unsafe", action=Refuse, nargs=0, help="refused: only safetensors are written")
    return parser.parse_args()


def read_token(path: Path | None) -> str | None:
    """The token in a file; None leaves it to HF_TOKEN or the saved login."""
    if path is None:
        return None
    if not path.is_file():
        raise InputsMissing(f"{path} is missing; --token_file is a file with nothing but the token")
    return path.read_text(encoding="utf-8").strip()


def with_rope(config: ModelConfig, kind: str, factor: float | None) -> ModelConfig:
    """The geometry with another linear rotary scaling factor."""
    if factor is None:
        return config
    if kind != "linear" or factor < 1:
        raise UserError(
            f"rope scaling {kind} {factor} is not supported; supported is linear with a factor of at least 1"
        )
    return replace(config, rope_scaling_factor=factor)


def card(name: str, state: State, dtype: torch.dtype) -> str:
    """README.md."""
    parameters = sum(tensor.numel() for tensor in state.values())
    return CARD.format(name=name, parameters=parameters, dtype=str(dtype).removeprefix("torch."))


def write_copy(args: argparse.Namespace, output: Path) -> None:
    """Publish the folder to upload: weights as asked, tokenizer, model card; compared with its source."""
    config, state = hf_weights.load(args.model_name)
    dtype = state[EMBEDDING].dtype if args.dtype == "auto" else DTYPE_NAMES[args.dtype]
    config = with_rope(config, args.rope_scaling_type, args.rope_scaling_factor)
    with publishing(output) as (temporary,):
        hf_weights.save(
            temporary,
            config,
            state,
            dtype=dtype,
            vocab_file=hf_tokenizer.find(args.model_name),
            max_shard_size=args.max_shard_size,
        )
        text = card(args.hf_repo_name or args.model_name.name, state, dtype)
        (temporary / "README.md").write_text(text, encoding="utf-8")
        hf_weights.check_written(temporary, config, state, dtype)
    print(f"wrote {output} ({dtype}); read back equal", flush=True)


@contextmanager
def copy_to_upload(args: argparse.Namespace) -> Iterator[Path]:
    """The written copy: --output_folder, else one beside the source that is removed after a successful upload."""
    source = args.model_name.resolve()
    output = args.output_folder or source.with_name(f".{source.name}.push")
    if output.resolve() == source:
        raise UserError(f"--output_folder {output} is the source itself; give another folder")
    write_copy(args, output)
    yield output
    if not args.output_folder:
        remove(output)


def upload(folder: Path, args: argparse.Namespace) -> None:
    """Create the repository and upload; what the Hub already has is not sent again."""
    api = huggingface_hub.HfApi(token=read_token(args.token_file))
    try:
        api.create_repo(args.hf_repo_name, private=True, exist_ok=True)
        if args.revision:
            api.create_branch(args.hf_repo_name, branch=args.revision, exist_ok=True)
        api.upload_folder(
            repo_id=args.hf_repo_name,
            folder_path=folder,
            revision=args.revision,
            commit_message=f"Upload {args.model_name.name}",
        )
    except (HfHubHTTPError, HFValidationError, LocalTokenNotFoundError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{args.hf_repo_name} is not uploaded: {reason}; run again to go on where it stopped"
        ) from error
    print(f"uploaded {folder} to {args.hf_repo_name}", flush=True)


def main() -> None:
    """Copy, check, upload."""
    args = parse_args()
    if not args.hf_repo_name and not args.output_folder:
        raise UserError("nothing to do: give --hf_repo_name ORG/NAME, --output_folder FOLDER, or both")
    with copy_to_upload(args) as folder:
        if args.hf_repo_name:
            upload(folder, args)


if __name__ == "__main__":
    run_main(main)
