"""One mistake each: wrong recipes and cluster.yaml files are refused when planning, with the key and what is valid."""

from __future__ import annotations

import ast
import contextlib
import io
import json
import re
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
import yaml

from run_contract.errors import UserError
from snakmodel.chain import engine_check
from snakmodel.chain.build import STAGES
from snakmodel.chain.plan import RunPlan, make_plan
from snakmodel.config import load as configuration
from snakmodel.config.sections import PROJECT
from snakmodel.launch.launcher import launch
from snakmodel.launch.local_scheduler import LocalScheduler
from snakmodel.monitor.diagnosis import diagnose
from snakmodel.monitor.run_files import RunFiles
from snakmodel.monitor.status import text
from tests.toy import DEMO_STAGES

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


@pytest.fixture(autouse=True)
def engine_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine answers in this process."""
    monkeypatch.setattr(engine_check, "_answer", answer)


@pytest.fixture
def desk(tmp_path: Path, demo_base: Path) -> Path:
    """A folder with text and a base model."""
    return furnish(tmp_path, demo_base)


def furnish(folder: Path, base: Path) -> Path:
    """Put text and a base model into a folder."""
    (folder / "text").mkdir()
    (folder / "text" / "a.txt").write_text("".join(f"Linje {i} om dagen.\n" for i in range(200)))
    shutil.copytree(base, folder / "base")
    return folder


def recipe(folder: Path) -> dict[str, Any]:
    """A recipe that is accepted."""
    found: dict[str, Any] = yaml.safe_load((PROJECT / "recipes" / "demo.yaml").read_text())
    found["data"] = {"path": str(folder / "text"), "shards": 2}
    found["model"]["base"] = str(folder / "base")
    found["tokenizer"]["file"] = str(folder / "base" / "tokenizer.model")
    return found


def plan(folder: Path, wrong: dict[str, Any] | None = None, cluster: dict[str, Any] | None = None) -> RunPlan:
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
    "an extra flag that there is a key for": (
        put("training.extra_flags", ["--lr=0.1"]),
        "training.extra_flags: --lr=0.1 is set by the chain itself",
    ),
    "an extra flag that the engine does not know": (
        put("training.extra_flags", ["--exit_intervall", "100"]),
        "train: .*exit_intervall",
    ),
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
    "no data folder": (put("data.path", "/nowhere/text"), r"data\.path: /nowhere/text is not there\. Give the folder"),
    "data that are a file": (put("data.path", "/etc/passwd"), r"data\.path: /etc/passwd is a file\. Give the folder"),
    "data in a variable that is not set": (put("data.path", "${NO_SUCH}"), r"data\.path: \$\{NO_SUCH\} is"),
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
    assert [stage.name for stage in found.chain.stages] == DEMO_STAGES
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
    "an option that breaks the chain": ({"slurm": {"sbatch_args": ["--arr=0-3"]}}, "found '--arr=0-3', but --array is"),
    "an option that has a key": ({"slurm": {"sbatch_args": ["--wckey=a"]}}, "'--wckey=a'; say it with the key wckey"),
    "an option for ranks that hides their claim": (
        {"slurm": {"srun_args": ["--export=NONE"]}}, "srun_args: found '--export=NONE', which keeps from the ranks"),
    "the end of a line in a name": (stage("train", partition="gpu\nx"), r"stages\.train\.partition: found 'gpu\\nx'"),
}  # fmt: skip


def spread(base: dict[str, int] | None = None, **training: Any) -> Change:
    """Other keys of `training`, and a base model of another geometry."""

    def change(wrong: dict[str, Any], folder: Path) -> None:
        wrong["training"] |= training
        if base:
            config = transformers.LlamaConfig(**{"num_hidden_layers": 1, "intermediate_size": 48, **base})
            transformers.LlamaForCausalLM(config).save_pretrained(folder / "base")

    return change


WRONG_LAYOUTS: dict[str, tuple[Change, int, str]] = {
    "ranks that tensor parallelism does not divide": (
        spread(tensor_parallel=2), 3, "stages.train has 3 ranks .*, not a multiple of the recipe's training.tensor"),
    "heads that do not divide": (
        spread(tensor_parallel=3, seq_length=126), 3, "--tensor_model_parallel_size 3 does not divide num_att"),
    "key and value heads that do not divide": (
        spread({"hidden_size": 48, "num_attention_heads": 12, "num_key_value_heads": 4}, tensor_parallel=6,
               seq_length=120), 6, "6 neither divides nor is a multiple of num_attention_heads_kv 4"),
    "a vocabulary that is too small": (
        spread({"hidden_size": 128, "num_attention_heads": 64, "vocab_size": 2000, "intermediate_size": 64},
               tensor_parallel=64), 64, "64 leaves a rank without any of the 2000 tokens"),
    "hidden states that data ranks do not divide": (
        spread(tensor_parallel=2, global_batch_size=12), 6, "is not a multiple of the 3 data-parallel ranks"),
    "layers that do not divide": (
        spread(pipeline_parallel=3), 3, "--pipeline_model_parallel_size 3 does not divide the model's"),
    "too few micro-batches for a pipeline": (
        spread(pipeline_parallel=2, global_batch_size=4), 2, "a pipeline of 2 stages needs at least 2"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", WRONG_CLUSTERS)
def test_a_wrong_cluster_is_refused(desk: Path, mistake: str) -> None:
    """The message names the key, what was found and what is valid; nothing is written."""
    cluster, words = WRONG_CLUSTERS[mistake]
    with pytest.raises(UserError, match=f"(?s){words}"):
        plan(desk, cluster=cluster)
    assert not (desk / "runs").exists()
    assert len(WRONG_CLUSTERS) >= 20


ENGINE = PROJECT / "Megatron-LLM" / "megatron_llm"
CHECKS = ("flags/checks.py", "parallel/layout_checks.py", "flags/parser.py")
"""Modules of the engine whose checks need no data."""
ELSEWHERE = {
    "must be at least 1": "the recipe's own keys are checked first: no iterations",
    "must not be negative": "the recipe's own keys are checked first",
    "must be above 0": "the recipe's own keys are checked first: a negative learning rate",
    "--keep_every says which": "the recipe's own keys are checked first: keep_every alone",
    "--lr_decay_style WSD and": "the recipe's own keys are checked first: WSD without its length",
    "--fp16 and --bf16 exclude": "training.dtype names one",
    "only 0.0 is supported": "the launcher writes 0.0",
    "only for --model_name falcon": "no key says it",
    "--use_rms_norm: --model_name falcon": "the launcher writes what the family has",
    "--glu_activation": "the launcher writes what the family has",
    "needs a checkpoint; give --load": "the launcher writes it",
    "_samples exclude each other": "no key says --lr_decay_samples and the like",
    "ranks are not a multiple of": "the launcher says it in the words of the recipe and cluster.yaml",
    "--seq_length is missing": "training.seq_length is needed",
    "give either --train_iters or --train_samples": "training.train_iters is needed, and no key says --train_samples",
}
"""Part of a message of the engine -> why no recipe and no cluster.yaml can bring it about."""
FLAG = re.compile(r"--([a-z_]+)")


def written_flags(found: RunPlan) -> set[str]:
    """The flags with which a plan starts the training."""
    argv = found.chain["train"].tasks[0].argv
    return {word.removeprefix("--").partition("=")[0] for word in argv if word.startswith("--")}


def refusals(module: str) -> list[str]:
    """A pattern for each message with which a module of the engine raises UserError."""
    raised = [node.exc for node in ast.walk(ast.parse((ENGINE / module).read_text())) if isinstance(node, ast.Raise)]
    messages = [call.args[0] for call in raised if isinstance(call, ast.Call) and ast.unparse(call.func) == "UserError"]
    return [_pattern(message) for message in messages]


def _pattern(message: ast.expr) -> str:
    parts = message.values if isinstance(message, ast.JoinedStr) else [message]
    literal = (part.value if isinstance(part, ast.Constant) else None for part in parts)
    return "".join(".*" if text is None else re.escape(str(text)) for text in literal)


@pytest.mark.parametrize("mistake", WRONG_LAYOUTS)
def test_a_layout_that_does_not_fit_is_refused(desk: Path, mistake: str) -> None:
    """A recipe and a cluster.yaml that do not go together; nothing is written."""
    change, ranks, words = WRONG_LAYOUTS[mistake]
    wrong = recipe(desk)
    change(wrong, desk)
    with pytest.raises(UserError, match=f"(?s){words}"):
        plan(desk, wrong, stage("train", ranks_per_node=ranks))
    assert not (desk / "runs").exists()


def test_every_check_of_the_engine_refuses_a_recipe(tmp_path: Path, demo_base: Path) -> None:
    """Each check of the engine that needs no data is met by one of the mistakes above, when planning.

    Left out are flags that no recipe writes, and ELSEWHERE.
    """
    mistakes: list[tuple[Change, dict[str, Any] | None]] = [(change, None) for change, _ in WRONG_RECIPES.values()]
    mistakes += [(lambda wrong, folder: None, cluster) for cluster, _ in WRONG_CLUSTERS.values()]
    mistakes += [(change, stage("train", ranks_per_node=ranks)) for change, ranks, _ in WRONG_LAYOUTS.values()]
    said = []
    for number, (change, cluster) in enumerate(mistakes):
        (tmp_path / str(number)).mkdir()
        folder = furnish(tmp_path / str(number), demo_base)
        wrong = recipe(folder)
        change(wrong, folder)
        with pytest.raises(UserError) as refused:
            plan(folder, wrong, cluster)
        said.append(str(refused.value))
    (tmp_path / "sound").mkdir()
    folder = furnish(tmp_path / "sound", demo_base)
    full = recipe(folder)
    full["training"] |= {"lr_decay_style": "WSD", "lr_wsd_decay_iters": 5, "keep_last": 2, "keep_every": 10}
    full["training"] |= {"recompute_granularity": "full", "skip_spikes": 6, "wandb_project": "x"}
    flags, used, unmet = written_flags(plan(folder, full)), set(), []
    for message in (pattern for module in CHECKS for pattern in refusals(module)):
        if any(re.search(message, one) for one in said):
            continue
        plain = message.replace("\\", "")
        if reason := next((words for words in ELSEWHERE if words in plain), None):
            used.add(reason)
        elif not set(FLAG.findall(plain)) - flags:
            unmet.append(plain)
    assert not unmet, "\n".join(unmet)
    assert used == set(ELSEWHERE)


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


def test_a_launch_says_what_the_training_comes_to(
    desk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A dry run, a start and the status tell tokens, epochs and disk, and warn of a corpus that is read too often."""
    monkeypatch.setattr(LocalScheduler, "run", lambda self: 0)
    (desk / "recipe.yaml").write_text(yaml.safe_dump(recipe(desk)))
    where = {"runs": str(desk / "runs"), "logs": str(desk / "logs"), "scheduler": "local"}
    (desk / "cluster.yaml").write_text(yaml.safe_dump(where))
    files = ["--recipe", str(desk / "recipe.yaml"), "--cluster", str(desk / "cluster.yaml")]
    shown = []
    for flags in (["--dry-run"], []):
        assert launch("", argv=[*files, *flags]) == 0
        shown.append(capsys.readouterr().out)
    shown.append(text(diagnose(RunFiles.read(desk / "runs" / "demo"))))
    for words in shown:
        assert "\ntraining: 160 iterations of 16 samples of 128 tokens, 327,680 tokens\n" in words
        assert "\nepochs: " in words
        assert "\nwarning: the corpus would be repeated " in words
        assert re.search(r"^disk: .* of it for checkpoints$", words, re.MULTILINE)


