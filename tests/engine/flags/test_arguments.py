"""The flags are upstream's, as published; wrong ones are refused with one clear line."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_llm.flags.model_flags import config_from_flags
from megatron_llm.flags.original_flags import NO_EFFECT
from megatron_llm.flags.parser import parse
from megatron_llm.model.config import ModelConfig
from megatron_llm.optim.adamw import Schedule
from megatron_llm.parallel.layout_checks import batch_layout
from megatron_llm.training.resume import schedule
from run_contract.errors import UserError

REQUIRED_FLAGS = "--data_path d --save s --seq_length 32 --micro_batch_size 2 --train_iters 10 --lr 1e-3"
REQUIRED = REQUIRED_FLAGS.split()
PUBLISHED_FLAGS = (
    "--tensor_model_parallel_size 4 --pipeline_model_parallel_size 1 --load l --save s --tensorboard_dir t "
    "--data_path d --model_name llama2 --tokenizer_type SentencePieceTokenizer --vocab_file v --bf16 "
    "--use_flash_attn --no_bias_gelu_fusion --micro_batch_size 1 --global_batch_size 512 --seq_length 4096 "
    "--seed 8446 --sequence_parallel --recompute_granularity selective --use_checkpoint_args "
    "--use_checkpoint_opt_param_scheduler --log_interval 1 --save_interval 500 --eval_interval 100 "
    "--train_iters 12500 --lr_decay_style cosine --lr_warmup_iters 1250 --lr 15e-6 --min_lr 5e-8 --clip_grad 1.0 "
    "--hidden_dropout 0.0 --attention_dropout 0.0 --no_bias_gelu_fusion --use_rms_norm --glu_activation swiglu "
    "--no_tie_embed_logits --no_new_tokens --layernorm_epsilon 1e-5"
)


def test_the_published_command_line_is_understood() -> None:
    """Every flag of the published recipe gets its value."""
    args = parse(PUBLISHED_FLAGS.split())
    expected = {"lr": 15e-6, "min_lr": 5e-8, "global_batch_size": 512, "seed": 8446, "load": Path("l")}
    expected |= {"data_path": ["d"], "recompute_granularity": "selective"}
    assert {name: args.flag(name) for name in expected} == expected
    assert args.precision.bf16
    assert args.checkpoint.use_checkpoint_args
    assert args.parallel.sequence_parallel
    assert args.parallel.tensor_model_parallel_size == 4
    assert set(args.no_effect) == {"use_flash_attn", "no_bias_gelu_fusion"}


def test_defaults_are_upstreams() -> None:
    """A flag that is not given has the value that upstream gives it."""
    args = parse(REQUIRED)
    expected = {"weight_decay": 0.01, "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_eps": 1e-8, "clip_grad": 1.0}
    expected |= {"seed": 1234, "min_lr": 0.0, "lr_decay_style": "linear", "eval_interval": 1000, "eval_iters": 100}
    expected |= {"log_interval": 100, "num_workers": 2, "layernorm_epsilon": 1e-5, "rope_theta": 10000.0}
    expected |= {"init_method_std": 0.02}
    assert {name: args.flag(name) for name in expected} == expected
    assert args.data.split.replace(" ", "") == "969,30,1"


ACCEPTED = (
    "--tensor_model_parallel_size 1; --pipeline_model_parallel_size 1; --num_layers_per_virtual_pipeline_stage None 1; "
    "--load None d; --load_iters None 1; --save_interval None 5; --finetune; --no_load_optim; --no_load_rng; "
    "--use_checkpoint_opt_param_scheduler; --override_opt_param_scheduler; --tensorboard_dir None d; "
    "--vocab_file None f; --split 969,30,1 9,1; --seed 1234; --num_workers 2; --eval_iters 100; --eval_interval 1000; "
    "--log_interval 100; --train_iters 10; --global_batch_size None 4; --exit_interval None 5; "
    "--exit_duration_in_mins None 5.0; --skip_iters None 5; --lr_decay_style linear WSD; --lr_decay_iters None 10; "
    "--lr_decay_samples None 10; --lr_warmup_iters 0; --lr_warmup_samples 0; --lr_warmup_fraction None 0.1; "
    "--lr_wsd_decay_style exponential minus_sqrt; --lr_wsd_decay_iters None 5; --lr_wsd_decay_samples None 5; "
    "--min_lr 0.0; --weight_decay 0.01; --clip_grad 1.0; --adam_beta1 0.9; --adam_beta2 0.999; --adam_eps 1e-08; "
    "--bf16; --fp16; --loss_scale None 128.0; --initial_loss_scale 4294967296.0; --min_loss_scale 1.0; "
    "--loss_scale_window 1000.0; --hysteresis 2; "
    "--recompute_granularity None none; --hidden_dropout None 0.0; --attention_dropout None 0.0; "
    "--init_method_std 0.02; --layernorm_epsilon 1e-05; --rope_theta 10000.0; --rope_scaling_factor 1.0; "
    "--num_attention_heads_kv None 2; --kv_channels None 8; --sequence_parallel; --no_tie_embed_logits; "
    "--sliding_window_size None 8; --wandb_logger; --wandb_project None p; --wandb_entity None e; --wandb_id None i; "
    "--distributed_timeout_minutes 10.0"
)
"""Flags with upstream's default, and another value where the default cannot be given; without either, a switch.

