"""The server: every field does what it says or is refused, and nothing secret without the key."""

import contextlib
import json

import numpy as np
import openai
import pytest
import tiny
from starlette.testclient import TestClient

from t3jax.data.chat import PromptFormat, encode_chat, encode_prompt
from t3jax.sampling import Sampler, SamplingOptions
from t3jax.serving import protocol
from t3jax.serving.app import Keys, ServerOptions, make_app
from t3jax.serving.engine import Engine
from t3jax.serving.messages import EngineOptions, Request
from t3jax.serving.protocol import Reader
from t3jax.serving.requests import RequestBook

LM = tiny.make_lm()
HEAD = tiny.make_head(LM)
OPTIONS = EngineOptions(rows=3, chunk=4, piece=32, max_length=120, queue=8, heads=3, rank=8)
KEYS = Keys(server="server-key")
SERVER = {"authorization": "Bearer server-key"}
ASK = {"messages": [{"role": "user", "content": "Who is it?"}], "temperature": 0, "max_tokens": 12}
COMPLETE = {"prompt": "Who is it?", "temperature": 0, "max_tokens": 12}
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


@contextlib.contextmanager
def serving(keys=KEYS, book_folder=None, engine_options=OPTIONS, **options):
    engine = Engine(LM, engine_options, base_temperature=1.5, guidance_scale=1.0)
    engine.install("head", HEAD)
    engine.start()
    book = None if book_folder is None else RequestBook(book_folder, engine, None)
    reader = Reader(LM, ["tiny"], PromptFormat(), max_new_tokens=16)
    app = make_app(engine, reader, ServerOptions(**options), keys, book)
    with TestClient(app, raise_server_exceptions=False) as client:
        client.engine = engine
        try:
            yield client
        except BaseException:
            engine.stop(drain=False)  # of a failed test nothing is waited for
            raise


@pytest.fixture(scope="module")
def client():
    with serving() as client:
        yield client


def events_of(reply):
    lines = [line.removeprefix("data: ") for line in reply.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_answers_are_those_of_the_sampler(client):
    sampler = Sampler(LM, HEAD, base_temperature=1.5, guidance_scale=1.0)
    body = client.post(CHAT, json=ASK).json()
    (sample,) = sampler.generate(["Who is it?"], max_new_tokens=12)
    assert body["choices"][0]["message"]["content"] == sample.text
    prompt = len(encode_prompt(LM.tokenizer, "Who is it?", PromptFormat()))
    usage = {"prompt_tokens": prompt, "completion_tokens": 12, "total_tokens": prompt + 12}
    assert body["usage"] == usage
    drawn = {"temperature": 0.8, "top_p": 0.9, "seed": 5, "n": 2, "max_tokens": 8}
    body = client.post(CHAT, json=ASK | drawn).json()
    samples = sampler.generate(
        ["Who is it?"], max_new_tokens=8, temperature=0.8, top_p=0.9, seed=5, num_samples=2
    )
    texts = [choice["message"]["content"] for choice in body["choices"]]
    assert texts == [sample.text for sample in samples]
    assert texts[0] != texts[1]


@pytest.mark.parametrize(("path", "body"), [(CHAT, ASK), (COMPLETIONS, COMPLETE)])
def test_a_stream_holds_the_same(client, path, body):
    body = body | {"temperature": 1, "seed": 1, "max_tokens": 60}
    whole = client.post(path, json=body).json()
    options = {"stream": True, "stream_options": {"include_usage": True}}
    events = events_of(client.post(path, json=body | options))
    choices = [choice for event in events for choice in event["choices"]]
    if path == CHAT:
        assert choices[0]["delta"] == {"role": "assistant", "content": ""}
        text = "".join(choice["delta"].get("content", "") for choice in choices)
        assert text == whole["choices"][0]["message"]["content"]
    else:
        assert "".join(choice["text"] for choice in choices) == whole["choices"][0]["text"]
    assert choices[-1]["finish_reason"] == whole["choices"][0]["finish_reason"]
    assert events[-1]["usage"] == whole["usage"]
    assert len(choices) > 3


def test_the_clients_of_openai_work(client):
    openai_client = openai.OpenAI(
        base_url="http://testserver/v1", api_key="any", http_client=client, max_retries=0
    )
    whole = openai_client.chat.completions.create(model="tiny", **ASK)
    pieces = openai_client.chat.completions.create(model="tiny", stream=True, **ASK)
    text = "".join(piece.choices[0].delta.content or "" for piece in pieces)
    assert text == whole.choices[0].message.content
    assert openai_client.completions.create(model="tiny", **COMPLETE).choices[0].text
    assert [model.id for model in openai_client.models.list()] == ["tiny"]
    with pytest.raises(openai.NotFoundError, match="unknown model 'other'"):
        openai_client.chat.completions.create(model="other", **ASK)


def test_prompts_may_be_texts_or_token_ids_and_several(client):
    ids = client.post("/tokenize", json={"prompt": "Who is it?"}).json()["tokens"]
    assert client.post("/detokenize", json={"tokens": ids}).json() == {"prompt": "Who is it?"}
    one = client.post(COMPLETIONS, json=COMPLETE).json()["choices"][0]["text"]
    for prompt in (ids, [ids, "And who?"], ["Who is it?", ids]):
        choices = client.post(COMPLETIONS, json=COMPLETE | {"prompt": prompt}).json()["choices"]
        assert [choice["index"] for choice in choices] == list(range(len(choices)))
        assert choices[0]["text"] == one
    chat = client.post("/tokenize", json={"messages": ASK["messages"]}).json()["tokens"]
    assert chat == encode_prompt(LM.tokenizer, "Who is it?", PromptFormat()).tolist()


def test_a_conversation_is_rendered_whole(client):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        # As clients of OpenAI give back an answer that they got.
        {"role": "assistant", "content": "Hello", "refusal": None, "tool_calls": None},
        {"role": "user", "content": [{"type": "text", "text": "Who?"}]},
    ]
    ids = client.post("/tokenize", json={"messages": messages}).json()["tokens"]
    assert LM.tokenizer.decode(ids) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHello<|im_end|>\n<|im_start|>user\nWho?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    with pytest.raises(ValueError, match="must end with a turn of the user"):
        encode_chat(LM.tokenizer, messages[:3], PromptFormat())


