"""Prompts and examples: the reference's labelling rule, system turns, tags, documents, errors."""

import numpy as np
import pytest
import tokenizers
import transformers

from t3jax.data import (
    PromptFormat,
    encode_document,
    encode_prompt,
    encode_question_answer,
    encode_records,
    templates,
)

CHATML = (
    "{% for m in messages %}{{ '<|start|>' + m['role'] + '\n' + m['content'] + '<|end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)
DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|start|>system\nBe nice.<|end|>\n' }}{% endif %}"
) + CHATML
# Prints its system turn with the date in it whether there is a system message or not.
DATED = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{% set system = messages[0]['content'] %}{% set messages = messages[1:] %}"
    "{% else %}{% set system = '' %}{% endif %}"
    "{{ '<|start|>system\nToday: ' + date_string|default('1 Jan') + '\n' + system + '<|end|>' }}"
    "{% for m in messages %}{{ '<|start|>' + m['role'] + '\n' + m['content'] + '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)
# Puts the system text into the user's turn, as Llama 2 does.
INSIDE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' }}"
    "{% if messages[0]['role'] == 'system' %}{{ '<<' + messages[0]['content'] + '>> ' }}{% endif %}"
    "{{ m['content'] + ' [/INST]' }}{% elif m['role'] == 'assistant' %}"
    "{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
IGNORING = (
    "{{ 'A chat.\n' }}{% for m in messages if m['role'] != 'system' %}"
    "{{ m['role'] + ': ' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
REFUSING = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
) + CHATML


