"""The libraries that people talk to OpenAI's API with, and curl, against a site under gunicorn."""

import json
import subprocess
import time
from collections.abc import Iterator

import openai
import pytest
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from langchain_openai import OpenAI as LangChainCompletions
from openai import OpenAI

from tests.app.fake_swarm import ANSWER
from tests.app.site_process import SiteProcess

MODEL = "umbel/fake-1b"


@pytest.fixture(params=["/v1", "/api/v1"])
def client(site: SiteProcess, request: pytest.FixtureRequest) -> Iterator[OpenAI]:
    with OpenAI(base_url=site.url + request.param, api_key="any", max_retries=0) as found:
        yield found


def ask(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_openai_reads_models_and_a_whole_answer(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL
    found = client.chat.completions.create(model=MODEL, messages=ask("hi"), logprobs=True, top_logprobs=1)
    (choice,) = found.choices
    assert (choice.message.content, choice.finish_reason) == (ANSWER, "stop")
    assert "".join(token.token for token in choice.logprobs.content) == ANSWER
    assert found.usage.total_tokens == found.usage.prompt_tokens + found.usage.completion_tokens
    assert found.usage.prompt_tokens_details.cached_tokens == 0
    assert found._request_id


def test_openai_reads_streams(client: OpenAI) -> None:
    options = {"include_usage": True, "include_events": True}
    chunks = list(client.chat.completions.create(model=MODEL, messages=ask("hi"), stream=True, stream_options=options))
    assert "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices) == ANSWER
    assert chunks[-1].usage.completion_tokens > 5
    assert chunks[-2].choices[0].finish_reason == "stop"
    with client.chat.completions.stream(model=MODEL, messages=ask("hi")) as stream:
        assert stream.get_final_completion().choices[0].message.content == ANSWER


def test_openai_reads_completions_and_embeddings(client: OpenAI) -> None:
    found = client.completions.create(model=MODEL, prompt=["a", "b"], max_tokens=3, logprobs=1)
    assert [choice.text for choice in found.choices] == ["An umbel is"] * 2
    assert found.choices[0].logprobs.tokens == ["An", " umbel", " is"]
    pieces = client.completions.create(model=MODEL, prompt="a", max_tokens=3, stream=True)
    assert "".join(choice.text for piece in pieces for choice in piece.choices) == "An umbel is"
    for encoding in ("float", "base64"):
        vectors = client.embeddings.create(model=MODEL, input=["a", "bb"], encoding_format=encoding).data
        assert len(vectors) == 2
    default = client.embeddings.create(model=MODEL, input="a").data[0].embedding  # the library asks for base64
    assert default == pytest.approx(
        client.embeddings.create(model=MODEL, input="a", encoding_format="float").data[0].embedding
    )


def test_openai_raises_the_errors_that_it_documents(client: OpenAI) -> None:
    def create(text: str, **changes: object) -> object:
        return client.chat.completions.create(**{"model": MODEL, "messages": ask(text), **changes})

    with pytest.raises(openai.NotFoundError) as found:
        create("hi", model="other")
    assert (found.value.code, found.value.param, found.value.type) == (
        "model_not_found",
        "model",
        "invalid_request_error",
    )
    with pytest.raises(openai.BadRequestError) as found:
        create("hi", n=2)
    assert (found.value.code, found.value.param) == ("invalid_request", "n")
    with pytest.raises(openai.BadRequestError) as found:
        create("word " * 3000)
    assert found.value.code == "context_length_exceeded"
    for text, code in (("full", "capacity_exceeded"), ("missing", "no_servers_for_blocks"), ("bug", "internal_error")):
        with pytest.raises(openai.InternalServerError) as found:
            create(text)
        assert found.value.code == code
        assert found.value.request_id
        assert "secret" not in str(found.value)
        with pytest.raises(openai.InternalServerError):
            create(text, stream=True)
    stream = create("vanish", stream=True)
    with pytest.raises(openai.APIError) as broken:
        list(stream)
    assert broken.value.code == "no_servers_for_blocks"


def test_openai_tries_again_only_where_it_helps(site: SiteProcess) -> None:
    seen = []
    with OpenAI(base_url=site.url + "/v1", api_key="any", max_retries=1) as client:
        client._calculate_retry_timeout = lambda *_: seen.append(1) or 0.0
        with pytest.raises(openai.InternalServerError):
            client.chat.completions.create(model=MODEL, messages=ask("missing"))
        assert not seen
        with pytest.raises(openai.InternalServerError):
            client.chat.completions.create(model=MODEL, messages=ask("full"))
        assert seen


def test_langchain_chats_streams_completes_and_embeds(site: SiteProcess) -> None:
    common = {"base_url": site.url + "/v1", "api_key": "any", "model": MODEL, "max_retries": 0}
    chat = ChatOpenAI(**common, temperature=0.5, stop=["###"])
    assert chat.invoke("hi").content == ANSWER
    assert chat.invoke("hi").usage_metadata["output_tokens"] > 5
    assert "".join(piece.content for piece in chat.stream("hi")) == ANSWER
    completions = LangChainCompletions(**common, max_tokens=3)
    assert completions.invoke("hi") == "An umbel is"
    assert completions.batch(["a", "b"]) == ["An umbel is"] * 2
    embeddings = OpenAIEmbeddings(**common, check_embedding_ctx_length=False)
    assert len(embeddings.embed_documents(["a", "bb", "ccc"])) == 3
    for found in (chat.root_client, completions.client._client, embeddings.client._client):
        found.close()


def curl(*arguments: str) -> str:
    command = ["curl", "-sS", "--max-time", "20", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout


def test_curl_gets_objects_and_events(site: SiteProcess) -> None:
    body = json.dumps({"messages": ask("hi"), "max_tokens": 2})
    whole = json.loads(curl(f"{site.url}/v1/chat/completions", "-d", body))
    assert whole["choices"][0]["message"]["content"] == "An umbel"
    streamed = curl("-N", "-i", f"{site.url}/v1/chat/completions", "-d", body.replace("{", '{"stream": true, ', 1))
    assert "\nContent-Type: text/event-stream; charset=utf-8\n" in streamed
    assert "\nX-Accel-Buffering: no\n" in streamed
    assert streamed.endswith("data: [DONE]\n\n")
    assert len(json.loads(curl(f"{site.url}/v1/embeddings", "-d", '{"input": "x"}'))["data"][0]["embedding"]) == 4


def test_a_retry_of_the_library_starts_when_the_first_try_is_over(site: SiteProcess) -> None:
    """A timeout of the client closes the connection, and the site frees what it held."""
    with OpenAI(base_url=site.url + "/v1", api_key="any", max_retries=0, timeout=0.5) as client:
        began_s = time.monotonic()
        with pytest.raises(openai.APITimeoutError):
            client.chat.completions.create(model=MODEL, messages=ask("stuck"))
        assert time.monotonic() - began_s < 15
    site.wait_for(lambda counts: counts["open_sessions"] == 0)