Only dropout differs from upstream, whose 0.1 this engine does not have."""


@pytest.mark.parametrize("flag", ACCEPTED.split("; "))
def test_flags_have_upstreams_names_and_defaults(flag: str) -> None:
    """Each flag is taken, and what it stands at without being given is upstream's value."""
    name, *values = flag.split()
    default = parse(REQUIRED).flag(name[2:])
    more = {"--lr_decay_style": ["--lr_wsd_decay_iters", "2"], "--load": ["--use_checkpoint_args"]}.get(name, [])
    if "wsd_decay_" in name and "style" not in name:
        more = ["--lr_decay_style", "WSD"]
    given = parse([*REQUIRED, name, *values[-1:], *more]).flag(name[2:])
    if not values:
        assert (default, given) == (False, True)
    elif "dropout" not in name:
        assert str(default) == values[0]
    assert not values or str(given).strip("[]'") == values[-1]


def test_flags_without_a_meaning_here_are_accepted() -> None:
    """Switches for kernels and ways that this engine does not have are taken, and each has its reason."""
    names = ("use_distributed_optimizer", "exit_signal_handler", "no_masked_softmax_fusion", "use_multiquery_attn")
    args = parse([*REQUIRED, *(f"--{name}" for name in names)])
    assert set(args.no_effect) == set(names)
    assert all(NO_EFFECT[name] for name in names)


