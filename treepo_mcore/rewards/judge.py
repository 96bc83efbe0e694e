"""A judge behind HTTP: another model reads the answer and says a number. Any server with OpenAI's chat completions."""

from __future__ import annotations

import os
import re
from functools import cache
from typing import Any

import openai

TEMPLATE = """Judge whether the response answers the question correctly.

Question:
{prompt}

Reference answer:
{answer}

Response:
{response}

End with one line, "Score: " and a number from 0 (wrong) to 1 (right)."""
PATTERN = r"[Ss]core\W*([-+]?\d*\.?\d+)"


async def judge(
    response: str,
    answer: Any,
    prompt: str,
    row: dict[str, Any],
    *,
    url: str,
    model: str,
    template: str = TEMPLATE,
    pattern: str = PATTERN,
    temperature: float = 0.0,
    max_tokens: int = 1024,
    retries: int = 4,
    key_variable: str = "",
) -> float:
    """The number in the last match of `pattern` in what the judge writes. Raises ValueError where there is none.

    url: such as http://judge:8000/v1. template: with {prompt}, {answer} and {response}. retries: of a server that does
    not answer or is busy, with growing pauses, within `reward.timeout`. key_variable: name of the environment variable
    that holds the key, which then reaches the workers.
    """
    values = {"prompt": prompt, "answer": str(answer), "response": response}
    text = re.sub(r"\{(prompt|answer|response)\}", lambda match: values[match[1]], template)
    said = await _client(url, retries, key_variable).chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": text}],
        temperature=temperature,
        max_tokens=max_tokens,
    )
    content = said.choices[0].message.content or ""
    if not (found := re.findall(pattern, content)):
        raise ValueError(f"the judge gave no number for {pattern!r}, it wrote {content[-100:]!r}")
    return float(found[-1])


@cache
def _client(url: str, retries: int, key_variable: str) -> openai.AsyncOpenAI:
    """One for all calls: it keeps its connections."""
    key = os.environ[key_variable] if key_variable else "none"
    return openai.AsyncOpenAI(base_url=url, api_key=key, max_retries=retries)
