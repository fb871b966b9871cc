"""The original's flags that finetune.py has no setting for: without effect, accepted with one value, or refused.

The flags that do something are the fields of arguments.Arguments. docs/flags.md lists all of them together.
"""

from __future__ import annotations

SWITCHES_WITHOUT_EFFECT = {
    "use_flash_attn": "attention always runs through PyTorch's fused kernels",
    "no_bias_gelu_fusion": "there is no such fusion here",
    "no_bias_dropout_fusion": "there is no such fusion here",
    "no_masked_softmax_fusion": "there is no such fusion here",
    "no_gradient_accumulation_fusion": "there is no such fusion here",
    "no_async_tensor_model_parallel_allreduce": "these sums are never overlapped here",
    "no_persist_layer_norm": "there is no such kernel here",
    "accumulate_allreduce_grads_in_fp32": "gradients are always reduced in fp32",
    "use_distributed_optimizer": "the optimizer is always sharded over the data ranks",
    "use_multiquery_attn": "the number of kv heads decides",
    "exit_signal_handler": "SIGTERM, SIGINT and SIGUSR2 always save and exit 75",
    "no_fp8_wgrad": "nothing is computed in fp8 here",
    "no_query_key_layer_scaling": "queries and keys are never scaled by the layer's number here",
    "attention_softmax_in_fp32": "the fused attention kernels always sum the softmax in fp32",
    "fp16_lm_cross_entropy": "the loss is always computed in fp32, which is more exact",
    "no_contiguous_buffers_in_local_ddp": "gradients are sharded over the data ranks and have no such buffers",
    "no_scatter_gather_tensors_in_pipeline": "with --sequence_parallel stages always exchange only their own part",
    "use_ring_exchange_p2p": "pipeline stages always send and receive through torch.distributed",
    "use_cpu_initialization": "random weights are always drawn on the CPU, so that they do not depend on the layout",
    "no_initialization": "weights are never drawn when a checkpoint is loaded",
    "mmap_warmup": "the operating system reads the data ahead",
    "barrier_with_L1_time": "timers never wait for other ranks here",
    "no_data_sharding": "it belongs to --dataloader_type cyclic, which is refused",
    "log_validation_ppl_to_tensorboard": "the validation perplexity is always in TensorBoard",
}
"""Switches that change nothing in this engine, and why."""

VALUES_WITHOUT_EFFECT = {
    "DDP_impl": "gradients are always sharded over the data ranks (FSDP)",
    "distributed_backend": "the device decides: NCCL between GPUs, gloo between CPUs",
    "local_rank": "the environment variable LOCAL_RANK decides",
    "make_vocab_size_divisible_by": "the vocabulary is not padded in training; checkpoint_util.py pads by 128",
    "empty_unused_memory_level": "PyTorch's cache of freed memory is kept",
    "timing_log_level": "the second log line always says where the time went",
    "timing_log_option": "the second log line always shows the slowest rank",
    "tensorboard_log_interval": "TensorBoard gets its numbers with every log line (--log_interval)",
    "tensorboard_queue_size": "TensorBoard's own size of its queue is used",
    "log_learning_rate_to_tensorboard": "the learning rate is always in TensorBoard",
    "log_loss_scale_to_tensorboard": "the loss scale is always in TensorBoard",
    "wandb_resume": "a run that goes on always goes on at W&B too, under the id in --save",
    "fp8_margin": "nothing is computed in fp8 here",
    "fp8_interval": "nothing is computed in fp8 here",
    "fp8_amax_history_len": "nothing is computed in fp8 here",
    "fp8_amax_compute_algo": "nothing is computed in fp8 here",
    "adlr_autoresume_interval": "--adlr_autoresume is refused",
    "inference_batch_times_seqlen_threshold": "finetune.py only trains",
    "max_tokens_to_oom": "finetune.py only trains",
    "sgd_momentum": "--optimizer sgd is refused",
}
"""Flags with a value that changes nothing in this engine, and why."""

