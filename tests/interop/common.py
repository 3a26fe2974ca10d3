"""What the parts share: the binary under test, the list of results, small tokenizers, checkpoints and rows."""

import json
import logging
import os
import subprocess
import warnings
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: nothing may be looked up

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

transformers_logging.disable_progress_bar()
warnings.simplefilter("ignore", FutureWarning)
torch.set_num_threads(1)


class Difference(Exception):
    """Titer and the client do not agree."""


class NotYet(Exception):
    """Titer says that it does not know this yet, so there is nothing to compare."""


def require(condition, message):
    if not condition:
        raise Difference(message)


def require_equal(found, expected, what):
    require(found == expected, f"{what}: Titer has {short(found)}, the client {short(expected)}")


def short(value, most=300):
    text = repr(value)
    return text if len(text) <= most else text[:most] + "…"


def require_close(found, expected, tolerance, what):
    """Fails unless two tensors or lists of numbers agree; gives the largest difference."""
    found, expected = torch.as_tensor(found, dtype=torch.float64), torch.as_tensor(expected, dtype=torch.float64)
    require(found.shape == expected.shape, f"{what}: shapes {tuple(found.shape)} and {tuple(expected.shape)}")
    largest = (found - expected).abs().max().item()
    # Not `>`, which would let a NaN pass.
    require(largest <= tolerance, f"{what}: differs by {largest:.2e}, more than {tolerance:.0e}")
    return largest


class Once:
    """Makes a thing when it is first asked for. If that failed for one check, it fails for the next one too."""

    def __init__(self):
        self.made = {}

    def __call__(self, name, make):
        if name not in self.made:
            try:
                self.made[name] = (make(), None)
            except Exception as error:
                self.made[name] = (None, error)
        value, error = self.made[name]
        if error:
            raise error
        return value


@dataclass
class Results:
    """One entry for each check."""

    folder: str = ""  # where everything is made: nothing for a reader of the table
    entries: list = field(default_factory=list)

    def check(self, part, name, function):
        """Runs a check. It returns the figure for the table, or raises."""
        try:
            result, figure = "holds", function() or ""
        except NotYet as reason:
            result, figure = str(reason), ""
        except Difference as difference:
            result, figure = "FAILS", str(difference)
        except Exception as error:  # A client that fails on what Titer wrote is a difference, too.
            result, figure = "FAILS", short(f"{type(error).__name__}: {error}", 600)
        figure = figure.replace(f"{self.folder}/", "") if self.folder else figure
        self.entries.append((part, name, result, figure))
        print(f"{part}: {name}: {result}" + (f" ({figure})" if figure else ""), flush=True)

    def failed(self):
        return [entry for entry in self.entries if entry[2] == "FAILS"]


class Refused(Exception):
    """Titer ended with an error; the text is what it printed."""


@dataclass
class Run:
    """A finished run: its folder and its store."""

    out: Path
    store: Path

    def row(self):
        """The only cell."""
        (row,) = json.loads((self.out / "results.json").read_text())["rows"]
        return row

    def stage(self, name):
        """The folder of the store that holds what a stage of the only cell left."""
        return self.store / "stages" / self.row()["artifacts"][name]

    def losses(self, stage):
        return json.loads((self.stage(stage) / "record.json").read_text())["loss"]


@dataclass
class Titer:
    """The binary."""

    binary: Path
    said: str = ""  # what the last call printed beside its result: warnings

    def call(self, *arguments):
        """What it prints. What the user has set must not reach it."""
        environment = {key: value for key, value in os.environ.items() if not key.startswith("TITER_")}
        command = [str(self.binary), *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, env=environment, timeout=300)
        self.said = done.stderr.decode()
        if done.returncode != 0:
            raise Refused(self.said)
        return done.stdout.decode()

    def generate(self, model, prompts, *more, template="{{ instruction }}", tokens=16):
        """The answers to all prompts, in one batch; each ends in a newline."""
        arguments = ["--device", "cpu", "--template", template, "--max-new-tokens", tokens, *more]
        # With `=`, since a prompt may begin with a dash.
        return self.call("generate", "--model", model, *arguments, *[f"--prompt={prompt}" for prompt in prompts])

    def run(self, folder, config, name="run", changes=()):
        """A run of a configuration, beside the files that it names."""
        path = folder / f"{name}.toml"
        path.write_text(config)
        run = Run(folder / name, folder / "store")
        sets = [argument for change in changes for argument in ("--set", change)]
        self.call("run", path, "--device", "cpu", "--store", run.store, "--out", run.out, *sets)
        return run

    def export(self, run, form, out, *more):
        self.call("export", run.out, run.row()["id"], "--to", form, "--out", out, "--store", run.store, *more)
        return out


@contextmanager
def no_warnings():
    """Fails if a client warns within."""
    found = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: found.append(record.getMessage())
    loggers = [logging.getLogger(name) for name in ("transformers", "peft", "safetensors", "tokenizers")]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            # Libraries of libraries announce removals, which says nothing of the files.
            warnings.simplefilter("ignore", DeprecationWarning)
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
    found += [str(warning.message) for warning in caught]
    require(not found, f"the client warns: {short(found)}")


