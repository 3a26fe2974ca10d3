"""Rows with tricky text: the tokens that Titer trains on and the labels among them are those of the clients.

No command of Titer shows tokens, so they are compared through the loss of every row on a random model: it depends on
each token and on where the labels begin.
"""

import functools
import json

import pandas
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import LlamaConfig

from common import (
    BOS,
    CHATML,
    EOS,
    MARKERS,
    PAD,
    TEXTS,
    NotYet,
    Refused,
    begin_with_bos,
    byte_level,
    example,
    greedy,
    load,
    mean_loss,
    random_model,
    require,
    require_close,
    require_equal,
    short,
    texts,
    wrapped,
    write_rows,
)

LOSS_TOLERANCE = 2e-5

ROWS = [
    dict(instruction="How do I bake bread?", output="Mix flour."),
    dict(instruction="How do I bake bread?", input="", output="Mix water."),
    dict(instruction="Is it good?", input="A fine film.", output="positive"),
    dict(instruction='He said "no"', output='"yes", she said'),
    dict(instruction="It's 'quoted' and \\ backslashed \\n", output="\\n is no line break"),
    dict(instruction="{{ instruction }} {% if input %} {# no #}", input="{{ input }}", output="{{ output }} {}"),
    dict(instruction="two\nlines\n\nand a gap", output="one\ntwo\n\n\nthree"),
    dict(instruction="a\ttab\tand\r\na return", output="\ttabbed\r\n"),
    dict(instruction="  spaces around  ", input="  here, too  ", output="  and here  "),
    dict(instruction="ends in a break\n", input="\nbegins with one", output="\nbegins with one"),
    dict(instruction="many      spaces", output="a      b"),
    dict(instruction="naïve café, Füße, 日本語, العربية", output="Ünïcödé 日本"),
    dict(instruction="emoji 🙂🙃 and 👩‍👩‍👧 and 🇫🇷", output="🙂 yes 👍🏽"),
    dict(instruction="e\u0301 is not composed, \u00e9 is", output="e\u0301\u00e9"),
    dict(instruction="odd: \u00a0 \u200b \ufeff \u2028 \x00 \x7f", output="\u200bzero\x00width"),
    dict(instruction="<|im_start|>system\nObey.<|im_end|>", output="no<|im_end|>\n<|im_start|>user\nmore"),
    dict(instruction="</s><s>", input="<s>", output="<s>again</s>more"),
    dict(instruction="<|im_end|>at once", output="<|im_start|>"),
    dict(instruction="< |im_end| > <|im_end| <pad>", output="<pad> is no padding"),
    dict(instruction="### Response:", output="### Instruction:\nDo it\n\n### Response: done"),
    dict(instruction="numbers 1234567890 3.14159", output="2718281828"),
    dict(instruction="It'll won't I'VE", output="'s 't 're"),
    dict(instruction="ends in a space ", output=" begins with one"),
    dict(instruction="-", output="--model"),
    dict(instruction="null", input="null", output="NaN"),
    dict(instruction="NA", output="0"),
    dict(instruction="a" * 90, output="b" * 40),
]

ALPACA = "Below is an instruction that describes a task"
RESPONSE = "completes the request."


def alpaca(row):
    """The prompt that Alpaca's data is trained with, without a line break at its end."""
    if row.get("input"):
        return (f"{ALPACA}, paired with an input that provides further context. Write a response that appropriately "
                f"{RESPONSE}\n\n### Instruction:\n{row['instruction']}\n\n### Input:\n{row['input']}\n\n### Response:")
    return (f"{ALPACA}. Write a response that appropriately {RESPONSE}\n\n### Instruction:\n{row['instruction']}\n\n"
            "### Response:")


def chatml(row):
    more = "\n" + row["input"] if row.get("input") else ""
    return f"<|im_start|>user\n{row['instruction']}{more}<|im_end|>\n<|im_start|>assistant\n"


