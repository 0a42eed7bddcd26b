"""Talk to a running server with OpenAI's own client: start `localmimo serve` first, then run this.

python examples/client.py [http://127.0.0.1:8080/v1]
"""

import json
import sys

from openai import OpenAI

client = OpenAI(base_url=sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8080/v1", api_key="none")
messages = [{"role": "user", "content": "Tell me about rivers."}]

for chunk in client.chat.completions.create(
    model="any", messages=messages, max_tokens=60, stream=True, stream_options={"include_usage": True}
):
    for choice in chunk.choices:
        thought = getattr(choice.delta, "reasoning_content", None)
        print(thought or choice.delta.content or "", end="", flush=True)
    if chunk.usage:
        cached = chunk.usage.prompt_tokens_details.cached_tokens
        print(f"\n{json.dumps({'read': chunk.usage.prompt_tokens - cached, 'in the cache': cached})}")
