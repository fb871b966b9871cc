"""The stages from raw text to one tokenised dataset and the order of its samples; each function declares one stage."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from snakmodel.chain.card_stage import data_card
from snakmodel.chain.collect_stage import collect
from snakmodel.chain.context import CORPUS, INDEX, Context, flags, shard_task, token_files
from snakmodel.chain.filter_stages import filter_stages, final_stages
from snakmodel.chain.stage import Input, Stage, Task
from snakmodel.run.paths import shard_name

_DEDUP = ("python", "-m", "snakmodel.dedup")
_EXPORT_TEXT = ("python", "-m", "snakmodel.export_text")
_PREPROCESS = ("python", "Megatron-LLM/tools/preprocess_data.py")
_MERGE_DATASETS = ("python", "Megatron-LLM/tools/merge_datasets.py")
_BUILD_INDEX = ("python", "Megatron-LLM/tools/build_index.py")


TEXT_EXPORT = ("export-text", "join-text")
"""The stages that the recipe can leave out."""


def text_stages(c: Context) -> list[Stage]:
    """The stages from raw text to deduplicated shards and the joined text files, in order.

    They need neither the base model nor the tokenizer.
    """
    return [
        *([collect(c)] if c.recipe.data.collect else []),
        prepare(c),
        *filter_stages(c),
        dedup_signatures(c),
        dedup_buckets(c),
        dedup_components(c),
        dedup_filter(c),
        dedup_report(c),
        *final_stages(c),
        *([export_text(c), join_text(c)] if c.recipe.text.export else []),
    ]


def token_stages(c: Context) -> list[Stage]:
    """The stages from deduplicated shards to the tokens and the order of samples, in order."""
    return [tokenize(c), merge_tokens(c), *([data_card(c)] if c.recipe.data_card else []), index(c)]


def prepare(c: Context) -> Stage:
    """Declare the stage that turns raw text into Arrow shards."""
    data, wanted = c.recipe.data, c.recipe.data.clean
    settings = flags(
        document=data.document,
        errors=data.errors,
        key=data.key if data.key != "text" else None,
        encoding=data.encoding if data.encoding != "utf-8" else None,
        trim=wanted.trim,
        nfc=wanted.nfc,
        min_characters=wanted.min_characters or None,
    )
    where = () if data.where is None else (f"--where={data.where}",)  # in one word: it may begin with a minus sign
    keep = () if data.keep is None else ("--keep", *map(str, c.kept))
    below = () if data.keep is None else flags(ids_below=data.path.absolute())

    def task(index: int) -> Task:
        prefix = f"arrow/{shard_name(index)}"
        argv = ("python", "-m", "snakmodel.prepare", "--shards", str(c.shards_file), "--shard", str(index))
        outside = [[*c.inputs.token(part), {**asdict(part), "file": None}] for part in c.shards[index]]
        task = shard_task(
            (*argv, "--output", c.path(prefix), *settings, *where, *keep), prefix, ".arrow", outside=outside
        )
        return replace(task, unkeyed=below)

    return c.stage("prepare", [task(i) for i in range(len(c.shards))], per_shard=True)


def dedup_signatures(c: Context) -> Stage:
    """Declare the stage that computes the band keys of each shard's documents."""
    d = c.recipe.dedup
    settings = flags(
        column="text",
        num_perm=d.num_perm,
        threshold=d.threshold,
        ngram=d.ngram,
        min_length=d.min_length,
        hash_func=d.hash_func,
        b=d.b,
        r=d.r,
        ranges=d.ranges,
        short_docs=d.short_docs,
        compat=d.compat,
    )

    def task(index: int) -> Task:
        name = shard_name(index)
        prefix = f"dedup/signatures/{name}"
        stage, folder = c.documents
        paths = flags(input=c.path(f"{folder}/{name}.arrow"), output=c.path(prefix))
        argv = (*_DEDUP, "signatures", *paths, *settings)
        return shard_task(argv, prefix, ".sig", inputs=(Input(stage, index),))

    return c.stage("dedup-signatures", [task(i) for i in range(len(c.shards))], per_shard=True)


def dedup_buckets(c: Context) -> Stage:
    """Declare the stage that links documents which share a key, with one task per range of the key space.

    If the recipe asks for it, links are verified against the texts.
    """
    verify = c.recipe.dedup.verify_jaccard
    stage, folder = c.documents
    sources = ("dedup-signatures", stage) if verify else ("dedup-signatures",)
    reads = tuple(Input(source, full=False) for source in sources)
    texts = flags(texts=c.path(folder)) if verify else ()

    def task(index: int) -> Task:
        output = f"dedup/buckets/range-{index:05d}"
        paths = flags(signatures=c.path("dedup/signatures"), shards=len(c.shards), range=index, output=c.path(output))
        argv = (*_DEDUP, "buckets", *paths, *texts)
        return Task(argv, (f"{output}.npy", f"{output}.json"), reads, f"{output}.json", **against(c))

    return c.stage("dedup-buckets", [task(i) for i in range(c.recipe.dedup.ranges)])


def dedup_components(c: Context) -> Stage:
    """Declare the stage that turns all links into clusters, and writes each shard's list of documents to remove."""
    paths = flags(
        signatures=c.path("dedup/signatures"),
        buckets=c.path("dedup/buckets"),
        shards=len(c.shards),
        ranges=c.recipe.dedup.ranges,
        output=c.path("dedup/components"),
        cluster_size=c.recipe.dedup.cluster_size,
    )
    reads = (Input("dedup-signatures", full=False), Input("dedup-buckets"))
    counts = "dedup/components/stats.json"
    task = Task((*_DEDUP, "components", *paths), ("dedup/components",), reads, counts, **against(c))
    return c.stage("dedup-components", [task])


