"""What docs/api.md says of the OpenAI-compatible API is what its models say."""

from pydantic import TypeAdapter

from app import errors as site_errors
from app.openai_errors import CODES, openai_error_headers
from app.openai_replies import ChatChunk, ChatCompletion, EmbeddingList, ErrorBody, ModelList
from app.openai_requests import ChatRequest, CompletionRequest, EmbeddingsRequest
from tests.test_docs import code_spans, json_examples, page, section, tables


def test_fields_of_openai_requests_are_in_the_tables() -> None:
    rows = tables(section(page("api"), "The OpenAI-compatible API"))[0]
    named = {"chat": set(), "completions": set()}
    for row in rows:
        names, owners = code_spans(row[0]), row[1].split(", ") * len(code_spans(row[0]))
        for name, owner in zip(names, owners, strict=False):
            for part in named if owner == "both" else [owner]:
                named[part].add(name)
    assert named["chat"] == set(ChatRequest.model_fields)
    assert named["completions"] == set(CompletionRequest.model_fields)
    embeddings = tables(section(page("api"), "Embeddings"))[0]
    assert [code_spans(row[0])[0] for row in embeddings] == list(EmbeddingsRequest.model_fields)


def test_answers_in_openais_form_are_those_that_the_site_gives() -> None:
    kinds = {
        "chat.completion": ChatCompletion, "chat.completion.chunk": ChatChunk, "list": EmbeddingList | ModelList,
    }  # fmt: skip
    shown = [values for values in json_examples() if values.get("object") in kinds]
    for values in shown:
        TypeAdapter(kinds[str(values["object"])]).validate_python(values)
    assert {values["object"] for values in shown} == set(kinds)
    assert any("param" in _error_of(values) and ErrorBody.model_validate(values) for values in json_examples())


def _error_of(values: dict[str, object]) -> dict[str, object]:
    error = values.get("error")
    return error if isinstance(error, dict) else {}


FINAL = ("max_length_exceeded", "content_refused")
"""Codes with which the same request fails again."""


def test_codes_of_openais_form_are_in_the_table() -> None:
    (rows,) = tables(section(page("api"), "Errors in OpenAI's form"))
    found = {code_spans(row[0])[0]: (code_spans(row[1])[0], int(row[2]), row[3][:2] != "no") for row in rows}
    reports = {code: site_errors.ErrorReport("", code, "", code not in FINAL, "") for code in CODES}
    expected = {
        code: (CODES[code], site_errors.http_status(r), openai_error_headers(r)["X-Should-Retry"] == "true")
        for code, r in reports.items()
    }
    assert found == expected
