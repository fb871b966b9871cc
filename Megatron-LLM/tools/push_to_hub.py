"""python Megatron-LLM/tools/push_to_hub.py RUN/hf/iter_0000060 --hf_repo_name ORG/NAME --max_shard_size 2GB

Uploads a Hugging Face folder: the folder -> a copy (cast and sharded as requested, with a model card), read back and
compared, renamed into place -> the Hub. With --output_folder the copy is kept, and without --hf_repo_name nothing is
uploaded. The token comes from HF_TOKEN, from --token_file or from `hf auth login`; it is never printed. A failed upload
is tried again after a growing wait, and the command can be repeated: the Hub recognises a file by its content, and
files that it already has are not sent again.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError: httpx's in version 1, httpx2's in 2
    HfHubHTTPError,
    HTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)

from megatron_llm.model.canonical_state import EMBEDDING
from megatron_llm.weights import hf as hf_weights
from megatron_llm.weights import model_card
from megatron_llm.weights.megatron import DTYPES
from run_contract.entry_point import run_main
from run_contract.errors import InputsMissing, UserError
from run_contract.publish import publishing, remove

REFUSED = {
    "auth_token": "every user of the machine can read a token on the command line; use HF_TOKEN, --token_file FILE "
    "or `hf auth login`",
    "trust_remote_code": "a model's own code is never run; only Llama, Mistral and Falcon folders are read",
    "unsafe": "pickled weights can run code on whoever loads them; only safetensors are written",
}
DTYPE_NAMES = DTYPES | {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}
WAITS = (2, 4, 8, 16, 32, 64)
"""Seconds to wait before each new attempt."""
TRANSIENT = (408, 409, 412, 425, 429)
"""HTTP status codes after which another attempt can help, besides all from 500 on."""
UNKNOWN_LICENSE = "unknown"
"""The Hub's name for a licence that was not specified; every card has this field."""
REPLACED = ["model*.safetensors", "model.safetensors.index.json"]
"""Files of an earlier upload that are deleted unless this one writes them: shards of different counts would mix."""


WRITTEN = re.compile(
    r"(config|generation_config|tokenizer|tokenizer_config|model\.safetensors\.index)\.json|tokenizer\.model|README\.md"
    r"|loss\.png|data-card\.md|croissant\.json|model(-\d+-of-\d+)?\.safetensors"
)
"""Names of the files of a copy: an earlier copy may be replaced, any other folder may not."""


class Refuse(argparse.Action):
    """Raise an error for an upstream flag that must not be used, with the reason; its value is not repeated."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        raise UserError(f"--{self.dest} is refused: {REFUSED[self.dest]}")


def make_parser() -> argparse.ArgumentParser:
    """The parser of upstream's flags, and of a token file and a revision."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("model_name", type=Path, help="Hugging Face folder")
    parser.add_argument("--hf_repo_name", help="ORG/NAME; created if it does not exist")
    parser.add_argument("--public", action="store_true", help="a public repository; by default a private one")
    parser.add_argument("--output_folder", type=Path)
    parser.add_argument("--dtype", default="auto", choices=("auto", *DTYPE_NAMES), help="auto keeps what is stored")
    parser.add_argument("--max_shard_size", default="10GB")
    parser.add_argument("--revision", help="branch to upload to; created if it does not exist")
    parser.add_argument("--token_file", type=Path)
    parser.add_argument("--license", help="licence for the model card, such as llama2; by default the recipe's")
    parser.add_argument("--run_dir", type=Path, help="folder of the run that made the model, for the model card")
    parser.add_argument("--rope_scaling_type", choices=("linear", "dynamic"), help="by default linear")
    parser.add_argument("--rope_scaling_factor", type=float, help="write another rotary scaling into config.json")
    parser.add_argument("--auth_token", action=Refuse, help="refused: see --token_file")
    parser.add_argument("--trust_remote_code", action=Refuse, nargs=0, help="refused: no code of a model is run")
    parser.add_argument("--unsafe", action=Refuse, nargs=0, help="refused: only safetensors are written")
    return parser


def read_token(path: Path | None) -> str | None:
    """Read the token from a file; None leaves the choice to HF_TOKEN or the saved login. Raises InputsMissing."""
    if path is None:
        return None
    if not path.is_file():
        raise InputsMissing(f"{path} is missing; --token_file is a file with nothing but the token")
    return path.read_text(encoding="utf-8").strip()