def against(c: Context) -> dict[str, Any]:
    """What tells a task of the earlier runs: their folders, and for its key what stands for their signatures.

    A run that is moved changes no key, and one whose signatures change does.
    """
    if not c.earlier_runs:
        return {}
    words = ("--against", *(str(run.root) for run in c.earlier_runs))
    return {"unkeyed": words, "outside": {"against": [run.digest for run in c.earlier_runs]}}


def dedup_filter(c: Context) -> Stage:
    """Declare the stage that writes each shard without the documents on its removal list."""

    def task(index: int) -> Task:
        name = shard_name(index)
        prefix, removed = f"dedup/kept/{name}", f"dedup/components/removed/{name}.npy"
        stage, folder = c.documents
        sizes = f"dedup/components/sizes/{name}.npy" if c.recipe.dedup.cluster_size else None
        paths = flags(
            input=c.path(f"{folder}/{name}.arrow"),
            removed=c.path(removed),
            output=c.path(prefix),
            sizes=sizes and c.path(sizes),
        )
        lists = (removed, sizes) if sizes else (removed,)
        reads = (Input(stage, index), Input("dedup-components", only=lists))
        return shard_task((*_DEDUP, "filter", *paths), prefix, ".arrow", inputs=reads)

    return c.stage("dedup-filter", [task(i) for i in range(len(c.shards))], per_shard=True)


def dedup_report(c: Context) -> Stage:
    """Declare the stage that reports, as JSON and PNG, what was removed; no other stage waits for it."""
    output = "dedup/report"
    stage, folder = c.documents
    paths = flags(
        texts=c.path(folder), shards=len(c.shards), components=c.path("dedup/components"), output=c.path(output)
    )
    reads = (Input(stage, full=False), Input("dedup-components"))
    task = shard_task((*_DEDUP, "report", *paths), output, ".png", inputs=reads)
    return c.stage("dedup-report", [task])


def export_text(c: Context) -> Stage:
    """Declare the stage that writes each deduplicated shard as a .jsonl and a .txt file."""

    def task(index: int) -> Task:
        name = shard_name(index)
        prefix = f"text/shards/{name}"
        stage, folder = c.final
        paths = flags(input=c.path(f"{folder}/{name}.arrow"), output=c.path(prefix))
        argv = (*_EXPORT_TEXT, "shard", *paths)
        return shard_task(argv, prefix, ".jsonl", ".txt", inputs=(Input(stage, index),))

    return c.stage("export-text", [task(i) for i in range(len(c.shards))], per_shard=True)


def join_text(c: Context) -> Stage:
    """Declare the stage that joins the text files of all shards into one .jsonl and one .txt file."""
    paths = flags(input=c.path("text/shards"), shards=len(c.shards), output=c.path("text/corpus"))
    task = shard_task((*_EXPORT_TEXT, "join", *paths), "text/corpus", ".jsonl", ".txt", inputs=(Input("export-text"),))
    return c.stage("join-text", [task])


def tokenize(c: Context) -> Stage:
    """Declare the stage that tokenises each deduplicated shard."""
    workers = flags(workers=c.cluster.resources("tokenize").cpus)
    t = c.recipe.tokenizer
    keep = c.recipe.data.keep is not None
    settings = flags(no_new_tokens=True, append_eod=t.append_eod, prepend_bos=t.prepend_bos, keep_columns=keep)

    def task(index: int) -> Task:
        name = shard_name(index)
        prefix = f"tokens/shards/{name}_text_document"
        stage, folder = c.final
        paths = flags(input=c.path(f"{folder}/{name}.arrow"), output_prefix=c.path(f"tokens/shards/{name}"))
        argv = (*_PREPROCESS, *paths, *c.tokenizer_flags(), *settings)
        reads = (Input(stage, index),)
        return Task(argv, token_files(prefix, columns=keep), reads, f"{prefix}.json", workers, c.vocabulary)

    return c.stage("tokenize", [task(i) for i in range(len(c.shards))], per_shard=True)


def merge_tokens(c: Context) -> Stage:
    """Declare the stage that merges the tokens of all shards into one dataset."""
    paths = flags(input=c.path("tokens/shards"), output_prefix=c.path(CORPUS))
    outputs = token_files(CORPUS, columns=c.recipe.data.keep is not None)
    task = Task((*_MERGE_DATASETS, *paths), outputs, (Input("tokenize"),), f"{CORPUS}.json")
    return c.stage("merge-tokens", [task])


def index(c: Context) -> Stage:
    """Declare the stage that computes the order of the training samples, once for all ranks."""
    t = c.recipe.training
    settings = flags(
        split=t.split,
        seed=t.seed,
        seq_length=t.seq_length,
        train_iters=t.train_iters,
        global_batch_size=t.global_batch_size,
        eval_interval=t.eval_interval,
        eval_iters=t.eval_iters,
    )
    paths = flags(data_path=c.path(CORPUS), index_path=c.path(INDEX))
    task = Task((*_BUILD_INDEX, *paths, *settings), (INDEX,), (Input("merge-tokens"),))
    return c.stage("index", [task])
