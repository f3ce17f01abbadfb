"""What litellm gets from a site, as JSON on stdout: `python litellm_client.py URL MODEL`.

A program of its own, since litellm wants an older `openai` than the one that is tested here.
"""

import json
import sys
from typing import Any

import litellm


def main(url: str, model: str) -> dict[str, Any]:
    litellm.telemetry = False
    openai = {"model": f"openai/{model}", "api_base": f"{url}/v1", "api_key": "any", "num_retries": 0}
    question = [{"role": "user", "content": "hi"}]
    whole = litellm.completion(**openai, messages=question)
    pieces = list(litellm.completion(**openai, messages=question, stream=True, stream_options={"include_usage": True}))
    found: dict[str, Any] = {
        "whole": whole.choices[0].message.content,
        "tokens": whole.usage.completion_tokens,
        "streamed": "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices),
        "finish": [choice.finish_reason for piece in pieces for choice in piece.choices if choice.finish_reason],
        "vectors": len(litellm.embedding(**openai, input=["a", "bb"]).data),
    }
    for name, fields in {"n": {"n": 2}, "full": {"messages": [{"role": "user", "content": "full"}]}}.items():
        try:
            litellm.completion(**{**openai, "messages": question, **fields})
        except Exception as error:
            found[name] = type(error).__name__
    petals = litellm.completion(
        model=f"petals/{model}", api_base=f"{url}/api/v1/generate", messages=question, max_tokens=3, temperature=0.0
    )
    found["petals"] = petals.choices[0].message.content
    return found


if __name__ == "__main__":
    sys.stdout.write("\n" + json.dumps(main(*sys.argv[1:])) + "\n")
