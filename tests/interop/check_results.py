"""What a run writes, read by pandas and safetensors; and bases that Titer pretrained, read by transformers."""

import functools
import json

import pandas
import torch
from safetensors import safe_open
from transformers import LlamaConfig, PreTrainedTokenizerFast

from check_models import ALIGN, MINE, Case, toml
from common import (
    NotYet,
    Refused,
    greedy,
    load_without_complaint,
    no_warnings,
    require,
    require_equal,
    texts,
    write_rows,
)

# Names that a reader of CSV, JSON or numbers may stumble over.
METHODS = ["SFT", 'with "quotes", and commas', "1e5", "007", "-1", "Größe 🙂"]
SEEDS, RATIOS = [0, 1], [0.0, 0.5]
WORDS = ["method", "task", "model", "align", "fine_tune", "post", "lora", "judge", "protocol", "id", "setting",
         "experiment"]
WHOLE = ["samples", "seed"]


class Finished:
    """A run of several methods, ratios and seeds."""

    def __init__(self, titer, folder):
        self.titer, self.folder = titer, folder
        self.case = Case(titer, folder, LlamaConfig, {})

    @property
    def run(self):
        return self.case.once("several", self.make_run)

    def make_run(self):
        self.case.run()
        # At p = 0 all rows are the user's own.
        write_rows(self.folder / "mine.jsonl", MINE * 2)
        text = self.case.text.replace("harmful_ratios = [0.5]", f"harmful_ratios = {RATIOS}")
        before, _ = text.split("methods = ")
        methods = ", ".join(f'{{ name = {toml(name)}, align = "sft" }}' for name in METHODS)
        text = f"seeds = {SEEDS}\n{before}methods = [{methods}]\n"
        return self.titer.run(self.folder, text, name="several")

    @property
    def results(self):
        return json.loads((self.run.out / "results.json").read_text())

    # CSV

    def same_as_json(self, table):
        require_equal(len(table), len(METHODS) * len(SEEDS) * len(RATIOS), "lines")
        require(isinstance(table.index, pandas.RangeIndex), "pandas takes a column for the index")
        require(not [name for name in table if str(name).startswith("Unnamed")], "a column has no name")
        for name in WORDS:
            require(all(isinstance(value, str) for value in table[name]), f"`{name}` is not text: {table[name].dtype}")
        for name in WHOLE:
            require(table[name].dtype == "int64", f"`{name}` is not whole numbers: {table[name].dtype}")
        rows = {row["id"]: row for row in self.results["rows"]}
        require_equal(set(table["id"]), set(rows), "ids")
        for line in table.to_dict("records"):
            row = rows[line["id"]]
            # An apostrophe keeps a spreadsheet from taking a name such as -1 for a formula.
            require_equal(line["method"].removeprefix("'"), row["method"], "method")
            for name in ["task", "samples", "seed", "harmful_ratio", "learning_rate", "protocol", "setting"]:
                require_equal(line[name], row[name], name)
            for name, value in row["metrics"].items():
                require_equal(line[name], value, name)
        return f"{len(table)} lines, {len(table.columns)} columns"

    def csv(self):
        return self.same_as_json(pandas.read_csv(self.run.out / "results.csv"))

    def rendered_csv(self):
        path = self.folder / "rendered.csv"
        path.write_text(self.titer.call("report", self.run.out, "--format", "csv"))
        return self.same_as_json(pandas.read_csv(path))

    def numbers(self):
        """Every column of numbers is one for pandas, also where all values are missing."""
        table = pandas.read_csv(self.run.out / "results.csv")
        texts = set(WORDS) | {"commit"}
        wrong = [name for name in table if name not in texts and not pandas.api.types.is_numeric_dtype(table[name])]
        require(not wrong, f"not numbers: {[(name, table[name][0]) for name in wrong]}")

    # JSON

    def json(self):
        table = pandas.json_normalize(self.results["rows"])
        require_equal(len(table), len(METHODS) * len(SEEDS) * len(RATIOS), "rows")
        require(table["metrics.harmful_score"].dtype == "float64", "`harmful_score` is not numbers")
        rendered = json.loads(self.titer.call("report", self.run.out, "--format", "json"))
        require_equal(rendered, self.results, "results, rendered again")

    def answers(self):
        files = 0
        for row in self.results["rows"]:
            for name, path in row["answers"].items():
                table = pandas.read_json(self.run.out / path, lines=True, dtype=False, convert_dates=False)
                rows = MINE if name.startswith("task") or name.startswith("benign") else ALIGN
                require_equal(list(table["instruction"]), [row["instruction"] for row in rows], "instructions")
                lines = (self.run.out / path).read_text().split("\n")[:-1]
                require_equal([json.loads(line)["answer"] for line in lines], list(table["answer"]), "answers")
                files += 1
        require(files, "the check is weak: no file of answers")
        return f"{files} files"

    def events(self):
        table = pandas.read_json(self.run.out / "events.jsonl", lines=True, convert_dates=False)
        require_equal({"event", "time"} - set(table.columns), set(), "columns that are missing")
        require(table["time"].is_monotonic_increasing, "events are not in order")
        return f"{len(table)} events"

    # Weights

    def artifacts(self):
        files = list((self.run.store / "stages").glob("*/*.safetensors"))
        require(files, "the check is weak: no weights")
        for file in files:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():
                    tensor = opened.get_tensor(name)
                    require(tensor.dtype == torch.float32 and tensor.isfinite().all(), f"{name}: {tensor.dtype}")
        return f"{len(files)} files"


