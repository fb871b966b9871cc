"""The Parquet files of a dataset on the Hugging Face Hub: which they are, and where they are downloaded from."""

from __future__ import annotations

import json
from fnmatch import fnmatchcase
from pathlib import Path

import httpx2
import huggingface_hub
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from run_contract.errors import UserError
from run_contract.publish import write_json
from snakmodel.collect.download import NotNow
from snakmodel.collect.sources import Source

_SPLITS = ("train", "validation", "test")
PARQUET_BRANCH = "refs/convert/parquet"
"""The branch with the Parquet form that the Hub makes of many datasets."""


def parquet_files(source: Source, listing: Path) -> dict[str, tuple[str, str | None]]:
    """Maps the path of each Parquet file of the source to its address and, if the Hub knows it, its SHA-256.

    The commit and the paths are kept in the file `listing`, so that an interrupted download keeps to one commit.
    Raises UserError if there is no such dataset, if it is gated or has a script instead of files, and NotNow if
    the Hub does not answer.
    """
    asked = {"dataset": source.dataset, "revision": source.revision, "version": source.version}
    try:
        kept = json.loads(listing.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        kept = {}
    if kept.get("asked") != asked:
        commit, paths = _ask(source)
        kept = {"asked": asked, "commit": commit, "paths": paths}
        listing.parent.mkdir(parents=True, exist_ok=True)
        write_json(listing, kept)
    return {
        path: (
            huggingface_hub.hf_hub_url(str(source.dataset), path, repo_type="dataset", revision=kept["commit"]),
            kept["paths"][path],
        )
        for path in chosen_paths(source, [*kept["paths"]])
    }


def authorization() -> dict[str, str]:
    """The header that shows the user's token to the Hub; none if there is no token."""
    token = huggingface_hub.get_token()
    return {"Authorization": f"Bearer {token}"} if token else {}


def chosen_paths(source: Source, paths: list[str]) -> list[str]:
    """The Parquet files of the source among the paths of its repository, in order.

    Without `files` these are the files below the folder of the configuration whose path names the split or, if no path
    names any split, all of them. Raises UserError if there are none.
    """
    parquet = sorted(path for path in paths if path.endswith(".parquet"))
    if source.files:
        found = [path for path in parquet if any(fnmatchcase(path, pattern) for pattern in source.files)]
    else:
        found = [path for path in parquet if not source.config or path.startswith(f"{source.config}/")]
        if any(split in path for path in found for split in (*_SPLITS, source.split)):
            found = [path for path in found if source.split in path]
    if found:
        return found
    what = f"{source.dataset} (revision {source.revision})"
    script = f"{str(source.dataset).rsplit('/', 1)[-1]}.py"
    if script in paths and not parquet:
        raise UserError(
            f"{what} is loaded by a script, {script}, and has no Parquet files; such scripts no longer run. Set "
            f"`revision: {PARQUET_BRANCH}` to take the Parquet form that the Hub has made of it (which may hold only a "
            "part), or name another dataset"
        )
    shown = ", ".join(parquet[:5]) + (f" and {len(parquet) - 5} more" if len(parquet) > 5 else "")
    asked = f"files {source.files}" if source.files else f"config {source.config!r} and split {source.split!r}"
    raise UserError(
        f"{what} has no Parquet files for {asked}; it has {shown or 'none at all'}. Correct `config`, `split` or "
        "`files` of the source"
    )


def _ask(source: Source) -> tuple[str, dict[str, str | None]]:
    """The commit that the revision stands for, and the paths of all files in it with their SHA-256, if it is known."""
    name, api = str(source.dataset), huggingface_hub.HfApi()
    try:
        info = api.dataset_info(name, revision=source.revision, files_metadata=True)
        api.auth_check(name, repo_type="dataset")
    except GatedRepoError as error:
        raise UserError(
            f"{name} is gated. Ask for access on https://huggingface.co/datasets/{name}, then log in with `hf auth "
            "login` or set HF_TOKEN to a token of that account"
        ) from error
    except RevisionNotFoundError as error:
        raise UserError(
            f"{name} has no revision {source.revision!r}; valid are its branches, tags and commits, and "
            f"{PARQUET_BRANCH} if the Hub has made a Parquet form of it"
        ) from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"there is no dataset {name} on the Hub, or it is private. Correct `dataset` of the source, or log in with "
            "`hf auth login` or HF_TOKEN if you may read it"
        ) from error
    except OfflineModeIsEnabled as error:
        raise UserError(
            f"{name}: HF_HUB_OFFLINE is set, so that the Hub may not be asked. Unset it, or fetch with --offline what "
            "has been put in place"
        ) from error
    except (HfHubHTTPError, httpx2.TransportError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise NotNow(f"{name}: the Hub did not answer ({reason}). Type the same command again later") from error
    files = {one.rfilename: one.lfs.sha256 if one.lfs else None for one in info.siblings or []}
    return str(info.sha), dict(sorted(files.items()))
