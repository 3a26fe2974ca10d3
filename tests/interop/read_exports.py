"""Reads what Titer exported with the transformers and peft that are installed, and saves the logits and every warning.

    python read_exports.py BASE ADAPTER MERGED TOKENS OUT

Like write_adapters.py, it imports nothing of the suite.
"""

import json
import logging
import sys
import warnings

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

torch.set_num_threads(1)
BASE, ADAPTER, MERGED, TOKENS, OUT = sys.argv[1:]


def loaded(folder):
    return AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32).eval()


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.tensor([json.loads(TOKENS)]), use_cache=False).logits[0].tolist()


def main():
    said = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())
    base = loaded(BASE)
    for name in ("transformers", "peft"):
        logging.getLogger(name).addHandler(handler)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        found = dict(adapter=logits(PeftModel.from_pretrained(base, ADAPTER).eval()), merged=logits(loaded(MERGED)))
    said += [str(warning.message) for warning in caught]
    with open(OUT, "w") as file:
        json.dump(dict(found, warnings=said), file)


if __name__ == "__main__":
    main()