def test_flags_know_whether_they_were_given() -> None:
    """A flag that is given its default can be told from one that is not given; short words set what they stand for."""
    args = parse([*REQUIRED, "--rope_theta", "10000.0", "--recompute_activations", "--DDP_impl", "torch"])
    required = REQUIRED_FLAGS.replace("--", "").split()[::2]
    assert args.given == tuple(sorted([*required, "recompute_activations", "rope_theta"]))
    assert args.model.recompute_granularity == "selective"
    assert args.no_effect == ("DDP_impl",)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--tensor_model_parallel_size 0", "--tensor_model_parallel_size 0: must be at least 1"),
        ("--pipeline_model_parallel_size -2", "--pipeline_model_parallel_size -2: must be at least 1"),
        ("--fp16 --bf16", "exclude each other"),
        ("--fp16 --initial_loss_scale 0.5", "--min_loss_scale 1 is more than --initial_loss_scale 0.5"),
        ("--skip_spikes 0", "--skip_spikes 0.0: must be above 0"),
        ("--skip_spikes 6 --spike_window 3", "--spike_window 3: must be at least 4"),
        ("--wandb_api_key 0123", "no place for secrets; set WANDB_API_KEY"),
        ("--peak_tflops -1", "must be above 0"),
        ("--hidden_dropout 0.1", "--hidden_dropout 0.1: only 0.0"),
        ("--glu_activation geglu", "choose from"),
        ("--model_name gemma", "choose from"),
        ("--parallel_attn", "--parallel_attn: the flag is only for --model_name falcon"),
        ("--model_name falcon --use_rms_norm", "has LayerNorm"),
        ("--sliding_window_size 0", "--sliding_window_size 0: must be at least 1"),
        ("--lrr 1", "unrecognized arguments: --lrr"),
        ("--train_iters ten", "invalid int value: 'ten'"),
        ("--train_iters 0", "--train_iters 0: must be at least 1"),
        ("--eval_iters -1", "must not be negative"),
        ("--exit_duration_in_mins 0", "must be above 0"),
        ("--keep_every 10", "give --keep_last too"),
        ("--skip_iters 0 4", "numbered from 1"),
        ("--skip_iters 1.5", "invalid int value"),
        ("--seed -1", "--seed -1: must be from 0 to 4294967295"),
        ("--train_samples 80", "either --train_iters or --train_samples"),
        ("--train_data_path d", "give either --data_path, which --split divides, or --train_data_path"),
        ("--lr_warmup_fraction 0.1 --lr_warmup_iters 2", "excludes --lr_warmup_iters"),
        ("--use_checkpoint_args", "give --load"),
        ("--lr_decay_style WSD", "belong together: give both or neither"),
        ("--lr_wsd_decay_iters 5", "belong together: give both or neither"),
        ("--lr_decay_style WSD --lr_wsd_decay_iters 2 --lr_wsd_decay_samples 8", "exclude each other"),
        ("--lr_wsd_decay_style 1-sqrt", "choose from"),
        ("--lr_warmup_samples -1", "must not be negative"),
        ("--weight_decay_incr_style linear", "belong together: give all three"),
        ("--start_weight_decay 0.1 --end_weight_decay 0.2", "belong together: give all three"),
        (
            "--weight_decay_incr_style cosine --start_weight_decay 0.3 --end_weight_decay 0.2",
            "--start_weight_decay 0.3 is more than --end_weight_decay 0.2",
        ),
        (
            "--weight_decay_incr_style cosine --start_weight_decay 0 --end_weight_decay 0.2 --weight_decay 0.1",
            "--weight_decay 0.1 has no meaning with",
        ),
        ("--recompute_activations --recompute_granularity full", "leave out one of the two"),
        ("--recompute_method block", "give --recompute_granularity full too"),
        ("--recompute_granularity full --recompute_num_layers 2", "needs --recompute_method"),
        ("--recompute_granularity full --recompute_method block --recompute_num_layers 0", "must be at least 1"),
        ("--dataloader_type cyclic", "cyclic is refused, only single is valid: cyclic shuffles each data rank's"),
        ("--optimizer sgd", "AdamW is the only optimizer"),
        ("--metrics all", "choose from"),
        ("--eval_only --eval_iters 0", "nothing is left to do"),
        ("--override_model_args", "--override_model_args needs a checkpoint; give --load"),
        ("--fp8_e4m3", "--fp8_e4m3 is refused: fp8 needs Transformer Engine"),
        ("--vocab_extra_ids -1", "must not be negative"),
    ],
)
def test_wrong_flags_are_refused(flags: str, message: str) -> None:
    """What the engine cannot do is an error that says what to do, not a surprise during training."""
    with pytest.raises(UserError, match=message):
        parse([*REQUIRED, *flags.split()])


def test_a_run_counted_in_samples() -> None:
    """--train_samples is so many whole global batches, which must be known; the decay ends at the last sample."""
    required = [*REQUIRED[:8], "--lr", "1e-3"]
    args = parse([*required, "--train_samples", "83", "--global_batch_size", "8"])
    assert args.training.train_iters == 10
    assert schedule(args, 8, {}).decay_samples == 83
    assert schedule(parse([*required, "--train_iters", "10"]), 8, {}).decay_samples == 80
    for more in (["--train_samples", "83"], ["--train_samples", "7", "--global_batch_size", "8"]):
        with pytest.raises(UserError, match="needs --global_batch_size, from 1 up to the number of samples"):
            parse([*required, *more])
    with pytest.raises(UserError, match="give either --train_iters or --train_samples"):
        parse(required)