NO_EFFECT = SWITCHES_WITHOUT_EFFECT | VALUES_WITHOUT_EFFECT

ONLY: dict[str, tuple[tuple[str, ...], str]] = {
    "transformer_impl": (("local",), "Transformer Engine is not used"),
    "optimizer": (("adam",), "AdamW is the only optimizer"),
    "dataloader_type": (
        ("single",),
        "cyclic shuffles each data rank's share by itself, so the order of samples would depend on the number of "
        "ranks, and a run could not go on with another one",
    ),
    "data_impl": (("mmap", "infer"), "data are always memory-mapped .bin and .idx files"),
    "model_type": (("encoder_or_decoder",), "encoder-decoder models are not trained here"),
    "data_type": (("gpt",), "instruction tuning is not done here"),
    "scalar_loss_mask": (("0", "0.0"), "it weights the prompts in instruction tuning, which is not done here"),
}
"""The values that mean what this engine does anyway, and why any other value is refused."""

_OTHER_MODELS = {
    "it belongs to models with an encoder and a decoder (T5)": "decoder_num_layers decoder_seq_length "
    "pipeline_model_parallel_split_rank",
    "it belongs to BERT and T5, which are not trained here": "mask_prob short_seq_prob sample_rate",
    "it belongs to retrieval models (ICT, REALM, biencoders), which are not trained here": "retriever_seq_length "
    "ict_head_size biencoder_projection_dim biencoder_shared_query_context_model ict_load bert_load titles_data_path "
    "query_in_block_prob use_one_sent_docs evidence_data_path retriever_report_topk_accuracies "
    "retriever_score_scaling block_data_path embedding_path indexer_batch_size indexer_log_interval",
    "it belongs to vision models, which are not trained here": "num_classes img_h img_w num_channels patch_dim "
    "classes_fraction data_per_class_fraction head_lr_mult iter_per_epoch dino_local_img_size "
    "dino_local_crops_number dino_head_hidden_size dino_bottleneck_size dino_freeze_last_layer dino_norm_last_layer "
    "dino_warmup_teacher_temp dino_teacher_temp dino_warmup_teacher_temp_epochs",
}

REFUSED = {
    "wandb_api_key": "a command line is no place for secrets; set WANDB_API_KEY or `wandb login`",
    "fp8_e4m3": "fp8 needs Transformer Engine, which is not used; give --bf16",
    "fp8_hybrid": "fp8 needs Transformer Engine, which is not used; give --bf16",
    "encoder_num_layers": "give the number as --num_layers",
    "encoder_seq_length": "give the length as --seq_length",
    "use_bias": "models with biases in their matrices are not supported",
    "use_post_ln": "only models with a norm before each branch are supported",
    "apply_residual_connection_post_layernorm": "only models with a norm before each branch are supported",
    "fp32_residual_connection": "the residual stream has the precision of --bf16 or --fp16; leave both out for fp32",
    "onnx_safe": "models are not exported to ONNX here; megatron_to_hf.py makes a Hugging Face folder",
    "lima_dropout": "there is no dropout here",
    "init_method_xavier_uniform": "random weights are normal; give their --init_method_std",
    "data_parallel_random_init": "all data ranks hold parts of one model, which has one seed",
    "distribute_saved_activations": "give --sequence_parallel, which spreads all activations over the tensor ranks",
    "standalone_embedding_stage": "the embedding belongs to the first pipeline stage",
    "log_num_zeros_in_grad": "gradients' zeros are not counted; --log_params_norm and the gradient norm are logged",
    "variable_seq_lengths": "it belongs to instruction tuning; samples here are all --seq_length long",
    "merge_file": "give a tokenizer.json as --vocab_file, with --tokenizer_type HuggingFaceTokenizer",
    "tokenizer_model": "give the tokenizer's file as --vocab_file",
    "adlr_autoresume": "that is one company's scheduler; under Slurm a run saves, exits 75 and is started again",
} | {name: reason for reason, names in _OTHER_MODELS.items() for name in names.split()}
"""Flags that finetune.py does not take, and why, or what to give in their place."""
