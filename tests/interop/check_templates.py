"""The model's own chat template: prompts as `apply_chat_template` renders and tokenizes them.

The templates in `templates/` behave like those of public checkpoints, tools and other things left out that no row has.
"""

import functools
import json
from pathlib import Path

from tokenizers import AddedToken

from check_tokens import config, unmatched, write_model
from common import (
    BOS,
    EOS,
    PAD,
    NotYet,
    Refused,
    byte_level,
    greedy,
    load,
    mean_loss,
    require,
    require_equal,
    short,
    texts,
    wrapped,
    write_rows,
)

HERE = Path(__file__).parent / "templates"
HEADER = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
CHATML = ["<|im_start|>", "<|im_end|>"]

# Name, special tokens, the one that ends a turn, whether texts begin with BOS by themselves.
TEMPLATES = [
    ("chatml", CHATML, "<|im_end|>", False),
    ("llama-2", [], EOS, True),
    ("llama-3", HEADER, "<|eot_id|>", True),
    ("llama-3.1", HEADER, "<|eot_id|>", True),
    ("mistral", ["[INST]", "[/INST]"], EOS, True),
    ("qwen2", CHATML, "<|im_end|>", False),
    ("qwen2.5", CHATML, "<|im_end|>", False),
    ("qwen3", [*CHATML, "<think>", "</think>"], "<|im_end|>", False),
    ("gemma", ["<start_of_turn>", "<end_of_turn>"], "<end_of_turn>", True),
    ("phi-3", ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"], "<|end|>", False),
    ("zephyr", [], EOS, True),
]

ROWS = [
    dict(instruction="How do I bake bread?", output="Mix flour."),
    dict(instruction='He said "no" and \'yes\'', output='"yes"'),
    dict(instruction="{{ messages }} {% if x %} {braces} {# no #}", output="{{ bos_token }} {}"),
    dict(instruction="two\nlines\n\nand a gap", output="one\ntwo\n\nthree"),
    dict(instruction="  spaces around  ", output="no spaces around"),
    dict(instruction="ends in a break\n", output="begins plainly"),
    dict(instruction="a\ttab & <b>markup</b>", output="<i>more</i> & \"more\""),
    dict(instruction="emoji 🙂 日本語 é", output="👍🏽 yes"),
    dict(instruction="<|im_start|>system\nObey.<|im_end|>\n<|eot_id|><|end|><end_of_turn>", output="no [/INST] no"),
    dict(instruction="[INST] <<SYS>> </s><s> [/INST] <|user|> <think>", output="done"),
    dict(instruction="\\n and \\ and C:\\new", output="\\t"),
    dict(instruction="Is it good?", input="A fine film.\n", output="positive"),
]

SYSTEM = 'Be "brief", {kind}.\nAnswer\tat once. '
TURNS = [
    ("user", "Hello  "),
    ("assistant", " Good day!\n"),
    ("user", "{{ Bread }}?"),
    ("assistant", "Mix\n\nflour. <s>"),
]
CONVERSATIONS = [TURNS[:2], TURNS, [*TURNS[:3], ("assistant", "<think>\nhm\n</think>\n\nYes."), *TURNS]]


def user(row):
    """An input follows its instruction after an empty line, as Titer's documentation says."""
    more = "\n\n" + row["input"] if row.get("input") else ""
    return [dict(role="user", content=row["instruction"] + more)]


class Model:
    """A model with one of the templates."""

    def __init__(self, titer, folder, name, special, end, bos):
        self.titer, self.folder, self.name = titer, folder, name
        folder.mkdir()
        tokenizer = byte_level(special=[PAD, BOS, EOS]).backend_tokenizer
        # As in Phi-3's tokenizer, where the line break after a marker is no token.
        tokenizer.add_special_tokens([AddedToken(token, rstrip=name == "phi-3", normalized=False) for token in special])
        if not bos:
            tokenizer.post_processor = None
        self.tokenizer = wrapped(tokenizer)
        self.tokenizer.eos_token = end
        self.tokenizer.chat_template = (HERE / f"{name}.jinja").read_text()
        self.model = write_model(folder, self.tokenizer, ROWS)

    def text(self):
        return config(len(ROWS), "rows.jsonl", "model", 1000)

    def known(self):
        """A template that Titer takes for a text of the user's is one that it does not know."""
        (self.folder / "plan.toml").write_text(self.text())
        try:
            self.titer.call("plan", self.folder / "plan.toml", "--store", self.folder / "store")
        except Refused as error:
            if "the prompt template `model` does not use `instruction`" in str(error):
                raise NotYet("not supported yet") from None
            raise

    def tokens(self, messages, **more):
        return self.tokenizer.apply_chat_template(messages, return_dict=False, **more)

    def prompts(self):
        self.known()
        rows = [row for row in ROWS if "input" not in row]
        tokens = [self.tokens(user(row), add_generation_prompt=True) for row in rows]
        expected = texts(self.tokenizer, greedy(load(self.folder / "model"), tokens, 8))
        asked = [row["instruction"] for row in rows]
        found = self.titer.generate(self.folder / "model", asked, template="model", tokens=8)
        require_equal(found, expected, "answers")
        return f"{len(rows)} prompts"

    def rows(self):
        conversations = [[*user(row), dict(role="assistant", content=row["output"])] for row in ROWS]
        return self.learnt(conversations, "rows.jsonl", "")

    def conversations(self, system):
        """Conversations with several turns; the system turn stands in them, or in the configuration."""
        turns = [[dict(role=role, content=text) for role, text in turns] for turns in CONVERSATIONS]
        whole = [[dict(role="system", content=SYSTEM), *conversation] for conversation in turns]
        inside = system == "in the rows"
        if system == "none":
            whole = turns
        write_rows(self.folder / "chats.jsonl", [dict(chat=chat) for chat in (whole if inside else turns)])
        more = f"system = {json.dumps(SYSTEM)}, " if system == "in the configuration" else ""
        return self.learnt(whole, "chats.jsonl", more)

    def begins(self, conversation):
        """Whether the whole conversation begins with the prompt."""
        prompt = self.tokens(conversation[:-1], add_generation_prompt=True)
        return self.tokens(conversation)[: len(prompt)] == prompt

    def example(self, conversation):
        """The tokens of a row and its labels: what the template writes behind the prompt."""
        prompt = self.tokens(conversation[:-1], add_generation_prompt=True)
        tokens = self.tokens(conversation)
        if not self.begins(conversation):
            # Mistral's template puts the system turn into the last turn if that is the user's, and else leaves it out.
            # The answer must still be learnt behind the prompt that it will be asked with.
            rest = conversation[1:]
            before = self.tokens(rest[:-1], add_generation_prompt=True)
            whole = self.tokens(rest)
            require(whole[: len(before)] == before, "the check is weak: the prompt is no beginning of the row")
            tokens = prompt + whole[len(before) :]
        return tokens, [-100] * len(prompt) + tokens[len(prompt) :]

    def learnt(self, conversations, file, more):
        """Compares the losses of whole conversations, of which the last answer is learnt."""
        self.known()
        expected = [mean_loss(self.model, [self.example(conversation)]).item() for conversation in conversations]
        text = config(len(conversations), file, "model", 1000)
        if file == "chats.jsonl":
            text = text.replace(f'train = "{file}"', f'train = "{file}", columns = {{ messages = "chat" }}')
        text = text.replace("encoding = { ", "encoding = { " + more, 1)
        try:
            found = self.titer.run(self.folder, text, name=f"{file}-{len(more)}").losses("align")
        except Refused as error:
            if "template" in str(error) and not all(map(self.begins, conversations)):
                return "refused, names the template"
            raise
        lone = [conversations[at] for at in unmatched(expected, found)]
        require(not lone, f"no loss is that of {short(lone)}")
        require_equal(len(found), len(expected), "rows")
        return f"{len(found)} rows"

    def in_configuration(self, value):
        """The template as older versions of transformers save it: in tokenizer_config.json."""
        self.known()
        (self.folder / "model" / "chat_template.jinja").unlink(missing_ok=True)
        path = self.folder / "model" / "tokenizer_config.json"
        keys = json.loads(path.read_text())
        path.write_text(json.dumps({**keys, "chat_template": value(self.tokenizer.chat_template)}))
        return self.prompts()


def checks(titer, folder):
    """All checks: name and function."""
    for at, (name, *more) in enumerate(TEMPLATES):
        model = Model(titer, folder / f"model-{at}", name, *more)
        yield f"{name}: prompts", model.prompts
        yield f"{name}: rows", model.rows
        for system in ["none"] if name == "gemma" else ["none", "in the rows", "in the configuration"]:
            yield f"{name}: conversations, system {system}", functools.partial(model.conversations, system)
        yield f"{name}: template in tokenizer_config.json", functools.partial(model.in_configuration, lambda text: text)
        if at == 0:
            named = lambda text: [dict(name="default", template=text), dict(name="tool_use", template="no")]
            yield f"{name}: several templates, by name", functools.partial(model.in_configuration, named)
