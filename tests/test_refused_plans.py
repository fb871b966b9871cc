"""One mistake each: wrong recipes and cluster.yaml files are refused when planning, with the key and what is valid."""

from __future__ import annotations

import contextlib
import io
import json
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from snakmodel import config as configuration
from snakmodel import engine_check
from snakmodel.chain import STAGES
from snakmodel.launch import launch
from snakmodel.plan import Plan, make_plan
from snakmodel.publish import UserError
from snakmodel.settings import PROJECT

Change = Callable[[dict[str, Any], Path], None]
"""Makes one mistake in a recipe whose base model is in the folder."""


def answer(request: str) -> dict[str, Any]:
    """The engine's answer from its own command, run in this process: torch is imported only once."""
    said, script = io.StringIO(), PROJECT / engine_check._COMMAND
    before = sys.argv, sys.stdin
    sys.argv, sys.stdin = [str(script)], io.StringIO(request)
    try:
        with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
            runpy.run_path(str(script), run_name="__main__")
    finally:
        sys.argv, sys.stdin = before
    found: dict[str, Any] = json.loads(said.getvalue())
    return found


@pytest.fixture
def desk(tmp_path: Path, demo_base: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with text and a base model; the engine answers in this process."""
    monkeypatch.setattr(engine_check, "_answer", answer)
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("".join(f"Linje {i} om dagen.\n" for i in range(200)))
    shutil.copytree(demo_base, tmp_path / "base")
    return tmp_path


def recipe(folder: Path) -> dict[str, Any]:
    """A recipe that is accepted."""
    found: dict[str, Any] = yaml.safe_load((PROJECT / "recipes" / "demo.yaml").read_text())
    found["data"] = {"path": str(folder / "text"), "shards": 2}
    found["model"]["base"] = str(folder / "base")
    found["tokenizer"]["file"] = str(folder / "base" / "tokenizer.model")
    return found


def plan(folder: Path, wrong: dict[str, Any] | None = None, cluster: dict[str, Any] | None = None) -> Plan:
    """What a dry run does with both files."""
    (folder / "recipe.yaml").write_text(yaml.safe_dump(wrong or recipe(folder)))
    (folder / "cluster.yaml").write_text(yaml.safe_dump({"runs": str(folder / "runs"), **(cluster or {})}))
    config = configuration.load(folder / "recipe.yaml", folder / "cluster.yaml", STAGES)
    return make_plan(config, folder / "runs" / "demo", STAGES, [], dry=True)


def put(keys: str, value: Any) -> Change:
    """Set the key a.b.c."""

    def change(wrong: dict[str, Any], folder: Path) -> None:
        *sections, last = keys.split(".")
        for name in sections:
            wrong = wrong.setdefault(name, {})
        wrong[last] = value

    return change


def without(keys: str) -> Change:
    """Leave out the key a.b."""

    def change(wrong: dict[str, Any], folder: Path) -> None:
        section, _, last = keys.rpartition(".")
        del (wrong[section] if section else wrong)[last]

    return change


def base_config(**changes: Any) -> Change:
    """Another config.json of the base model."""

    def change(wrong: dict[str, Any], folder: Path) -> None:
        path = folder / "base" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def base_file(name: str, content: bytes | None = b"x") -> Change:
    """The weights of the base model are this file instead; None: there are none."""

    def change(wrong: dict[str, Any], folder: Path) -> None:
        (folder / "base" / "model.safetensors").unlink()
        if content is not None:
            (folder / "base" / name).write_bytes(content)

    return change


def no_text(name: str) -> Change:
    """The text folder holds nothing but this file."""

    def change(wrong: dict[str, Any], folder: Path) -> None:
        (folder / "text" / "a.txt").unlink()
        (folder / "text" / name).write_text("x")

    return change


WRONG_RECIPES: dict[str, tuple[Change, str]] = {
    # the recipe's own keys
    "a mistyped key": (put("training.train_itres", 5), r"training\.train_itres: unknown key\. Did you mean train"),
    "a mistyped section": (put("trainning", {}), r"trainning: unknown key\. Did you mean training"),
    "a missing key": (without("training.lr"), r"training\.lr: missing\. Add this key"),
    "a missing section": (without("data"), r"data: missing"),
    "a word for a number": (put("training.lr", "fast"), r"training\.lr: found 'fast'"),
    "no iterations": (put("training.train_iters", 0), r"training\.train_iters: found 0"),
    "a negative learning rate": (put("training.lr", -1), r"training\.lr: found -1"),
    "an unknown schedule": (put("training.lr_decay_style", "wave"), r"training\.lr_decay_style: found 'wave'.*cosine"),
    "WSD without its length": (put("training.lr_decay_style", "WSD"), "the length of its decay belong together"),
    "an unknown dtype": (put("training.dtype", "int8"), r"training\.dtype: found 'int8'.*'bf16'"),
    "a long warm-up": (put("training.lr_warmup_iters", 500), r"lr_warmup_iters is 500 but training\.train_iters is"),
    "masks without EOD": (
        lambda wrong, folder: wrong.update(
            tokenizer={**wrong["tokenizer"], "append_eod": False},
            training={**wrong["training"], "eod_mask_loss": True},
        ),
        "nothing marks the end of a document",
    ),
    "an export that is never saved": (put("export.iterations", [7]), r"export\.iterations: 7 is never saved"),
    "an export that may be deleted": (
        lambda wrong, folder: wrong.update(
            export={"iterations": [80, 160]}, training={**wrong["training"], "keep_last": 1}
        ),
        r"export\.iterations: 80 may be deleted before it is exported",
    ),
    "keep_every alone": (put("training.keep_every", 10), "keep_every is 10 but keep_last is missing"),
    "a repository without a licence": (put("push.repository", "a/b"), r"push\.license is missing"),
    "an unknown family": (put("model.family", "qwen"), r"model\.family: found 'qwen'.*'llama2'"),
    "a threshold above 1": (put("dedup.threshold", 1.5), r"dedup\.threshold: found 1\.5"),
    "bands without rows": (put("dedup.b", 4), "b and r: give both"),
    "too many bands": (put("dedup", {"b": 40, "r": 40}), "need num_perm of 1600 or more"),
    "a hash that the version lacks": (
        put("dedup", {"compat": "text-dedup-0.3.1", "hash_func": "xxh3"}), r"text-dedup 0\.3\.1 has sha1 only"),
    "a share above 1": (put("data.sources", [{"text": 2}]), "expected a share above 0 and up to 1"),
    "a source twice": (put("data.sources", ["text", "text"]), "'text' is there 2 times"),
    "an unknown source": (put("data.sources", ["tekst"]), "tekst"),
    "a name with a slash": (put("name", "a/b"), "name: found 'a/b'"),
    # what the recipe names
    "no data folder": (put("data.path", "/nowhere/text"), "/nowhere/text"),
    "only documents of Word": (no_text("brev.docx"), r"it holds brev\.docx\. Give a folder of text"),
    "no tokenizer": (put("tokenizer.file", "/nowhere/tokenizer.model"), r"tokenizer\.file: there is no file /nowhere"),
    "a tokenizer that is none": (
        lambda wrong, folder: (folder / "base" / "tokenizer.model").write_bytes(b"x") and None,
        r"tokenizer\.file: .* is not a SentencePiece model",
    ),
    "a variable that is not set": (put("model.base", "${NO_SUCH_VARIABLE}"), r"model\.base: \$\{NO_SUCH_VARIABLE\} is"),
    "no base model": (put("model.base", "/nowhere/base"), r"model\.base: /nowhere/base is not a Hugging Face model"),
    # what the engine would refuse
    "an architecture that is not there": (base_config(architectures=["Qwen2ForCausalLM"]), "Qwen2ForCausalLM is not"),
    "another one": (base_config(architectures=["GemmaForCausalLM"]), "GemmaForCausalLM is not supported"),
    "quantised weights": (base_config(quantization_config={"bits": 4}), "quantization_config = "),
    "weights of another shape": (base_config(intermediate_size=100), "its configuration says"),
    "a GGUF file": (base_file("model.gguf"), "model.gguf is a GGUF file"),
    "a .pth file": (base_file("model.pth"), "model.pth is a PyTorch file in another layout"),
    "an adapter": (base_file("adapter_model.safetensors"), "part of an adapter"),
    "no weights": (base_file("", None), "holds no weights; expected model.safetensors"),
    "a size that is another": (put("model.size", 7), "--size=7 but the model has 0.001 billion parameters"),
    "a micro-batch that does not divide": (
        put("training.micro_batch_size", 3), "--global_batch_size 16 is not a multiple of 3"),
    "a lowest rate above the highest": (put("training.min_lr", 1.0), r"--min_lr 1\.0 and --lr 0\.003"),
    "a sequence that is too long": (put("training.seq_length", 1024), "--seq_length 1024 is more than the model's max"),
    "a split that is none": (put("training.split", "most"), "--split most: give one to three proportions"),
    "a seed that is too large": (put("training.seed", 2**40), "--seed .*: must be from 0"),
    "a size of files that is none": (put("push.max_shard_size", "big"), "shard size 'big' is not a size"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", WRONG_RECIPES)
def test_a_wrong_recipe_is_refused(desk: Path, mistake: str) -> None:
    """The message names the key or file, what was found and what is valid; nothing is written."""
    change, words = WRONG_RECIPES[mistake]
    wrong = recipe(desk)
    change(wrong, desk)
    with pytest.raises(UserError, match=f"(?s){words}"):
        plan(desk, wrong)
    assert not (desk / "runs").exists()


def test_the_recipe_without_a_mistake(desk: Path) -> None:
    """The same recipe without a mistake is accepted, and the engine says how large the model is."""
    found = plan(desk)
    assert [stage.name for stage in found.chain.stages] == STAGES
    assert found.facts
    assert found.facts.parameters > 10**6
    assert len(WRONG_RECIPES) >= 40


def stage(name: str, **keys: Any) -> dict[str, Any]:
    """A cluster.yaml with a stage of these keys."""
    return {"stages": {name: keys}}


WRONG_CLUSTERS: dict[str, tuple[dict[str, Any], str]] = {
    "a mistyped key": ({"shedulers": "slurm"}, "shedulers: unknown key. Did you mean scheduler"),
    "an unknown scheduler": ({"scheduler": "pbs"}, "scheduler: found 'pbs'.*'slurm'"),
    "an unknown stage": (stage("tokenise"), r"stages\.tokenise: there is no such stage. Did you mean tokenize"),
    "a mistyped key of a stage": (stage("train", node=2), r"stages\.train\.node: unknown key. Did you mean nodes"),
    "no nodes": (stage("train", nodes=0), r"stages\.train\.nodes: found 0"),
    "a word for a number": (stage("train", cpus="all"), r"stages\.train\.cpus: found 'all'"),
    "no memory": (stage("train", mem_gb=0), r"stages\.train\.mem_gb: found 0"),
    "a time limit that is none": (stage("train", minutes="a day"), r"stages\.train\.minutes: found 'a day'"),
    "a time limit of 0": (stage("train", minutes=0), r"stages\.train\.minutes: found 0"),
    "a time limit that is too short": (
        stage("train", minutes=2, ranks_per_node=2), r"stages\.train\.minutes: 2 is too short"),
    "GPUs twice": (stage("train", gpus_per_node=4, gres="gpu:4"), "ask for GPUs in one way"),
    "ranks that do not divide the batch": (stage("train", ranks_per_node=3), "--global_batch_size 16 is not a mult"),
    "a container without an image": ({"container": {"runtime": "apptainer"}}, "container.image is missing"),
    "an unknown runtime": ({"container": {"runtime": "podman"}}, "container.runtime: found 'podman'.*'docker'"),
    "a bind that is none": (
        {"container": {"runtime": "docker", "image": "a", "binds": ["data"]}}, "container.binds: found 'data'"),
    "an unknown kind of mail": ({"slurm": {"mail_type": "ALLWAYS"}}, "slurm.mail_type: found 'ALLWAYS'. Did you mean"),
    "no tasks at once": ({"slurm": {"array_parallelism": 0}}, "slurm.array_parallelism: found 0"),
    "no notice": ({"slurm": {"signal_seconds": 0}}, "slurm.signal_seconds: found 0"),
    "setup that is no list": ({"slurm": {"setup": "module load x"}}, "slurm.setup: found 'module load x'"),
    "no attempts": ({"retries": {"without_progress": 0}}, "retries.without_progress: found 0"),
    "no cores": ({"local": {"cpus": 0}}, "local.cpus: found 0"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", WRONG_CLUSTERS)
def test_a_wrong_cluster_is_refused(desk: Path, mistake: str) -> None:
    """The message names the key, what was found and what is valid; nothing is written."""
    cluster, words = WRONG_CLUSTERS[mistake]
    with pytest.raises(UserError, match=f"(?s){words}"):
        plan(desk, cluster=cluster)
    assert not (desk / "runs").exists()
    assert len(WRONG_CLUSTERS) >= 20


def test_a_failed_launch_leaves_no_folder(desk: Path) -> None:
    """Neither the run's folder nor that of its logs stays where planning failed, dry run or not."""
    wrong = recipe(desk)
    wrong["training"]["micro_batch_size"] = 3
    (desk / "recipe.yaml").write_text(yaml.safe_dump(wrong))
    where = {"runs": str(desk / "runs"), "logs": str(desk / "logs"), "scheduler": "local"}
    (desk / "cluster.yaml").write_text(yaml.safe_dump(where))
    for flags in (["--dry-run"], []):
        files = ["--recipe", str(desk / "recipe.yaml"), "--cluster", str(desk / "cluster.yaml")]
        with pytest.raises(UserError, match="the engine would refuse this run:\n  train: --global_batch_size 16"):
            launch("", argv=[*files, *flags])
        assert not (desk / "runs" / "demo").exists()
        assert not (desk / "logs" / "demo").exists()


@pytest.mark.parametrize("until", ["join-text", "merge-tokens"])
def test_a_stage_asks_only_for_what_it_uses(desk: Path, until: str) -> None:
    """Text is prepared without tokenizer and base model, and tokenised without a base model; run.yaml grows later."""
    early = recipe(desk)
    early["model"]["base"] = "${NO_SUCH_VARIABLE}"
    if until == "join-text":
        early["tokenizer"]["file"] = "/nowhere/tokenizer.model"
    (desk / "recipe.yaml").write_text(yaml.safe_dump(early))
    (desk / "cluster.yaml").write_text("{}")
    selected = STAGES[: STAGES.index(until) + 1]
    config = configuration.load(desk / "recipe.yaml", desk / "cluster.yaml", STAGES)
    first = make_plan(config, desk / "run", selected, [], dry=False)
    assert set(first.missing) == set(selected)
    assert "train" not in first.chain.keys
    with pytest.raises(UserError, match=r"is not set in the environment|there is no file"):
        make_plan(config, desk / "run", STAGES, [], dry=True)
    (desk / "recipe.yaml").write_text(yaml.safe_dump(recipe(desk)))
    config = configuration.load(desk / "recipe.yaml", desk / "cluster.yaml", STAGES)
    whole = make_plan(config, desk / "run", STAGES, [], dry=False)
    assert [stage.name for stage in whole.chain.stages] == STAGES
    assert all(whole.chain.keys[name] == first.chain.keys[name] for name in selected)
    make_plan(config, desk / "run", selected, [], dry=False)
    keys = yaml.safe_load((desk / "run" / "run.yaml").read_text())["stage_keys"]
    assert set(keys) == set(STAGES)
