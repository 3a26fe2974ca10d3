"""Writes adapters of many kinds with the peft that is installed, and what the adapted models answer.

    python write_adapters.py WORK OUT

WORK holds the folders `llama` and `opt` with models and `prompts.json` with tokens; OUT is made. Runs on peft 0.5 and
later, and imports nothing of the suite, since the other versions of peft need other versions of transformers.
"""

import inspect
import json
import sys
import warnings
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

NEW_TOKENS = 8
warnings.simplefilter("ignore")
torch.set_num_threads(1)


class Lacks(Exception):
    """This peft does not have the feature."""


def base(name):
    return AutoModelForCausalLM.from_pretrained(WORK / name, torch_dtype=torch.float32).eval()


def lora(**settings):
    """A configuration, if this peft knows all of its keys."""
    known = inspect.signature(LoraConfig).parameters
    missing = [key for key in settings if key not in known]
    if missing:
        raise Lacks(f"no key {', '.join(missing)}")
    return LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM",
                         **settings})


def noisy(model, seed=0):
    """The model with noise on everything that it trains: stands for training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def save(model, folder, **more):
    """The default until 0.6 was a pickle."""
    model.save_pretrained(folder, safe_serialization=True, **more)


def plain(name="llama", **settings):
    """An adapter on one model, trained and saved."""

    def write(folder):
        model = noisy(get_peft_model(base(name), lora(**settings)))
        save(model, folder)
        return model

    return write


def pickle(folder):
    model = noisy(get_peft_model(base("llama"), lora()))
    model.save_pretrained(folder, safe_serialization=False)
    return model


def sixteen_bits(folder):
    save(noisy(get_peft_model(base("llama"), lora())), folder)
    file = folder / "adapter_model.safetensors"
    rounded = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(file).items()}
    save_file(rounded, file, metadata={"format": "pt"})
    return PeftModel.from_pretrained(base("llama"), folder).float().eval()


def second_adapter(folder):
    """The folder of the adapter that is not called `default`."""
    model = get_peft_model(base("llama"), lora())
    model.add_adapter("second", lora(r=3, target_modules=["k_proj", "o_proj"]))
    model.set_adapter("second")
    noisy(model)
    save(model, folder)
    return model


def pissa_converted(folder):
    """PiSSA changes the base; peft can save the difference from the original base as a plain adapter."""
    model = get_peft_model(base("llama"), lora(init_lora_weights="pissa"))
    parameters = inspect.signature(model.save_pretrained).parameters
    key = "path_initial_model_for_weight_conversion"
    if key not in parameters:
        raise Lacks("no conversion of PiSSA")
    start = folder.parent / (folder.name + "-start")
    model.peft_config["default"].init_lora_weights = True
    save(model, start)
    model.peft_config["default"].init_lora_weights = "pissa"
    noisy(model)
    save(model, folder, **{key: str(start)})
    return model


def longer_vocabulary(folder):
    model = base("llama")
    model.resize_token_embeddings(model.config.vocab_size + 3)
    model = noisy(get_peft_model(model, lora()))
    save(model, folder)
    return model


def another_kind(name, **settings):
    """An adapter that is no LoRA."""

    def write(folder):
        import peft

        kind = getattr(peft, name, None)
        if kind is None:
            raise Lacks(f"no {name}")
        model = noisy(get_peft_model(base("llama"), kind(task_type="CAUSAL_LM", **settings)))
        save(model, folder)
        return model

    return write


def embedding(folder):
    model = noisy(get_peft_model(base("llama"), lora(target_modules=["q_proj", "embed_tokens"])))
    save(model, folder)
    return model


# Name, how it is written, model.
CASES = [
    ("lora", plain(), "llama"),
    ("lora on opt", plain("opt", target_modules=["q_proj", "fc1"]), "opt"),
    ("lora of every linear layer", plain(target_modules="all-linear"), "llama"),
    ("lora by peft's own table of layers", plain(target_modules=None), "llama"),
    ("lora of layers named with their parent", plain(target_modules=["self_attn.q_proj", "mlp.up_proj"]), "llama"),
    ("lora of one layer by its whole name", plain(target_modules=["model.layers.1.self_attn.q_proj"]), "llama"),
    ("lora by a regular expression", plain(target_modules=r".*\.1\.self_attn\.(q|v)_proj"), "llama"),
    ("lora of one block", plain(layers_to_transform=[1]), "llama"),
    ("lora of one block, pattern named", plain(layers_to_transform=[1], layers_pattern="layers"), "llama"),
    ("lora with layers excluded", plain(exclude_modules=["v_proj"]), "llama"),
    ("lora with dropout", plain(lora_dropout=0.1), "llama"),
    ("lora in 16 bits", sixteen_bits, "llama"),
    ("lora in a pickle", pickle, "llama"),
    ("lora, second adapter", second_adapter, "llama"),
    ("rslora", plain(use_rslora=True), "llama"),
    ("lora with ranks by pattern", plain(rank_pattern={"v_proj": 2}), "llama"),
    ("lora with alphas by pattern", plain(alpha_pattern={"v_proj": 3}), "llama"),
    ("lora with ranks and alphas by pattern", plain(
        rank_pattern={"layers.1.self_attn.v_proj": 2}, alpha_pattern={"q_proj": 3}), "llama"),
    ("lora, all biases", plain("opt", bias="all"), "opt"),
    ("lora, biases of its layers", plain("opt", bias="lora_only"), "opt"),
    ("lora with a bias of its own", plain(lora_bias=True), "llama"),
    ("lora, fan_in_fan_out", plain(fan_in_fan_out=True), "llama"),
    ("dora", plain(use_dora=True), "llama"),
    ("lora and a saved head", plain(modules_to_save=["lm_head"]), "llama"),
    ("lora and a saved head that was tied", plain("opt", modules_to_save=["lm_head"]), "opt"),
    ("lora of the embedding", embedding, "llama"),
    ("lora of the head", plain(target_modules=["q_proj", "lm_head"]), "llama"),
    ("lora and trained tokens", plain(trainable_token_indices={"embed_tokens": [5, 60, 70]}), "llama"),
    ("lora from an activated token", plain(alora_invocation_tokens=[60]), "llama"),
    ("lora, gaussian beginning", plain(init_lora_weights="gaussian"), "llama"),
    ("pissa", plain(init_lora_weights="pissa"), "llama"),
    ("pissa, converted", pissa_converted, "llama"),
    ("olora", plain(init_lora_weights="olora"), "llama"),
    ("lora with blocks repeated", plain(layer_replication=[[0, 2], [1, 2]]), "llama"),
    ("lora on a longer vocabulary", longer_vocabulary, "llama"),
    ("ia3", another_kind("IA3Config"), "llama"),
    ("prompt tuning", another_kind("PromptTuningConfig", num_virtual_tokens=3), "llama"),
    ("loha", another_kind("LoHaConfig", target_modules=["q_proj"]), "llama"),
    ("vera", another_kind("VeraConfig", r=4, target_modules=["q_proj"], projection_prng_key=0), "llama"),
]


def greedy(model, prompt):
    """Token by token without a cache, so that no version's `generate` matters; and how near a tie came."""
    tokens, answer, nearest = list(prompt), [], 1.0
    for _ in range(NEW_TOKENS):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([tokens])).logits[0, -1]
        values = logits.topk(2).values
        nearest = min(nearest, ((values[0] - values[1]) / logits.abs().max()).item())
        tokens.append(logits.argmax().item())
        answer.append(tokens[-1])
    return answer, nearest


def main():
    prompts = json.loads((WORK / "prompts.json").read_text())
    found = {}
    for number, (name, write, model_name) in enumerate(CASES):
        folder = OUT / str(number)
        torch.manual_seed(number)  # peft begins its factors at random
        try:
            model = write(folder)
            answers, nearest = zip(*[greedy(model, prompt) for prompt in prompts])
            if name == "lora, second adapter":
                folder = folder / "second"
            found[name] = dict(folder=str(folder), model=model_name, answers=answers, nearest=min(nearest))
        except Lacks as reason:
            found[name] = dict(lacks=str(reason))
        except Exception as error:  # peft's own fault: nothing that Titer could read
            found[name] = dict(fails=f"{type(error).__name__}: {error}"[:200])
    (OUT / "adapters.json").write_text(json.dumps(found))


if __name__ == "__main__":
    WORK, OUT = Path(sys.argv[1]), Path(sys.argv[2])
    OUT.mkdir()
    main()