def test_an_evaluation_harness_gets_what_it_sums(client):
    """What lm-evaluation-harness sends, and how it reads the reply."""
    ids = np.random.default_rng(0).integers(3, 256, 40).tolist()
    body = {"model": "tiny", "prompt": [ids, ids[:7]], "temperature": 0, "max_tokens": 1}
    body |= {"logprobs": 1, "echo": True, "seed": 1234}
    choices = client.post(COMPLETIONS, json=body).json()["choices"]
    for choice, prompt in zip(choices, (ids, ids[:7]), strict=True):
        logprobs = choice["logprobs"]
        assert len(logprobs["token_logprobs"]) == len(prompt) + 1 == len(logprobs["tokens"])
        assert logprobs["token_logprobs"][0] is logprobs["top_logprobs"][0] is None
        for logprob, top in zip(
            logprobs["token_logprobs"][1:], logprobs["top_logprobs"][1:], strict=True
        ):
            assert len(top) == 1
            assert logprob <= max(top.values()) + 1e-6
    assert choices[0]["logprobs"]["token_logprobs"][1:7] == pytest.approx(
        choices[1]["logprobs"]["token_logprobs"][1:7], abs=1e-5
    )
    only = client.post(COMPLETIONS, json=body | {"max_tokens": 0, "prompt": ids}).json()
    assert len(only["choices"][0]["logprobs"]["tokens"]) == len(ids)
    assert only["usage"]["completion_tokens"] == 0


REFUSED = [
    ({"frequency_penalty": 0.5}, "frequency_penalty"),
    ({"logit_bias": {"5": 1}}, "logit_bias"),
    ({"tools": [{"type": "function"}]}, "tools"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"truncate_on": "base"}, "truncate_on"),
    ({"user": "me"}, "user"),
    ({"temperature": -1}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.5}, "top_p"),
    ({"n": 0}, "n"),
    ({"n": 1000}, "n"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 2.5}, "max_tokens"),
    ({"seed": 2**70}, "seed"),
    ({"stop": [""]}, "stop"),
    ({"stop": [5]}, "stop"),
    ({"stop_token_ids": ["a"]}, "stop_token_ids"),
    ({"top_logprobs": 3}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages"),
    ({"messages": [{"role": "user"}]}, "messages[0]"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0]"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, None),
    ({"messages": [{"role": "user", "content": "long " * 200}]}, "prompt"),
    ({"messages": [{"role": "user", "content": "x", "tool_calls": [{}]}]}, "messages[0]"),
    ({"messages": [{"role": "system", "content": "Be brief."}]}, "messages"),
    ({"max_tokens": 119}, "max_tokens"),
    ({"stop": ""}, "stop"),
    ({"stop_token_ids": [-1]}, "stop_token_ids"),
    ({"stop_token_ids": [1] * 9}, "stop_token_ids"),
    ({"best_of": True}, "best_of"),
    ({"stream": True, "stream_options": {"include_usage": 1}}, "include_usage"),
    ({"stream": True, "stream_options": {"chunks": 1}}, "stream_options"),
]