def set_rope(folder: Path, kind: str, factor: float) -> None:
    """Write a different rotary scaling into a folder's config.json, in both spellings."""
    path = folder / "config.json"
    raw = json.loads(path.read_text(encoding="utf-8"))
    scaling = {"rope_type": kind, "factor": factor}
    if raw["rope_scaling"]:
        print(f"config.json: rope_scaling {raw['rope_scaling']} becomes {scaling}, as the flags say", flush=True)
    raw["rope_parameters"] = {**scaling, "rope_theta": raw["rope_theta"]}
    raw["rope_scaling"] = {**scaling, "type": kind}
    path.write_text(json.dumps(raw, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def write_copy(args: argparse.Namespace, output: Path) -> None:
    """Publish the folder to upload: weights as requested, tokenizer and model card, compared with the source."""
    config, state = hf_weights.load(args.model_name)
    hf_weights.say_what_stays_behind(args.model_name)
    dtype = state[EMBEDDING].dtype if args.dtype == "auto" else DTYPE_NAMES[args.dtype]
    found = re.fullmatch(r"iter_(\d+)", args.model_name.resolve().name)
    run = model_card.read_run(args.run_dir, int(found[1]) if found else None) if args.run_dir else None
    model = model_card.ModelFacts(
        name=args.hf_repo_name or args.model_name.resolve().name,
        revision=args.revision,
        parameters=sum(tensor.numel() for tensor in state.values()),
        dtype=str(dtype).removeprefix("torch."),
        license=args.license or (run and run.license) or UNKNOWN_LICENSE,
    )
    if model.license == UNKNOWN_LICENSE:
        print(
            f"the model card says license: {UNKNOWN_LICENSE}; give --license, such as llama2 or apache-2.0", flush=True
        )
    with publishing(output) as (temporary,):
        hf_weights.save(
            temporary,
            config,
            state,
            dtype=dtype,
            vocab_file=args.model_name,
            max_shard_size=args.max_shard_size,
        )
        model_card.write(temporary, model, run)
        hf_weights.check_written(temporary, config, state, dtype)
        if args.rope_scaling_factor is not None:
            set_rope(temporary, args.rope_scaling_type or "linear", args.rope_scaling_factor)
    print(f"wrote {output} ({dtype}); read back equal", flush=True)


@contextmanager
def copy_to_upload(args: argparse.Namespace) -> Iterator[Path]:
    """Yield the written copy: --output_folder, else a folder beside the source that is removed after the upload.

    Raises UserError.
    """
    source = args.model_name.resolve()
    output = args.output_folder or source.with_name(f".{source.name}.push")
    if output.resolve() == source:
        raise UserError(f"--output_folder {output} is the source itself; give another folder")
    others = sorted(path.name for path in output.glob("*") if not WRITTEN.fullmatch(path.name))
    if others or output.is_file():
        found = f"holds {others[0]}, which is not part of an earlier copy" if others else "is a file"
        raise UserError(f"--output_folder {output} {found}; give another folder, or move it away")
    write_copy(args, output)
    yield output
    if not args.output_folder:
        remove(output)


def send(api: huggingface_hub.HfApi, folder: Path, args: argparse.Namespace) -> None:
    """Create repository and branch if missing, and upload; all of it can be repeated.

    Raises UserError, HTTPError or ConnectionError.
    """
    api.create_repo(args.hf_repo_name, private=not args.public, exist_ok=True)
    if api.repo_info(args.hf_repo_name).private is args.public:
        found, flag = ("private", "leave --public out") if args.public else ("public", "give --public")
        raise UserError(f"{args.hf_repo_name} exists and is {found}; {flag}, or change it on the Hub")
    if args.revision:
        api.create_branch(args.hf_repo_name, branch=args.revision, exist_ok=True)
    api.upload_folder(
        repo_id=args.hf_repo_name,
        folder_path=folder,
        revision=args.revision,
        commit_message=f"Upload {args.model_name.resolve().name}",
        delete_patterns=REPLACED,
    )


def transient(error: Exception) -> bool:
    """Whether another attempt can help: after a failure of a busy or broken server, or of the connection."""
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in TRANSIENT or error.response.status_code >= 500
    return not isinstance(error, OfflineModeIsEnabled)


def upload(folder: Path, args: argparse.Namespace) -> None:
    """Upload with retries. Raises ConnectionError if all fail, and UserError if another attempt cannot help."""
    api = huggingface_hub.HfApi(token=read_token(args.token_file))
    for wait in (*WAITS, None):
        try:
            send(api, folder, args)
            break
        except (HTTPError, ConnectionError, RuntimeError) as error:  # hf_xet reports network errors as RuntimeError
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            if not transient(error):
                raise UserError(
                    f"{args.hf_repo_name} is not uploaded: {reason}; does the token in HF_TOKEN, --token_file or "
                    "`hf auth login` have write permission there?"
                ) from error
            if wait is None:
                raise ConnectionError(f"{args.hf_repo_name} is not uploaded: {reason}; run again to go on") from error
            print(f"the upload broke: {reason}; going on in {wait} s", file=sys.stderr, flush=True)
            time.sleep(wait)
        except (ValueError, LocalTokenNotFoundError) as error:
            raise UserError(f"{args.hf_repo_name} is not uploaded: {str(error).splitlines()[0]}") from error
    print(f"uploaded {folder} to {args.hf_repo_name}", flush=True)


def main() -> int:
    """Copy, check and upload. Returns 1 when the Hub cannot be reached, so that a launcher tries again."""
    args = make_parser().parse_args()
    if args.rope_scaling_factor is not None and args.rope_scaling_factor < 1:
        raise UserError(f"--rope_scaling_factor {args.rope_scaling_factor}: must be at least 1")
    if args.rope_scaling_type and args.rope_scaling_factor is None:
        raise UserError(f"--rope_scaling_type {args.rope_scaling_type} needs --rope_scaling_factor")
    if not args.hf_repo_name and not args.output_folder:
        raise UserError("nothing to do: give --hf_repo_name ORG/NAME, --output_folder FOLDER, or both")
    try:
        with copy_to_upload(args) as folder:
            if args.hf_repo_name:
                upload(folder, args)
    except ConnectionError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    return 0


if __name__ == "__main__":
    run_main(main)
