"""Records the traces of the tiny random models in `MODELS`, whose windows are shorter than their sequences.

    pip install torch==2.1.0 transformers==4.53.3 peft==0.15.2 accelerate==0.33.0 'numpy<2'
    python record.py mistral qwen2_sliding
    pip install torch==2.15.0 transformers==5.24.0 peft==0.21.2 accelerate==1.15.0
    python record.py qwen3 gemma gemma2 gemma3 phi3
"""

import json
import os
import platform
import sys
import tempfile
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""

import accelerate
import peft
import torch
import transformers
from safetensors.torch import load_file, save_file

HERE = Path(__file__).parent
PAD = 1
SEED = 7
STEPS = 2
LEARNING_RATE = 1e-3
WEIGHT_DECAY = 0.1


SIZES = dict(
    vocab_size=96, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, sliding_window=5, max_position_embeddings=64, initializer_range=0.3,
    bos_token_id=2, eos_token_id=2, pad_token_id=PAD, torch_dtype="float32", attn_implementation="eager",
)
# A window that the architecture does not have would still shorten the library's cache.
WITHOUT_WINDOW = {key: value for key, value in SIZES.items() if key != "sliding_window"}
MODELS = {
    "mistral": (transformers.MistralForCausalLM, transformers.MistralConfig(head_dim=6, **SIZES)),
    "qwen2_sliding": (
        transformers.Qwen2ForCausalLM,
        transformers.Qwen2Config(use_sliding_window=True, max_window_layers=1, rope_theta=1e6, **SIZES),
    ),
    "qwen3": (transformers.Qwen3ForCausalLM, transformers.Qwen3Config(head_dim=6, **SIZES)),
    "gemma": (transformers.GemmaForCausalLM, transformers.GemmaConfig(head_dim=6, **WITHOUT_WINDOW)),
    "gemma2": (
        transformers.Gemma2ForCausalLM,
        transformers.Gemma2Config(
            head_dim=6, query_pre_attn_scalar=9, attn_logit_softcapping=2.0, final_logit_softcapping=3.0, **SIZES
        ),
    ),
    "gemma3": (
        transformers.Gemma3ForCausalLM,
        transformers.Gemma3TextConfig(
            head_dim=6, query_pre_attn_scalar=9, layer_types=["sliding_attention", "full_attention"], **SIZES
        ),
    ),
    "phi3": (transformers.Phi3ForCausalLM, transformers.Phi3Config(**SIZES)),
}


def random_model(name):
    kind, config = MODELS[name]
    model = kind(config)
    # Fresh norms and biases are ones and zeros, and would hide a mistake.
    for parameter_name, parameter in model.named_parameters():
        if "norm" in parameter_name or "bias" in parameter_name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def adapted(model):
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "qkv_proj", "gate_up_proj"]
    modules = {path.split(".")[-1] for path, _ in model.named_modules()}
    targets = [name for name in names if name in modules]
    lora = peft.LoraConfig(r=2, lora_alpha=2, lora_dropout=0.0, target_modules=targets, task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, lora)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.2 * torch.randn_like(parameter)
    return model


def generate(model, ids, eos=None):
    mask = ids.ne(PAD)
    return model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=16, do_sample=False, eos_token_id=eos, pad_token_id=PAD
    )


@torch.no_grad()
def forward(model, variant, batch, prompts, single):
    """What one variant of the model computes for a batch, and its greedy continuations."""
    output = model(**batch, output_hidden_states=True)
    free = generate(model, prompts)
    eos = free[1, prompts.shape[1] + 3]
    found = {
        "logits.safe0": output.logits,
        "loss.safe0": output.loss.reshape(1),
        "generate.single": generate(model, single),
        "generate.leftpad": free,
        "generate.leftpad_eos": generate(model, prompts, eos.item()),
        "generate.eos_id": eos.reshape(1),
    }
    if variant == "lora":
        found |= {f"hidden.{layer}.safe0": hidden for layer, hidden in enumerate(output.hidden_states)}
    return {f"{variant}.{name}": tensor.contiguous().clone() for name, tensor in found.items()}


