"""QLoRA's recipe with LoReFT in LoRA's place: TRL's SFTTrainer on a base model in 4 bits.

    python examples/qlora_sft.py                                       # the bundled model and data, offline, on a CPU
    python examples/qlora_sft.py --model_name_or_path Qwen/Qwen3-8B --dtype bfloat16 \\
        --dataset_name trl-lib/Capybara --assistant_only_loss --gradient_checkpointing   # on a GPU
    python examples/qlora_sft.py --load_in_4bit false --load_in_8bit   # int8

It is sft.py with three changes: the base is loaded in NF4 with quantized scales, computes in --dtype, and the adapter,
which TRL casts to bfloat16, goes back to float32. All flags: --help.
"""

from __future__ import annotations

from common import ModelArguments, load_data, model_init_kwargs, parse, reft_config, train_and_save
from peft.functional import cast_adapter_dtype
from sft import orders, show
from transformers.utils import is_torch_bf16_gpu_available
from trl import ScriptArguments, SFTConfig, SFTTrainer, get_quantization_config


def main() -> None:
    script_args, training_args, model_args = parse(
        ScriptArguments,
        SFTConfig,
        ModelArguments,
        output_dir="outputs/qlora_sft",
        load_in_4bit=True,
        use_bnb_nested_quant=True,
        # What the 4-bit layers compute in; most CPUs emulate bfloat16, slowly.
        dtype="bfloat16" if is_torch_bf16_gpu_available() else "float32",
        learning_rate=4e-3,
        num_train_epochs=3.0,
        per_device_train_batch_size=4,
        gradient_checkpointing=False,
    )
    training_args.model_init_kwargs = model_init_kwargs(model_args) | (training_args.model_init_kwargs or {})
    train, test = load_data(script_args, orders("train", 48), orders("test", 4))

    trainer = SFTTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=train,
        eval_dataset=test if training_args.eval_strategy != "no" else None,
        quantization_config=get_quantization_config(model_args),
        peft_config=reft_config(model_args),
    )
    # bfloat16 rounds small updates away. This must come before train(), which creates the optimizer.
    cast_adapter_dtype(trainer.model, "default")
    base = trainer.model.get_base_model()
    print(f"The base model takes {base.get_memory_footprint() / 2**20:.0f} MiB.")
    train_and_save(trainer, script_args)
    show(trainer, train if test is None else test)


if __name__ == "__main__":
    main()