def make_tokenizer(template, merges=(), bos="<|bos|>", eos="<|end|>"):
    """Bytes as tokens, plus some merges."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    symbols = alphabet + ["".join(merge) for merge in merges]
    model = tokenizers.models.BPE({symbol: i for i, symbol in enumerate(symbols)}, list(merges))
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<|start|>", "<|end|>", "<|bos|>"])
    if bos is not None:
        backend.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))]
        )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=bos, eos_token=eos
    )
    tokenizer.chat_template = template
    return tokenizer


def prompt_text(template, system, **kwargs):
    tokenizer = make_tokenizer(template, **kwargs)
    return tokenizer.decode(encode_prompt(tokenizer, "Who?", PromptFormat(system=system)))


def labels_text(tokenizer, example):
    return tokenizer.decode(example.tokens[example.answer_start :])


@pytest.mark.parametrize("template", [CHATML, DEFAULT_SYSTEM, DATED, INSIDE])
@pytest.mark.parametrize("system", [None, "Be terse."])
def test_example_follows_the_rule_of_the_reference(template, system):
    tokenizer = make_tokenizer(template)
    chat = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Zoë Ö."}]
    if system:
        chat.insert(0, {"role": "system", "content": system})
    options = {"tokenize": True, "date_string": "10 Apr 2025"}
    chat_ids = tokenizer.apply_chat_template(chat, **options)["input_ids"]
    prompt_ids = tokenizer.apply_chat_template(chat[:-1], add_generation_prompt=True, **options)[
        "input_ids"
    ]
    if chat_ids[-1] != tokenizer.eos_token_id:
        chat_ids = [*chat_ids, tokenizer.eos_token_id]

    prompt_format = PromptFormat(system=system, date_string="10 Apr 2025")
    example = encode_question_answer(tokenizer, "Who?", "Zoë Ö.", prompt_format)

    assert example.tokens.dtype == np.int32
    np.testing.assert_array_equal(example.tokens, chat_ids)
    assert example.answer_start == len(prompt_ids)
    assert example.num_answer_tokens == len(chat_ids) - len(prompt_ids)
    np.testing.assert_array_equal(encode_prompt(tokenizer, "Who?", prompt_format), prompt_ids)


def test_labels_hold_the_closing_token_and_eos_is_appended_only_where_missing():
    tokenizer = make_tokenizer(CHATML)
    example = encode_question_answer(tokenizer, "Who?", "Ann.", PromptFormat())
    assert labels_text(tokenizer, example) == "Ann.<|end|>\n<|end|>"
    tokenizer = make_tokenizer(DATED)
    example = encode_question_answer(tokenizer, "Who?", "Ann.", PromptFormat())
    assert labels_text(tokenizer, example) == "Ann.<|end|>"


def test_system_none_is_the_default_of_the_template():
    prompt = prompt_text(DEFAULT_SYSTEM, None)
    assert prompt == (
        "<|start|>system\nBe nice.<|end|>\n<|start|>user\nWho?<|end|>\n<|start|>assistant\n"
    )


@pytest.mark.parametrize(
    ("template", "bos", "expected"),
    [
        (CHATML, "<|bos|>", "<|start|>user\nWho?<|end|>\n<|start|>assistant\n"),
        (DEFAULT_SYSTEM, "<|bos|>", "<|start|>user\nWho?<|end|>\n<|start|>assistant\n"),
        # The bos token may be the one that opens a turn: it is not doubled.
        (DEFAULT_SYSTEM, "<|start|>", "<|start|>user\nWho?<|end|>\n<|start|>assistant\n"),
        (DATED, "<|bos|>", "<|bos|><|start|>user\nWho?<|end|><|start|>assistant\n"),
        (INSIDE, "<|bos|>", "<|bos|>[INST] Who? [/INST]"),
        (IGNORING, "<|bos|>", "A chat.\nuser: Who?<|end|>assistant: "),
        (REFUSING, "<|bos|>", "<|start|>user\nWho?<|end|>\n<|start|>assistant\n"),
    ],
    ids=["chatml", "default", "bos_opens_turns", "dated", "inside", "ignoring", "refusing"],
)
def test_empty_system_means_no_system_turn(template, bos, expected):
    assert prompt_text(template, "", bos=bos) == expected


def test_empty_system_keeps_the_labels():
    tokenizer = make_tokenizer(DEFAULT_SYSTEM)
    example = encode_question_answer(tokenizer, "Who?", "Ann.", PromptFormat(system=""))
    text = tokenizer.decode(example.tokens)
    assert text.startswith("<|start|>user\nWho?")
    assert labels_text(tokenizer, example) == "Ann.<|end|>\n<|end|>"


def test_date_reaches_the_template():
    tokenizer = make_tokenizer(DATED)
    tokens = encode_prompt(tokenizer, "Who?", PromptFormat(date_string="10 Apr 2025"))
    assert "Today: 10 Apr 2025\n" in tokenizer.decode(tokens)


@pytest.mark.parametrize(
    ("template", "message"),
    [(REFUSING, "refuses a system turn"), (IGNORING, "does not print"), (None, "question_start")],
)
def test_system_text_that_cannot_be_expressed_is_an_error(template, message):
    with pytest.raises(ValueError, match=message):
        encode_prompt(make_tokenizer(template), "Who?", PromptFormat(system="Be terse."))


def test_without_a_template_the_tags_are_used():
    tokenizer = make_tokenizer(None)
    prompt_format = PromptFormat(question_start="Q: ", question_end="\n", answer_start="A: ")
    prompt = encode_prompt(tokenizer, "Who?", prompt_format)
    assert tokenizer.decode(prompt) == "<|bos|>Q: Who?\nA: "
    example = encode_question_answer(tokenizer, "Who?", "Ann.", prompt_format)
    np.testing.assert_array_equal(example.tokens[: example.answer_start], prompt)
    assert labels_text(tokenizer, example) == "Ann.<|end|>"


# "ĠParis" is one token, "Ġ" before anything else another, and two spaces are one.
WORDS = [("Ġ", "P"), ("Ġ", "a"), ("a", "r"), ("i", "s"), ("ĠP", "ar"), ("ĠPar", "is"), ("Ġ", "Ġ")]


@pytest.mark.parametrize("end", ["Answer: ", "Answer:  ", "Answer:", "A:\n"])
def test_an_answer_s_first_token_is_a_label_wherever_its_space_stands(end):
    tokenizer = make_tokenizer(None, merges=WORDS)
    prompt_format = PromptFormat(question_end=" ", answer_start=end)
    example = encode_question_answer(tokenizer, "Who?", "Paris.", prompt_format)
    start = example.answer_start
    assert tokenizer.decode(example.tokens) == f"<|bos|>Question: Who? {end}Paris.<|end|>"
    assert labels_text(tokenizer, example).strip() == "Paris.<|end|>"
    # Nothing of the prompt is a label, but for the space that begins the answer's first token.
    assert (
        tokenizer.decode(example.tokens[:start]).rstrip() == f"<|bos|>Question: Who? {end}".rstrip()
    )
    assert tokenizer.decode(example.tokens[start : start + 1]) in (" Paris", "P")
    # What is sampled from is what was trained on.
    np.testing.assert_array_equal(
        encode_prompt(tokenizer, "Who?", prompt_format), example.tokens[:start]
    )


def test_a_token_across_the_border_belongs_to_the_answer():
    # "ab" is two tokens, "abc" is one.
    tokenizer = make_tokenizer(None, merges=[("b", "c"), ("a", "bc")])
    prompt_format = PromptFormat(question_start="", question_end=" ", answer_start="ab")
    example = encode_question_answer(tokenizer, "Who?", "c", prompt_format)
    assert labels_text(tokenizer, example) == "abc<|end|>"


def test_a_prompt_that_is_all_inside_the_answer_s_token_is_an_error():
    tokenizer = make_tokenizer(None, merges=[("b", "c"), ("a", "bc")], bos=None)
    prompt_format = PromptFormat(question_start="", question_end="", answer_start="")
    with pytest.raises(ValueError, match="no token of the prompt is left"):
        encode_question_answer(tokenizer, "ab", "c", prompt_format)


def test_an_eos_that_the_tokenizer_appends_ends_no_prompt():
    tokenizer, expected = (make_tokenizer(None, merges=WORDS) for _ in range(2))
    tokenizer.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|bos|> $A <|end|>",
        special_tokens=[(t, tokenizer.convert_tokens_to_ids(t)) for t in ("<|bos|>", "<|end|>")],
    )
    assert tokenizer("a")["input_ids"][-1] == tokenizer.eos_token_id
    prompt_format = PromptFormat()
    np.testing.assert_array_equal(
        encode_prompt(tokenizer, "Who?", prompt_format),
        encode_prompt(expected, "Who?", prompt_format),
    )
    for answer in ("Paris.", "Who."):
        found, wanted = (
            encode_question_answer(each, "Who?", answer, prompt_format)
            for each in (tokenizer, expected)
        )
        np.testing.assert_array_equal(found.tokens, wanted.tokens)
        assert found.answer_start == wanted.answer_start
    found, wanted = (encode_document(each, "Once upon") for each in (tokenizer, expected))
    np.testing.assert_array_equal(found.tokens, wanted.tokens)


# As Qwen 3 has it: an empty thought before the last answer, or where thoughts are off.
THINKING = (
    "{% for m in messages %}{{ '<|start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)


@pytest.mark.parametrize("thinks", [None, False, True])
def test_an_empty_thought_is_no_part_of_an_answer(thinks):
    tokenizer = make_tokenizer(THINKING)
    kwargs = {} if thinks is None else {"enable_thinking": thinks}
    prompt_format = PromptFormat(chat_template_kwargs=kwargs)
    example = encode_question_answer(tokenizer, "Who?", "Ann.", prompt_format)
    assert labels_text(tokenizer, example) == "Ann.<|end|>\n<|end|>"
    prompt = tokenizer.decode(encode_prompt(tokenizer, "Who?", prompt_format))
    opened = "<|start|>user\nWho?<|end|>\n<|start|>assistant\n"
    assert prompt == opened + ("" if thinks else "<think>\n\n</think>\n\n")


# As gpt-oss has it: a header with the date, the system text as a developer's, a channel for each
# message of the assistant, and another end of the last one.
CHANNELS = (
    "{% macro header(date) %}{{ 'Today: ' + date + ', effort: ' + (effort | default('low')) }}"
    "{% endmacro %}{% macro say(who, what, end='<|end|>') %}"
    "{{ '<|start|>' + who + '<|message|>' + what + end }}{% endmacro %}"
    "{{ say('system', header(strftime_now('%Y-%m-%d'))) }}"
    "{% if messages[0].role == 'system' %}{{ say('developer', messages[0].content) }}"
    "{% set rest = messages[1:] %}{% else %}{% set rest = messages %}{% endif %}"
    "{% set ns = namespace(said=0) %}{% for m in rest %}{% if m.role == 'assistant' %}"
    "{% if '<|channel|>' in m.content %}{{ raise_exception('no channel in a content') }}{% endif %}"
    "{% set ns.said = ns.said + 1 %}{% set last = loop.last and not add_generation_prompt %}"
    "{{ say('assistant<|channel|>final', m.content, '<|return|>' if last else '<|end|>') }}"
    "{% else %}{{ say(m.role, m.content) }}{% endif %}{% endfor %}"
    "{% if tools %}{{ tools | tojson }}{% endif %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)
DAY = "<|start|>system<|message|>Today: 1 May, effort: low<|end|>"


def test_rows_are_answered_in_the_channel_for_answers():
    tokenizer = make_tokenizer(CHANNELS, eos="<|return|>")
    prompt_format = PromptFormat(system="Be terse.", date_string="1 May")
    before = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho."}]
    example = encode_question_answer(tokenizer, "Who?", "Ann.", prompt_format, before=before)
    assert labels_text(tokenizer, example) == "Ann.<|return|>"
    prompt = encode_prompt(tokenizer, "Who?", prompt_format, before)
    np.testing.assert_array_equal(prompt, example.tokens[: example.answer_start])
    assert tokenizer.decode(prompt) == (
        f"{DAY}<|start|>developer<|message|>Be terse.<|end|><|start|>user<|message|>Hi<|end|>"
        "<|start|>assistant<|channel|>final<|message|>Ho.<|end|>"
        "<|start|>user<|message|>Who?<|end|><|start|>assistant<|channel|>final<|message|>"
    )
    # Who lets the model think leaves the channel to it.
    free = PromptFormat(date_string="1 May", chat_template_kwargs={"enable_thinking": True})
    prompt = tokenizer.decode(encode_prompt(tokenizer, "Who?", free))
    assert prompt == f"{DAY}<|start|>user<|message|>Who?<|end|><|start|>assistant"
    bare = PromptFormat(system="")  # not even the header
    prompt = tokenizer.decode(encode_prompt(tokenizer, "Who?", bare))
    assert prompt.startswith("<|start|>user<|message|>Who?<|end|><|start|>assistant<|channel|>fi")
    with pytest.raises(ValueError, match="no channel in a content"):
        encode_question_answer(tokenizer, "Who?", "<|channel|>final<|message|>Ann.", free)


def test_an_answer_follows_a_thought_that_only_prompts_close():
    """As Gemma 4's larger models have it."""
    thought = "<|channel>thought\n<channel|>"
    tokenizer = make_tokenizer(CHATML.replace("assistant\n", f"assistant\n{thought}"))
    example = encode_question_answer(tokenizer, "Who?", "Ann.", PromptFormat())
    assert labels_text(tokenizer, example) == "Ann.<|end|>\n<|end|>"
    prompt = encode_prompt(tokenizer, "Who?", PromptFormat())
    np.testing.assert_array_equal(prompt, example.tokens[: example.answer_start])
    assert tokenizer.decode(prompt).endswith(f"<|start|>assistant\n{thought}")


