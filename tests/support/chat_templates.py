"""Chat templates in the manner of published families, and a tokenizer with merges for each."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

CHATML = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}"
    "<|im_start|>system\nBe of help.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_TOOLS = (
    "{% if tools %}<|im_start|>system\nTools:{% for t in tools %}\n{{ t | tojson }}{% endfor %}\n"
    'Call one so: <tool_call>\n{"name": NAME, "arguments": OBJECT}\n</tool_call><|im_end|>\n'
    "{% endif %}"
)
_CALLS = (
    "{% for c in m.tool_calls or [] %}{% if m.content or not loop.first %}\n{% endif %}"
    '<tool_call>\n{"name": "{{ c.function.name }}", "arguments": '
    "{{ c.function.arguments | tojson }}}\n</tool_call>{% endfor %}"
)
_RESULT = (
    "{% if loop.first or messages[loop.index0 - 1].role != 'tool' %}<|im_start|>user{% endif %}\n"
    "<tool_response>\n{{ m.content }}\n</tool_response>"
    "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}<|im_end|>\n{% endif %}"
)
_SPEAK = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
HERMES = (
    _TOOLS + "{% for m in messages %}{% if m.role == 'tool' %}" + _RESULT + "{% else %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}" + _CALLS + "<|im_end|>\n{% endif %}{% endfor %}"
) + _SPEAK
FORGETS_THOUGHTS = (
    _TOOLS + "{% set ns = namespace(asked=0) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.asked = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m.role == 'tool' %}" + _RESULT + "{% else %}"
    "<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.index0 < ns.asked %}"
    "{{ m.content.split('</think>')[-1].lstrip('\n') }}{% else %}{{ m.content }}{% endif %}"
    + _CALLS
    + "<|im_end|>\n{% endif %}{% endfor %}"
    + _SPEAK
)
HEADERS = (
    "<|begin_of_text|>{% for m in messages %}"
    "<|start_header_id|>{{ 'ipython' if m.role == 'tool' else m.role }}<|end_header_id|>\n\n"
    "{% if m.role == 'user' and loop.first and tools %}{% for t in tools %}{{ t | tojson }}\n"
    "{% endfor %}{% endif %}"
    "{% if m.tool_calls %}{% if m.tool_calls | length > 1 %}{{ raise_exception('one at a time') }}"
    "{% endif %}{% set c = m.tool_calls[0].function %}"
    '{"name": "{{ c.name }}", "parameters": {{ c.arguments | tojson }}}'
    "{% elif m.role == 'tool' %}{{ m.content | tojson }}{% else %}{{ m.content | trim }}{% endif %}"
    "<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
BRACKETS = (
    "<s>{% set asked = messages | selectattr('role', 'equalto', 'user') | list %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% if tools and m == asked[-1] %}"
    "[AVAILABLE_TOOLS] {{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}"
    "[INST] {{ m.content }}[/INST]"
    "{% elif m.role == 'tool' %}{% if m.tool_call_id | length != 9 %}{{ raise_exception('an id') }}"
    '{% endif %}[TOOL_RESULTS] {"content": {{ m.content | tojson }}, '
    '"call_id": "{{ m.tool_call_id }}"}[/TOOL_RESULTS]'
    "{% elif m.tool_calls %}[TOOL_CALLS] [{% for c in m.tool_calls %}"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}, '
    '"id": "{{ c.id }}"}{% if not loop.last %}, {% endif %}{% endfor %}]</s>'
    "{% elif m.role == 'assistant' %} {{ m.content }}</s>"
    "{% else %}{{ raise_exception('no ' + m.role) }}{% endif %}{% endfor %}"
)
ALTERNATES = (
    "<bos>{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('user and model take turns') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}"
    "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
DATED = "<|im_start|>system\nToday is {{ strftime_now('%d %b %Y') }}.<|im_end|>\n" + CHATML
BEGINS_A_THOUGHT = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|Assistant|>"
    "{{ m.content.split('</think>')[-1] }}<|end|>{% else %}<|User|>{{ m.content }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}"
)


@dataclass(frozen=True)
class Family:
    """A template with the control tokens of its tokenizer."""

    template: str
    specials: tuple[str, ...]
    eos: str
    added: tuple[str, ...] = ()
    """Tokens of their own that are not special."""
    end: str = ""
    marks: tuple[str, ...] = ()
    """What marks a role, without a system message or tools."""
    trims: bool = False
    options: dict[str, str] = field(default_factory=dict)

    def tokenizer(self) -> Any:
        """A tokenizer with merges, so that a text can be encoded in several ways."""
        return trained_tokenizer(self.template, self.eos, self.specials, self.added)


_IM = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
_THINKS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>")
_THINKS += ("</think>",)
_HEADS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
_INST = ("[INST]", "[/INST]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]")
_INST += ("[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]")
_TURNS = ("<bos>", "<start_of_turn>", "<end_of_turn>", "<eos>")

FAMILIES = {
    "chatml": Family(CHATML, _IM, "<|im_end|>", (), "<|im_end|>", ("<|im_start|>",)),
    "hermes": Family(HERMES, _IM, "<|im_end|>", (), "<|im_end|>", ("<|im_start|>",)),
    "forgets thoughts": Family(
        FORGETS_THOUGHTS,
        _IM,
        "<|im_end|>",
        _THINKS,
        "<|im_end|>",
        ("</tool_response>", "<tool_response>", "<|im_start|>"),
    ),
    "headers": Family(
        HEADERS,
        (*_HEADS, "<|python_tag|>", "<|end_of_text|>"),
        "<|end_of_text|>",
        (),
        "<|eot_id|>",
        _HEADS[:3],
        trims=True,
    ),
    "brackets": Family(
        BRACKETS,
        ("<s>", "</s>", *_INST),
        "</s>",
        (),
        "</s>",
        ("<s>", "[/INST]", "[/TOOL_RESULTS]", "[INST]", "[TOOL_RESULTS]"),
    ),
    "alternates": Family(ALTERNATES, _TURNS, "<eos>", (), "<end_of_turn>", _TURNS[:2], trims=True),
    "dated": Family(DATED, _IM, "<|im_end|>", (), "<|im_end|>", ("<|im_start|>",)),
    "begins a thought": Family(
        BEGINS_A_THOUGHT,
        ("<|User|>", "<|Assistant|>", "<|end|>"),
        "<|end|>",
        ("<think>", "</think>"),
        "<|end|>",
        ("<|Assistant|>", "<|User|>"),
    ),
}

_CORPUS = [
    "the result of the call is that the tool says the answer is the result of the tool",
    "assistant user system result result: 12 13 19 38 call name arguments the the the",
    'let me see; {"name": "multiply", "arguments": {"a": 12, "b": 34}} and then and then',
]


def trained_tokenizer(
    template: str, eos: str, specials: tuple[str, ...] = (), added: tuple[str, ...] = ()
) -> Any:
    """A byte-level tokenizer with a hundred merges, learned from a few lines."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=360,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    tokenizer.add_tokens(list(added))
    kind: Any = PreTrainedTokenizerFast  # untyped in transformers
    fast = kind(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)
    fast.add_special_tokens({"eos_token": eos, "additional_special_tokens": list(specials)})
    fast.chat_template = template
    return fast