def left_padded(batch):
    width = batch["input_ids"].shape[1]
    rows = [row[row.ne(PAD)][: width - 3 * index] for index, row in enumerate(batch["input_ids"])]
    width = max(len(row) for row in rows)
    return torch.stack([torch.cat([torch.full((width - len(row),), PAD), row]) for row in rows])


def record_sft(model, batches):
    """Steps of `Trainer.training_step` and AdamW, without clipping."""
    arguments = transformers.TrainingArguments(tempfile.mkdtemp(), use_cpu=True, max_grad_norm=0.0, report_to=[])
    trainer = transformers.Trainer(model=model, args=arguments)
    # What the loop around it sets in later versions.
    trainer.current_gradient_accumulation_steps = 1
    trainable = {name.replace(".default", ""): p for name, p in model.named_parameters() if p.requires_grad}
    adamw = torch.optim.AdamW(trainable.values(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    trace, steps = {}, []
    for step in range(STEPS):
        adamw.zero_grad()
        loss = trainer.training_step(model, dict(batches[step])).item()
        trace |= {f"step{step}.grad.{name}": p.grad.clone() for name, p in trainable.items()}
        adamw.step()
        trace |= {f"step{step}.lora.{name}": p.detach().clone() for name, p in trainable.items()}
        steps.append(
            {"step": step, "batches": {"inputs": f"safe.{step}"}, "returned_loss": loss, "loss_passes": [loss]}
        )
    return trace, steps


def write(folder, name, tensors, info):
    (HERE / folder).mkdir(exist_ok=True)
    save_file(tensors, HERE / folder / f"{name}.safetensors")
    (HERE / folder / f"{name}.json").write_text(json.dumps(info, indent=1) + "\n")


def record(name, batches):
    torch.manual_seed(SEED)
    folder = HERE / "_models" / name
    versions = {module.__name__: module.__version__ for module in (torch, transformers, peft, accelerate)}
    versions["python"] = platform.python_version()

    model = random_model(name).eval()
    model.save_pretrained(folder)
    prompts, single = left_padded(batches[0]), batches[1]["input_ids"][:1, :7]
    golden = {"input.leftpad": prompts, "input.single": single}
    golden |= forward(model, "base", batches[0], prompts, single)
    model = adapted(model).eval()
    model.save_pretrained(folder / "lora_all")
    for extra in ("generation_config.json", "lora_all/README.md"):
        (folder / extra).unlink()
    golden |= forward(model, "lora", batches[0], prompts, single)
    write(f"{name}_forward", "golden", golden, {"model": name, "versions": versions})

    trace, steps = record_sft(model, batches)
    info = {
        "model": name,
        "method": "sft",
        "reference": {"repo": "huggingface/transformers", "cls": "transformers.Trainer"},
        "versions": versions,
        "hyper": {},
        "files": {
            "base": f"../_models/{name}/model.safetensors",
            "config": f"../_models/{name}/config.json",
            "lora_init": f"../_models/{name}/lora_all/adapter_model.safetensors",
            "lora_config": f"../_models/{name}/lora_all/adapter_config.json",
            "batches": "../_data/batches.safetensors",
            "trace": "trace.safetensors",
        },
        "optimizer": {
            "name": "torch.optim.AdamW", "lr": LEARNING_RATE, "betas": [0.9, 0.999], "eps": 1e-8,
            "weight_decay": WEIGHT_DECAY, "schedule": "constant", "max_grad_norm": None,
        },
        "steps": steps,
    }
    write(f"{name}_sft", "trace", trace, info)


def main():
    torch.set_num_threads(1)
    data = load_file(HERE / "_data/batches.safetensors")
    keys = ("input_ids", "labels", "attention_mask")
    batches = [{key: data[f"safe.{index}.{key}"] for key in keys} for index in range(STEPS)]
    for name in sys.argv[1:] or MODELS:
        record(name, batches)


if __name__ == "__main__":
    main()