def test_a_schedule_counted_in_samples_or_iterations() -> None:
    """Both spellings of warm-up, decay and last decay give the same schedule."""
    wsd = [*REQUIRED, "--lr_decay_style", "WSD", "--lr_wsd_decay_style", "linear"]
    counted = (
        "--lr_decay_iters 8 --lr_warmup_iters 2 --lr_wsd_decay_iters 3",
        "--lr_decay_samples 32 --lr_warmup_samples 8 --lr_wsd_decay_samples 12",
    )
    iterations, samples = (parse([*wsd, *flags.split()]) for flags in counted)
    assert schedule(iterations, 4, {}) == schedule(samples, 4, {}) == Schedule(1e-3, 0.0, 8, 32, "WSD", "linear", 12)


def test_a_missing_flag_is_named() -> None:
    """Without --lr nothing starts."""
    with pytest.raises(UserError, match="required: --lr"):
        parse(REQUIRED[:-2])


@pytest.mark.parametrize(
    ("flags", "ranks", "expected"),
    [
        ("--global_batch_size 12", 3, (12, 2)),
        ("", 3, (6, 1)),
        ("--tensor_model_parallel_size 2 --global_batch_size 12", 4, (12, 3)),
        ("--pipeline_model_parallel_size 2", 4, (8, 2)),
        ("--global_batch_size 12", 4, "--global_batch_size 12 is not a multiple of 8"),
        ("--tensor_model_parallel_size 2", 3, "3 ranks are not a multiple of 2"),
        ("--tensor_model_parallel_size 2 --pipeline_model_parallel_size 2", 6, "6 ranks are not a multiple of 4"),
        ("--pipeline_model_parallel_size 4 --global_batch_size 4", 4, "2 micro-batches an update; .* at least 4"),
        (
            "--pipeline_model_parallel_size 2 --num_layers_per_virtual_pipeline_stage 1 --global_batch_size 6",
            2,
            "3 micro-batches an update; .* a multiple of 2",
        ),
    ],
)
def test_ranks_and_global_batch_must_divide(flags: str, ranks: int, expected: tuple[int, int] | str) -> None:
    """Ranks are a whole number of model copies, a global batch a whole number of micro-batches on each, by default
    one a rank; a pipeline needs enough of them."""
    args = parse([*REQUIRED, *flags.split()])
    if isinstance(expected, str):
        with pytest.raises(UserError, match=expected):
            batch_layout(args.parallel, args.training, ranks)
    else:
        assert batch_layout(args.parallel, args.training, ranks) == expected


def test_geometry_comes_from_flags() -> None:
    """Head size and kv heads have upstream's defaults, and a missing size is named."""
    sizes = "--num_layers 2 --hidden_size 32 --num_attention_heads 4 --ffn_hidden_size 48"
    config = config_from_flags(parse([*REQUIRED, *sizes.split(), "--max_position_embeddings", "64"]).model, 100)
    assert (config.kv_channels, config.num_attention_heads_kv, config.tie_embed_logits) == (8, 4, True)
    with pytest.raises(UserError, match="--max_position_embeddings must be given"):
        config_from_flags(parse([*REQUIRED, *sizes.split()]).model, 100)


def test_families_have_their_own_geometry() -> None:
    """Falcon's layers and norms come with its name, Mistral's window and Llama 3.1's frequencies from their flags."""
    sizes = "--num_layers 2 --hidden_size 32 --num_attention_heads 4 --ffn_hidden_size 48 --max_position_embeddings 64"

    def config(flags: str) -> ModelConfig:
        return config_from_flags(parse([*REQUIRED, *sizes.split(), *flags.split()]).model, 100)

    falcon = config("--model_name falcon --parallel_attn --parallel_layernorm --num_attention_heads_kv 1")
    assert (falcon.use_rms_norm, falcon.glu_activation, falcon.tie_embed_logits) == (False, None, True)
    assert (falcon.parallel_attn, falcon.parallel_layernorm, falcon.num_attention_heads_kv) == (True, True, 1)
    mistral = config("--model_name mistral --sliding_window_size 16 --num_attention_heads_kv 2")
    assert (mistral.sliding_window_size, mistral.use_rms_norm, mistral.glu_activation) == (16, True, "swiglu")
    llama = config("--model_name llama3 --rope_scaling_type llama3 --rope_scaling_factor 8 --rope_theta 500000")
    assert (llama.rope_scaling_type, llama.rope_scaling_factor, llama.rope_theta) == ("llama3", 8.0, 500000.0)