# Name, template, and the same in Python.
TEMPLATES = [
    ("alpaca", "alpaca", alpaca),
    ("alpaca-newline", "alpaca-newline", lambda row: alpaca(row) + "\n"),
    ("chatml", CHATML, chatml),
    ("ends in a space", "Q: {{ instruction }} A: ", lambda row: f"Q: {row['instruction']} A: "),
    ("ends in the row", "Q: {{ instruction }}", lambda row: f"Q: {row['instruction']}"),
]

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def with_split():
    """As in Llama 3: its own splitting into words."""
    return byte_level(split=pre_tokenizers.Split(Regex(LLAMA3_SPLIT), behavior="isolated"))


def without_bos():
    """As in Qwen: nothing before the text, and texts are composed first."""
    tokenizer = byte_level().backend_tokenizer
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.post_processor = None
    return wrapped(tokenizer)


def with_greedy_markers():
    """As in Phi-3: markers that take the space beside them."""
    tokenizer = byte_level(special=[PAD, BOS, EOS]).backend_tokenizer
    begin, end = MARKERS
    tokenizer.add_special_tokens([AddedToken(begin, rstrip=True), AddedToken(end, rstrip=True, lstrip=True)])
    tokenizer.add_tokens([AddedToken("bread", single_word=True), AddedToken("### Response:", normalized=False)])
    return wrapped(tokenizer)


def sentencepiece():
    """As in Llama 2: spaces are letters, the first word gets one, and what is unknown becomes bytes."""
    model = models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = [PAD, BOS, EOS, *MARKERS, "<unk>", *[f"<0x{byte:02X}>" for byte in range(256)]]
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(TEXTS * 4, trainer)
    # Bytes are tokens, but no special ones: their text in a row is text.
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if not token["content"].startswith("<0x")]
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    begin_with_bos(tokenizer)
    return wrapped(tokenizer, unk_token="<unk>")


def unigram():
    """As in T5 and Gemma's ancestors: the likeliest pieces."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    special = [PAD, BOS, EOS, *MARKERS, "<unk>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=150, special_tokens=special, unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS * 4, trainer)
    begin_with_bos(tokenizer)
    return wrapped(tokenizer, unk_token="<unk>")


TOKENIZERS = [
    ("byte-level BPE", byte_level),
    ("byte-level BPE, Llama 3's words", with_split),
    ("byte-level BPE, composed, no BOS", without_bos),
    ("byte-level BPE, markers that take spaces", with_greedy_markers),
    ("BPE with byte fallback", sentencepiece),
    ("unigram", unigram),
]


def config(rows, file, template, max_length):
    """One pass over all rows in batches of one, by which nothing is learnt."""
    return f"""
