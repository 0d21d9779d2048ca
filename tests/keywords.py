"""Does every keyword that we pass to a library still exist there?"""

import ast
import inspect
import re

import datasets
import peft
import transformers
import trl
from bitsandbytes.nn import Linear4bit

# What is called, and the functions among which its keywords are shared out.
LIBRARY = {
    "BitsAndBytesConfig": [transformers.BitsAndBytesConfig],
    "GgufConfig": [transformers.GgufConfig],
    "GenerationConfig": [transformers.GenerationConfig],
    "LlamaConfig": [transformers.LlamaConfig],
    "TrainingArguments": [transformers.TrainingArguments],
    "Trainer": [transformers.Trainer],
    "SFTConfig": [trl.SFTConfig],
    "SFTTrainer": [trl.SFTTrainer],
    "LoraConfig": [peft.LoraConfig],
    "get_peft_model": [peft.get_peft_model],
    "prepare_model_for_kbit_training": [peft.prepare_model_for_kbit_training],
    "Linear4bit": [Linear4bit],
    "PeftModel.from_pretrained": [
        peft.PeftModel.from_pretrained,
        peft.PeftModel.load_adapter,
    ],
    "AutoModelForCausalLM.from_pretrained": [
        transformers.AutoModelForCausalLM.from_pretrained,
        transformers.PreTrainedModel.from_pretrained,
    ],
    "AutoModelForCausalLM.from_config": [
        transformers.AutoModelForCausalLM.from_config,
        transformers.PreTrainedModel._from_config,
    ],
    "AutoTokenizer.from_pretrained": [
        transformers.AutoTokenizer.from_pretrained,
        transformers.PreTrainedTokenizerBase.from_pretrained,
    ],
    "AutoConfig.from_pretrained": [transformers.AutoConfig.from_pretrained],
    "Dataset.from_list": [datasets.Dataset.from_list],
}


def unknown(syntax):
    """Each keyword of a syntax tree that its library's signature lacks, as text."""
    for node in ast.walk(syntax):
        if not isinstance(node, ast.Call):
            continue
        words = ast.unparse(node.func).split(".")
        name = next(
            (key for key in (".".join(words[-2:]), words[-1]) if key in LIBRARY), None
        )
        if name is None:
            continue
        known = set().union(*map(accepted, LIBRARY[name]))
        for keyword in node.keywords:
            if keyword.arg is not None and keyword.arg not in known:
                yield f"line {node.lineno}: {name} has no keyword {keyword.arg}"


def accepted(function) -> set[str]:
    """The keywords that a function names, or takes out of its **kwargs by name."""
    parameters = inspect.signature(function).parameters.values()
    names = {p.name for p in parameters if p.kind is not p.VAR_KEYWORD}
    if len(names) < len(parameters):
        # of a class, __init__ alone
        code = function.__init__ if inspect.isclass(function) else function
        source = inspect.getsource(inspect.unwrap(code))
        names |= set(re.findall(r'kwargs\.(?:pop|get)\(\s*"(\w+)"', source))
    return names
