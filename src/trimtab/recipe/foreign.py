"""Keys that people bring from other tools: the key it is here, or why there is none."""

from __future__ import annotations

_SAID = {  # several keys, then what is said of each
    "num_train_epochs num_epochs n_epochs": "it is training: epochs:",
    "per_device_train_batch_size train_batch_size micro_batch_size bs": "it is training: batch_size:",
    "per_device_eval_batch_size": "it is training: eval_batch_size:",
    "gradient_accumulation_steps grad_accum": "it is training: gradient_accumulation:",
    "lr": "it is training: learning_rate:",
    "lr_scheduler lr_scheduler_type scheduler": "it is training: schedule: (linear, cosine or constant)",
    "warmup_ratio warmup_steps": "it is training: warmup:, a share of the steps such as 0.1",
    "max_seq_length max_seq_len seq_length cutoff_len sequence_len model_max_length": "it is training: max_length:",
    "save_steps save_strategy save_total_limit": "checkpoints are kept once an epoch, or training: checkpoint_every:",
    "sample_packing pack": "it is training: packing:",
    "lora_r lora_rank rank": "it is adapter: r:",
    "lora_alpha alpha": "an edit has none, and trimtab.set_scale makes one weaker or stronger; remove it",
    "lora_dropout": "it is adapter: dropout:",
    "target_modules lora_target lora_target_modules": "it is adapter: site: (block, attention, mlp or a pattern of "
    "module names) and layers:",
    "layers_to_transform": "it is adapter: layers:",
    "intervention position": "it is adapter: positions:, such as f7+l7",
    "peft_type use_lora use_peft": "it is adapter: method:, and trimtab compare sets it beside LoRA",
    "output_dir save_dir": "it is output:, at the top of the file",
    "model_name model_name_or_path base_model pretrained_model_name_or_path": "it is model:, at the top of the file",
    "bf16 fp16 fp32 torch_dtype precision": "it is dtype:, at the top of the file (bfloat16, float16, float32 or auto)",
    "attn_implementation flash_attention": "it is attention:, at the top of the file",
    "device device_map no_cuda": "a GPU is used where there is one, and CUDA_VISIBLE_DEVICES chooses it; remove it",
    "load_in_4bit load_in_8bit": "recipes load a model as it is stored; give the folder of one that is quantized",
    "logging_steps logging_dir report_to": "every step is shown, and the loss kept in the run's folder; remove it",
    "eval_steps eval_strategy evaluation_strategy": "validation is scored three times while training; remove it",
    "optim optimizer": "it is AdamW; remove it",
    "max_grad_norm": "it is 1.0; remove it",
    "resume_from_checkpoint": "train goes on where it stopped, and --no-resume starts over; remove it",
    "overwrite_output_dir": "trimtab train --no-resume starts over; remove it",
    "push_to_hub hub_model_id": "PEFT pushes a run's folder with model.push_to_hub; remove it",
    "dataset datasets data_path dataset_name train_file": "it is data: train: of a task, or name: for one on the Hub",
    "validation_file val_file eval_file val": "it is data: validation:",
    "test_file": "it is data: test:",
    "text_column sentence": "it is text:, in a task",
    "label_column label_field": "it is label:, in a task",
    "num_labels": "the classes are those of the training data, or labels: [a, b]; remove it",
    "prompt_template template": "it is prompt:, in a task",
    "metric metrics": "it is score:, in a task",
    "sep delimiter": "it is data: separator:",
}


FOREIGN = {key: said for keys, said in _SAID.items() for key in keys.split()}
