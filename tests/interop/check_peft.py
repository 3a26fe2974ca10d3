"""Adapters written by peft, of versions old and new: Titer reads them as peft does, or says what it does not read."""

import functools
import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

from transformers import LlamaConfig, OPTConfig

import write_adapters
from check_models import LOGIT_TOLERANCE, Case
from common import NotYet, Once, Refused, logits, numbered, random_model, require, require_close, require_equal, words

VOCABULARY, END = 120, 119
HERE = Path(__file__).parent

# Versions of peft with the libraries that they need beside them. The newest one is that of requirements.txt.
OLD = {
    "0.5.0": ["peft==0.5.0", "transformers==4.36.2", "tokenizers==0.15.2", "huggingface_hub==0.24.7",
              "accelerate==0.25.0"],
    "0.12.0": ["peft==0.12.0", "transformers==4.44.2", "tokenizers==0.19.1", "huggingface_hub==0.24.7",
               "accelerate==0.33.0"],
    "0.14.0": ["peft==0.14.0", "transformers==4.47.1", "tokenizers==0.21.0", "huggingface_hub==0.27.1",
               "accelerate==1.2.1"],
    "0.20.0": ["peft==0.20.0"],
}

# What an error must say where Titer does not read an adapter: the key, or the tensor, that it cannot do. A case that is
# not here must be read.
MAY_REFUSE = {
    "lora by a regular expression": "target_modules",
    "lora of one block": "layers_to_transform",
    "lora of one block, pattern named": "layers_to_transform",
    "lora with layers excluded": "exclude_modules",
    "lora in a pickle": "adapter_model.bin",
    "lora with ranks by pattern": "rank_pattern",
    "lora with alphas by pattern": "alpha_pattern",
    "lora with ranks and alphas by pattern": "rank_pattern",
    "lora, all biases": "bias",
    "lora, biases of its layers": "bias",
    "lora with a bias of its own": "lora_bias",
    "lora, fan_in_fan_out": "fan_in_fan_out",
    "dora": "use_dora",
    "lora and a saved head": "modules_to_save",
    "lora and a saved head that was tied": "modules_to_save",
    "lora of the embedding": "embed_tokens",
    "lora of the head": "lm_head",
    "lora and trained tokens": "trainable_token_indices",
    "lora from an activated token": "alora_invocation_tokens",
    "pissa": "init_lora_weights",
    "olora": "init_lora_weights",
    "lora with blocks repeated": "layer_replication",
    "lora on a longer vocabulary": "lm_head",
    "ia3": "peft_type",
    "prompt tuning": "peft_type",
    "loha": "peft_type",
    "vera": "peft_type",
}


def write_models(folder):
    """A Llama and an OPT whose answers are their tokens, and prompts."""
    sizes = dict(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, eos_token_id=2,
                 bos_token_id=1, pad_token_id=0, max_position_embeddings=64)
    kinds = dict(
        llama=LlamaConfig(intermediate_size=48, num_key_value_heads=2, **sizes),
        opt=OPTConfig(ffn_dim=48, word_embed_proj_dim=32, **sizes),
    )
    for name, config in kinds.items():
        model = random_model(config)
        model.generation_config.eos_token_id = END
        model.save_pretrained(folder / name)
        numbered(VOCABULARY).save_pretrained(folder / name)
    prompts = [[1, 50, 60, 70], [1, 60], [1, *range(40, 60)]]
    (folder / "prompts.json").write_text(json.dumps(prompts))


def install(version, cache):
    """A folder with an old peft, made once. It lies before the newer libraries on the path and leaves torch to them."""
    folder = cache / f"peft-{version}"
    if not folder.exists():
        unfinished = cache / f"peft-{version}-unfinished-{os.getpid()}"
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps",
                   "--target", str(unfinished), *OLD[version]]
        subprocess.run(command, check=True, timeout=600)
        unfinished.rename(folder)
    return folder


def script(version, cache, name, *arguments):
    """Runs one of our scripts with this peft."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if version in OLD:
        environment["PYTHONPATH"] = str(install(version, cache))
    command = [sys.executable, str(HERE / name), *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    require(done.returncode == 0, f"{name} fails with peft {version}: {done.stderr[-400:]}")


def write(folder, version, cache):
    """Every adapter that this peft can write, and what it answers."""
    out = folder / f"by-{version}"
    script(version, cache, "write_adapters.py", folder, out)
    return json.loads((out / "adapters.json").read_text())


def read(titer, folder, case, version, cache):
    """What Titer exports, read by this peft and its transformers."""
    adapter = case.once("peft", lambda: titer.export(case.run(), "peft", case.folder / "peft"))
    out = folder / f"read-by-{version}.json"
    tokens = case.prompts[2]
    script(version, cache, "read_exports.py", case.folder / "model", adapter, case.exported(), tokens, out)
    found = json.loads(out.read_text())
    require(not found["warnings"], f"the client warns: {found['warnings']}")
    expected = logits(case.attacked(), tokens)
    differ = lambda name: require_close(found[name], expected, LOGIT_TOLERANCE, f"logits, {name}")
    return f"largest logit difference {max(differ('adapter'), differ('merged')):.1e}"


def check(titer, folder, written, name):
    case = written()[name]
    if "lacks" in case:
        raise NotYet("not in this peft")
    if "fails" in case:
        raise NotYet("not in this peft")
    prompts = json.loads((folder / "prompts.json").read_text())
    ask = lambda *more: titer.generate(
        folder / case["model"], map(words, prompts), *more, tokens=write_adapters.NEW_TOKENS
    ).splitlines()
    ended = lambda answer: answer[: answer.index(END)] if END in answer else answer
    expected = [words(ended(answer)) for answer in case["answers"]]
    try:
        found = ask("--adapter", case["folder"])
    except Refused as error:
        key = MAY_REFUSE.get(name)
        require(key, f"refused: {error}")
        require(key in str(error), f"the refusal does not name `{key}`: {error}")
        return f"refused, names `{key}`"
    require(case["nearest"] > 1e-5, "the check is weak: rounding decides an answer")
    require(expected != ask(), "the check is weak: the adapter changes no answer")
    require_equal(found, expected, "greedy tokens")
    return "read"


def checks(titer, folder, cache):
    """All checks: name and function."""
    write_models(folder)
    newest = importlib.metadata.version("peft")
    case, once = Case(titer, folder / "run", LlamaConfig, {}), Once()
    for version in [*OLD, newest]:
        yield f"{version}: exports of Titer", functools.partial(read, titer, folder, case, version, cache)
        written = functools.partial(once, version, functools.partial(write, folder, version, cache))
        for name, *_ in write_adapters.CASES:
            yield f"{version}: {name}", functools.partial(check, titer, folder, written, name)