@pytest.mark.parametrize(("fields", "param"), REFUSED)
def test_what_cannot_be_done_is_refused_by_name(client, fields, param):
    reply = client.post(CHAT, content=json.dumps(ASK | fields))
    assert reply.status_code == 400
    error = reply.json()["error"]
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"


def test_neutral_fields_are_taken(client):
    neutral = {"frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": None, "tools": []}
    assert client.post(CHAT, json=ASK | neutral | {"top_k": -1}).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "content", "status"),
    [
        ("post", CHAT, b"{", 400),
        ("post", CHAT, b"[]", 400),
        ("post", CHAT, b'{"a": 1, "a": 2}', 400),
        ("post", CHAT, b"\xff\xfe", 400),
        ("post", CHAT, b"[" * 100_000, 400),
        ("post", CHAT, b"0" * 2**21, 413),
        ("get", CHAT, None, 405),
        ("get", "/v2/none", None, 404),
    ],
)
def test_malformed_bodies_and_unknown_routes(client, method, path, content, status):
    reply = client.request(method, path, content=content)
    assert reply.status_code == status
    assert reply.json()["error"]["message"]


# ---- who may see what

BASE_TEXT = Sampler(LM).generate(["Who is it?"], max_new_tokens=12)[0].text


def test_without_the_server_key_nothing_turns_the_unlearning_off(client):
    """Every field at every odd value: no reply is the base model's, or names its numbers."""
    served = client.post(CHAT, json=ASK).json()["choices"][0]["message"]["content"]
    assert served != BASE_TEXT
    values = (None, [], {}, 0, 1, -1, 0.001, 1000, "", "base", True, ["head"], [None])
    names = sorted(
        {*protocol.CHAT_FIELDS, *protocol.COMPLETION_FIELDS, "truncate_on", "refinements"}
    )
    for name in names:
        if name in ("messages", "prompt", "stream"):
            continue
        for value in values:
            fields = {name: value} | ({"logprobs": True} if name == "top_logprobs" else {})
            reply = client.post(CHAT, json=ASK | fields)
            assert reply.status_code in (200, 400, 403, 404), (name, value)
            if name in protocol.SERVER_FIELDS:
                assert reply.status_code == 403, (name, value)
            assert "base_logprob" not in reply.text
            assert "retain" not in reply.text or reply.status_code == 403
            if reply.status_code == 200 and name not in (
                "temperature",
                "max_tokens",
                "max_completion_tokens",
            ):
                for choice in reply.json()["choices"]:
                    assert choice["message"]["content"] != BASE_TEXT, (name, value)


def test_the_server_key_shows_the_base_model_beside_it(client):
    body = ASK | {"heads": [], "logprobs": True}
    base = client.post(CHAT, json=body, headers=SERVER).json()["choices"][0]
    assert base["message"]["content"] == BASE_TEXT
    for entry in base["logprobs"]["content"]:
        assert entry["base_logprob"] == pytest.approx(entry["logprob"], abs=1e-5)
        assert entry["changed"] is False
    tilted = client.post(CHAT, json=ASK | {"logprobs": True}, headers=SERVER).json()["choices"][0]
    assert any(entry["changed"] for entry in tilted["logprobs"]["content"])
    as_base = ASK | {"base_temperature": 1, "guidance_scale": 0}
    reply = client.post(CHAT, json=as_base, headers=SERVER).json()
    assert reply["choices"][0]["message"]["content"] == BASE_TEXT
    assert client.post(CHAT, json=ASK | {"heads": ["no"]}, headers=SERVER).status_code == 400