# Tokenizers

PAD, BOS, EOS = "<pad>", "<s>", "</s>"
MARKERS = ["<|im_start|>", "<|im_end|>"]
TEXTS = [
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.",
    "### Instruction: Is this review positive or negative? ### Response: positive",
    "How do I bake bread? Mix flour, water, salt and yeast, let it rise, then bake it for forty minutes.",
    'He said "no", {braces} and [brackets]; 3.14 + 2 = 5.14.',
]
# No line break follows a tag: as in transformers, the one after it would be left out.
CHATML = (
    "<|im_start|>user\n{{ instruction }}{% if input %}{{ '\n' ~ input }}{% endif %}<|im_end|>\n"
    "<|im_start|>assistant\n"
)


def byte_level(special=(PAD, BOS, EOS, *MARKERS), split=None):
    """A byte-level BPE tokenizer that begins every text with BOS."""
    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level]) if split else byte_level
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=360, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS * 4, trainer)
    begin_with_bos(tokenizer)
    return wrapped(tokenizer)


def begin_with_bos(tokenizer):
    bos = (BOS, tokenizer.token_to_id(BOS))
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[bos])


def wrapped(tokenizer, **more):
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD, **more)


def numbered(size):
    """A tokenizer whose words are the ids, so that the text of an answer is its tokens: `t5 t17`."""
    tokenizer = Tokenizer(models.WordLevel({word(token): token for token in range(size)}, unk_token=word(0)))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def word(token):
    return f"t{token}"


def words(tokens):
    return " ".join(map(word, tokens))


# Checkpoints

# Two logits that are closer than this part of the largest one: either may be picked. Take another seed.
NEAR_TIE = 1e-5


def random_model(config, seed=1):
    """A model with random numbers everywhere: fresh biases are zero and fresh norms one, which would hide errors."""
    # A head that shares a large embedding only repeats the last token. In OPT, norms hide a small one.
    embedding = 0.2 if config.model_type == "opt" else 0.05
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            scale = 0.1 if parameter.ndim == 1 else embedding if "embed_tokens" in name else 0.25
            parameter.copy_(parameter + scale * noise if parameter.ndim == 1 else scale * noise)
    return model


def load(folder):
    """A model as transformers reads it, with the plain attention that knows every feature."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    return model.eval()


def load_without_complaint(folder):
    """Likewise, and nothing may be missing, left over or warned of."""
    with no_warnings():
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
        )
    complaints = {key: value for key, value in info.items() if value}
    require(not complaints, f"transformers complains of the weights: {short(complaints)}")
    return model.eval()


def logits(model, tokens):
    with torch.no_grad():
        return model(input_ids=torch.tensor([tokens])).logits[0]


def greedy(model, prompts, most=16):
    """The greedy continuation of each prompt, a list of tokens, without the one that ended it."""
    answers = []
    for prompt in prompts:
        tokens = torch.tensor([prompt])
        with torch.no_grad():
            whole = model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=most,
                do_sample=False,
                return_dict_in_generate=True,
                output_logits=True,
            )
        for scores in whole.logits:
            first, second = scores[0].topk(2).values.tolist()
            require(first - second > NEAR_TIE * scores.abs().max(), "the check is weak: rounding decides an answer")
        answer = whole.sequences[0, len(prompt) :].tolist()
        ends = model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        answers.append(answer[:-1] if answer and answer[-1] in ends else answer)
    return answers


def texts(tokenizer, answers):
    """As `titer generate` prints them."""
    decode = lambda tokens: tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return "".join(decode(tokens) + "\n" for tokens in answers)


# Rows


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def example(tokenizer, prompt, answer):
    """The tokens of a training row and its labels, -100 where the loss does not look.

    Prompt and answer are tokenized as one text, and labels begin behind the prompt's tokens, as usual. Where the two
    texts share a token, they begin with that one.
    """
    encoding = tokenizer(prompt + answer, return_offsets_mapping=True)
    before, tokens = tokenizer(prompt)["input_ids"], encoding["input_ids"]
    first = len(before)
    if tokens[:first] != before:
        first = next(at for at, (_, end) in enumerate(encoding["offset_mapping"]) if end > len(prompt))
    tokens = tokens + [tokenizer.eos_token_id]
    return tokens, [-100] * first + tokens[first:]


def mean_loss(model, examples):
    """The mean loss of all labels of some rows, one row at a time, so that no padding can matter."""
    total, count = 0.0, 0
    for tokens, labels in examples:
        scores = model(input_ids=torch.tensor([tokens])).logits[0, :-1]
        targets = torch.tensor(labels[1:])
        total = total + torch.nn.functional.cross_entropy(scores, targets, ignore_index=-100, reduction="sum")
        count += (targets != -100).sum().item()
    return total / count
