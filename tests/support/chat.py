"""Tokenizers with chat templates as models in use have them."""

from transformers import PreTrainedTokenizerFast

from gcrm_fast.data.tokenization import BOS, train_tokenizer

TEXTS = ["hello world 123 yes.\n", "naïve café 漢字 漢字\n"] * 20
# A line feed after the end token; no bos.
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Writes bos itself, which the tokenizer adds too; trims content; turns end with a token that is not eos.
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
# No generation prompt, eos after each answer, roles that must alternate.
LLAMA2 = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate user/assistant') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ bos_token }}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }} {{ eos_token }}{% endif %}{% endfor %}"
)
# Writes tools and calls, and null as text; the turn ends with two tokens; earlier thoughts are dropped.
TOOLS = (
    "{% if tools %}<|start_header_id|>{{ tools | map(attribute='name') | join(',') }}<|end_header_id|>{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}[{{ c.function.name }} {{ c.function.arguments.city }}]{% endfor %}"
    "<|im_end|>{% if m.role == 'assistant' %}<|eot_id|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATES = {"chatml": CHATML, "llama3": LLAMA3, "llama2": LLAMA2}
MARKERS = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]


def chat_tokenizer(template: str) -> PreTrainedTokenizerFast:
    """A small byte-level BPE that adds bos, with a chat template."""
    tokenizer = train_tokenizer(TEXTS, 300)
    tokenizer.add_tokens(MARKERS, special_tokens=True)
    tokenizer.chat_template = template
    assert tokenizer.bos_token == BOS
    return tokenizer