@pytest.mark.parametrize(
    ("stages", "flags"),
    [(STAGES[: STAGES.index("tokenize")], []), (STAGES, ["--only", "prepare", "dedup-signatures"])],
)
def test_a_launcher_of_the_first_stages_needs_no_base_model(desk: Path, stages: list[str], flags: list[str]) -> None:
    """As jobs/preprocess.py, and `--only` with early stages, which plan without base model and tokenizer."""
    early = recipe(desk)
    early["model"]["base"], early["tokenizer"]["file"] = "/nowhere/base", "/nowhere/tokenizer.model"
    (desk / "recipe.yaml").write_text(yaml.safe_dump(early))
    where = {"runs": str(desk / "runs"), "logs": str(desk / "logs"), "scheduler": "local"}
    (desk / "cluster.yaml").write_text(yaml.safe_dump(where))
    files = ["--recipe", str(desk / "recipe.yaml"), "--cluster", str(desk / "cluster.yaml")]
    assert launch("", stages, [*files, *flags, "--dry-run"]) == 0
    with pytest.raises(UserError, match=r"tokenizer\.file: there is no file /nowhere"):
        launch("", argv=[*files, "--dry-run"])


@pytest.mark.parametrize("until", ["join-text", "merge-tokens"])
def test_a_stage_asks_only_for_what_it_uses(desk: Path, until: str) -> None:
    """Text is prepared without tokenizer and base model, and tokenised without a base model; run.yaml grows later."""
    early = recipe(desk)
    early["model"]["base"] = "${NO_SUCH_VARIABLE}"
    if until == "join-text":
        early["tokenizer"]["file"] = "/nowhere/tokenizer.model"
    (desk / "recipe.yaml").write_text(yaml.safe_dump(early))
    (desk / "cluster.yaml").write_text("{}")
    selected = DEMO_STAGES[: DEMO_STAGES.index(until) + 1]
    config = configuration.load(desk / "recipe.yaml", desk / "cluster.yaml", STAGES)
    first = make_plan(config, desk / "run", selected, [], dry=False)
    assert set(first.missing) == set(selected)
    assert "train" not in first.chain.keys
    with pytest.raises(UserError, match=r"is not set in the environment|there is no file"):
        make_plan(config, desk / "run", STAGES, [], dry=True)
    (desk / "recipe.yaml").write_text(yaml.safe_dump(recipe(desk)))
    config = configuration.load(desk / "recipe.yaml", desk / "cluster.yaml", STAGES)
    whole = make_plan(config, desk / "run", STAGES, [], dry=False)
    assert [stage.name for stage in whole.chain.stages] == DEMO_STAGES
    assert all(whole.chain.keys[name] == first.chain.keys[name] for name in selected)
    make_plan(config, desk / "run", selected, [], dry=False)
    keys = yaml.safe_load((desk / "run" / "run.yaml").read_text())["stage_keys"]
    assert set(keys) == set(DEMO_STAGES)