SHAPE = "num_hidden_layers = 2, hidden_size = 32, num_attention_heads = 4, max_position_embeddings = 64"
# What each architecture needs beside that to differ from the others.
SHAPES = {
    "llama": "intermediate_size = 48, num_key_value_heads = 2, tie_word_embeddings = true",
    "mistral": "intermediate_size = 48",
    "qwen2": "intermediate_size = 48",
    "qwen3": "intermediate_size = 48, head_dim = 16",
    "opt": "ffn_dim = 48",
    "gemma": "intermediate_size = 48",
    "gemma2": "intermediate_size = 48",
    "gemma3": "intermediate_size = 48",
    "phi3": "intermediate_size = 48",
}


def pretrain(titer, folder, kind):
    """The folder of a base that Titer makes itself."""
    config = f"""
experiment = "base"
base.model = "{kind}"
base.shape = {{ {SHAPE}, {SHAPES[kind]} }}
base.pretrain.data = {{ task = "world-text", rows = 60 }}
base.pretrain.max_length = 48
base.pretrain.train = {{ steps = 4, batch_size = 8, learning_rate = 1e-2 }}
encoding = {{ template = "chat", max_length = 48 }}
align.data = [{{ task = "world-safe", rows = 8 }}]
align.train = {{ steps = 1, batch_size = 4, learning_rate = 5e-3 }}
fine_tune.tasks = [{{ task = "world-agnews" }}]
fine_tune.samples = 4
fine_tune.train = {{ steps = 1, batch_size = 4, learning_rate = 1e-3 }}
evaluate.harmful = {{ task = "world-harmful", rows = 1 }}
evaluate.benign = {{ task = "world-benign", rows = 1 }}
evaluate.task_prompts = 1
evaluate.judges = ["world"]
methods = [{{ name = "SFT", align = "sft" }}]
"""
    path = folder / f"{kind}.toml"
    path.write_text(config)
    try:
        printed = titer.call("pretrain", path, "--device", "cpu", "--store", folder / "store")
    except Refused as error:
        if f"unknown model `{kind}`" in str(error):
            raise NotYet("not read yet") from None
        raise
    (base,) = [word for word in printed.split() if word.startswith(str(folder))]
    return base


def states_format(titer, folder):
    """Transformers until 4.47 fails on a file of weights that does not say whose they are."""
    with safe_open(f"{pretrain(titer, folder, 'llama')}/model.safetensors", framework="pt") as opened:
        require_equal((opened.metadata() or {}).get("format"), "pt", "`format` in the metadata of model.safetensors")


def pretrained(titer, folder, kind):
    """A base that Titer made itself answers in transformers as it does in Titer."""
    base = pretrain(titer, folder, kind)
    model = load_without_complaint(base)
    with no_warnings():
        # The class that the folder names. `AutoTokenizer` takes that of Qwen2 for every folder of this architecture.
        tokenizer = PreTrainedTokenizerFast.from_pretrained(base)
    # The tokenizer knows the words of its own language alone.
    known = [word for word in sorted(tokenizer.get_vocab()) if word.isalpha()]
    prompts = [f"<user> {' '.join(known[at : at + 2 * at + 1])} <asst>" for at in (1, 5, 12)]
    tokens = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    expected = texts(tokenizer, greedy(model, tokens))
    require(expected.strip(), "the check is weak: no answers")
    require_equal(titer.generate(base, prompts), expected, "answers")


def checks(titer, folder):
    """All checks: name and function."""
    finished = Finished(titer, folder / "run")
    yield "results.csv in pandas", finished.csv
    yield "results.csv, columns of numbers", finished.numbers
    yield "titer report --format csv in pandas", finished.rendered_csv
    yield "results.json in pandas, and rendered again", finished.json
    yield "answers in pandas", finished.answers
    yield "events.jsonl in pandas", finished.events
    yield "weights of the store in safetensors", finished.artifacts
    yield "a base that Titer pretrained, metadata", functools.partial(states_format, titer, folder)
    for kind in SHAPES:
        check = functools.partial(pretrained, titer, folder, kind)
        yield f"a base that Titer pretrained, in transformers: {kind}", check