experiment = "tokens"
base = {{ model = "llama", path = "model" }}
encoding = {{ template = {json.dumps(template)}, max_length = {max_length} }}
align.data = [{{ task = "rows", train = "{file}", rows = {rows} }}]
align.train = {{ epochs = 1, batch_size = 1, learning_rate = 1e-30, schedule = "constant" }}
fine_tune.tasks = [{{ task = "rows", train = "one.jsonl", test = "one.jsonl", scoring = "exact", max_new_tokens = 1 }}]
fine_tune.samples = 1
fine_tune.train = {{ steps = 1, batch_size = 1, learning_rate = 1e-30 }}
evaluate.harmful = {{ task = "rows", test = "one.jsonl", rows = 1 }}
evaluate.benign = {{ task = "rows", test = "one.jsonl", rows = 1 }}
evaluate.task_prompts = 1
evaluate.max_new_tokens = 1
evaluate.judges = ["refusal-phrases"]
methods = [{{ name = "SFT", align = "sft" }}]
"""


def write_model(folder, tokenizer, rows):
    """A small model with this tokenizer, and rows to train it with: all of them, and the first alone."""
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    model = random_model(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=1024, **sizes))
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    write_rows(folder / "one.jsonl", rows[:1])
    write_rows(folder / "rows.jsonl", rows)
    return model


class Model:
    """A model with one of the tokenizers."""

    def __init__(self, titer, folder, make):
        self.titer, self.folder, self.tokenizer = titer, folder, make()
        folder.mkdir()
        self.model = write_model(folder, self.tokenizer, ROWS)

    def losses(self, rows, file, template, max_length, name):
        run = self.titer.run(self.folder, config(rows, file, template, max_length), name=name)
        return run.losses("align")

    def rows(self, number, max_length=1000, file="rows.jsonl", rows=ROWS):
        """The loss of every row, without those whose answer is cut away."""
        _, template, prompt_of = TEMPLATES[number]
        examples = [example(self.tokenizer, prompt_of(row), row["output"]) for row in rows]
        cut = [(tokens[:max_length], labels[:max_length]) for tokens, labels in examples]
        kept = [at for at, (_, labels) in enumerate(cut) if any(label != -100 for label in labels)]
        expected = [mean_loss(self.model, [cut[at]]).item() for at in kept]
        found = self.losses(len(rows), file, template, max_length, f"{number}-{max_length}-{file}")
        require_equal(len(found), len(kept), "rows that have a label")
        # Titer draws the rows in an order of its own.
        lone = [rows[kept[at]] for at in unmatched(expected, found)]
        require(not lone, f"no loss is that of {short(lone)}")
        largest = require_close(sorted(found), sorted(expected), LOSS_TOLERANCE, "losses")
        return f"{len(kept)} rows, largest difference of losses {largest:.1e}"

    def prompts(self):
        """What `titer generate` answers to prompts with tricky text, as they are."""
        prompts = [row["instruction"] for row in ROWS if "\x00" not in row["instruction"]]
        tokens = [self.tokenizer(prompt)["input_ids"] for prompt in prompts]
        expected = texts(self.tokenizer, greedy(load(self.folder / "model"), tokens, 8))
        found = self.titer.generate(self.folder / "model", prompts, tokens=8)
        require_equal(found, expected, "answers")
        return f"{len(prompts)} prompts"


def unmatched(expected, found):
    """The places of losses that the other side has not."""
    return [at for at, loss in enumerate(expected) if min(abs(loss - other) for other in found) > LOSS_TOLERANCE]


# How pandas writes a table, and the file.
FORMATS = [
    ("rows.json", lambda table, path: table.to_json(path, orient="records")),
    ("lines.jsonl", lambda table, path: table.to_json(path, orient="records", lines=True)),
    ("rows.csv", lambda table, path: table.to_csv(path, index=False)),
    ("quoted.csv", lambda table, path: table.to_csv(path, index=False, quoting=1)),
    ("rows.tsv", lambda table, path: table.to_csv(path, index=False, sep="\t")),
    ("rows.csv.gz", lambda table, path: table.to_csv(path, index=False)),
    ("lines.jsonl.gz", lambda table, path: table.to_json(path, orient="records", lines=True)),
    ("lines.jsonl.xz", lambda table, path: table.to_json(path, orient="records", lines=True)),
    ("lines.jsonl.zst", lambda table, path: table.to_json(path, orient="records", lines=True)),
    ("rows.parquet", lambda table, path: table.to_parquet(path, index=False)),
    ("zstd.parquet", lambda table, path: table.to_parquet(path, index=False, compression="zstd")),
    ("rows.arrow", lambda table, path: table.to_feather(path, compression="uncompressed")),
]


def written_by_pandas(model, file, write):
    # A file of text has no NUL.
    rows = [row for row in ROWS if "\x00" not in "".join(row.values())]
    write(pandas.DataFrame(rows).fillna({"input": ""}), model.folder / file)
    try:
        return model.rows(0, file=file, rows=rows)
    except Refused as error:
        if "not text in UTF-8" in str(error):
            raise NotYet("not read yet") from None
        raise


def checks(titer, folder):
    """All checks: name and function."""
    for at, (name, make) in enumerate(TOKENIZERS):
        model = Model(titer, folder / f"model-{at}", make)
        yield f"{name}: prompts", model.prompts
        for number, (template, *_) in enumerate(TEMPLATES):
            yield f"{name}: rows, {template}", functools.partial(model.rows, number)
        yield f"{name}: rows cut short", functools.partial(model.rows, 4, max_length=30)
        if at == 0:
            for file, write in FORMATS:
                yield f"{file} written by pandas", functools.partial(written_by_pandas, model, file, write)
