"""The flags of finetune.py: upstream Megatron-LLM's spelling and defaults, parsed into frozen sections.

Each field of a section is a flag of the same name; its type, default and help are declared once, here. What computes
with flags takes the sections that it needs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch

from megatron_llm.data.gpt_dataset import DataPaths

DERIVED = ("seq_length", "train_iters")
"""Fields without a default that need not be given: the checkpoint's, and what --train_samples comes to."""


@dataclass(frozen=True, kw_only=True)
class CheckpointFlags:
    """The flags on checkpoints: what a run starts from, what it saves, and what it keeps."""

    load: Annotated[Path | None, "checkpoint folder or Hugging Face model to start from; without it random weights"] = (
        None
    )
    load_iters: Annotated[int | None, "iteration of --load; default: the one its tracker file names"] = None
    save: Annotated[Path, "folder for checkpoints and metrics; a run found there is continued"]
    save_interval: Annotated[int | None, "iterations between checkpoints; default: only at the end or when stopped"] = (
        None
    )
    keep_last: Annotated[int | None, "of the checkpoints in --save keep so many, the newest; default: all"] = None
    keep_every: Annotated[int | None, "beside --keep_last: keep those of iterations divisible by this for ever"] = None
    no_async_save: Annotated[bool, "stand still until a checkpoint is written; saves its copy in the host's memory"] = (
        False
    )
    finetune: Annotated[bool, "take only the weights of --load and begin at iteration 0"] = False
    no_load_optim: Annotated[
        bool,
        "of a training checkpoint in --load do not take Adam's moments, nor how far the learning rate is: it warms up "
        "again; a run found in --save is always continued whole, but for what --no_save_optim left out",
    ] = False
    no_load_rng: Annotated[
        bool,
        "of a training checkpoint in --load do not take the random state but begin with --seed's; a run found in "
        "--save is always continued whole, but for what --no_save_rng left out",
    ] = False
    no_save_optim: Annotated[bool, "checkpoints without Adam's moments and the schedule; see --no_load_optim"] = False
    no_save_rng: Annotated[bool, "checkpoints without the random state; see --no_load_rng"] = False
    use_checkpoint_args: Annotated[
        bool,
        "take the model's geometry, and without --seq_length the length of samples, from the checkpoint; model flags "
        "that are given must agree with it",
    ] = False
    override_model_args: Annotated[
        bool,
        "model flags that are given and that no weight's shape depends on (rope_theta, …) replace the checkpoint's",
    ] = False
    use_checkpoint_opt_param_scheduler: Annotated[bool, "when continuing, keep the checkpoint's schedule"] = False
    override_opt_param_scheduler: Annotated[bool, "when continuing, take the schedule of these flags"] = False