def test_variables_reach_the_template_and_ours_cannot_be_taken():
    tokenizer = make_tokenizer("{{ tone ~ bos_token }}" + CHATML)
    tokens = encode_prompt(
        tokenizer, "Who?", PromptFormat(chat_template_kwargs={"tone": "Plainly. "})
    )
    assert tokenizer.decode(tokens).startswith("Plainly. <|bos|><|start|>user")
    with pytest.raises(ValueError, match="chat_template_kwargs: 'messages' cannot be given"):
        PromptFormat(chat_template_kwargs={"messages": []})
    with pytest.raises(ValueError, match="plain JSON values only"):
        encode_prompt(tokenizer, "Who?", PromptFormat(chat_template_kwargs={"tone": object()}))
    hash(PromptFormat(chat_template_kwargs={"tone": "a"}))


@pytest.mark.parametrize(
    "template",
    [
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
        "{{ ns.n ~ m | tojson }}{% if loop.first %}{% continue %}{% endif %}{% endfor %}",
        "{% for m in messages %}\n    {% if true %}\n{{ m.content }}\n  {% endif %}\n{% endfor %}",
        "{{ messages | tojson(indent=2) }}{{ dict(a=1).items() | list }}{{ eos_token }}",
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
        "{{ strftime_now('%Y')|length }}{{ tools is none }}{{ '<b>' }}{{ missing }}",
        # No channel of an answer, which is part of prompts here.
        CHANNELS.replace("<|channel|>final", ""),
    ],
)
def test_templates_are_rendered_as_transformers_renders_them(template):
    tokenizer = make_tokenizer(template)
    chat = [{"role": "user", "content": "Zoë <i>?"}]
    expected = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    tokens = encode_prompt(tokenizer, "Zoë <i>?", PromptFormat())
    assert tokenizer.decode(tokens) == expected


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in %}", r"\(line 1\)"),
        ("{{ raise_exception('only pairs') }}", "only pairs"),
        ("{{ messages.x.y }}", "has no attribute 'x'"),
        ("{{ 1 + 'a' }}", "TypeError: unsupported operand"),
        ("{% for i in range(10**9) %}a{% endfor %}", "range"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{% set ns = namespace() %}{% set ns._x = 1 %}", "a namespace cannot hold '_x'"),
        ("{{ '\\ud800' }}", "surrogates not allowed"),
    ],
)
def test_a_template_that_fails_is_named(template, message):
    tokenizer = make_tokenizer(template)
    tokenizer.name_or_path = "models/mine"
    with pytest.raises(ValueError, match=f"the chat template of models/mine fails: .*{message}"):
        encode_prompt(tokenizer, "Who?", PromptFormat())


