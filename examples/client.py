"""Ask a running server with OpenAI's Python client, and print the answer as it comes.

localmimo serve                                     # in another terminal
pip install openai
python examples/client.py [http://127.0.0.1:8080/v1]
"""

import sys

from openai import OpenAI

url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8080/v1"
client = OpenAI(
    base_url=url, api_key="none"
)  # the client wants a key; the server asks for none on this machine

stream = client.chat.completions.create(
    model="any",  # the server has one model and ignores the name
    messages=[{"role": "user", "content": "Tell me about rivers."}],
    max_tokens=60,
    stream=True,
    stream_options={"include_usage": True},
)
for chunk in stream:
    for choice in chunk.choices:
        thinking = getattr(choice.delta, "reasoning_content", None)
        print(thinking or choice.delta.content or "", end="", flush=True)
    if chunk.usage:  # in the last chunk: tokens of the prompt, of these in the cache, of the answer
        print("\n" + chunk.usage.model_dump_json(exclude_none=True))