@dataclass(frozen=True, kw_only=True)
class ModelFlags:
    """The flags that describe the model, and how its layers are computed."""

    model_name: Annotated[
        Literal["llama", "llama2", "llama3", "codellama", "mistral", "falcon"],
        "architecture; the Llamas and Mistral differ only in other flags",
    ] = "llama2"
    num_layers: Annotated[int | None, "transformer layers"] = None
    hidden_size: Annotated[int | None, "width of the residual stream"] = None
    ffn_hidden_size: Annotated[int | None, "width of the MLP"] = None
    num_attention_heads: Annotated[int | None, "query heads"] = None
    num_attention_heads_kv: Annotated[int | None, "key/value heads; default: as many as query heads"] = None
    kv_channels: Annotated[int | None, "size of a head; default: hidden_size / num_attention_heads"] = None
    max_position_embeddings: Annotated[int | None, "longest sequence the model is made for"] = None
    seq_length: Annotated[int, "tokens of a training sample; with --use_checkpoint_args by default the checkpoint's"]
    layernorm_epsilon: Annotated[float, "added to the variance in norms"] = 1e-05
    rope_theta: Annotated[float, "base of the rotary frequencies"] = 10000.0
    rope_scaling_factor: Annotated[float, "position interpolation"] = 1.0
    rope_scaling_type: Annotated[Literal["linear", "llama3"], "which rotary frequencies it divides"] = "linear"
    rope_low_freq_factor: Annotated[float, "llama3: original positions / this: waves above are scaled in full"] = 1.0
    rope_high_freq_factor: Annotated[float, "llama3: original positions / this: waves below are kept"] = 4.0
    rope_original_max_positions: Annotated[int, "llama3: positions before the interpolation"] = 8192
    sliding_window_size: Annotated[int | None, "positions that a position sees; default: all before it"] = None
    position_embedding_type: Annotated[Literal["rotary"], "kind of position embedding"] = "rotary"
    glu_activation: Annotated[Literal["swiglu"], "gate of the MLP; falcon has none"] = "swiglu"
    use_rms_norm: Annotated[bool, "RMSNorm, which all but falcon have"] = False
    parallel_attn: Annotated[bool, "falcon: attention and MLP side by side, which it always has"] = False
    parallel_layernorm: Annotated[bool, "falcon: a norm for each of the two, as in the 40B"] = False
    no_tie_embed_logits: Annotated[bool, "an output layer of its own instead of the embedding's weight"] = False
    init_method_std: Annotated[float, "standard deviation of random weights"] = 0.02
    hidden_dropout: Annotated[float, "only 0.0"] = 0.0
    attention_dropout: Annotated[float, "only 0.0"] = 0.0
    recompute_granularity: Annotated[
        Literal["none", "full", "selective"] | None,
        "compute again in the backward pass: whole layers (full) or attention and MLP activation (selective)",
    ] = None
    recompute_activations: Annotated[bool, "the same as --recompute_granularity selective"] = False
    recompute_method: Annotated[
        Literal["uniform", "block"] | None,
        "which layers --recompute_granularity full computes again: all, in groups of --recompute_num_layers (uniform), "
        "or the first --recompute_num_layers of each pipeline stage (block); default: all, one by one",
    ] = None
    recompute_num_layers: Annotated[int, "see --recompute_method"] = 1
    torch_compile: Annotated[bool, "compile the layers: slower to begin, faster afterwards"] = False


@dataclass(frozen=True, kw_only=True)
class ParallelFlags:
    """The flags on how ranks share the model and the batches."""

    tensor_model_parallel_size: Annotated[int, "ranks that share each layer's matrices"] = 1
    sequence_parallel: Annotated[bool, "between these matrices each tensor rank holds its part of the sequence"] = False
    pipeline_model_parallel_size: Annotated[int, "ranks that hold different layers; the rest is data parallel"] = 1
    num_layers_per_virtual_pipeline_stage: Annotated[
        int | None, "interleaved pipeline: layers of one of the several stages of a rank"
    ] = None
    distributed_timeout_minutes: Annotated[
        float, "a rank that waits longer than this for the others within a step, evaluation or checkpoint fails"
    ] = 10.0


@dataclass(frozen=True, kw_only=True)
class PrecisionFlags:
    """The flags on number formats, on loss scaling with fp16, and on the threads that add numbers up."""

    bf16: Annotated[bool, "compute in bfloat16, with fp32 master weights and reductions"] = False
    fp16: Annotated[bool, "compute in float16 with loss scaling, with fp32 master weights and reductions"] = False
    loss_scale: Annotated[float | None, "fp16: a constant scale; default: one that adapts itself"] = None
    initial_loss_scale: Annotated[float, "fp16: the scale at the beginning"] = 2.0**32
    min_loss_scale: Annotated[float, "fp16: the scale never becomes smaller"] = 1.0
    loss_scale_window: Annotated[float, "fp16: updates without overflow after which the scale is doubled"] = 1000.0
    hysteresis: Annotated[int, "fp16: overflows after which each one halves the scale"] = 2
    threads: Annotated[int, "CPU threads of each rank; results depend on it in the last bits"] = 1

    def compute_dtype(self) -> torch.dtype:
        """The data type of activations and of the weights that make them."""
        return torch.bfloat16 if self.bf16 else torch.float16 if self.fp16 else torch.float32