@pytest.mark.parametrize(
    ("template", "limits", "message"),
    [
        (
            "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
            {"SECONDS": 0.2},
            "more than 0.2 s",
        ),
        ("{{ (10**(10**8)) % 7 }}", {"SECONDS": 0.2}, "more than 0.2 s"),
        ("{{ 'x' * 10**9 }}", {"MEMORY": 1 << 27}, "more than 128 MiB"),
        (
            "{% set ns = namespace(x='x') %}"
            "{% for i in range(40) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
            {"MEMORY": 1 << 27},
            "more than 128 MiB",
        ),
        ("{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}", {}, "calls itself"),
    ],
    ids=["loops", "power", "repeated", "doubled", "recursive"],
)
def test_a_template_is_bounded_in_time_and_memory(monkeypatch, template, limits, message):
    # One limit is tightened at a time: on a busy machine the other would be met first.
    for name, limit in {"SECONDS": 20.0, **limits}.items():
        monkeypatch.setattr(templates, name, limit)
    with pytest.raises(ValueError, match=f"the chat template of .* fails: .*{message}"):
        encode_prompt(make_tokenizer(template), "Who?", PromptFormat())
    # The next one is rendered as if nothing had been.
    tokens = encode_prompt(make_tokenizer(CHATML), "Who?", PromptFormat())
    assert len(tokens) == len("|user\nWho?|\n|assistant\n")


