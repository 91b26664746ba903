//! Keys of TRL and transformers that have no meaning here, and what to use instead.

/// One line for a user who brings this key along, or `None` for a key that nobody knows.
pub fn answer(key: &str) -> Option<&'static str> {
    Some(match key {
        "use_vllm" | "vllm_mode" | "vllm_gpu_memory_utilization" | "use_liger_kernel" => {
            "generation and kernels are built in: leave it out"
        }
        "steps_per_generation"
        | "generation_batch_size"
        | "per_device_train_batch_size"
        | "gradient_accumulation_steps" => {
            "use prompts_per_step and num_generations; micro_batch_tokens sets the memory"
        }
        "prompts_per_step" | "num_generations" => {
            "use per_device_train_batch_size and gradient_accumulation_steps"
        }
        "bf16" | "fp16" | "tf32" | "torch_dtype" | "load_in_4bit" | "load_in_8bit" => {
            "use dtype (auto, f32, bf16) and matmul_precision (highest, high, medium)"
        }
        "per_device_eval_batch_size" | "auto_find_batch_size" | "eval_accumulation_steps" => {
            "there is no padding, so memory is set by memory_budget and micro_batch_tokens"
        }
        "vllm_importance_sampling_cap" | "vllm_importance_sampling_correction" => {
            "sampler and trainer agree to the bit; where rollout_matmul_precision differs, use \
             importance_sampling_cap"
        }
        "sync_ref_model" | "ref_model_sync_steps" | "ref_model_mixup_alpha" => {
            "the reference stays as it is: use reference (base or adapter)"
        }
        "disable_dropout" => "dropout is refused in policy-gradient runs: leave it out",
        "generation_kwargs" => "use temperature, top_p, top_k, min_p, repetition_penalty and stop",
        "reward_processing_classes" | "remove_unused_columns" | "shuffle_dataset" => {
            "every column reaches the rewards and prompts are shuffled by seed: leave it out"
        }
        "use_bias_correction_kl" => "the divergence is always weighted by the ratio: leave it out",
        "epsilon_low" => "use epsilon",
        "optim" | "optim_args" => "the optimizer is AdamW: leave it out",
        "deepspeed" | "fsdp" | "fsdp_config" | "ddp_find_unused_parameters" | "local_rank" => {
            "one process drives one device: leave it out"
        }
        "gradient_checkpointing_kwargs" => "use gradient_checkpointing = true",
        "lr_scheduler_kwargs" | "min_lr" | "min_lr_rate" | "lr_scheduler_min_lr" => {
            "use lr_scheduler_min_lr_rate, a share of the peak rate"
        }
        "warmup_ratio" => "use warmup_steps below 1",
        "eval_strategy" | "evaluation_strategy" | "do_eval" => "use eval_steps, 0 = off",
        "save_strategy" => "use save_steps, 0 = at the end only",
        "logging_strategy" | "logging_first_step" => "use logging_steps",
        "save_safetensors" | "save_only_model" | "overwrite_output_dir" => {
            "checkpoints are whole and never overwrite: leave it out"
        }
        "max_seq_length" => "use max_length",
        "max_prompt_length" => {
            "prompts are not cut apart: shorten or remove rows that are too long"
        }
        "max_new_tokens" => "use max_completion_length",
        "dataset_text_field" => "use columns = {text = \"…\"}",
        "dataset_config" | "dataset_num_proc" | "dataloader_num_workers" => {
            "rows are read in one go: leave it out"
        }
        "padding_free" | "eval_packing" | "pad_to_multiple_of" | "group_by_length" => {
            "no batch is ever padded: leave it out"
        }
        "packing_strategy" => "use packing = true",
        "use_peft" | "peft_config" => "use adapter (steering, lora, joint)",
        "r" => "use lora_r or steering_rank",
        "target_modules" => "use lora_target_modules",
        "rank" => "use steering_rank or lora_r",
        "data_seed" | "full_determinism" => "use seed; every run is deterministic",
        "push_to_hub" | "hub_model_id" => "runs are local: upload output_dir yourself",
        "model" | "model_name" => "use model_name_or_path",
        "dataset" | "dataset_path" | "data_path" => "use dataset_name",
        "lr" => "use learning_rate",
        "batch_size" => "use per_device_train_batch_size (sft) or prompts_per_step (grpo)",
        "epochs" => "use num_train_epochs",
        _ => return None,
    })
}