@dataclass(frozen=True, kw_only=True)
class DataFlags:
    """The flags on the documents, their tokenizer, and how documents in one sample are separated."""

    data_path: Annotated[list[str] | None, "one prefix of .bin and .idx, or: weight prefix weight prefix …"] = None
    train_data_path: Annotated[list[str] | None, "training data of its own, in the form of --data_path"] = None
    valid_data_path: Annotated[list[str] | None, "validation data, beside --train_data_path"] = None
    test_data_path: Annotated[list[str] | None, "test data, beside --train_data_path"] = None
    index_path: Annotated[
        Path | None,
        "folder of the sample indices that tools/build_index.py wrote; default: PREFIX.index if it is there, "
        "else every rank builds them in memory",
    ] = None
    split: Annotated[str, "proportions of documents for training, validation and test"] = "969,30,1"
    tokenizer_type: Annotated[Literal["SentencePieceTokenizer", "HuggingFaceTokenizer"], "kind of tokenizer"] = (
        "SentencePieceTokenizer"
    )
    vocab_file: Annotated[Path | None, "tokenizer.model or tokenizer.json; checked against the data and the model"] = (
        None
    )
    no_new_tokens: Annotated[bool, "add no special tokens to the vocabulary"] = False
    vocab_extra_ids: Annotated[int, "so many tokens <extra_id_0>, <extra_id_1>, … added to the vocabulary"] = 0
    vocab_extra_ids_list: Annotated[str | None, "comma-separated tokens added to the vocabulary"] = None
    reset_position_ids: Annotated[bool, "positions begin again after each EOD"] = False
    reset_attention_mask: Annotated[bool, "attention does not reach over an EOD to the documents before"] = False
    eod_mask_loss: Annotated[bool, "what comes after an EOD is not counted in the loss"] = False
    loss_normalisation: Annotated[
        Literal["global", "micro"] | None,
        "with --eod_mask_loss, what the mean is taken over: the counted tokens of the global batch, or first those of "
        "each micro-batch, as upstream does; default: global, or what a continued run began with",
    ] = None
    num_workers: Annotated[int, "data-loading processes of each rank"] = 2

    def paths(self) -> DataPaths:
        """Where the documents of train, valid and test come from. Raises UserError."""
        return DataPaths.of(
            self.data_path, (self.train_data_path, self.valid_data_path, self.test_data_path), self.split
        )


@dataclass(frozen=True, kw_only=True)
class TrainingFlags:
    """The flags on batches, on the length of the run, and on updates that are left out."""

    micro_batch_size: Annotated[int, "samples a rank computes at once"]
    global_batch_size: Annotated[int | None, "samples of an update; default: one micro-batch a rank"] = None
    rampup_batch_size: Annotated[
        list[int] | None,
        "START INCREMENT SAMPLES: the first updates take START samples, and over the first SAMPLES samples this grows "
        "in steps of INCREMENT to --global_batch_size; needs --train_samples",
    ] = None
    train_iters: Annotated[int, "updates of the whole run, over all its restarts"]
    train_samples: Annotated[int | None, "the same in samples; needs --global_batch_size"] = None
    skip_iters: Annotated[list[int] | None, "iterations, as the log numbers them, whose samples are not trained on"] = (
        None
    )
    skip_spikes: Annotated[
        float | None,
        "make no update from a loss or gradient norm more than so many standard deviations above the mean of the last "
        "updates; after 10 in a row the run fails. OLMo uses 6; default: never",
    ] = None
    spike_window: Annotated[int, "how many updates --skip_spikes compares with; it begins with half of them"] = 128
    exit_interval: Annotated[int | None, "save and exit 75 after an iteration divisible by this"] = None
    exit_duration_in_mins: Annotated[float | None, "save and exit 75 after the iteration that ends later than this"] = (
        None
    )
    seed: Annotated[int, "decides the sample order and random weights"] = 1234


