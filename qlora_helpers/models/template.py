"""The chat template that the course gives to a base which has none."""

# Alpaca's prompt without its preamble. After the last question it ends where the
# answer begins, whether add_generation_prompt is set or not.
INSTRUCTION = """
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}
{{- message['content'] + '\\n\\n' -}}
{%- elif message['role'] == 'user' -%}
{{- '### Instruction:\\n' + message['content'] + '\\n\\n### Response:\\n' -}}
{%- elif message['role'] == 'assistant' -%}
{{- message['content'] + eos_token -}}
{%- else -%}
{{- raise_exception('the role ' + message['role'] + ' is unknown') -}}
{%- endif -%}
{%- endfor -%}"""


def leading_ids(tokenizer) -> list[int]:
    """The ids that a tokenizer puts before a text: usually BOS or nothing."""
    [first, *_] = tokenizer("a", add_special_tokens=False)["input_ids"]
    ids = tokenizer("a")["input_ids"]
    return ids[: ids.index(first)]


def give_template(tokenizer) -> bool:
    """Give a tokenizer without a chat template the `### Instruction:` layout.

    The template writes the tokens that the tokenizer puts before a text, and the end
    token behind each answer. It is saved with the tokenizer, so servers use it too.
    Returns whether it was given; a template that is there stays. Raises ValueError if
    the tokenizer has no end token.
    """
    if tokenizer.chat_template:
        return False
    if not tokenizer.eos_token:
        raise ValueError(
            "the tokenizer has neither a chat template nor an end token: set "
            "tokenizer.eos_token to the token at which answers end"
        )
    start = tokenizer.convert_ids_to_tokens(leading_ids(tokenizer))
    tokenizer.chat_template = "".join(start) + INSTRUCTION
    return True