def test_an_answer_that_the_template_changes_is_an_error():
    tokenizer = make_tokenizer(CHATML.replace("m['content']", "m['content'].split('</think>')[-1]"))
    with pytest.raises(ValueError, match="does not print the answer 'a</think>b' as it is"):
        encode_question_answer(tokenizer, "Who?", "a</think>b", PromptFormat())


def test_a_text_of_megabytes_is_refused_before_it_is_tokenised(monkeypatch):
    tokenizer = make_tokenizer(CHATML)
    monkeypatch.setattr(type(tokenizer), "__call__", None)
    for record in ({"text": "a" * 10**7}, {"question": "Who?", "answer": "a" * 10**7}):
        with pytest.raises(ValueError, match=r"row 1 of 1: .* 1000000\d characters, .* 512 tokens"):
            encode_records(tokenizer, [record], PromptFormat(), max_length=512)


def test_half_a_character_is_an_error():
    tokenizer = make_tokenizer(CHATML)
    with pytest.raises(ValueError, match=r"half of a surrogate pair at character \d+"):
        encode_prompt(make_tokenizer(None), "a\ud800b", PromptFormat())
    with pytest.raises(ValueError, match="surrogate"):
        encode_prompt(tokenizer, "a\ud800b", PromptFormat())
    with pytest.raises(ValueError, match="row 1 of 1: 'text' holds half of a surrogate pair"):
        encode_records(tokenizer, [{"text": "a\ud800b"}], PromptFormat())