@dataclass(frozen=True, kw_only=True)
class LoggingFlags:
    """The flags on what a run reports, and where."""

    log_interval: Annotated[int, "iterations between log lines"] = 100
    log_samples: Annotated[bool, "record which samples each iteration took, in SAVE/samples.jsonl"] = False
    log_params_norm: Annotated[bool, "log the L2 norm of all weights"] = False
    tensorboard_dir: Annotated[Path | None, "where TensorBoard files go; default: none"] = None
    log_timers_to_tensorboard: Annotated[bool, "seconds per iteration, and of waiting for data and checkpoints"] = False
    log_batch_size_to_tensorboard: Annotated[bool, "samples of an update"] = False
    log_memory_to_tensorboard: Annotated[bool, "bytes of memory allocated and reserved"] = False
    log_world_size_to_tensorboard: Annotated[bool, "number of ranks"] = False
    wandb_logger: Annotated[
        bool, "send the numbers to Weights & Biases too; the key comes from WANDB_API_KEY or `wandb login`"
    ] = False
    wandb_project: Annotated[str | None, "W&B project; default: WANDB_PROJECT's, or W&B's own"] = None
    wandb_entity: Annotated[str | None, "W&B team or user; default: the key's"] = None
    wandb_name: Annotated[str | None, "name that W&B shows for the run; default: one that W&B makes up"] = None
    wandb_id: Annotated[str | None, "id of the W&B run; default: the one noted in --save, or a new one"] = None
    peak_tflops: Annotated[
        float | None,
        "TFLOP/s that a rank's device could do at most, for MFU; default: known for common GPUs with --bf16 or --fp16",
    ] = None


@dataclass(frozen=True, kw_only=True)
class EvaluationFlags:
    """The flags on evaluations during the run."""

    eval_interval: Annotated[int, "iterations between evaluations"] = 1000
    eval_iters: Annotated[int, "global batches of an evaluation; 0: none"] = 100
    eval_only: Annotated[
        bool,
        "only evaluate --load, or else the newest checkpoint in --save, on the first validation samples of a run with "
        "these flags",
    ] = False
    metrics: Annotated[
        list[Literal["perplexity", "accuracy"]] | None,
        "what an evaluation says beside the loss: e to its power, and the share of tokens that are the likeliest",
    ] = None