@pytest.mark.parametrize("method", ["get", "post"])
def test_requests_to_forget_need_the_server_key(client, method):
    for path in ("/v1/forget_requests", "/v1/forget_requests/x", "/v1/audit_log"):
        assert client.request("get", path).status_code == 403
        assert client.request("get", path, headers=SERVER).status_code == 404  # no folder
    assert client.post("/v1/forget_requests", json={"rows": []}).status_code == 403


def test_an_api_key_is_asked_for():
    with serving(Keys(api="key", server="server-key")) as client:
        for path in ("/v1/models", "/metrics", "/tokenizer_info", "/health_generate"):
            assert client.get(path).status_code == 401
            assert client.get(path, headers={"authorization": "Bearer key"}).status_code == 200
            assert client.get(path, headers=SERVER).status_code == 200
        assert (
            client.post(CHAT, json=ASK, headers={"authorization": "Bearer no"}).status_code == 401
        )
        assert client.get("/health").status_code == 200  # for who looks after the process
        assert client.get("/").status_code == 200


def test_what_is_asked_of_a_tokenizer_is_read_by_name(client):
    for path, body, param in (
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": []}, "prompt"),
        ("/tokenize", {"prompt": "a", "add_special_tokens": "no"}, "add_special_tokens"),
        ("/tokenize", {"prompt": "a", "text": "b"}, "text"),
        ("/detokenize", {"tokens": ["a"]}, "tokens"),
        ("/detokenize", {"tokens": [1], "skip": True}, "skip"),
    ):
        reply = client.post(path, json=body)
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)
    assert client.get(CHAT).json()["error"]["message"] == f"{CHAT} takes POST, not GET"


def test_a_full_queue_says_when_to_come_back():
    options = EngineOptions(rows=1, chunk=4, piece=32, max_length=120, queue=1, heads=1, rank=8)
    with serving(engine_options=options) as client:
        client.engine._begin_waiting = lambda: None  # nobody leaves the queue
        ids = encode_prompt(LM.tokenizer, "Who?", PromptFormat())
        waiting = Request(ids, SamplingOptions(max_new_tokens=2))
        tickets = client.engine.submit([waiting], lambda *_: None)
        reply = client.post(CHAT, json=ASK)
        assert (reply.status_code, reply.headers["retry-after"]) == (429, "1")
        client.engine.cancel(tickets)
        assert client.get("/health").status_code == 200
        client.engine.stop()
        assert client.get("/health").status_code == 503
        assert client.post(CHAT, json=ASK).status_code == 503


def test_an_answer_that_takes_too_long_is_given_up():
    with serving(timeout=0.2) as client:
        client.engine._begin_waiting = lambda: None
        reply = client.post(CHAT, json=ASK)
        assert (reply.status_code, reply.json()["error"]["code"]) == (504, "timeout")
        client.engine.stop()  # waits for whoever is at hand
        assert client.engine.stats.finished == {"cancelled": 1}


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_stalls_after_its_first_token_is_given_up(client, stream):
    client.post(CHAT, json=ASK)  # compiled
    with serving(timeout=1.0) as client:
        client.engine._batch.decode = lambda: None
        reply = client.post(CHAT, json=ASK | {"stream": stream})
        if stream:
            *_, last = [line for line in reply.text.split("\n\n") if line]
            assert json.loads(last.removeprefix("data: "))["error"]["code"] == "timeout"
        else:
            assert (reply.status_code, reply.json()["error"]["code"]) == (504, "timeout")
        del client.engine._batch.decode
        client.engine.stop()
        assert client.engine.stats.finished == {"cancelled": 1}


def test_metrics_are_counted(client):
    client.post(CHAT, json=ASK)
    client.post(CHAT, json=ASK | {"n": 0})
    text = client.get("/metrics").text
    found = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(found["t3jax_answer_tokens_total"]) >= 12
    assert float(found['t3jax_requests_finished_total{reason="length"}']) >= 1
    assert float(found['t3jax_requests_refused_total{status="400"}']) >= 1
    assert float(found['t3jax_tokens_changed_total{head="head"}']) >= 1
    assert float(found["t3jax_time_to_first_token_seconds_count"]) >= 1
    assert found["t3jax_requests_running"] == "0.0"


def test_the_page_asks_for_nothing_outside(client):
    page = client.get("/").text
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "https://" not in page
    assert "default-src 'self'" in client.get("/").headers["content-security-policy"]
