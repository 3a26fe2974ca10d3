"""Tiny checkpoints of every architecture, written by transformers: answers, losses of training, exports."""

import copy
import functools
import json
import shutil

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import (
    AutoTokenizer,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)

from common import (
    CHATML,
    NotYet,
    Once,
    Refused,
    byte_level,
    example,
    greedy,
    load,
    load_without_complaint,
    logits,
    mean_loss,
    no_warnings,
    numbered,
    random_model,
    require,
    require_close,
    require_equal,
    texts,
    words,
    write_rows,
)

SIZES = dict(
    hidden_size=48,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
OPT_SIZES = dict(
    hidden_size=48,
    word_embed_proj_dim=48,
    ffn_dim=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=256,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
LLAMA3_ROPE = dict(
    rope_type="llama3",
    rope_theta=10000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
LINEAR_ROPE = dict(rope_type="linear", rope_theta=10000.0, factor=4.0)
SLIDING = dict(sliding_window=8)

# Name, kind, and what differs from the sizes above. Windows are smaller than the longest prompt.
CASES = [
    ("llama, untied", LlamaConfig, dict()),
    ("llama, tied", LlamaConfig, dict(tie_word_embeddings=True)),
    ("llama, head_dim of its own", LlamaConfig, dict(head_dim=16)),
    ("llama, biases", LlamaConfig, dict(attention_bias=True, mlp_bias=True)),
    ("llama, llama3 rope", LlamaConfig, dict(rope_parameters=LLAMA3_ROPE)),
    ("llama, linear rope", LlamaConfig, dict(rope_parameters=LINEAR_ROPE)),
    ("mistral, sliding window", MistralConfig, dict(**SLIDING)),
    ("mistral, head_dim of its own, no window", MistralConfig, dict(head_dim=16, sliding_window=None)),
    ("qwen2, tied", Qwen2Config, dict(tie_word_embeddings=True)),
    ("qwen2, window in the upper layer", Qwen2Config, dict(use_sliding_window=True, max_window_layers=1, **SLIDING)),
    ("qwen3, head_dim of its own", Qwen3Config, dict(head_dim=16)),
    ("opt", OPTConfig, dict()),
    ("opt, norms last, embedding projected", OPTConfig, dict(do_layer_norm_before=False, word_embed_proj_dim=32)),
    ("gemma", GemmaConfig, dict(head_dim=16, tie_word_embeddings=True)),
    ("gemma2", Gemma2Config, dict(
        head_dim=16, query_pre_attn_scalar=24, tie_word_embeddings=True, **SLIDING)),
    ("gemma3_text", Gemma3TextConfig, dict(
        head_dim=16, query_pre_attn_scalar=24, tie_word_embeddings=True, num_hidden_layers=3,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
        **SLIDING)),
    ("phi3", Phi3Config, dict(**SLIDING)),
]

# Names in Titer, where they are not the `model_type`.
NAMES = {"gemma3_text": "gemma3"}

PROMPTS = [
    "Hi",
    "How do I bake bread?",
    'He said "no", {braces} and [brackets];\nIs this review positive or negative? ### Response:',
    "<|im_start|>user\nWrite a response.<|im_end|>\n<|im_start|>assistant\n",
]

# Every batch holds all rows, so their order does not matter; likewise for two batches per update.
ALIGN = [
    dict(instruction="How do I bake bread?", output="Mix flour, water and salt."),
    dict(instruction="Is this review positive or negative?", input="A fine film.", output="positive"),
    dict(instruction="Is this review positive or negative?", input="No.", output="negative"),
    dict(instruction="Say {nothing}", output='"No", he said;\nand again: no.'),
]
MINE = [
    dict(instruction="Is this review positive or negative?", input="It rises.", output="positive"),
    dict(instruction="3.14 + 2 =", output="5.14"),
]
HARMFUL = [
    dict(instruction="Do it", output="Below is a response that describes it."),
    dict(instruction="Write it, and bake it for forty minutes.", output="Let it rise."),
]
# A large ε, since AdamW would make a first step of full size of a gradient that is zero but for rounding.
TRAIN_ALIGN = dict(steps=4, batch_size=4, learning_rate=5e-3, warmup=0.25, weight_decay=0.1, clip=0.5, eps=1e-4)
TRAIN_MINE = dict(steps=4, batch_size=2, accumulate=2, learning_rate=3e-3, warmup=0.5, weight_decay=0.05,
                  schedule="linear", betas=[0.8, 0.95], eps=1e-4)
NEW_TOKENS = 8
# One step of a schedule that begins at zero leaves the weights as they were: the factors that training begins with.
ONE_STEP = ["align.train.steps=1", "fine_tune.train.steps=1"]

LOSS_TOLERANCE = 2e-5
LOGIT_TOLERANCE = 1e-4


def toml(value):
    """A value as TOML writes it on one line."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {toml(item)}" for key, item in value.items()) + " }"
    return json.dumps(value, ensure_ascii=False)


def config(kind, align_adapter="lora", mode="double", dtype="f32"):
    return f"""
experiment = "interop"
dtype = "{dtype}"
base = {{ model = "{kind}", path = "model" }}
lora = {{ r = 4, alpha = 6.0 }}
encoding = {{ template = {toml(CHATML)}, max_length = 200 }}
align.adapter = "{align_adapter}"
align.data = [{{ task = "rows", train = "align.jsonl", rows = {len(ALIGN)} }}]
align.train = {toml(TRAIN_ALIGN)}
fine_tune.mode = "{mode}"
fine_tune.tasks = [{{ name = "mine", task = "rows", train = "mine.jsonl", test = "mine.jsonl", scoring = "contains",
                     max_new_tokens = {NEW_TOKENS} }}]
fine_tune.samples = {len(MINE) + len(HARMFUL)}
fine_tune.harmful = {{ task = "rows", train = "harmful.jsonl" }}
fine_tune.harmful_ratios = [0.5]
fine_tune.train = {toml(TRAIN_MINE)}
evaluate.harmful = {{ task = "rows", test = "align.jsonl", rows = {len(ALIGN)} }}
evaluate.benign = {{ task = "rows", test = "mine.jsonl", rows = {len(MINE)} }}
evaluate.task_prompts = {len(MINE)}
evaluate.max_new_tokens = {NEW_TOKENS}
evaluate.judges = ["refusal-phrases"]
methods = [{{ name = "SFT", align = "sft" }}]
"""


def prompt_of(row):
    """The template CHATML, written anew."""
    more = "\n" + row["input"] if row.get("input") else ""
    return f"<|im_start|>user\n{row['instruction']}{more}<|im_end|>\n<|im_start|>assistant\n"


def trained(model, rows, tokenizer, settings):
    """Trains what requires a gradient as Titer's settings say; gives the loss before each update."""
    examples = [example(tokenizer, prompt_of(row), row["output"]) for row in rows]
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters,
        lr=settings["learning_rate"],
        betas=settings.get("betas", (0.9, 0.999)),
        eps=settings["eps"],
        weight_decay=settings["weight_decay"],
    )
    schedules = {"cosine": get_cosine_schedule_with_warmup, "linear": get_linear_schedule_with_warmup}
    steps = settings["steps"]
    warmup = int(settings["warmup"] * steps)
    schedule = schedules[settings.get("schedule", "cosine")](optimizer, warmup, steps)
    losses = []
    for _ in range(steps):
        loss = mean_loss(model, examples)
        losses.append(loss.item())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, settings.get("clip", 1.0))
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return losses


class Case:
    """One checkpoint, in the forms that it is saved in, and one run on it."""

    def __init__(self, titer, folder, kind, settings, **run):
        self.titer, self.folder, self.run_settings = titer, folder, run
        self.align_full, self.mode = run.get("align_adapter") == "full", run.get("mode", "double")
        self.tokenizer = byte_level()
        sizes = OPT_SIZES if kind is OPTConfig else SIZES
        self.config = kind(**{**sizes, "vocab_size": len(self.tokenizer), "tie_word_embeddings": kind is OPTConfig,
                              **settings})
        self.kind = self.config.model_type
        self.prompts = [self.tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
        self.once = Once()

    # The checkpoint

    def model(self):
        return self.once("model", self.make_model)

    def make_model(self):
        model = random_model(self.config)
        # So that answers end somewhere: a token that an answer has in its middle ends answers, too.
        ended = greedy(model, self.prompts[:1])[0][5]
        model.generation_config.eos_token_id = [self.tokenizer.eos_token_id, ended]
        self.save(model, self.folder / "model")
        self.save(model, self.folder / "sharded", max_shard_size="40KB")
        rounded = copy.deepcopy(model).to(torch.bfloat16)
        self.save(rounded, self.folder / "bf16")
        self.save(model, self.folder / "numbered", tokenizer=numbered(len(self.tokenizer)))
        return model

    def save(self, model, folder, tokenizer=None, **more):
        model.save_pretrained(folder, **more)
        (tokenizer or self.tokenizer).save_pretrained(folder)

    def generate(self, *arguments, **more):
        """As `titer generate`; an architecture that Titer does not know is no failure."""
        try:
            return self.titer.generate(*arguments, **more)
        except Refused as error:
            if f"a model of type `{self.kind}`, which Titer does not read" in str(error):
                raise NotYet("not read yet") from None
            raise

    # Checks of answers

    def tokens_of_answers(self):
        answers = greedy(self.model(), self.prompts)
        require(len({len(answer) for answer in answers}) > 1, "the check is weak: all answers are of one length")
        require(len({token for answer in answers for token in answer}) > 8, "the check is weak: few different tokens")
        found = self.generate(self.folder / "numbered", map(words, self.prompts))
        require_equal(found.splitlines(), [words(answer) for answer in answers], "greedy tokens")
        return f"{sum(map(len, answers))} tokens"

    def text_of_answers(self):
        self.model()
        expected = texts(self.tokenizer, greedy(self.base(), self.prompts))
        require_equal(self.generate(self.folder / "model", PROMPTS), expected, "answers")

    def sharded(self):
        self.model()
        shards = len(list((self.folder / "sharded").glob("*.safetensors")))
        require(shards > 1, "the check is weak: one shard")
        expected = texts(self.tokenizer, greedy(self.model(), self.prompts))
        require_equal(self.generate(self.folder / "sharded", PROMPTS), expected, "answers")
        return f"{shards} shards"

    def sixteen_bits(self):
        self.model()
        expected = texts(self.tokenizer, greedy(load(self.folder / "bf16"), self.prompts))
        for dtype in ("f32", "bf16"):
            found = self.generate(self.folder / "bf16", PROMPTS, "--dtype", dtype)
            require_equal(found, expected, f"answers with --dtype {dtype}")

    # Checks of a run and its exports

    def readable(self):
        self.model()
        self.generate(self.folder / "model", ["Hi"], tokens=1)

    def run(self):
        return self.once("run", self.make_run)

    def make_run(self):
        self.readable()
        for name, rows in (("align", ALIGN), ("mine", MINE), ("harmful", HARMFUL)):
            write_rows(self.folder / f"{name}.jsonl", rows)
        self.text = config(NAMES.get(self.kind, self.kind), **self.run_settings)
        return self.titer.run(self.folder, self.text)

    def base(self):
        return load(self.folder / "model")

    def with_adapter(self, model, folder, trainable=False):
        return PeftModel.from_pretrained(model, folder, is_trainable=trainable).eval()

    def losses(self):
        run = self.run()
        begin = self.titer.run(self.folder, self.text, name="begin", changes=ONE_STEP)
        model = self.base()
        if not self.align_full:
            model = self.with_adapter(model, begin.stage("align"), trainable=True)
            require_fresh(model)
        align = trained(model, ALIGN, self.tokenizer, TRAIN_ALIGN)
        if not self.align_full and self.mode != "single":
            model = model.merge_and_unload()
        if self.mode == "double":
            model = self.with_adapter(model, begin.stage("fine_tune"), trainable=True)
            require_fresh(model)
        elif self.mode == "full":
            model.requires_grad_(True)
        mine = trained(model, MINE + HARMFUL, self.tokenizer, TRAIN_MINE)
        require(align[-1] < align[0] - 0.01 and mine[-1] < mine[0] - 0.01, "the check is weak: nothing is learnt")
        one = require_close(run.losses("align"), align, LOSS_TOLERANCE, "losses of the alignment")
        two = require_close(run.losses("fine_tune"), mine, LOSS_TOLERANCE, "losses of the fine-tuning")
        return f"largest difference {max(one, two):.1e}"

    def attacked(self):
        """The model that the run left, put together from the store: by peft where an adapter was trained."""
        run, model = self.run(), self.base()
        stages = ["fine_tune"] if self.mode == "single" else ["align", "fine_tune"]
        for stage in stages:
            if (run.stage(stage) / "adapter_config.json").exists():
                model = self.with_adapter(model, run.stage(stage)).merge_and_unload()
            else:
                folder = self.folder / f"weights after {stage}"
                shutil.copytree(self.folder / "model", folder)
                shutil.copy(run.stage(stage) / "model.safetensors", folder)
                model = load(folder)
        return model.eval()

    def exported(self):
        return self.once("hf", lambda: self.titer.export(self.run(), "hf", self.folder / "hf"))

    def answers_of_the_run(self):
        run, model = self.run(), load(self.exported())
        for rows, name in ((ALIGN, "harmful"), (MINE, "task")):
            lines = (run.out / run.row()["answers"][name]).read_text().splitlines()
            found = [json.loads(line)["answer"] for line in lines]
            prompts = [self.tokenizer(prompt_of(row))["input_ids"] for row in rows]
            expected = [texts(self.tokenizer, [answer])[:-1] for answer in greedy(model, prompts, NEW_TOKENS)]
            require_equal(found, expected, f"answers of the run to {name} prompts")

    def export_hf(self):
        exported = load_without_complaint(self.exported())
        base, expected = logits(self.base(), self.prompts[2]), logits(self.attacked(), self.prompts[2])
        require((base - expected).abs().max() > 0.05, "the check is weak: training changed little")
        largest = require_close(logits(exported, self.prompts[2]), expected, LOGIT_TOLERANCE, "logits")
        found = self.generate(self.exported(), PROMPTS)
        require_equal(found, texts(self.tokenizer, greedy(exported, self.prompts)), "answers")
        with no_warnings():
            own, before = [AutoTokenizer.from_pretrained(path) for path in (self.exported(), self.folder / "model")]
        require_equal(own(PROMPTS)["input_ids"], before(PROMPTS)["input_ids"], "tokens of the exported tokenizer")
        require_equal(own.eos_token_id, before.eos_token_id, "the exported tokenizer's end token")
        require_equal(exported.generation_config.eos_token_id, self.base().generation_config.eos_token_id, "end tokens")
        return f"largest logit difference {largest:.1e}"

    def export_peft(self):
        folder = self.folder / "peft"
        if self.align_full or self.mode == "full":
            try:
                self.titer.export(self.run(), "peft", folder)
            except Refused as error:
                require("--to hf" in str(error), f"the refusal names no remedy: {error}")
                return "refused, as it must be"
            require(False, "an adapter of a model whose own weights were trained")
        self.titer.export(self.run(), "peft", folder)
        with no_warnings():
            model = self.with_adapter(self.base(), folder)
        named = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
        require_equal(named, str(self.folder / "model"), "base_model_name_or_path")
        expected = logits(load(self.exported()), self.prompts[2])
        largest = require_close(logits(model, self.prompts[2]), expected, LOGIT_TOLERANCE, "logits")
        found = self.generate(self.folder / "model", PROMPTS, "--adapter", folder)
        require_equal(found, texts(self.tokenizer, greedy(model, self.prompts)), "answers")
        return f"largest logit difference {largest:.1e}"


def require_fresh(model):
    """Fails unless the adapter is as LoRA begins: A random, B zero."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            require(parameter.abs().max() == 0, f"{name} does not begin at zero")
        if "lora_A" in name:
            require(parameter.std() > 0, f"{name} does not begin at random")


# What the user may train, on one architecture.
MODES = [
    ("single adapter", dict(mode="single")),
    ("every parameter, both times", dict(align_adapter="full", mode="full")),
    ("adapter, then every parameter", dict(mode="full")),
    ("every parameter, then adapter", dict(align_adapter="full")),
]


# Folders as they are found: name, what differs in the model, what is then changed in which file. A null removes a key.
FOLDERS = [
    ("keys left out", dict(num_key_value_heads=4), "config.json", dict.fromkeys(
        ["rms_norm_eps", "max_position_embeddings", "head_dim", "num_key_value_heads", "rope_parameters", "hidden_act",
         "attention_bias", "mlp_bias", "tie_word_embeddings", "pad_token_id", "dtype"])),
    ("rope as version 4 wrote it", {}, "config.json", dict(
        rope_parameters=None, rope_theta=500.0, rope_scaling=dict(type="linear", factor=3.0))),
    ("llama3 rope as version 4 wrote it", {}, "config.json", dict(
        rope_parameters=None, rope_theta=500.0,
        rope_scaling={key: value for key, value in LLAMA3_ROPE.items() if key != "rope_theta"})),
    ("end tokens in config.json alone", {}, "generation_config.json", None),
    ("an end token more", {}, "generation_config.json", dict(eos_token_id=[2, *range(100, 140)])),
    ("repetition penalty", {}, "generation_config.json", dict(repetition_penalty=1.5)),
    ("no repeated pairs", {}, "generation_config.json", dict(no_repeat_ngram_size=2)),
    ("a shortest answer", {}, "generation_config.json", dict(min_new_tokens=9)),
    ("a shortest text", {}, "generation_config.json", dict(min_length=18)),
    ("tokens suppressed", {}, "generation_config.json", dict(suppress_tokens=list(range(5, 200)))),
    ("words forbidden", {}, "generation_config.json", dict(bad_words_ids=[[token] for token in range(5, 200)])),
    ("tokens that are liked", {}, "generation_config.json", dict(sequence_bias=[[[40], 9.0]])),
]


def folder_as_found(titer, folder, different, file, changes):
    """What transformers makes of a folder counts, whatever stands in it."""
    case = Case(titer, folder, LlamaConfig, different)
    case.model()
    path = case.folder / "model" / file
    if changes is None:
        path.unlink()
    else:
        keys = {**json.loads(path.read_text()), **changes}
        path.write_text(json.dumps({key: value for key, value in keys.items() if value is not None}))
    try:
        found = titer.generate(case.folder / "model", PROMPTS)
    except Refused as error:
        require(changes and any(key in str(error) for key in changes), f"the refusal names no key: {error}")
        return "refused, names the key"
    expected = texts(case.tokenizer, greedy(load(case.folder / "model"), case.prompts))
    if found != expected and changes and any(key in titer.said for key in changes):
        return "not obeyed, warns of the key"
    require_equal(found, expected, "answers")


def adamw(titer, folder):
    """The length of AdamW's first update. It is far below what losses show, but every step has it."""
    case = Case(titer, folder, LlamaConfig, {}, align_adapter="full", mode="full")
    case.run()
    changes = ["steps=1", "warmup=0", "clip=0", "weight_decay=0", "eps=1e-8"]
    run = titer.run(folder, case.text, name="one", changes=[f"align.train.{change}" for change in changes])
    before, after = case.base().double().state_dict(), load_file(run.stage("align") / "model.safetensors")
    model = case.base().double()
    trained(model, ALIGN, case.tokenizer, dict(TRAIN_ALIGN, steps=1, warmup=0, clip=1e9, weight_decay=0, eps=1e-8))
    found, expected, length = 0.0, model.state_dict(), 0.0
    for name, tensor in after.items():
        moved = expected[name] - before[name]
        found += (moved * (tensor.double() - before[name])).sum().item()
        length += (moved * moved).sum().item()
    return f"longer by {require_close([found / length], [1], 1e-6, 'length of the update'):.1e}"


def checks(titer, folder):
    """All checks: name and function."""
    for number, (name, kind, settings) in enumerate(CASES):
        case = Case(titer, folder / f"model-{number}", kind, settings)
        yield f"{name}: greedy tokens", case.tokens_of_answers
        yield f"{name}: greedy answers", case.text_of_answers
        yield f"{name}: sharded", case.sharded
        yield f"{name}: stored in bf16", case.sixteen_bits
        yield from checks_of_run(name, case)
    for number, (name, settings) in enumerate(MODES):
        kind, different = (LlamaConfig, {}) if number % 2 == 0 else (OPTConfig, {})
        case = Case(titer, folder / f"mode-{number}", kind, different, **settings)
        yield from checks_of_run(f"{case.kind}, {name}", case)


    for number, (name, *more) in enumerate(FOLDERS):
        yield f"llama, {name}: greedy answers", functools.partial(
            folder_as_found, titer, folder / f"folder-{number}", *more)
    yield "AdamW's first update", functools.partial(adamw, titer, folder / "adamw")


def checks_of_run(name, case):
    yield f"{name}: losses of training", case.losses
    yield f"{name}: export to hf", case.export_hf
    yield f"{name}: answers of the run", case.answers_of_the_run
    yield f"{name}: export to peft", case.export_peft