@dataclass(frozen=True, kw_only=True)
class OptimizerFlags:
    """The flags on Adam, the learning rate and the weight decay."""

    lr: Annotated[float, "highest learning rate"]
    min_lr: Annotated[float, "learning rate at the end of the decay"] = 0.0
    lr_decay_style: Annotated[
        Literal["constant", "linear", "cosine", "inverse-square-root", "WSD"],
        "shape of the decay; WSD: none until the last --lr_wsd_decay_iters",
    ] = "linear"
    lr_decay_iters: Annotated[int | None, "iterations until min_lr; default: train_iters"] = None
    lr_decay_samples: Annotated[int | None, "the same in samples"] = None
    lr_wsd_decay_style: Annotated[
        Literal["exponential", "linear", "cosine", "minus_sqrt"], "WSD: shape of the decay at the end"
    ] = "exponential"
    lr_wsd_decay_iters: Annotated[int | None, "WSD: iterations of the decay at the end"] = None
    lr_wsd_decay_samples: Annotated[int | None, "the same in samples"] = None
    lr_warmup_iters: Annotated[int, "iterations of linear warm-up"] = 0
    lr_warmup_samples: Annotated[int, "the same in samples"] = 0
    lr_warmup_fraction: Annotated[float | None, "warm-up as a fraction of the decay iterations"] = None
    weight_decay: Annotated[float, "decoupled weight decay of matrices"] = 0.01
    start_weight_decay: Annotated[float | None, "weight decay of the first update, with --weight_decay_incr_style"] = (
        None
    )
    end_weight_decay: Annotated[float | None, "weight decay at the end of the run"] = None
    weight_decay_incr_style: Annotated[
        Literal["constant", "linear", "cosine"],
        "how the weight decay grows from --start_weight_decay to --end_weight_decay over the run; constant: not",
    ] = "constant"
    clip_grad: Annotated[float, "global gradient norm above which gradients are scaled down; 0: never"] = 1.0
    adam_beta1: Annotated[float, "decay of the first moment"] = 0.9
    adam_beta2: Annotated[float, "decay of the second moment"] = 0.999
    adam_eps: Annotated[float, "added to Adam's denominator"] = 1e-08


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """The flags of one training run, in sections. `None` means not given."""

    checkpoint: CheckpointFlags
    model: ModelFlags
    parallel: ParallelFlags
    precision: PrecisionFlags
    data: DataFlags
    training: TrainingFlags
    logging: LoggingFlags
    evaluation: EvaluationFlags
    optimizer: OptimizerFlags
    no_effect: tuple[str, ...] = ()
    """The given ones among NO_EFFECT."""
    given: tuple[str, ...] = ()
    """Names of all flags on the command line that have an effect."""

    @classmethod
    def of(
        cls, values: Mapping[str, Any], *, no_effect: tuple[str, ...] = (), given: tuple[str, ...] = ()
    ) -> Arguments:
        """The arguments from the values of the flags by name; those that are left out have their default.

        Raises TypeError for an unknown name, and for a missing one that has no default.
        """
        if unknown := values.keys() - SECTION_OF.keys():
            raise TypeError(f"there are no flags {sorted(unknown)}")
        sections = {
            name: kind(**{flag: values[flag] for flag in values if SECTION_OF[flag] == name})
            for name, kind in SECTIONS.items()
        }
        return cls(**sections, no_effect=no_effect, given=given)

    def flag(self, name: str) -> Any:
        """The value of the flag of this name."""
        return getattr(getattr(self, SECTION_OF[name]), name)

    def flags(self) -> dict[str, Any]:
        """The values of all flags by name, in the order of their definition."""
        return {name: self.flag(name) for name in SECTION_OF}

    def samples(self, global_batch: int) -> tuple[int, int, int]:
        """Numbers of train, valid and test samples that the whole run needs.

        Upstream evaluates once more than the number of whole intervals in the run.
        """
        training, evaluation = self.training, self.evaluation
        evaluations = training.train_iters // evaluation.eval_interval + 1
        train = training.train_samples or training.train_iters * global_batch
        return train, evaluations * evaluation.eval_iters * global_batch, evaluation.eval_iters * global_batch

    def as_json(self) -> dict[str, Any]:
        """The flags as JSON values, for state.json."""
        values = {**self.flags(), "no_effect": self.no_effect, "given": self.given}
        return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}


SECTIONS: dict[str, Any] = {
    "checkpoint": CheckpointFlags,
    "model": ModelFlags,
    "parallel": ParallelFlags,
    "precision": PrecisionFlags,
    "data": DataFlags,
    "training": TrainingFlags,
    "logging": LoggingFlags,
    "evaluation": EvaluationFlags,
    "optimizer": OptimizerFlags,
}
"""Section of Arguments -> the class of its flags."""
FLAGS: dict[str, dataclasses.Field[Any]] = {
    field.name: field for section in SECTIONS.values() for field in dataclasses.fields(section)
}
"""Flag -> its field, in the order of --help."""
SECTION_OF = {field.name: name for name, section in SECTIONS.items() for field in dataclasses.fields(section)}
"""Flag -> the section of Arguments that holds it."""