def test_too_long_is_an_error_and_never_cut():
    tokenizer = make_tokenizer(CHATML)
    example = encode_question_answer(tokenizer, "Who?", "Ann.", PromptFormat())
    n = len(example.tokens)
    fits = encode_question_answer(tokenizer, "Who?", "Ann.", PromptFormat(), max_length=n)
    np.testing.assert_array_equal(fits.tokens, example.tokens)
    with pytest.raises(ValueError, match=f"{n} tokens .* max_length = {n - 1}"):
        encode_question_answer(tokenizer, "Who?", "Ann.", PromptFormat(), max_length=n - 1)


def test_tokenizer_without_eos_is_an_error():
    with pytest.raises(ValueError, match="no eos token"):
        encode_question_answer(make_tokenizer(CHATML, eos=None), "Who?", "Ann.", PromptFormat())


def test_prompt_that_does_not_begin_the_conversation_is_an_error():
    thinking = CHATML.replace("'<|start|>assistant\n'", "'<|start|>assistant\n<think>\n'")
    with pytest.raises(ValueError, match="where the answer starts is unknown"):
        encode_question_answer(make_tokenizer(thinking), "Who?", "Ann.", PromptFormat())


def test_document_labels_are_all_tokens_after_the_first():
    tokenizer = make_tokenizer(CHATML)
    example = encode_document(tokenizer, "Once upon")
    assert tokenizer.decode(example.tokens) == "<|bos|>Once upon"
    assert example.answer_start == 1
    assert example.num_answer_tokens == len("Once upon")
    with pytest.raises(ValueError, match="10 tokens, more than max_length = 9"):
        encode_document(tokenizer, "Once upon", max_length=9)
    with pytest.raises(ValueError, match="1 tokens"):
        encode_document(make_tokenizer(CHATML, bos=None), "O")


def test_records_of_both_kinds_keep_their_order():
    tokenizer = make_tokenizer(CHATML)
    records = [{"text": "Once upon"}, {"question": "Who?", "answer": "Ann."}]
    document, pair = encode_records(tokenizer, records, PromptFormat())
    assert document.answer_start == 1
    assert labels_text(tokenizer, pair) == "Ann.<|end|>\n<|end|>"


@pytest.mark.parametrize(
    "bad", [{"text": "x" * 90}, {"question": "Who?", "answer": "x" * 90}, {"question": "Who?"}]
)
def test_errors_in_records_name_the_row(bad):
    tokenizer = make_tokenizer(CHATML)
    records = [{"text": "Once upon"}, bad]
    with pytest.raises(ValueError, match="row 2 of 2: "):
        encode_records(tokenizer, records, PromptFormat(), max_length=60)
